"""What is done to tensors of which one piece is of the context: one rule for each kind of operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx

from ctrlib.hoisting.rewriter import TRANSPOSES, VIEWS, Rewriter
from ctrlib.hoisting.values import Context, Full, Many, NoRuleError, Parts, Rows, Static, Value

aten = torch.ops.aten

_POINTWISE = {aten.dropout.default, aten.to.dtype, aten.contiguous.default, aten.detach.default, aten.where.ScalarSelf}
_POINTWISE |= {aten.where.ScalarOther, aten.masked_fill.Scalar, aten.rsub.Scalar, aten.square.default, aten.embedding.default}


def _parts(r: Rewriter, node: Any) -> Parts:
    value = r.values[node] if isinstance(node, fx.Node) else None
    if not isinstance(value, Parts):
        raise NoRuleError
    return value


def _dim(r: Rewriter, dim: int, node: fx.Node) -> int:
    return dim % len(r.shape(node))


def rewrite(r: Rewriter, node: fx.Node) -> Value:
    """The operation done to both pieces of its arguments.

    Raises:
        NoRuleError: the pieces have to be joined.
    """
    target: Any = node.target
    if target in VIEWS:
        return _view(r, node)
    if target in TRANSPOSES:
        return _transpose(r, node)
    rule = _RULES.get(target)
    if rule is not None:
        return rule(r, node)
    in_place = isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
    if not in_place and (target in _POINTWISE or torch.Tag.pointwise in getattr(target, "tags", ())):
        return _pointwise(r, node)
    raise NoRuleError


def _view(r: Rewriter, node: fx.Node) -> Value:
    x = _parts(r, node.args[0])
    old, new = r.shape(cast(fx.Node, node.args[0])), r.shape(node)
    mask = np.zeros(old[1:], bool)
    np.moveaxis(mask, x.axis - 1, 0)[list(x.here)] = True
    found = _axis_of(mask.reshape(new[1:]))
    if found is None:
        raise NoRuleError
    axis, here = found
    sizes = [[*new[: axis + 1], count, *new[axis + 2 :]] for count in (len(here), new[axis + 1] - len(here))]
    context, candidates = (
        r.emit(aten.reshape.default, piece, shape) for (piece, _), shape in zip(x.pieces, sizes, strict=True)
    )
    return Parts(context, candidates, axis + 1, here, new[axis + 1])


def _transpose(r: Rewriter, node: fx.Node) -> Value:
    x = _parts(r, node.args[0])
    rank = len(r.shape(cast(fx.Node, node.args[0])))
    r.shape(node)
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [d % rank for d in cast(list[int], node.args[1])]
    else:
        first, second = (-1, -2) if node.target is aten.mT.default else cast(tuple[int, int], node.args[1:3])
        order[first % rank], order[second % rank] = order[second % rank], order[first % rank]
    if order[0] != 0:
        raise NoRuleError
    return _both(r, x, lambda piece, _: r.emit(aten.permute.default, piece, order), order.index(x.axis))


def _both(r: Rewriter, x: Parts, do: Callable[[Any, tuple[int, ...]], Any], axis: int | None = None) -> Parts:
    context, candidates = (do(piece, places) for piece, places in x.pieces)
    return replace(x, context=context, candidates=candidates, axis=x.axis if axis is None else axis)


def _divided(r: Rewriter, node: Any, axis: int, here: tuple[int, ...], size: int) -> Parts:
    """A value with the same places of the context as another."""
    value = r.values[node]
    there = [i for i in range(size) if i not in set(here)]
    if isinstance(value, Parts):
        if value.axis != axis or value.size != size or not set(here) <= set(value.here):
            raise NoRuleError
        if value.here == here:
            return value
        at = {place: i for i, place in enumerate(value.here)}
        moved = [place for place in value.here if place not in set(here)]
        more = r.grown(r.chosen(value.context, axis, [at[place] for place in moved]))
        candidates = r.ordered([more, value.candidates], [*moved, *value.there], axis)
        return Parts(r.chosen(value.context, axis, [at[i] for i in here]), candidates, axis, here, size)
    if not isinstance(value, Context | Rows) or r.shape(node)[axis] != size:
        raise NoRuleError
    whole = r.one(node)
    return Parts(r.chosen(whole, axis, here), r.grown(r.chosen(whole, axis, there)), axis, here, size)


def _pointwise(r: Rewriter, node: fx.Node) -> Value:
    out = r.shape(node)
    mixed = [n for n in node.all_input_nodes if isinstance(r.values[n], Parts)]
    if not mixed:
        raise NoRuleError
    grown = int(node.target is aten.embedding.default)  # one more dimension, behind the others
    axes = {_parts(r, n).axis for n in mixed}
    ranks = {len(r.shape(n)) + grown for n in mixed}
    if len(axes) != 1 or ranks != {len(out)}:
        raise NoRuleError
    axis, size = axes.pop(), _parts(r, mixed[0]).size
    common = set(_parts(r, mixed[0]).here).intersection(*(_parts(r, n).here for n in mixed))
    if not common or any(_parts(r, n).size != size for n in mixed):
        raise NoRuleError
    here = tuple(sorted(common))
    first = replace(_parts(r, mixed[0]), here=here)

    def piece(places: tuple[int, ...]) -> Any:
        def version(n: fx.Node) -> Any:
            value = r.values[n]
            if isinstance(value, Static):
                return _static_piece(r, value.value, axis - len(out), size, places, grown)
            if len(r.shape(n)) + grown != len(out):
                raise NoRuleError
            if isinstance(value, Context | Rows) and r.shape(n)[axis] == 1:
                return r.one(n)
            parts = _divided(r, n, axis, here, size)
            return parts.context if places == here else parts.candidates

        args, kwargs = fx.map_arg((node.args, node.kwargs), version)
        return r.emit(node.target, *args, **kwargs)

    return Parts(piece(here), piece(first.there), axis, here, size)


def _static_piece(r: Rewriter, value: Any, dim: int, size: int, places: tuple[int, ...], whole: int = 0) -> Any:
    """Of a static operand, the entries at these places of the axis ``dim`` < 0; all where it has none of its own."""
    if not isinstance(value, Tensor) or whole or value.dim() < -dim or value.shape[dim] == 1:
        return r.constant(value)
    if value.shape[dim] != size:
        raise NoRuleError
    return r.of_static(value, value.dim() + dim, places)


def _sum(r: Rewriter, node: fx.Node) -> Value:
    x = _parts(r, node.args[0])
    rank = len(r.shape(cast(fx.Node, node.args[0])))
    given: Any = node.args[1] if len(node.args) > 1 else None
    if given is None or node.kwargs:
        raise NoRuleError
    dims = sorted(d % rank for d in ([given] if isinstance(given, int) else given))
    keep = bool(node.args[2]) if len(node.args) > 2 else False
    if 0 in dims:
        raise NoRuleError
    if x.axis not in dims:
        axis = x.axis if keep else x.axis - sum(d < x.axis for d in dims)
        return _both(r, x, lambda piece, _: r.emit(node.target, piece, dims, keep), axis)
    context, candidates = (r.emit(aten.sum.dim_IntList, piece, dims, keep) for piece, _ in x.pieces)
    total = r.emit(aten.add.Tensor, candidates, context)
    if node.target is aten.mean.dim:
        sizes = r.shape(cast(fx.Node, node.args[0]))
        total = r.emit(aten.div.Tensor, total, prod(sizes[d] for d in dims))
    return Full(total)


def _linear(r: Rewriter, node: fx.Node) -> Value:
    x = _parts(r, node.args[0])
    rank = len(r.shape(cast(fx.Node, node.args[0])))
    weight = _static(r, node.args[1])
    bias = _static(r, node.args[2]) if len(node.args) > 2 and node.args[2] is not None else None
    r.note(node, len(x.here) / x.size)
    if x.axis != rank - 1:
        args = [r.constant(t) for t in (weight, bias)]
        return _both(r, x, lambda piece, _: r.emit(aten.linear.default, piece, *args))
    weights = [r.of_static(weight, 1, places) for places in (x.here, x.there)]
    context = r.emit(aten.linear.default, x.context, weights[0], r.constant(bias))
    if rank == 2:  # the one row is the bias of the candidates' product
        row = r.emit(aten.select.int, context, 0, 0)
        return Full(r.emit(aten.linear.default, x.candidates, weights[1], row))
    candidates = r.emit(aten.linear.default, x.candidates, weights[1])
    return Full(r.emit(aten.add.Tensor, candidates, context))


def _static(r: Rewriter, node: Any) -> Tensor:
    value = r.values[node] if isinstance(node, fx.Node) else None
    if not isinstance(value, Static) or not isinstance(value.value, Tensor):
        raise NoRuleError
    return value.value


def _matmul(r: Rewriter, node: fx.Node) -> Value:
    left, right = cast(tuple[fx.Node, fx.Node], node.args)
    out = r.shape(node)
    values = [r.values[left], r.values[right]]
    if all(isinstance(value, Parts) for value in values):
        return _matmul_pairs(r, node, cast(Parts, values[0]), cast(Parts, values[1]), len(out))
    flip = not isinstance(values[0], Parts)
    x, other = (_parts(r, right), _static(r, left)) if flip else (_parts(r, left), _static(r, right))
    rank = len(r.shape(right if flip else left))
    if rank < 2 or other.dim() < 2 or rank != len(out):
        raise NoRuleError
    r.note(node, len(x.here) / x.size)
    dim = x.axis - rank
    contracted = -2 if flip else -1

    def product(piece: Any, matrix: Any) -> Any:
        return r.emit(aten.matmul.default, *((matrix, piece) if flip else (piece, matrix)))

    if dim == contracted:
        along = other.dim() - (1 if flip else 2)
        terms = [product(piece, r.of_static(other, along, places)) for piece, places in x.pieces]
        return Full(r.emit(aten.add.Tensor, terms[1], terms[0]))
    if dim in (-1, -2):
        return _both(r, x, lambda piece, _: product(piece, r.constant(other)))
    return _both(r, x, lambda piece, places: product(piece, _static_piece(r, other, dim, x.size, places)))


def _matmul_pairs(r: Rewriter, node: fx.Node, x: Parts, y: Parts, rank: int) -> Value:
    left, right = cast(tuple[fx.Node, fx.Node], node.args)
    if x.axis != y.axis or x.here != y.here or x.axis >= rank - 2 or len(r.shape(left)) != len(r.shape(right)):
        raise NoRuleError
    r.note(node, len(x.here) / x.size)
    context = r.emit(aten.matmul.default, x.context, y.context)
    candidates = r.emit(aten.matmul.default, x.candidates, y.candidates)
    return Parts(context, candidates, x.axis, x.here, x.size)


def _einsum(r: Rewriter, node: fx.Node) -> Value:
    equation, operands = cast(tuple[str, list[fx.Node]], node.args[:2])
    if "." in equation or "->" not in equation:
        raise NoRuleError
    inputs, out = equation.replace(" ", "").split("->")
    terms = inputs.split(",")
    pairs = [(t, r.values[n]) for t, n in zip(terms, operands, strict=True)]
    found = {(t[p.axis], p.here, t[0]) for t, p in pairs if isinstance(p, Parts)}
    if len(found) != 1:
        raise NoRuleError
    letter, here, rows = found.pop()
    if not out.startswith(rows):
        raise NoRuleError
    for term, value in pairs:
        if isinstance(value, Static) != (rows not in term) or not isinstance(value, Static | Parts):
            raise NoRuleError

    def part(which: int) -> Any:
        args = []
        for term, value in pairs:
            if isinstance(value, Parts):
                args.append(value.pieces[which][0])
            elif isinstance(value, Static):
                places = sample.pieces[which][1]
                at = term.find(letter)
                args.append(r.constant(value.value) if at < 0 else r.of_static(value.value, at, places))
        return r.emit(aten.einsum.default, equation, args)

    sample = next(value for _, value in pairs if isinstance(value, Parts))
    r.note(node, len(here) / sample.size)
    if letter in out:
        return Parts(part(0), part(1), out.index(letter), here, sample.size)
    return Full(r.emit(aten.add.Tensor, part(1), part(0)))


def _cat(r: Rewriter, node: fx.Node) -> Value:
    nodes = cast(list[fx.Node], node.args[0])
    dim = _dim(r, cast(int, node.args[1]) if len(node.args) > 1 else 0, node)
    if dim == 0 or any(isinstance(r.values[n], Static) for n in nodes):
        raise NoRuleError
    others = [p for n in nodes if isinstance(p := r.values[n], Parts) and p.axis != dim]
    if others:  # of one axis, put together along another
        axis, here, size = others[0].axis, others[0].here, others[0].size
        divided = [_divided(r, n, axis, here, size) for n in nodes]
        above = r.emit(aten.cat.default, [p.context for p in divided], dim)
        below = r.emit(aten.cat.default, [p.candidates for p in divided], dim)
        return Parts(above, below, axis, here, size)
    context: list[Any] = []
    candidates: list[Any] = []
    here_all: list[int] = []
    start = 0
    for n in nodes:
        value, count = r.values[n], r.shape(n)[dim]
        if isinstance(value, Parts):
            context.append(value.context)
            candidates.append(value.candidates)
            here_all += [start + i for i in value.here]
        elif isinstance(value, Context | Rows):
            context.append(r.one(n))
            here_all += range(start, start + count)
        else:
            candidates.append(r.full(n))
        start += count
    if not context or not candidates:
        raise NoRuleError
    above, below = (g[0] if len(g) == 1 else r.emit(aten.cat.default, g, dim) for g in (context, candidates))
    return Parts(above, below, dim, tuple(here_all), start)


def _index_select(r: Rewriter, node: fx.Node) -> Value:
    x, dim = _parts(r, node.args[0]), _dim(r, cast(int, node.args[1]), cast(fx.Node, node.args[0]))
    index = _static(r, node.args[2])
    if dim != x.axis:
        if dim == 0:
            raise NoRuleError
        return _both(r, x, lambda piece, _: r.emit(aten.index_select.default, piece, dim, r.constant(index)))
    return _picked(r, x, index.tolist())


def _picked(r: Rewriter, x: Parts, places: Sequence[int]) -> Value:
    """Entries of the axis, in any order and number."""
    at = [{place: i for i, place in enumerate(group)} for _, group in x.pieces]
    here = tuple(i for i, place in enumerate(places) if place in at[0])
    inside = [[known[p] for p in places if p in known] for known in at]
    if not len(places):
        raise NoRuleError
    if not inside[0]:
        return Full(r.chosen(x.candidates, x.axis, inside[1]))
    if not inside[1]:
        return Context(r.chosen(x.context, x.axis, inside[0]))
    context, candidates = (r.chosen(piece, x.axis, chosen) for (piece, _), chosen in zip(x.pieces, inside, strict=True))
    return Parts(context, candidates, x.axis, here, len(places))


def _slice(r: Rewriter, node: fx.Node) -> Value:
    x, args = _parts(r, node.args[0]), [*node.args[1:], *[None] * 4]
    dim = _dim(r, cast(int, args[0] or 0), cast(fx.Node, node.args[0]))
    if dim == 0 or not all(isinstance(a, int | None) for a in args[1:4]):
        raise NoRuleError
    if dim != x.axis:
        return _both(r, x, lambda piece, _: r.emit(aten.slice.Tensor, piece, *node.args[1:]))
    return _picked(r, x, range(x.size)[slice(*cast(list[Any], args[1:4]))])


def _select(r: Rewriter, node: fx.Node) -> Value:
    x = _parts(r, node.args[0])
    dim, at = _dim(r, cast(int, node.args[1]), cast(fx.Node, node.args[0])), node.args[2]
    if dim == 0 or not isinstance(at, int):
        raise NoRuleError
    return _selected(r, x, dim, at)


def _selected(r: Rewriter, x: Parts, dim: int, at: int) -> Value:
    if dim != x.axis:
        axis = x.axis - int(dim < x.axis)
        return _both(r, x, lambda piece, _: r.emit(aten.select.int, piece, dim, at), axis)
    at %= x.size
    if at in x.here:
        return Context(r.emit(aten.select.int, x.context, dim, x.here.index(at)))
    return Full(r.emit(aten.select.int, x.candidates, dim, x.there.index(at)))


def _unbind(r: Rewriter, node: fx.Node) -> Value:
    x = _parts(r, node.args[0])
    old = r.shape(cast(fx.Node, node.args[0]))
    dim = (cast(int, node.args[1]) if len(node.args) > 1 else 0) % len(old)
    if dim == 0:
        raise NoRuleError
    return Many(tuple(_selected(r, x, dim, i) for i in range(old[dim])))


def _chunks(r: Rewriter, node: fx.Node) -> Value:
    x = _parts(r, node.args[0])
    old = r.shape(cast(fx.Node, node.args[0]))
    dim = (cast(int, node.args[2]) if len(node.args) > 2 else 0) % len(old)
    if dim == 0:
        raise NoRuleError
    sizes = [cast(Tensor, value).shape[dim] for value in node.meta["val"]]
    starts = np.cumsum([0, *sizes]).tolist()
    ranges = [range(a, b) for a, b in pairwise(starts)]
    if dim == x.axis:
        return Many(tuple(_picked(r, x, places) for places in ranges))

    def cut(places: range) -> Value:
        return _both(r, x, lambda piece, _: r.emit(aten.slice.Tensor, piece, dim, places.start, places.stop))

    return Many(tuple(cut(places) for places in ranges))


def _expand(r: Rewriter, node: fx.Node) -> Value:
    x = _parts(r, node.args[0])
    old, new = r.shape(cast(fx.Node, node.args[0])), r.shape(node)
    if len(old) != len(new) or new[x.axis] != x.size:
        raise NoRuleError
    sizes = [-1 if i in (0, x.axis) else size for i, size in enumerate(new)]
    return _both(r, x, lambda piece, _: r.emit(aten.expand.default, piece, sizes))


def _index_add(r: Rewriter, node: fx.Node) -> Value:
    target, dim, index, source = cast(tuple[fx.Node, int, fx.Node, fx.Node], node.args[:4])
    out, places = r.shape(node), _static(r, index).tolist()
    if dim == 0 or node.kwargs or len(node.args) > 4:
        raise NoRuleError
    origin, base = r.values[source], r.values[target]
    if isinstance(origin, Parts):
        if origin.axis != dim:
            raise NoRuleError
        sources, ours = origin, origin.here
    elif isinstance(origin, Full | Context):
        sources, ours = None, tuple(range(len(places))) if isinstance(origin, Context) else ()
    else:
        raise NoRuleError
    theirs = {places[i] for i in range(len(places)) if i not in set(ours)}
    mine = {places[i] for i in ours}
    if mine & theirs:  # such a place is of both
        raise NoRuleError
    if isinstance(base, Parts):
        if theirs & set(base.here) or base.axis != dim or mine & set(base.there):
            raise NoRuleError
        here = base.here
    else:
        here = tuple(i for i in range(out[dim]) if i not in theirs)
    if not here or len(here) == out[dim]:
        raise NoRuleError
    parts = _divided(r, target, dim, here, out[dim])
    pieces = []
    for which, (piece, own) in enumerate(parts.pieces):
        at = {place: i for i, place in enumerate(own)}
        index_here = [at[place] for place in places if place in at]
        if index_here:
            added = (r.one(source) if which == 0 else r.full(source)) if sources is None else sources.pieces[which][0]
            piece = r.emit(aten.index_add.default, piece, dim, r.constant(torch.tensor(index_here)), added)
        pieces.append(piece)
    return Parts(pieces[0], pieces[1], dim, here, out[dim])


def _batch_norm(r: Rewriter, node: fx.Node) -> Value:
    x = _parts(r, node.args[0])
    if node.args[5] is not False:
        raise NoRuleError
    dim = 1 - len(r.shape(cast(fx.Node, node.args[0])))

    def piece(value: Any, places: tuple[int, ...]) -> Any:
        stats = [_static(r, n) if n is not None else None for n in node.args[1:5]]
        chosen = [r.constant(s) if x.axis != 1 or s is None else r.of_static(s, 0, places) for s in stats]
        return r.emit(aten.batch_norm.default, value, *chosen, *node.args[5:])

    assert dim < 0
    return _both(r, x, piece)


def _layer_norm(r: Rewriter, node: fx.Node) -> Value:
    x, rank = _parts(r, node.args[0]), len(r.shape(node))
    if x.axis >= rank - len(cast(list[int], node.args[1])):
        raise NoRuleError
    rest = [r.constant(_static(r, n)) if isinstance(n, fx.Node) else n for n in node.args[2:]]
    return _both(r, x, lambda piece, _: r.emit(aten.layer_norm.default, piece, node.args[1], *rest))


def _softmax(r: Rewriter, node: fx.Node) -> Value:
    x = _parts(r, node.args[0])
    if _dim(r, cast(int, node.args[1]), node) in (0, x.axis):
        raise NoRuleError
    return _both(r, x, lambda piece, _: r.emit(node.target, piece, *node.args[1:]))


_RULES: Mapping[Any, Callable[[Rewriter, fx.Node], Value]] = {
    aten.sum.dim_IntList: _sum,
    aten.mean.dim: _sum,
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.einsum.default: _einsum,
    aten.cat.default: _cat,
    aten.index_select.default: _index_select,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.unbind.int: _unbind,
    aten.chunk.default: _chunks,
    aten.split.Tensor: _chunks,
    aten.expand.default: _expand,
    aten.index_add.default: _index_add,
    aten.batch_norm.default: _batch_norm,
    aten.layer_norm.default: _layer_norm,
    aten.softmax.int: _softmax,
}


def _axis_of(mask: np.ndarray[Any, np.dtype[np.bool_]]) -> tuple[int, tuple[int, ...]] | None:
    """The one axis along which a mask changes, and where it is true."""
    for axis in range(mask.ndim):
        lines = np.moveaxis(mask, axis, 0).reshape(mask.shape[axis], -1)
        if (lines == lines[:, :1]).all():
            return axis, tuple(np.flatnonzero(lines[:, 0]).tolist())
    return None
