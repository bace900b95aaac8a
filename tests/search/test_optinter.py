"""The search of OptInter: its clock, what it reads, what it finds, and the smaller model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pytest
import torch
from torch import Tensor

import ctrlib
import ctrlib.search.optinter as search
from ctrlib.batch import Batch
from ctrlib.config import ConfigError
from ctrlib.data.encoder import Encoder
from ctrlib.data.source import open_source
from ctrlib.data.store import Store
from ctrlib.embedding import FeatureEmbedding
from ctrlib.experiment import DataOptions, RunConfig, prepare, train
from ctrlib.interactions.mlp import MLP
from ctrlib.models.ctr import build_model
from ctrlib.models.optinter import Choice, OptInter
from ctrlib.models.presets import preset
from ctrlib.optim import OptimizerConfig, build_optimizer
from ctrlib.schema import BatchLayout, DataError, DenseField, Schema, SparseField
from ctrlib.search.optinter import OptInterConfig, compact_optinter, search_optinter
from ctrlib.search.selection import Selection
from ctrlib.training import FitConfig
from tests.clicks import write
from tests.models.small import LAYOUT, awake, crossed, rows, with_crosses
from tests.search.planted import HandStore, bilinear_pairs, fields, plain, random_sign_pair, small, split

FIT = FitConfig(optimizer=OptimizerConfig(embedding="dense", learning_rate=0.01, max_grad_norm=None))
FEW = OptInterConfig.few_steps()
CROSSED = with_crosses(LAYOUT)
NOISE = ("f0*f2", "f0*f3", "f1*f2", "f1*f3", "f2*f3")


def store(num_rows: int = 600, *, seed: int = 0, values: int = 5, splits: tuple[str, ...] = ("train",)) -> HandStore:
    found = {name: split(*random_sign_pair(num_rows, values, seed + i), values) for i, name in enumerate(splits)}
    return HandStore(fields(4, values), found)


def searched(
    hand: HandStore, config: OptInterConfig = FEW, *, batch_size: int = 100, seed: int = 0, **options: Any
) -> Selection:
    return search_optinter(small(**options), hand.store(), config, fit=FIT, batch_size=batch_size, seed=seed)


def test_temperature_of_the_released_code() -> None:
    for config in (OptInterConfig(), OptInterConfig.paper(), OptInterConfig.released_code()):
        shown = [config.temperature(step, 10**6) for step in (0, 10_000, 19_800, 50_000)]
        assert shown == pytest.approx([1, 0.5, 0.01, 0.01], abs=1e-12)


def test_temperature_that_ends_with_the_search() -> None:
    config = OptInterConfig(start=1.0, floor=0.1, rate=None)
    assert [config.temperature(step, 10) for step in (0, 3, 9)] == pytest.approx([1.0, 0.7, 0.1])
    assert config.temperature(0, 1) == 1.0


class Auc:
    """Stands for the evaluation of a pass: a number, after a look at the clock and forward passes of the model."""

    def __init__(self, *found: float) -> None:
        self.found: Iterator[float] = iter(found)
        self.temperatures: list[float] = []
        self.logits: list[Tensor] = []

    def __call__(self, model: OptInter, batches: Any, **options: Any) -> dict[str, float]:
        before = float(model.temperature)
        model.eval()
        for batch in batches:
            model(batch)
        assert float(model.temperature) == before
        self.temperatures.append(before)
        self.logits.append(cast(Tensor, model.logits).detach().clone())
        return {"auc": next(self.found)}


def test_evaluation_does_not_move_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    auc = Auc(0.6, 0.7, 0.8)
    monkeypatch.setattr(search, "evaluate", auc)
    config = OptInterConfig(passes=3, rate=0.01)
    found = searched(store(splits=("train", "valid", "test")), config)
    # Six steps a pass: the last of each is the 6th, 12th and 18th.
    assert auc.temperatures == pytest.approx([0.95, 0.89, 0.83])
    assert [p["temperature"] for p in found.report["passes"]] == pytest.approx([0.95, 0.89, 0.83])
    assert found.report["steps"] == 18


def test_ends_when_validation_gets_worse_and_keeps_the_best_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    auc = Auc(0.6, 0.7, 0.65)
    monkeypatch.setattr(search, "evaluate", auc)
    found = searched(store(splits=("train", "valid", "test")), replace(FEW, passes=5))
    assert [p["valid_auc"] for p in found.report["passes"]] == [0.6, 0.7, 0.65]
    kept = torch.tensor(list(found.report["logits"].values()))
    torch.testing.assert_close(kept, auc.logits[1])
    assert not torch.equal(auc.logits[1], auc.logits[2])


def test_reads_no_test_rows_and_validation_only_to_stop() -> None:
    hand = store(splits=("train", "valid", "test"))
    searched(hand)
    assert hand.read == ["train"]
    searched(hand, replace(FEW, passes=2))
    assert hand.read == ["train", "train", "valid"]
    searched(store(splits=("train", "test")), replace(FEW, passes=2))


def test_numbers_are_scaled_by_the_training_rows() -> None:
    """The released code scales training and test rows by ranges of their own."""
    schema = Schema(fields=(SparseField(name="a"), DenseField(name="x", encoding="minmax")), labels=("y",))
    encoder = Encoder.fit(schema, {"a": ["u", "v", "u"], "x": [0.0, 10.0, 5.0], "y": [0, 1, 0]})
    assert encoder.transform({"a": ["u"], "x": [20.0]}).dense.tolist() == [[2.0]]


def test_selection() -> None:
    found = searched(store())
    assert (found.method, found.encoder_hash) == ("optinter", "by hand")
    assert list(found.pairs or {}) == ["f0*f1", "f0*f2", "f0*f3", "f1*f2", "f1*f3", "f2*f3"]
    assert isinstance(found.model, OptInter.Config)
    assert found.model == small(choices=found.pairs)
    assert (found.fields, found.values, found.weights) == (None, None, None)
    assert sum(found.report["choices"].values()) == 6
    for name, (memorize, factorize, naive) in found.report["logits"].items():
        assert found.scores[name] == pytest.approx(max(memorize, factorize) - naive, abs=1e-6)
        first, second, _ = sorted((memorize, factorize, naive), reverse=True)
        assert found.report["margins"][name] == pytest.approx(first - second, abs=1e-6)
    fat, chosen = (build_model(config, fields(4, 5)) for config in (small(), found.model))
    assert found.report["parameters"] == {
        "mixture": sum(p.numel() for p in fat.parameters()),
        "chosen": sum(p.numel() for p in chosen.parameters()),
    }


def test_one_seed_one_result() -> None:
    a, b, c = (searched(store(), seed=seed, relaxation="gumbel").report["logits"] for seed in (3, 3, 4))
    assert a == b
    assert a != c


def test_weights_and_logits_have_optimizers_of_their_own() -> None:
    net = cast(OptInter, build_model(small(), fields(4, 5)))
    optimizer = build_optimizer(net, FIT.optimizer, without=[cast(torch.nn.Parameter, net.logits)])
    updated = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted([*updated, id(net.logits)]) == sorted(id(p) for p in net.parameters())


def test_joint_steps_on_one_gradient() -> None:
    """One batch: the logits move by the learning rate of Adam's first step, against the gradient at the start."""
    hand = store(100)
    start = cast(OptInter, _seeded(small(), hand.layout, 0))
    found = searched(hand, replace(FEW, learning_rate=0.125), batch_size=100)
    moved = torch.tensor(list(found.report["logits"].values())) - cast(Tensor, start.logits).detach()
    s = hand.splits["train"]
    batch = Batch(sparse=s.sparse, dense=s.dense, labels=s.labels)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(start(batch).logits, s.labels[:, 0])
    gradient = torch.autograd.grad(loss, cast(Tensor, start.logits))[0]
    clear = gradient.abs() > 1e-6
    assert clear.any()
    torch.testing.assert_close(moved[clear], -0.125 * gradient.sign()[clear], rtol=0, atol=2e-3)


def _seeded(config: OptInter.Config, layout: BatchLayout, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build_model(config, layout)


def test_bilevel_takes_turns_over_rows_that_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    hand = store(500, splits=("train", "test"))  # five batches: an odd number must not swap the parts in the second pass
    turns: list[tuple[str, Tensor]] = []
    forward = OptInter.forward
    seen: list[Tensor] = []

    def watched(self: OptInter, batch: Batch) -> Any:
        seen.append(batch.sparse.clone())
        return forward(self, batch)

    monkeypatch.setattr(OptInter, "forward", watched)
    step = torch.optim.Adam.step

    def stepped(self: torch.optim.Adam, *args: Any, **options: Any) -> Any:
        mine = [p for group in self.param_groups for p in group["params"]]
        if seen:  # before the first batch, an optimizer tries out what torch can do
            turns.append(("logits" if len(mine) == 1 and mine[0].shape == (6, 3) else "weights", seen[-1]))
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.Adam, "step", stepped)
    searched(hand, replace(FEW, method="bilevel", passes=2))
    assert [name for name, _ in turns] == ["weights", "logits", "weights", "logits", "weights"] * 2
    for (_, first), (_, second) in zip(turns[:5], turns[5:], strict=True):
        assert torch.equal(first, second)


def test_random_choices_train_nothing() -> None:
    found = [searched(store(), OptInterConfig(method="random"), seed=seed) for seed in range(60)]
    assert found[0].report["passes"] == []
    often = [sum((s.pairs or {})[name] == choice for s in found) for name in NOISE for choice in ("memorize", "naive")]
    assert 8 < min(often) <= max(often) < 34


def test_without_crosses_or_with_some() -> None:
    hand = store()
    bare = replace(hand.layout, sparse=hand.layout.sparse[:4])
    bare_hand = HandStore(bare, {"train": replace(hand.splits["train"], sparse=hand.splits["train"].sparse[:, :4])})
    with pytest.raises(ConfigError, match=r"no cross to memorise; add crosses to the schema \(CrossField\)"):
        searched(bare_hand)
    found = searched(bare_hand, operations=("factorize", "naive"))
    assert set((found.pairs or {}).values()) <= {"factorize", "naive"}
    assert found.report["operations"] == ["factorize", "naive"]
    some = HandStore(replace(bare, sparse=hand.layout.sparse[:5]), {"train": replace(hand.splits["train"])})
    some.splits = {"train": replace(hand.splits["train"], sparse=hand.splits["train"].sparse[:, :5])}
    found = searched(some)
    assert all((found.pairs or {})[name] != "memorize" for name in NOISE)
    assert found.report["logits"]["f0*f2"][0] is None


def test_a_list_of_fields_loses_the_crosses_that_are_not_memorised() -> None:
    hand = store()
    model = replace(small(), embedding=replace(small().embedding, fields=hand.layout.names))
    found = search_optinter(model, hand.store(), FEW, fit=FIT, batch_size=100, seed=0)
    memorised = [name for name, choice in (found.pairs or {}).items() if choice == "memorize"]
    assert len(memorised) < 6
    kept = replace(hand.layout, sparse=tuple(c for c in hand.layout.sparse if c.parts is None or c.name in memorised))
    assert found.model is not None
    for layout in (kept, hand.layout):
        built = build_model(found.model, layout)
        assert sum(p.numel() for p in built.parameters()) == found.report["parameters"]["chosen"]


def test_data_with_every_kind_of_field(tmp_path: Path) -> None:
    rows = {f"c{i}": [f"v{(n * (i + 3)) % 7}" for n in range(300)] for i in range(2)}
    columns: dict[str, Any] = {**rows, "x": [n / 7 for n in range(300)], "y": [n % 3 == 0 for n in range(300)]}
    schema = Schema(
        fields=(SparseField(name="c0"), SparseField(name="c1"), DenseField(name="x", encoding="piecewise", num_bins=4)),
        labels=("y",),
    )
    table = open_source(pa.table(columns))
    made = Store.create(tmp_path / "store", Encoder.fit(schema.with_crosses(), table), {"train": table})
    found = search_optinter(small(), made, FEW, fit=FIT, batch_size=50, seed=0)
    assert list(found.pairs or {}) == ["c0*c1"]


def test_pairs_that_can_only_be_naive_have_no_score() -> None:
    hand = store()
    one = HandStore(
        replace(hand.layout, sparse=hand.layout.sparse[:5]),
        {"train": replace(hand.splits["train"], sparse=hand.splits["train"].sparse[:, :5])},
    )
    found = searched(one, operations=("memorize", "naive"))
    assert list(found.scores) == ["f0*f1"]
    assert [(found.pairs or {})[name] for name in NOISE] == ["naive"] * 5


def test_too_few_steps_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="ctrlib"):
        searched(store(), FEW, batch_size=20)
        searched(store(), OptInterConfig(method="random"))
        assert not caplog.records
        searched(store(), OptInterConfig())
    assert "6 steps of at most 3e-05 leave the logits about where they were drawn" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for the memory of the CPU")
def test_crosses_that_do_not_fit_are_refused_before_they_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctrlib.experiment.half_of_free_mb", lambda: 1e-3)
    with pytest.raises(DataError, match="the crosses have 294 values, which take"):
        searched(store())


def test_errors() -> None:
    hand = store()
    with pytest.raises(ConfigError, match="needs an OptInter model, not CTRModel; take the preset 'optinter'"):
        search_optinter(preset("fm"), hand.store(), FEW, fit=FIT, batch_size=10, seed=0)
    with pytest.raises(ConfigError, match="choices are made already"):
        searched(hand, choices="naive")
    single = HandStore(plain(1, 5), {"train": split(*random_sign_pair(50, 5, 0), 5)})
    with pytest.raises(DataError, match="no such pair; expected two or more sparse fields"):
        searched(single)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "jiont"}, "did you mean 'joint'"),
        ({"passes": 0}, "passes is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0"),
        ({"floor": 0.0}, "floor is 0"),
        ({"rate": -1.0}, "rate is -1"),
        ({"start": 0.001}, "start is 0.001, below optinter.floor, 0.01"),
        ({"start": float("nan")}, "start is nan"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptInterConfig(**options)


def test_an_undefined_validation_auc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "evaluate", Auc(float("nan")))
    with pytest.raises(DataError, match=r"validation AUC.* is undefined; expected validation rows with both labels"):
        searched(store(splits=("train", "valid")), replace(FEW, passes=2))


def test_from_raw_rows_to_a_trained_model(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    options = DataOptions(schema=folder / "schema.json", valid=str(folder / "valid.parquet"), test=str(folder / "test.parquet"))
    made = prepare(str(folder / "train.parquet"), tmp_path / "store", options)
    model = small(operations=("naive", "factorize"))
    found = search_optinter(model, made, replace(FEW, passes=2), fit=FIT, batch_size=250, seed=0)
    assert found.encoder_hash == made.encoder.hash
    assert list(found.pairs or {}) == ["user*city", "user*age", "city*age"]
    assert all(0.5 < p["valid_auc"] < 1 for p in found.report["passes"])
    json.dumps(found.report, allow_nan=False)
    assert found.model is not None
    report = train(made, RunConfig(model=found.model, fit=replace(FIT, epochs=2), device="cpu"), tmp_path / "run")
    assert report["test"]["auc"] > 0.6
    loaded = ctrlib.load(tmp_path / "run")
    assert loaded.model.config == found.model
    assert len(loaded.predict(str(folder / "test.parquet"))) == 401


SOME: dict[str, Choice] = {"user*item": "factorize", "user*hour": "naive", "item*hour": "memorize"}


@pytest.mark.parametrize(
    "choices", [SOME, {"user*hour": "memorize", "user*item": "memorize"}, {"user*hour": "factorize"}, "naive", "memorize"]
)
@pytest.mark.parametrize("wanted", [None, ("price", "item", "user", "hour", "user*hour", "item*hour", "user*item")])
def test_compact_is_the_fixed_mixture(choices: Any, wanted: tuple[str, ...] | None) -> None:
    torch.manual_seed(2)
    embedding = FeatureEmbedding.Config(dim=3, init_std=0.5, dims={"item": 5}, fields=wanted)
    mlp = MLP.Config(hidden_units=(6, 4), norm="layer")
    fat = build_model(OptInter.Config(embedding=embedding, pair_dim=2, mlp=mlp), CROSSED).eval()
    awake(fat)
    assert isinstance(fat, OptInter)
    fat.temperature.fill_(0.4)
    fat.fix(choices)
    batch = crossed(rows(50), LAYOUT)
    expected = fat(batch).logits
    thin, layout = compact_optinter(fat, CROSSED)
    assert thin.config.choices == fat.best()
    memorised = [c.name for c in layout.sparse if c.parts is not None]
    assert memorised == [p.cross for p in fat.pairs if fat.best()[p.name] == "memorize"]
    at = [CROSSED.names.index(c.name) for c in layout.sparse]
    torch.testing.assert_close(thin(replace(batch, sparse=batch.sparse[:, at])).logits, expected, rtol=0, atol=1e-6)
    again = build_model(thin.config, layout)  # what is saved is config, layout and weights
    again.load_state_dict(thin.state_dict())
    if "naive" in fat.best().values():
        assert sum(p.numel() for p in thin.parameters()) < sum(p.numel() for p in fat.parameters())


def test_only_a_mixture_is_made_compact() -> None:
    with pytest.raises(ConfigError, match="only a mixture"):
        compact_optinter(cast(OptInter, build_model(small(choices="naive"), fields(4, 5))), fields(4, 5))


def planted(seed: int, *, rows: int = 50_000, batch_size: int = 100, **law: Any) -> dict[str, Choice]:
    """The choices after one pass over fresh rows of 20 values a field."""
    hand = HandStore(fields(4, 20), {"train": split(*random_sign_pair(rows, 20, seed, **law), 20)})
    return dict(searched(hand, batch_size=batch_size, seed=seed).pairs or {})


@pytest.mark.parametrize("seed", range(2))
def test_memorises_a_random_pair_and_nothing_else(seed: int) -> None:
    assert planted(seed) == {"f0*f1": "memorize"} | dict.fromkeys(NOISE, "naive")


@pytest.mark.slow
def test_memorises_a_random_pair_and_nothing_else_in_ten_seeds() -> None:
    right = {"f0*f1": "memorize"} | dict.fromkeys(NOISE, "naive")
    assert sum(planted(seed) == right for seed in range(10)) >= 9


@pytest.mark.slow
def test_a_pair_of_rank_one_is_mostly_factorised() -> None:
    choices = [planted(seed, rows=750_000, batch_size=500, rank_one=True)["f0*f1"] for seed in range(8)]
    assert "naive" not in choices
    assert choices.count("factorize") > 4


@pytest.mark.slow
def test_finds_the_bilinear_pairs_of_autofis() -> None:
    hand = HandStore(fields(6, 60), {"train": split(*bilinear_pairs(300_000, 60, 0), 60)})
    pairs = searched(hand, batch_size=500).pairs or {}
    assert all(pairs[name] != "naive" for name in ("f0*f1", "f2*f5", "f3*f4"))


@pytest.mark.slow
def test_many_passes_memorise_everything() -> None:
    """A limit of the method, not of this code: later passes reward what fits the training rows, and crosses fit best."""
    many = replace(FEW, passes=60)
    for seed in range(3):
        hand = HandStore(fields(4, 20), {"train": split(*random_sign_pair(3000, 20, seed), 20)})
        assert set((searched(hand, many, seed=seed).pairs or {}).values()) == {"memorize"}


@pytest.mark.slow
def test_many_passes_of_the_bilevel_search_choose_nothing() -> None:
    """The other limit: rows that the weights do not see are served worse by what is fitted to the others."""
    hand = HandStore(fields(4, 20), {"train": split(*random_sign_pair(3000, 20, 0), 20)})
    assert set((searched(hand, replace(FEW, method="bilevel", passes=60)).pairs or {}).values()) == {"naive"}
