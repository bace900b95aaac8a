"""OptFS and OptInter on real rows: ``python -m experiments.selection.run``.

Each case is ``ctrlib select`` with 3 seeds, and beside it what the smaller model has to be compared with. Writes a JSON for
every case into ``results/``, its curve beside it, and README.md. Runs are kept in ``--work``, so that the command goes on where
it stopped. Test rows are read by the runs alone. Reads ``$CTRLIB_DATA`` (default ``../shared/data``).
"""

from __future__ import annotations

import argparse
import json
import runpy
import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ctrlib.cpu import tune_cpu
from ctrlib.data.store import Store
from ctrlib.data.vocabulary import Vocabulary
from ctrlib.experiment import DataOptions, RunConfig, configure, prepare, train
from ctrlib.files import write_json
from ctrlib.models.optinter import OptInter
from ctrlib.search.optfs import OptFSConfig, control_weights
from ctrlib.search.optinter import OptInterConfig, search_optinter
from ctrlib.search.select import kept_line, method_options, select
from ctrlib.search.selection import Selection, apply_to_store
from experiments.criteo.samples import sources
from experiments.frappe import common as frappe

HERE = Path(__file__).resolve().parent
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Case:
    """A selection on some rows.

    Attributes:
        title: for the page.
        rows: makes the store in this folder, with crosses of at least this count.
        run: of the model before, and after.
        method: see :data:`ctrlib.search.select.METHODS`.
        settings: its options.
        search_batch_size: rows a step of the search.
        others: backbones that get the same values (OptFS).
        brief: only the model before and after; no curve, and nothing beside them.
    """

    title: str
    rows: Callable[[Path, int | None], Store]
    run: Callable[[], RunConfig]
    method: str
    settings: Mapping[str, str]
    name: str
    search_batch_size: int | None = None
    cross_min_count: int | None = None
    others: Mapping[str, Callable[[], RunConfig]] = field(default_factory=dict)
    brief: bool = False


def _frappe(folder: Path, cross_min_count: int | None) -> Store:
    raw = frappe.data()
    parts = {split: raw / f"{split}.parquet" for split in ("train", "valid", "test")}
    options = DataOptions(schema=raw / "schema.json", valid=parts["valid"], test=parts["test"], cross_min_count=cross_min_count)
    return prepare(parts["train"], folder, options)


def _criteo(folder: Path, cross_min_count: int | None) -> Store:
    with tempfile.TemporaryDirectory() as scratch:
        data, options = sources(Path(scratch))["criteo-kaggle"]
        return prepare(str(data), folder, replace(options, cross_min_count=cross_min_count))


def _published(model: str) -> Callable[[], RunConfig]:
    """The run of an experiment on Frappe."""

    def run() -> RunConfig:
        config: RunConfig = runpy.run_path(str(HERE.parent / "frappe" / f"{model}.py"))["experiment"]().config
        return config

    return run


def _optinter_on_frappe() -> RunConfig:
    """OptInter with the widths and the training of the models of BARS."""
    config = _published("dnn")()
    options = {
        "model.embedding.dim": "10",
        "model.embedding.init_std": "0.01",
        "model.mlp.hidden_units": "400,400,400",
        "model.mlp.dropout": "0.2",
    }
    return replace(config, model=configure("optinter", options=options).model)


def _optinter_on_criteo() -> RunConfig:
    return configure("optinter", options={"model.mlp.hidden_units": "256,128", "model.mlp.dropout": "0.3"})


# Rates for some thousand steps, see OptFSConfig.learning_rate and OptInterConfig.few_steps. Tried on validation rows of Frappe
# with seed 0: batches of 4096 and 512, rates of gates from 5e-4 to 5e-2, penalties from 1e-6 to 1e-4. Small batches and a slow
# rate lose least at the same size.
OPTFS = {"penalty": "1e-5", "learning_rate": "1e-3", "epochs": "10"}
OPTFS_STRONG = {"penalty": "2e-5", "learning_rate": "5e-4", "epochs": "20"}
OPTINTER = {"learning_rate": "1e-2", "floor": "0.1", "rate": "null"}

CASES: Mapping[str, Case] = {
    "frappe_optfs_deepfm": Case(
        title="OptFS on Frappe_x1, DeepFM",
        rows=_frappe,
        run=_published("deepfm"),
        method="optfs",
        settings=OPTFS,
        name="deepfm",
        search_batch_size=512,
        others={"dcn": _published("dcn")},
    ),
    "frappe_optfs_deepfm_strong": Case(
        title="OptFS on Frappe_x1, DeepFM, a larger penalty",
        rows=_frappe,
        run=_published("deepfm"),
        method="optfs",
        settings=OPTFS_STRONG,
        name="deepfm",
        search_batch_size=512,
        brief=True,
    ),
    "frappe_optinter": Case(
        title="OptInter on Frappe_x1",
        rows=_frappe,
        run=_optinter_on_frappe,
        method="optinter",
        settings=OPTINTER,
        name="optinter",
        cross_min_count=2,
    ),
    "criteo_optfs_deepfm": Case(
        title="OptFS on the Kaggle sample of Criteo, DeepFM",
        rows=_criteo,
        run=lambda: configure("deepfm"),
        method="optfs",
        settings=OPTFS,
        name="deepfm",
        others={"dcnv2": lambda: configure("dcnv2")},
    ),
    "criteo_optinter": Case(
        title="OptInter on the Kaggle sample of Criteo",
        rows=_criteo,
        run=_optinter_on_criteo,
        method="optinter",
        settings=OPTINTER,
        name="optinter",
        cross_min_count=10,
    ),
}


def run(case: Case, work: Path) -> dict[str, Any]:
    """What the JSON of a case holds: the report of ``select``, and the metrics of all runs by row of the table and seed."""
    data = work / "data"
    store = Store.open(data) if Store.is_store(data) else case.rows(data, case.cross_min_count)
    config = case.run().for_rows(store.rows["train"])
    report = select(
        store,
        config,
        work / "select",
        method=case.method,
        settings=case.settings,
        name=case.name,
        search_batch_size=case.search_batch_size,
        seeds=len(SEEDS),
        curve=not case.brief,
    )
    rows = {"before": report["before"]["runs"], "after": report["after"]["runs"]}
    for when in ("before", "after"):
        del report[when]["runs"]
    if not case.brief and case.method == "optfs":
        chosen = [Selection.load(work / "select" / "selection" / f"seed-{seed}") for seed in SEEDS]
        rows |= _against_optfs(case, store, config, chosen, work)
    elif not case.brief:
        rows |= _against_optinter(store, config, work)
    return {"title": case.title, "report": report, "rows": {name: [_short(r) for r in runs] for name, runs in rows.items()}}


def _against_optfs(
    case: Case, store: Store, config: RunConfig, chosen: Sequence[Selection], work: Path
) -> dict[str, list[dict[str, Any]]]:
    """The control, re-training from scratch, and other backbones on the same values."""
    options = method_options(case.method, settings=case.settings)
    assert isinstance(options, OptFSConfig)
    batch_size = case.search_batch_size or config.batch_size
    assert batch_size is not None
    rows: dict[str, list[dict[str, Any]]] = {}
    for seed, selection in zip(SEEDS, chosen, strict=True):
        start = control_weights(config.model, store, options, fit=config.fit, batch_size=batch_size, seed=seed)
        _add(rows, "control: all values, trained on from the weights of T_c epochs", store, config, work, seed, start)
        kept = _applied(selection, store, work / f"kept-{seed}")
        _add(rows, "selected, from random weights", kept, config, work, seed)
        frequent = _applied(most_frequent(selection, store), store, work / f"frequent-{seed}")
        _add(rows, "as many values, the most frequent, from random weights", frequent, config, work, seed)
        for name, make in case.others.items():
            other = make().for_rows(store.rows["train"])
            _add(rows, f"{name} on all values", store, other, work, seed)
            _add(rows, f"{name} on these values", kept, other, work, seed)
    return rows


def _applied(selection: Selection, store: Store, path: Path) -> Store:
    return Store.open(path) if Store.is_store(path) else apply_to_store(selection, store, path)


def most_frequent(selection: Selection, store: Store) -> Selection:
    """As many values as the selection keeps: those most frequent in training rows, of all its vocabularies, before OOV."""
    assert selection.values is not None
    vocabularies = {name: store.encoder.vocabularies[name] for name in selection.values}
    counts = [[-1, 0, *v.counts] for v in vocabularies.values() if isinstance(v, Vocabulary)]  # ids 0 and 1: padding, OOV
    order = np.argsort(-np.concatenate(counts), kind="stable")
    kept = np.zeros(len(order), bool)
    kept[order[: sum(int(mask.sum()) for mask in selection.values.values())]] = True
    masks = np.split(kept, np.cumsum([len(c) for c in counts])[:-1])
    values = dict(zip(vocabularies, masks, strict=True))
    return Selection(method="most_frequent", encoder_hash=selection.encoder_hash, values=values)


def _against_optinter(store: Store, config: RunConfig, work: Path) -> dict[str, list[dict[str, Any]]]:
    """All pairs alike, and choices drawn at random."""
    rows: dict[str, list[dict[str, Any]]] = {}
    assert config.batch_size is not None
    assert isinstance(config.model, OptInter.Config)
    for seed in SEEDS:
        for choice in ("factorize", "naive"):
            model = replace(config.model, choices=choice)
            _add(rows, f"all {choice}", store, replace(config, model=model), work, seed)
        drawn = search_optinter(
            config.model, store, OptInterConfig(method="random"), fit=config.fit, batch_size=config.batch_size, seed=seed
        )
        assert drawn.model is not None
        _add(rows, "random choices", store, replace(config, model=drawn.model), work, seed)
    return rows


def _add(
    rows: dict[str, list[dict[str, Any]]],
    row: str,
    store: Store,
    config: RunConfig,
    work: Path,
    seed: int,
    start: Mapping[str, Tensor] | None = None,
) -> None:
    """Append the report of a run to a row of the table."""
    out = work / "others" / "".join(c if c.isalnum() else "_" for c in row) / f"seed-{seed}"
    if not (out / "metrics.json").is_file() and train(store, config, out, name=row, seed=seed, start=start)["interrupted"]:
        shutil.rmtree(out)
        raise KeyboardInterrupt
    rows.setdefault(row, []).append(json.loads((out / "metrics.json").read_text(encoding="utf-8")))


def _short(report: Mapping[str, Any]) -> dict[str, Any]:
    return {k: report[k] for k in ("seed", "parameters", "epochs", "seconds", "valid", "test")}


def load() -> dict[str, dict[str, Any]]:
    """The committed results by case."""
    files = {name: HERE / "results" / f"{name}.json" for name in CASES}
    return {name: json.loads(f.read_text(encoding="utf-8")) for name, f in files.items() if f.is_file()}


INTRO = """# Selection on real rows

`python -m experiments.selection.run`: `ctrlib select` and what it is to be compared with, seeds 0, 1, 2; mean ± standard
deviation. Differences are to the first row, seed by seed. The test rows are read by the runs alone. Settings and all metrics of
all runs are in `results/`. What both methods do on rows whose law is known: [planted.md](planted.md).

* Frappe, OptInter: better than its own factorised and naive models and, on average, than choices drawn at random; its AUC is
  that of all pairs memorised, with a fifth fewer parameters, while its log loss varies more with the seed. On the sample of
  Criteo the models differ by no more than their seeds do.
* Frappe, OptFS: a seventh of the values goes without loss; two fifths do not. Negatives were drawn from all apps, so no app is
  rare, and apps are three quarters of the values.
* Sample of Criteo, OptFS: three tenths of the values go without loss. As many values chosen by frequency do as well.
* The values that OptFS keeps serve other backbones.
"""


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """README.md."""
    text = INTRO + "".join(_section(name, found) for name, found in results.items())
    missing = [name for name in CASES if name not in results]
    return text + (f"\nNot run yet: {', '.join(missing)}.\n" if missing else "")


def rows_table(found: Mapping[str, Any]) -> str:
    """A case's models, the first of them that of all values or pairs."""
    report = found["report"]
    text = "| | parameters | test AUC | difference | test log loss |\n|---|---|---|---|---|\n"
    first = found["rows"]["before"]
    titles = {"before": "all values" if report["keeps"] == "values" else "all pairs memorised", "after": "selected"}
    for row, runs in found["rows"].items():
        gains = [r["test"]["auc"] - b["test"]["auc"] for r, b in zip(runs, first, strict=True)]
        cells = [
            titles.get(row, row),
            f"{statistics.fmean(r['parameters'] for r in runs):,.0f}",
            _mean_std([r["test"]["auc"] for r in runs]),
            "" if row == "before" else _mean_std(gains, "+"),
            _mean_std([r["test"]["log_loss"] for r in runs]),
        ]
        text += f"| {' | '.join(cells)} |\n"
    return text


def _section(name: str, found: Mapping[str, Any]) -> str:
    report = found["report"]
    text = f"\n## {found['title']}\n\n{rows_table(found)}\n"
    for seed, kept in zip(report["seeds"], report["kept"], strict=True):
        text += f"* seed {seed} keeps {kept_line(kept)}\n"
    text += "".join(f"* agreement of the seeds, {what}: {value:.3f}\n" for what, value in report["agreement"].items())
    search, training = (min(report[f"{part}_seconds"]) for part in ("search", "train"))  # the least disturbed by other work
    times = f"{search / training:.2f} times as long as the quickest training of the first row"
    text += f"* the quickest search took {search:.0f} s, {times}\n"
    if report["compact_difference"] is not None:
        text += f"* small and gated model differ by at most {report['compact_difference']:.1e} in any logit\n"
    figure = f"\n![validation AUC against parameters](results/{name}.png)\n"
    return text + (figure if (HERE / "results" / f"{name}.png").is_file() else "")


def _mean_std(values: Sequence[float], sign: str = "") -> str:
    return f"{statistics.fmean(values):{sign}.5f} ± {statistics.stdev(values):.5f}"


def main() -> None:
    """Run the cases that are named, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--work", type=Path, default=Path("runs/selection"), help="folder of the runs")
    options = parser.parse_args()
    tune_cpu()
    (HERE / "results").mkdir(exist_ok=True)
    for name in options.cases:
        work = options.work / name
        write_json(HERE / "results" / f"{name}.json", run(CASES[name], work))
        if not CASES[name].brief:
            shutil.copyfile(work / "select" / "curve.png", HERE / "results" / f"{name}.png")
        (HERE / "README.md").write_text(page(load()), encoding="utf-8")


if __name__ == "__main__":
    main()
