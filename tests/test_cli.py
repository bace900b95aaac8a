from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ctrlib import artifact, cli, experiment
from ctrlib.data.store import Store
from ctrlib.models.presets import PRESETS
from ctrlib.search import select as selecting
from tests.clicks import SCHEMA, TINY, clicks, csv_text, write

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run the command line in this process: exit status, standard output, standard error."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ctrlib", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        seen = capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else int(code is not None), seen.out, seen.err)

    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data"))


def given(data: Path) -> list[object]:
    return ["--schema", data / "schema.json", "--valid", data / "valid.parquet", "--test", data / "test.parquet"]


def settings(**changes: str) -> list[str]:
    options = TINY | {path.replace("__", "."): value for path, value in changes.items()}
    return [word for path, value in options.items() for word in ("--set", f"{path}={value}")]


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_from_files_to_segments(call: Call, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    rows = tmp_path / "train.csv"
    rows.write_text(csv_text(pq.read_table(data / "train.parquet")))
    code, out, err = call("prepare", rows, "--out", tmp_path / "store", *given(data), "--group", "user")
    assert (code, err) == (0, "")
    assert re.search(r"train +2,000 rows\nvalid +400 rows\ntest +401 rows\n5 fields, ", out)

    run = tmp_path / "a" / "b" / "run"
    code, out, _ = call("train", tmp_path / "store", "--model", "dnn", "--out", f"{run}/", *settings(), "--epochs", 1)
    assert code == 0
    assert f"saved to {run}" in out
    report = json.loads((run / "metrics.json").read_text())
    assert report["epochs"] == 1
    assert f"test    auc {report['test']['auc']:.5f}  gauc {report['test']['gauc']:.5f}" in out
    assert entries(run.parent) == ["run"]

    code, out, _ = call("evaluate", run, data / "test.parquet")
    assert code == 0
    assert json.loads(out) == pytest.approx(report["test"], abs=1e-9)
    code, out, _ = call("evaluate", run / "artifact", tmp_path / "store")
    assert json.loads(out) == pytest.approx(report["test"], abs=1e-9)

    code, out, _ = call("evaluate", run, data / "test.parquet", "--by", "city")
    assert code == 0
    whole, end = json.JSONDecoder().raw_decode(out)
    assert whole == pytest.approx(report["test"], abs=1e-9)
    table = out[end:].strip().splitlines()
    assert table[0].split() == ["city", "rows", "label_rate", "auc", "log_loss", "ece", "copc"]
    assert sum(int(line[len("Stadt 0") + 1 :].split()[0]) for line in table[1:]) == 401
    assert not list((tmp_path / "temporary").glob("ctrlib*"))


def test_relative_folders(call: Call, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for out in ("run", "./x/y/", "x/../z"):
        code, _, err = call("train", data / "train.parquet", "--model", "dnn", "--out", out, *given(data), *settings())
        assert code == 0, err
        assert artifact.load(out).schema == SCHEMA
    assert entries(tmp_path) == ["run", "x", "z"]
    code, _, err = call("train", data / "train.parquet", "--model", "dnn", "--out", "run", *given(data), *settings())
    assert (code, err.count("error: ")) == (2, 1)
    assert "run exists already" in err


def test_evaluation_prints_json_where_a_metric_is_undefined(call: Call, data: Path, tmp_path: Path) -> None:
    call("train", data / "train.parquet", "--model", "dnn", "--out", tmp_path / "run", *given(data), *settings())
    table = pq.read_table(data / "test.parquet").slice(400)  # one row
    pq.write_table(table, tmp_path / "one.parquet")
    code, out, _ = call("evaluate", tmp_path / "run", tmp_path / "one.parquet", "--by", "city")
    assert code == 0
    report, _ = json.JSONDecoder(parse_constant=lambda c: pytest.fail(c)).raw_decode(out)
    assert report["auc"] is None
    assert report["rows"] == 1


def test_models_are_listed_one_a_line(call: Call) -> None:
    code, out, _ = call("models")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(PRESETS)
    assert all(PRESETS[line.split()[0]].paper in line for line in out.splitlines())


def test_an_experiment(call: Call, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "experiments" / "tiny" / "dnn.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "from pathlib import Path\n"
        "from ctrlib.experiment import Experiment, configure\n"
        "def experiment():\n"
        '    config = configure("dnn", options={"model.interaction.hidden_units": "8", "fit.epochs": "1"})\n'
        f'    return Experiment(name="tiny/dnn", config=config, data=lambda: Path({str(data)!r}),\n'
        '                      published={"auc": 0.9}, note="none of it is real")\n'
    )
    code, out, err = call("run", file, "--seeds", 2)
    assert code == 0, err
    results = json.loads((tmp_path / "runs" / "tiny" / "dnn" / "results.json").read_text())
    assert f"test auc       {results['test']['auc']['mean']:.6f}" in out
    assert "(published 0.9)" in out
    assert "none of it is real" in out
    file.write_text("x = 1\n")
    code, _, err = call("run", file)
    assert (code, err.count("error: ")) == (2, 1)


def bad_label(folder: Path) -> list[object]:
    table = clicks(500, 0)
    labels = table["label"].to_pylist()
    labels[77] = 2
    pq.write_table(table.set_column(table.column_names.index("label"), "label", pa.array(labels)), folder / "rows.parquet")
    return [folder / "rows.parquet", "--label", "label"]


def truncated(folder: Path) -> list[object]:
    pq.write_table(clicks(500, 0), folder / "rows.parquet")
    whole = (folder / "rows.parquet").read_bytes()
    (folder / "rows.parquet").write_bytes(whole[: len(whole) // 2])
    return [folder / "rows.parquet", "--label", "label"]


def csv(content: bytes) -> Callable[[Path], list[object]]:
    def make(folder: Path) -> list[object]:
        (folder / "rows.csv").write_bytes(content)
        return [folder / "rows.csv", "--label", "label"]

    return make


def good(*words: object) -> Callable[[Path], list[object]]:
    def make(folder: Path) -> list[object]:
        pq.write_table(clicks(300, 0), folder / "rows.parquet")
        SCHEMA.save(folder / "schema.json")
        return [folder / "rows.parquet", "--schema", folder / "schema.json", *words]

    return make


def text(file: str, content: str, *words: object) -> Callable[[Path], list[object]]:
    def make(folder: Path) -> list[object]:
        (folder / file).write_text(content)
        return [*good()(folder)[:1], *(str(w).replace("@", str(folder)) for w in words)]

    return make


def cuda(folder: Path) -> list[object]:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    return good("--set", "device=cuda")(folder)


Case = tuple[Callable[[Path], list[Any]], str]
BAD_DATA: dict[str, Case] = {
    "no label": (lambda folder: good()(folder)[:1], r"which column of .*rows\.parquet is the label\?"),
    "missing label": (good("--label", "lable"), r"no column 'lable', named as label; did you mean 'label'\?"),
    "label is a field": (good("--label", "city"), "names column 'city' twice"),
    "third label": (bad_label, r"column 'label', .*rows.parquet, row 78: the label is 2; expected 0 or 1"),
    "missing group": (good("--group", "usr"), r"no column 'usr', named as .*group; did you mean 'user'\?"),
    "missing time": (good("--time", "dya"), r"no column 'dya'.*; did you mean 'day'\?"),
    "missing weight": (good("--weight", "www"), r"no column 'www', named as weight"),
    "no time column": (good("--split", "time"), "a split by time needs a time column"),
    "bad split": (good("--split", "rows"), "--split is 'rows'; expected one of auto, time, random, order"),
    "bad shares": (good("--shares", "0.8;0.2"), "--shares is '0.8;0.2'; expected three numbers"),
    "shares above one": (good("--shares", "0.8,0.8,0.8"), "sum to 1"),
    "negative seed": (good("--seed", "-1"), "seed is -1"),
    "no file": (lambda _: ["no/such/rows.parquet", "--label", "label"], "no such file, folder or glob"),
    "empty file": (csv(b""), "the file is empty"),
    "header only": (csv(b"a,label\n"), "has a header but no rows"),
    "too few cells": (csv(b"a,b,label\n1,2,0\n3,1\n4,5,1\n"), r"rows\.csv: malformed line .*#3"),
    "not UTF-8": (csv(b"a,label\nK\xf6ln,0\nBonn,1\n"), r"rows\.csv: the text is not UTF-8"),
    "two columns of one name": (csv(b"a,a,label\n1,2,0\n"), "two columns named 'a'"),
    "truncated Parquet": (truncated, r"rows\.parquet: cannot be read as Parquet"),
    "not a schema": (text("s.json", "{", "--schema", "@/s.json"), "not valid JSON"),
    "no schema": (good("--schema", "none.json"), "none.json: cannot be read"),
    "wrong kind of field": (
        text("s.json", '{"labels": ["label"], "fields": [{"name": "city", "kind": "dense"}]}', "--schema", "@/s.json"),
        "'Stadt [0-9]' is not a number",
    ),
    "field that is not there": (
        text("s.json", '{"labels": ["label"], "fields": [{"name": "town", "kind": "sparse"}]}', "--schema", "@/s.json"),
        "no column 'town', which the schema declares as a field",
    ),
    "validation rows that are not there": (good("--valid", "none.parquet"), "none.parquet: no such file"),
}
BAD_OPTIONS: dict[str, Case] = {
    "model": (good("--model", "deepfmm"), r"no model 'deepfmm'; did you mean 'deepfm'\?"),
    "flavour": (good("--flavour", "official"), "model 'dnn' has no flavour 'official'; expected one of paper, fuxictr"),
    "option": (
        good("--set", "fit.optimzer.learning_rate=1"),
        r"no option 'fit\.optimzer\.learning_rate'; did you mean 'fit\.optimizer\.learning_rate'\?",
    ),
    "option of a leaf": (good("--set", "batch_size.x=1"), "batch_size"),
    "no equals sign": (good("--set", "batch_size"), "has no '='"),
    "kind of value": (good("--set", "batch_size=many"), "batch_size is 'many'; expected int"),
    "fraction for a whole number": (good("--set", "batch_size=2.5"), r"batch_size is 2\.5; expected int"),
    "kind of item": (good("--set", "model.interaction.hidden_units=64,x"), r"hidden_units\.1 is 'x'; expected int"),
    "no items": (good("--set", "model.interaction.hidden_units="), "hidden_units"),
    "choice": (good("--set", "fit.monitor=acu"), r"'acu'; expected one of .*; did you mean 'auc'\?"),
    "epochs": (good("--epochs", 0), "epochs is 0; expected a number above 0"),
    "negative epochs": (good("--epochs", -3), "epochs is -3"),
    "batch size": (good("--set", "batch_size=0"), "batch_size is 0"),
    "workers": (good("--set", "workers=-2"), "workers is -2"),
    "device": (good("--set", "device=tpu"), "device is 'tpu'"),
    "no GPU": (cuda, "this torch sees no CUDA GPU"),
    "gauc without a group": (good("--set", "fit.monitor=gauc"), "gauc"),
    "divergence": (good("--set", "fit.optimizer.learning_rate=1e38"), "training diverged"),
}


def refused(call: Call, folder: Path, words: list[object], message: str) -> None:
    before = entries(folder)
    code, out, err = call(*words, "--out", folder / "out")
    assert code == 2, err
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert err.splitlines()[-1] == errors[0]
    assert re.search(message, errors[0])
    assert "Traceback" not in err
    assert entries(folder) == before


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_line_and_leaves_nothing(call: Call, tmp_path: Path, case: str) -> None:
    make, message = BAD_DATA[case]
    words = make(tmp_path)
    refused(call, tmp_path, ["prepare", *words], message)
    refused(call, tmp_path, ["train", words[0], "--model", "dnn", *settings(), *words[1:]], message)


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_is_one_line_and_leaves_nothing(call: Call, tmp_path: Path, case: str) -> None:
    make, message = BAD_OPTIONS[case]
    rows, *words = make(tmp_path)
    refused(call, tmp_path, ["train", rows, "--model", "dnn", *settings(), *words], message)


def test_other_refusals(call: Call, data: Path, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("mine")
    unwritable = ["--model", "dnn", "--out", tmp_path / "file.txt" / "run", *given(data)]
    for words, message in (
        (["train", data / "train.parquet", *unwritable], "cannot be written"),
        (["train", data / "train.parquet", "--model", "dnn", "--out", data / "train.parquet", *given(data)], "exists already"),
        (["evaluate", tmp_path / "none", data / "test.parquet"], "there is no such folder"),
        (["run", tmp_path / "none.py"], "no such experiment file"),
    ):
        code, _, err = call(*words)
        assert (code, err.count("error: "), err.count("\n")) == (2, 1, 1), err
        assert message in err

    call("prepare", data / "train.parquet", "--out", tmp_path / "store", *given(data))
    other = tmp_path / "other.json"
    other.write_text('{"labels": ["label"], "fields": [{"name": "city", "kind": "sparse"}]}')
    code, _, err = call("train", tmp_path / "store", "--model", "dnn", "--out", tmp_path / "run", "--schema", other)
    assert (code, err.count("error: ")) == (2, 1)
    assert "was made with another schema (fields that differ: " in err
    for option, value, message in (
        ("--valid", data / "valid.parquet", "has splits of its own (train, valid, test)"),
        ("--split", "order", "has splits of its own (train, valid, test); leave split and shares out"),
        ("--shares", "0.4,0.3,0.3", "leave split and shares out"),
        ("--label", "buy", "was prepared with label ('label',), not ('buy',)"),
        ("--group", "user", "was prepared with group None, not 'user'"),
    ):
        code, _, err = call("train", tmp_path / "store", "--model", "dnn", "--out", tmp_path / "run", option, value)
        assert (code, err.count("error: ")) == (2, 1)
        assert message in err
    assert entries(tmp_path) == ["file.txt", "other.json", "store"]


def test_a_full_disk_is_one_line_and_the_weights_are_kept(
    call: Call, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact, "save_file", full)
    code, _, err = call("train", data / "train.parquet", "--model", "dnn", "--out", tmp_path / "run", *given(data), *settings())
    assert (code, err.count("error: "), err.splitlines()[-1]) == (2, 1, err.splitlines()[-1])
    assert "cannot be written (No space left on device)" in err
    assert entries(tmp_path) == ["run.part"]
    assert (tmp_path / "run.part" / "best.safetensors").is_file()


def test_ctrl_c_where_nothing_can_be_saved(call: Call, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "build_model", interrupted)
    code, out, err = call("train", data / "train.parquet", "--model", "dnn", "--out", tmp_path / "run", *given(data))
    assert (code, out) == (130, "")
    assert "Traceback" not in err
    assert entries(tmp_path) == []


def start(data: Path, out: Path) -> subprocess.Popen[str]:
    """A real process that trains for a long time, once it has been evaluated at least twice."""
    words = ["train", data / "train.parquet", "--model", "dnn", "--out", out, *given(data)]
    endless = settings(fit__epochs="100000", fit__patience="None", batch_size="64")
    process = subprocess.Popen(
        [sys.executable, "-m", "ctrlib", *map(str, words), *endless],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    history = out.with_name(out.name + ".part") / "history.jsonl"
    deadline = time.monotonic() + 60
    while not (history.is_file() and history.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_saves_the_best_weights(call: Call, data: Path, tmp_path: Path) -> None:
    process = start(data, tmp_path / "run")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "saved to" in out
    assert "interrupted at epoch" in err
    assert "Traceback" not in err
    assert not re.search(r"[\r\x1b\x07]", out + err)  # no progress bar where there is no terminal
    assert entries(tmp_path) == ["run"]
    assert entries(tmp_path / "run") == ["artifact", "config.json", "history.jsonl", "metrics.json"]
    report = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert report["interrupted"] is True
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    best = max(line["valid"]["auc"] for line in history)
    assert report["valid"]["auc"] == pytest.approx(best, abs=1e-6 + 1e-9)  # within min_delta
    code, out, _ = call("evaluate", tmp_path / "run", data / "test.parquet")
    assert code == 0
    assert json.loads(out)["auc"] == pytest.approx(report["test"]["auc"], abs=1e-6)


def test_a_terminated_run_leaves_nothing_that_looks_like_a_run(data: Path, tmp_path: Path) -> None:
    process = start(data, tmp_path / "run")
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    assert not (tmp_path / "run").exists()


def test_select(call: Call, data: Path, tmp_path: Path) -> None:
    words = ["select", data / "train.parquet", "--model", "dnn", *given(data), *settings(), "--epochs", 1, "--seeds", 2]
    chosen = ["--method", "outrank", "--top", "0.5", "--option", "num_bins=8"]
    code, out, err = call(*words, *chosen, "--no-curve", "--out", tmp_path / "run")
    assert code == 0, err
    assert out.startswith((tmp_path / "run" / "report.md").read_text())
    assert "\n* seed 1: 3 of 5 fields (" in out
    assert f"saved to {tmp_path / 'run'} (selection/, before/, after/, report.json, report.md)" in out
    settled = json.loads((tmp_path / "run" / "select.json").read_text())
    assert (settled["options"]["top"], settled["options"]["num_bins"]) == (0.5, 8)
    kept = json.loads((tmp_path / "run" / "report.json").read_text())["kept"][0]["fields"]["names"]
    assert artifact.load(tmp_path / "run" / "after" / "seed-0").encoder.layout.names == tuple(kept)
    for changed, message in (
        (["--method", "outrnk"], "no selection method 'outrnk'; did you mean 'outrank'?"),
        (["--method", "outrank", "--top", "half"], "--top is 'half'; expected a number of fields such as 20, or a share"),
        (["--method", "outrank", "--top", "9"], "top is 9, but the data has 5 fields"),
        (["--method", "gbdt"], "gbdt ranks the fields; say how many to keep"),
        (["--method", "outrank", "--option", "num_bins"], "--option 'num_bins' has no '='"),
        (["--method", "outrank", "--seeds", "0"], "seeds is 0"),
    ):
        refused(call, tmp_path, [*words, "--no-curve", *changed], re.escape(message))


def test_crosses(call: Call, data: Path, tmp_path: Path) -> None:
    raw = data / "train.parquet"
    for options, wanted in (
        (["--cross-min-count", 5], (5, None, None)),
        (["--cross-max-size", 7, "--cross-min-count", 2], (2, 7, None)),
        (["--cross-hash-size", 50], (1, None, 50)),
    ):
        out = tmp_path / str(options[0]).removeprefix("--")
        code, shown, err = call("prepare", raw, "--out", out, *given(data), *options)
        assert code == 0, err
        assert "\n8 fields, " in shown
        crosses = Store.open(out).encoder.schema.crosses
        assert [f.name for f in crosses] == ["user*city", "user*age", "city*age"]
        assert {(f.min_count, f.max_size, f.hash_size) for f in crosses} == {wanted}
    train = ["train", raw, "--model", "dnn", *given(data), *settings(), "--epochs", 1]
    code, _, err = call(*train, "--stream", "--cross-hash-size", 50, "--cross-memory-mb", 1, "--out", tmp_path / "run")
    assert code == 0, err
    assert [f.hash_size for f in artifact.load(tmp_path / "run").schema.crosses] == [50] * 3
    wide = ["--set", "model.embedding.dim=999", "--cross-min-count", 1, "--cross-memory-mb", 0.5]
    select = ["select", *train[1:], "--method", "outrank", "--top", 3, "--no-curve"]
    of_store = ["train", tmp_path / "cross-min-count", "--model", "dnn"]
    for words, message in (
        ([*train, "--cross-min-count", 1, "--cross-memory-mb", 0.01], r"crosses are too large.*\(cross_memory_mb\)"),
        ([*train, *wide], r"the crosses have .* MB in training .*\(cross_memory_mb\)"),
        ([*select, *wide], r"the crosses have .* MB in training .*\(cross_memory_mb\)"),
        ([*train, "--cross-min-count", 2, "--cross-hash-size", 5], "hash_size learns no vocabulary"),
        ([*train, "--cross-max-size", 0], "cross_max_size is 0"),
        ([*of_store, "--cross-min-count", 5, "--cross-max-size", 3], "leave cross_min_count, cross_max_size out, or prepare"),
    ):
        refused(call, tmp_path, words, message)


def test_bad_selections_are_one_line_and_leave_nothing(
    call: Call, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def words(model: str, *more: object) -> list[object]:
        small = [f"--set={path}={value}" for path, value in {"model.embedding.dim": 4, "batch_size": 64}.items()]
        return ["select", data / "train.parquet", "--model", model, "--no-curve", *small, *given(data), *more]

    everything = ["--method", "optfs", *(f"--option={o}" for o in ("penalty=1", "learning_rate=0.05", "epochs=2"))]
    for bad, message in (
        (words("dnn", *everything), "OptFS closed the gates of all .* lower it"),
        (words("auto_fm", "--method", "autofis", "--option", "c=10"), r"AutoFIS closed all 10 pairs .* lower auto_fis\.c"),
        (words("dnn", "--method", "gbdt", "--top", 2, "--option", "label=clik"), "the data has no label 'clik'"),
        (words("dnn", "--method", "outrank", "--top", 2, '--set=model.embedding.fields=["usr"]'), "did you mean 'user'"),
        (words("dnn", "--method", "permutation", "--top", 2, "--set=device=cuda"), "this torch sees no CUDA GPU"),
        (words("dnn", "--method", "permutation", "--top", 2, "--set=fit.optimizer.learning_rate=1e38"), "training diverged"),
    ):
        refused(call, tmp_path, bad, message)
    monkeypatch.setattr("ctrlib.data.crosses.half_of_free_mb", lambda: 1e-3)
    pairs = words("optinter", "--method", "optinter", "--cross-min-count", 1)
    refused(call, tmp_path, pairs, "(?i)cross.* MB.*min_count")


def test_a_selection_of_another_schema_is_refused_and_stays_as_it_is(call: Call, data: Path, tmp_path: Path) -> None:
    words = ["--model", "dnn", *settings(), "--epochs", 1, "--seeds", 1, "--method", "outrank", "--top", 2, "--no-curve"]
    out = tmp_path / "out"
    call("prepare", data / "train.parquet", "--out", tmp_path / "store", *given(data))
    code, _, err = call("select", tmp_path / "store", *words, "--out", out)
    assert code == 0, err
    found = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    other = tmp_path / "other.json"
    other.write_text(
        json.dumps({"labels": ["label"], "fields": [{"name": n, "kind": "sparse"} for n in ("user", "city", "age")]})
    )
    inputs = ["--schema", other, "--valid", data / "valid.parquet", "--test", data / "test.parquet"]
    call("prepare", data / "train.parquet", "--out", tmp_path / "another", *inputs)
    for rows, more, message in (
        (tmp_path / "another", [], "holds a selection on other data"),
        (data / "train.parquet", inputs, "holds a selection with other settings, or of other data"),
        (tmp_path / "store", ["--schema", other], "was made with another schema"),
    ):
        code, printed, err = call("select", rows, *words, *more, "--out", out)
        assert (code, printed, err.count("error: ")) == (2, "", 1), err
        assert message in err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == found


def test_ctrl_c_in_a_selection(
    call: Call, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ctrlib")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    words = ["select", data / "train.parquet", "--model", "dnn", *given(data), *settings(), "--epochs", 1, "--seeds", 1]
    words += ["--method", "outrank", "--top", 2, "--no-curve", "--out", tmp_path / "out"]
    with monkeypatch.context() as patched:
        patched.setattr(selecting, "train", interrupted)
        code, out, err = call(*words)
    assert (code, out) == (130, "")
    assert f"interrupted; the same call goes on from what is finished in {tmp_path / 'out'}" in caplog.text
    assert "Traceback" not in err
    assert entries(tmp_path / "out" / "selection") == ["seed-0"]
    assert "outrank, seed 0: search" in caplog.text
    caplog.clear()
    code, out, err = call(*words)
    assert code == 0, err
    assert "training before/seed-0" in caplog.text
    assert "search" not in caplog.text  # which was finished
    assert not re.search(r"[\r\x1b\x07]", out + err)
