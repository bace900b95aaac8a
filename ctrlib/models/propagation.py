"""What the nodes of a graph take from their neighbours: plain smoothing (SGC), with a teleport (APPNP), or with weights (GCN).

Shape letters: B nodes, C width, E edges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrlib.batch import Edges
from ctrlib.config import Component, ConfigError, check_choice, fraction, positive
from ctrlib.dropout import dropout
from ctrlib.ragged import segment_sum
from ctrlib.schema import DataError

PropagationName = Literal["sgc", "appnp", "gcn", "none"]


def take(edges: Edges, x_BC: Tensor) -> Tensor:
    """Σ_e weight_e · x of the source, for every node: the sparse matrix times x. Shape: [B, C] → [B, C].

    A symmetric matrix is its own gradient, so nothing is transposed or kept beside it.
    """
    if not edges.symmetric:
        return segment_sum(x_BC.index_select(0, edges.sources), edges.offsets, edges.weight.to(x_BC.dtype))
    apply: Any = _Symmetric.apply
    return cast(Tensor, apply(x_BC, edges.offsets, edges.sources, edges.weight.to(x_BC.dtype)))


def _product(x_BC: Tensor, offsets: Tensor, sources: Tensor, weight: Tensor) -> Tensor:
    """As weighted embedding bags: in a fixed order on any device, and ×2 faster than torch's sparse matrices where C is 64."""
    return F.embedding_bag(sources, x_BC.contiguous(), offsets, mode="sum", per_sample_weights=weight, include_last_offset=True)


class _Symmetric(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BC: Tensor, offsets: Tensor, sources: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(offsets, sources, weight)
        return _product(x_BC, offsets, sources, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _product(grads[0], *ctx.saved_tensors), None, None, None


class Propagation(Component, nn.Module):
    """Nodes take from their neighbours, L times. Shape: [B, C] → [B, C].

    With Ã the matrix of the edges, for whole graphs D^-½ (A + I) D^-½:

        sgc    Y = Ã^L H                                                     CatGCN's pure neighbourhood aggregation (eq. 2)
        appnp  Z ← (1 − t)·Ã Z + t·H, L times, from Z = H                    (arXiv:1810.05997)
        gcn    H ← Ã H W + b, L times, with ReLU and dropout between         (arXiv:1609.02907)
        none   Y = H

    Without edges nodes are isolated: Ã = I. Only ``gcn`` has parameters.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Component.Config):
        """Options.

        Attributes:
            name: which.
            hops: L. NOTE[DIFF] the paper prints no default; it uses 3 to 11.
            teleport: t of ``appnp``.
            units: width between the layers of ``gcn``, which reads H of this width too.
            dropout: between the layers of ``gcn``.

        Raises:
            ConfigError: an unknown name, a number of hops or units below 1, a share outside [0, 1).
        """

        name: PropagationName = "sgc"
        hops: int = 4
        teleport: float = 0.1
        units: int = 64
        dropout: float = 0.0

        def __post_init__(self) -> None:
            check_choice("Propagation.name", self.name, get_args(PropagationName))
            positive("Propagation.hops", self.hops)
            positive("Propagation.units", self.units)
            fraction("Propagation.teleport", self.teleport)
            fraction("Propagation.dropout", self.dropout)

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config = config
        self.in_width = config.units if config.name == "gcn" else width
        self.layers, self.biases = nn.ModuleList(), nn.ParameterList()
        if config.name == "gcn":
            widths = [config.units] * config.hops + [width]
            self.layers.extend(nn.Linear(a, b, bias=False) for a, b in pairwise(widths))
            self.biases.extend(nn.Parameter(torch.zeros(b)) for b in widths[1:])
            self.register_load_state_dict_pre_hook(_refuse_inner_biases)  # type: ignore[no-untyped-call]

    @property
    def reach(self) -> int:
        """How many edges away a node may be and still count."""
        return 0 if self.config.name == "none" else self.config.hops

    def forward(self, h_BC: Tensor, edges: Edges | None) -> Tensor:
        """[B, width between] → [B, C]."""
        config = self.config

        def smooth(x_BC: Tensor) -> Tensor:
            return x_BC if edges is None else take(edges, x_BC)

        if config.name == "gcn":
            for i, (layer, bias) in enumerate(zip(self.layers, self.biases, strict=True)):
                x_BC = dropout(h_BC.relu(), config.dropout, self.training) if i else h_BC
                h_BC = smooth(layer(x_BC)) + bias  # the last layer is narrow, so weights first
            return h_BC
        z_BC = h_BC
        for _ in range(self.reach):
            z_BC = smooth(z_BC) if config.name == "sgc" else (1 - config.teleport) * smooth(z_BC) + config.teleport * h_BC
        return z_BC

    def __call__(self, h_BC: Tensor, edges: Edges | None) -> Tensor:
        return cast(Tensor, super().__call__(h_BC, edges))


def _refuse_inner_biases(module: nn.Module, state: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Weights that were trained as Ã(H W + b) would give other numbers here, and no b gives theirs."""
    if f"{prefix}layers.0.bias" in state:
        raise DataError("the weights are of an older gcn, which smoothed its bias along the edges; train the model again")


def check_reach(propagation: Propagation.Config, fan_outs: tuple[int, ...]) -> None:
    """
    Raises:
        ConfigError: neighbours are to be sampled for another number of hops than the model takes.
    """
    hops = 0 if propagation.name == "none" else propagation.hops
    if len(fan_outs) != hops:
        raise ConfigError(
            f"fan_outs has {len(fan_outs)} numbers and the model takes {hops} hops; give one number of neighbours for "
            "each hop, or set model.propagation.hops"
        )
