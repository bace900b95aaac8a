"""Cold start on MovieLens-1M: ``python -m experiments.movielens_cold.run`` (heavy: every model with five seeds).

Writes a JSON for every model and seed into ``results/`` and the tables, README.md. What is there already is not run again, so
that the command goes on where it stopped. Reads ``$CTRLIB_DATA/movielens-1m`` (default ``../shared/data``).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctrlib import artifact
from ctrlib.batch import Batch
from ctrlib.config import ConfigError, to_json
from ctrlib.content_map import ContentMap
from ctrlib.cpu import tune_cpu
from ctrlib.data.store import Store
from ctrlib.embedding import FeatureEmbedding
from ctrlib.experiment import RunConfig, train
from ctrlib.files import json_text, write_json, write_text
from ctrlib.interactions.adaptive_fusion import AdaptiveFusion
from ctrlib.interactions.compose import Parallel
from ctrlib.interactions.fm import FM
from ctrlib.interactions.mlp import MLP
from ctrlib.models.contrastive import ContrastConfig, contrastive
from ctrlib.models.ctr import CTRModel, ModelComponent
from ctrlib.models.presets import preset
from ctrlib.models.two_tower import TwoTower
from ctrlib.optim import OptimizerConfig
from ctrlib.schema import DataError, suggest
from ctrlib.training import FitConfig
from experiments import seeds
from experiments.movielens_cold import data
from experiments.movielens_cold.baselines import BASELINES, content_ridge, smooth_content
from experiments.movielens_cold.ranking import POOLS, Floats, Score, evaluate

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
USERS = 500  # of each pool; all others rank the same
MAIN, RELATIONS = "contrastive", " + relations"
MAIN_LINE = MAIN + RELATIONS
METRICS = ("hr@10", "ndcg@10", "mrr", "recall@10", "hr@10 of 101")

_EMBEDDING = FeatureEmbedding.Config(dim=32, init_std=0.05)
_CONTENT = tuple(name for name in data.ITEM_FIELDS if name != data.TITLE)
_NO_TITLE = replace(_EMBEDDING, fields=(*data.USER_FIELDS, *_CONTENT))
_DROPOUT = replace(_NO_TITLE, dropout=0.2)
_FUSION = AdaptiveFusion.Config(dim=64)
_DEEP = MLP.Config(hidden_units=(128, 64), output_dim=1)
_CONTRAST = ContrastConfig(rows=256)
_OPTIMIZER = OptimizerConfig()
_NO_CONTRAST = replace(_CONTRAST, weight=0.0)
_ID_DROPOUT = 0.4
RIDGE, SHARE = 0.3, 0.5  # of the map from known items to cold ones
TUNE_SEEDS = (100, 101)


def _mf() -> ModelComponent.Config:
    """Matrix factorisation: FM of the two ids is ⟨v_u, v_i⟩ with biases."""
    config = preset("fm")
    assert isinstance(config, CTRModel.Config)
    return replace(config, embedding=replace(_EMBEDDING, fields=data.IDS))


def _deepfm(id_dropout: float = 0.0, embedding: FeatureEmbedding.Config = _NO_TITLE) -> ModelComponent.Config:
    """DeepFM, in which unseen ids are padding, and some known ones are dropped."""
    config = preset("deepfm")
    assert isinstance(config, CTRModel.Config)
    config = replace(config, embedding=embedding, interaction=Parallel.Config(streams=(FM.Config(), _DEEP), fusion="sum"))
    return contrastive(config, _NO_CONTRAST, id_fields=data.IDS, id_dropout=id_dropout)


def _towers(
    views: float = 0.0,
    unclicked: float = 0.0,
    id_dropout: float = 0.0,
    embedding: FeatureEmbedding.Config = _NO_TITLE,
) -> ModelComponent.Config:
    """Two fused sides, with contrastive losses of these weights."""
    return TwoTower.Config(
        embedding=embedding,
        item_fields=tuple(name for name in data.ITEM_FIELDS if name in (embedding.fields or data.ITEM_FIELDS)),
        user_tower=_FUSION,
        item_tower=_FUSION,
        contrast=replace(_CONTRAST, weight=views),
        unclicked_weight=unclicked,
        id_fields=data.IDS,
        id_dropout=id_dropout,
    )


MODELS: Mapping[str, Callable[[], ModelComponent.Config]] = {
    "mf": _mf,
    "deepfm": _deepfm,
    "fusion": _towers,
    "unclicked": partial(_towers, 0.0, 1.0),
    "contrastive": partial(_towers, 0.3, 1.0),
}
CANDIDATES: Mapping[str, Callable[[], ModelComponent.Config]] = {
    "deepfm": _deepfm,
    "deepfm, title": partial(_deepfm, embedding=_EMBEDDING),
    "deepfm, dropout": partial(_deepfm, embedding=_DROPOUT),
    "towers": _towers,
    "towers, unclicked 1": partial(_towers, 0.0, 1.0),
    "towers, unclicked 1, views .3": partial(_towers, 0.3, 1.0),
    "towers, unclicked 1, views .3, id dropout": partial(_towers, 0.3, 1.0, _ID_DROPOUT),
}
PENALTIES = (1.0, 3.0, 10.0, 30.0)  # of content_ridge
OPTIMIZERS: Mapping[str, OptimizerConfig] = {"mf": OptimizerConfig(embedding="adam")}
ID_BASED = ("mf", "deepfm")
PARTS = ("fusion", "unclicked")  # of the contrastive model
ORDER = (*BASELINES, *MODELS)

INTRO = """# Cold items and cold users of MovieLens-1M

`python -m experiments.movielens_cold.run`. Four stars or more are a positive. Of the items with a positive, 10 % are cold (no
training row has them), 10 % have few training positives (at most 5), 5 % are cold for validation; of the users 10 % are cold.
Of the other interactions with warm items 10 % are for test and 10 % for validation; the data at hand has no times. Items
that are not cold, but have no training positive left, are in no pool. Five seeds: each cuts the data anew and starts every
model anew.

Training rows are the positives and four random items for each, drawn alike from the items with a training positive;
validation rows, on which training stops by GAUC, are made the same way from held-out interactions with warm items and from
those with the items that are cold for validation. Test interactions are looked at once, after that.

Every test interaction is a query: its item against all items of its pool that the user likes in no row. The figures are means
over queries of at most {users:,} random users of each pool, then mean ± standard deviation over seeds. `recall@10` is a mean
over users, all of whose test items compete; `hr@10 of 101` is against 100 random items of the pool. Tied scores share their
places.

The models: *popularity* counts training positives, so cold items tie; *content_popularity* is the mean of that over the
twenty items with the most similar content; *content_knn* and *lightgbm* read content only, and so does *content_ridge*, a
ridge regression of what each user likes; *mf* reads ids only (its tables are trained by Adam, with which it ranks better than
with the Adagrad of the others); *deepfm* reads all but titles, with unseen ids as padding; its network is 128-64-1. *fusion*
is the product of an adaptive fusion of the user's fields and one of the item's. *unclicked* adds InfoNCE of the scores,
against the items of the unclicked rows of a batch, and *contrastive* also InfoNCE between views of the user and between views
of the item. *+ relations*: the score of a cold item is half its own, half what a ridge regression on content makes of the
scores of known items (`ctrlib.content_map`).

Fusion, losses and relations are our reconstruction of what the abstract of arXiv:2502.03664 names, whose text could not be
read. Nothing here is to be compared with figures of that paper. Choices are made by validation items that are cold, of cuts
by other seeds: see the candidates below.
"""


def scores_of(model: ModelComponent, store: Store, catalogue: data.Catalogue) -> Score:
    """Scores of all items for users, in evaluation mode."""
    encoder = store.encoder
    user_rows, item_rows = np.arange(catalogue.users.num_rows), np.arange(catalogue.items.num_rows)
    all_users = encoder.transform(data.table(catalogue, user_rows, np.zeros_like(user_rows)))
    all_items = encoder.transform(data.table(catalogue, np.zeros_like(item_rows), item_rows))
    if isinstance(model, TwoTower):
        user_UK, _ = model.vectors(all_users)
        _, item_IK = model.vectors(all_items)
        return lambda users: (user_UK[torch.from_numpy(users)] @ item_IK.T).double().numpy()
    names = [column.name for column in encoder.layout.sparse]
    of_item = torch.tensor([name in data.ITEM_FIELDS for name in names])

    def score(users: data.Ints) -> Floats:
        with torch.no_grad():
            logits = [model(_crossed(all_users.sparse[user], all_items, of_item)).logits for user in users.tolist()]
        return torch.stack(logits).double().numpy()

    return score


def relations(catalogue: data.Catalogue, parts: data.Parts, ridge: float = RIDGE) -> ContentMap:
    """From the items with a training positive to those without one."""
    learned_I = np.isin(np.arange(catalogue.items.num_rows), catalogue.liked[parts.train])
    cold, known = (torch.from_numpy(np.flatnonzero(rows)) for rows in (~learned_I, learned_I))
    return ContentMap(torch.from_numpy(smooth_content(catalogue)), cold, known, ridge=ridge)


def related(score: Score, relations: ContentMap, share: float = SHARE) -> Score:
    """The scores, mapped from those of known items. Of two towers it is the same as to map the items' vectors."""
    return lambda users: relations.spread(torch.from_numpy(score(users)).T, share).T.numpy()


def _crossed(user_F: Tensor, items: Batch, of_item: Tensor) -> Batch:
    """All items for one user."""
    return replace(items, sparse=torch.where(of_item, items.sparse, user_F))


def settings(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What decides a result, besides the seed."""
    found: dict[str, Any] = {"users": options.users, "positives": options.positives, "run": {}}
    if name in MODELS:
        found |= {"run": to_json(_run_of(name, options)), "ridge": RIDGE, "share": SHARE}
    return json.loads(json_text(found))  # type: ignore[no-any-return]


def run_config(model: ModelComponent.Config, options: argparse.Namespace, optimizer: OptimizerConfig = _OPTIMIZER) -> RunConfig:
    """The run of a model that is trained."""
    fit = FitConfig(epochs=options.epochs, monitor="gauc", optimizer=optimizer)
    return RunConfig(model=model, fit=fit, batch_size=1024)


def _run_of(name: str, options: argparse.Namespace) -> RunConfig:
    return run_config(MODELS[name](), options, OPTIMIZERS.get(name, _OPTIMIZER))


def trained(
    store: Store, config: RunConfig, catalogue: data.Catalogue, folder: Path, name: str, seed: int
) -> tuple[dict[str, Any], Score]:
    """Train a model in a folder, which is removed; its report and its scores."""
    report = train(store, config, folder, name=name, seed=seed)
    if report["interrupted"]:
        raise KeyboardInterrupt
    score = scores_of(artifact.load(folder).model, store, catalogue)
    shutil.rmtree(folder)
    return report, score


def run_seed(names: Sequence[str], seed: int, options: argparse.Namespace) -> None:
    """Cut the data by the seed, and run the models on it."""
    catalogue = data.read()
    if options.positives is not None:
        catalogue = data.sample(catalogue, options.positives)
    parts = data.split(catalogue, seed)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        store = data.store(catalogue, parts, seed, scratch) if any(name in MODELS for name in names) else None
        for name in names:
            started = time.process_time()
            found: dict[str, Any] = {"model": name, "seed": seed, "settings": settings(name, options)}
            if name in BASELINES:
                score = BASELINES[name](catalogue, parts, seed)
            else:
                assert store is not None
                report, score = trained(store, _run_of(name, options), catalogue, scratch / name, name, seed)
                moved = related(score, relations(catalogue, parts))
                found["related"] = evaluate(moved, catalogue, parts, options.users, seed, ("cold",))
                found |= {key: report[key] for key in ("epochs", "best_epoch", "parameters", "rows")}
                found["valid_gauc"] = report["valid"]["gauc"]
            found["pools"] = evaluate(score, catalogue, parts, options.users, seed)
            found["cpu_seconds"] = time.process_time() - started
            write_json(seeds.file(options.out, name, seed), found)
            shown = ", ".join(f"{pool} {m['hr@10']:.4f}" for pool, m in found["pools"].items())
            print(f"{name} {seed}: HR@10 {shown}; {found['cpu_seconds']:.0f} s", flush=True)


def tune(options: argparse.Namespace) -> None:
    """Train every candidate on cuts of their own, and rank the cold items for validation, with each map of relations."""
    catalogue = data.read()
    for seed in map(int, options.seeds.split(",")) if options.seeds else TUNE_SEEDS:
        path = HERE / f"tuning-{seed}.json"
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        parts = data.split(catalogue, seed)
        for penalty in PENALTIES:
            score = content_ridge(catalogue, parts, seed, penalty)
            found[f"content_ridge, {penalty}"] = {"0": _checked(score, catalogue, parts, options.users, seed)}
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            store = data.store(catalogue, parts, seed, scratch)
            for name, config in CANDIDATES.items():
                if name in found:
                    continue
                report, score = trained(store, run_config(config(), options), catalogue, scratch / "run", name, seed)
                steps = {"0": score}
                for ridge in (0.3, 1.0, 3.0):
                    found_by = relations(catalogue, parts, ridge)
                    steps |= {f"{share}, {ridge}": related(score, found_by, share) for share in (0.5, 1.0)}
                trial: dict[str, Any] = {"valid_gauc": report["valid"]["gauc"], "epochs": report["epochs"]}
                trial |= {step: _checked(scorer, catalogue, parts, options.users, seed) for step, scorer in steps.items()}
                found[name] = trial
                write_json(path, found)
                shown = ", ".join(f"{step} {trial[step]['hr@10']:.4f}" for step in steps)
                print(f"{name} {seed}: HR@10 {shown}", flush=True)
        write_json(path, found)


def _checked(score: Score, catalogue: data.Catalogue, parts: data.Parts, users: int, seed: int) -> dict[str, float]:
    """Of the items that are cold for validation."""
    metrics = evaluate(score, catalogue, data.checked(parts), users, seed, ("cold",))["cold"]
    return {key: metrics[key] for key in ("hr@10", "ndcg@10")}


def page(results: seeds.Runs) -> str:
    """README.md."""
    users = next(iter(results.values()))[0]["settings"]["users"] if results else USERS
    text = INTRO.format(users=users)
    positives = next(iter(results.values()))[0]["settings"]["positives"] if results else None
    if positives is not None:
        text += f"\n**A quick look at {positives:,} positives: these figures say nothing.**\n"
    done = seeds.complete(results)
    for pool in POOLS:
        lines, main = (_with_relations(done), MAIN_LINE) if pool == "cold" else (done, MAIN)
        if done:
            text += f"\n## {_TITLES[pool]}\n\n| model | {' | '.join(METRICS)} | HR@10 minus {main} |\n"
            text += "|---" * (len(METRICS) + 2) + "|\n"
            text += "".join(_line(name, runs, lines.get(main) if name != main else None, pool) for name, runs in lines.items())
    text += _claims(_with_relations(done)) + (_READING if done.keys() == set(ORDER) else "")
    files = [path for seed in TUNE_SEEDS if (path := HERE / f"tuning-{seed}.json").is_file()]
    if files:
        text += _tuning([json.loads(path.read_text(encoding="utf-8")) for path in files])
    return text + seeds.missing(results, ORDER)


_TITLES = {
    "warm": "Warm items",
    "few": "Items with at most five training positives",
    "cold": "Cold items",
    "cold users": "Cold users, warm items",
}


def _with_relations(results: seeds.Runs) -> seeds.Runs:
    """Every model by itself, and with relations to the known items."""
    lines: dict[str, Sequence[Mapping[str, Any]]] = {}
    for name, runs in results.items():
        lines[name] = runs
        if name in MODELS:
            lines[name + RELATIONS] = [{"pools": run["related"]} for run in runs]
    return lines


def _line(name: str, runs: Sequence[Mapping[str, Any]], main: Sequence[Mapping[str, Any]] | None, pool: str) -> str:
    cells = [seeds.mean_std([run["pools"][pool][metric] for run in runs]) for metric in METRICS]
    difference = "" if main is None else seeds.signed(*([r["pools"][pool]["hr@10"] for r in found] for found in (runs, main)))
    return f"| {name} | {' | '.join(cells)} | {difference} |\n"


def _claims(lines: seeds.Runs) -> str:
    """What was asked of cold items, and whether it came out."""
    if not {MAIN_LINE, "popularity", "content_popularity", *ID_BASED} <= lines.keys():
        return ""
    mean = {name: statistics.fmean(run["pools"]["cold"]["hr@10"] for run in runs) for name, runs in lines.items()}
    main, ids = mean[MAIN_LINE], max(ID_BASED, key=lambda name: mean[name])
    text = f"\n## What was asked\n\nHR@10 of cold items, *{MAIN_LINE}*: {main:.4f}.\n\n"
    text += f"* {main / mean['popularity']:.2f} times *popularity* (asked: 1.5), which is chance here, for cold items tie; "
    text += f"{main / mean['content_popularity']:.2f} times *content_popularity*.\n"
    verdict = "above" if main > mean[ids] else "not above"
    text += f"* {verdict} both *mf* and *deepfm* (asked: above); the better of these is *{ids}* with {mean[ids]:.4f}.\n"
    others = [
        f"*{name}* {mean[name]:.4f}" for name in (*PARTS, MAIN, *(n + RELATIONS for n in (*ID_BASED, *PARTS))) if name in mean
    ]
    return text + (f"* With less of it, or in another way: {', '.join(others)}.\n" if others else "")


def _tuning(cuts: Sequence[Mapping[str, Any]]) -> str:
    """The table of the candidates, means over the cuts."""
    steps = list(dict.fromkeys(step for cut in cuts for trial in cut.values() for step in trial if step[0].isdigit()))
    text = _TUNING + f"\n| candidate | cuts | {' | '.join(steps)} |\n" + "|---" * (len(steps) + 2) + "|\n"
    for name in (*CANDIDATES, *(f"content_ridge, {penalty}" for penalty in PENALTIES)):
        found = [cut[name] for cut in cuts if name in cut]
        if found:
            cells = [
                f"{statistics.fmean(trial[step]['hr@10'] for trial in found):.4f}"
                if all(step in trial for trial in found)
                else ""
                for step in steps
            ]
            text += f"| {name} | {len(found)} | {' | '.join(cells)} |\n"
    return text


_READING = """
## What it says

* Of a cold item only content is known, and *content_ridge*, a linear model of it that is fitted in seconds, ranks cold items
  best of all. But it has .04 where *contrastive* has .18, of warm items: what a network gains is one model for both.
* The map from content does more than any loss: it gives .02 to .03 to all models that read content, *deepfm* included, which
  then is within .01 of *contrastive + relations*. Whoever has a DeepFM gets most of the gain without another model.
* InfoNCE of the scores (*unclicked* beside *fusion*) helps warm items (+.02) and cold ones (+.015). InfoNCE of views
  (*contrastive* beside *unclicked*) helps cold items a little without relations (+.006; +.019 on the validation items below)
  and not with them (-.002, within the noise of seeds).
* Each seed has other cold items, 353 of them: which of two close models is ahead changes from seed to seed.
* Of cold users little is known too. Nothing ranks items for them better than *popularity* beyond the noise, and two towers are
  behind it: without the id of the user, their product has only a weak part that is the same for all users.
"""

_TUNING = """
## The candidates

HR@10 of the items that are cold for validation, of cuts by other seeds (`--tune`). *towers* is *fusion*; the numbers are the
weights of the contrastive losses, of the unclicked and of views; that of *content_ridge* is its penalty. 0: without relations;
η, λ: with a share η of a ridge regression with the penalty λ; empty: not measured.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not there yet, and write the tables after every seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", help="names with commas between them; default: all")
    parser.add_argument("--seeds", help=f"with commas between them; default: {seeds.SEEDS}, of --tune {TUNE_SEEDS}")
    parser.add_argument("--users", type=int, default=USERS, help="users that are scored in each pool")
    parser.add_argument("--epochs", type=int, default=20, help="at most")
    parser.add_argument("--positives", type=int, help="only so many random positives: for a quick look")
    parser.add_argument("--tune", action="store_true", help="only try the candidates on validation items, of other cuts")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSONs; README.md goes there too")
    options = parser.parse_args(argv)
    out: Path = options.out
    names = options.models.split(",") if options.models else list(ORDER)
    for name in names:
        if name not in ORDER:
            raise ConfigError(f"--models names {name!r}, which is no model of this experiment{suggest(name, ORDER)}")
    if options.positives is not None and out == RESULTS:
        raise ConfigError("--positives is for a quick look; give --out, so that it does not mix with results")
    if options.tune:
        tune_cpu()
        tune(options)
        return
    readme = (HERE if out == RESULTS else out) / "README.md"
    out.mkdir(parents=True, exist_ok=True)
    tune_cpu()
    for seed in map(int, options.seeds.split(",")) if options.seeds else seeds.SEEDS:
        missing = [name for name in names if not seeds.is_done(seeds.file(out, name, seed), settings(name, options))]
        if missing:
            run_seed(missing, seed, options)
            write_text(readme, page(seeds.load(out, ORDER)))
    write_text(readme, page(seeds.load(out, ORDER)))


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, DataError) as error:
        sys.exit(f"error: {error}")
