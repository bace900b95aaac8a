from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctrlib import artifact
from ctrlib.config import ConfigError
from ctrlib.data.encoder import Encoder
from ctrlib.data.loader import Loader
from ctrlib.data.source import open_source
from ctrlib.data.store import Store
from ctrlib.embedding import FeatureEmbedding
from ctrlib.experiment import DataOptions, RunConfig, configure, train
from ctrlib.files import discard_unfinished, json_text
from ctrlib.models.optinter import OptInter
from ctrlib.models.presets import PRESETS, preset
from ctrlib.schema import DataError, Schema, SequenceField, SparseField
from ctrlib.search import select as selecting
from ctrlib.search.ranking import Top, best_fields
from ctrlib.search.select import METHODS, kept_line, method_options, select, table
from ctrlib.search.selection import Choice, Selection, apply_to_store, compact, derive
from ctrlib.training import TrainingDivergedError
from tests.clicks import FIELDS, SCHEMA, clicks, write
from tests.models import test_history_runs as history_runs
from tests.search.stores import Guarded, click_store

SIZES = {
    "dnn": {"model.embedding.dim": "4", "model.interaction.hidden_units": "8"},
    "auto_fm": {"model.embedding.dim": "4"},
    "optinter": {"model.embedding.dim": "4", "model.pair_dim": "3", "model.mlp.hidden_units": "8"},
}
RUN = {"fit.optimizer.learning_rate": "0.01", "fit.epochs": "1", "batch_size": "256", "workers": "0"}


@dataclass(frozen=True)
class Case:
    model: str = "dnn"
    top: Top | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    batch_size: int = 256

    @property
    def run(self) -> RunConfig:
        return replace(config(self.model), batch_size=self.batch_size)


CASES = {
    "optfs": Case(settings={"penalty": "2e-5", "learning_rate": "0.05", "epochs": "2"}, batch_size=64),
    "optinter": Case("optinter", settings={"learning_rate": "0.05"}),
    "autofis": Case("auto_fm", settings={"c": "0.15"}),
    "autofield": Case(top=3),
    "permutation": Case(top=3, settings={"repeats": "2"}),
    "gradient": Case(top=0.5),
    "outrank": Case(top=3),
    "gbdt": Case(top=3, settings={"trees": "5", "folds": "2", "engine": "scikit-learn"}),
}


def config(model: str = "dnn") -> RunConfig:
    return configure(model, options=SIZES[model] | RUN)


@pytest.fixture(autouse=True)
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches do not depend on them, and handing over the tiny ones of here takes longer than all else."""
    defaults = Loader.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "workers", 0)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves as numbers alone."""
    monkeypatch.setattr(selecting, "_draw", lambda *_: None)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Guarded:
    return click_store(tmp_path_factory.mktemp("plain"), ("train", "valid", "test"))


@pytest.fixture(scope="module")
def crossed(tmp_path_factory: pytest.TempPathFactory) -> Guarded:
    return click_store(tmp_path_factory.mktemp("crossed"), ("train", "valid", "test"), SCHEMA.with_crosses(min_count=3))


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("method", CASES)
def test_every_method_end_to_end(
    method: str, plain: Guarded, crossed: Guarded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[method]
    store = crossed if case.model == "optinter" else plain
    # test rows are for `train` and for their new ids alone: not for the search, not for the comparison of logits
    monkeypatch.setattr(Guarded, "allowed", ("train", "valid"))
    monkeypatch.delitem(store.__dict__, "allowed")

    def may_test(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        with monkeypatch.context() as opened:
            opened.setattr(Guarded, "allowed", ("train", "valid", "test"))
            return call(*arguments, **named)

    monkeypatch.setattr(selecting, "train", partial(may_test, train))
    monkeypatch.setattr(selecting, "apply_to_store", partial(may_test, apply_to_store))
    report = select(
        store, case.run, tmp_path / "out", method=method, top=case.top, settings=case.settings, name="m", seeds=2, curve=False
    )

    out = tmp_path / "out"
    assert names(out) == ["after", "before", "data.json", "report.json", "report.md", "select.json", "selection", "verified"]
    assert read(out / "report.json") == json.loads(json_text(report))
    assert (out / "report.md").read_text(encoding="utf-8") == table(report)
    assert report["verified"] is True
    assert report["compact_difference"] <= 1e-6
    kept = {"fields": "fields", "values": "values", "pairs": "pairs"}[METHODS[method].keeps]
    for i, seed in enumerate((0, 1)):
        for when in ("before", "after"):
            assert read(out / when / f"seed-{seed}" / "metrics.json") == json.loads(json_text(report[when]["runs"][i]))
        selection = Selection.load(out / "selection" / f"seed-{seed}")
        assert selection.method.replace("_", "") == method
        assert list(report["kept"][i]) == [kept]
        if selection.fields is not None:
            assert set(selection.fields) < set(FIELDS)
            assert report["kept"][i]["fields"] == {"kept": 3, "total": 5, "names": selection.fields}
        if selection.values is not None:
            assert 0 < report["kept"][i]["values"]["kept"] < report["kept"][i]["values"]["total"]
    for metric in ("auc", "log_loss"):
        gains = [after["test"][metric] - before["test"][metric] for before, after in zip(*_runs(report), strict=True)]
        assert report["gain"][metric]["mean"] == pytest.approx(sum(gains) / 2)
    if kept != "pairs":
        assert report["after"]["parameters"]["mean"] < report["before"]["parameters"]["mean"]


def _runs(report: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return report["before"]["runs"], report["after"]["runs"]


def test_the_curve_and_raw_rows(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = DataOptions(schema=SCHEMA, valid=clicks(300, 1), test=clicks(300, 2))
    report = select(clicks(1000, 0), config(), out, options, method="outrank", top=2, seeds=1)
    points = {point["label"]: point for point in read(out / "curve.json")}
    assert list(points) == ["25% of the fields", "50% of the fields", "75% of the fields", "before", "after"]
    for when in ("before", "after"):
        run = report[when]["runs"][0]
        found = points[when]["parameters"], points[when]["valid_auc"]
        assert found == (run["parameters"], pytest.approx(run["valid"]["auc"]))
    sizes = [point["parameters"] for point in list(points.values())[:4]]
    assert sizes == sorted(sizes)
    assert points["25% of the fields"] == {**points["after"], "label": "25% of the fields"}  # two of five, both
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert names(out / "curve" / "seed-0" / "25%-of-the-fields") == ["point.json"]
    assert not list(out.rglob("*.part"))
    assert "± nan" not in (out / "report.md").read_text(encoding="utf-8")  # one seed has no spread


@pytest.mark.usefixtures("undrawn")
def test_a_curve_of_penalties_goes_on_without_what_nothing_is_left_of(
    plain: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[float] = []

    def search(model: Any, store: Store, options: Any, run: RunConfig, seed: int) -> Selection:
        assert run.batch_size == 64
        searched.append(options.penalty)
        if options.penalty > 3e-4:
            raise ConfigError("everything is gone")
        return METHODS["outrank"].search(model, store, method_options("outrank", 3), run, seed)

    monkeypatch.setattr(selecting, "METHODS", {**METHODS, "optfs": replace(METHODS["optfs"], search=search)})
    once = {"method": "optfs", "settings": {"penalty": "3e-4"}, "seeds": 1, "search_batch_size": 64}
    select(plain, config(), tmp_path / "out", **once)  # type: ignore[arg-type]
    assert searched == pytest.approx([3e-4, 3e-5, 9e-5, 9e-4])
    assert [p["label"] for p in read(tmp_path / "out" / "curve.json")] == ["penalty × 0.1", "penalty × 0.3", "before", "after"]
    assert read(tmp_path / "out" / "after" / "seed-0" / "config.json")["batch_size"] == 256
    select(plain, config(), tmp_path / "out", **once)  # type: ignore[arg-type]
    assert searched[4:] == pytest.approx([9e-4])  # what is there is not searched again


def test_an_interrupted_selection_goes_on(plain: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []

    def counted(store: Store, run: RunConfig, out: Path, **named: Any) -> dict[str, Any]:
        trained.append("/".join(out.parts[-2:]))
        if len(trained) == 4:
            raise KeyboardInterrupt
        return train(store, run, out, **named)

    monkeypatch.setattr(selecting, "train", counted)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        select(plain, config(), out, method="outrank", top=3, seeds=2, curve=False)
    assert trained == ["before/seed-0", "after/seed-0", "before/seed-1", "after/seed-1"]
    assert not (out / "report.json").exists()
    assert not (out / "after" / "seed-1").exists()

    def refuse(*_: object) -> None:
        raise AssertionError("searched again")

    broken = replace(METHODS["outrank"], search=refuse)  # type: ignore[arg-type]
    monkeypatch.setattr(selecting, "METHODS", {"outrank": broken})
    monkeypatch.setattr(selecting._Smaller, "difference", refuse)
    resumed = select(plain, config(), out, method="outrank", top=3, seeds=2, curve=False)
    assert trained[4:] == ["after/seed-1"]
    assert not list(out.glob("kept-*"))
    monkeypatch.undo()
    whole = select(plain, config(), tmp_path / "whole", method="outrank", top=3, seeds=2, curve=False)
    assert [r["test"] for r in resumed["after"]["runs"]] == [r["test"] for r in whole["after"]["runs"]]
    assert resumed["kept"] == whole["kept"]


def test_an_interrupted_run_is_not_counted(plain: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selecting, "train", lambda *a, **k: train(*a, **k) | {"interrupted": True})
    with pytest.raises(KeyboardInterrupt):
        select(plain, config(), tmp_path / "out", method="outrank", top=3, seeds=1, curve=False)
    assert names(tmp_path / "out" / "before") == []


def test_refusals_leave_nothing(plain: Store, crossed: Store, tmp_path: Path) -> None:
    def refused(error: type[Exception], message: str, data: object = plain, model: str = "dnn", **named: Any) -> None:
        with pytest.raises(error, match=message):
            select(data, config(model), tmp_path / "out", **{"curve": False, "seeds": 1, **named})
        assert not (tmp_path / "out").exists()

    refused(ConfigError, "no selection method 'optf'; did you mean 'optfs'", method="optf")
    refused(ConfigError, "penalti.*did you mean", method="optfs", settings={"penalti": "1"})
    refused(ConfigError, "permutation ranks the fields; say how many to keep", method="permutation")
    refused(ConfigError, "optfs decides by itself how much it keeps", method="optfs", top=3)
    refused(ConfigError, "top is 9, but the data has 5 fields", method="outrank", top=9)
    refused(ConfigError, "seeds", method="outrank", seeds=0)
    refused(ConfigError, "closed the gates of all", method="optfs", settings={**CASES["optfs"].settings, "penalty": "1"})
    refused(ConfigError, "AutoFIS", method="autofis")
    refused(DataError, "no such file", data=str(tmp_path / "none.parquet"), method="outrank", top=3)
    tables = {name: open_source(clicks(300, seed)) for seed, name in enumerate(("train", "valid"))}
    two = Store.create(tmp_path / "two", Encoder.fit(SCHEMA, tables["train"]), tables)
    refused(DataError, "two has no test", data=two, method="outrank", top=3)
    refused(DataError, "whose keys are made of the ids", data=crossed, method="optfs", settings=CASES["optfs"].settings)


def test_a_folder_of_something_else(plain: Store, crossed: Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    once: dict[str, Any] = {"method": "outrank", "top": 3, "seeds": 1, "curve": False}
    select(plain, config(), out, **once)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.json") if path.name != "report.json"}
    for changed in ({"top": 2}, {"settings": {"num_bins": "8"}}, {"method": "autofield"}, {"name": "other"}):
        with pytest.raises(ConfigError, match="holds a selection with other settings"):
            select(plain, config(), out, **once | changed)
    with pytest.raises(ConfigError, match="holds a selection with other settings"):
        select(plain, replace(config(), batch_size=128), out, **once)
    with pytest.raises(ConfigError, match="holds a selection on other data"):
        select(crossed, config(), out, **once)
    select(plain, config(), out, **once)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file.txt").write_text("mine")
    with pytest.raises(DataError, match="is not a selection to go on with"):
        select(plain, config(), tmp_path / "mine", **once)
    assert names(tmp_path / "mine") == ["file.txt"]


@pytest.mark.parametrize("method", ["optfs", "outrank"])
def test_a_wrong_small_model_is_seen(
    method: str, plain: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = CASES[method]

    def wrong(model: Any, selection: Selection, encoder: Encoder) -> Any:
        small, derived = compact(model, selection, encoder)
        embedding = next(part for part in small.modules() if isinstance(part, FeatureEmbedding))
        with torch.no_grad():
            next(embedding.parameters()).add_(2e-4)  # little, but no rounding
        return small, derived

    monkeypatch.setattr(selecting, "compact", wrong)
    out = tmp_path / "out"
    for _ in range(2):  # the second call reads what was found
        caplog.clear()
        report = select(plain, case.run, out, method=method, top=case.top, settings=case.settings, seeds=1, curve=False)
        assert 1e-5 < report["compact_difference"] < 1e-3
        assert report["verified"] is False
        assert "**not verified equal**" in table(report)
        assert "verified/seed-0.json: the small model is not the same function" in caplog.text


def test_wrong_small_models_of_pairs_are_seen(
    plain: Store, crossed: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(make: Any, *arguments: Any) -> Any:
        made = make(*arguments)
        with torch.no_grad():
            for parameter in (made[0] if isinstance(made, tuple) else made).parameters():
                parameter.add_(0.1)
        return made

    for name in ("compact_optinter", "without_closed_pairs"):
        make = getattr(selecting, name)
        monkeypatch.setattr(selecting, name, lambda *a, make=make: spoiled(make, *a))
    for method, store in (("optinter", crossed), ("autofis", plain)):
        case = CASES[method]
        report = select(store, case.run, tmp_path / method, method=method, settings=case.settings, seeds=1, curve=False)
        assert report["compact_difference"] > 1e-3
        assert report["verified"] is False


def test_differences_are_relative_to_the_logits() -> None:
    """float32 has 24 bits: at logits of 50, 2e-5 is rounding, at logits below 1 it is none."""

    def verdict(*found: tuple[float | None, float]) -> Any:
        return selecting._verdict([{"difference": d, "largest_logit": size} for d, size in found])

    assert verdict((2e-5, 50.0), (9e-7, 0.1)) == {
        "verified": True,
        "compact_difference": 2e-5,
        "compact_relative": pytest.approx(9e-7),
    }
    assert verdict((2e-5, 50.0), (2e-5, 0.1))["verified"] is False
    assert verdict((None, 50.0))["verified"] is False  # a file calls NaN null
    assert selecting._verdict([{"difference": 2e-7}])["verified"] is True  # written before the size was
    without = selecting._verdict([{"difference": 0.0, "largest_logit": 1.0}, {"difference": None, "reason": "it reads x"}])
    assert (without["verified"], without["not_compared"]) == (None, "it reads x")


def test_optfs_starts_from_its_rewound_weights(plain: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: dict[str, Any] = {}

    def seen(store: Store, run: RunConfig, out: Path, **named: Any) -> dict[str, Any]:
        starts[out.parent.name] = named["start"]
        return train(store, run, out, **named)

    monkeypatch.setattr(selecting, "train", seen)
    case = CASES["optfs"]
    select(plain, case.run, tmp_path / "out", method="optfs", settings=case.settings, seeds=1, curve=False)
    wanted = Selection.load(tmp_path / "out" / "selection" / "seed-0").start(plain.encoder)
    assert starts["before"] is None
    assert starts["after"].keys() == wanted.keys()
    assert all(torch.equal(starts["after"][name], wanted[name]) for name in wanted)


def test_crosses_of_some_pairs(tmp_path: Path) -> None:
    store = click_store(tmp_path, ("train", "valid", "test"), SCHEMA.with_crosses([("user", "city")], min_count=3))
    case = CASES["optinter"]
    report = select(store, case.run, tmp_path / "out", method="optinter", settings=case.settings, seeds=1, curve=False)
    assert read(tmp_path / "out" / "before" / "seed-0" / "config.json")["model"]["choices"] == {
        "user*city": "memorize",
        "user*age": "factorize",
        "city*age": "factorize",
    }
    assert report["compact_difference"] <= 1e-6


@pytest.mark.parametrize("crosses", [("user*city", "user*age", "city*age"), ("user*city",)], ids=["all", "one"])
def test_optinter_whose_fields_are_listed(
    crosses: tuple[str, ...], crossed: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some crosses are lost, which the mixture read, whatever the search chooses."""
    listed = {"model.embedding.fields": json.dumps(["user", "city", "age", "price", *crosses])}
    run = configure("optinter", options=SIZES["optinter"] | RUN | listed)

    def search(model: Any, store: Store, options: Any, run: RunConfig, seed: int) -> Selection:
        pairs: dict[str, Choice] = {"user*city": "memorize", "user*age": "naive", "city*age": "factorize"}
        if seed:
            pairs["user*city"] = "naive"
        fields = tuple(name for name in run.model.embedding.fields or () if pairs.get(name, "memorize") == "memorize")
        chosen = replace(model, embedding=replace(model.embedding, fields=fields), choices=pairs)
        return Selection(method="optinter", encoder_hash=store.encoder.hash, pairs=pairs, model=chosen, report={"seconds": 1.0})

    monkeypatch.setattr(selecting, "METHODS", {**METHODS, "optinter": replace(METHODS["optinter"], search=search)})
    report = select(crossed, run, tmp_path / "out", method="optinter", seeds=2, curve=False)
    assert report["verified"] is True
    loaded = [artifact.load(tmp_path / "out" / "after" / f"seed-{seed}") for seed in (0, 1)]
    assert [[c.name for c in each.encoder.layout.sparse if c.parts] for each in loaded] == [["user*city"], []]


@pytest.mark.parametrize("method", ["permutation", "outrank"])
def test_fields_for_optinter_leave_the_same_kind_of_model(method: str, crossed: Store, tmp_path: Path) -> None:
    """Memorised crosses before and after: all fields kept, both have as many parameters, and as good as nothing was changed."""
    out = tmp_path / "out"
    case = replace(CASES[method], model="optinter")
    report = select(crossed, case.run, out, method=method, top=1.0, settings=case.settings, seeds=1, curve=False)
    assert report["before"]["parameters"] == report["after"]["parameters"]
    assert report["gain"]["auc"]["mean"] == 0
    pairs = {"user*city": "memorize", "user*age": "memorize", "city*age": "memorize"}
    for when in ("before", "after"):
        assert read(out / when / "seed-0" / "config.json")["model"]["choices"] == pairs
    fewer = select(crossed, case.run, tmp_path / "fewer", method="outrank", top=4, seeds=1, curve=False)
    assert fewer["after"]["parameters"]["mean"] < fewer["before"]["parameters"]["mean"]
    left = artifact.load(tmp_path / "fewer" / "after" / "seed-0")
    crosses = [c.name for c in left.encoder.layout.sparse if c.parts]
    assert isinstance(left.config, OptInter.Config)
    assert isinstance(left.config.choices, dict)
    assert [name for name, choice in left.config.choices.items() if choice == "memorize"] == crosses


def test_the_search_on_optinter_has_the_model_before(crossed: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[Any] = []

    def search(model: Any, store: Store, options: Any, run: RunConfig, seed: int) -> Selection:
        searched.append(model)
        return METHODS["outrank"].search(model, store, method_options("outrank", 3), run, seed)

    monkeypatch.setattr(selecting, "METHODS", {**METHODS, "permutation": replace(METHODS["permutation"], search=search)})
    select(crossed, config("optinter"), tmp_path / "out", method="permutation", top=3, seeds=1, curve=False)
    assert searched == [artifact.load(tmp_path / "out" / "before" / "seed-0").config]


def test_the_curve_names_what_it_needs(plain: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'ctrlib\[search\]', or leave the curve out"):
        select(plain, config(), tmp_path / "out", method="outrank", top=3)
    assert not (tmp_path / "out").exists()


def test_what_was_kept_in_one_line() -> None:
    values = {"kept": 1500, "total": 2000, "vocabularies": {"a": {"kept": 1499, "total": 1500}, "b": {"kept": 1, "total": 500}}}
    assert kept_line({"values": values}) == "1,500 of 2,000 values, 75.0% (a 1,499 of 1,500, b 1 of 500)"
    assert kept_line({"fields": {"kept": 2, "total": 5, "names": ("a", "b")}}) == "2 of 5 fields (a, b)"
    names: dict[str, list[str]] = {"memorize": ["a*b"], "factorize": [f"a*{i}" for i in range(14)], "naive": ["c*d", "e*f"]}
    pairs = {choice: len(found) for choice, found in names.items()} | {"total": 17, "names": names}
    listed = ", ".join(names["factorize"][:12])
    assert kept_line({"pairs": pairs}) == f"17 pairs: 1 memorize (a*b), 14 factorize ({listed}, and 2 more), 2 naive"


def chosen(*kept: str, method: str = "outrank") -> dict[str, Any]:
    """For ``monkeypatch``: a search that takes no time, and keeps these fields."""

    def search(_: Any, store: Store, options: Any, run: RunConfig, seed: int) -> Selection:
        return Selection(method=method, encoder_hash=store.encoder.hash, fields=kept, report={"seconds": 1.0})

    return {**METHODS, method: replace(METHODS[method], search=search)}


def failing(error: BaseException) -> dict[str, Any]:
    def search(*_: Any) -> Selection:
        raise error

    return {**METHODS, "outrank": replace(METHODS["outrank"], search=search)}


ONCE: dict[str, Any] = {"method": "outrank", "top": 3, "seeds": 1, "curve": False}


def test_a_ranking_of_fields_and_crosses_can_be_applied(crossed: Store) -> None:
    """Whatever the scores and however many are kept."""
    schema, rng = crossed.encoder.schema, torch.Generator().manual_seed(0)
    names = [f.name for f in schema.fields]
    for _ in range(20):
        scores = dict(zip(names, torch.rand(len(names), generator=rng).tolist(), strict=True))
        for top in range(1, len(names) + 1):
            kept = best_fields(schema, scores, top)
            selection = Selection(method="gbdt", encoder_hash=crossed.encoder.hash, fields=kept)
            assert tuple(f.name for f in selection.apply(crossed.encoder).schema.fields) == kept


def test_data_with_crosses_and_its_best_fields(crossed: Store, tmp_path: Path) -> None:
    report = select(crossed, config(), tmp_path / "out", **ONCE | {"top": 4})
    assert len(report["kept"][0]["fields"]["names"]) == 4
    assert report["compact_difference"] <= 1e-6


def test_what_the_config_says_of_dropped_fields_is_left_out(
    plain: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selecting, "METHODS", chosen("city", "price"))
    said = {"model.embedding.dims": '{"user": 3, "city": 2}', "model.embedding.fields": '["city", "user", "price"]'}
    run = configure("dnn", options=SIZES["dnn"] | RUN | said)
    select(plain, run, tmp_path / "out", **ONCE)
    after = artifact.load(tmp_path / "out" / "after" / "seed-0").config.embedding
    assert (after.dims, after.fields) == ({"city": 2}, ("city", "price"))


def test_widths_and_vectors_of_a_vocabulary_that_gets_another_owner() -> None:
    schema = Schema(
        fields=(SparseField(name="item"), SequenceField(name="seen", shares="item"), SparseField(name="b")), labels=("y",)
    )
    rows = [{"item": f"i{n % 5}", "seen": [f"i{n % 3}"], "b": n % 2, "y": n % 2} for n in range(20)]
    encoder = Encoder.fit(schema, open_source(rows))
    selection = Selection(method="gbdt", encoder_hash=encoder.hash, fields=("seen", "b"))
    said = {"model.embedding.dims": '{"item": 3}', "model.embedding.frozen": '["item"]', "pretrained.item": "vectors.parquet"}
    left = selecting._of_what_is_left(configure("dnn", options=said), selection, derive(selection, encoder))
    assert (left.model.embedding.dims, left.model.embedding.frozen) == ({"seen": 3}, ("seen",))
    assert left.pretrained == {"seen": "vectors.parquet"}


def test_searches_have_no_pretrained_vectors(plain: Store, tmp_path: Path) -> None:
    for said in ({"pretrained.city": "vectors.parquet"}, {"model.embedding.frozen": '["city"]'}):
        run = configure("dnn", options=SIZES["dnn"] | RUN | said)
        with pytest.raises(ConfigError, match=r"autofield trains a model to search with, .* pretrained vectors of city; leave"):
            select(plain, run, tmp_path / "out", method="autofield", top=3, curve=False)
        assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_built_is_refused_before_any_search(
    plain: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selecting, "METHODS", failing(AssertionError("searched")))
    run = configure("dnn", options=SIZES["dnn"] | RUN | {"model.embedding.fields": '["usr"]'})
    with pytest.raises(ConfigError, match="the embedding reads field 'usr', which the data lacks; did you mean 'user'"):
        select(plain, run, tmp_path / "out", **ONCE)
    with pytest.raises(ConfigError, match="single row"):
        select(plain, replace(config(), batch_size=1), tmp_path / "out", **ONCE)
    # the small model, after the search and before any training
    monkeypatch.setattr(selecting, "METHODS", chosen("city"))
    monkeypatch.setattr(selecting, "train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(ConfigError, match="has the single field 'city'"):
        select(plain, configure("fwfm", options=RUN), tmp_path / "out", **ONCE)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", PRESETS)
def test_every_model_can_be_looked_at_without_memory(name: str, plain: Store, crossed: Store) -> None:
    encoder = (crossed if name.startswith("optinter") else plain).encoder
    if PRESETS[name].needs_history:
        encoder = Encoder.fit(history_runs.SCHEMA, history_runs.raw(50, 0))
    state = torch.random.get_rng_state()
    selecting._check_model(RunConfig(model=preset(name)), encoder)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("error", [TrainingDivergedError("diverged"), OSError("disk full"), KeyboardInterrupt()])
def test_after_an_error_of_the_first_search_nothing_is_left(
    error: BaseException, plain: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selecting, "METHODS", failing(error))
    with pytest.raises(type(error)):
        select(plain, config(), tmp_path / "out", **ONCE)
    assert names(tmp_path) == []


def test_raw_rows_encoded_before_ctrl_c_are_not_encoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, rows = tmp_path / "out", clicks(600, 0)
    options = DataOptions(schema=SCHEMA, valid=clicks(300, 1), test=clicks(300, 2))
    monkeypatch.setattr(selecting, "METHODS", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        select(rows, config(), out, options, **ONCE)
    assert names(out) == ["data.json", "select.json", "store"]
    monkeypatch.setattr(selecting, "open_store", lambda *_: pytest.fail("encoded again"))
    monkeypatch.setattr(selecting, "METHODS", failing(ConfigError("nothing is kept")))
    with pytest.raises(ConfigError, match="nothing is kept"):
        select(rows, config(), out, options, **ONCE)
    assert names(out) == ["data.json", "select.json", "store"]
    monkeypatch.setattr(selecting, "METHODS", chosen("city", "price"))
    assert select(rows, config(), out, options, **ONCE)["kept"][0]["fields"]["kept"] == 2


def test_other_raw_rows_are_not_taken_for_these(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selecting, "METHODS", failing(KeyboardInterrupt()))
    data, out = write(tmp_path / "data"), tmp_path / "out"
    options = DataOptions(schema=data / "schema.json", valid=str(data / "valid.parquet"), test=str(data / "test.parquet"))
    with pytest.raises(KeyboardInterrupt):
        select(str(data / "train.parquet"), config(), out, options, **ONCE)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    store = Store.open(out / "store")
    for rows, other in (
        (data / "valid.parquet", options),
        (clicks(2000, 0), options),
        (store, DataOptions()),
        (data / "train.parquet", replace(options, test=str(data / "valid.parquet"))),
        (data / "train.parquet", replace(options, cross_min_count=3)),
        (data / "train.parquet", replace(options, label="buy")),
    ):
        with pytest.raises(ConfigError, match="holds a selection with other settings, or of other data"):
            select(rows, config(), out, other, **ONCE)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):  # these are the same rows
        select(Path("data/train.parquet"), config(), out, replace(options, schema=SCHEMA), **ONCE)


def test_runs_of_a_call_that_was_killed_are_trained_again(
    plain: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selecting, "METHODS", chosen("city", "price"))
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    for writer, when in ((process.pid, "before"), (os.getpid(), "after")):
        part = tmp_path / "out" / when / "seed-0.part"
        part.mkdir(parents=True)
        (part / "writer.pid").write_text(str(writer))
        (part / "best.safetensors").write_bytes(b"weights")
    (tmp_path / "out" / "select.json").write_text("{}")
    monkeypatch.setattr(selecting, "_same", lambda *_: None)
    select(plain, config(), tmp_path / "out", **ONCE)
    assert not list((tmp_path / "out").rglob("*.part"))


def test_what_another_process_is_writing_stays(tmp_path: Path) -> None:
    part = tmp_path / "run.part"
    part.mkdir()
    (part / "writer.pid").write_text(str(os.getppid()))
    discard_unfinished(tmp_path / "run")
    assert part.is_dir()


@pytest.mark.usefixtures("undrawn")
def test_the_curve_of_pairs(crossed: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["optinter"]
    tested: dict[str, bool] = {}

    def noted(store: Store, run: RunConfig, out: Path, **named: Any) -> dict[str, Any]:
        report = train(store, run, out, **named)
        tested["/".join(out.parts[-3:-1])] = "test" in report
        return report

    monkeypatch.setattr(selecting, "train", noted)
    select(crossed, case.run, tmp_path / "out", method="optinter", settings=case.settings, seeds=1)
    assert tested == {
        "out/before": True,
        "out/after": True,
        "seed-0/all-factorize": False,  # only validation rows say what the curve shows
        "seed-0/all-naive": False,
    }
    points = {point["label"]: point["parameters"] for point in read(tmp_path / "out" / "curve.json")}
    assert list(points) == ["all factorize", "all naive", "before", "after"]
    assert points["all naive"] < points["all factorize"] < points["before"]


@pytest.mark.usefixtures("undrawn")
def test_a_curve_goes_on_after_ctrl_c_and_leaves_out_what_diverges(
    plain: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[float] = []
    trained: list[str] = []

    def search(_: Any, store: Store, options: Any, run: RunConfig, seed: int) -> Selection:
        searched.append(options.penalty)
        return Selection(method="optfs", encoder_hash=store.encoder.hash, fields=("city",), report={"seconds": 1.0})

    def interrupted(store: Store, run: RunConfig, out: Path, **named: Any) -> dict[str, Any]:
        trained.append(out.parent.name)
        if trained.count("penalty-x-0.1") == 1 and out.parent.name == "penalty-x-0.1":
            raise KeyboardInterrupt
        if out.parent.name == "penalty-x-3":
            raise TrainingDivergedError("the loss is nan")
        return train(store, run, out, **named)

    monkeypatch.setattr(selecting, "METHODS", {**METHODS, "optfs": replace(METHODS["optfs"], search=search)})
    monkeypatch.setattr(selecting, "train", interrupted)
    once: dict[str, Any] = {"method": "optfs", "settings": {"penalty": "1.0"}, "seeds": 1}
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        select(plain, config(), out, **once)
    assert names(out / "curve" / "seed-0" / "penalty-x-0.1") == ["selection", "store"]
    select(plain, config(), out, **once)
    assert searched == pytest.approx([1, 0.1, 0.3, 3])  # each once
    assert [p["label"] for p in read(out / "curve.json")] == ["penalty × 0.1", "penalty × 0.3", "before", "after"]
    assert names(out / "curve" / "seed-0") == ["penalty-x-0.1", "penalty-x-0.3"]


def test_the_curve_of_a_3mr_order_is_of_that_order(plain: Store) -> None:
    scores = dict(zip(FIELDS, (5.0, 4.0, 3.0, 2.0, 1.0), strict=True))
    ranked = Selection(method="outrank", encoder_hash="", scores=scores)
    ordered = replace(ranked, report={"order": ["genres", "user", "age", "price", "city"]})
    assert selecting._best(ranked, plain, 0.4).fields == ("user", "city")
    assert selecting._best(ordered, plain, 0.4).fields == ("user", "genres")


def test_agreement_by_hand() -> None:
    def of(fields: str, mask: list[bool], pairs: str) -> Selection:
        made: dict[str, Choice] = {"a*b": "naive", "c*d": "memorize" if pairs == "m" else "factorize"}
        return Selection(method="x", encoder_hash="", fields=tuple(fields), values={"v": np.array(mask)}, pairs=made)

    three = [of("ab", [False, True, True], "m"), of("bc", [False, True, False], "f"), of("ab", [False, True, True], "m")]
    assert selecting._agreement(three) == pytest.approx(
        {"fields (Jaccard)": (1 / 3 + 1 + 1 / 3) / 3, "values (Jaccard)": (1 / 2 + 1 + 1 / 2) / 3, "pairs (share alike)": 2 / 3}
    )
    assert selecting._agreement(three[:1]) == {}


def test_metrics_that_are_undefined_are_so_after_an_interruption_too() -> None:
    """A file calls them null."""
    runs = [{"test": {"auc": auc, "log_loss": 0.5}, "parameters": 3} for auc in (None, float("nan"))]
    assert np.isnan(selecting._summary(runs)["test"]["auc"]["mean"])
    assert np.isnan(selecting._paired(runs, runs)["auc"]["mean"])
    assert selecting._paired(runs, runs)["log_loss"]["mean"] == 0


def test_the_table_says_what_the_search_cost_and_what_is_wrong() -> None:
    metrics = {"auc": {"mean": 0.7, "std": 0.1}, "log_loss": {"mean": 0.5, "std": 0.1}}
    sizes = ({"parameters": {"mean": 200.0}, "test": metrics}, {"parameters": {"mean": 50.0}, "test": metrics})
    report: dict[str, Any] = {"method": "m", "model": "n", "seeds": [0], "kept": [{}], "agreement": {}, "gain": metrics}
    report |= {
        "before": sizes[0],
        "after": sizes[1],
        "search_seconds": [3.0],
        "train_seconds": [2.0],
        "compact_difference": 2e-7,
        "compact_relative": 1e-7,
        "verified": True,
    }
    text = table(report)
    assert "| after | 50 (25.0%) | 0.70000 ± 0.10000 |" in text
    assert "* the search took 3.0 s, 1.50 times as long as training the model before (2.0 s)\n" in text
    assert text.endswith("by at most 2.0e-07\n")
    wrong = table(report | {"compact_difference": 0.01, "compact_relative": 0.002, "verified": False})
    assert "by at most 1.0e-02, 2.0e-03 of the largest: **not verified equal** (rounding changes 1e-05)" in wrong
    assert "by at most 2.0e-07 (both with weights drawn at random)" in table(report | {"method": "optinter"})
    assert "is not compared with the gated one: it reads x" in table(report | {"verified": None, "not_compared": "it reads x"})
