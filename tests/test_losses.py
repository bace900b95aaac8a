"""Losses against hand-computed numbers; penalty gradients against autograd of the penalty itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import backward

from ctrlib.batch import Batch, Output, embedding_parameters
from ctrlib.config import ConfigError
from ctrlib.losses import add_embedding_l2, add_net_l2, bce_loss, info_nce, total_loss
from ctrlib.schema import DataError
from tests.reference import contrastive as reference

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


def exclusions(pairs: set[tuple[int, int]], size: int) -> Tensor:
    out = torch.zeros(size, size, dtype=torch.bool)
    for i, j in pairs:
        out[i, j] = True
    return out


@pytest.mark.parametrize("kind", ["dot", "cosine"])
@pytest.mark.parametrize("source", ["anchor", "positive"])
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_info_nce_is_the_formula(kind: Any, source: Any, temperature: float) -> None:
    torch.manual_seed(4)
    anchor, positive = torch.randn(2, 6, 3, dtype=torch.float64)
    options: dict[str, Any] = {"similarity": kind, "negatives_from": source, "temperature": temperature}
    pairs, left_out = {(0, 1), (1, 0), (2, 4)}, {3}
    rows = torch.tensor([i not in left_out for i in range(6)])
    for excluded, out in ((set(), set()), (pairs, set()), (set(), left_out), (pairs, left_out)):
        expected = reference.info_nce(
            anchor.numpy(),
            positive.numpy(),
            kind=kind,
            temperature=temperature,
            negatives_from=source,
            excluded=excluded,
            left_out=out,
        )
        found = info_nce(
            anchor,
            positive,
            exclude_BB=exclusions(excluded, 6) if excluded else None,
            rows_B=rows if out else None,
            **options,
        )
        assert found.item() == pytest.approx(expected, abs=1e-12)
    both = info_nce(anchor, positive, symmetric=True, **options)
    single = info_nce(anchor, positive, **options) + info_nce(positive, anchor, **options)
    assert both.item() == pytest.approx(single.item() / 2, abs=1e-12)


def test_info_nce_closed_forms() -> None:
    eye = torch.eye(2, dtype=torch.float64)
    for source in ("anchor", "positive"):
        found = info_nce(eye, eye, similarity="dot", temperature=1.0, negatives_from=source)
        assert found.item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-12)
    assert math.log(1 + math.exp(-1)) == pytest.approx(0.3132617, abs=1e-7)
    views = torch.eye(5, dtype=torch.float64)
    analytic = -math.log(math.exp(1 / 0.3) / (math.exp(1 / 0.3) + 4))
    assert info_nce(views, views, temperature=0.3).item() == pytest.approx(analytic, abs=1e-12)
    same = torch.ones(7, 4, dtype=torch.float64)
    assert info_nce(same, same).item() == pytest.approx(math.log(7), abs=1e-12)
    assert info_nce(views, views, temperature=1e-3).item() == pytest.approx(0.0, abs=1e-12)  # the nearest is the positive


def test_info_nce_without_negatives_is_zero() -> None:
    anchor, positive = torch.randn(2, 4, 3)
    assert info_nce(anchor, positive, exclude_BB=torch.ones(4, 4, dtype=torch.bool)).item() == 0.0
    assert info_nce(anchor, positive, rows_B=torch.zeros(4, dtype=torch.bool)).item() == 0.0
    assert info_nce(anchor[:1], positive[:1]).item() == 0.0
    assert info_nce(anchor[:0], positive[:0]).item() == 0.0
    assert info_nce(torch.zeros(3, 2), torch.zeros(3, 2)).isfinite()


def test_info_nce_left_out_rows_get_no_gradient() -> None:
    anchor, positive = torch.randn(2, 4, 3)
    anchor[2] = positive[2] = 0.0
    anchor.requires_grad_()
    positive.requires_grad_()
    backward(info_nce(anchor, positive, rows_B=torch.tensor([True, True, False, True])))
    for gradient in (anchor.grad, positive.grad):
        assert gradient is not None
        assert gradient.isfinite().all()
        assert not gradient[2].any()
        assert gradient[0].any()


@pytest.mark.parametrize("source", ["anchor", "positive"])
@pytest.mark.parametrize("num_negatives", [None, 2])
def test_info_nce_has_the_gradient_of_its_values(source: Any, num_negatives: int | None) -> None:
    """Central differences, with excluded pairs, a row without any negative and one that is left out."""
    torch.manual_seed(4)
    anchor, positive = (torch.randn(6, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    excluded = exclusions({(0, 1), (1, 0), (2, 4)} | {(5, i) for i in range(6)}, 6)
    rows = torch.tensor([True, True, True, False, True, True])

    def loss(a: Tensor, p: Tensor) -> Tensor:
        torch.manual_seed(0)  # the same negatives every time
        return info_nce(
            a, p, similarity="dot", negatives_from=source, exclude_BB=excluded, rows_B=rows, num_negatives=num_negatives
        )

    assert torch.autograd.gradcheck(loss, (anchor, positive))


def test_an_excluded_row_changes_nothing_however_like_it_is() -> None:
    anchor = torch.tensor([[1.0, 0.0], [1e4, 0.0], [0.5, 0.5]], requires_grad=True)
    found = info_nce(anchor, anchor, similarity="dot", temperature=1.0, exclude_BB=exclusions({(0, 1), (1, 0), (2, 1)}, 3))
    backward(found)
    assert found.item() == pytest.approx((math.log(1 + math.exp(0.5 - 1)) + math.log(1 + math.exp(0.5 - 0.5))) / 3, abs=1e-6)
    assert anchor.grad is not None
    assert anchor.grad.isfinite().all()


def test_info_nce_draws_negatives_among_those_allowed() -> None:
    torch.manual_seed(5)
    anchor, positive = torch.randn(2, 30, 4, dtype=torch.float64)
    excluded = torch.rand(30, 30) < 0.3
    full = info_nce(anchor, positive, exclude_BB=excluded)
    torch.testing.assert_close(info_nce(anchor, positive, exclude_BB=excluded, num_negatives=29), full, rtol=0, atol=1e-12)
    torch.testing.assert_close(info_nce(anchor, positive, exclude_BB=excluded, num_negatives=99), full, rtol=0, atol=1e-12)
    drawn = [info_nce(anchor, positive, exclude_BB=excluded, num_negatives=3).item() for _ in range(20)]
    assert len(set(drawn)) == 20
    assert max(drawn) < full.item()  # each adds to the denominator
    only = torch.ones(30, 30, dtype=torch.bool)
    only[:, 7] = False  # a single row is allowed
    expected = info_nce(anchor, positive, exclude_BB=only)
    torch.testing.assert_close(info_nce(anchor, positive, exclude_BB=only, num_negatives=1), expected, rtol=0, atol=1e-12)


def test_info_nce_draws_nothing_where_all_are_negatives() -> None:
    anchor, positive = torch.randn(2, 5, 3)
    before = torch.get_rng_state()
    info_nce(anchor, positive, symmetric=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_info_nce_is_float32_under_autocast() -> None:
    anchor, positive = torch.randn(2, 8, 16)
    expected = info_nce(anchor, positive, temperature=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = info_nce(anchor, positive, temperature=0.05)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"similarity": "cos"}, "similarity is 'cos'.*did you mean 'cosine'"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"num_negatives": 0}, "num_negatives is 0"),
        ({"negatives_from": "both"}, "negatives_from is 'both'"),
    ],
)
def test_info_nce_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        info_nce(torch.eye(2), torch.eye(2), **options)
    with pytest.raises(ConfigError, match="expected one vector for every row in each"):
        info_nce(torch.eye(2), torch.eye(3))
