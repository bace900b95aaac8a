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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctrlib import artifact
from ctrlib.batch import Batch
from ctrlib.config import ConfigError, to_json
from ctrlib.cpu import tune_cpu
from ctrlib.embedding import FeatureEmbedding
from ctrlib.experiment import RunConfig, train
from ctrlib.files import json_text, write_json, write_text
from ctrlib.interactions.adaptive_fusion import AdaptiveFusion
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.compose import Parallel, Stack
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
from experiments.movielens_cold.baselines import BASELINES
from experiments.movielens_cold.ranking import POOLS, Floats, Score, evaluate

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
USERS = 500  # of each pool; all others rank the same
MAIN = "contrastive"
METRICS = ("hr@10", "ndcg@10", "mrr", "recall@10", "hr@10 of 101")

_EMBEDDING = FeatureEmbedding.Config(dim=32, init_std=0.05)
_FUSION = AdaptiveFusion.Config(dim=64)
_DEEP = MLP.Config(hidden_units=(128, 64), output_dim=1)
_CONTRAST = ContrastConfig(weight=0.01, rows=256)
_NO_CONTRAST = replace(_CONTRAST, weight=0.0)
_ID_DROPOUT = 0.4


def _mf() -> ModelComponent.Config:
    """Matrix factorisation: FM of the two ids is ⟨v_u, v_i⟩ with biases."""
    config = preset("fm")
    assert isinstance(config, CTRModel.Config)
    return replace(config, embedding=replace(_EMBEDDING, fields=data.IDS))


def _deepfm(
    id_dropout: float, contrast: ContrastConfig = _NO_CONTRAST, deep: Interaction.Config = _DEEP
) -> ModelComponent.Config:
    """DeepFM of all fields, in which unseen ids are padding."""
    config = preset("deepfm")
    assert isinstance(config, CTRModel.Config)
    config = replace(config, embedding=_EMBEDDING, interaction=Parallel.Config(streams=(FM.Config(), deep), fusion="sum"))
    views_of = (data.USER_FIELDS, data.ITEM_FIELDS)
    return contrastive(config, contrast, views_of=views_of, encoder=_FUSION, id_fields=data.IDS, id_dropout=id_dropout)


def _two_tower() -> ModelComponent.Config:
    return TwoTower.Config(
        embedding=_EMBEDDING,
        item_fields=data.ITEM_FIELDS,
        user_tower=_FUSION,
        item_tower=_FUSION,
        contrast=_CONTRAST,
        id_fields=data.IDS,
        id_dropout=_ID_DROPOUT,
    )


_FUSED = Stack.Config(blocks=(_FUSION, _DEEP))
MODELS: Mapping[str, Callable[[], ModelComponent.Config]] = {
    "mf": _mf,
    "deepfm": lambda: _deepfm(0.0),
    "id_dropout": lambda: _deepfm(_ID_DROPOUT),
    "fusion": lambda: _deepfm(_ID_DROPOUT, deep=_FUSED),
    "contrastive": lambda: _deepfm(_ID_DROPOUT, _CONTRAST, _FUSED),
    "two_tower": _two_tower,
}
ID_BASED = ("mf", "deepfm")
PARTS = ("id_dropout", "fusion", "two_tower")  # of the contrastive model, or another around them
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
twenty items with the most similar content; *content_knn* and *lightgbm* read content only; *mf* reads ids only; *deepfm*
reads all, with unseen ids as padding; its network is 128-64-1. *id_dropout* is *deepfm* that drops ids in training with a
chance of .4; in *fusion* its network reads the adaptive fusion of the fields, and *contrastive* adds InfoNCE between views of
the user and between views of the item. *two_tower* has all of that, but an adaptive fusion for each side and their product.

Fusion and losses are our reconstruction of what the abstract of arXiv:2502.03664 names, whose text could not be read. Nothing
here is to be compared with figures of that paper. What *contrastive* scores with, and the weight of its loss, were chosen by
validation items that are cold, of a cut of a quarter of the positives by another seed; nothing else is tuned.
"""


def scores_of(model: ModelComponent, store: Any, catalogue: data.Catalogue) -> Score:
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


def _crossed(user_F: Tensor, items: Batch, of_item: Tensor) -> Batch:
    """All items for one user."""
    return replace(items, sparse=torch.where(of_item, items.sparse, user_F))


def settings(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What decides a result, besides the seed."""
    config = to_json(run_config(name, options)) if name in MODELS else {}
    return json.loads(json_text({"users": options.users, "positives": options.positives, "run": config}))  # type: ignore[no-any-return]


def run_config(name: str, options: argparse.Namespace) -> RunConfig:
    """The run of a trained model."""
    fit = FitConfig(epochs=options.epochs, monitor="gauc", optimizer=OptimizerConfig())
    return RunConfig(model=MODELS[name](), fit=fit, batch_size=1024)


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
                report = train(store, run_config(name, options), scratch / name, name=name, seed=seed)
                if report["interrupted"]:
                    raise KeyboardInterrupt
                model = artifact.load(scratch / name).model
                score = scores_of(model, store, catalogue)
                shutil.rmtree(scratch / name)
                found |= {key: report[key] for key in ("epochs", "best_epoch", "parameters", "rows")}
                found["valid_gauc"] = report["valid"]["gauc"]
            found["pools"] = evaluate(score, catalogue, parts, options.users, seed)
            found["cpu_seconds"] = time.process_time() - started
            write_json(seeds.file(options.out, name, seed), found)
            shown = ", ".join(f"{pool} {m['hr@10']:.4f}" for pool, m in found["pools"].items())
            print(f"{name} {seed}: HR@10 {shown}; {found['cpu_seconds']:.0f} s", flush=True)


def page(results: seeds.Runs) -> str:
    """README.md."""
    users = next(iter(results.values()))[0]["settings"]["users"] if results else USERS
    text = INTRO.format(users=users)
    positives = next(iter(results.values()))[0]["settings"]["positives"] if results else None
    if positives is not None:
        text += f"\n**A quick look at {positives:,} positives: these figures say nothing.**\n"
    done = seeds.complete(results)
    for pool in POOLS:
        if done:
            text += f"\n## {_TITLES[pool]}\n\n| model | {' | '.join(METRICS)} | HR@10 minus {MAIN} |\n"
            text += "|---" * (len(METRICS) + 2) + "|\n"
            text += "".join(_line(name, runs, done.get(MAIN), pool) for name, runs in done.items())
    text += _claims(done)
    return text + seeds.missing(results, ORDER)


_TITLES = {
    "warm": "Warm items",
    "few": "Items with at most five training positives",
    "cold": "Cold items",
    "cold users": "Cold users, warm items",
}


def _line(name: str, runs: Sequence[Mapping[str, Any]], main: Sequence[Mapping[str, Any]] | None, pool: str) -> str:
    cells = [seeds.mean_std([run["pools"][pool][metric] for run in runs]) for metric in METRICS]
    difference = ""
    if main is not None and name != MAIN:
        difference = seeds.signed(*([run["pools"][pool]["hr@10"] for run in found] for found in (runs, main)))
    return f"| {name} | {' | '.join(cells)} | {difference} |\n"


def _claims(done: seeds.Runs) -> str:
    """What was asked of cold items, and whether it came out."""
    if not {MAIN, "popularity", "content_popularity", *ID_BASED} <= done.keys():
        return ""
    mean = {name: statistics.fmean(run["pools"]["cold"]["hr@10"] for run in runs) for name, runs in done.items()}
    ids = max(ID_BASED, key=lambda name: mean[name])
    text = f"\n## What was asked\n\nHR@10 of cold items, *{MAIN}*: {mean[MAIN]:.4f}.\n\n"
    text += (
        f"* {mean[MAIN] / mean['popularity']:.2f} times *popularity* (asked: 1.5), which is chance here, for cold items tie; "
    )
    text += f"{mean[MAIN] / mean['content_popularity']:.2f} times *content_popularity*.\n"
    verdict = "above" if mean[MAIN] > mean[ids] else "not above"
    text += f"* {verdict} both *mf* and *deepfm* (asked: above); the better of these is *{ids}* with {mean[ids]:.4f}.\n"
    others = [f"*{name}* {mean[name]:.4f}" for name in PARTS if name in mean]
    return text + (f"* With less of it, or in another way: {', '.join(others)}.\n" if others else "")


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not there yet, and write the tables after every seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", help="names with commas between them; default: all")
    parser.add_argument("--seeds", default=",".join(map(str, seeds.SEEDS)), help="with commas between them")
    parser.add_argument("--users", type=int, default=USERS, help="users that are scored in each pool")
    parser.add_argument("--epochs", type=int, default=20, help="at most")
    parser.add_argument("--positives", type=int, help="only so many random positives: for a quick look")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSONs; README.md goes there too")
    options = parser.parse_args(argv)
    out: Path = options.out
    names = options.models.split(",") if options.models else list(ORDER)
    for name in names:
        if name not in ORDER:
            raise ConfigError(f"--models names {name!r}, which is no model of this experiment{suggest(name, ORDER)}")
    if options.positives is not None and out == RESULTS:
        raise ConfigError("--positives is for a quick look; give --out, so that it does not mix with results")
    readme = (HERE if out == RESULTS else out) / "README.md"
    out.mkdir(parents=True, exist_ok=True)
    tune_cpu()
    for seed in map(int, options.seeds.split(",")):
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
