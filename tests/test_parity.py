"""Ten thousand raw rows through every preset, offline here and online in a fresh process that must open no pickle."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ctrlib import artifact
from ctrlib.config import override
from ctrlib.data.encoder import Encoder
from ctrlib.models.ctr import build_model
from ctrlib.models.presets import COMPONENTS, PRESETS, preset
from ctrlib.optim import OptimizerConfig
from ctrlib.schema import CrossField, Schema
from ctrlib.training import FitConfig, fit, seed_everything
from tests.clicks import clicks
from tests.data.test_requests import HISTORY
from tests.models.small import shrunk
from tests.test_ranking import SCRIPT, SIDES, Request, requests

REQUESTS, CANDIDATES = 100, 100
STEPS = 12
CROSSES = tuple(CrossField(name=f"{a}*{b}", of=(a, b)) for a, b in combinations(("user", "city", "age"), 2))


def with_histories(count: int, candidates: int) -> list[Request]:
    """Behaviours in order of time, of any length, some after the request or none; new items, missing ones, numbers as text."""
    rng = np.random.default_rng(5)
    found: list[Request] = []
    for i in range(count):
        length = 0 if i % 7 == 3 else int(rng.integers(1, 60))
        context: dict[str, Any] = {
            "clicked": rng.integers(0, 9, length).tolist(),
            "words": [[str(w) for w in rng.choice(list("abcd"), rng.integers(0, 4))] for _ in range(length)],
            "when": np.sort(rng.integers(0, 100, length)).tolist(),
            "now": int(rng.integers(0, 120)),
        }
        items: list[Any] = rng.integers(0, 7, candidates).tolist()
        items[:4] = [None, 10**9, "2", 3.0]
        found.append((context, [{"item": item} for item in items]))
    return found


def prepare(name: str, folder: Path) -> Path:
    """An artifact of the preset, with weights of a short training: what is compared is two orders of the same sums, and with
    random weights of the same size everywhere, logits so large that 32-bit floats themselves differ by more than 1e-6."""
    if PRESETS[name].needs_history:
        past: dict[str, Any] = {
            "clicked": [1, 2, 3, 4],
            "words": [["a"], [], ["b", "c"], ["a"]],
            "when": [1, 5, 8, 12],
            "now": 10,
        }
        rows: Any = [{**past, "item": i % 5, "label": i % 2} for i in range(20)]
        encoder = Encoder.fit(HISTORY, rows)
        options = {"history": "h", "contrast.weight": "0"} if name == "aw_moe" else {}  # its contrast asks for users
        config = override(shrunk(preset(name)), options, COMPONENTS)
    else:
        schema: Schema = replace(SIDES, fields=(*SIDES.fields, *CROSSES)) if name.startswith("optinter") else SIDES
        rows = clicks(1500, 0)
        encoder = Encoder.fit(schema, rows)
        config = shrunk(preset(name))
    seed_everything(1)
    model = build_model(config, encoder.layout)
    batches = [block.batch() for block in encoder.encode(rows, block_rows=256)]
    fit(model, batches, None, FitConfig(epochs=STEPS // len(batches), optimizer=OptimizerConfig(learning_rate=0.01)))
    artifact.save(folder, encoder, model.eval(), config)
    return folder


def offline(loaded: artifact.Artifact, many: list[Request]) -> npt.NDArray[np.float64]:
    """What evaluation says of every row; rows whose values are of the same types go together, as in a column."""
    rows = [{**context, **row} for context, candidates in many for row in candidates]
    kinds: dict[tuple[type, ...], list[int]] = {}
    for at, row in enumerate(rows):
        kinds.setdefault(tuple(type(value) for value in row.values()), []).append(at)
    found = np.full(len(rows), np.nan)
    for places in kinds.values():
        found[places] = loaded.predict([rows[at] for at in places])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_ten_thousand_rows(name: str, tmp_path: Path) -> None:
    folder = prepare(name, tmp_path / "artifact")
    many = (with_histories if PRESETS[name].needs_history else requests)(REQUESTS, CANDIDATES)
    (tmp_path / "requests.json").write_text(json.dumps(many))
    command = [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "requests.json")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert (found["unpickled"], found["control"], found["opened"], found["known"]) == (0, 1, [], [])
    shown = np.concatenate(found["scores"])
    assert shown.shape == (REQUESTS * CANDIDATES,)
    np.testing.assert_allclose(shown, offline(artifact.load(folder), many), rtol=0, atol=1e-6)
    assert len(np.unique(shown)) > 50
