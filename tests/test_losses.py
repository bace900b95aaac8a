"""Losses against hand-computed numbers; penalty gradients against autograd of the penalty itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import backward

from ctrlib.batch import Batch, Output, embedding_parameters
from ctrlib.config import ConfigError
from ctrlib.losses import add_embedding_l2, add_net_l2, bce_loss, total_loss
from ctrlib.schema import DataError

LN2, LN3 = math.log(2), math.log(3)
LOGITS = torch.tensor([0.0, LN3, -LN3])  # probabilities 1/2, 3/4, 1/4
LABELS = torch.tensor([[1.0], [0.0], [1.0]])  # so the rows lose ln 2, 2·ln 2, 2·ln 2


def test_mean_over_rows() -> None:
    assert bce_loss(LOGITS, LABELS).item() == pytest.approx(5 / 3 * LN2)
    assert bce_loss(LOGITS.unsqueeze(1), LABELS).item() == pytest.approx(5 / 3 * LN2)


def test_weighted_mean() -> None:
    weight = torch.tensor([1.0, 2.0, 5.0])
    assert bce_loss(LOGITS, LABELS, weight).item() == pytest.approx((1 + 4 + 10) / 8 * LN2)


def test_weight_zero_hides_a_row_and_all_zero_gives_zero() -> None:
    assert bce_loss(LOGITS, LABELS, torch.tensor([3.0, 0.0, 0.0])).item() == pytest.approx(LN2)
    logits = LOGITS.clone().requires_grad_()
    loss = bce_loss(logits, LABELS, torch.zeros(3))
    backward(loss)
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert logits.grad.tolist() == [0.0, 0.0, 0.0]


def test_mean_over_tasks() -> None:
    logits_BT = torch.stack([LOGITS, torch.zeros(3)], 1)
    labels_BT = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert bce_loss(logits_BT, labels_BT).item() == pytest.approx((5 / 3 + 1) / 2 * LN2)
    weight = torch.tensor([1.0, 2.0, 5.0])
    assert bce_loss(logits_BT, labels_BT, weight).item() == pytest.approx((15 / 8 + 1) / 2 * LN2)


def test_large_logits_stay_finite() -> None:
    assert bce_loss(torch.tensor([-200.0]), torch.ones(1, 1)).item() == pytest.approx(200.0)


def test_float32_under_autocast_and_float64_kept() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = bce_loss(torch.tensor([0.1], dtype=torch.bfloat16), torch.ones(1, 1))
    assert loss.dtype == torch.float32
    exact = math.log1p(math.exp(-torch.tensor(0.1, dtype=torch.bfloat16).item()))
    assert loss.item() == pytest.approx(exact, rel=1e-6)
    assert bce_loss(LOGITS.double(), LABELS).dtype == torch.float64


def test_different_numbers_of_tasks_are_refused() -> None:
    with pytest.raises(ConfigError, match="as many outputs as the schema has labels"):
        bce_loss(LOGITS, torch.zeros(3, 2))


def test_total_loss_adds_what_it_finds() -> None:
    batch = Batch(sparse=torch.zeros(3, 0), dense=torch.zeros(3, 0), labels=LABELS)
    output = Output(LOGITS, {"contrastive": torch.tensor(0.25), "balance": torch.tensor(-0.05)})
    assert total_loss(output, batch).item() == pytest.approx(5 / 3 * LN2 + 0.2)


def test_total_loss_needs_labels() -> None:
    with pytest.raises(DataError, match="no labels"):
        total_loss(Output(LOGITS), Batch(sparse=torch.zeros(3, 0), dense=torch.zeros(3, 0)))


class Net(nn.Module):
    """Two tables, one of them shared by two modules, and a net; one table is not used in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Embedding(6, 3, padding_idx=0)
        self.idle = nn.Embedding(4, 2)
        self.alias = nn.Embedding(6, 3)
        self.alias.weight = self.used.weight
        self.norm = nn.BatchNorm1d(3)
        self.out = nn.Linear(3, 1)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def loss(self) -> Tensor:
        x_BD = self.used(torch.tensor([1, 2, 2, 4]))
        return bce_loss(self.out(self.norm(x_BD)), torch.tensor([[1.0], [0.0], [1.0], [1.0]]))


def gradients(model: Net) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def model() -> Net:
    torch.manual_seed(3)
    return Net().double()


def test_full_table_is_the_gradient_of_the_penalty(model: Net) -> None:
    strength = 0.07
    penalty = strength / 2 * (model.used.weight.square().sum() + model.idle.weight.square().sum())
    backward(model.loss() + penalty)
    expected = gradients(model)

    model.zero_grad()
    backward(model.loss())
    plain = gradients(model)
    add_embedding_l2(embedding_parameters(model), strength, "full_table")
    got = gradients(model)

    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-12)
    assert not torch.equal(got["used.weight"], plain["used.weight"])
    assert "idle.weight" in got
    assert "idle.weight" not in plain


def test_batch_rows_touches_only_rows_of_the_batch(model: Net) -> None:
    backward(model.loss())
    before = gradients(model)
    add_embedding_l2(embedding_parameters(model), 0.5, "batch_rows")
    after = gradients(model)
    for row in range(6):
        added = 0.5 * model.used.weight[row] if row in (1, 2, 4) else torch.zeros(3, dtype=torch.float64)
        torch.testing.assert_close(after["used.weight"][row], before["used.weight"][row] + added, rtol=0, atol=1e-12)
    assert after.keys() == before.keys()


def test_net_l2_is_the_gradient_of_the_penalty_on_the_rest(model: Net) -> None:
    rest = [*model.out.parameters(), *model.norm.parameters()]
    backward(model.loss() + 0.03 / 2 * torch.stack([p.square().sum() for p in rest]).sum())
    expected = gradients(model)
    model.zero_grad()
    backward(model.loss())
    add_net_l2(model, 0.03)
    got = gradients(model)
    assert got.keys() == expected.keys() == {"used.weight", "norm.weight", "norm.bias", "out.weight", "out.bias"}
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-12)
