"""Optimizers by one hand-computed step; schedules by hand-computed values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ctrlib.config import ConfigError, from_json, to_json
from ctrlib.optim import OptimizerConfig, OptimizerName, Schedule, ScheduleConfig, build_optimizer, parameter_groups
from ctrlib.table import EmbeddingTable


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 1)
        self.out = nn.Linear(1, 1)
        self.frozen = nn.Linear(1, 1).requires_grad_(False)
        for parameter in self.parameters():
            nn.init.constant_(parameter, 2.0)


def stepped(config: OptimizerConfig, gradient: float) -> tuple[float, float]:
    """One weight of the net and one of the table, both 2 before, after a step with this gradient."""
    model = Net()
    optimizer = build_optimizer(model, config)
    for parameter in (*model.table.parameters(), *model.out.parameters()):
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()
    assert model.frozen.weight.item() == 2.0
    return model.out.weight.item(), model.table.weight[1].item()


def test_groups_keep_tables_apart() -> None:
    model = Net()
    net, tables = parameter_groups(model, OptimizerConfig(learning_rate=0.1, embedding_learning_rate=0.5, weight_decay=0.2))
    assert [id(p) for p in net["params"]] == [id(model.out.weight), id(model.out.bias)]
    assert [id(p) for p in tables["params"]] == [id(model.table.weight)]
    assert (net["lr"], net["weight_decay"]) == (0.1, 0.2)
    assert (tables["lr"], tables["weight_decay"]) == (0.5, 0.0)


def test_learning_rate_of_tables() -> None:
    assert OptimizerConfig(learning_rate=2e-3, embedding="lazy_adam").table_learning_rate == 2e-3
    assert OptimizerConfig(learning_rate=2e-3, embedding="rowwise_adagrad").table_learning_rate == pytest.approx(2e-2)
    assert OptimizerConfig(learning_rate=2e-3, embedding="adagrad", embedding_learning_rate=0.1).table_learning_rate == 0.1
    table = EmbeddingTable(3, 2)
    assert [group["lr"] for group in build_optimizer(table, OptimizerConfig(embedding="adagrad")).param_groups] == [1e-2]
    # a table that the net's optimizer updates learns as the net does
    assert [group["lr"] for group in build_optimizer(Net(), OptimizerConfig(embedding="adagrad")).param_groups] == [1e-3, 1e-3]


def test_groups_that_are_empty_are_left_out() -> None:
    (group,) = parameter_groups(nn.Linear(2, 1), OptimizerConfig())
    assert len(group["params"]) == 2
    with pytest.raises(ConfigError, match="no trainable parameter"):
        parameter_groups(nn.ReLU(), OptimizerConfig())


@pytest.mark.parametrize(
    ("config", "net", "table"),
    [
        # gradient 0.4 everywhere; with coupled decay the net's gradient is 0.4 + 0.5·2 = 1.4
        (OptimizerConfig(name="sgd", learning_rate=0.1), 1.96, 1.96),
        (OptimizerConfig(name="sgd", learning_rate=0.1, embedding_learning_rate=1.0, weight_decay=0.5), 1.86, 1.6),
        # the first step of Adam and Adagrad is the learning rate, whatever the gradient's size
        (OptimizerConfig(name="adam", learning_rate=0.1, weight_decay=0.5), 1.9, 1.9),
        (OptimizerConfig(name="adagrad", learning_rate=0.1, embedding_learning_rate=0.3), 1.9, 1.7),
        # decoupled: 2·(1 − 0.1·0.5) − 0.1
        (OptimizerConfig(name="adamw", learning_rate=0.1, weight_decay=0.5), 1.8, 1.9),
    ],
)
def test_one_step(config: OptimizerConfig, net: float, table: float) -> None:
    assert stepped(config, 0.4) == pytest.approx((net, table), rel=1e-5)


def test_coupled_decay_of_adam_and_adagrad_is_in_the_gradient() -> None:
    # gradient −0.4, decay +1.0: the sum is positive, so the weight falls; without decay it rises
    names: tuple[OptimizerName, ...] = ("adam", "adagrad")
    for name in names:
        assert stepped(OptimizerConfig(name=name, learning_rate=0.1, weight_decay=0.5), -0.4) == pytest.approx(
            (1.9, 2.1), rel=1e-5
        )


def test_momentum() -> None:
    model = Net()
    optimizer = build_optimizer(model, OptimizerConfig(name="sgd", learning_rate=0.1, momentum=0.5))
    for _ in range(2):
        model.out.weight.grad = torch.ones(1, 1)
        optimizer.step()
    assert model.out.weight.item() == pytest.approx(2 - 0.1 - 0.1 * 1.5)


@pytest.mark.parametrize("name", ["adam", "adamw", "adagrad", "sgd"])
def test_fused_here_and_equal_to_the_plain_loop(name: OptimizerName) -> None:
    plain: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "adagrad": torch.optim.Adagrad,
        "sgd": torch.optim.SGD,
    }
    ours, theirs = Net(), Net()
    a = build_optimizer(ours, OptimizerConfig(name=name, learning_rate=0.01, weight_decay=0.0))
    b = plain[name](theirs.parameters(), lr=0.01, weight_decay=0.0, foreach=False, fused=False)
    assert a.param_groups[0]["fused"]
    for step in range(5):
        for model, optimizer in ((ours, a), (theirs, b)):
            for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
                parameter.grad = torch.full_like(parameter, math.sin(step + i) * 3)
            optimizer.step()
    for x, y in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


def test_falls_back_where_fused_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.optim.Adam

    def adam(groups: Any, eps: float, fused: bool) -> torch.optim.Optimizer:
        if fused:
            raise RuntimeError("`fused=True` requires all the params to be floating point Tensors of supported devices")
        return original(groups, eps=eps, fused=fused)

    monkeypatch.setattr(torch.optim, "Adam", adam)
    assert not build_optimizer(Net(), OptimizerConfig()).param_groups[0]["fused"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OptimizerConfig(name="adm"), "optimizer.name is 'adm'.*did you mean 'adam'"),  # type: ignore[arg-type]
        (lambda: OptimizerConfig(learning_rate=0), "learning_rate is 0"),
        (lambda: OptimizerConfig(embedding_learning_rate=-1.0), "embedding_learning_rate is -1.0"),
        (lambda: OptimizerConfig(weight_decay=-0.1), "weight_decay is -0.1; expected 0 or more"),
        (lambda: OptimizerConfig(embedding_l2=math.nan), "embedding_l2 is nan"),
        (lambda: OptimizerConfig(embedding_l2_mode="rows"), "embedding_l2_mode is 'rows'"),  # type: ignore[arg-type]
        (lambda: OptimizerConfig(net_l2=-1), "net_l2 is -1"),
        (lambda: OptimizerConfig(name="sgd", momentum=1.0), "momentum is 1.0"),
        (lambda: OptimizerConfig(momentum=0.9), "only 'sgd' reads it"),
        (lambda: OptimizerConfig(max_grad_norm=0.0), "max_grad_norm is 0.0"),
        (lambda: ScheduleConfig(name="cos"), "schedule.name is 'cos'.*did you mean 'cosine'"),  # type: ignore[arg-type]
        (lambda: ScheduleConfig(factor=1.0), "factor is 1.0"),
        (lambda: ScheduleConfig(factor=0.0), "factor is 0.0"),
        (lambda: ScheduleConfig(min_learning_rate=-1e-6), "min_learning_rate is -1e-06"),
        (lambda: ScheduleConfig(warmup_steps=-1), "warmup_steps is -1"),
    ],
)
def test_options_that_cannot_be(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


def test_configs_survive_json() -> None:
    config = OptimizerConfig(name="adagrad", embedding_learning_rate=0.5, max_grad_norm=None)
    assert from_json(to_json(config), OptimizerConfig, {}) == config


def schedule(config: ScheduleConfig, total_steps: int = 10, rates: tuple[float, ...] = (0.1,)) -> tuple[Schedule, Any]:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    optimizer = torch.optim.SGD(groups)
    return Schedule(optimizer, config, total_steps), optimizer.param_groups


def rates_over(steps: int, config: ScheduleConfig, total_steps: int = 10) -> list[float]:
    plan, groups = schedule(config, total_steps)
    seen = []
    for _ in range(steps):
        assert plan.learning_rate == groups[0]["lr"]
        seen.append(groups[0]["lr"])
        plan.step()
    return seen


def test_constant() -> None:
    assert rates_over(3, ScheduleConfig(name="constant")) == [0.1, 0.1, 0.1]
    plan, groups = schedule(ScheduleConfig(name="constant"))
    plan.observe(improved=False)
    assert groups[0]["lr"] == 0.1


def test_warm_up() -> None:
    rates = rates_over(6, ScheduleConfig(name="constant", warmup_steps=4))
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


def test_cosine() -> None:
    # from 0.1 to 0.02 over 4 steps: 0.06 + 0.04·cos(k·π/4)
    rates = rates_over(6, ScheduleConfig(name="cosine", min_learning_rate=0.02), total_steps=4)
    half = 0.04 * math.sqrt(0.5)
    assert rates == pytest.approx([0.1, 0.06 + half, 0.06, 0.06 - half, 0.02, 0.02])


def test_cosine_after_warm_up() -> None:
    rates = rates_over(5, ScheduleConfig(name="cosine", min_learning_rate=0.0, warmup_steps=2), total_steps=4)
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.05, 0.0])


def test_plateau() -> None:
    plan, groups = schedule(ScheduleConfig(factor=0.1, min_learning_rate=2e-3), rates=(0.1, 0.5))
    seen = []
    for improved in (True, False, True, False, False):
        plan.observe(improved)
        seen.append((groups[0]["lr"], groups[1]["lr"]))
    assert seen == [pytest.approx(pair) for pair in [(0.1, 0.5), (0.01, 0.05), (0.01, 0.05), (2e-3, 5e-3), (2e-3, 2e-3)]]


def test_plateau_never_raises_a_rate_that_starts_below_the_minimum() -> None:
    plan, groups = schedule(ScheduleConfig(min_learning_rate=0.2))
    plan.observe(improved=False)
    assert groups[0]["lr"] == 0.1


def test_plateau_during_warm_up() -> None:
    plan, groups = schedule(ScheduleConfig(factor=0.5, warmup_steps=4))
    plan.step()  # the next step is the second: 2/4
    plan.observe(improved=False)
    assert groups[0]["lr"] == pytest.approx(0.1 * 0.5 * 0.5)
