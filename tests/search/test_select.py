from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ctrlib.config import ConfigError
from ctrlib.data.encoder import Encoder
from ctrlib.data.source import open_source
from ctrlib.data.store import Store
from ctrlib.embedding import FeatureEmbedding
from ctrlib.experiment import DataOptions, RunConfig, configure, train
from ctrlib.files import json_text
from ctrlib.schema import DataError
from ctrlib.search import select as selecting
from ctrlib.search.ranking import Top
from ctrlib.search.select import METHODS, kept_line, method_options, select, table
from ctrlib.search.selection import Selection, apply_to_store, compact
from tests.clicks import FIELDS, SCHEMA, clicks
from tests.search.stores import Guarded, click_store

SIZES = {
    "dnn": {"model.embedding.dim": "4", "model.interaction.hidden_units": "8"},
    "auto_fm": {"model.embedding.dim": "4"},
    "optinter": {"model.embedding.dim": "4", "model.pair_dim": "3", "model.mlp.hidden_units": "8"},
}
RUN = {"fit.optimizer.learning_rate": "0.01", "fit.epochs": "1", "batch_size": "256"}


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
    assert report["compact_difference"] is not None
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


def test_a_curve_of_penalties_goes_on_without_what_nothing_is_left_of(
    plain: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[float] = []

    def search(model: Any, store: Store, options: Any, run: RunConfig, seed: int) -> Selection:
        searched.append(options.penalty)
        if options.penalty > 3e-4:
            raise ConfigError("everything is gone")
        return METHODS["outrank"].search(model, store, method_options("outrank", 3), run, seed)

    monkeypatch.setattr(selecting, "METHODS", {**METHODS, "optfs": replace(METHODS["optfs"], search=search)})
    once = {"method": "optfs", "settings": {"penalty": "3e-4"}, "seeds": 1}
    select(plain, config(), tmp_path / "out", **once)  # type: ignore[arg-type]
    assert searched == pytest.approx([3e-4, 3e-5, 9e-5, 9e-4])
    assert [p["label"] for p in read(tmp_path / "out" / "curve.json")] == ["penalty × 0.1", "penalty × 0.3", "before", "after"]
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
def test_a_wrong_small_model_is_seen(method: str, plain: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[method]

    def wrong(model: Any, selection: Selection, encoder: Encoder) -> Any:
        small, derived = compact(model, selection, encoder)
        embedding = next(part for part in small.modules() if isinstance(part, FeatureEmbedding))
        with torch.no_grad():
            next(embedding.parameters()).add_(1.0)
        return small, derived

    monkeypatch.setattr(selecting, "compact", wrong)
    out = tmp_path / "out"
    report = select(plain, case.run, out, method=method, top=case.top, settings=case.settings, name="m", seeds=1, curve=False)
    assert report["compact_difference"] > 1e-3


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


def test_the_curve_names_what_it_needs(plain: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'ctrlib\[search\]', or leave the curve out"):
        select(plain, config(), tmp_path / "out", method="outrank", top=3)
    assert not (tmp_path / "out").exists()


def test_what_was_kept_in_one_line() -> None:
    assert kept_line({"values": {"kept": 1500, "total": 2000}}) == "1,500 of 2,000 values (75.0%)"
    assert kept_line({"fields": {"kept": 2, "total": 5, "names": ("a", "b")}}) == "2 of 5 fields (a, b)"
    pairs = {"memorize": 1, "factorize": 2, "naive": 3, "total": 6}
    assert kept_line({"pairs": pairs}) == "6 pairs: 1 memorize, 2 factorize, 3 naive"
