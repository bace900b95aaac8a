"""The cold-start experiment: its split, its negatives, its ranks against a loop, and its page."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ctrlib import artifact
from ctrlib.config import ConfigError
from ctrlib.experiment import train
from experiments import seeds
from experiments.movielens_cold import data, ranking
from experiments.movielens_cold import run as cold
from experiments.movielens_cold.baselines import BASELINES, content_knn, content_ridge, popularity, smooth_content
from tests.reference import ranking as reference

OPTIONS = argparse.Namespace(users=5, positives=None, epochs=1)


@pytest.fixture(scope="module")
def catalogue() -> data.Catalogue:
    """Small, with the columns of the real one."""
    rng = np.random.default_rng(0)
    users, items = 60, 80
    profile = {
        "user_id": pa.array(range(1000, 1000 + users)),
        "gender": pa.array(rng.choice(["F", "M"], users)),
        "age": pa.array(rng.choice([18, 25, 35], users)),
        "occupation": pa.array(rng.integers(0, 5, users)),
        "region": pa.array(rng.choice(["10", "94"], users)),
    }
    content = {
        "movie_id": pa.array(range(items)),
        "release_year": pa.array(rng.choice(["1980s", "1999", "2000"], items)),
        "genres": pa.array([list(rng.choice(["Drama", "Comedy", "Horror"], 1 + i % 2, replace=False)) for i in range(items)]),
        "title": pa.array([[f"w{w}" for w in rng.integers(0, 9, i % 3)] for i in range(items)], pa.list_(pa.string())),
    }
    user_P, item_P = np.nonzero(rng.random((users, items)) < 0.3)
    return data.Catalogue(pa.table(profile), pa.table(content), user_P, item_P)


@pytest.fixture(scope="module")
def parts(catalogue: data.Catalogue) -> data.Parts:
    return data.split(catalogue, 0)


def test_every_positive_has_one_place_at_most(catalogue: data.Catalogue, parts: data.Parts) -> None:
    kind_P = parts.kind[catalogue.liked]
    together = np.sum([parts.train, parts.valid, parts.test, parts.cold_users], axis=0)
    assert set(together.tolist()) <= {0, 1}
    cold_users = set(catalogue.liker[parts.cold_users].tolist())
    assert len(cold_users) == 6
    assert not cold_users & set(catalogue.liker[parts.train | parts.valid | parts.test].tolist())
    assert set(kind_P[together == 0].tolist()) == {"few", "cold", "check"}  # of cold users


def test_cold_items_are_not_learned_from(catalogue: data.Catalogue, parts: data.Parts) -> None:
    kind_P = parts.kind[catalogue.liked]
    assert [(parts.kind == kind).sum() for kind in ("cold", "few", "check")] == [8, 8, 4]
    assert set(kind_P[parts.train].tolist()) == {"warm", "few"}
    assert set(kind_P[parts.valid].tolist()) == {"warm", "check"}
    assert set(kind_P[parts.test].tolist()) == {"warm", "few", "cold"}
    few = catalogue.liked[parts.train & (kind_P == "few")]
    assert np.bincount(few)[np.unique(few)].tolist() == [5] * 8
    warm = kind_P == "warm"
    assert (parts.test & warm).sum() == pytest.approx(0.1 * (parts.train | parts.valid | parts.test)[warm].sum(), rel=0.3)


def test_seeds_cut_anew(catalogue: data.Catalogue, parts: data.Parts) -> None:
    again, other = data.split(catalogue, 0), data.split(catalogue, 1)
    assert (again.kind == parts.kind).all()
    assert (again.train == parts.train).all()
    assert (other.kind != parts.kind).any()


def test_negatives_are_known_to_be_none(catalogue: data.Catalogue, parts: data.Parts) -> None:
    tables = data.rows(catalogue, parts, 0)
    item_of = {name: i for i, name in enumerate(catalogue.items["movie_id"].to_pylist())}
    user_of = {name: i for i, name in enumerate(catalogue.users["user_id"].to_pylist())}
    likes = {
        name: set(zip(catalogue.liker[p].tolist(), catalogue.liked[p].tolist(), strict=True))
        for name, p in (("train", parts.train), ("valid", parts.train | parts.valid))
    }
    for name, table in tables.items():
        pairs = [
            (user_of[u], item_of[i]) for u, i in zip(table["user_id"].to_pylist(), table["movie_id"].to_pylist(), strict=True)
        ]
        label = table["label"].to_numpy()
        negatives = [pair for pair, y in zip(pairs, label.tolist(), strict=True) if y == 0]
        assert label.sum() == getattr(parts, name).sum()
        assert len(negatives) > 0.9 * data.NEGATIVES * label.sum()
        assert not likes[name] & set(negatives)
        kinds = set(parts.kind[[item for _, item in pairs]].tolist())
        assert kinds == ({"warm", "few"} if name == "train" else {"warm", "few", "check"})
    groups = tables["valid"]["group"].to_numpy()
    cold = np.array([parts.kind[item_of[i]] == "check" for i in tables["valid"]["movie_id"].to_pylist()])
    assert (groups % 2 == cold).all()


@pytest.mark.parametrize("distinct", [3, 1000])
def test_places_equal_a_loop(catalogue: data.Catalogue, parts: data.Parts, distinct: int) -> None:
    """Every target against the items of its pool that the user does not like; tied scores in every order."""
    scores = np.random.default_rng(1).integers(0, distinct, (60, 80)).astype(float)
    found = ranking.evaluate(lambda users: scores[users], catalogue, parts, 1000, 0)
    assert list(found) == list(ranking.POOLS)
    for pool, metrics in found.items():
        wanted = parts.cold_users if pool == "cold users" else parts.test & (parts.kind[catalogue.liked] == pool)
        kind = "warm" if pool == "cold users" else pool
        hits, ndcg, mrr, recall = [], [], [], []
        for user in np.unique(catalogue.liker[wanted]).tolist():
            liked = set(catalogue.liked[catalogue.liker == user].tolist())
            others = [i for i in range(80) if parts.kind[i] == kind and i not in liked]
            assert kind == "cold" or set(others) <= set(catalogue.liked[parts.train].tolist())
            targets = catalogue.liked[wanted & (catalogue.liker == user)].tolist()
            for target in targets:
                above = sum(scores[user, i] > scores[user, target] for i in others)
                tied = sum(scores[user, i] == scores[user, target] for i in others)
                places = [above + j + 1 for j in range(tied + 1)]
                hits.append(np.mean([place <= 10 for place in places]))
                ndcg.append(np.mean([1 / np.log2(place + 1) if place <= 10 else 0 for place in places]))
                mrr.append(np.mean([1 / place for place in places]))
            if distinct > 3:
                ordered = next(
                    reference.orders([0] * len(others) + [1] * len(targets), scores[user, others + targets].tolist())
                )
                recall.append(reference.recall(ordered, 10))
        assert metrics["queries"] == len(hits)
        assert metrics["hr@10"] == pytest.approx(np.mean(hits))
        assert metrics["ndcg@10"] == pytest.approx(np.mean(ndcg))
        assert metrics["mrr"] == pytest.approx(np.mean(mrr))
        if distinct > 3:
            assert metrics["recall@10"] == pytest.approx(np.mean(recall), abs=0.02)  # a few of 1000 scores tie
        if metrics["items"] <= ranking.SAMPLED:  # then all others are drawn
            assert metrics["hr@10 of 101"] == pytest.approx(metrics["hr@10"])


def test_items_that_nobody_likes_in_training_are_in_no_pool(catalogue: data.Catalogue, parts: data.Parts) -> None:
    """They are cold, whatever they were drawn to be; a model that ranks them first gains nothing."""
    of = catalogue.liked
    warm = int(of[parts.test & (parts.kind[of] == "warm")][0])
    unlearned = replace(parts, train=parts.train & (of != warm))
    scores = np.zeros((60, 80))
    scores[:, warm] = 1
    before, after = (ranking.evaluate(lambda users: scores[users], catalogue, p, 1000, 0) for p in (parts, unlearned))
    for pool, kind_P in (("warm", parts.test & (parts.kind[of] == "warm")), ("cold users", parts.cold_users)):
        assert after[pool]["items"] == before[pool]["items"] - 1
        assert after[pool]["queries"] == before[pool]["queries"] - (kind_P & (of == warm)).sum()
    for pool in ("few", "cold"):
        assert after[pool] == before[pool]
    constant = ranking.evaluate(lambda users: np.zeros((60, 80))[users], catalogue, unlearned, 1000, 0)
    assert after["warm"] == constant["warm"]


def test_popularity_knows_nothing_of_cold_items(catalogue: data.Catalogue, parts: data.Parts) -> None:
    score = popularity(catalogue, parts, 0)
    assert not score(np.arange(3))[:, parts.kind == "cold"].any()
    metrics = ranking.evaluate(score, catalogue, parts, 1000, 0)["cold"]
    assert metrics["mrr"] > 0.1  # ties are shared, not lost


def test_the_nearest_content_is_that_of_the_item_itself(catalogue: data.Catalogue, parts: data.Parts) -> None:
    scores = content_knn(catalogue, parts, 0)(np.arange(60))
    assert scores.shape == (60, 80)
    liked = catalogue.liked[parts.train & (catalogue.liker == 3)]
    assert scores[3, liked].mean() > scores[3].mean()


def test_content_scores_every_pair(catalogue: data.Catalogue, parts: data.Parts) -> None:
    pytest.importorskip("lightgbm")
    for name in ("lightgbm", "content_popularity", "content_ridge"):
        scores = BASELINES[name](catalogue, parts, 0)(np.array([4, 7]))
        assert scores.shape == (2, 80)
        assert np.isfinite(scores).all()
        assert len(set(scores[0].tolist())) > 5


@pytest.mark.parametrize("name", ["mf", "deepfm", "contrastive"])
def test_scores_of_all_pairs_are_those_of_rows(name: str, catalogue: data.Catalogue, parts: data.Parts, tmp_path: Path) -> None:
    store = data.store(catalogue, parts, 0, tmp_path)
    report = train(store, cold.run_config(cold.MODELS[name](), OPTIONS), tmp_path / "run", seed=0)
    assert report["epochs"] == 1
    loaded = artifact.load(tmp_path / "run")
    users = np.array([5, 0, 59])
    scores = cold.scores_of(loaded.model, store, catalogue)(users)
    rows = data.table(catalogue, np.repeat(users, 80), np.tile(np.arange(80), 3))
    probability = loaded.predict(rows).reshape(3, 80)
    order = [np.argsort(p) for p in (scores[1], np.log(probability[1] / (1 - probability[1])))]
    assert np.abs(np.diff(scores - np.log(probability / (1 - probability)) * cold_scale(loaded.model), axis=1)).max() < 1e-3
    assert (order[0] == order[1]).mean() > 0.9


def cold_scale(model: Any) -> float:
    """Two towers give products, logits are products / √k."""
    return float(model.width**0.5) if hasattr(model, "width") else 1.0


def _runs(shift: float) -> list[dict[str, Any]]:
    pools = {p: dict.fromkeys(cold.METRICS, 0.1 + shift) | {"users": 3, "queries": 9, "items": 7} for p in ranking.POOLS}
    related = {"cold": dict.fromkeys(cold.METRICS, 0.2 + 2 * shift)}
    run = {"model": "m", "settings": {"users": 7, "positives": None}, "pools": pools, "related": related}
    return [run | {"seed": seed} for seed in seeds.SEEDS]


def test_page() -> None:
    results = {name: _runs(i / 100) for i, name in enumerate(cold.ORDER)}
    results["mf"] = results["mf"][:2]
    text = cold.page(results)
    assert "at most 7 random users" in text
    assert "| popularity | 0.1000 ± 0.0000 |" in text
    assert "-0.0900 ± 0.0000 |" in text  # popularity minus contrastive, of warm items
    assert "| unclicked + relations | 0.3600 ± 0.0000 |" in text
    assert "-0.2800 ± 0.0000 |" in text  # popularity minus contrastive + relations, of cold items
    assert "Not run yet: mf (2 of 5 seeds)." in text
    assert "What was asked" not in text
    results["mf"] = _runs(0.05)
    text = cold.page(results)
    assert "* 3.80 times *popularity*" in text
    assert "above both *mf* and *deepfm* (asked: above); the better of these is *deepfm* with 0.1600" in text
    assert "*fusion* 0.1700, *unclicked* 0.1800, *contrastive* 0.1900, *mf + relations* 0.3000, *deepfm + relations*" in text


def test_candidates_are_tried_on_validation_items(catalogue: data.Catalogue, parts: data.Parts) -> None:
    checked = data.checked(parts)
    assert (checked.test == parts.valid).all()
    assert not checked.cold_users.any()
    assert ((checked.kind == "cold") == (parts.kind == "check")).all()
    assert not np.isin(catalogue.liked[checked.test], np.flatnonzero(parts.kind == "cold")).any()


def test_relations_move_cold_items_alone(catalogue: data.Catalogue, parts: data.Parts) -> None:
    scores = np.random.default_rng(0).random((60, 80))
    learned = np.isin(np.arange(80), catalogue.liked[parts.train])
    mapped = cold.relations(catalogue, parts)
    assert mapped.cold.tolist() == np.flatnonzero(~learned).tolist()
    assert mapped.known.tolist() == np.flatnonzero(learned).tolist()
    found = cold.related(lambda users: scores[users], mapped)(np.array([3, 5]))
    assert (found[:, learned] == scores[[3, 5]][:, learned]).all()
    assert (found[:, ~learned] != scores[[3, 5]][:, ~learned]).all()


def test_near_years_are_near(catalogue: data.Catalogue) -> None:
    """Beside the genres: one vector of length 1 each for genres, year and both."""
    titles = pa.array([[]] * 4, pa.list_(pa.string()))
    genres = pa.array([["Drama"], ["Drama"], ["Drama"], ["Comedy"]])
    items = pa.table({"release_year": ["1960", "1962", "1999", "1962"], "genres": genres, "title": titles})
    content_IC = smooth_content(replace(catalogue, items=items))
    like = content_IC @ content_IC.T
    assert np.diag(like).tolist() == pytest.approx([1, 1, 1, 1])
    near, far = np.exp(-((2 / 12) ** 2)), np.exp(-((39 / 12) ** 2))  # of gaussian bumps, 6 years wide
    assert like[0, 1] == pytest.approx((1 + 2 * near) / 3, abs=0.01)
    assert like[0, 2] == pytest.approx((1 + 2 * far) / 3, abs=0.01)
    assert like[1, 3] == pytest.approx(1 / 3)


def test_ridge_equals_the_map_of_likes(catalogue: data.Catalogue, parts: data.Parts) -> None:
    """Of cold items; the two solve the same problem in their own ways."""
    liked = np.zeros((60, 80))
    liked[catalogue.liker[parts.train], catalogue.liked[parts.train]] = 1
    mapped = cold.related(lambda users: liked[users], cold.relations(catalogue, parts, 10.0), 1.0)(np.arange(60))
    found = content_ridge(catalogue, parts, 0)(np.arange(60))
    learned = np.isin(np.arange(80), catalogue.liked[parts.train])
    likers = liked.any(1)
    assert not likers.all()
    np.testing.assert_allclose(found[likers][:, ~learned], mapped[likers][:, ~learned], atol=1e-9)
    assert np.ptp(found[~likers], axis=0).max() < 1e-9  # of nobody's taste: the average one
    assert np.ptp(found[~likers], axis=1).min() > 0.01


def test_results_of_other_settings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mf-0.json").write_text(json.dumps({"settings": {"users": 3}}))
    with pytest.raises(ConfigError, match="was run with other settings"):
        cold.main(["--models", "mf", "--seeds", "0", "--out", str(tmp_path)])
    with pytest.raises(ConfigError, match="did you mean 'deepfm'"):
        cold.main(["--models", "depfm", "--out", str(tmp_path)])
    with pytest.raises(ConfigError, match="--positives is for a quick look"):
        cold.main(["--positives", "100"])


def test_the_committed_page_is_what_the_committed_results_make() -> None:
    assert (cold.HERE / "README.md").read_text(encoding="utf-8") == cold.page(seeds.load(cold.RESULTS, cold.ORDER))


@pytest.mark.skipif(not data.RAW.is_dir(), reason="no MovieLens data: set CTRLIB_DATA")
def test_the_real_files() -> None:
    catalogue = data.read()
    assert len(catalogue.liker) == 575_281  # of four stars and more
    assert catalogue.users.num_rows == 6038
    assert catalogue.items.num_rows == 3533
    assert catalogue.items["title"][0].as_py() == ["toy", "story"]
    assert catalogue.items["release_year"].to_pylist()[:2] == ["1995", "1995"]
