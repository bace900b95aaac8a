"""Where a model places what users like among everything that they might have been shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from experiments.movielens_cold.data import Bools, Catalogue, Ints, Parts

TOP = 10
SAMPLED = 100
POOLS = ("warm", "few", "cold", "cold users")

Floats = npt.NDArray[np.float64]
Score = Callable[[Ints], Floats]
"""Users → their scores of all items, [U, I]."""


def evaluate(
    score: Score, catalogue: Catalogue, parts: Parts, users: int, seed: int, pools: Sequence[str] = POOLS
) -> Mapping[str, dict[str, float]]:
    """Metrics by pool of items, over at most so many random users of each.

    Every test positive is a query: its item among the items of the pool that the user does not like in any row. So there is one
    target, HR@10 = 1[place ≤ 10], NDCG@10 = 1/log2(place + 1) up to place 10, MRR = 1/place, each a mean over queries. Tied
    scores share their places: means over every order. ``hr@10 of 101``: the same among 100 of the other items, drawn by a fixed
    seed. ``recall@10`` is the mean over users of the share of their test items that are among the first ten, when all of these
    compete. The pool of cold users are the warm items. Items without a training positive are in the cold pool or in none.
    """
    found = {}
    learned_I = np.isin(np.arange(catalogue.items.num_rows), catalogue.liked[parts.train])
    for pool in pools:
        rng = np.random.default_rng([seed, 3, POOLS.index(pool)])
        kind = "warm" if pool == "cold users" else pool
        pool_I = (parts.kind == kind) & (learned_I | (kind == "cold"))
        wanted = (parts.cold_users if pool == "cold users" else parts.test) & pool_I[catalogue.liked]
        asked = rng.permutation(np.unique(catalogue.liker[wanted]))[:users]
        if len(asked):
            found[pool] = _pool(score, catalogue, wanted, pool_I, np.sort(asked), rng)
    return found


def _pool(
    score: Score, catalogue: Catalogue, wanted_P: Bools, pool_I: Bools, users: Ints, rng: np.random.Generator
) -> dict[str, float]:
    order = np.argsort(catalogue.liker, kind="stable")
    bounds = np.searchsorted(catalogue.liker[order], [users, users + 1])
    above, tied, others, recall = [], [], [], []
    for chunk in np.array_split(np.arange(len(users)), max(len(users) // 64, 1)):
        for i, score_I in zip(chunk.tolist(), score(users[chunk]), strict=True):
            liked = order[bounds[0, i] : bounds[1, i]]
            target = catalogue.liked[liked[wanted_P[liked]]]
            free_I = pool_I.copy()
            free_I[catalogue.liked[liked]] = False
            mine, rest = score_I[target], np.sort(score_I[free_I])
            above.append(len(rest) - np.searchsorted(rest, mine, "right"))
            tied.append(np.searchsorted(rest, mine, "right") - np.searchsorted(rest, mine))
            others.append(np.full(len(mine), len(rest)))
            every = np.sort(np.concatenate([rest, mine]))
            over = len(every) - np.searchsorted(every, mine, "right")
            alike = np.searchsorted(every, mine, "right") - np.searchsorted(every, mine) - 1
            recall.append(float(_hits(over, alike).mean()))
    above_Q, tied_Q, others_Q = np.concatenate(above), np.concatenate(tied), np.concatenate(others)
    drawn_Q = np.minimum(SAMPLED, others_Q)
    over_Q = rng.hypergeometric(above_Q, others_Q - above_Q, drawn_Q)
    alike_Q = rng.hypergeometric(tied_Q, others_Q - above_Q - tied_Q, drawn_Q - over_Q)
    last_Q = above_Q + tied_Q + 1
    gain = np.append(0.0, np.cumsum(1 / np.log2(np.arange(2, TOP + 2))))
    inverse = np.append(0.0, np.cumsum(1 / np.arange(1, last_Q.max() + 1)))
    ndcg_Q = (gain[np.minimum(last_Q, TOP)] - gain[np.minimum(above_Q, TOP)]) / (tied_Q + 1)
    return {
        "users": len(users),
        "queries": len(above_Q),
        "items": int(pool_I.sum()),
        "hr@10": float(_hits(above_Q, tied_Q).mean()),
        "ndcg@10": float(ndcg_Q.mean()),
        "mrr": float(((inverse[last_Q] - inverse[above_Q]) / (tied_Q + 1)).mean()),
        "recall@10": float(np.mean(recall)),
        "hr@10 of 101": float(_hits(over_Q, alike_Q).mean()),
    }


def _hits(above: Ints, tied: Ints) -> Floats:
    """The chance of a place up to ``TOP``, with so many above, and so many tied with the target."""
    return np.clip(TOP - above, 0, tied + 1) / (tied + 1)
