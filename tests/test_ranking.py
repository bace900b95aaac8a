"""Raw requests to a saved model: the probabilities of evaluation, in any process, by any number of threads."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctrlib import artifact, ranking
from ctrlib.calibration import Calibration
from ctrlib.config import ConfigError, override
from ctrlib.data.encoder import Encoder
from ctrlib.interactions.adaptive_fusion import AdaptiveFusion
from ctrlib.models.ctr import build_model
from ctrlib.models.presets import COMPONENTS, preset
from ctrlib.ranking import Ranker
from ctrlib.schema import DataError, Schema
from tests.clicks import SCHEMA, clicks
from tests.data.test_requests import HISTORY
from tests.models.small import awake, shrunk

CONTEXT = ("user", "age", "genres")
SIDES = replace(SCHEMA, fields=tuple(replace(f, side="context" if f.name in CONTEXT else "candidate") for f in SCHEMA.fields))
Request = tuple[dict[str, Any], list[dict[str, Any]]]


def save(folder: Path, name: str = "deepfm", schema: Schema = SIDES) -> Path:
    encoder = Encoder.fit(schema, clicks(1500, 0))
    config = shrunk(preset(name))
    artifact.save(folder, encoder, awake(build_model(config, encoder.layout)).eval(), config)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("artifacts") / "a")


@pytest.fixture(scope="module")
def ranker(saved: Path) -> Ranker:
    return Ranker.load(saved)


def requests(count: int, candidates: int, seed: int = 1) -> list[Request]:
    """Contexts and candidates with nulls and unseen values, and over-long lists; numbers as text, integers and floats."""
    rows = clicks(count * candidates, seed).to_pylist()
    found = []
    for i in range(count):
        group = rows[i * candidates : (i + 1) * candidates]
        context = {name: group[0][name] for name in CONTEXT}
        if i % 5 == 1:
            context = {"user": str(i), "age": 33.0, "genres": "|".join(f"g{g % 9}" for g in range(40))}
        elif i % 5 == 2:
            context = {"user": 10**9 + i, "age": None, "genres": None}
        below: list[dict[str, Any]] = [{name: row[name] for name in ("city", "price")} for row in group]
        below[0] = {"city": "Atlantis", "price": None}
        below[-1] = {"city": i, "price": "1.25"}
        found.append((context, below))
    return found


def offline(loaded: artifact.Artifact, request: Request) -> np.ndarray[Any, np.dtype[np.float64]]:
    context, candidates = request
    return np.concatenate([loaded.predict([{**context, **row}]) for row in candidates])


def test_online_is_offline(saved: Path, ranker: Ranker) -> None:
    loaded = artifact.load(saved)
    assert ranker.hoisted_share > 0
    assert ranker.check() <= ranking.TOLERANCE
    for request in requests(8, 6):
        shown = ranker.score(*request)
        assert shown.shape == (6,)
        np.testing.assert_allclose(shown, offline(loaded, request), rtol=0, atol=1e-6)


def test_without_hoisting_and_together(saved: Path, ranker: Ranker) -> None:
    plain = Ranker.load(saved, hoisting=False)
    assert plain.hoisted == ()
    many = [*requests(3, 5), ({"user": 1, "age": 2, "genres": None}, []), *requests(2, 1, seed=4)]
    encoded = [ranker.encoder.encode(*request) for request in many]
    together = ranker.score_together(encoded)
    assert [len(p) for p in together] == [5, 5, 5, 0, 1, 1]
    for request, shown in zip(many, together, strict=True):
        np.testing.assert_allclose(ranker.score(*request), shown, rtol=0, atol=1e-6)
        np.testing.assert_allclose(plain.score(*request), shown, rtol=0, atol=1e-6)


def test_rank(ranker: Ranker) -> None:
    context, candidates = requests(1, 9)[0]
    candidates.append(candidates[3])
    scores = ranker.score(context, candidates)
    ranked = ranker.rank(context, candidates, 4)
    assert len(ranked.order) == 4
    np.testing.assert_array_equal(ranked.probability, np.sort(scores)[::-1][:4])
    everything = ranker.rank(context, candidates).order.tolist()
    assert everything.index(3) + 1 == everything.index(9)  # equal ones in the order given
    assert ranker.rank(context, [], 4).order.tolist() == []
    with pytest.raises(ConfigError, match="top_k is 0"):
        ranker.rank(context, candidates, 0)
    with pytest.raises(ConfigError, match=r"no label 'lable'.*did you mean 'label'"):
        ranker.rank(context, candidates, label="lable")
    with pytest.raises(DataError, match="candidate 2 has no field 'price'"):
        ranker.score(context, [candidates[0], {"city": "x"}])


def test_threads_get_what_one_gets(ranker: Ranker) -> None:
    many = requests(12, 5, seed=9)
    expected = [ranker.score(*request) for request in many]
    with ThreadPoolExecutor(4) as pool:
        for shown, wanted in zip(pool.map(lambda r: ranker.score(*r), many * 4), expected * 4, strict=True):
            np.testing.assert_array_equal(shown, wanted)


def test_rankers_made_by_threads_leave_torch_as_it_was(saved: Path) -> None:
    """Of two exports at once, the one that ends last would leave the flag that one is going on."""
    with ThreadPoolExecutor(3) as pool:
        assert all(r.hoisted for r in pool.map(lambda _: Ranker.load(saved), range(3)))
    assert not torch.compiler.is_exporting()
    assert not torch.compiler.is_compiling()


def test_two_labels_and_calibration(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", "dcnv2", replace(SIDES, labels=("label", "buy")))
    plain = Ranker.load(folder)
    request = requests(1, 4)[0]
    before = plain.score(*request)
    assert before.shape == (4, 2)
    artifact.calibrate(
        folder, {"label": Calibration(method="platt", slope=0.5, intercept=-1.0), "buy": Calibration(method="none")}
    )
    after = Ranker.load(folder).score(*request)
    np.testing.assert_allclose(np.log(after / (1 - after))[:, 0], 0.5 * np.log(before / (1 - before))[:, 0] - 1, atol=1e-9)
    np.testing.assert_allclose(after[:, 1], before[:, 1], rtol=1e-12)
    np.testing.assert_allclose(after, offline(artifact.load(folder), request), atol=1e-6)
    assert plain.rank(*request, label="buy").probability.max() == before[:, 1].max()


@pytest.mark.parametrize("name", ["din", "aw_moe"])
def test_histories_of_the_context(tmp_path: Path, name: str) -> None:
    """Nested attributes, time gaps, a guard and a limit; a user without any behaviour."""
    past: dict[str, Any] = {"clicked": [1, 2, 3, 4], "words": [["a"], [], ["b", "c"], ["a"]], "when": [1, 5, 8, 12], "now": 10}
    encoder = Encoder.fit(HISTORY, [{**past, "item": i % 5, "label": i % 2} for i in range(20)])
    config = override(shrunk(preset(name)), {"history": "h"} if name == "aw_moe" else {}, COMPONENTS)
    artifact.save(tmp_path / "a", encoder, awake(build_model(config, encoder.layout)).eval(), config)
    ranker, loaded = Ranker.load(tmp_path / "a"), artifact.load(tmp_path / "a")
    assert ranker.hoisted
    assert ranker.context_fields == ("clicked", "words", "when", "now")
    for context in (past, past | {"now": 100}, {"clicked": [], "words": [], "when": [], "now": 3}):
        candidates = [{"item": i} for i in range(4)]
        shown = ranker.score(context, candidates)
        np.testing.assert_allclose(shown, offline(loaded, (context, candidates)), rtol=0, atol=1e-6)
        assert len(set(shown.tolist())) == 4


def test_a_graph_that_would_score_otherwise_is_not_used(
    saved: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ranking, "TOLERANCE", -1.0)
    with caplog.at_level(logging.WARNING, logger="ctrlib"):
        ranker = Ranker.load(saved)
    assert ranker.hoisted == ()
    assert "the context is not computed once" in caplog.text
    assert ranker.score(*requests(1, 3)[0]).shape == (3,)


def test_a_graph_that_gives_no_numbers_is_not_used(
    saved: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither where only the first of the check's requests is a number, nor at all."""

    class NoNumbers(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            logits: torch.Tensor = self.module(*inputs)
            return logits if self.calls == 1 else logits * torch.nan

    monkeypatch.setattr(ranking, "fuse", NoNumbers)
    with caplog.at_level(logging.WARNING, logger="ctrlib"):
        ranker = Ranker.load(saved)
    assert ranker.hoisted == ()
    assert "the context is not computed once" in caplog.text
    assert np.isfinite(ranker.score(*requests(1, 3)[0])).all()


def test_modalities_of_both_sides(tmp_path: Path) -> None:
    """Modalities across both sides."""
    encoder = Encoder.fit(SIDES, clicks(500, 0))
    modalities = {"who": ("user", "age"), "both": ("genres", "city")}
    fusion = AdaptiveFusion.Config(modalities=modalities, field_gates=False)
    config = replace(shrunk(preset("dnn")), interaction=fusion)  # type: ignore[call-arg]
    artifact.save(tmp_path / "a", encoder, awake(build_model(config, encoder.layout)).eval(), config)
    request = requests(1, 4)[0]
    shown = Ranker.load(tmp_path / "a").score(*request)
    np.testing.assert_allclose(shown, offline(artifact.load(tmp_path / "a"), request), rtol=0, atol=1e-6)


def test_a_graph_that_does_not_run_is_not_used(
    saved: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(torch.nn.Module):
        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("sizes do not fit")

    monkeypatch.setattr(ranking, "fuse", lambda module: Broken())
    with caplog.at_level(logging.WARNING, logger="ctrlib"):
        ranker = Ranker.load(saved)
    assert "the context is not computed once: the model cannot be rewritten (sizes do not fit)" in caplog.text
    assert ranker.score(*requests(1, 3)[0]).shape == (3,)


SCRIPT = """
import json, sys

found, opened = [], []
def hook(event, args):
    if event == "pickle.find_class":
        found.append(args)
    elif event == "open" and isinstance(args[0], str) and args[0].endswith((".pkl", ".pickle", ".pt", ".pth", ".npy", ".npz")):
        opened.append(args[0])
sys.addaudithook(hook)
from ctrlib.ranking import Ranker
before = len(found)
ranker = Ranker.load(sys.argv[1])
scores = [ranker.score(context, rows).tolist() for context, rows in json.load(open(sys.argv[2]))]
unpickled = len(found) - before
import pickle
pickle.loads(pickle.dumps(json.JSONDecoder))
control = len(found) - before - unpickled
known = [name for name in ("optuna", "polars", "lightgbm", "sklearn", "starlette", "onnx") if name in sys.modules]
print(json.dumps({"scores": scores, "unpickled": unpickled, "control": control, "opened": opened, "known": known}))
"""


def test_a_fresh_process_opens_no_pickle_and_imports_nothing_of_training(saved: Path, ranker: Ranker, tmp_path: Path) -> None:
    many = requests(4, 5)
    (tmp_path / "requests.json").write_text(json.dumps(many))
    command = [sys.executable, "-c", SCRIPT, str(saved), str(tmp_path / "requests.json")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert (found["unpickled"], found["control"], found["opened"], found["known"]) == (0, 1, [], [])
    for request, shown in zip(many, found["scores"], strict=True):
        np.testing.assert_allclose(shown, ranker.score(*request), rtol=0, atol=1e-6)


MAPPED = """
import sys
from ctrlib import artifact
loaded = artifact.load(sys.argv[1])
address = loaded.model.embedding._tables[0].rows.weight.data_ptr()
for line in open("/proc/self/maps"):
    start, end = (int(part, 16) for part in line.split()[0].split("-"))
    if start <= address < end:
        print(line.split()[-1])
print("torch._dynamo" in sys.modules)
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux only")
def test_tables_are_mapped_from_the_file_without_importing_the_compiler(saved: Path) -> None:
    result = subprocess.run([sys.executable, "-c", MAPPED, str(saved)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    mapped, imported = result.stdout.splitlines()
    assert mapped.endswith("weights.safetensors")
    assert imported == "False"
