"""The contract of every interaction block: ``[B, F, D] → [B, F′, D′]``; a vector is one field."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from types import MappingProxyType
from typing import Concatenate, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn

from ctrlib.config import Component, ConfigError, check_literals
from ctrlib.schema import FieldLayout

Axes = Mapping[str, tuple[tuple[str, ...], ...]]
"""For each shown tensor, the labels of its axes after the first, which is the rows."""

M = TypeVar("M", bound=nn.Module)
P = ParamSpec("P")
R = TypeVar("R")


class Interaction(Component, nn.Module, ABC):
    """A block. ``out`` says what axes 1 and 2 of the returned tensor mean; it is static, never a tensor.

    A block with something to show (attention, gates, strengths of interactions) has :meth:`explain`, and names in ``axes``
    what it shows. The others leave both alone.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Component.Config):
        """Options that a person chooses."""

    out: FieldLayout
    axes: Axes = MappingProxyType({})
    vectors_read: int | None = None  # of a block that may read several vectors per value side by side: how many

    @abstractmethod
    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, F′, D′]."""

    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """What the block has to show of each row, by name; an override is decorated by :func:`evaluating`.

        The first axis are the rows, whatever is the same for all of them included; ``axes`` has the labels of the others: of
        fields their names in the order of the layout, of pairs i < j ``"user*item"``, of anything else a name and a number. A
        layer's number ends the name: ``"gate/0"``; blocks of blocks put the place before it: ``"blocks.1/gate/0"``. What is
        called ``"attention"`` sums to 1 over the last axis.
        """
        return {}

    def __call__(self, x_BFD: Tensor) -> Tensor:
        return cast(Tensor, super().__call__(x_BFD))


def build(config: Interaction.Config, layout: FieldLayout) -> Interaction:
    """The block that ``config`` describes, for inputs of this layout.

    Raises:
        ConfigError: an option has a value that cannot be, or does not go with the layout.
    """
    check_literals(config)
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


def evaluating(method: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """A module's method run in evaluation mode and without gradients; afterwards every part is in the mode it was in."""

    @wraps(method)
    def run(self: M, /, *args: P.args, **kwargs: P.kwargs) -> R:
        training = {module: module.training for module in self.modules()}
        self.eval()
        try:
            with torch.no_grad():
                return method(self, *args, **kwargs)
        finally:
            for module, mode in training.items():
                module.training = mode

    return run


def numbered(name: str, count: int) -> tuple[str, ...]:
    """Labels of what has no names of its own: ``"head_0"``, ``"head_1"``, …"""
    return tuple(f"{name}_{i}" for i in range(count))
