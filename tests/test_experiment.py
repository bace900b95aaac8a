from __future__ import annotations

import json
import os
import socket
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from ctrlib import artifact, experiment
from ctrlib.config import ConfigError
from ctrlib.data.encoder import Encoder
from ctrlib.data.store import Store
from ctrlib.experiment import DataOptions, RunConfig, configure, evaluate_run, prepare, run_experiment, train
from ctrlib.files import check_new_folder, finite, new_folder, process_began
from ctrlib.ranking_metrics import by_history_length, history_segments
from ctrlib.schema import DataError, Schema, SparseField
from ctrlib.training import FitResult, TrainingDivergedError, predict
from tests.clicks import SCHEMA, clicks, tiny, write


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same_but_time(report: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in report.items() if k not in ("seconds", "rows_per_second", "peak_rss_mb")}


def weights(run: Path) -> bytes:
    return (run / "artifact" / "weights.safetensors").read_bytes()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def given(data: Path) -> DataOptions:
    """Files of all three splits; grouped and weighted."""
    return DataOptions(
        schema=data / "schema.json",
        valid=str(data / "valid.parquet"),
        test=str(data / "test.parquet"),
        group="user",
        weight="w",
    )


@pytest.fixture(scope="module")
def store(data: Path, given: DataOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stores") / "store"
    prepare(data / "train.parquet", out, given)
    return out


@pytest.fixture(scope="module")
def run(data: Path, given: DataOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that overfits: its best weights are not its last."""
    out = tmp_path_factory.mktemp("runs") / "nested" / "run"
    config = tiny(fit__epochs="6", fit__patience="None", fit__optimizer__learning_rate="0.1")
    report = train(data / "train.parquet", config, out, given, name="mine", seed=7)
    assert finite(report) == strict((out / "metrics.json").read_text())
    return out


def test_a_run_holds_what_is_promised_and_nothing_else(run: Path) -> None:
    assert entries(run) == ["artifact", "config.json", "history.jsonl", "metrics.json"]
    assert entries(run.parent) == ["run"]
    assert entries(run / "artifact") == [
        "artifact.json",
        "encoder.json",
        "model.json",
        "schema.json",
        "vocabularies",
        "weights.safetensors",
    ]
    report = strict((run / "metrics.json").read_text())
    promised = {"model", "seed", "rows", "epochs", "parameters", "seconds", "rows_per_second", "peak_rss_mb", "valid", "test"}
    assert promised <= report.keys()
    assert {"auc", "log_loss", "ece", "normalized_entropy", "gauc"} <= report["valid"].keys() & report["test"].keys()
    assert (report["model"], report["seed"], report["interrupted"]) == ("mine", 7, False)
    assert report["rows"] == {"train": 2000, "valid": 400, "test": 401}
    assert report["epochs"] == 6
    assert report["seconds"] > 0
    assert 20 < report["peak_rss_mb"] < 100_000
    loaded = artifact.load(run)
    assert report["parameters"] == sum(np.prod(p.shape, dtype=int) for p in loaded.model.parameters())
    config = strict((run / "config.json").read_text())
    assert (config["name"], config["seed"]) == ("mine", 7)
    assert config["model"]["interaction"]["hidden_units"] == [16]
    assert config["fit"]["patience"] is None


def test_the_best_weights_are_saved(run: Path) -> None:
    history = [strict(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in history] == [1, 2, 3, 4, 5, 6]
    aucs = [line["valid"]["auc"] for line in history]
    report = strict((run / "metrics.json").read_text())
    assert max(aucs) > aucs[-1]  # else the test shows nothing
    assert report["best_epoch"] == 1 + int(np.argmax(aucs))
    assert report["valid"]["auc"] == max(aucs)
    best = history[int(np.argmax(aucs))]["valid"]
    assert {name: report["valid"][name] for name in best} == best
    ranking = {"groups", "ndcg@10", "mrr", "hr@10", "recall@10", "auc@10"}
    assert report["valid"].keys() - best.keys() == ranking  # one evaluation at the end, not one an epoch


def test_metrics_are_those_of_scikit_learn_on_the_saved_models_scores(run: Path, data: Path) -> None:
    loaded = artifact.load(run)
    for split in ("valid", "test"):
        table = pq.read_table(data / f"{split}.parquet")
        scores, y, w = loaded.predict(table), table["label"].to_numpy(), table["w"].to_numpy()
        reported = strict((run / "metrics.json").read_text())[split]
        assert reported["auc"] == pytest.approx(roc_auc_score(y, scores, sample_weight=w), abs=1e-9)
        assert reported["log_loss"] == pytest.approx(log_loss(y, scores, sample_weight=w), abs=1e-9)
        assert reported["auc"] != pytest.approx(roc_auc_score(y, scores), abs=1e-6)  # the weights do matter
        rate = (w * y).sum() / w.sum()
        entropy = -rate * np.log(rate) - (1 - rate) * np.log(1 - rate)
        assert reported["normalized_entropy"] == pytest.approx(reported["log_loss"] / entropy, abs=1e-9)
        assert reported["gauc"] == pytest.approx(group_auc(table["user"].to_pylist(), y, scores, w), abs=1e-9)


def group_auc(groups: list[Any], y: Any, scores: Any, w: Any) -> float:
    """Rows without a user are one group. Pair by pair."""
    rows = defaultdict(list)
    for i, group in enumerate(groups):
        rows[group].append(i)
    assert None in rows
    total = weight = 0.0
    for members in rows.values():
        pairs = [(i, j) for i in members for j in members if y[i] == 1 and y[j] == 0]
        mass = sum(w[i] * w[j] for i, j in pairs)
        if mass > 0:
            won = sum(w[i] * w[j] * ((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j])) for i, j in pairs)
            share = sum(w[i] for i in members)
            total, weight = total + share * won / mass, weight + share
    return total / weight


def test_the_same_seed_gives_the_same_run_whatever_the_workers_and_wherever_the_rows_come_from(
    data: Path, given: DataOptions, store: Path, tmp_path: Path
) -> None:
    raw = data / "train.parquet"
    first = train(raw, tiny(), tmp_path / "first", given, seed=3)
    for name, config, source, options in (
        ("again", tiny(), raw, given),
        ("no-workers", tiny(workers="0"), raw, given),
        ("three-workers", tiny(workers="3"), raw, given),
        ("from-store", tiny(), store, None),
        ("from-open-store", tiny(), Store.open(store), None),
    ):
        report = train(source, config, tmp_path / name, options, seed=3)
        assert same_but_time(report) == same_but_time(first), name
        assert weights(tmp_path / name) == weights(tmp_path / "first"), name
    other = train(store, tiny(), tmp_path / "other", seed=4)
    assert other["valid"] != first["valid"]
    assert (store / "manifest.json").is_file()  # a store that was given stays


def test_the_order_of_rows_on_disk_changes_only_the_batches(data: Path, given: DataOptions, tmp_path: Path) -> None:
    table = pq.read_table(data / "train.parquet")
    by_label = table.sort_by([("label", "descending"), ("price", "ascending")])
    pq.write_table(by_label, tmp_path / "sorted.parquet")
    reports = {}
    for name, path in (("file", data / "train.parquet"), ("sorted", tmp_path / "sorted.parquet")):
        reports[name] = train(path, tiny(), tmp_path / name, given)
    hashes = {json.loads((tmp_path / n / "artifact" / "artifact.json").read_text())["encoder_hash"] for n in reports}
    assert len(hashes) == 1
    assert reports["file"]["rows"] == reports["sorted"]["rows"]
    assert reports["file"]["valid"]["auc"] == pytest.approx(reports["sorted"]["valid"]["auc"], abs=0.03)
    assert reports["file"]["valid"]["auc"] > 0.6


def test_nothing_stays_open_after_training(data: Path, given: DataOptions, tmp_path: Path) -> None:
    train(data / "train.parquet", tiny(fit__epochs="1"), tmp_path / "run", given)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert not [link for link in Path("/proc/self/fd").iterdir() if str(tmp_path) in str(link.resolve())]


@pytest.mark.parametrize(
    ("valid", "test", "rows"),
    [
        (False, False, {"train": 1600, "valid": 200, "test": 200}),
        (True, False, {"train": 2000, "valid": 400}),
        (False, True, {"train": 1778, "valid": 222, "test": 401}),
        (True, True, {"train": 2000, "valid": 400, "test": 401}),
    ],
)
def test_what_is_not_given_is_cut_from_the_data(
    data: Path, tmp_path: Path, valid: bool, test: bool, rows: dict[str, int]
) -> None:
    options = DataOptions(
        schema=SCHEMA,
        valid=data / "valid.parquet" if valid else None,
        test=pq.read_table(data / "test.parquet").to_pandas() if test else None,
    )
    report = train(data / "train.parquet", tiny(fit__epochs="1"), tmp_path / "run", options)
    assert report["rows"] == rows
    assert ("test" in report) == ("test" in rows)
    assert report["valid"]["rows"] == rows["valid"]


def test_a_split_by_time_trains_on_the_past(data: Path, tmp_path: Path) -> None:
    # the time rides along as the weight, so that the store shows it
    options = DataOptions(schema=SCHEMA, time="id", weight="id", shares={"train": 0.6, "valid": 0.3, "test": 0.1})
    shuffled = clicks(1000, 5).take(pa.array(np.random.default_rng(1).permutation(1000)))
    store = prepare(shuffled, tmp_path / "store", options)
    times = {name: store.split(name).weight for name in store.rows}
    assert {name: (int(t.min()), int(t.max())) for name, t in times.items() if t is not None} == {
        "train": (0, 599),
        "valid": (600, 899),
        "test": (900, 999),
    }


def test_the_split_follows_its_seed(tmp_path: Path) -> None:
    ids = []
    for i, seed in enumerate((0, 0, 1)):
        options = DataOptions(schema=SCHEMA, weight="id", split="random", seed=seed)
        weight = prepare(clicks(300, 5), tmp_path / str(i), options).split("valid").weight
        assert weight is not None
        ids.append(weight.tolist())
    assert ids[0] == ids[1] != ids[2]


def test_only_training_rows_are_learned_from(tmp_path: Path) -> None:
    table = clicks(1000, 5)
    city = pa.array(["early"] * 799 + ["last"] + ["late"] * 200)
    price = pa.array([1.0, 3.0] * 400 + [1000.0] * 200)
    for name, values in (("city", city), ("price", price)):
        table = table.set_column(table.column_names.index(name), name, values)
    encoder = prepare(table, tmp_path / "store", DataOptions(schema=SCHEMA, split="order")).encoder
    assert encoder.ids("city", ["early", "last", "late"]).tolist() == [2, 3, 1]
    assert (encoder.numeric["price"].offset, encoder.numeric["price"].scale) == (2.0, 1.0)


def test_rows_of_weight_zero_teach_nothing(data: Path, tmp_path: Path) -> None:
    table = pq.read_table(data / "train.parquet")
    flipped = pc.if_else(pc.equal(table["w"], 0.0), pc.subtract(1, table["label"]), table["label"])
    lying = table.set_column(table.column_names.index("label"), "label", flipped)
    assert flipped.to_pylist() != table["label"].to_pylist()
    options = DataOptions(schema=SCHEMA, weight="w", valid=data / "valid.parquet", test=data / "test.parquet")
    for name, rows in (("honest", table), ("lying", lying)):
        train(rows, tiny(), tmp_path / name, options)
    assert weights(tmp_path / "honest") == weights(tmp_path / "lying")


def test_several_labels(data: Path, tmp_path: Path) -> None:
    options = DataOptions(schema=SCHEMA, label=("label", "buy"), valid=data / "valid.parquet", test=data / "test.parquet")
    config = configure("dcn", options={"model.interaction.streams.1.hidden_units": "8", "fit.epochs": "1"})
    report = train(data / "train.parquet", config, tmp_path / "run", options)
    assert set(report["test"]["labels"]) == {"label", "buy"}
    table = pq.read_table(data / "test.parquet")
    scores = artifact.load(tmp_path / "run").predict(table)
    assert scores.shape == (401, 2)
    for t, name in enumerate(("label", "buy")):
        expected = roc_auc_score(table[name].to_numpy(), scores[:, t])
        assert report["test"]["labels"][name]["auc"] == pytest.approx(expected, abs=1e-9)
    with pytest.raises(ConfigError, match="label"):
        train(data / "train.parquet", configure("final_mlp"), tmp_path / "final", options)
    assert entries(tmp_path) == ["run"]
    with pytest.raises(DataError, match="segments need one label"):
        evaluate_run(tmp_path / "run", table, by="city")


def test_an_undefined_metric_is_null(data: Path, tmp_path: Path) -> None:
    table = pq.read_table(data / "test.parquet")
    ones = table.filter(pc.equal(table["label"], 1))
    options = DataOptions(schema=SCHEMA, valid=data / "valid.parquet", test=ones)
    report = train(data / "train.parquet", tiny(fit__epochs="1"), tmp_path / "run", options)
    assert np.isnan(report["test"]["auc"])
    assert strict((tmp_path / "run" / "metrics.json").read_text())["test"]["auc"] is None


def test_an_inferred_schema_trains(data: Path, tmp_path: Path) -> None:
    options = DataOptions(label="label", group="user", time="day", weight="w")
    report = train(data / "train.parquet", tiny(fit__epochs="1"), tmp_path / "run", options)
    schema = artifact.load(tmp_path / "run").schema
    assert {f.name for f in schema.fields} == {"user", "city", "price", "age", "genres", "buy"}
    assert "gauc" in report["test"]
    assert "id" in schema.ignored


class TestFailures:
    def test_a_bad_label_leaves_nothing(self, data: Path, tmp_path: Path) -> None:
        table = pq.read_table(data / "valid.parquet")
        bad = table.set_column(table.column_names.index("label"), "label", pa.array([0, 1, 2, *[0] * (len(table) - 3)]))
        with pytest.raises(DataError, match=r"column 'label', the table, row 3: the label is 2; expected 0 or 1"):
            train(data / "train.parquet", tiny(), tmp_path / "run", DataOptions(schema=SCHEMA, valid=bad))
        assert not entries(tmp_path)

    def test_divergence_leaves_nothing(self, store: Path, tmp_path: Path) -> None:
        config = tiny(fit__optimizer__learning_rate="1e38", fit__optimizer__max_grad_norm="None")
        with pytest.raises(TrainingDivergedError, match="diverged"):
            train(store, config, tmp_path / "run")
        assert not entries(tmp_path)

    @pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
    def test_any_other_error_leaves_nothing(
        self, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
    ) -> None:
        def fails(*_: object, **__: object) -> FitResult:
            raise error

        monkeypatch.setattr(experiment, "fit", fails)
        with pytest.raises(type(error)):
            train(store, tiny(), tmp_path / "run")
        assert not entries(tmp_path)

    def test_what_a_killed_run_left_is_no_obstacle(self, store: Path, tmp_path: Path) -> None:
        (tmp_path / "run.part" / "store").mkdir(parents=True)
        (tmp_path / "run.part" / "writer.pid").write_text("999999999")
        train(store, tiny(fit__epochs="1"), tmp_path / "run")
        assert entries(tmp_path) == ["run"]

    @pytest.mark.parametrize("out", ["file/run", "file/a/run", "taken", "."])
    def test_a_place_that_cannot_be_written_is_refused_before_the_data_is_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
    ) -> None:
        (tmp_path / "file").write_text("mine")
        (tmp_path / "taken").mkdir()

        def unexpected(*_: object, **__: object) -> None:
            raise AssertionError("the data was read")

        monkeypatch.setattr(experiment, "open_source", unexpected)
        options = DataOptions(schema=SCHEMA)
        with pytest.raises(DataError, match="choose another folder"):
            train("rows.parquet", tiny(), tmp_path / out, options)
        with pytest.raises(DataError, match="choose another folder"):
            prepare("rows.parquet", tmp_path / out, options)
        assert entries(tmp_path) == ["file", "taken"]
        assert (tmp_path / "file").read_text() == "mine"

    def test_the_data_is_never_replaced(self, data: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="exists already"):
            train(data / "train.parquet", tiny(), data / "train.parquet", DataOptions(schema=SCHEMA))
        with pytest.raises(DataError, match="exists already"):
            train(data, tiny(), data, DataOptions(schema=SCHEMA))
        assert len(pq.read_table(data / "train.parquet")) == 2000

    @pytest.mark.parametrize("role", ["label", "group", "weight"])
    def test_validation_rows_are_looked_at_before_anything_is_learned(
        self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str
    ) -> None:
        monkeypatch.setattr(Encoder, "fit", lambda *_: pytest.fail("the encoder was fitted"))
        column = {"label": "label", "group": "day", "weight": "w"}[role]
        lacking = pq.read_table(data / "valid.parquet").drop_columns([column])
        with pytest.raises(DataError, match=f"no column '{column}', named as"):
            prepare(
                data / "train.parquet",
                tmp_path / "store",
                DataOptions(schema=SCHEMA, valid=lacking, group="day", weight="w"),
            )
        assert not entries(tmp_path)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_missing_gpu_is_noticed_first(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no CUDA GPU; set device=cpu"):
            train(tmp_path / "no.parquet", tiny(device="cuda"), tmp_path / "run")

    @pytest.mark.parametrize("seed", [-1, 2**32])
    def test_seeds(self, store: Path, tmp_path: Path, seed: int) -> None:
        with pytest.raises(ConfigError, match=f"seed is {seed}"):
            train(store, tiny(), tmp_path / "run", seed=seed)
        with pytest.raises(ConfigError, match=f"seed is {seed}"):
            DataOptions(seed=seed)

    @pytest.mark.parametrize(
        "shares", [(0.8, 0.2, 0.0), (0.9, -0.1, 0.2), (float("nan"), 0.1, 0.1), (0.5, 0.1, 0.1), (0, 0, 1)]
    )
    def test_shares(self, tmp_path: Path, shares: tuple[float, float, float]) -> None:
        options = DataOptions(schema=SCHEMA, shares=dict(zip(("train", "valid", "test"), shares, strict=True)))
        with pytest.raises(DataError, match="share"):
            prepare(clicks(100, 0), tmp_path / "store", options)
        assert not entries(tmp_path)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"workers": -1}, "workers is -1"),
            ({"batch_size": 0}, "batch_size is 0"),
            ({"device": "gpu"}, "device is 'gpu'"),
            ({"ridge": -1.0}, "ridge is -1"),
        ],
    )
    def test_run_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            RunConfig(model=tiny().model, **options)

    def test_a_store_of_another_schema(self, store: Path, tmp_path: Path) -> None:
        other = Schema(fields=(SparseField(name="user"),), labels=("label",))
        with pytest.raises(DataError, match="was made with another schema"):
            train(store, tiny(), tmp_path / "run", DataOptions(schema=other))
        assert not entries(tmp_path)


class TestConfigure:
    def test_options_are_set_by_path(self) -> None:
        config: Any = tiny(
            model__interaction__hidden_units="64,32",
            model__interaction__dropout="0.25",
            fit__patience="None",
            fit__compile="true",
            fit__monitor="log_loss",
            fit__optimizer__max_grad_norm="null",
        )
        assert config.model.interaction.hidden_units == (64, 32)
        assert config.model.interaction.dropout == 0.25
        assert config.fit.patience is None
        assert config.fit.compile is True
        assert config.fit.monitor == "log_loss"
        assert config.fit.optimizer.max_grad_norm is None
        assert configure("dnn", epochs=3).fit.epochs == 3

    @pytest.mark.parametrize(("rows", "batch_size"), [(10, 256), (2000, 256), (256_000, 1024), (10**8, 4096)])
    def test_what_is_left_open_is_settled_by_the_number_of_rows(self, rows: int, batch_size: int) -> None:
        settled = configure("dnn", options={"ridge": "50", "fit.optimizer.net_l2": "1"}).for_rows(rows)
        assert settled.batch_size == batch_size
        assert settled.fit.optimizer.embedding_l2 == pytest.approx(50 / rows)
        assert settled.fit.optimizer.net_l2 == 1
        assert settled.for_rows(rows) == settled

    @pytest.mark.parametrize("epochs", [0, -1])
    def test_epochs(self, epochs: int) -> None:
        with pytest.raises(ConfigError, match=f"epochs is {epochs}"):
            configure("dnn", epochs=epochs)


class TestEvaluate:
    def test_new_rows_give_the_metrics_of_the_run(self, run: Path, data: Path, store: Path) -> None:
        expected = strict((run / "metrics.json").read_text())["test"]
        for rows in (data / "test.parquet", str(data / "test.parquet"), pq.read_table(data / "test.parquet"), store):
            assert evaluate_run(run, rows) == pytest.approx(expected, abs=1e-9)

    def test_segments_of_categories(self, run: Path, data: Path) -> None:
        table = pq.read_table(data / "test.parquet")
        report = evaluate_run(run, table, by="city")
        whole = evaluate_run(run, table)
        assert {k: v for k, v in report.items() if k != "segments"} == whole
        segments = {s["segment"]: s for s in report["segments"]}
        assert sum(s["rows"] for s in segments.values()) == 401
        assert {None, "Stadt 0", "Atlantis"} < segments.keys()
        mine = table.filter(pc.equal(table["city"], "Stadt 0"))
        scores = artifact.load(run).predict(mine)
        expected = roc_auc_score(mine["label"].to_numpy(), scores, sample_weight=mine["w"].to_numpy())
        assert segments["Stadt 0"]["rows"] == len(mine)
        assert segments["Stadt 0"]["auc"] == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize("by", ["price", "day"])
    def test_segments_of_numbers_are_deciles(self, run: Path, data: Path, by: str) -> None:
        table = pq.read_table(data / "test.parquet")
        if by == "day":  # times in seconds differ only in their last digits
            table = table.set_column(table.column_names.index("day"), "day", pa.array(range(1_700_000_000, 1_700_000_401)))
        segments = evaluate_run(run, table, by=by)["segments"]
        missing = table[by].null_count
        assert [s["rows"] for s in segments if s["segment"] is None] == ([missing] if missing else [])
        sizes = [s["rows"] for s in segments if s["segment"] is not None]
        assert len(sizes) == 10
        assert max(sizes) - min(sizes) <= 1
        assert sum(s["rows"] for s in segments) == 401
        for segment in segments:
            if segment["segment"] is not None:
                low, high = map(float, segment["segment"][1:-1].split(","))
                inside = [v for v in table[by].to_pylist() if v is not None and low * 0.99999 <= v <= high * 1.00001]
                assert low < high
                assert len(inside) >= segment["rows"]

    def test_segments_of_lists_are_their_lengths(self, run: Path, data: Path) -> None:
        table = pq.read_table(data / "test.parquet")
        segments = evaluate_run(run, table, by="genres")["segments"]
        lengths = np.array([len(v or []) for v in table["genres"].to_pylist()])
        loaded = artifact.load(run)
        seen = predict(loaded.model, loaded.batches(table, labels=True))
        assert seen.labels is not None
        assert seen.group is not None
        expected = by_history_length(lengths, seen.labels, seen.logits, seen.group)
        assert [s["segment"] for s in segments] == [s["segment"] for s in expected]
        assert segments[-1] == pytest.approx(expected[-1], nan_ok=True)
        assert (segments[-1]["segment"], segments[-1]["rows"]) == ("all", 401)

    def test_segments_of_lists_in_text_are_those_of_lists(self, data: Path, tmp_path: Path) -> None:
        """As in CSV files."""
        parts: dict[str, Any] = {}
        for name in ("train", "test"):
            table = pq.read_table(data / f"{name}.parquet")
            text = [None if v is None else "|".join(map(str, v)) for v in table["genres"].to_pylist()]
            parts[name] = table.set_column(table.schema.get_field_index("genres"), "genres", pa.array(text))
        train(parts["train"], tiny(fit__epochs="1"), tmp_path / "run", DataOptions(schema=SCHEMA, split="random"))
        segments = evaluate_run(tmp_path / "run", parts["test"], by="genres")["segments"]
        names = history_segments([0 if not v else v.count("|") + 1 for v in parts["test"]["genres"].to_pylist()])
        assert {s["segment"]: s["rows"] for s in segments} == {name: names.count(name) for name in names}

    def test_segments_of_lists_without_a_group(self, data: Path, tmp_path: Path) -> None:
        train(data / "train.parquet", tiny(fit__epochs="1"), tmp_path / "run", DataOptions(schema=SCHEMA, split="random"))
        table = pq.read_table(data / "test.parquet")
        segments = evaluate_run(tmp_path / "run", table, by="genres")["segments"]
        names = history_segments([len(v or []) for v in table["genres"].to_pylist()])
        assert {s["segment"]: s["rows"] for s in segments} == {name: names.count(name) for name in names}
        assert {"auc", "log_loss"} < segments[0].keys()
        assert not {"gauc", "ndcg@10"} & segments[0].keys()

    def test_segments_of_a_column_without_values(self, run: Path, data: Path) -> None:
        table = pq.read_table(data / "test.parquet").append_column("gone", pa.array([float("nan")] * 401))
        (segment,) = evaluate_run(run, table, by="gone")["segments"]
        assert (segment["segment"], segment["rows"]) == (None, 401)

    def test_what_cannot_be_evaluated_is_refused(self, run: Path, data: Path, store: Path, tmp_path: Path) -> None:
        table = pq.read_table(data / "test.parquet")
        pairs = pa.StructArray.from_arrays([pa.array(range(401))], ["x"])
        with pytest.raises(DataError, match=r"column .pairs. .*segments need one value a row"):
            evaluate_run(run, table.append_column("pairs", pairs), by="pairs")
        with pytest.raises(DataError, match="no column 'town', by which to segment"):
            evaluate_run(run, table, by="town")
        with pytest.raises(DataError, match="no column 'label'"):
            evaluate_run(run, table.drop_columns(["label"]))
        with pytest.raises(DataError, match="has no rows"):
            evaluate_run(run, table.slice(0, 0))
        with pytest.raises(DataError, match="a store holds ids, not raw values"):
            evaluate_run(run, store, by="city")
        prepare(clicks(300, 8), tmp_path / "other", DataOptions(schema=SCHEMA, group="user", weight="w"))
        with pytest.raises(DataError, match="made by another encoder"):
            evaluate_run(run, tmp_path / "other")


EXPERIMENT = """
from pathlib import Path

from ctrlib.experiment import Experiment, configure


def experiment() -> Experiment:
    options = {{"model.interaction.hidden_units": "8", "fit.epochs": "1", "fit.optimizer.learning_rate": "{rate}"}}
    return Experiment(
        name="tiny/dnn", config=configure("dnn", options=options), data=lambda: Path({data!r}), published={{"auc": 0.9}}
    )
"""


class TestExperiment:
    def test_seeds_are_run_averaged_and_resumed(self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file, out = tmp_path / "dnn.py", tmp_path / "out"
        file.write_text(EXPERIMENT.format(rate=0.01, data=str(data)))
        results = run_experiment(file, out, seeds=2)
        assert entries(out) == ["results.json", "seed-2021", "seed-2022", "store"]
        assert strict((out / "results.json").read_text()) == results
        reports = [strict((out / f"seed-{seed}" / "metrics.json").read_text()) for seed in (2021, 2022)]
        assert [r["seed"] for r in reports] == [2021, 2022]
        a, b = (r["test"]["auc"] for r in reports)
        assert a != b
        assert results["test"]["auc"] == pytest.approx({"mean": (a + b) / 2, "std": abs(a - b) / 2**0.5})
        assert results["published"] == {"auc": 0.9}

        trained: list[int] = []
        original = experiment.train

        def spy(*args: Any, **kwargs: Any) -> dict[str, Any]:
            trained.append(kwargs["seed"])
            return original(*args, **kwargs)

        monkeypatch.setattr(experiment, "train", spy)
        again = run_experiment(file, out, seeds=3)
        assert trained == [2023]
        assert again["runs"][:2] == results["runs"]
        assert len(again["runs"]) == 3

        file.write_text(EXPERIMENT.format(rate=0.5, data=str(data)))
        with pytest.raises(DataError, match="was run with other settings"):
            run_experiment(file, out, seeds=3)

    def test_one_seed_has_no_deviation(self, data: Path, tmp_path: Path) -> None:
        file = tmp_path / "dnn.py"
        file.write_text(EXPERIMENT.format(rate=0.01, data=str(data)))
        run_experiment(file, tmp_path / "out", seeds=1)
        assert strict((tmp_path / "out" / "results.json").read_text())["test"]["auc"]["std"] is None

    def test_an_interrupted_seed_ends_the_experiment_and_is_run_again(
        self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file, out = tmp_path / "dnn.py", tmp_path / "out"
        file.write_text(EXPERIMENT.format(rate=0.01, data=str(data)))
        original = experiment.train

        def interrupted(*args: Any, **kwargs: Any) -> dict[str, Any]:
            report = original(*args, **kwargs)
            return report | {"interrupted": kwargs["seed"] == 2022}

        monkeypatch.setattr(experiment, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(file, out, seeds=3)
        assert entries(out) == ["seed-2021", "store"]

    def test_what_is_no_experiment(self, tmp_path: Path) -> None:
        (tmp_path / "empty.py").write_text("x = 1\n")
        with pytest.raises(DataError, match=r"defines no function experiment\(\)"):
            run_experiment(tmp_path / "empty.py", tmp_path / "out")
        with pytest.raises(DataError, match="no such experiment file"):
            run_experiment(tmp_path / "none.py", tmp_path / "out")
        with pytest.raises(DataError, match="seeds is 0"):
            run_experiment(tmp_path / "empty.py", tmp_path / "out", seeds=0)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"writer.pid": str(os.getppid())}, "another process is writing it"),
        ({"writer.pid": str(os.getppid()), "best.safetensors": "weights"}, "another process is writing it"),
        ({"writer.pid": "1 elsewhere 17"}, "a process of the machine elsewhere writes it, or did"),
        ({"thesis.txt": "mine"}, "not an unfinished folder of ours"),
        ({"best.safetensors": "weights"}, "holds the weights of a run that was not finished"),
        ({"writer.pid": str(os.getpid()), "best.safetensors": "weights"}, "holds the weights of a run that was not finished"),
    ],
)
def test_what_may_be_of_use_is_left_alone(data: Path, tmp_path: Path, files: dict[str, str], message: str) -> None:
    (tmp_path / "run.part").mkdir()
    for file, text in files.items():
        (tmp_path / "run.part" / file).write_text(text)
    with pytest.raises(DataError, match=message):
        train(str(data / "train.parquet"), configure("lr"), tmp_path / "run", DataOptions(label="label"))
    assert {path.name: path.read_text() for path in (tmp_path / "run.part").iterdir()} == files


@pytest.mark.skipif(process_began(os.getpid()) is None, reason="the system does not say when a process began")
def test_a_process_of_the_same_number_that_began_earlier_is_gone(tmp_path: Path) -> None:
    """As in a container that is started again."""
    part = tmp_path / "run.part"
    part.mkdir()
    (part / "writer.pid").write_text(f"{os.getpid()} {socket.gethostname()} 17")
    with new_folder(tmp_path / "run"):
        assert (part / "writer.pid").read_text() == f"{os.getpid()} {socket.gethostname()} {process_began(os.getpid())}"
    assert (tmp_path / "run").is_dir()


def test_a_process_of_another_machine_that_is_silent_for_long_is_gone(tmp_path: Path) -> None:
    """As in a container that took the place of one that was killed."""
    part = tmp_path / "run.part"
    part.mkdir()
    (part / "writer.pid").write_text("1 elsewhere 17")
    with pytest.raises(DataError, match="a process of the machine elsewhere writes it"):
        check_new_folder(tmp_path / "run")
    for path in (part / "writer.pid", part):
        os.utime(path, (0, 0))
    check_new_folder(tmp_path / "run")
    assert not part.exists()


def test_an_error_of_reading_is_not_one_of_writing(tmp_path: Path) -> None:
    missing = tmp_path / "missing.bin"
    with (
        pytest.raises(DataError, match=r"missing\.bin: cannot be read or written \(No such file"),
        new_folder(tmp_path / "run"),
    ):
        missing.read_bytes()


def test_splits_that_would_have_no_effect_are_refused(data: Path) -> None:
    with pytest.raises(DataError, match="nothing is to be cut where valid and test rows are given"):
        DataOptions(label="label", valid=str(data / "valid.parquet"), test=str(data / "test.parquet"), split="order")


def test_an_inferred_schema_sees_training_rows_only(tmp_path: Path) -> None:
    """A value of the last tenth of the rows, in order, changes neither the schema nor the encoder."""
    table = clicks(1000, seed=5).drop_columns(["genres"])
    city = table["city"].to_pylist()
    changed = table.set_column(table.column_names.index("city"), "city", pa.array([*city[:-1], "never seen before"]))
    options = DataOptions(label="label", split="order")
    hashes = {prepare(t, tmp_path / str(i), options).encoder.hash for i, t in enumerate((table, changed))}
    assert len(hashes) == 1


def test_pretrained_vectors_enter_a_run_and_stay_if_frozen(store: Path, tmp_path: Path) -> None:
    vectors = [[float(i), -float(i), 0.5] for i in range(6)]
    pq.write_table(pa.table({"value": [f"Stadt {i}" for i in range(6)], "vector": vectors}), tmp_path / "city.parquet")
    config = configure(
        "dnn",
        options={
            "fit.epochs": "1",
            "model.interaction.hidden_units": "8",
            "model.embedding.dims.city": "3",
            "model.embedding.frozen": '["city"]',
            "pretrained.city": str(tmp_path / "city.parquet"),
        },
    )
    train(store, config, tmp_path / "run")
    loaded = artifact.load(tmp_path / "run")
    table = next(m for m in loaded.model.embedding.modules() if isinstance(m, torch.nn.Embedding) and m.embedding_dim == 3)
    rows = loaded.encoder.ids("city", [f"Stadt {i}" for i in range(6)])
    np.testing.assert_array_equal(table.weight.detach().numpy()[rows], np.array(vectors, np.float32))
    with pytest.raises(ConfigError, match=r"set pretrained\.city=FILE"):
        train(store, configure("dnn", options={"model.embedding.frozen": '["city"]'}), tmp_path / "other")
    pq.write_table(pa.table({"value": ["a"]}), tmp_path / "bad.parquet")
    with pytest.raises(DataError, match="no column 'vector'"):
        train(store, configure("dnn", options={"pretrained.city": str(tmp_path / "bad.parquet")}), tmp_path / "other")


def test_a_batch_of_one_row_is_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="single row"):
        train(store, tiny(batch_size="1"), tmp_path / "run")


def test_demo_on_few_rows(tmp_path: Path) -> None:
    result = experiment.demo(tmp_path / "demo", rows=4000)
    assert entries(tmp_path / "demo") == ["data", "lr", "run", "truth.json"]
    assert entries(tmp_path / "demo" / "data") == ["test.parquet", "train.parquet", "valid.parquet"]
    truth = strict((tmp_path / "demo" / "truth.json").read_text())
    assert truth["test"]["additive_auc"] < truth["test"]["bayes_auc"]
    assert result["run"]["test"]["auc"] < truth["test"]["bayes_auc"] + 0.01
    assert artifact.load(tmp_path / "demo" / "run").predict(str(tmp_path / "demo" / "data" / "test.parquet")).shape == (400,)
