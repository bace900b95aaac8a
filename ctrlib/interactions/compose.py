"""Blocks of blocks: one after another (``Stack``), side by side (``Parallel``), and the bilinear fusion of two vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError, positive
from ctrlib.interactions.base import Axes, Interaction, build, evaluating, numbered
from ctrlib.schema import FieldLayout

T = TypeVar("T")


class Stack(Interaction):
    """y = block_n(… block_1(x)). Shape: [B, F, D] → what the last block returns; each block is built for its predecessor's
    ``out``."""

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """``blocks``, first to last.

        Raises:
            ConfigError: no blocks.
        """

        blocks: tuple[Interaction.Config, ...]

        def __post_init__(self) -> None:
            if not self.blocks:
                raise ConfigError("Stack.blocks is empty; expected at least one block")

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.out = layout
        self.axes: Axes = {}
        for i, block_config in enumerate(config.blocks):
            block = build(block_config, self.out)
            self.blocks.append(block)
            self.out = block.out
            self.axes |= _placed(f"blocks.{i}", block.axes)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, F′, D′] of the last block."""
        for block in self.blocks:
            x_BFD = block(x_BFD)
        return x_BFD

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """What the blocks have to show, each given its own input; names begin with the place: ``"blocks.1/attention/0"``."""
        shown: dict[str, Tensor] = {}
        for i, block in enumerate(self.blocks):
            shown |= _placed(f"blocks.{i}", cast(Interaction, block).explain(x_BFD))
            x_BFD = block(x_BFD)
        return shown


class Parallel(Interaction):
    """Several streams over the same input, then one fusion of what they return:

    ========== ======================================================== ===========================================
    fusion     y                                                        shape
    ========== ======================================================== ===========================================
    sum        Σ_s y_s                                                  [B, F′, D′], which all streams must share
    product    Π_s y_s, element by element                              the same
    concat     [vec(y_1), vec(y_2), …]                                  [B, 1, Σ widths], field ``"concat"``
    bilinear   :class:`BilinearFusion` of exactly two flattened streams [B, 1, 1], field ``"bilinear"``
    ========== ======================================================== ===========================================

    With sum and product a field keeps its name where the streams agree, and is called ``"fm+mlp"`` or ``"fm*mlp"`` where not.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options; ``num_heads`` is of the bilinear fusion.

        Raises:
            ConfigError: no streams; bilinear with other than two streams; ``num_heads`` below 1.
        """

        streams: tuple[Interaction.Config, ...]
        fusion: Literal["sum", "concat", "product", "bilinear"] = "sum"
        num_heads: int = 1

        def __post_init__(self) -> None:
            positive("Parallel.num_heads", self.num_heads)
            if not self.streams:
                raise ConfigError("Parallel.streams is empty; expected at least one stream")
            if self.fusion == "bilinear" and len(self.streams) != 2:
                raise ConfigError(
                    f"Parallel.fusion is 'bilinear' with {len(self.streams)} streams; expected exactly two: "
                    "group them with Stack or Parallel, or choose another fusion"
                )

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        streams = [build(stream, layout) for stream in config.streams]
        self.streams = nn.ModuleList(streams)
        self.fusion = config.fusion
        outs = [stream.out for stream in streams]
        self.axes: Axes = {}
        for i, stream in enumerate(streams):
            self.axes |= _placed(f"streams.{i}", stream.axes)
        if config.fusion == "bilinear":
            self.axes |= {"bilinear": (numbered("head", config.num_heads),)}
            self.bilinear = BilinearFusion(outs[0].width, outs[1].width, config.num_heads)
            self.out = FieldLayout(("bilinear",), 1)
        elif config.fusion == "concat":
            self.out = FieldLayout(("concat",), sum(out.width for out in outs))
        else:
            if len({(out.num_fields, out.dim) for out in outs}) > 1:
                shapes = ", ".join(f"{type(s).__name__} [B, {s.out.num_fields}, {s.out.dim}]" for s in streams)
                raise ConfigError(
                    f"Parallel.fusion is {config.fusion!r}, which needs streams of one shape, but they return {shapes}; "
                    "give them equal widths or choose fusion='concat'"
                )
            sign = "+" if config.fusion == "sum" else "*"
            names = zip(*(out.names for out in outs), strict=True)
            self.out = FieldLayout(tuple(sign.join(dict.fromkeys(column)) for column in names), outs[0].dim)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, F′, D′]; see the table above."""
        outputs = [cast(Tensor, stream(x_BFD)) for stream in self.streams]
        if self.fusion == "concat":
            return torch.cat([y.flatten(1) for y in outputs], dim=1).unsqueeze(1)
        if self.fusion == "bilinear":
            return cast(Tensor, self.bilinear(outputs[0].flatten(1), outputs[1].flatten(1))).unsqueeze(1)
        fused = outputs[0]
        for y in outputs[1:]:
            fused = fused + y if self.fusion == "sum" else fused * y
        return fused

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """What the streams have to show, names beginning with the place (``"streams.0/attention/0"``), and ``"bilinear"``
        [B, num_heads]."""
        shown: dict[str, Tensor] = {}
        for i, stream in enumerate(self.streams):
            shown |= _placed(f"streams.{i}", cast(Interaction, stream).explain(x_BFD))
        if self.fusion == "bilinear":
            first, second = (stream(x_BFD).flatten(1) for stream in self.streams)
            shown["bilinear"] = self.bilinear.heads(first, second)
        return shown


class LinearFusion(nn.Module):
    """logit = w_1ᵀ a + b_1 + w_2ᵀ b + b_2 of two vectors: concatenation and a linear layer. Shape: [B, d_1], [B, d_2] → [B, 1].

    NOTE[DIFF] two scalar biases where one would do: as in the released code, so that published parameter counts hold.
    """

    def __init__(self, width_1: int, width_2: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width_1, 1)
        self.linear_2 = nn.Linear(width_2, 1)

    def forward(self, a_BD: Tensor, b_BD: Tensor) -> Tensor:
        """[B, d_1], [B, d_2] → [B, 1]."""
        return cast(Tensor, self.linear_1(a_BD) + self.linear_2(b_BD))


class BilinearFusion(LinearFusion):
    """Multi-head bilinear fusion (FinalMLP, arXiv:2304.00902): both vectors are cut into k blocks, and

        logit = w_1ᵀ a + b_1 + w_2ᵀ b + b_2 + Σ_j a_jᵀ W_3^(j) b_j

    Shape: [B, d_1], [B, d_2] → [B, 1]. Parameters: d_1 + d_2 + 2 + d_1·d_2/k.

    Raises:
        ConfigError: ``num_heads`` does not divide both widths.
    """

    def __init__(self, width_1: int, width_2: int, num_heads: int = 1) -> None:
        super().__init__(width_1, width_2)
        if width_1 % num_heads or width_2 % num_heads:
            raise ConfigError(
                f"num_heads is {num_heads}, which does not divide the fused widths {width_1} and {width_2}; "
                "choose a common divisor of both"
            )
        self.shape = (num_heads, width_1 // num_heads, width_2 // num_heads)
        # Stored flat because Xavier on this shape (as released) starts the bilinear term smaller than matrix by matrix.
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(width_1 * width_2 // num_heads, 1)))

    def heads(self, a_BD: Tensor, b_BD: Tensor) -> Tensor:
        """a_jᵀ W_3^(j) b_j of every head: [B, d_1], [B, d_2] → [B, k]."""
        num_heads, width_1, width_2 = self.shape
        product = torch.einsum("bki,kij->bkj", a_BD.reshape(-1, num_heads, width_1), self.weight.view(self.shape))
        return (product * b_BD.reshape(-1, num_heads, width_2)).sum(dim=-1)

    def forward(self, a_BD: Tensor, b_BD: Tensor) -> Tensor:
        """[B, d_1], [B, d_2] → [B, 1]."""
        return super().forward(a_BD, b_BD) + self.heads(a_BD, b_BD).sum(dim=-1, keepdim=True)


def _placed(place: str, shown: Mapping[str, T]) -> dict[str, T]:
    """The same under names that begin with the place."""
    return {f"{place}/{name}": value for name, value in shown.items()}
