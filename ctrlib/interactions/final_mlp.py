"""FinalMLP: two gated MLPs over the same embeddings, fused by a bilinear form (Mao et al., AAAI 2023, arXiv:2304.00902)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError, positive
from ctrlib.interactions.base import Interaction, evaluating, numbered
from ctrlib.interactions.compose import BilinearFusion, LinearFusion
from ctrlib.interactions.mlp import MLP
from ctrlib.schema import FieldLayout

STREAM = MLP.Config(norm="batch")  # where the paper's search starts: [400, 400, 400]


class FinalMLP(Interaction):
    """For the two streams s, with e = vec(x) of width F·D:

        h_s   = 2σ(Gate_s(c_s)) ⊙ e            stream-specific feature selection; a gate of 1 leaves a coordinate alone
        o_s   = MLP_s(h_s)                      no output layer
        logit = w_1ᵀo_1 + b_1 + w_2ᵀo_2 + b_2 + Σ_j o_1jᵀ W_3^(j) o_2j

    Shape: [B, F, D] → [B, 1, 1], field ``"final_mlp"``. The gate reads c_s, the embeddings of chosen context fields (from
    tables that are not those of x), or without a context a learned vector that starts at zero: one gate for all rows.
    DualMLP is ``use_fs=False, fusion="concat"``.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options.

        Attributes:
            mlp1: first stream, without an output layer.
            mlp2: second stream, without an output layer.
            use_fs: have the gates (feature selection).
            fs_hidden_units: hidden ReLU layers of each gate.
            num_heads: k of the bilinear fusion; must divide the last widths of both streams.
            fusion: ``"bilinear"`` is the paper's; the others put a linear layer on o_1 + o_2, o_1 ⊙ o_2 or [o_1, o_2].

        Raises:
            ConfigError: a stream with an ``output_dim``; a width or ``num_heads`` below 1.
        """

        mlp1: MLP.Config = STREAM
        mlp2: MLP.Config = STREAM
        use_fs: bool = True
        fs_hidden_units: tuple[int, ...] = (800,)
        num_heads: int = 1
        fusion: Literal["bilinear", "sum", "concat", "product"] = "bilinear"

        def __post_init__(self) -> None:
            positive("FinalMLP.num_heads", self.num_heads)
            positive("FinalMLP.fs_hidden_units", *self.fs_hidden_units)
            for name, mlp in (("mlp1", self.mlp1), ("mlp2", self.mlp2)):
                if mlp.output_dim is not None:
                    raise ConfigError(
                        f"FinalMLP.{name}.output_dim is {mlp.output_dim}; expected None: the fusion makes the logit. "
                        "Put that width last in hidden_units instead"
                    )

    def __init__(
        self,
        config: Config,
        layout: FieldLayout,
        context_1: FieldLayout | None = None,
        context_2: FieldLayout | None = None,
    ) -> None:
        """``context_1`` and ``context_2`` are the layouts of the gates' contexts, ``None`` for a learned vector.

        Raises:
            ConfigError: a context without gates; ``num_heads`` does not divide both widths; unequal widths with sum or product.
        """
        super().__init__()
        if not config.use_fs and (context_1 or context_2):
            raise ConfigError("FinalMLP has a context but use_fs is False, so no gate reads it; set use_fs or leave it out")
        self.gate_1 = FeatureGate(config.fs_hidden_units, layout, context_1) if config.use_fs else None
        self.gate_2 = FeatureGate(config.fs_hidden_units, layout, context_2) if config.use_fs else None
        self.mlp_1 = MLP(config.mlp1, layout)
        self.mlp_2 = MLP(config.mlp2, layout)
        self.kind = config.fusion
        width_1, width_2 = self.mlp_1.out.width, self.mlp_2.out.width
        self.fusion: nn.Module
        if config.fusion == "bilinear":
            self.fusion = BilinearFusion(width_1, width_2, config.num_heads)
        elif config.fusion == "concat":
            self.fusion = LinearFusion(width_1, width_2)
        elif width_1 == width_2:
            self.fusion = nn.Linear(width_1, 1)
        else:
            raise ConfigError(
                f"FinalMLP.fusion is {config.fusion!r}, which needs equal last widths, but mlp1 ends with {width_1} and mlp2 "
                f"with {width_2}; make them equal or choose 'bilinear' or 'concat'"
            )
        self.out = FieldLayout(("final_mlp",), 1)
        embedding = (layout.names, numbered("dim", layout.dim))
        self.axes = {"gate_1": embedding, "gate_2": embedding} if config.use_fs else {}
        if config.fusion == "bilinear":
            self.axes |= {"bilinear": (numbered("head", config.num_heads),)}

    def __call__(self, x_BFD: Tensor, context_1: Tensor | None = None, context_2: Tensor | None = None) -> Tensor:
        return cast(Tensor, nn.Module.__call__(self, x_BFD, context_1, context_2))

    def forward(self, x_BFD: Tensor, context_1: Tensor | None = None, context_2: Tensor | None = None) -> Tensor:
        """[B, F, D] and the contexts [B, c, d], where the block was built for them → [B, 1, 1]."""
        o_1, o_2 = self._streams(x_BFD, context_1, context_2)
        if self.kind == "sum":
            logit = self.fusion(o_1 + o_2)
        elif self.kind == "product":
            logit = self.fusion(o_1 * o_2)
        else:
            logit = self.fusion(o_1, o_2)
        return cast(Tensor, logit).unsqueeze(1)

    @evaluating
    def explain(self, x_BFD: Tensor, context_1: Tensor | None = None, context_2: Tensor | None = None) -> dict[str, Tensor]:
        """``"gate_1"``, ``"gate_2"`` [B, F, D], each in (0, 2), and ``"bilinear"`` [B, num_heads], where the block has them."""
        shown: dict[str, Tensor] = {}
        for name, gate, context in (("gate_1", self.gate_1, context_1), ("gate_2", self.gate_2, context_2)):
            if gate is not None:
                shown[name] = gate(context).expand(len(x_BFD), -1, -1)
        if isinstance(self.fusion, BilinearFusion):
            shown["bilinear"] = self.fusion.heads(*self._streams(x_BFD, context_1, context_2))
        return shown

    def _streams(self, x_BFD: Tensor, context_1: Tensor | None, context_2: Tensor | None) -> tuple[Tensor, Tensor]:
        h_1 = x_BFD if self.gate_1 is None else x_BFD * self.gate_1(context_1)
        h_2 = x_BFD if self.gate_2 is None else x_BFD * self.gate_2(context_2)
        return self.mlp_1(h_1).flatten(1), self.mlp_2(h_2).flatten(1)


class FeatureGate(nn.Module):
    """2σ(MLP(context)), a factor in (0, 2) for every coordinate of the embeddings. Shape: context [B, c, d] → [B, F, D].

    Without a context the MLP reads one learned vector [1, D], zero at the start, and the gate is [1, F, D]: the same for all
    rows, so it is computed once instead of B times. When all linear biases start at zero too, as in the released code, every
    hidden unit sits exactly at the ReLU's kink, where the gradient is zero: then only the last bias ever learns.
    """

    def __init__(self, hidden_units: tuple[int, ...], layout: FieldLayout, context: FieldLayout | None) -> None:
        super().__init__()
        self.gated = (layout.num_fields, layout.dim)
        self.vector = nn.Parameter(torch.zeros(1, layout.dim)) if context is None else None
        source = FieldLayout(("vector",), layout.dim) if context is None else context
        self.mlp = MLP(MLP.Config(hidden_units=hidden_units, output_dim=layout.width), source)

    def forward(self, context: Tensor | None) -> Tensor:
        if (context is None) == (self.vector is None):
            raise ConfigError(
                "FinalMLP was built for a context but got none; pass the tensor [B, c, d]"
                if context is None
                else "FinalMLP got a context but was built without its layout; pass it to the constructor"
            )
        source = self.vector.unsqueeze(1) if self.vector is not None else cast(Tensor, context)
        return 2 * self.mlp(source).sigmoid().view(-1, *self.gated)
