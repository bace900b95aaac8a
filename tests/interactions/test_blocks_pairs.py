"""Any block after any other, any two side by side: all configurations, each with every kind of neighbour."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ctrlib.config import ConfigError
from ctrlib.interactions.base import Interaction, build
from ctrlib.interactions.compose import Parallel, Stack
from ctrlib.schema import FieldLayout
from tests.interactions.contract import LAYOUT, configs, make, needs, rows

CONFIGS = configs()
NEEDS = needs()
OUTS = {name: make(config).out for name, config in CONFIGS.items()}


def groups(kinds: dict[str, object]) -> list[list[str]]:
    """Names by kind."""
    found: dict[object, list[str]] = {}
    for name, kind in kinds.items():
        found.setdefault(kind, []).append(name)
    return list(found.values())


def turns(groups: list[list[str]], turn: int) -> Iterator[str]:
    """One of every group, in turn, so that all come up."""
    return (group[turn % len(group)] for group in groups)


def kind(out: FieldLayout) -> str:
    """What a block returns, as seen by a neighbour."""
    if out.width == 1:
        return "a logit"
    if out.num_fields == 1:
        return "a vector"
    return "the fields" if out.names == LAYOUT.names else "new fields"


# A successor sees its predecessor's output layout and nothing else of it: as many groups as there are shapes and sets of names.
PREDECESSORS = groups({name: (out.num_fields, out.dim, out.names == LAYOUT.names) for name, out in OUTS.items()})
NEIGHBOURS = groups({name: kind(out) for name, out in OUTS.items()})


def run(block: Interaction) -> None:
    """Forward and backward. In training mode, where batch norms act, and from small numbers: polynomials, and exponentials of
    them, grow fast."""
    x_BFD = (0.3 * rows(4)).requires_grad_()
    y_BFD = block.train()(x_BFD)
    assert y_BFD.shape == (4, block.out.num_fields, block.out.dim)
    y_BFD.sum().backward()  # type: ignore[no-untyped-call]
    assert x_BFD.grad is not None
    assert x_BFD.grad.isfinite().all()
    # Finite, not more: a norm over a single coordinate, or a softmax over a single field, is constant and lets no gradient by.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("second", CONFIGS)
def test_after_every_kind_of_output(second: str) -> None:
    tried = 0
    for first in turns(PREDECESSORS, list(CONFIGS).index(second)):
        fits = second not in NEEDS or NEEDS[second](OUTS[first])
        config = Stack.Config(blocks=(CONFIGS[first], CONFIGS[second]))
        if fits:
            run(make(config))
            tried += 1
        else:
            with pytest.raises(ConfigError):
                build(config, LAYOUT)
    assert tried


def test_every_block_came_first_before_several() -> None:
    came = [first for turn in range(len(CONFIGS)) for first in turns(PREDECESSORS, turn)]
    assert set(came) == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_beside_every_kind_of_block(name: str) -> None:
    for other in turns(NEIGHBOURS, list(CONFIGS).index(name)):
        for pair in ((name, other), (other, name)):
            block = make(Parallel.Config(streams=tuple(CONFIGS[n] for n in pair), fusion="concat"))
            assert block.out.width == sum(OUTS[n].width for n in pair)
            run(block)


@pytest.mark.parametrize("name", CONFIGS)
def test_added_to_and_multiplied_by_itself(name: str) -> None:
    run(make(Parallel.Config(streams=(CONFIGS[name],) * 2, fusion="sum")))
    run(make(Parallel.Config(streams=(CONFIGS[name],) * 2, fusion="product")))
