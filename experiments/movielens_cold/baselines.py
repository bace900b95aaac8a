"""What needs no network: popularity, popularity of like content, content kNN, ridge regression and LightGBM on content."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import Ridge

from ctrlib.config import ConfigError
from experiments.movielens_cold.data import NEGATIVES, Catalogue, Ints, Parts
from experiments.movielens_cold.ranking import Floats, Score

NEIGHBOURS = 20
RIDGE = 10.0
BUMPS = np.arange(1915, 2006, 5)  # years


def popularity(catalogue: Catalogue, parts: Parts, seed: int) -> Score:
    """Training positives of an item: none of cold ones, which therefore tie."""
    count_I = _counts(catalogue, parts)
    return lambda users: np.tile(count_I, (len(users), 1))


def content_popularity(catalogue: Catalogue, parts: Parts, seed: int) -> Score:
    """Mean popularity of the items with training positives whose content is nearest: what a cold item may expect."""
    count_I, like_II = _counts(catalogue, parts), _likeness(catalogue)
    like_II[:, count_I == 0] = -1
    np.fill_diagonal(like_II, -1)
    near_IN = np.argpartition(-like_II, min(NEIGHBOURS, len(count_I) - 1), axis=1)[:, :NEIGHBOURS]
    weight_IN = np.clip(np.take_along_axis(like_II, near_IN, 1), 1e-9, None)
    mean_I = (weight_IN * count_I[near_IN]).sum(1) / weight_IN.sum(1)
    return lambda users: np.tile(mean_I, (len(users), 1))


def content_knn(catalogue: Catalogue, parts: Parts, seed: int) -> Score:
    """Σ of the likenesses of an item to the ``NEIGHBOURS`` items most like it among those that the user likes in training.

    A user without any has the score of all training positives together: likeness to the average liked item.
    """
    like_II, count_I = _likeness(catalogue), _counts(catalogue, parts)
    order = np.argsort(catalogue.liker[parts.train], kind="stable")
    user_T, item_T = catalogue.liker[parts.train][order], catalogue.liked[parts.train][order]

    def score(users: Ints) -> Floats:
        found = np.empty((len(users), len(like_II)))
        for row, user in enumerate(users.tolist()):
            first, last = np.searchsorted(user_T, [user, user + 1])
            mine_IL = like_II[:, item_T[first:last]]
            if last - first > NEIGHBOURS:
                mine_IL = np.partition(mine_IL, last - first - NEIGHBOURS, axis=1)[:, -NEIGHBOURS:]
            found[row] = mine_IL.sum(1) if first < last else like_II @ count_I
        return found

    return score


def content_ridge(catalogue: Catalogue, parts: Parts, seed: int, ridge: float = RIDGE) -> Score:
    """What every user likes (1, all else 0) by ridge regression on :func:`smooth_content`, over the items of training.

    A user who likes nothing there has the mean of all users.
    """
    item_T, user_T = catalogue.liked[parts.train], catalogue.liker[parts.train]
    liked_IU = np.zeros((catalogue.items.num_rows, catalogue.users.num_rows))
    liked_IU[item_T, user_T] = 1
    liked_IU[:, ~liked_IU.any(0)] = liked_IU.mean(1, keepdims=True)
    content_IC, learned = smooth_content(catalogue), np.unique(item_T)
    score_IU: Floats = Ridge(alpha=ridge).fit(content_IC[learned], liked_IU[learned]).predict(content_IC)
    return lambda users: score_IU[:, users].T


def lightgbm(catalogue: Catalogue, parts: Parts, seed: int) -> Score:
    """Boosted trees on the user's profile, the item's year and genres, and the genres that the user likes; no ids.

    Trained on the training positives, each with negatives drawn as for the other models. What a user likes leaves out the row's
    own item, which would give the label away.

    Raises:
        ConfigError: LightGBM is not installed.
    """
    try:
        import lightgbm as trees
    except ImportError as error:
        raise ConfigError("lightgbm is not installed; pip install 'ctrlib[search]', or leave this model out") from error
    rng = np.random.default_rng([seed, 4])
    genre_IG, year_I = _genres(catalogue), _years(catalogue)
    share_IG = genre_IG / genre_IG.sum(1, keepdims=True)
    user_T, item_T = catalogue.liker[parts.train], catalogue.liked[parts.train]
    liked_UG = np.zeros((catalogue.users.num_rows, genre_IG.shape[1]))
    np.add.at(liked_UG, user_T, share_IG[item_T])
    profile_UC = np.stack(
        [np.unique(catalogue.users[name].to_pylist(), return_inverse=True)[1] for name in ("gender", "age", "occupation")],
        axis=1,
    )

    def features(user: Ints, item: Ints, own: npt.NDArray[np.bool_] | None = None) -> Floats:
        liked = liked_UG[user] if own is None else liked_UG[user] - share_IG[item] * own[:, None]
        liked = liked / np.maximum(liked.sum(1, keepdims=True), 1e-9)
        match = (liked * share_IG[item]).sum(1, keepdims=True)
        return np.concatenate([profile_UC[user], year_I[item, None], genre_IG[item], liked, match], axis=1)

    user = np.concatenate([user_T, np.repeat(user_T, NEGATIVES)])
    item = np.concatenate([item_T, rng.choice(np.unique(item_T), NEGATIVES * len(item_T))])
    label = np.arange(len(user)) < len(user_T)
    known = np.unique(user_T * catalogue.items.num_rows + item_T)
    fine = label | ~np.isin(user * catalogue.items.num_rows + item, known)
    user, item, label = user[fine], item[fine], label[fine]
    model = trees.LGBMClassifier(n_estimators=300, num_leaves=63, learning_rate=0.05, random_state=seed, n_jobs=1, verbose=-1)
    model.fit(features(user, item, label), label)

    def score(users: Ints) -> Floats:
        items = catalogue.items.num_rows
        crossed = features(np.repeat(users, items), np.tile(np.arange(items), len(users)))
        raw: Floats = model.predict(crossed, raw_score=True)
        return raw.reshape(len(users), items)

    return score


BASELINES = {
    "popularity": popularity,
    "content_popularity": content_popularity,
    "content_knn": content_knn,
    "content_ridge": content_ridge,
    "lightgbm": lightgbm,
}


def _counts(catalogue: Catalogue, parts: Parts) -> Floats:
    return np.bincount(catalogue.liked[parts.train], minlength=catalogue.items.num_rows).astype(np.float64)


def smooth_content(catalogue: Catalogue) -> Floats:
    """[I, C] genres, bumps of the year, and products of the two, which weigh alike; rows of length 1. Near years are near."""
    genre_IG = _unit(_genres(catalogue))
    year_IY = _unit(np.exp(-0.5 * ((_years(catalogue)[:, None] - BUMPS) / 6) ** 2))
    crossed_IC = np.einsum("ig,iy->igy", genre_IG, year_IY).reshape(len(genre_IG), -1)
    return _unit(np.concatenate([genre_IG, year_IY, crossed_IC], axis=1))


def _unit(values_IC: Floats) -> Floats:
    unit_IC: Floats = values_IC / np.maximum(np.linalg.norm(values_IC, axis=1, keepdims=True), 1e-9)
    return unit_IC


def _years(catalogue: Catalogue) -> Ints:
    return np.array([int(year[:4]) for year in catalogue.items["release_year"].to_pylist()])


def _genres(catalogue: Catalogue) -> Floats:
    return _multi_hot(catalogue.items["genres"].to_pylist())


def _multi_hot(lists: list[list[str]]) -> Floats:
    values = {value: i for i, value in enumerate(sorted({v for row in lists for v in row}))}
    hot = np.zeros((len(lists), len(values)))
    for i, row in enumerate(lists):
        hot[i, [values[v] for v in row]] = 1
    return hot


def content(catalogue: Catalogue) -> Floats:
    """[I, C] genres, year and words of the title of every item, weighed by ln(I / items that have them); rows of length 1."""
    years = [[year] for year in catalogue.items["release_year"].to_pylist()]
    columns = [_genres(catalogue), _multi_hot(years), _multi_hot(catalogue.items["title"].to_pylist())]
    hot: Floats = np.concatenate(columns, axis=1)
    return _unit(hot * np.log(len(hot) / np.maximum(hot.sum(0), 1)))


def _likeness(catalogue: Catalogue) -> Floats:
    """[I, I] cosines of content."""
    hot = content(catalogue)
    like_II: Floats = hot @ hot.T
    return like_II
