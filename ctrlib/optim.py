"""Optimizers with the embedding tables apart from the rest, and the learning rate over time.

The row-wise optimizers of the tables themselves are in :mod:`ctrlib.rowwise`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ctrlib.batch import embedding_parameters
from ctrlib.config import ConfigError, check_choice, check_not_negative, fraction, positive
from ctrlib.losses import EmbeddingL2Mode, add_embedding_l2, add_net_l2
from ctrlib.rowwise import RowwiseTable, Rule, SatOut
from ctrlib.table import EmbeddingTable

OptimizerName = Literal["adam", "adamw", "adagrad", "sgd"]
EmbeddingOptimizerName = Literal["dense", "sgd", "adagrad", "rowwise_adagrad", "lazy_adam", "rowwise_adam", "adam"]
ScheduleName = Literal["constant", "plateau", "cosine"]

ADAGRAD_FACTOR = 10.0
"""Default learning rate of tables under Adagrad, whose steps only ever shrink, in terms of the net's under Adam."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """How gradients become updates: Adam, 1e-3, clipping at norm 10, as in FuxiCTR; but row-wise for the embedding tables.

    Args:
        name: of the net: ``adam`` and ``adamw`` with β = (0.9, 0.999), ε = 1e-8; ``adagrad``; ``sgd``.
        embedding: of the embedding tables. ``dense``: that of the net, over whole tables, as FuxiCTR has it: for published
            numbers; a step costs as much as the tables are large. The others touch only the rows of the batch: ``sgd``,
            ``adagrad``, ``rowwise_adagrad``, ``lazy_adam``, ``rowwise_adam``, and ``adam``, which follows dense Adam. See
            :mod:`ctrlib.rowwise`; docs/training.md compares them.
        learning_rate: of every parameter that is not an embedding table.
        embedding_learning_rate: of the embedding tables; ``None``: ``learning_rate``, for ``adagrad`` and ``rowwise_adagrad``
            10 times that (experiments/optimizers).
        weight_decay: of parameters other than embedding tables; added to the gradient after clipping, or decoupled from it
            (``adamw``, arXiv:1711.05101).
        embedding_l2: λ of (λ/2)·‖W‖² over the embedding tables.
        embedding_l2_mode: when a row pays it. ``full_table``: every row in every step (only with ``embedding="dense"``);
            ``batch_rows``: the rows of the batch; ``elapsed`` (not with ``dense`` or ``adam``): the rows of the batch, once for
            every step since each was last in one. ``None``: ``full_table`` with ``dense``, ``batch_rows`` with ``adam``, else
            ``elapsed``.
        net_l2: λ of the same penalty over all other parameters; unlike ``weight_decay``, clipped with the loss's gradient.
        momentum: of ``sgd``.
        max_grad_norm: the gradient of all parameters together is scaled down to this norm; ``None``: never.
    """

    name: OptimizerName = "adam"
    embedding: EmbeddingOptimizerName = "adagrad"
    learning_rate: float = 1e-3
    embedding_learning_rate: float | None = None
    weight_decay: float = 0.0
    embedding_l2: float = 0.0
    embedding_l2_mode: EmbeddingL2Mode | None = None
    net_l2: float = 0.0
    momentum: float = 0.0
    max_grad_norm: float | None = 10.0

    def __post_init__(self) -> None:
        check_choice("optimizer.name", self.name, get_args(OptimizerName))
        check_choice("optimizer.embedding", self.embedding, get_args(EmbeddingOptimizerName))
        mode = self.embedding_l2_mode
        if mode is not None:
            check_choice("optimizer.embedding_l2_mode", mode, get_args(EmbeddingL2Mode))
        if mode == "full_table" and self.embedding != "dense":
            raise ConfigError(
                f"optimizer.embedding_l2_mode 'full_table' gives every row a gradient in every step, and {self.embedding!r} "
                "touches only rows of the batch; set embedding_l2_mode to 'elapsed' or 'batch_rows', or embedding to 'dense'"
            )
        if mode == "elapsed" and self.embedding in ("dense", "adam"):
            other = "'full_table' or 'batch_rows'" if self.embedding == "dense" else "'batch_rows'"
            raise ConfigError(
                f"optimizer.embedding_l2_mode is 'elapsed' with embedding {self.embedding!r}, where every row is up to date; "
                f"choose {other}"
            )
        positive("optimizer.learning_rate", self.learning_rate)
        if self.embedding_learning_rate is not None:
            positive("optimizer.embedding_learning_rate", self.embedding_learning_rate)
        if self.max_grad_norm is not None:
            positive("optimizer.max_grad_norm", self.max_grad_norm)
        check_not_negative("optimizer.weight_decay", self.weight_decay)
        check_not_negative("optimizer.embedding_l2", self.embedding_l2)
        check_not_negative("optimizer.net_l2", self.net_l2)
        fraction("optimizer.momentum", self.momentum)
        if self.momentum and self.name != "sgd":
            raise ConfigError(f"optimizer.momentum is {self.momentum} with {self.name!r}; only 'sgd' reads it: remove it")

    @property
    def table_learning_rate(self) -> float:
        """Of the tables that are updated row by row."""
        if self.embedding_learning_rate is not None:
            return self.embedding_learning_rate
        return self.learning_rate * (ADAGRAD_FACTOR if "adagrad" in self.embedding else 1.0)


def parameter_groups(model: nn.Module, config: OptimizerConfig, without: Iterable[nn.Parameter] = ()) -> list[dict[str, Any]]:
    """The trainable parameters in up to two groups: the net (with weight decay), then the embedding tables (without).

    Args:
        without: parameters left out, which another optimizer updates.

    Raises:
        ConfigError: the model has no trainable parameter.
    """
    left_out = {id(parameter) for parameter in without}
    tables = [table for table in embedding_parameters(model) if id(table) not in left_out]
    others = left_out | {id(table) for table in tables}
    net = [p for p in model.parameters() if p.requires_grad and id(p) not in others]
    groups: list[dict[str, Any]] = [
        {"params": net, "lr": config.learning_rate, "weight_decay": config.weight_decay},
        {"params": tables, "lr": config.embedding_learning_rate or config.learning_rate, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ConfigError("the model has no trainable parameter; expected at least one with requires_grad=True")
    return groups


class Optimizer:
    """From gradients to updates: L2, clipping, a torch optimizer for the net, row-wise ones for the embedding tables.

    Build one with :func:`build_optimizer`. While it is open, the tables that it updates row by row have sparse gradients, and
    with ``adam`` some of their rows lag behind until they are read or saved; :meth:`close` ends that.

    Attributes:
        param_groups: as of ``torch.optim``: parameters and learning rates; set ``lr`` there.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, without: Iterable[nn.Parameter] = ()) -> None:
        self._model, self._config, self._without = model, config, tuple(without)
        found: dict[int, EmbeddingTable] = {}
        if config.embedding != "dense":
            found = {id(m.weight): m for m in model.modules() if isinstance(m, EmbeddingTable) and m.weight.requires_grad}
        for weight in embedding_parameters(model):
            if weight.dtype == torch.bfloat16 and id(weight) not in found:
                raise ConfigError("bfloat16 tables need a row-wise optimizer; set optimizer.embedding, e.g. to 'lazy_adam'")
        groups = parameter_groups(model, config, self._without)
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in found]
        groups = [group for group in groups if group["params"]]
        self._dense = _dense_optimizer(groups, config) if groups else None
        self._dense_tables = [w for w in embedding_parameters(model) if id(w) not in found]
        self.param_groups: list[dict[str, Any]] = [] if self._dense is None else self._dense.param_groups
        self._net = [p for group in self.param_groups for p in group["params"]]
        self._tables: list[RowwiseTable] = []
        self._rate: dict[str, Any] = {"params": [m.weight for m in found.values()]}
        self._sat_out: SatOut | None = None
        if config.embedding != "dense" and found:
            self._rate["lr"] = config.table_learning_rate
            self.param_groups = [*self.param_groups, self._rate]
            if config.embedding == "adam":
                self._sat_out = SatOut(next(iter(found.values())).weight.device)
            elapsed = config.embedding_l2_mode != "batch_rows" and config.embedding != "adam"
            for i, table in enumerate(found.values()):
                seed = (torch.initial_seed() + i) & 0xFFFFFFFF
                rule: Rule = config.embedding
                self._tables.append(RowwiseTable(table, rule, self._sat_out, config.embedding_l2, elapsed, seed))

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> Tensor:
        """Update everything from the gradients; returns their norm before clipping, 0 if there is none to clip at."""
        config = self._config
        if config.embedding_l2:
            batch_rows = config.embedding_l2_mode == "batch_rows"
            add_embedding_l2(self._dense_tables, config.embedding_l2, "batch_rows" if batch_rows else "full_table")
        if config.net_l2:
            add_net_l2(self._model, config.net_l2, self._without)
        squares = [table.coalesce() for table in self._tables]
        norm, scale = torch.zeros(()), torch.ones(())
        if config.max_grad_norm is not None:
            grads = [p.grad for p in self._net if p.grad is not None]
            norm = nn.utils.get_total_norm(grads)
            if squares:
                norm = torch.sqrt(norm.square() + torch.stack(squares).sum().to(norm))
            scale = (config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
            if grads:
                torch._foreach_mul_(grads, scale)
        for table in self._tables:
            table.step(self._rate["lr"], scale)
        if self._sat_out is not None:
            self._sat_out.advance(self._rate["lr"])
        if self._dense is not None:
            self._dense.step()
        return norm

    def close(self) -> None:
        """Catch every row up and give the tables back as they were before; this optimizer takes no further step."""
        for table in self._tables:
            table.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights."""
        return {
            "dense": None if self._dense is None else self._dense.state_dict(),
            "tables": [table.state_dict() for table in self._tables],
            "learning_rate": self._rate.get("lr"),
            "sat_out": None if self._sat_out is None else self._sat_out.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict` of an optimizer of the same model and config; load the weights before."""
        if self._dense is not None:
            self._dense.load_state_dict(state["dense"])  # which puts new groups in place of the old ones
            self.param_groups = [*self._dense.param_groups, *([self._rate] if self._tables else [])]
        for table, saved in zip(self._tables, state["tables"], strict=True):
            table.load_state_dict(saved)
        if self._tables:
            self._rate["lr"] = state["learning_rate"]
        if self._sat_out is not None:
            self._sat_out.load_state_dict(state["sat_out"])


def build_optimizer(model: nn.Module, config: OptimizerConfig, without: Iterable[nn.Parameter] = ()) -> Optimizer:
    """The optimizer of all trainable parameters but those in ``without`` (none of them an embedding table).

    Tables are the :class:`~ctrlib.table.EmbeddingTable`\\ s of the model; other ``nn.Embedding``\\ s are updated like
    the net, at the tables' learning rate.

    Raises:
        ConfigError: the model has no trainable parameter, or bfloat16 tables and ``embedding="dense"``.
    """
    return Optimizer(model, config, without)


def _dense_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """torch's, fused where this torch can on the parameters' device."""

    def build(groups: list[dict[str, Any]], fused: bool) -> torch.optim.Optimizer:
        match config.name:
            case "adam":
                return torch.optim.Adam(groups, eps=1e-8, fused=fused)
            case "adamw":
                return torch.optim.AdamW(groups, eps=1e-8, fused=fused)
            case "adagrad":
                return torch.optim.Adagrad(groups, fused=fused)
            case "sgd":
                return torch.optim.SGD(groups, momentum=config.momentum, fused=fused)

    return build(groups, fused=_fused_works(build, groups[0]["params"][0]))


def _fused_works(build: Callable[[list[dict[str, Any]], bool], torch.optim.Optimizer], like: nn.Parameter) -> bool:
    """Whether the fused kernel takes a step on parameters such as ``like``: it depends on optimizer, device and version."""
    probe = nn.Parameter(torch.ones(1, dtype=like.dtype, device=like.device))
    probe.grad = torch.ones_like(probe)
    try:
        build([{"params": [probe], "lr": 0.5, "weight_decay": 0.0}], True).step()
    except RuntimeError:
        return False
    return bool(probe.item() < 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """The learning rate over time.

    Args:
        name: ``plateau``: multiplied by ``factor`` after every evaluation without improvement; ``cosine``: falls along half a
            cosine from the end of the warm-up to the last step; ``constant``.
        factor: of ``plateau``.
        min_learning_rate: the lowest that ``plateau`` and ``cosine`` go to.
        warmup_steps: steps over which the learning rate rises linearly from 0 (the first step takes 1/warmup_steps of it).
    """

    name: ScheduleName = "plateau"
    factor: float = 0.1
    min_learning_rate: float = 1e-6
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        check_choice("schedule.name", self.name, get_args(ScheduleName))
        positive("schedule.factor", self.factor)
        fraction("schedule.factor", self.factor)
        check_not_negative("schedule.min_learning_rate", self.min_learning_rate)
        check_not_negative("schedule.warmup_steps", self.warmup_steps)


class Schedule:
    """Sets the learning rate of every group of an optimizer; from construction on it is that of the next step.

    Args:
        optimizer: its ``param_groups`` hold the learning rates to start from.
        config: see :class:`ScheduleConfig`.
        total_steps: training steps in all; where ``cosine`` ends.
    """

    def __init__(self, optimizer: Optimizer | torch.optim.Optimizer, config: ScheduleConfig, total_steps: int) -> None:
        self._optimizer = optimizer
        self._config = config
        self._total_steps = total_steps
        self._steps = 0
        self._peaks = [float(group["lr"]) for group in optimizer.param_groups]
        self._apply()

    @property
    def learning_rate(self) -> float:
        """Of the first group, for the next step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def step(self) -> None:
        """Call after every training step."""
        self._steps += 1
        self._apply()

    def observe(self, improved: bool) -> None:
        """Call after every evaluation."""
        if self._config.name == "plateau" and not improved:
            self._peaks = [max(peak * self._config.factor, self._lowest(peak)) for peak in self._peaks]
            self._apply()

    def _lowest(self, peak: float) -> float:
        return min(self._config.min_learning_rate, peak)  # never above where the group started

    def _apply(self) -> None:
        warmup = self._config.warmup_steps
        rising = min(1.0, (self._steps + 1) / warmup) if warmup else 1.0
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            rate = peak
            if self._config.name == "cosine":
                done = (self._steps - warmup) / max(1, self._total_steps - warmup)
                lowest = self._lowest(peak)
                rate = lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))
            group["lr"] = rate * rising
