"""The configurations that stand for the blocks in the tests of all blocks. They are collected from the test of each block:

* ``CONTRACT``: by name, one or more, of which the first letters are the block's; two where an option changes the code path.
* ``NEEDS``, where a block refuses some inputs: for a name in ``CONTRACT``, whether an input of that layout can be read.
* ``DERIVED``, where a block shows what it does not compute in forward: for a name in ``CONTRACT``, what that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ctrlib.interactions.base import Interaction, build
from ctrlib.schema import FieldLayout

LAYOUT = FieldLayout(("user", "item", "hour", "city"), 6)

Need = Callable[[FieldLayout], bool]


def two_fields(layout: FieldLayout) -> bool:
    """For what pairs the fields: a single one has no partner."""
    return layout.num_fields >= 2


def even_width(layout: FieldLayout) -> bool:
    """For what cuts every vector in two: two vectors of a value, or two heads."""
    return layout.dim % 2 == 0


def configs() -> Mapping[str, Interaction.Config]:
    """By name."""
    found: dict[str, Interaction.Config] = {}
    for module in _modules():
        for name, config in getattr(module, "CONTRACT", {}).items():
            assert name not in found, f"{name} is in CONTRACT of two files"
            found[name] = config
    return found


def needs() -> Mapping[str, Need]:
    """By name of a config."""
    return {name: need for module in _modules() for name, need in getattr(module, "NEEDS", {}).items()}


def derived() -> Mapping[str, set[str]]:
    """By name of a config."""
    return {name: shown for module in _modules() for name, shown in getattr(module, "DERIVED", {}).items()}


def make(config: Interaction.Config, layout: FieldLayout = LAYOUT) -> Interaction:
    """The block from a fixed seed, in eval mode."""
    torch.manual_seed(1)
    return build(config, layout).eval()


def rows(count: int) -> Tensor:
    """Random input."""
    return torch.randn(count, LAYOUT.num_fields, LAYOUT.dim, generator=torch.Generator().manual_seed(count))


def _modules() -> Iterator[ModuleType]:
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if not path.stem.startswith("test_blocks_"):
            yield import_module(f"tests.interactions.{path.stem}")
