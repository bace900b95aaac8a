"""Optimizers with the embedding tables apart from the rest, and the learning rate over time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from ctrlib.batch import embedding_parameters
from ctrlib.config import ConfigError, fraction, positive
from ctrlib.losses import EmbeddingL2Mode
from ctrlib.schema import suggest

OptimizerName = Literal["adam", "adamw", "adagrad", "sgd"]
ScheduleName = Literal["constant", "plateau", "cosine"]


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise :class:`ConfigError` unless ``value`` is one of ``choices``."""
    choices = tuple(choices)
    if value not in choices:
        expected = ", ".join(map(repr, choices))
        raise ConfigError(f"{name} is {value!r}; expected one of {expected}{suggest(str(value), choices)}")


def check_not_negative(name: str, value: float) -> None:
    """Raise :class:`ConfigError` if ``value`` is below zero."""
    if not value >= 0:
        raise ConfigError(f"{name} is {value}; expected 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """How gradients become updates. The defaults are FuxiCTR's: Adam, 1e-3, clipping at norm 10.

    Args:
        name: ``adam`` and ``adamw`` with β = (0.9, 0.999), ε = 1e-8; ``adagrad``; ``sgd``.
        learning_rate: of every parameter that is not an embedding table, and of the tables unless the next is given.
        embedding_learning_rate: of the embedding tables.
        weight_decay: of parameters other than embedding tables; added to the gradient after clipping, or decoupled from it
            (``adamw``, arXiv:1711.05101).
        embedding_l2: λ of (λ/2)·‖W‖² over the embedding tables.
        embedding_l2_mode: see :func:`ctrlib.losses.add_embedding_l2`.
        net_l2: λ of the same penalty over all other parameters; unlike ``weight_decay``, clipped with the loss's gradient.
        momentum: of ``sgd``.
        max_grad_norm: the gradient of all parameters together is scaled down to this norm; ``None``: never.
    """

    name: OptimizerName = "adam"
    learning_rate: float = 1e-3
    embedding_learning_rate: float | None = None
    weight_decay: float = 0.0
    embedding_l2: float = 0.0
    embedding_l2_mode: EmbeddingL2Mode = "full_table"
    net_l2: float = 0.0
    momentum: float = 0.0
    max_grad_norm: float | None = 10.0

    def __post_init__(self) -> None:
        check_choice("optimizer.name", self.name, get_args(OptimizerName))
        check_choice("optimizer.embedding_l2_mode", self.embedding_l2_mode, get_args(EmbeddingL2Mode))
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


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The trainable parameters in up to two groups: the net (with weight decay), then the embedding tables (without).

    Raises:
        ConfigError: the model has no trainable parameter.
    """
    tables = embedding_parameters(model)
    is_table = {id(table) for table in tables}
    net = [p for p in model.parameters() if p.requires_grad and id(p) not in is_table]
    embedding_rate = config.embedding_learning_rate or config.learning_rate
    groups: list[dict[str, Any]] = [
        {"params": net, "lr": config.learning_rate, "weight_decay": config.weight_decay},
        {"params": tables, "lr": embedding_rate, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ConfigError("the model has no trainable parameter; expected at least one with requires_grad=True")
    return groups


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """An optimizer over :func:`parameter_groups`, fused where this torch can on the parameters' device.

    Raises:
        ConfigError: the model has no trainable parameter.
    """
    groups = parameter_groups(model, config)

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
        optimizer: its groups hold the learning rates to start from.
        config: see :class:`ScheduleConfig`.
        total_steps: training steps in all; where ``cosine`` ends.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: ScheduleConfig, total_steps: int) -> None:
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
