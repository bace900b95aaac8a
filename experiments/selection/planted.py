"""What OptInter and OptFS make of planted pairs and values: ``python -m experiments.selection.planted``.

Writes planted.json and planted.md. Half a minute on one core.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
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
from ctrlib.embedding import FeatureEmbedding
from ctrlib.files import write_json
from ctrlib.interactions.mlp import MLP
from ctrlib.models.optinter import OptInter
from ctrlib.models.presets import COMPONENTS, preset
from ctrlib.optim import OptimizerConfig
from ctrlib.schema import CrossField, Schema, SparseField
from ctrlib.search.optfs import OptFSConfig, search_optfs
from ctrlib.search.optinter import OptInterConfig, search_optinter
from ctrlib.training import FitConfig

HERE = Path(__file__).resolve().parent
FIELDS = "abcde"
PAIRS = ("a*b", "a*c", "a*d", "b*c", "b*d", "c*d")
SEEDS = {"optinter": range(10), "optfs": range(5)}
PENALTIES = (1e-5, 1e-4, 1e-3)

TEXT = """# Planted pairs and values

`python -m experiments.selection.planted`; every seed has rows of its own. Seconds are CPU time of a search.

## OptInter: a pair that is a random table

Fields a, b, c, d of 20 values; P(y = 1) = σ(3 R[a, b]) with random signs R, so that a*b is of full rank and the other five
pairs mean nothing. 50,000 rows, read once, in batches of 100. Right is: a*b memorised, the other pairs naive.

| seed | a*b | naive of the other five | seconds |
|---|---|---|---|
{pairs}
Right in {right} of {count} seeds.

## OptFS: values that say nothing

Fields a to e of 50 values each; values of a and b move the log-odds of the label, each by N(0, 1.5²), those of c, d, e do not.
Each vocabulary has 10 more values, in no training row. 100,000 rows, batches of 500, 5 epochs, rewinding to the first. Mean ±
standard deviation over {seeds} seeds of the share of values that is kept:

| λ | informative | noise | in no row | seconds |
|---|---|---|---|---|
{values}
The noise that a small λ keeps is learned by heart: the five epochs have the same rows.
"""


def _label(rng: np.random.Generator, logit_N: np.ndarray[Any, np.dtype[np.float64]]) -> pa.Array:
    return pa.array((rng.random(len(logit_N)) < 1 / (1 + np.exp(-logit_N))).astype(np.int64))


def pairs(folder: Path, seed: int) -> dict[str, Any]:
    """The choices of OptInter on rows of the first law."""
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], (20, 20))
    x_NF = rng.integers(0, 20, (50_000, 4))
    columns = {name: x_NF[:, i] for i, name in enumerate("abcd")}
    table = pa.table({**columns, "y": _label(rng, 3 * signs[x_NF[:, 0], x_NF[:, 1]])})
    crosses = [CrossField(name="*".join(two), of=two) for two in combinations("abcd", 2)]
    schema = Schema(fields=(*(SparseField(name=name) for name in "abcd"), *crosses), labels=("y",))
    store = Store.create(folder, Encoder.fit(schema, open_source(table)), {"train": open_source(table)})
    model = OptInter.Config(
        embedding=FeatureEmbedding.Config(dim=2, init_std=0.1), pair_dim=2, mlp=MLP.Config(hidden_units=(16,)), arch_gain=0.1
    )
    fit = FitConfig(optimizer=OptimizerConfig(embedding="dense", learning_rate=0.01, max_grad_norm=None))
    started = time.process_time()
    found = search_optinter(model, store, OptInterConfig.few_steps(), fit=fit, batch_size=100, seed=seed)
    assert found.pairs is not None
    return {"seed": seed, "choices": dict(found.pairs), "cpu_seconds": time.process_time() - started}


def values(folder: Path, seed: int) -> list[dict[str, Any]]:
    """The shares that OptFS keeps of rows of the second law, for every λ."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(0, 1.5, (2, 50))
    x_NF = rng.integers(0, 50, (100_000, 5))
    columns = {name: x_NF[:, i] for i, name in enumerate(FIELDS)}
    table = pa.table({**columns, "y": _label(rng, weights[0][x_NF[:, 0]] + weights[1][x_NF[:, 1]])})
    unseen = pa.table({**{name: np.arange(60) for name in FIELDS}, "y": np.zeros(60, np.int64)})
    schema = Schema(fields=tuple(SparseField(name=name) for name in FIELDS), labels=("y",))
    encoder = Encoder.fit(schema, pa.concat_tables([table, unseen]))
    store = Store.create(folder, encoder, {"train": open_source(table)})
    model = override(preset("dnn"), {"embedding.dim": "4", "interaction.hidden_units": "16"}, COMPONENTS)
    fit = FitConfig(optimizer=OptimizerConfig(learning_rate=0.01))
    results = []
    for penalty in PENALTIES:
        config = OptFSConfig(penalty=penalty, gamma=200, epochs=5, rewind=1)
        started = time.process_time()
        kept = search_optfs(model, store, config, fit=fit, batch_size=500, seed=seed).values
        seconds = time.process_time() - started
        assert kept is not None
        shares = {
            what: float(np.mean([kept[name][encoder.ids(name, list(among))].mean() for name in names]))
            for what, names, among in (
                ("informative", "ab", range(50)),
                ("noise", "cde", range(50)),
                ("unseen", FIELDS, range(50, 60)),
            )
        }
        results.append({"seed": seed, "penalty": penalty, **shares, "cpu_seconds": seconds})
    return results


def page(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """planted.md."""
    lines, right = "", 0
    for found in results["optinter"]:
        naive = sum(found["choices"][name] == "naive" for name in PAIRS[1:])
        right += naive == 5 and found["choices"]["a*b"] == "memorize"
        lines += f"| {found['seed']} | {found['choices']['a*b']} | {naive} | {found['cpu_seconds']:.0f} |\n"
    shares = ""
    for penalty in PENALTIES:
        of = [found for found in results["optfs"] if found["penalty"] == penalty]
        cells = [f"{penalty:g}"]
        for what in ("informative", "noise", "unseen"):
            cells.append("{:.2f} ± {:.2f}".format(*_mean_std([found[what] for found in of])))
        cells.append(f"{statistics.fmean(found['cpu_seconds'] for found in of):.0f}")
        shares += f"| {' | '.join(cells)} |\n"
    return TEXT.format(pairs=lines, right=right, count=len(results["optinter"]), seeds=len(SEEDS["optfs"]), values=shares)


def _mean_std(numbers: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(numbers), statistics.stdev(numbers)


def main() -> None:
    """Run both, and write the page."""
    tune_cpu()
    results: dict[str, list[dict[str, Any]]] = {"optinter": [], "optfs": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS["optinter"]:
            results["optinter"].append(pairs(Path(folder) / f"pairs-{seed}", seed))
            print(results["optinter"][-1], flush=True)
        for seed in SEEDS["optfs"]:
            results["optfs"] += values(Path(folder) / f"values-{seed}", seed)
            print(*results["optfs"][-len(PENALTIES) :], sep="\n", flush=True)
    write_json(HERE / "planted.json", results)
    (HERE / "planted.md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
