"""One context, many candidates: what depends on the context alone is computed once.

A model is exported to a graph of tensor operations, whatever blocks it has. :func:`hoist` rewrites the graph. Every value in it
is one of three things: the same for all requests (folded), of the context alone (computed for a single row), or of candidates.
A tensor with both along one axis, such as tokens of fields ``[B, F, D]``, is kept in two pieces, ``[1, F₁, D]`` of the context
and ``[B, F₂, D]`` of candidates. Operations that treat the places of this axis alike are done to both pieces. Where the axis is
summed over, the sum of the context's piece is added: x·W = x₁·W₁ + x₂·W₂, the bias included in the first term. An operation
without a rule reads the two pieces joined: slower, never wrong. :func:`fuse` then packs the layers for the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from ctrlib.hoisting.fusing import fuse
from ctrlib.hoisting.program import export_model, flat_inputs
from ctrlib.hoisting.rewriter import Rewriter
from ctrlib.hoisting.rules import rewrite
from ctrlib.hoisting.values import Hoisted, Side

__all__ = ["Hoisted", "Side", "export_model", "flat_inputs", "fuse", "hoist"]


def hoist(
    program: torch.export.ExportedProgram, side: Side, sequences: Sequence[tuple[str, bool]]
) -> tuple[fx.GraphModule, tuple[Hoisted, ...]]:
    """The program split into what is done once and what is done for every candidate.

    Args:
        program: from :func:`export_model`.
        side: the columns of the context.
        sequences: the names, and whether each is nested.

    Returns:
        A module of: the context's ``sparse`` [1, F₁] and ``dense`` [1, F₁], the candidates' ``sparse`` [B, F₂] and ``dense``
        [B, F₂], then the tensors of every sequence (of a single row if it is of the context) → logits [B] or [B, T]. And what
        was hoisted, one entry for every matrix product.

    Raises:
        ConfigError: the program has an operation that cannot be rewritten, or writes to a view of another value.
    """
    first = Rewriter(program, side, sequences, rewrite)
    result = first.run()
    if joined := first.better_joined():
        result = Rewriter(program, side, sequences, rewrite, joined).run()
    return result
