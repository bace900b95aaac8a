"""Optimizers of embedding tables that touch only the rows of the batch.

A step has two halves, so that the gradient of all parameters can be clipped in between: the gradients of equal ids are summed
(:meth:`RowwiseTable.coalesce`), then those rows are updated (:meth:`RowwiseTable.step`). With g the summed gradient of a row,
t the number of the step and λ the L2 strength (g ← g + λw first):

======================  ====================================================================================================
``sgd``                 w ← w − η·g
``adagrad``             s ← s + g²;  w ← w − η·g/(√s + ε)                                         (Duchi et al. 2011)
``rowwise_adagrad``     the same with one s a row, s ← s + mean(g²)                               (as in FBGEMM)
``lazy_adam``           m ← β₁m + (1−β₁)g;  v ← β₂v + (1−β₂)g²;  w ← w − η·m̂/(√v̂ + ε), m̂ = m/(1−β₁ᵗ), v̂ = v/(1−β₂ᵗ)
``rowwise_adam``        the same with one v a row, of mean(g²)
``adam``                follows ``torch.optim.Adam`` on the whole table
======================  ====================================================================================================

**``adam``.** A row that is not in the batch has gradient zero. Dense Adam still moves it: in each such step its moments decay
by β₁ and β₂, and w ← w − η·m̂/(√v̂ + ε). Here the row *sits out*; when it is next read (or saved), it is caught up. Over k steps
after step s, with m and v as step s left them,

    w ← w − m · Σ_{j=1..k} a_j·e_j / (√v + ε·e_j),   a_j = η_{s+j}·β₁ʲ/(1 − β₁^{s+j}),   e_j = √((1 − β₂^{s+j})/β₂ʲ),

and m ← β₁ᵏm, v ← β₂ᵏv. The sum is that of f(e) = e/(√v + ε·e) over a measure with mass a_j at e_j, which depends on s and on
the learning rates alone, not on the row. Its four first moments are kept for every s, and the two-point Gauss rule that has the
same moments replaces it: so catching a row up costs two divisions per weight, however long it sat out. The rule is exact where
ε ≪ √v (f linear) and where ε ≫ √v (f constant); in between its relative error, in the movement of one catch-up, is below
5e-3 for rows last seen in the first step, below 1e-4 from the 20th step on (tests/test_rowwise.py sums by brute force). Steps
longer ago than β₁ʲ < 1e-9 add nothing. Conditions: no whole-table L2 or weight decay (every row would have a gradient in
every step), and every step reads the table.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrlib import _native
from ctrlib.table import EmbeddingTable

Rule = Literal["sgd", "adagrad", "rowwise_adagrad", "lazy_adam", "rowwise_adam", "adam"]

BETA1, BETA2 = 0.9, 0.999
ADAM_EPS, ADAGRAD_EPS = 1e-8, 1e-10
_WINDOW = math.ceil(math.log(1e-9) / math.log(BETA1))


class SatOut:
    """The Gauss rule of the steps that a row sat out, for every step at which it may have been last updated.

    Attributes:
        steps: taken so far.
        rule: [capacity, 4] float32: nodes and weights (e, a, e′, a′) by the number of the row's last step.
    """

    def __init__(self, device: torch.device) -> None:
        self.steps = 0
        self.rule = torch.zeros(1024, 4, device=device)
        self._moments = np.zeros((4, _WINDOW))  # Σ a·e^p, p = 0..3, by steps since the row's last one
        ages = np.arange(1, _WINDOW + 1)
        self._decay1, self._decay2 = BETA1**ages, BETA2**ages

    def advance(self, learning_rate: float) -> None:
        """Count one step with this learning rate."""
        self.steps += 1
        t, moments = self.steps, self._moments
        moments[:, 1:] = moments[:, :-1].copy()
        moments[:, 0] = 0
        term = learning_rate * self._decay1 / (1 - BETA1**t)
        node = np.sqrt((1 - BETA2**t) / self._decay2)
        for power in moments:
            power += term
            term = term * node
        mass, *raw = moments[:, : min(t - 1, _WINDOW)]
        if t >= len(self.rule):
            self.rule = torch.cat([self.rule, torch.zeros_like(self.rule)])
        if not len(mass):
            return
        mean, second, third = (m / mass for m in raw)
        deviation = np.sqrt(np.maximum(second - mean**2, 0))
        # The mass of a single step has no deviation, and rounding may leave a little.
        safe = np.maximum(deviation, 1e-6 * mean)
        skew = np.where(deviation > safe * 0.5, third - 3 * mean * second + 2 * mean**3, 0) / safe**3
        root = np.sqrt(1 + skew**2 / 4)
        share = 0.5 - skew / (4 * root)
        nodes = np.stack(
            [mean + deviation * (skew / 2 + root), mass * share, mean + deviation * (skew / 2 - root), mass * (1 - share)]
        )
        self.rule[t - len(mass) : t] = torch.from_numpy(nodes.T[::-1].astype(np.float32))

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs."""
        return {
            "steps": self.steps,
            "rule": self.rule[: self.steps + 1].clone(),
            "moments": torch.from_numpy(self._moments.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.steps = state["steps"]
        rule = state["rule"]
        self.rule = torch.zeros(max(1024, 2 * len(rule)), 4, device=self.rule.device)
        self.rule[: len(rule)] = rule
        self._moments = state["moments"].numpy().copy()


class RowwiseTable:
    """The state of one table and its two-part step. ``table`` is switched to sparse gradients.

    Args:
        table: V rows of width D; row 0 is padding and never updated.
        rule: see the module.
        sat_out: for ``adam``: shared by all tables with the same learning rate; the caller advances it after every step.
        l2: λ of the L2 penalty on the rows of the batch.
        l2_elapsed: count λ once for every step since the row was last in a batch, instead of once.
        seed: of the stochastic rounding of bfloat16 tables.

    State, beside the weights: ``adagrad`` V·D floats, ``rowwise_adagrad`` V, ``lazy_adam`` 2·V·D, ``rowwise_adam`` V·D + V,
    ``adam`` 2·V·D + V; ``l2_elapsed`` V; the kernel V more.
    """

    def __init__(
        self, table: EmbeddingTable, rule: Rule, sat_out: SatOut | None, l2: float, l2_elapsed: bool, seed: int
    ) -> None:
        self.table, self.rule, self.sat_out, self.l2, self.l2_elapsed, self.seed = table, rule, sat_out, l2, l2_elapsed, seed
        self.steps = 0
        weight = table.weight
        rows, dim = weight.shape

        self.dtype = torch.float32 if weight.dtype == torch.bfloat16 else weight.dtype  # of the state and of all arithmetic

        def zeros(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=weight.device)

        narrow = {"rowwise_adagrad": "first", "rowwise_adam": "second"}.get(rule)
        self.first = zeros(0) if rule == "sgd" else zeros(rows) if narrow == "first" else zeros(rows, dim)
        self.second = zeros(0) if "adam" not in rule else zeros(rows) if narrow == "second" else zeros(rows, dim)
        self.last = zeros(rows if rule == "adam" or (l2 and l2_elapsed) else 0, dtype=torch.int32)
        native = weight.device.type == "cpu" and self.dtype == torch.float32 and weight.is_contiguous()
        native = native and _native.kernel() is not None
        self._engine: _Torch | _Native = _Native(self) if native else _Torch(self)
        table.sparse = True
        self._hooks: list[Any] = []
        if rule == "adam":
            untyped: Any = table  # torch has no types for two of these
            self._hooks = [
                table.register_forward_pre_hook(torch.compiler.disable(self._before_read)),  # type: ignore[no-untyped-call]
                untyped.register_state_dict_pre_hook(self._before_state),
                untyped.register_load_state_dict_pre_hook(self._before_load),
            ]

    @property
    def step_seed(self) -> int:
        """Of the stochastic rounding in this step."""
        return (self.seed + self.steps * 0x9E3779B1) & 0xFFFFFFFF

    def coalesce(self) -> Tensor:
        """Sum the gradients of equal rows, add the L2 term; returns the sum of the squares of the result, a scalar."""
        grad = self.table.weight.grad
        if grad is None:
            ids = torch.zeros(0, dtype=torch.int64, device=self.table.weight.device)
            return self._engine.coalesce(ids, self.table.weight.new_zeros(0, self.table.embedding_dim))
        return self._engine.coalesce(grad._indices()[0], grad._values())

    def step(self, learning_rate: float, scale: Tensor | float = 1.0) -> None:
        """Update the rows of the last :meth:`coalesce`, their gradients times ``scale``."""
        self.steps += 1
        self._engine.update(learning_rate, scale)

    @torch.no_grad()
    def catch_up(self, ids: Tensor) -> None:
        """``adam``: bring these rows to where dense Adam would have them now."""
        if self.sat_out is not None and self.steps:
            self._engine.catch_up(ids)

    @torch.no_grad()
    def catch_up_all(self) -> None:
        """``adam``: the same for every row."""
        if self.sat_out is not None and self.steps:
            self._engine.catch_up_all()

    def close(self) -> None:
        """Catch up and give the table back as it was: dense gradients, no hooks."""
        self.catch_up_all()
        for hook in self._hooks:
            hook.remove()
        self.table.sparse = False

    def _before_read(self, table: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.catch_up(inputs[0])

    def _before_state(self, table: nn.Module, prefix: str, keep_vars: bool) -> None:
        self.catch_up_all()

    def _before_load(self, *arguments: object) -> None:
        self.catch_up_all()  # else the loaded rows would be moved by steps that other weights sat out

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs, beside the weights and ``sat_out``."""
        tensors = {"first": self.first, "second": self.second, "last": self.last}
        return {"steps": self.steps, **{name: tensor.clone() for name, tensor in tensors.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.steps = state["steps"]
        for name in ("first", "second", "last"):
            getattr(self, name).copy_(state[name])


class _Torch:
    """The reference, in torch operations, on any device."""

    def __init__(self, table: RowwiseTable) -> None:
        self._t = table
        self._rows = torch.zeros(0, dtype=torch.int64)
        self._sums = torch.zeros(0)

    def coalesce(self, ids: Tensor, values: Tensor) -> Tensor:
        t, weight = self._t, self._t.table.weight.detach()
        ids, order = torch.sort(ids.int() if len(weight) < 2**31 else ids, stable=True)  # half as wide, twice as fast
        rows, counts = torch.unique_consecutive(ids, return_counts=True)
        starts = torch.cumsum(counts, 0) - counts
        # a sum over stretches that is deterministic, and quicker than index_add
        sums = F.embedding_bag(order, values.to(t.dtype), starts, mode="sum") if len(ids) else values.to(t.dtype)
        if len(rows) and rows[0] == 0:
            rows, sums = rows[1:], sums[1:]
        rows = rows.long()
        if t.l2:
            strength: Tensor | float = t.l2
            if t.l2_elapsed:
                strength = t.l2 * (t.steps + 1 - t.last[rows]).to(t.dtype).unsqueeze(1)
            sums = sums + strength * weight[rows].to(t.dtype)
        self._rows, self._sums = rows, sums
        return (sums * sums).sum()

    def update(self, learning_rate: float, scale: Tensor | float) -> None:
        t, rows, g = self._t, self._rows, self._sums * scale
        weight = t.table.weight.detach()
        if t.rule == "adam":
            self._catch_up(rows, t.steps - 1)
        w = weight.index_select(0, rows).to(t.dtype)
        match t.rule:
            case "sgd":
                w.sub_(g, alpha=learning_rate)
            case "adagrad" | "rowwise_adagrad":
                square = g * g if t.rule == "adagrad" else (g * g).mean(1)
                s = t.first.index_select(0, rows).add_(square)
                t.first.index_copy_(0, rows, s)
                root = s.sqrt_().add_(ADAGRAD_EPS)
                w.addcdiv_(g, root if t.rule == "adagrad" else root.unsqueeze(1), value=-learning_rate)
            case _:
                square = (g * g).mean(1) if t.rule == "rowwise_adam" else g * g
                m = t.first.index_select(0, rows).lerp_(g, 1 - BETA1)
                v = t.second.index_select(0, rows).mul_(BETA2).add_(square, alpha=1 - BETA2)
                t.first.index_copy_(0, rows, m)
                t.second.index_copy_(0, rows, v)
                root = v.sqrt_().div_(math.sqrt(1 - BETA2**t.steps)).add_(ADAM_EPS)
                w.addcdiv_(
                    m, root.unsqueeze(1) if t.rule == "rowwise_adam" else root, value=-learning_rate / (1 - BETA1**t.steps)
                )
        self._store(rows, w)
        if len(t.last):
            t.last[rows] = t.steps

    def catch_up(self, ids: Tensor) -> None:
        stale = ids[(ids != 0) & (self._t.last[ids] != self._t.steps)]
        self._catch_up(torch.unique(stale), self._t.steps)

    def catch_up_all(self) -> None:
        self._catch_up((self._t.last[1:] != self._t.steps).nonzero().squeeze(1) + 1, self._t.steps)

    def _catch_up(self, rows: Tensor, now: int) -> None:
        t, weight = self._t, self._t.table.weight.detach()
        then = t.last[rows]
        t.last[rows] = now
        moved = (then > 0) & (then < now)
        rows, then = rows[moved].long(), then[moved].long()
        assert t.sat_out is not None
        e1, a1, e2, a2 = t.sat_out.rule[then].unsqueeze(2).unbind(1)
        m, v, gap = t.first[rows], t.second[rows], (now - then).unsqueeze(1)
        u = v.sqrt()
        w = weight[rows].to(t.dtype) - m * (a1 * e1 / (u + ADAM_EPS * e1) + a2 * e2 / (u + ADAM_EPS * e2))
        self._store(rows, w)
        t.first[rows], t.second[rows] = m * BETA1**gap, v * BETA2**gap

    def _store(self, rows: Tensor, values: Tensor) -> None:
        weight = self._t.table.weight.detach()
        if weight.dtype == torch.bfloat16:
            # stochastic rounding: up with the chance that makes the mean right, so that small updates are not lost
            noise = _noise(
                rows.unsqueeze(1) * values.shape[1] + torch.arange(values.shape[1], device=rows.device), self._t.step_seed
            )
            values = ((values.view(torch.int32) + noise.int()) & -65536).view(torch.float32)
        weight.index_copy_(0, rows, values.to(weight.dtype))


def _noise(at: Tensor, seed: int) -> Tensor:
    """16 random bits for each of these positions: the finaliser of MurmurHash3, as in kernel.c."""
    low = 0xFFFFFFFF
    x = (at & low) ^ (((at >> 32) * 2654435761) & low) ^ seed
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & low
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & low
    return (x ^ (x >> 16)) & 0xFFFF


class _Native:
    """The same by the C kernel, on the CPU."""

    def __init__(self, table: RowwiseTable) -> None:
        self._t = table
        weight = table.table.weight
        self._slot = torch.empty(len(weight), dtype=torch.int32)
        self._room(0, 1)
        self._threads = 1

    def _room(self, lookups: int, threads: int) -> None:
        """Scratch for so many lookups, kept from step to step: fresh pages would cost more than the work."""
        self._capacity = lookups
        self._scratch = torch.empty(threads * lookups, dtype=torch.int32)
        self._rows = torch.empty(lookups, dtype=torch.int64)
        self._sums = torch.empty(lookups, self._t.table.embedding_dim)
        self._start, self._count = torch.zeros(threads, dtype=torch.int64), torch.zeros(threads, dtype=torch.int64)
        self._square = torch.zeros(threads, dtype=torch.float64)

    def _prepare(self, lookups: int) -> None:
        self._threads = torch.get_num_threads() if lookups * self._t.table.embedding_dim > 32_768 else 1
        if lookups > self._capacity or self._threads * lookups > len(self._scratch) or self._threads > len(self._start):
            self._room(lookups * 5 // 4, self._threads)

    def _struct(self, step: int, learning_rate: float = 0.0, scale: float = 1.0) -> Any:
        t, weight = self._t, self._t.table.weight

        tensors = (weight, t.first, t.second, t.last, self._slot, t.sat_out.rule if t.sat_out else self._start)
        return ctypes.byref(
            _native.TableStruct(
                *(tensor.data_ptr() for tensor in tensors),
                *weight.shape,
                step,
                get_args(Rule).index(t.rule),
                int(weight.dtype == torch.bfloat16),
                int(t.l2_elapsed),
                t.step_seed,
                learning_rate,
                BETA1,
                BETA2,
                ADAGRAD_EPS if "adagrad" in t.rule else ADAM_EPS,
                scale,
                t.l2,
            )
        )

    def coalesce(self, ids: Tensor, values: Tensor) -> Tensor:
        ids, values = ids.contiguous(), values.float().contiguous()
        self._prepare(len(ids))
        _native.kernel().ctrlib_coalesce(
            self._struct(self._t.steps + 1),
            ids.data_ptr(),
            values.data_ptr(),
            len(ids),
            *(x.data_ptr() for x in (self._scratch, self._rows, self._sums, self._start, self._count, self._square)),
            self._threads,
        )
        return self._square[: self._threads].sum()

    def update(self, learning_rate: float, scale: Tensor | float) -> None:
        _native.kernel().ctrlib_update(
            self._struct(self._t.steps, learning_rate, float(scale)),
            *(x.data_ptr() for x in (self._rows, self._sums, self._start, self._count)),
            self._threads,
        )

    def catch_up(self, ids: Tensor) -> None:
        ids = ids.contiguous()
        self._prepare(ids.numel())
        _native.kernel().ctrlib_catch_up(
            self._struct(self._t.steps),
            ids.data_ptr(),
            int(ids.dtype == torch.int64),
            ids.numel(),
            self._scratch.data_ptr(),
            self._threads,
        )

    def catch_up_all(self) -> None:
        _native.kernel().ctrlib_catch_up_all(self._struct(self._t.steps), torch.get_num_threads())
