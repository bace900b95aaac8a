"""A small planted graph: two communities with features of their own, for the tests of nodes."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from ctrlib.data.graph import Graph, GraphOptions, read_graph


def tables(count: int = 120, seed: int = 0) -> tuple[pa.Table, pa.Table]:
    """Nodes ``n0``, … with 1 to 6 features and the class ``team``, and edges that mostly join nodes of one class."""
    rng = np.random.default_rng(seed)
    team = rng.integers(0, 3, count)
    features = [sorted({int(v) for v in rng.integers(0, 13, rng.integers(1, 7)) + 10 * team[i]}) for i in range(count)]
    pairs = rng.integers(0, count, (6 * count, 2))
    chance = np.where(team[pairs[:, 0]] == team[pairs[:, 1]], 0.8, 0.1)
    pairs = np.unique(np.sort(pairs[(rng.random(len(pairs)) < chance) & (pairs[:, 0] != pairs[:, 1])], axis=1), axis=0)
    names = np.array([f"n{i}" for i in range(count)])
    nodes = pa.table({"id": names, "features": features, "team": pa.array([f"team {t}" for t in team])})
    return nodes, pa.table({"source": names[pairs[:, 0]], "target": names[pairs[:, 1]]})


def graph(count: int = 120, seed: int = 0) -> Graph:
    """The same, read."""
    return read_graph(*tables(count, seed), GraphOptions(label="team"))
