"""The new graph: versions of every value for one row and for all, and what is common to the rules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from math import prod
from operator import add, getitem
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from ctrlib.config import ConfigError
from ctrlib.hoisting.values import Context, Full, Hoisted, Many, NoRuleError, Parts, Rows, Side, Static, Value

aten = torch.ops.aten

_SKIPPED = {aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten.sym_constrain_range_for_size.default}
VIEWS = {aten.flatten.using_ints, aten.view.default, aten.reshape.default, aten.unflatten.int, aten.unsqueeze.default}
VIEWS |= {aten.squeeze.dim}
TRANSPOSES = {aten.transpose.int, aten.mT.default, aten.permute.default}
_MOVING = {*VIEWS, *TRANSPOSES, aten.dropout.default}
_CHEAP = 32  # so many multiplications for a number cost less than to join that number with others
_MULTIPLYING = {aten.linear.default, aten.matmul.default, aten.einsum.default, aten.conv2d.default}

Rewrite = Callable[["Rewriter", fx.Node], Value]


class Rewriter:
    """Walks through a program once and makes the new graph. :meth:`one` and :meth:`full` give a value of the program as a node
    of the new graph, for the context's row and for all candidates; they are made when somebody asks.

    Args:
        program, side, sequences: see :func:`ctrlib.hoisting.hoist`.
        rewrite: the rules, for operations of which some arguments are of candidates.
        joined: values of the program whose two pieces are joined at once, see :meth:`better_joined`.
    """

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        side: Side,
        sequences: Sequence[tuple[str, bool]],
        rewrite: Rewrite,
        joined: Collection[str] = (),
    ) -> None:
        self.rewrite = rewrite
        self.at_once = joined
        self.unruled: set[fx.Node] = set()  # operations that read their arguments joined
        module = program.module(check_guards=False)
        self.old = module
        self.new = fx.Graph()
        self.root = nn.Module()
        self.values: dict[fx.Node, Value] = {}
        self.fulls: dict[fx.Node, Any] = {}
        self.ones: dict[fx.Node, Any] = {}
        self.constants: dict[int, tuple[fx.Node, Any]] = {}
        self.found: list[Hoisted] = []
        self.side, self.sequences = side, sequences
        self.rows: Any = None  # the symbol of B
        self.counting: set[fx.Node] = set()  # integers made of offsets: of equal rows they are not equal

    def run(self) -> tuple[fx.GraphModule, tuple[Hoisted, ...]]:
        """The new graph, and the share of each matrix product that is done once."""
        self._inputs()
        for node in self.old.graph.nodes:
            if node.op in ("placeholder", "call_module") or node.target in _SKIPPED:
                continue
            if node.op == "get_attr":
                value: Any = self.old
                for name in node.target.split("."):
                    value = getattr(value, name)
                self.values[node] = Static(value.detach() if isinstance(value, Tensor) else value)
            elif node.op == "call_function":
                result = node.meta.get("val")
                whole = isinstance(result, Tensor) and not result.dtype.is_floating_point
                if whole and not self.counting.isdisjoint(node.all_input_nodes):
                    self.counting.add(node)
                value = self._call(node)
                if isinstance(value, Parts) and node.name in self.at_once:
                    value = Full(self.joined(value))
                self.values[node] = value
            elif node.op == "output":
                self.new.output(self.full(_result(self.old)))
            else:
                raise ConfigError(f"the model's graph has an operation {node.op} ({node.target}) that cannot be rewritten")
        self.new.eliminate_dead_code()
        self.new.lint()
        return fx.GraphModule(self.root, self.new), tuple(self.found)

    def better_joined(self) -> set[str]:
        """After :meth:`run`: values in two pieces of which all that becomes is joined later, by way of cheap operations only.
        To join them at once costs less: there are fewer of them, of fewer numbers."""
        found: set[fx.Node] = set()
        for node in reversed(self.old.graph.nodes):
            if isinstance(self.values.get(node), Parts) and node.users and all(self._joins(user, found) for user in node.users):
                found.add(node)
        return {node.name for node in found}

    def _joins(self, user: fx.Node, later: Collection[fx.Node]) -> bool:
        if user.op == "output" or user in self.unruled:
            return True
        if user.target is aten.linear.default:
            weight = self.values[cast(fx.Node, user.args[1])]
            assert isinstance(weight, Static)
            out, width = weight.value.shape
            return user in later and width <= min(out, _CHEAP)
        return user in later and user.target in _MOVING

    def _inputs(self) -> None:
        olds = [node for node in self.old.graph.nodes if node.op == "placeholder"]
        self.rows = _result(self.old).meta["val"].shape[0]
        columns = [(olds[0], self.side.sparse), (olds[1], self.side.dense)]
        above = [self.new.placeholder(f"context_{name}") for name in ("sparse", "dense")]
        below = [self.new.placeholder(f"candidate_{name}") for name in ("sparse", "dense")]
        self.one_row, self.all_rows = (self.emit(aten.sym_size.int, side[0], 0) for side in (above, below))
        for (old, here), context, candidates in zip(columns, above, below, strict=True):
            size = old.meta["val"].shape[1]
            if not here:
                self.values[old] = Full(candidates)
            elif len(here) == size:
                self.values[old] = Context(context)
            else:
                self.values[old] = Parts(context, candidates, 1, here, size)
        rest = iter(olds[2:])
        for at, (name, nested) in enumerate(self.sequences):
            parts = [next(rest) for _ in range(3 if nested else 2)]
            nodes = [
                self.new.placeholder(f"sequence_{at}_{part}")
                for part, _ in zip(("values", "offsets", "inner"), parts, strict=False)
            ]
            for old, node in zip(parts, nodes, strict=True):
                self.values[old] = Context(node) if name in self.side.sequences else Full(node)
            self.counting |= set(parts[1:])
            if name in self.side.sequences:
                self.fulls |= zip(parts, self._repeated(nodes), strict=True)

    def _repeated(self, nodes: Sequence[Any]) -> list[Any]:
        """The sequence of the context, for every candidate (lazily: what nobody reads is removed)."""
        values, offsets, *inner = nodes
        count = self.emit(aten.sym_size.int, values, 0)
        tiled = self.emit(aten.repeat.default, values, [self.all_rows])
        length = self.emit(aten.slice.Tensor, offsets, 0, 1, 2)
        ends = self.emit(aten.arange.start, 0, self.emit(add, self.all_rows, 1), dtype=torch.int32)
        repeated = [tiled, self.emit(aten.mul.Tensor, ends, length)]
        for bounds in inner:
            steps = self.emit(aten.arange.start, 0, self.all_rows, dtype=torch.int32)
            steps = self.emit(aten.unsqueeze.default, self.emit(aten.mul.Tensor, steps, count), 1)
            later = self.emit(aten.add.Tensor, self.emit(aten.slice.Tensor, bounds, 0, 1), steps)
            first = self.emit(aten.slice.Tensor, bounds, 0, 0, 1)
            repeated.append(self.emit(aten.cat.default, [first, self.emit(aten.reshape.default, later, [-1])]))
        return repeated

    # Emitting.

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """A new operation."""
        return self.new.call_function(target, args, kwargs)

    def constant(self, value: Any) -> Any:
        """A static value as an argument in the new graph."""
        if not isinstance(value, Tensor | nn.Module):
            return value
        if id(value) not in self.constants:
            name = f"constant_{len(self.constants)}"
            if isinstance(value, nn.Module):
                self.root.add_module(name, value)
            else:
                self.root.register_buffer(name, value)
            self.constants[id(value)] = self.new.get_attr(name), value  # kept, so that the id stays its own
        return self.constants[id(value)][0]

    def one(self, node: Any) -> Any:
        """The value for the context's single row."""
        value = self.values[node]
        if isinstance(value, Static):
            return self.constant(value.value)
        if isinstance(value, Context):
            return value.node
        assert isinstance(value, Rows), value
        if node not in self.ones:
            self.ones[node] = self.copied(node, self.one, self.one_row)
        return self.ones[node]

    def full(self, node: Any) -> Any:
        """The value for all candidates."""
        value = self.values[node]
        if isinstance(value, Static):
            return self.constant(value.value)
        if isinstance(value, Full):
            return value.node
        if node not in self.fulls:
            if isinstance(value, Parts):
                self.fulls[node] = self.joined(value)
            elif isinstance(value, Context) and (shape := self._spread_shape(node)) is not None:
                self.fulls[node] = self.emit(aten.expand.default, value.node, shape)
            elif isinstance(value, Context) and self._is_tokens(node):
                times = [self.all_rows, *[1] * (len(node.meta["val"].shape) - 1)]
                self.fulls[node] = self.emit(aten.repeat.default, value.node, times)
            elif isinstance(value, Many):
                self.fulls[node] = [self._full_value(v) for v in value.values]
            else:
                self.fulls[node] = self.copied(node, self.full, self.all_rows)
        return self.fulls[node]

    def _full_value(self, value: Value) -> Any:
        if isinstance(value, Parts):
            return self.joined(value)
        assert isinstance(value, Full)
        return value.node

    def copied(self, node: fx.Node, version: Callable[[Any], Any], rows: Any) -> Any:
        """The operation again, of other versions of its arguments."""
        if node.target is aten.sym_size.int and self.is_rows(node.meta.get("val")):
            return rows
        args, kwargs = fx.map_arg((node.args, node.kwargs), version)
        return self.emit(node.target, *args, **kwargs)

    def is_rows(self, size: Any) -> bool:
        """Whether a size is the number of rows."""
        return isinstance(size, torch.SymInt) and size.node.expr == self.rows.node.expr

    def _spread_shape(self, node: fx.Node) -> list[Any] | None:
        """What to expand one row to; ``None`` where no dimension is that of rows."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or node in self.counting:
            return None
        rows = [self.is_rows(size) for size in value.shape]
        if sum(rows) != 1 or not all(here or isinstance(size, int) for here, size in zip(rows, value.shape, strict=True)):
            return None
        return [self.all_rows if here else -1 for here in rows]

    def _is_tokens(self, node: fx.Node) -> bool:
        """Numbers of every behaviour: equal rows have equal ones."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not value.dtype.is_floating_point or value.dim() < 2:
            return False
        lengths = {self._symbol(old.meta["val"].shape[0]) for old in self.fulls if old.op == "placeholder"}
        return self._symbol(value.shape[0]) in lengths and all(isinstance(size, int) for size in value.shape[1:])

    @staticmethod
    def _symbol(size: Any) -> Any:
        return size.node.expr if isinstance(size, torch.SymInt) else size

    def joined(self, parts: Parts) -> Any:
        """Both pieces as one tensor, for all candidates."""
        both = [self.grown(parts.context), parts.candidates]
        return self.ordered(both, [*parts.here, *parts.there], parts.axis)

    def grown(self, node: Any) -> Any:
        """A piece of the context, for all candidates."""
        return self.emit(_rows_of, node, self.all_rows)

    def ordered(self, nodes: Sequence[Any], places: Sequence[int], axis: int) -> Any:
        """Pieces one behind the other, whose entries belong to these places, sorted by place."""
        whole = self.emit(aten.cat.default, list(nodes), axis) if len(nodes) > 1 else nodes[0]
        order = np.argsort(places, kind="stable").tolist()
        return whole if order == list(range(len(order))) else self.chosen(whole, axis, order)

    def chosen(self, node: Any, axis: int, places: Sequence[int]) -> Any:
        """Some entries of an axis."""
        if list(places) == list(range(places[0], places[0] + len(places))):
            return self.emit(aten.slice.Tensor, node, axis, places[0], places[0] + len(places))
        return self.emit(aten.index_select.default, node, axis, self.constant(torch.tensor(places)))

    def of_static(self, value: Tensor, dim: int, places: Sequence[int]) -> Any:
        """Some entries of an axis of a weight."""
        return self.constant(value.index_select(dim, torch.tensor(places, device=value.device)).contiguous())

    # One operation.

    def _check_writes(self, node: fx.Node) -> None:
        """Refuse an operation that writes to memory of which another value is a view: pieces would not see it."""
        for argument, written in zip(node.target._schema.arguments, node.args, strict=False):  # type: ignore[union-attr]
            if argument.alias_info is None or not argument.alias_info.is_write or not isinstance(written, fx.Node):
                continue
            if _is_view(written) or any(_is_view(user) for user in written.users):
                raise ConfigError(f"the model writes in place to a view ({node.target}); use the operation that does not")

    def _call(self, node: fx.Node) -> Value:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            self._check_writes(node)
        used = [self.values[n] for n in node.all_input_nodes]
        if all(isinstance(value, Static) for value in used):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: cast(Static, self.values[n]).value)
            with torch.no_grad():
                return Static(cast(Any, node.target)(*args, **kwargs))
        if node.target is getitem and isinstance(used[0], Many):
            return cast(Value, used[0].values[cast(int, node.args[1])])
        if node.target is aten.sym_size.int and self.is_rows(node.meta.get("val")):
            return Rows()
        if all(isinstance(value, Static | Rows) for value in used):
            return Rows()
        if all(isinstance(value, Static | Rows | Context) for value in used):
            self.note(node, 1.0)
            return Context(self.copied(node, self.one, self.one_row))
        if node.target is aten.dropout.default and node.args[2] is False:
            return self.values[cast(fx.Node, node.args[0])]
        known = len(self.found)
        try:
            return self.rewrite(self, node)
        except NoRuleError:
            del self.found[known:]
            self.unruled.add(node)
            self.note(node, 0.0)
            return Full(self.copied(node, self.full, self.all_rows))

    def note(self, node: fx.Node, share: float) -> None:
        """For the report: so much of a matrix product is done once."""
        if node.target in _MULTIPLYING:
            modules = [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]
            path = modules[-1].removeprefix("L['self'].").removeprefix("model.") if modules else ""
            self.found.append(Hoisted(path, str(node.target).split(".")[1], self._multiplications(node), share))

    def _multiplications(self, node: fx.Node) -> int:
        """Of one row; sizes that depend on the rows count as 1."""

        def sizes(n: Any) -> list[int]:
            value = self.values.get(n)
            shape = value.value.shape if isinstance(value, Static) else n.meta["val"].shape
            return [size if isinstance(size, int) else 1 for size in shape]

        if node.target is aten.einsum.default:
            equation, operands = cast(tuple[str, list[fx.Node]], node.args[:2])
            terms = equation.replace(" ", "").split("->")[0].split(",")
            pairs = (pair for term, n in zip(terms, operands, strict=True) for pair in zip(term, sizes(n), strict=False))
            return prod(dict(sorted(pairs, key=lambda pair: pair[1])).values())
        out = prod(size if isinstance(size, int) else 1 for size in node.meta["val"].shape)
        return out * (prod(sizes(node.args[1])[1:]) if node.target is aten.conv2d.default else sizes(node.args[0])[-1])

    def shape(self, node: fx.Node) -> list[Any]:
        """The sizes of a tensor, −1 for the rows; no rule is for others."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not value.dim() or not self.is_rows(value.shape[0]):
            raise NoRuleError
        if not all(isinstance(size, int) for size in value.shape[1:]):
            raise NoRuleError
        return [-1, *value.shape[1:]]


def _is_view(node: fx.Node) -> bool:
    """Whether a value shares the memory of what it was made of, without being all of it, written in place."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    aliases = [found.alias_info for found in node.target._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _result(module: fx.GraphModule) -> fx.Node:
    outputs: Any = next(node for node in module.graph.nodes if node.op == "output").args[0]
    return cast(fx.Node, outputs[0] if isinstance(outputs, list | tuple) else outputs)


def _rows_of(piece: Tensor, rows: int) -> Tensor:
    """One row, for each of ``rows``."""
    return piece.expand(rows, *piece.shape[1:])
