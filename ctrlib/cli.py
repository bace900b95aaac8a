"""The command line. Every command is one function of :mod:`ctrlib.experiment`; this file only reads options and prints."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ctrlib import experiment, nodes, scoring
from ctrlib.config import ConfigError
from ctrlib.cpu import tune_cpu
from ctrlib.data.graph import GraphOptions
from ctrlib.data.split import SplitBy
from ctrlib.files import json_text, write_json
from ctrlib.models.catgcn import NODE_FLAVOURS, NODE_MODELS
from ctrlib.models.presets import PRESETS
from ctrlib.ranking import TOLERANCE
from ctrlib.schema import DataError
from ctrlib.search import screen as screening
from ctrlib.search import select as selecting
from ctrlib.search.select import METHODS

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Click-through-rate models: from a Parquet or CSV file to a trained, evaluated, saved model.",
)

Label = Annotated[list[str] | None, typer.Option("--label", help="Label column of 0s and 1s; repeat for several.")]
SchemaFile = Annotated[Path | None, typer.Option("--schema", help="Schema JSON; without it the fields are inferred.")]
Valid = Annotated[str | None, typer.Option(help="Validation rows; without it they are cut from the data.")]
Test = Annotated[str | None, typer.Option(help="Test rows; without it they are cut from the data.")]
Split = Annotated[str, typer.Option(help="How rows are cut: auto (time if known, else random), time, random, order.")]
Shares = Annotated[str, typer.Option(help="Shares of training, validation and test rows, where they are cut.")]
Group = Annotated[str | None, typer.Option(help="Column that groups rows for GAUC, usually the user.")]
Time = Annotated[str | None, typer.Option(help="Time column, for the split.")]
Weight = Annotated[str | None, typer.Option(help="Column of row weights.")]
Out = Annotated[Path, typer.Option(help="Folder to write; must not exist.")]
Crosses = Annotated[
    int | None,
    typer.Option("--cross-min-count", help="Cross every two fields of categories; value pairs seen fewer times are OOV."),
]
CrossMax = Annotated[
    int | None, typer.Option("--cross-max-size", help="Cross every two fields, and keep so many value pairs of each cross.")
]
CrossHash = Annotated[
    int | None, typer.Option("--cross-hash-size", help="Cross every two fields, and hash the value pairs of each into so many.")
]
CrossMemory = Annotated[
    float | None, typer.Option("--cross-memory-mb", help="What all crosses may take in training; default: what is free.")
]
Flavour = Annotated[str, typer.Option(help="paper, fuxictr or official.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="path.to.option=value, e.g. fit.optimizer.learning_rate=3e-4; repeat.")
]
Epochs = Annotated[int | None, typer.Option(help="At most this many epochs.")]
Seed = Annotated[int, typer.Option(help="Seed of initial weights, dropout, row order and random splits.")]


def main() -> None:
    """Run the command line; a bad option, bad data or a full disk is one line on standard error and exit status 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    tune_cpu()
    try:
        app()
    except (DataError, ConfigError, FloatingPointError, OSError) as error:  # OSError: the disk is full, and the like
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _data_options(
    label: list[str] | None,
    schema: Path | None,
    valid: str | None,
    test: str | None,
    split: str,
    shares: str,
    group: str | None,
    time: str | None,
    weight: str | None,
    seed: int,
    stream: bool = False,
    crosses: int | None = None,
    cross_max: int | None = None,
    cross_hash: int | None = None,
    cross_memory: float | None = None,
) -> experiment.DataOptions:
    ways: dict[str, SplitBy] = {"auto": "auto", "time": "time", "random": "random", "order": "order"}
    if split not in ways:
        raise ConfigError(f"--split is {split!r}; expected one of {', '.join(ways)}")
    return experiment.DataOptions(
        label=tuple(label) if label else None,
        schema=schema,
        valid=valid,
        test=test,
        split=ways[split],
        shares=_shares(shares),
        group=group,
        time=time,
        weight=weight,
        seed=seed,
        stream=stream,
        cross_min_count=crosses,
        cross_max_size=cross_max,
        cross_hash_size=cross_hash,
        cross_memory_mb=cross_memory,
    )


def _shares(text: str) -> dict[str, float]:
    try:
        train, validation, testing = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--shares is {text!r}; expected three numbers such as 0.8,0.1,0.1") from error
    return {"train": train, "valid": validation, "test": testing}


def _given(options: Mapping[str, object]) -> str:
    """The names of those that were given; 0 is given too."""
    return ", ".join(option for option, value in options.items() if value is not None and value is not False)


def _assignments(option: str, items: list[str] | None) -> dict[str, str]:
    """``["a=1", "b=2"]`` by name."""
    found: dict[str, str] = {}
    for item in items or []:
        name, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"{option} {item!r} has no '='; expected name=value")
        found[name.strip()] = value.strip()
    return found


@app.command()
def demo(
    rows: Annotated[int, typer.Option(help="Rows of training, validation and test data together.")] = 600_000,
    out: Out = Path("demo"),
    seed: Seed = 0,
) -> None:
    """Make synthetic Criteo-shaped data with planted interactions, train a model on it, and compare with the truth."""
    result = experiment.demo(out, rows=rows, seed=seed)
    _print_report(result["run"])
    truth, auc, linear = result["truth"]["test"], result["run"]["test"]["auc"], result["lr"]["test"]["auc"]
    bayes, additive = truth["bayes_auc"], truth["additive_auc"]
    print(f"test AUC: {auc:.4f}; no model can beat {bayes:.4f} (Bayes), and none without interactions {additive:.4f}")
    gain, planted = auc - linear, bayes - additive
    print(f"above logistic regression ({linear:.4f}): {gain:+.4f}; the planted interactions are worth {planted:+.4f}")
    print(f"data, run and logistic regression are in {out}")


@app.command()
def prepare(
    data: Annotated[str, typer.Argument(help="Training rows: .parquet, .csv or .tsv file, folder or glob.")],
    out: Out,
    label: Label = None,
    schema: SchemaFile = None,
    valid: Valid = None,
    test: Test = None,
    split: Split = "auto",
    shares: Shares = "0.8,0.1,0.1",
    group: Group = None,
    time: Time = None,
    weight: Weight = None,
    crosses: Crosses = None,
    cross_max: CrossMax = None,
    cross_hash: CrossHash = None,
    cross_memory: CrossMemory = None,
    seed: Seed = 0,
) -> None:
    """Encode raw data once into a store that `train` reads."""
    crossing = crosses, cross_max, cross_hash, cross_memory
    options = _data_options(label, schema, valid, test, split, shares, group, time, weight, seed, False, *crossing)
    store = experiment.prepare(data, out, options)
    for name, rows in store.rows.items():
        print(f"{name:<6} {rows:>12,} rows")
    layout = store.encoder.layout
    values = sum(v.size for v in store.encoder.vocabularies.values())
    print(f"{len(layout.names)} fields, {values:,} ids; schema: {out / 'schema.json'}")


@app.command()
def train(
    model: Annotated[str, typer.Option(help="A name from `ctrlib models`.")],
    out: Out,
    data: Annotated[
        str | None, typer.Argument(help="Raw rows (.parquet, .csv, .tsv, folder, glob) or a prepared store; or --nodes.")
    ] = None,
    label: Label = None,
    schema: SchemaFile = None,
    valid: Valid = None,
    test: Test = None,
    split: Split = "auto",
    shares: Shares = "0.8,0.1,0.1",
    group: Group = None,
    time: Time = None,
    weight: Weight = None,
    flavour: Annotated[
        str | None, typer.Option(help="paper (default), fuxictr or official; of nodes released_code (default) or paper.")
    ] = None,
    set_: Settings = None,
    epochs: Epochs = None,
    node_table: Annotated[
        str | None, typer.Option("--nodes", help="Nodes of a graph instead of rows: id, features, label.")
    ] = None,
    edges: Annotated[str | None, typer.Option(help="Edges between the nodes.")] = None,
    node_id: Annotated[str | None, typer.Option("--id", help="Column that names nodes; default: id.")] = None,
    ends: Annotated[str | None, typer.Option(help="Columns of both ends of an edge; default: source,target.")] = None,
    node_split: Annotated[str | None, typer.Option("--split-column", help="Column of nodes: train, valid or test.")] = None,
    symmetrize: Annotated[bool, typer.Option("--symmetrize", help="Forget the directions of directed edges.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Encode while training instead of writing a store first.")] = False,
    crosses: Crosses = None,
    cross_max: CrossMax = None,
    cross_hash: CrossHash = None,
    cross_memory: CrossMemory = None,
    seed: Seed = 0,
) -> None:
    """Train, evaluate and save one model, of rows or of the nodes of a graph."""
    if node_table is not None or edges is not None:
        if node_table is None or edges is None or data is not None or label is None or len(label) != 1:
            raise ConfigError("a graph is given by --nodes FILE --edges FILE --label COLUMN, without other data")
        of_rows: dict[str, object] = {
            "--valid": valid,
            "--test": test,
            "--group": group,
            "--time": time,
            "--weight": weight,
            "--stream": stream,
            "--split": None if split == "auto" else split,
        }
        of_rows |= {"--cross-min-count": crosses, "--cross-max-size": cross_max, "--cross-hash-size": cross_hash}
        if given := _given(of_rows | {"--cross-memory-mb": cross_memory}):
            raise ConfigError(f"{given} is for rows, not for nodes; name the nodes of each split by --split-column")
        ends = "source,target" if ends is None else ends
        source, comma, target = ends.partition(",")
        if not comma:
            raise ConfigError(f"--ends is {ends!r}; expected two columns such as source,target")
        graph = GraphOptions(
            label=label[0],
            id="id" if node_id is None else node_id,
            source=source,
            target=target,
            schema=schema,
            split=node_split,
            shares=_shares(shares),
            symmetrize=symmetrize,
            seed=seed,
        )
        settings = nodes.configure_nodes(model, flavour, _assignments("--set", set_), epochs)
        report = nodes.train_nodes(node_table, edges, settings, out, graph, name=model, seed=seed)
        _print_report(report)
        print(f"saved to {out} (artifact, graph, config.json, history.jsonl, metrics.json)")
        if report["interrupted"]:
            sys.exit(130)
        return
    if data is None:
        raise ConfigError("there is no data; name a file of rows, or --nodes and --edges")
    if given := _given({"--id": node_id, "--ends": ends, "--split-column": node_split, "--symmetrize": symmetrize}):
        raise ConfigError(f"{given} is for nodes, not for rows; give --nodes and --edges, or cut rows by --split")
    config = experiment.configure(model, flavour or "paper", _assignments("--set", set_), epochs)
    crossing = crosses, cross_max, cross_hash, cross_memory
    options = _data_options(label, schema, valid, test, split, shares, group, time, weight, seed, stream, *crossing)
    report = experiment.train(data, config, out, options, name=model, seed=seed)
    _print_report(report)
    print(f"saved to {out} (artifact, config.json, history.jsonl, metrics.json)")
    if report["interrupted"]:
        sys.exit(130)


@app.command()
def select(
    data: Annotated[str, typer.Argument(help="Raw rows (.parquet, .csv, .tsv, folder, glob) or a prepared store.")],
    method: Annotated[str, typer.Option(help=", ".join(METHODS) + ".")],
    model: Annotated[str, typer.Option(help="A name from `ctrlib models`.")],
    out: Annotated[Path, typer.Option(help="Folder to write; an interrupted selection goes on where it stopped.")],
    label: Label = None,
    schema: SchemaFile = None,
    valid: Valid = None,
    test: Test = None,
    split: Split = "auto",
    shares: Shares = "0.8,0.1,0.1",
    group: Group = None,
    time: Time = None,
    weight: Weight = None,
    crosses: Crosses = None,
    cross_max: CrossMax = None,
    cross_hash: CrossHash = None,
    cross_memory: CrossMemory = None,
    flavour: Flavour = "paper",
    set_: Settings = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="name=value of the method, e.g. penalty=1e-4; repeat.")
    ] = None,
    top: Annotated[
        str | None, typer.Option(help="Fields to keep, for methods that rank them: a number, or a share such as 0.5.")
    ] = None,
    epochs: Epochs = None,
    search_batch_size: Annotated[
        int | None, typer.Option(help="Rows a step of the search; default: as in training. Fewer rows make more steps.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds: of the search, and of the models before and after.")] = 3,
    curve: Annotated[bool, typer.Option(help="Also train models of other sizes and draw AUC against size.")] = True,
    seed: Seed = 0,
) -> None:
    """Find the fields, values or pairs of fields that a model needs, and re-train it with these."""
    config = experiment.configure(model, flavour, _assignments("--set", set_), epochs)
    crossing = crosses, cross_max, cross_hash, cross_memory
    options = _data_options(label, schema, valid, test, split, shares, group, time, weight, seed, False, *crossing)
    report = selecting.select(
        data,
        config,
        out,
        options,
        method=method,
        top=None if top is None else _top(top),
        settings=_assignments("--option", option),
        name=model,
        search_batch_size=search_batch_size,
        seeds=seeds,
        first_seed=seed,
        curve=curve,
    )
    print(selecting.table(report), end="")
    print(f"\nsaved to {out} (selection/, before/, after/, report.json, report.md{', curve.png' if curve else ''})")


@app.command()
def screen(
    data: Annotated[str, typer.Argument(help="Raw rows (.parquet, .csv, .tsv, folder, glob) or a prepared store.")],
    label: Label = None,
    schema: SchemaFile = None,
    valid: Valid = None,
    test: Test = None,
    split: Split = "auto",
    shares: Shares = "0.8,0.1,0.1",
    group: Group = None,
    time: Time = None,
    weight: Weight = None,
    order: Annotated[int, typer.Option(help="2 or 3 also looks at combinations of so many fields.")] = 1,
    redundancy: Annotated[bool, typer.Option("--redundancy", help="Also order the fields by 3MR.")] = False,
    subsampling: Annotated[int, typer.Option(help="Read every n-th training row.")] = 1,
    dim: Annotated[int, typer.Option(help="Width of vectors, for the memory of tables.")] = 16,
    out: Annotated[Path | None, typer.Option(help="Also write the report to this JSON file.")] = None,
    seed: Seed = 0,
) -> None:
    """Rank fields before any model; flag leaks, constants, copies and drift; predict the memory of tables."""
    options = _data_options(label, schema, valid, test, split, shares, group, time, weight, seed)
    config = screening.ScreenConfig(order=order, redundancy=redundancy, subsampling=subsampling, dim=dim)
    report = screening.screen(data, options, config=config, seed=seed)
    print(screening.table(report), end="")
    if out is not None:
        write_json(out, report)


@app.command()
def search(
    data: Annotated[str, typer.Argument(help="Raw rows (.parquet, .csv, .tsv, folder, glob) or a prepared store.")],
    out: Annotated[Path, typer.Option(help="Folder to write; with --resume, of the search to go on with.")],
    budget: Annotated[str | None, typer.Option(help="Time for all of it, e.g. 90s, 30m, 2h.")] = None,
    trials: Annotated[int | None, typer.Option(help="At most so many trials.")] = None,
    models: Annotated[str | None, typer.Option(help="Names from `ctrlib models`, and blocks; separated by commas.")] = None,
    metric: Annotated[str, typer.Option(help="log_loss or auc, of the validation rows.")] = "log_loss",
    method: Annotated[str, typer.Option(help="hedged, tpe or random.")] = "hedged",
    latency_ms: Annotated[float | None, typer.Option(help="Leave out models that take longer for 100 rows.")] = None,
    storage: Annotated[
        str | None, typer.Option(help="postgresql://… or sqlite:///…, shared by machines; default: a file in --out.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes on this machine.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search at --out.")] = False,
    finalists: Annotated[int, typer.Option(help="Best settings that are trained again and compared.")] = 5,
    finish_seeds: Annotated[int, typer.Option(help="With so many seeds each.")] = 3,
    label: Label = None,
    schema: SchemaFile = None,
    valid: Valid = None,
    test: Test = None,
    split: Split = "auto",
    shares: Shares = "0.8,0.1,0.1",
    group: Group = None,
    time: Time = None,
    weight: Weight = None,
    seed: Seed = 0,
) -> None:
    """Find the model and its settings that do best within a budget, and train it."""
    tuning = _tuning()
    config = tuning.SearchConfig(
        metric=metric,
        method=method,
        models=tuning.MODELS if models is None else tuple(name.strip() for name in models.split(",") if name.strip()),
        budget=None if budget is None else tuning.seconds_of(budget),
        trials=trials,
        latency_ms=latency_ms,
        finalists=finalists,
        finish_seeds=finish_seeds,
        seed=seed,
    )
    options = _data_options(label, schema, valid, test, split, shares, group, time, weight, seed)
    report = tuning.search(data, out, options, config=config, storage=storage, workers=workers, resume=resume)
    best, found = report["leaderboard"][0], report["test"]
    print((out / "report.md").read_text(encoding="utf-8"))
    print(f"best: {best['name']}, test AUC {found['auc']['mean']:.5f}, log loss {found['log_loss']['mean']:.5f}")
    print(f"saved to {out} (best/, finish/, report.html, report.json, report.md, curve.png)")


def _tuning() -> Any:
    """The module that needs optuna."""
    try:
        from ctrlib.search import tuning
    except ImportError as error:
        raise ConfigError(f"the search needs optuna ({error}); pip install 'ctrlib[search]'") from error
    return tuning


def _top(text: str) -> int | float:
    try:
        return float(text) if "." in text else int(text)
    except ValueError as error:
        raise ConfigError(f"--top is {text!r}; expected a number of fields such as 20, or a share such as 0.5") from error


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help="A run or artifact folder.")],
    data: Annotated[str, typer.Argument(help="Raw rows with labels, or the store that the model was trained from.")],
    by: Annotated[str | None, typer.Option(help="Also print a table per value of this column; of lists, per length.")] = None,
) -> None:
    """Print the metrics of a saved model on new rows, as JSON; with --by, a table per segment."""
    report = experiment.evaluate_run(run, data, by=by)
    segments = report.pop("segments", None)
    print(json_text(report))
    if segments is not None:
        _print_segments(by or "", segments)


@app.command()
def predict(
    run: Annotated[str, typer.Argument(help="A run or artifact folder, or a run on nodes.")],
    out: Annotated[str, typer.Option(help="The Parquet file to write.")],
    data: Annotated[
        str | None, typer.Argument(help="Raw rows; of a run on nodes the new ones, or nothing for all known.")
    ] = None,
    edges: Annotated[str | None, typer.Option(help="Edges of the new nodes.")] = None,
) -> None:
    """Write the probabilities of raw rows, in their order; or those of nodes, with their ids."""
    print(f"{scoring.predict_run(run, data, out, edges=edges):,} rows written to {out}")


@app.command()
def calibrate(
    run: Annotated[str, typer.Argument(help="A run or artifact folder.")],
    data: Annotated[str, typer.Argument(help="Validation rows with labels, or the store that the model was trained from.")],
    method: Annotated[str, typer.Option(help="auto, none, temperature, platt or isotonic.")] = "auto",
    sampling_rate: Annotated[float, typer.Option(help="Share of the negatives that was kept in training and in DATA.")] = 1.0,
    plot: Annotated[Path | None, typer.Option(help="Write the reliability before and after as PNG.")] = None,
) -> None:
    """Fit a calibration on validation rows, keep it in the artifact, and print the error before and after as JSON."""
    print(json_text(experiment.calibrate_run(run, data, method=method, sampling_rate=sampling_rate, plot=plot)))


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run or artifact folder.")],
    out: Out,
    format: Annotated[str, typer.Option(help="torch, aoti or onnx.")] = "torch",
    rows: Annotated[str, typer.Option(help="Of embedding tables: float32, bfloat16 or int8.")] = "float32",
) -> None:
    """Write the model as a program for other runtimes; nothing is written that does not score as the model does."""
    info = experiment.export_run(run, out, format, rows=rows)
    print(f"saved to {out}; probabilities of the check differ by at most {info['difference']:.1e} from the model's")


@app.command()
def verify(
    run: Annotated[str, typer.Argument(help="A run or artifact folder.")],
    data: Annotated[str, typer.Argument(help="Raw rows; with labels, AUC is compared too.")],
    exports: Annotated[list[str] | None, typer.Option("--export", help="A folder of ctrlib export; repeat.")] = None,
    rows: Annotated[int | None, typer.Option(help="Read at most so many.")] = None,
) -> None:
    """Score raw rows by every path and print the largest difference from evaluation; status 1 if one is above 1e-6."""
    report = experiment.verify_run(run, data, exports or [], rows=rows)
    width = max(map(len, report))
    for name, found in report.items():
        auc = f"  AUC {found['auc']:.6f} ({found['auc_change']:+.1e})" if "auc" in found else ""
        print(f"{name:<{width}}  {found['difference']:.1e}{auc}")
    if any(not found["difference"] <= TOLERANCE for found in report.values()):
        sys.exit(1)


@app.command()
def serve(
    run: Annotated[str, typer.Argument(help="A run or artifact folder, or a link to one; SIGHUP loads it again.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8080,
    threads: Annotated[int | None, typer.Option(help="Of torch; default: as it finds.")] = None,
) -> None:
    """Serve the model over HTTP: POST /rank and /score, GET /metadata, /metrics, /healthz, and a page to try it."""
    try:
        from ctrlib import service
    except ImportError as error:
        raise ConfigError("serving needs more packages; pip install 'ctrlib[serve]'") from error
    if threads is not None:
        tune_cpu(threads)
    service.serve(run, host=host, port=port)


@app.command()
def models(
    of_nodes: Annotated[
        bool, typer.Option("--nodes", help="Those of the nodes of a graph, for train --nodes --edges.")
    ] = False,
) -> None:
    """List the models by name."""
    if of_nodes:
        for name in NODE_MODELS:
            print(f"{name}  categorical features inside nodes, then edges  [{', '.join(NODE_FLAVOURS)}]  arXiv:2009.05303")
        return
    width = max(map(len, PRESETS))
    for name, preset in PRESETS.items():
        print(f"{name:<{width}}  {preset.description}  [{', '.join(preset.flavours)}]  {preset.paper}")


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="An experiment file, e.g. experiments/frappe/final_mlp.py.")],
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs; default runs/<experiment>.")] = None,
) -> None:
    """Reproduce a published result over several seeds."""
    folder = out or Path("runs") / file.resolve().parent.name / file.stem
    results = experiment.run_experiment(file, folder, seeds=seeds)
    for metric in ("auc", "log_loss"):
        found, published = results["test"][metric], results["published"].get(metric)
        print(f"test {metric:<9} {found['mean']:.6f} ± {found['std']:.6f} over {seeds} seeds (published {published})")
    if results["note"]:
        print(f"note: {results['note']}")
    print(f"results: {folder / 'results.json'}")


def _print_report(report: dict[str, Any]) -> None:
    rows = ", ".join(f"{name} {count:,}" for name, count in report["rows"].items())
    print(f"{report['model']}: {report['parameters']:,} parameters; rows: {rows}; best epoch {report['best_epoch']:g}")
    metrics = ("accuracy", "macro_f1", "auc", "gauc", "ndcg@10", "log_loss", "normalized_entropy", "ece", "copc")
    for split in ("valid", "test"):
        if split in report:
            print(f"{split:<6}" + "".join(f"  {m} {report[split][m]:.5f}" for m in metrics if m in report[split]))
    print(f"{report['seconds']:.1f} s, {report['rows_per_second']:,.0f} training rows/s, peak {report['peak_rss_mb']:,.0f} MB")


def _print_segments(by: str, segments: list[dict[str, Any]]) -> None:
    ranking = ("ndcg@10", "mrr", "hr@10", "recall@10", "auc@10")
    known = ("rows", "groups", "label_rate", "auc", "gauc", *ranking, "log_loss", "ece", "copc")
    columns = [column for column in known if column in segments[0]]
    names = [str(s["segment"]) for s in segments]
    width = max(map(len, [by, *names]))
    print(f"\n{by:<{width}}" + "".join(f"{c:>12}" for c in columns))
    for name, segment in zip(names, segments, strict=True):
        cells = "".join(f"{segment[c]:>12,}" if isinstance(segment[c], int) else f"{segment[c]:>12.5f}" for c in columns)
        print(f"{name:<{width}}{cells}")
