"""Rankings of planted fields: ``python -m experiments.field_ranking.planted``.

100 fields, of which 20 move the label and 80 do not. Every method ranks them, with several seeds on the same rows, and on other
rows for every seed. Writes results.json and README.md. Some minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ctrlib.config import override
from ctrlib.cpu import tune_cpu
from ctrlib.data.encoder import Encoder
from ctrlib.data.source import open_source
from ctrlib.data.store import Store
from ctrlib.models.ctr import ModelComponent
from ctrlib.models.presets import COMPONENTS, preset
from ctrlib.optim import OptimizerConfig
from ctrlib.schema import Schema, SparseField
from ctrlib.search.auto_field import AutoFieldConfig, search_auto_field
from ctrlib.search.importance import (
    Engine,
    GBDTConfig,
    GradientConfig,
    PermutationConfig,
    search_gbdt,
    search_gradient,
    search_permutation,
)
from ctrlib.search.ranking import kendall_tau
from ctrlib.search.screening import Noise, OutRankConfig, search_outrank
from ctrlib.search.selection import Selection
from ctrlib.training import FitConfig

HERE = Path(__file__).resolve().parent
SEEDS = (0, 1, 2, 3, 4)
TOP = 20
SIGNALS, SIGNAL_VALUES, EFFECT = 20, 6, 0.45  # fields, values of each, standard deviation of its effect in logits
NOISE_VALUES = (4, 30, 200, 1000) * 20
ROWS = {"train": 10_000, "valid": 2_000}
FIT = FitConfig(epochs=3, patience=None, optimizer=OptimizerConfig(learning_rate=0.005))
BATCH = 128

INTRO = """# Which rankings find planted fields

`python -m experiments.field_ranking.planted`. 100 fields; 20 of 6 values move the log-odds of the label, each with a standard
deviation of 0.45, independently; 80 fields of 4 to 1,000 values mean nothing. 10,000 training and 2,000 validation rows.

Found: how many of the 20 are among the first 20, in each of 5 seeds, each with rows and effects of its own. τ: Kendall's, mean
over the 10 pairs of 5 seeds on the same rows, that is, how far the method agrees with itself; over all 100 fields, most of
which have no true order. Seconds: CPU time of a search.

Plain mutual information (`noise=none`) is there for comparison: it takes fields with many values for telling ones.

| method | model | found, by seed | at least | τ | seconds |
|---|---|---|---|---|---|
"""


def columns(rows: int, seed: int, part: int) -> dict[str, Any]:
    """``rows`` rows of the law ``seed``; other parts are independent rows."""
    law = np.random.default_rng([seed, 0])
    effect_SV = law.normal(size=(SIGNALS, SIGNAL_VALUES))
    effect_SV -= effect_SV.mean(axis=1, keepdims=True)
    effect_SV *= EFFECT / effect_SV.std(axis=1, keepdims=True)
    rng = np.random.default_rng([seed, 1, part])
    x_NS = rng.integers(0, SIGNAL_VALUES, (rows, SIGNALS))
    logit_N = effect_SV[np.arange(SIGNALS), x_NS].sum(axis=1) - 0.5
    fields = {f"signal_{i}": x_NS[:, i] for i in range(SIGNALS)}
    fields |= {f"noise_{i}": rng.integers(0, size, rows) for i, size in enumerate(NOISE_VALUES)}
    names = law.permutation(list(fields)).tolist()  # ties go to the first field, which should not be a telling one
    return {"label": (rng.random(rows) < 1 / (1 + np.exp(-logit_N))).astype(np.int64), **{name: fields[name] for name in names}}


def store(folder: Path, seed: int) -> Store:
    """The law ``seed``, encoded."""
    tables = {name: pa.table(columns(rows, seed, part)) for part, (name, rows) in enumerate(ROWS.items())}
    names = [name for name in tables["train"].column_names if name != "label"]
    schema = Schema(fields=tuple(SparseField(name=name) for name in names), labels=("label",))
    encoder = Encoder.fit(schema, open_source(tables["train"]))
    return Store.create(folder, encoder, {name: open_source(table) for name, table in tables.items()})


def found(selection: Selection) -> int:
    """How many of the kept fields tell something."""
    return sum(name.startswith("signal_") for name in selection.fields or ())


def _model(name: str) -> ModelComponent.Config:
    options = {"embedding.init_std": "0.1"}
    if name == "deepfm":
        options |= {"embedding.dim": "4", "interaction.streams.1.hidden_units": "8", "interaction.streams.1.dropout": "0.2"}
    return override(preset(name), options, COMPONENTS)


def outrank(data: Store, seed: int, noise: Noise = "permute") -> Selection:
    """By mutual information."""
    return search_outrank(data, OutRankConfig(top=TOP, noise=noise), seed=seed)


def permutation(data: Store, seed: int, model: str) -> Selection:
    """By the drop of the AUC."""
    return search_permutation(_model(model), data, PermutationConfig(top=TOP), fit=FIT, batch_size=BATCH, seed=seed)


def gradient(data: Store, seed: int, model: str) -> Selection:
    """By SHARK's F-permutation."""
    return search_gradient(_model(model), data, GradientConfig(top=TOP), fit=FIT, batch_size=BATCH, seed=seed)


def gbdt(data: Store, seed: int, engine: Engine) -> Selection:
    """By the gain of trees."""
    return search_gbdt(data, GBDTConfig(top=TOP, engine=engine), seed=seed)


def auto_field(data: Store, seed: int) -> Selection:
    """By AutoField; 10,000 rows are 63 steps a pass, so the logits learn in every step, and fast."""
    config = AutoFieldConfig(top=TOP, epochs=5, learning_rate=0.05, update_every=1, temperature_step=1e-3)
    return search_auto_field(_model("deepfm"), data, config, fit=FIT, batch_size=BATCH, seed=seed)


METHODS: Mapping[tuple[str, str], Callable[[Store, int], Selection]] = {
    ("outrank", ""): outrank,
    ("outrank, noise=exact", ""): lambda data, seed: outrank(data, seed, "exact"),
    ("outrank, noise=shift", ""): lambda data, seed: outrank(data, seed, "shift"),
    ("outrank, noise=none", ""): lambda data, seed: outrank(data, seed, "none"),
    ("permutation", "lr"): lambda data, seed: permutation(data, seed, "lr"),
    ("permutation", "deepfm"): lambda data, seed: permutation(data, seed, "deepfm"),
    ("gradient", "lr"): lambda data, seed: gradient(data, seed, "lr"),
    ("gradient", "deepfm"): lambda data, seed: gradient(data, seed, "deepfm"),
    ("gbdt", "LightGBM"): lambda data, seed: gbdt(data, seed, "lightgbm"),
    ("gbdt", "scikit-learn"): lambda data, seed: gbdt(data, seed, "scikit-learn"),
    ("autofield", "deepfm"): auto_field,
}


def measure(method: Callable[[Store, int], Selection], stores: Sequence[Store]) -> dict[str, Any]:
    """A method on the rows of every seed, and with every seed on the rows of the first."""
    started = time.process_time()
    own = [found(method(data, seed)) for seed, data in zip(SEEDS, stores, strict=True)]
    seconds = (time.process_time() - started) / len(SEEDS)
    scores = [method(stores[0], seed).scores for seed in SEEDS]
    taus = [kendall_tau(a, b) for a, b in combinations(scores, 2)]
    return {"found": own, "tau": taus, "cpu_seconds": seconds}


def page(results: Sequence[Mapping[str, Any]]) -> str:
    """README.md."""
    lines = []
    for r in results:
        cells = [r["method"], r["model"], ", ".join(map(str, r["found"])), str(min(r["found"]))]
        cells += [f"{statistics.fmean(r['tau']):.2f}", f"{r['cpu_seconds']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |\n")
    return INTRO + "".join(lines)


def main() -> None:
    """Measure every method and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the results")
    out: Path = parser.parse_args().out
    tune_cpu()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        stores = [store(Path(folder) / str(seed), seed) for seed in SEEDS]
        for (method, model), run in METHODS.items():
            results.append({"method": method, "model": model, **measure(run, stores)})
            print(results[-1]["method"], model, results[-1]["found"], f"{results[-1]['cpu_seconds']:.1f} s", flush=True)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / "README.md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
