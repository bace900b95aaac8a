"""Row-wise optimizers against torch's dense ones, against formulas written out for one row, and the kernel against torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrlib import _native, rowwise
from ctrlib.batch import Ragged
from ctrlib.config import ConfigError
from ctrlib.embedding import FeatureEmbedding
from ctrlib.metrics import auc
from ctrlib.optim import EmbeddingOptimizerName, Optimizer, OptimizerConfig, build_optimizer
from ctrlib.rowwise import BETA1, BETA2, Rule, SatOut
from ctrlib.schema import BatchLayout, Pooling, SequenceColumn, SparseColumn
from ctrlib.table import EmbeddingTable
from tests.models.small import LAYOUT, rows

RULES: tuple[Rule, ...] = get_args(Rule)
ENGINES = ("torch", "kernel") if _native.kernel() is not None else ("torch",)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test in torch operations and with the kernel, where it was built."""
    if request.param == "torch":
        monkeypatch.setattr(_native, "kernel", lambda: None)
    return str(request.param)


class Clicks(nn.Module):
    """Two tables of different widths, one of them read twice, and a small net."""

    def __init__(self, num_rows: int = 300, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = EmbeddingTable(num_rows, 8, dtype)
        self.narrow = EmbeddingTable(num_rows, 1, dtype)
        self.out = nn.Linear(5 * 8, 1)
        with torch.no_grad():
            for table in (self.wide, self.narrow):
                table.weight.normal_(0, 0.1)
                table.weight[0] = 0

    def forward(self, ids_BF: Tensor) -> Tensor:
        x_BFD = torch.cat([self.wide(ids_BF[:, :3]), self.wide(ids_BF[:, 3:])], 1)
        logits: Tensor = self.out(torch.relu(x_BFD.flatten(1))) + self.narrow(ids_BF).sum(1)
        return logits.squeeze(1)


def batches(num_rows: int, steps: int, size: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids with a long tail: rows sit out for one step or for hundreds; padding among them; labels that can be learned."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        ids = (num_rows ** torch.rand(size, 5, generator=generator)).int() - 1
        yield ids, ((ids * 2654435761 % 7).sum(1) % 2).float()


def train(
    model: nn.Module,
    config: OptimizerConfig,
    steps: int,
    *,
    between: Callable[[int, Optimizer], None] = lambda step, optimizer: None,
) -> list[float]:
    """Train, close the optimizer, and return the gradient norms."""
    optimizer = build_optimizer(model, config)
    norms = []
    for step, (ids, labels) in enumerate(batches(300, steps)):
        between(step, optimizer)
        optimizer.zero_grad()
        torch.autograd.backward(F.binary_cross_entropy_with_logits(model(ids), labels))
        norms.append(float(optimizer.step()))
    optimizer.close()
    return norms


def relative_difference(a: Tensor, b: Tensor) -> float:
    """The largest difference between two tables, relative to the larger of a weight and a typical one."""
    return float(((a - b).abs() / b.abs().clamp(min=float(b.abs().mean()))).max())


def halve(step: int, optimizer: Optimizer) -> None:
    """A learning rate that changes, differently for the tables."""
    if step % 100 == 99:
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] *= 0.8 + 0.1 * i


def test_adam_follows_dense_adam_over_1000_steps(engine: str) -> None:
    options = {"learning_rate": 3e-3, "embedding_learning_rate": 1e-2, "max_grad_norm": 0.25}
    dense, sparse = Clicks(), Clicks()
    expected = train(dense, OptimizerConfig(embedding="dense", **options), 1000, between=halve)  # type: ignore[arg-type]
    norms = train(sparse, OptimizerConfig(embedding="adam", **options), 1000, between=halve)  # type: ignore[arg-type]
    np.testing.assert_allclose(norms, expected, rtol=1e-4)
    assert min(expected) < 0.25 < max(expected)  # clipped in some steps, not in others
    for name, weight in sparse.named_parameters():
        assert relative_difference(weight.detach(), dense.get_parameter(name).detach()) < 1e-4, name
    with torch.no_grad():
        ids = torch.cat([ids for ids, _ in batches(300, 200)])
        labels = torch.cat([labels for _, labels in batches(300, 200)]).numpy()
        assert auc(labels, sparse(ids).numpy()) == pytest.approx(auc(labels, dense(ids).numpy()), abs=1e-4)


def test_adam_in_double_precision_is_nearer_still() -> None:
    # what is left is the quadrature: the error of the catch-up itself, not of rounding
    torch.set_default_dtype(torch.float64)
    try:
        dense, sparse = Clicks(), Clicks()
        train(dense, OptimizerConfig(embedding="dense", learning_rate=1e-2), 300)
        train(sparse, OptimizerConfig(embedding="adam", learning_rate=1e-2), 300)
    finally:
        torch.set_default_dtype(torch.float32)
    assert relative_difference(sparse.wide.weight.detach(), dense.wide.weight.detach()) < 2e-6


def test_rows_are_current_whenever_they_are_read_or_saved(engine: str) -> None:
    dense, sparse = Clicks(), Clicks()
    probe = torch.arange(300).view(60, 5)
    seen: list[tuple[Tensor, Tensor]] = []

    def look(model: nn.Module, into: list[Tensor]) -> Callable[[int, Optimizer], None]:
        def between(step: int, optimizer: Optimizer) -> None:
            if step == 120:
                with torch.no_grad():
                    into.append(model(probe))  # evaluation between two steps
            if step == 170:
                into.append(model.state_dict()["wide.weight"].clone())

        return between

    a: list[Tensor] = []
    b: list[Tensor] = []
    train(dense, OptimizerConfig(embedding="dense", learning_rate=1e-2), 200, between=look(dense, a))
    train(sparse, OptimizerConfig(embedding="adam", learning_rate=1e-2), 200, between=look(sparse, b))
    seen = list(zip(a, b, strict=True))
    assert len(seen) == 2
    for expected, got in seen:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert relative_difference(sparse.wide.weight.detach(), dense.wide.weight.detach()) < 1e-4


def test_the_catch_up_against_a_sum_over_all_steps() -> None:
    """By brute force: m·Σ_j η β₁ʲ/(1 − β₁^{s+j}) / (√(v β₂ʲ/(1 − β₂^{s+j})) + ε), for all kinds of gaps, v and schedules."""
    eps, worst, worst_late = rowwise.ADAM_EPS, 0.0, 0.0
    for schedule in (lambda t: 1e-3, lambda t: 1e-3 * min(1, t / 50), lambda t: 1e-3 * 0.5 ** (t // 7)):
        for start in (1, 2, 5, 20, 100, 700):
            sat_out = SatOut(torch.device("cpu"))
            gaps = {1, 2, 3, 7, 40, 150, 400}
            for t in range(1, start + max(gaps) + 1):
                sat_out.advance(schedule(t))
                if t - start not in gaps:
                    continue
                steps = np.arange(start + 1, t + 1)
                age = steps - start
                rate = np.array([schedule(int(s)) for s in steps]) * BETA1**age / (1 - BETA1**steps)
                e1, a1, e2, a2 = sat_out.rule[start].double().numpy()
                for root in 10.0 ** np.arange(-12, 1, 0.5):
                    exact = (rate / (root * np.sqrt(BETA2**age / (1 - BETA2**steps)) + eps)).sum()
                    ours = a1 * e1 / (root + eps * e1) + a2 * e2 / (root + eps * e2)
                    error = abs(ours / exact - 1)
                    worst = max(worst, error)
                    worst_late = max(worst_late, error if start >= 20 else 0.0)
    assert 1e-6 < worst < 5e-3
    assert worst_late < 1e-4


def one_row(rule: Rule, gradients: list[list[float]], w: list[float], lr: float) -> list[float]:
    """The update of one row that is in every batch, in plain Python."""
    n = len(w)
    m, v, s = [0.0] * n, [0.0] * n, [0.0] * n
    for t, g in enumerate(gradients, 1):
        mean_square = sum(x * x for x in g) / n
        for i in range(n):
            square = mean_square if rule.startswith("rowwise") else g[i] * g[i]
            if rule == "sgd":
                w[i] -= lr * g[i]
            elif rule.endswith("adagrad"):
                s[i] += square
                w[i] -= lr * g[i] / (math.sqrt(s[i]) + 1e-10)
            else:
                m[i] = 0.9 * m[i] + 0.1 * g[i]
                v[i] = 0.999 * v[i] + 0.001 * square
                w[i] -= lr * (m[i] / (1 - 0.9**t)) / (math.sqrt(v[i] / (1 - 0.999**t)) + 1e-8)
    return w


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dim", [1, 3, 16, 33])
def test_one_row_by_hand(rule: Rule, dim: int, engine: str) -> None:
    table = EmbeddingTable(5, dim)
    start = torch.linspace(-0.5, 0.7, dim)
    with torch.no_grad():
        table.weight.copy_(start.expand(5, dim))
    optimizer = build_optimizer(table, OptimizerConfig(embedding=rule, embedding_learning_rate=0.1, max_grad_norm=None))
    halves = [[[math.sin(3 * t + i + k) for i in range(dim)] for k in range(2)] for t in range(6)]
    for pair in halves:
        optimizer.zero_grad()
        # row 3 twice, padding once: its gradients are summed before they are squared
        torch.autograd.backward(table(torch.tensor([3, 0, 3])), torch.tensor([pair[0], [9.0] * dim, pair[1]]))
        optimizer.step()
    optimizer.close()
    expected = one_row(rule, [[a + b for a, b in zip(*pair, strict=True)] for pair in halves], start.tolist(), 0.1)
    np.testing.assert_allclose(table.weight[3].detach().numpy(), expected, rtol=2e-5, atol=2e-6)
    for other in (0, 1, 2, 4):
        assert torch.equal(table.weight[other], start)


@pytest.mark.parametrize("rule", RULES)
def test_lazy_rules_equal_dense_torch_where_every_row_is_in_every_batch(rule: Rule) -> None:
    dense: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
        "lazy_adam": lambda p: torch.optim.Adam(p, lr=0.05),
        "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    }
    if rule not in dense:  # one statistic a row is no optimizer of torch's
        assert rule.startswith("rowwise")
        return
    ours, theirs = EmbeddingTable(7, 4), nn.Embedding(7, 4, padding_idx=0)
    theirs.load_state_dict(ours.state_dict())
    a = build_optimizer(ours, OptimizerConfig(embedding=rule, embedding_learning_rate=0.05, max_grad_norm=None))
    b = dense[rule](theirs.parameters())
    for step in range(20):
        for module, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            torch.autograd.backward(torch.cos(module(torch.arange(7)) + 0.1 * step).sum())
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(len(ENGINES) < 2, reason="the kernel was not built: there is nothing to compare")
@pytest.mark.parametrize("l2", [{}, {"embedding_l2": 0.02}, {"embedding_l2": 0.02, "embedding_l2_mode": "batch_rows"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_the_kernel_equals_torch(rule: Rule, dtype: torch.dtype, l2: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gradients to both, so that a difference does not feed on itself."""
    config = OptimizerConfig(embedding=rule, learning_rate=0.01, max_grad_norm=5.0, **l2)

    def trained() -> tuple[Tensor, list[float]]:
        table = Clicks(dtype=dtype).wide
        optimizer = build_optimizer(table, config)
        generator = torch.Generator().manual_seed(2)
        norms = []
        for ids, _ in batches(300, 60):
            optimizer.zero_grad()
            torch.autograd.backward(table(ids), torch.randn(*ids.shape, 8, generator=generator))
            norms.append(float(optimizer.step()))
        optimizer.close()
        return table.weight.detach(), norms

    weight, norms = trained()
    monkeypatch.setattr(_native, "kernel", lambda: None)
    expected, expected_norms = trained()
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-5)
    if dtype == torch.float32:
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
    else:  # a sum near the boundary between two roundings may fall on either side
        assert float((weight == expected).float().mean()) > 0.995


@pytest.mark.parametrize("threads", [2, 5])
def test_results_do_not_depend_on_the_number_of_threads(threads: int, engine: str) -> None:
    def trained(count: int) -> Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            table = EmbeddingTable(1000, 16)
            optimizer = build_optimizer(table, OptimizerConfig(embedding="adam", max_grad_norm=None))
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                table.weight.copy_(torch.randn(1000, 16, generator=generator))
            for _ in range(5):
                ids = torch.randint(0, 1000, (4000,), generator=generator)
                optimizer.zero_grad()
                torch.autograd.backward(table(ids), torch.randn(4000, 16, generator=generator))
                optimizer.step()
            optimizer.close()
            return table.weight.detach()
        finally:
            torch.set_num_threads(before)

    assert torch.equal(trained(1), trained(threads))


def test_elapsed_l2_pays_once_for_every_step(engine: str) -> None:
    # gradient 0 but for the penalty: w ← w − η·λ·k·w with k = 3 (steps 1 to 3), then k = 2
    table = EmbeddingTable(4, 2)
    with torch.no_grad():
        table.weight.fill_(1.0)
    config = OptimizerConfig(embedding="sgd", learning_rate=0.1, embedding_l2=0.5, max_grad_norm=None)
    optimizer = build_optimizer(table, config)
    for read in (1, 1, 2, 1, 2):
        optimizer.zero_grad()
        torch.autograd.backward(table(torch.tensor([read])).sum() * 0)
        optimizer.step()
    optimizer.close()
    assert table.weight[1].tolist() == pytest.approx([0.95 * 0.95 * 0.9] * 2)
    assert table.weight[2].tolist() == pytest.approx([0.85 * 0.9] * 2)
    assert table.weight[3].tolist() == [1.0, 1.0]


def test_the_norm_is_that_of_the_dense_gradient(engine: str) -> None:
    dense, sparse = Clicks(), Clicks()
    common: dict[str, Any] = {"embedding_l2": 0.3, "embedding_l2_mode": "batch_rows", "max_grad_norm": 1e-3, "net_l2": 0.01}
    expected = train(dense, OptimizerConfig(embedding="dense", name="sgd", learning_rate=10.0, **common), 30)
    norms = train(sparse, OptimizerConfig(embedding="sgd", name="sgd", learning_rate=10.0, **common), 30)
    np.testing.assert_allclose(norms, expected, rtol=1e-5)
    for a, b in zip(sparse.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_gradients_accumulate_until_the_step(engine: str) -> None:
    (first, second), together = list(batches(300, 2)), Clicks()
    apart = Clicks()
    config = OptimizerConfig(embedding="lazy_adam", learning_rate=0.01)
    for model, parts in ((apart, [first, second]), (together, [tuple(map(torch.cat, zip(first, second, strict=True)))])):
        optimizer = build_optimizer(model, config)
        optimizer.zero_grad()
        for ids, labels in parts:
            torch.autograd.backward(F.binary_cross_entropy_with_logits(model(ids), labels, reduction="sum"))
        optimizer.step()
        optimizer.close()
    for a, b in zip(apart.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_a_run_goes_on_from_its_saved_state(rule: Rule, engine: str) -> None:
    def steps(model: Clicks, optimizer: Optimizer, at: range) -> None:
        for step, (ids, labels) in enumerate(batches(300, 60)):
            if step in at:
                optimizer.zero_grad()
                torch.autograd.backward(F.binary_cross_entropy_with_logits(model(ids), labels))
                optimizer.step()

    config = OptimizerConfig(embedding=rule, learning_rate=0.01, embedding_l2=0.01)
    whole = Clicks()
    optimizer = build_optimizer(whole, config)
    steps(whole, optimizer, range(60))
    optimizer.close()

    first, second = Clicks(), Clicks(300)
    optimizer = build_optimizer(first, config)
    steps(first, optimizer, range(30))
    weights = {name: value.clone() for name, value in first.state_dict().items()}
    state = optimizer.state_dict()
    second.load_state_dict(weights)
    resumed = build_optimizer(second, config)
    resumed.load_state_dict(state)
    assert {id(group) for group in resumed.param_groups} >= {id(group) for group in resumed._dense.param_groups}  # type: ignore[union-attr]
    steps(second, resumed, range(30, 60))
    resumed.close()
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_loaded_weights_are_not_moved_by_steps_that_others_sat_out(engine: str) -> None:
    model = Clicks()
    optimizer = build_optimizer(model, OptimizerConfig(embedding="adam", learning_rate=0.1))
    for ids, labels in batches(300, 5):
        optimizer.zero_grad()
        torch.autograd.backward(F.binary_cross_entropy_with_logits(model(ids), labels))
        optimizer.step()
    loaded = {name: torch.full_like(value, 0.25) for name, value in model.state_dict().items()}
    model.load_state_dict(loaded)
    assert torch.equal(model.wide(torch.arange(300)), torch.full((300, 8), 0.25))
    optimizer.close()
    assert torch.equal(model.wide.weight, torch.full((300, 8), 0.25))


def test_stochastic_rounding_is_right_on_average(engine: str) -> None:
    """SGD steps of 1e-3 around 1.0, where neighbouring bfloat16 numbers are 2^-7 apart: rounding to nearest would lose all."""
    table = EmbeddingTable(4000, 8, torch.bfloat16)
    with torch.no_grad():
        table.weight.fill_(1.0)
    optimizer = build_optimizer(table, OptimizerConfig(embedding="sgd", learning_rate=1e-3, max_grad_norm=None))
    for _ in range(20):
        optimizer.zero_grad()
        torch.autograd.backward(table(torch.arange(4000)).sum())
        optimizer.step()
    optimizer.close()
    moved = 1.0 - table.weight[1:].detach().double()
    # standard deviation of a step's rounding below 2^-8 / 2 a weight: 20 steps, 32,000 weights
    assert float(moved.mean()) == pytest.approx(0.02, abs=4 * (2**-9) * math.sqrt(20 / 32_000))
    assert 0 < float(moved.std()) < 2**-8 * math.sqrt(20)


def test_bf16_tables_learn_about_as_well() -> None:
    exact, rounded = Clicks(), Clicks(dtype=torch.bfloat16)
    for model in (exact, rounded):
        train(model, OptimizerConfig(embedding="lazy_adam", learning_rate=0.01), 300)
    with torch.no_grad():
        ids, labels = (torch.cat(x) for x in zip(*batches(300, 300), strict=True))
        assert auc(labels.numpy(), rounded(ids).numpy()) == pytest.approx(auc(labels.numpy(), exact(ids).numpy()), abs=0.01)


def test_bf16_tables_want_a_row_wise_optimizer() -> None:
    with pytest.raises(ConfigError, match="bfloat16 tables need a row-wise optimizer"):
        build_optimizer(Clicks(dtype=torch.bfloat16), OptimizerConfig(embedding="dense"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"embedding": "lazy_adam", "embedding_l2_mode": "full_table"},
            "touches only rows of the batch.*'elapsed' or 'batch_rows'",
        ),
        ({"embedding": "adam", "embedding_l2_mode": "full_table"}, "touches only rows of the batch"),
        ({"embedding": "dense", "embedding_l2_mode": "elapsed"}, "choose 'full_table' or 'batch_rows'"),
        ({"embedding": "adam", "embedding_l2_mode": "elapsed"}, "choose 'batch_rows'"),
        ({"embedding": "lazyadam"}, "optimizer.embedding is 'lazyadam'.*did you mean 'lazy_adam'"),
    ],
)
def test_settings_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**options)


def test_an_id_outside_the_table_is_an_error(engine: str) -> None:
    table = EmbeddingTable(5, 16)
    optimizer = build_optimizer(table, OptimizerConfig(embedding="adam"))
    for ids in (torch.tensor([1, 5]), torch.tensor([-1, 2], dtype=torch.int32)):
        with pytest.raises(IndexError):
            table(ids)
    optimizer.close()


@pytest.mark.parametrize("embedding", ["lazy_adam", "adam", "rowwise_adagrad"])
def test_pooled_sequences_train_like_dense_ones(embedding: EmbeddingOptimizerName, engine: str) -> None:
    """Mean, sum and max over ragged values and padding: the sparse path pools looked-up rows, the dense one the table."""
    poolings: tuple[Pooling, ...] = get_args(Pooling)
    for pooling in poolings:
        columns = (SequenceColumn("a", 20, "a", pooling, False),)
        layout = BatchLayout((SparseColumn("a", 20, "a"),), (), columns, ("y",))
        torch.manual_seed(0)
        module = FeatureEmbedding(FeatureEmbedding.Config(dim=4), layout)
        table: Any = module.tables[0]
        ragged = Ragged(torch.tensor([3, 0, 5, 5, 7, 0], dtype=torch.int32), torch.tensor([0, 3, 3, 5, 6], dtype=torch.int32))
        plain = table.pool({"a": ragged})[0]
        torch.autograd.backward(plain.square().sum())
        expected = table.rows.weight.grad.clone()
        table.rows.weight.grad = None
        optimizer = build_optimizer(module, OptimizerConfig(embedding=embedding))
        pooled = table.pool({"a": ragged})[0]
        torch.testing.assert_close(pooled, plain)
        torch.autograd.backward(pooled.square().sum())
        got = table.rows.weight.grad.to_dense()
        torch.testing.assert_close(got[1:], expected[1:])
        optimizer.close()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch.compile itself, at the break in the graph
def test_adam_works_compiled() -> None:
    # the rows are caught up outside the compiled graph
    dense, sparse = Clicks(), Clicks()
    train(dense, OptimizerConfig(embedding="dense"), 3)
    compiled = torch.compile(sparse, backend="aot_eager")
    optimizer = build_optimizer(sparse, OptimizerConfig(embedding="adam"))
    for ids, labels in batches(300, 3):
        optimizer.zero_grad()
        torch.autograd.backward(F.binary_cross_entropy_with_logits(compiled(ids), labels))
        optimizer.step()
    optimizer.close()
    assert relative_difference(sparse.wide.weight.detach(), dense.wide.weight.detach()) < 1e-4


def test_tables_are_as_before_when_the_optimizer_is_closed(engine: str) -> None:
    model = Clicks()
    optimizer = build_optimizer(model, OptimizerConfig(embedding="adam"))
    assert model.wide.sparse
    optimizer.close()
    assert not model.wide.sparse
    ids, labels = next(batches(300, 1))
    torch.autograd.backward(F.binary_cross_entropy_with_logits(model(ids), labels))
    assert model.wide.weight.grad is not None
    assert not model.wide.weight.grad.is_sparse


def test_frozen_tables_are_left_alone() -> None:
    model = Clicks()
    model.narrow.weight.requires_grad_(False)
    before = model.narrow.weight.clone()
    train(model, OptimizerConfig(embedding="lazy_adam"), 5)
    assert torch.equal(model.narrow.weight, before)


def test_every_kind_of_column_trains_row_wise() -> None:
    torch.manual_seed(0)
    module = FeatureEmbedding(FeatureEmbedding.Config(dim=4), LAYOUT)
    optimizer = build_optimizer(module, OptimizerConfig(embedding="lazy_adam", learning_rate=0.1))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    torch.autograd.backward(module(rows(6)).square().sum())
    optimizer.step()
    optimizer.close()
    changed = [name for name, value in module.state_dict().items() if not torch.equal(value, before[name])]
    assert {name for name in before if name.endswith("rows.weight")} <= set(changed)


@pytest.mark.skipif(_native.kernel() is None, reason="the kernel is not built")
def test_kernel_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "_VERSION", -1)
    with pytest.warns(UserWarning, match="was built for another version of ctrlib and is not used; install ctrlib again"):
        assert _native.kernel.__wrapped__() is None
