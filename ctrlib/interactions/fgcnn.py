"""FGCNN: convolutions over the field axis generate further fields (Liu et al., WWW 2019, arXiv:1904.04447)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError, positive
from ctrlib.interactions.base import Interaction, vector_width
from ctrlib.interactions.mlp import ACTIVATIONS, Activation, after_linear
from ctrlib.schema import FieldLayout


class FGCNN(Interaction):
    """The raw fields and N generated ones, for any block behind it. With X⁰ = x as one map of F rows, layer i of the generator
    is

        Cⁱ = tanh(BN(conv(Xⁱ⁻¹)))       kernel [h_i, 1], rows padded by zeros to the same height, m_c maps
        Xⁱ = maxpool(Cⁱ)                p_i rows into one; H_i = ⌈H_{i-1} / p_i⌉
        Rⁱ = tanh(BN(W vec(Xⁱ) + b))    "recombination" into m_r maps: N_i = H_i·m_r fields of width k

    Shape: [B, F, k] → [B, F + ΣN_i, k], generated fields ``"fgcnn_i_j"``. Neighbours among the fields matter: a kernel sees h_i
    of them. Parameters of a layer: h·m_c'·m_c + (H·k)²·m_c·m_r + H·k·m_r, and two per map and per unit for the norms.

    The paper gives the generator an embedding table of its own. With ``share_embedding=False`` the block reads both side by
    side, [B, F, 2k]: k numbers for what follows and k for the generator, which
    :class:`~ctrlib.models.multi_vector.MultiVectorModel` provides with ``vectors=2``.
    """

    # NOTE[DIFF] FuxiCTR pads an odd height before its first row (for windows of two: pool_pad="start"), has no norm in the
    # recombination, and its even kernels lose a row; other ports floor. The paper's Figure 2 (24 → 12 → 6 → 3 → 2 rows)
    # settles it: ceil. How weights start is not in the paper: here Xavier-uniform, biases at zero, the recombination's norms
    # with gains of 0.1: with 1, the many pairs of generated fields start an FM at logits of ±100.
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options; the defaults are the paper's for Criteo. The four tuples have an entry per layer; empty, they add nothing.

        Attributes:
            kernel_heights: fields that a convolution sees.
            channels: maps m_c of every convolution.
            pool_sizes: rows that are pooled into one.
            new_maps: maps m_r of every recombination.
            generator: ``"mlp"`` is the paper's ablation: layers as wide as the generated fields instead of convolutions.
            recombine: False, an ablation too, takes the pooled maps themselves; needs ``channels`` equal to ``new_maps``.
            use_raw: False, the third ablation, returns the generated fields only.
            share_embedding: False reads two vectors per value, see above.
            conv_norm: batch norm after every convolution.
            recombine_norm: batch norm in the recombination, or after every layer of the MLP generator.
            conv_bias: ``None`` adds a bias where there is no norm.
            activation: of convolution and recombination.
            pooling: what happens to the rows that do not fill a window; ``"floor"`` drops them.
            pool_pad: on which side a window is filled up.
            field_order: all fields in the order in which the generator reads them; ``None`` for that of the input.

        Raises:
            ConfigError: tuples of different lengths, a size below 1, an ablation that cannot be.
        """

        kernel_heights: tuple[int, ...] = (9, 9, 9, 9)
        channels: tuple[int, ...] = (38, 40, 42, 44)
        pool_sizes: tuple[int, ...] = (2, 2, 2, 2)
        new_maps: tuple[int, ...] = (3, 3, 3, 3)
        generator: Literal["cnn", "mlp"] = "cnn"
        recombine: bool = True
        use_raw: bool = True
        share_embedding: bool = True
        conv_norm: Literal["none", "batch"] = "batch"
        recombine_norm: Literal["none", "batch"] = "batch"
        conv_bias: bool | None = None
        activation: Activation = "tanh"
        pooling: Literal["ceil", "floor"] = "ceil"
        pool_pad: Literal["end", "start"] = "end"
        field_order: tuple[str, ...] | None = None

        def __post_init__(self) -> None:
            positive("FGCNN.kernel_heights", *self.kernel_heights)
            positive("FGCNN.channels", *self.channels)
            positive("FGCNN.pool_sizes", *self.pool_sizes)
            positive("FGCNN.new_maps", *self.new_maps)
            lengths = [len(sizes) for sizes in (self.kernel_heights, self.channels, self.pool_sizes, self.new_maps)]
            if len(set(lengths)) > 1:
                raise ConfigError(
                    f"FGCNN.kernel_heights, channels, pool_sizes and new_maps have {', '.join(map(str, lengths))} entries; "
                    "expected one per layer in each"
                )
            if not self.recombine and (self.generator == "mlp" or self.channels != self.new_maps):
                raise ConfigError(
                    "FGCNN.recombine is False, so the pooled maps are the new fields; this needs generator='cnn' and channels "
                    f"equal to new_maps, but they are {self.generator!r}, {self.channels} and {self.new_maps}"
                )
            if not self.use_raw and not self.new_maps:
                raise ConfigError(
                    "FGCNN.use_raw is False and there are no layers, so nothing is left; add layers or keep the raw fields"
                )
            if not self.use_raw and not self.share_embedding:
                raise ConfigError(
                    "FGCNN.use_raw is False, so nothing would read the first of a value's two vectors; set share_embedding=True"
                    " (and vectors=1 in a MultiVectorModel)"
                )

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        self.use_raw, self.share_embedding = config.use_raw, config.share_embedding
        self.vectors_read = 1 if config.share_embedding else 2
        self.dim = vector_width("FGCNN", layout, self.vectors_read, 2)
        order = _positions(config.field_order, layout)
        self.order: Tensor | None
        self.register_buffer("order", None if order is None else torch.tensor(order), persistent=False)
        heights = _heights(config, layout.num_fields)
        counts = [height * maps for height, maps in zip(heights[1:], config.new_maps, strict=True)]
        self.convolutions = nn.ModuleList(
            _convolution(config, i, heights[i]) for i in range(len(counts) if config.generator == "cnn" else 0)
        )
        widths = (
            [height * maps * self.dim for height, maps in zip(heights[1:], config.channels, strict=True)]
            if config.generator == "cnn"
            else [count * self.dim for count in (layout.num_fields, *counts[:-1])]
        )
        self.recombinations = nn.ModuleList(
            _recombination(config, width, count * self.dim)
            for width, count in zip(widths, counts, strict=False)
            if config.recombine
        )
        generated = tuple(f"fgcnn_{i}_{j}" for i, count in enumerate(counts) for j in range(count))
        self.num_generated = len(generated)
        self.out = FieldLayout((layout.names if config.use_raw else ()) + generated, self.dim)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, k] (or [B, F, 2k] with two vectors per value) → [B, F + N, k], or [B, N, k] without the raw fields."""
        raw_BFD, source_BFD = (x_BFD, x_BFD) if self.share_embedding else x_BFD.chunk(2, dim=2)
        fields = [raw_BFD, *self.generate(source_BFD)] if self.use_raw else self.generate(source_BFD)
        return torch.cat(fields, dim=1)

    def generate(self, x_BFD: Tensor) -> list[Tensor]:
        """The generated fields of every layer: [B, F, k] → [B, N_1, k], [B, N_2, k], …"""
        if self.order is not None:
            x_BFD = x_BFD.index_select(1, self.order)
        fields: list[Tensor] = []
        if not len(self.convolutions):  # the MLP
            h_BU = x_BFD.flatten(1)
            for layer in self.recombinations:
                h_BU = layer(h_BU)
                fields.append(h_BU.unflatten(1, (-1, self.dim)))
            return fields
        maps_BCHD = x_BFD.unsqueeze(1)
        for i, convolution in enumerate(self.convolutions):
            maps_BCHD = convolution(maps_BCHD)
            if len(self.recombinations):
                fields.append(self.recombinations[i](maps_BCHD.flatten(1)).unflatten(1, (-1, self.dim)))
            else:
                fields.append(maps_BCHD.flatten(1, 2))
        return fields


def _heights(config: FGCNN.Config, num_fields: int) -> list[int]:
    """Rows before the first layer and after every one."""
    heights = [num_fields]
    for size in config.pool_sizes:
        heights.append(-(-heights[-1] // size) if config.pooling == "ceil" else heights[-1] // size)
    if not heights[-1]:
        raise ConfigError(
            f"FGCNN.pooling is 'floor', which leaves {' → '.join(map(str, heights))} rows; use 'ceil', fewer layers or smaller "
            "pool_sizes"
        )
    return heights


def _positions(field_order: tuple[str, ...] | None, layout: FieldLayout) -> list[int] | None:
    if field_order is None:
        return None
    if sorted(field_order) != sorted(layout.names):
        raise ConfigError(
            f"FGCNN.field_order names {', '.join(field_order)}; expected each of the fields once: {', '.join(layout.names)}"
        )
    return [layout.names.index(name) for name in field_order]


def _convolution(config: FGCNN.Config, i: int, rows: int) -> nn.Sequential:
    """Layer i up to the pooling. Shape: [B, m_c', rows, k] → [B, m_c, H, k]."""
    height, size = config.kernel_heights[i], config.pool_sizes[i]
    inputs, outputs = (1, *config.channels)[i : i + 2]
    has_norm = config.conv_norm == "batch"
    bias = config.conv_bias if config.conv_bias is not None else not has_norm
    odd = height % 2 == 1
    conv = nn.Conv2d(inputs, outputs, (height, 1), padding=(height // 2 if odd else 0, 0), bias=bias)
    nn.init.xavier_uniform_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    layers: list[nn.Module] = [] if odd else [nn.ZeroPad2d((0, 0, height // 2 - 1, height // 2))]
    layers.append(conv)
    if has_norm:
        layers.append(nn.BatchNorm2d(outputs))
    layers.append(ACTIVATIONS[config.activation]())
    if config.pool_pad == "start" and config.pooling == "ceil" and rows % size:
        layers.append(nn.ConstantPad2d((0, 0, size - rows % size, 0), -torch.inf))
    layers.append(nn.MaxPool2d((size, 1), ceil_mode=config.pooling == "ceil"))
    return nn.Sequential(*layers)


def _recombination(config: FGCNN.Config, inputs: int, outputs: int) -> nn.Sequential:
    """A layer of generated fields. Shape: [B, inputs] → [B, outputs]."""
    linear = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    after = after_linear(outputs, norm=config.recombine_norm, activation=config.activation)
    if config.recombine_norm == "batch":
        nn.init.constant_(after[0].weight, 0.1)  # type: ignore[arg-type]
    return nn.Sequential(linear, *after)
