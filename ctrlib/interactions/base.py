"""The contract of every interaction block: ``[B, F, D] → [B, F′, D′]``; a vector is one field."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from ctrlib.config import Component, ConfigError
from ctrlib.schema import FieldLayout


class Interaction(Component, nn.Module, ABC):
    """A block. ``out`` says what axes 1 and 2 of the returned tensor mean; it is static, never a tensor.

    A block with something to show (attention, gates) also has ``explain(x_BFD) -> dict[str, Tensor]``.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Component.Config):
        """Options that a person chooses."""

    out: FieldLayout

    @abstractmethod
    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, F′, D′]."""

    def __call__(self, x_BFD: Tensor) -> Tensor:
        return cast(Tensor, super().__call__(x_BFD))


def build(config: Interaction.Config, layout: FieldLayout) -> Interaction:
    """The block that ``config`` describes, for inputs of this layout."""
    return cast(Interaction, config.component(config, layout))


def vector_width(block: str, layout: FieldLayout, count: int, vectors: int | str) -> int:
    """The width of one of the ``count`` vectors per value that ``block`` reads side by side.

    Raises:
        ConfigError: the layout's width is not a multiple; ``vectors`` is the option of a MultiVectorModel that makes it one.
    """
    if layout.dim % count:
        raise ConfigError(
            f"{block} reads {count} vectors per value ({layout.num_fields} fields) side by side, but the width is "
            f"{layout.dim}, which is not a multiple; use a MultiVectorModel with vectors={vectors!r}"
        )
    return layout.dim // count
