"""Search strategies on a log of public tuning runs: every run is a candidate, and trying it reveals its validation AUC.

Nothing is trained. What is measured is the code of ``ctrlib search``: :class:`ctrlib.search.hedge.Hedge` and its samplers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from ctrlib.schema import DataError
from ctrlib.search.hedge import Axis, Hedge, Places, locate, standardised, transfer

Floats = npt.NDArray[np.float64]
ROOT = Path(__file__).resolve().parents[1]
LOG = Path(os.environ.get("CTRLIB_DATA", ROOT.parent / "shared" / "data")) / "bars" / "tuning_log.csv"
EVALUATIONS = 12
_SMALLEST_GRID, _SMALLEST_PAST = 12, 6
# the parameters that the log names; the weights are prior knowledge: L2 explains most of the variance, then all the same
AXES: Mapping[str, Axis] = {
    "embedding_regularizer": Axis(low=1e-10, high=0.1, log=True, weight=6.75),
    "regularizer": Axis(low=1e-10, high=0.1, log=True, weight=6.75),
    "net_regularizer": Axis(low=1e-10, high=0.1, log=True, weight=2.25),
    "net_dropout": Axis(low=0.0, high=0.5),
    "batch_norm": Axis(low=0.0, high=1.0),
    "learning_rate": Axis(low=1e-4, high=1e-3, log=True),
    "batch_size": Axis(low=1000, high=10_000, log=True),
    "embedding_dim": Axis(low=10, high=100, log=True),
    "num_cross_layers": Axis(low=0, high=5),
    "num_heads": Axis(low=1, high=10, log=True),
}


@dataclass(frozen=True)
class Grid:
    """The runs of one model on one data set: what the log has of their settings, their validation AUC, and what the runs of
    other models on the same data would make one expect of each."""

    name: str
    params: Sequence[Mapping[str, float | None]]
    places: Places
    auc_N: Floats  # noqa: N815 (a shape suffix)
    prior_N: Floats  # noqa: N815 (a shape suffix)


@dataclass(frozen=True)
class Regrets:
    """Of one strategy: ``regret_GST``, best AUC of the grid less the best found in T trials, for every grid and seed."""

    name: str
    regret_GST: Floats  # noqa: N815 (a shape suffix)

    def mean(self, evaluations: int) -> float:
        return float(self.regret_GST[:, :, evaluations - 1].mean())

    def median(self, evaluations: int) -> float:
        """Of the grids, each the mean over its seeds."""
        return float(np.median(self.regret_GST[:, :, evaluations - 1].mean(axis=1)))

    def win_share(self, other: Regrets, evaluations: int) -> float:
        """Share of the grids on which the mean regret is lower than the other's; a tie is half a win."""
        mine, others = (r.regret_GST[:, :, evaluations - 1].mean(axis=1) for r in (self, other))
        return float((mine < others).mean() + 0.5 * (mine == others).mean())


Strategy = Callable[[Grid, int], list[int]]
"""A grid and a seed → the order in which its runs are tried, as far as it matters."""


def read_grids(path: Path = LOG) -> list[Grid]:
    """Every model and data set of the log with at least 12 runs that differ in something the log names.

    Runs without an embedding L2, and runs that repeat the validation AUC of another one to the last digit, are left out:
    the same run is listed more than once.

    Raises:
        DataError: no such file.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; the replay needs the log of BARS tuning runs (set CTRLIB_DATA)")
    nulls = pa.csv.ConvertOptions(null_values=[""], strings_can_be_null=True)
    rows = pa.csv.read_csv(path, convert_options=nulls)
    rows = rows.set_column(rows.column_names.index("batch_norm"), "batch_norm", pc.cast(rows["batch_norm"], pa.float64()))
    studies: dict[tuple[str, str], list[dict[str, object]]] = {}
    for row in rows.filter(pc.is_valid(rows["ds"])).to_pylist():
        studies.setdefault((row["ds"], row["exp_model"]), []).append(row)
    grids = []
    for (data, model), runs in sorted(studies.items()):
        unique = {row["val_auc"]: row for row in runs if row["embedding_regularizer"] is not None}
        chosen = list(unique.values())
        varied = any(len({row[name] for row in chosen} - {None}) > 1 for name in AXES)
        if len(chosen) < _SMALLEST_GRID or not varied:
            continue
        others = [rows for (d, m), rows in studies.items() if d == data and m != model and len(rows) >= _SMALLEST_PAST]
        places = locate(AXES, chosen)
        past = [(locate(AXES, rows), standardised(_auc(rows))) for rows in others]
        params = [{name: None if row[name] is None else float(row[name]) for name in AXES} for row in chosen]  # type: ignore[arg-type]
        grids.append(Grid(f"{data}/{model}", params, places, _auc(chosen), transfer(past, places)))
    return grids


def _auc(rows: Sequence[Mapping[str, object]]) -> Floats:
    return np.array([row["val_auc"] for row in rows], dtype=np.float64)


def hedged(options: Hedge | None = None) -> Strategy:
    """The strategy of ``--method hedged``."""
    hedge = options or Hedge()

    def run(grid: Grid, seed: int) -> list[int]:
        rng = np.random.default_rng(seed)
        tried: list[int] = []
        for _ in range(min(EVALUATIONS, len(grid.auc_N))):
            left = np.setdiff1d(np.arange(len(grid.auc_N)), tried)
            at = hedge.choose(
                grid.places[left], grid.prior_N[left], grid.places[tried], grid.prior_N[tried], grid.auc_N[tried], rng
            )
            tried.append(int(left[at]))
        return tried

    return run


def tpe(grid: Grid, seed: int) -> list[int]:
    """The strategy of ``--method tpe``: what Optuna's sampler asks for is the run nearest to it that was not tried yet."""
    import optuna

    from ctrlib.search.sampling import tpe_sampler

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # not a line for each of thousands of studies
    known = {name: axis for name, axis in AXES.items() if any(p[name] is not None for p in grid.params)}
    space: dict[str, optuna.distributions.BaseDistribution] = {
        name: optuna.distributions.FloatDistribution(axis.low, axis.high, log=axis.log) for name, axis in known.items()
    }
    study = optuna.create_study(direction="maximize", sampler=tpe_sampler(seed))
    tried: list[int] = []
    for _ in range(min(EVALUATIONS, len(grid.auc_N))):
        left = np.setdiff1d(np.arange(len(grid.auc_N)), tried)
        asked = locate(AXES, [study.ask(space).params])
        with np.errstate(invalid="ignore"):
            apart_NP = np.nan_to_num(np.abs(grid.places.numbers_NP[left] - asked.numbers_NP)) * asked.weight_P
        chosen = int(left[apart_NP.sum(axis=1).argmin()])
        tried.append(chosen)
        params = grid.params[chosen]
        inside = {
            name: min(max(value, known[name].low), known[name].high) for name, value in params.items() if value is not None
        }
        distributions = {name: space[name] for name in inside}
        study.add_trial(optuna.trial.create_trial(params=inside, distributions=distributions, value=float(grid.auc_N[chosen])))
    return tried


def replay(name: str, strategy: Strategy, grids: Sequence[Grid], seeds: int) -> Regrets:
    """The regrets of a strategy."""
    found = np.zeros((len(grids), seeds, EVALUATIONS))
    for g, grid in enumerate(grids):
        for seed in range(seeds):
            best = np.maximum.accumulate(grid.auc_N[strategy(grid, seed)])
            found[g, seed] = grid.auc_N.max() - best[np.minimum(np.arange(EVALUATIONS), len(best) - 1)]
    return Regrets(name, found)


def random_regrets(grids: Sequence[Grid]) -> Regrets:
    """Random search, exactly: the expectation over all orders, as one seed."""
    found = np.array([[_expected_regret(grid.auc_N, t) for t in range(1, EVALUATIONS + 1)] for grid in grids])
    return Regrets("random", found[:, None])


def _expected_regret(auc_N: Floats, evaluations: int) -> float:
    """Best of all less E[best of k drawn]: the i-th best is the best drawn with chance C(n−1−i, k−1)/C(n, k)."""
    best_first, count = np.sort(auc_N)[::-1], len(auc_N)
    evaluations = min(evaluations, count)
    chances = [math.comb(count - 1 - i, evaluations - 1) / math.comb(count, evaluations) for i in range(count)]
    return float(best_first[0] - math.fsum(c * a for c, a in zip(chances, best_first, strict=True)))
