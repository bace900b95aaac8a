"""The gated pairs of AutoFIS (Liu et al., KDD 2020, arXiv:2003.11235); they are searched by :mod:`ctrlib.search.auto_fis`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError
from ctrlib.interactions.base import Interaction, evaluating
from ctrlib.interactions.pairs import PairProducts, pair_names
from ctrlib.schema import FieldLayout, suggest


class AutoFIS(Interaction):
    """Inner products of pairs of fields, each normalised, each with a weight that a search may bring to zero:

        y = Σ_{(i,j) ∈ pairs} α_ij · BN(⟨x_i, x_j⟩)

    BN has no scale and shift of its own, so that the size of a pair's part is in α_ij, and pairs compare by it.
    Shape: [B, F, D] → [B, 1, 1], field ``"auto_fis"``. Parameters: one per pair. With ``norm="none"`` and all α = 1 this is FM.
    """

    # NOTE[DIFF] pairs only; the paper also gates triples, on top of the pairs it has kept
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """
        Args:
            pairs: the only ones, as ``"user*item"`` in the order of the layout; ``None``: all.
            alpha: where the weights of these pairs start; ``None``: uniform in start ± 0.001.
            start: see ``alpha``.
            learn_alpha: train the weights; ``False`` leaves them as they start.
            norm: ``none`` leaves the products as they are.
        """

        pairs: tuple[str, ...] | None = None
        alpha: tuple[float, ...] | None = None
        start: float = 0.6
        learn_alpha: bool = True
        norm: Literal["batch", "none"] = "batch"

        def __post_init__(self) -> None:
            if self.pairs is not None and not self.pairs:
                raise ConfigError("AutoFIS.pairs is empty; expected at least one pair, or None for all")
            if self.alpha is not None and self.pairs is None:
                raise ConfigError(f"AutoFIS.alpha has {len(self.alpha)} weights, but pairs is None; name the pair of each")
            if self.alpha is not None and self.pairs is not None and len(self.alpha) != len(self.pairs):
                raise ConfigError(
                    f"AutoFIS.alpha has {len(self.alpha)} weights for {len(self.pairs)} pairs; expected one for each"
                )

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        self.config = config
        known = pair_names("AutoFIS", layout)
        place = {name: p for p, name in enumerate(known)}
        self.names = known if config.pairs is None else config.pairs
        for name in self.names:
            if name not in place:
                raise ConfigError(f"AutoFIS.pairs names {name!r}, which is no pair of its fields{suggest(name, known)}")
        chosen = [place[name] for name in self.names]
        if chosen != sorted(set(chosen)):
            raise ConfigError(
                "AutoFIS.pairs names a pair twice, or not in the order of the fields; expected each once, in order"
            )
        self.products = PairProducts(layout.num_fields, chosen)
        start_P = config.start + 2e-3 * (torch.rand(len(chosen)) - 0.5)
        if config.alpha is not None:
            start_P = torch.tensor(config.alpha)
        self.alpha_P = nn.Parameter(start_P, requires_grad=config.learn_alpha)
        # NOTE[DIFF] TensorFlow's default ε in the authors' code is 1e-3, torch's 1e-5, with which small products start larger
        self.norm = nn.BatchNorm1d(len(chosen), affine=False) if config.norm == "batch" else None
        self.out = FieldLayout(("auto_fis",), 1)
        self.axes = {"pair": (self.names,)}

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, 1, 1]."""
        return self._parts(x_BFD).sum(dim=1, keepdim=True).unsqueeze(1)

    def _parts(self, x_BFD: Tensor) -> Tensor:
        product_BP = self.products(x_BFD)
        if self.norm is not None:
            product_BP = cast(Tensor, self.norm(product_BP))
        return product_BP * self.alpha_P

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """``"pair"`` [B, P]: what every pair adds to the logit, α_ij · BN(⟨x_i, x_j⟩)."""
        return {"pair": self._parts(x_BFD)}
