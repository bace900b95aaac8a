"""Rows of categorical fields with their crosses, as a search reads them, and laws with planted pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from ctrlib.data.store import Split, Store
from ctrlib.models.optinter import OptInter
from ctrlib.schema import BatchLayout, SparseColumn
from tests.models.small import crossed, with_crosses

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def fields(count: int, values: int) -> BatchLayout:
    """So many categorical fields ``f0``, ``f1``, … of so many values, and the crosses of all."""
    return with_crosses(plain(count, values))


def plain(count: int, values: int) -> BatchLayout:
    return BatchLayout(tuple(SparseColumn(f"f{i}", values + 2, f"f{i}") for i in range(count)))


def split(x_NF: Ids, y_N: npt.NDArray[Any], values: int, *, crosses: bool = True) -> Split:
    """Rows of values from 0; a value's id is two more."""
    from ctrlib.batch import Batch

    batch = Batch(sparse=torch.from_numpy((x_NF + 2).astype(np.int32)), dense=torch.zeros(len(x_NF), 0))
    if crosses:
        batch = crossed(batch, plain(x_NF.shape[1], values))
    labels = torch.from_numpy(y_N.astype(np.float32)).reshape(len(y_N), -1)
    return Split(len(x_NF), batch.sparse, batch.dense, {}, labels, None, None)


@dataclass
class HandStore:
    """What a search asks of a store; the splits that it read are in ``read``."""

    layout: BatchLayout
    splits: Mapping[str, Split]
    read: list[str] = field(default_factory=list)

    @property
    def rows(self) -> dict[str, int]:
        return {name: s.num_rows for name, s in self.splits.items()}

    @property
    def encoder(self) -> SimpleNamespace:
        return SimpleNamespace(layout=self.layout, hash="by hand", schema=SimpleNamespace(labels=self.layout.labels))

    def split(self, name: str) -> Split:
        assert name != "test", "a search reads no test rows"
        self.read.append(name)
        return self.splits[name]

    def store(self) -> Store:
        return cast(Store, self)


def random_sign_pair(rows: int, values: int, seed: int, *, rank_one: bool = False) -> tuple[Ids, npt.NDArray[np.bool_]]:
    """Four independent fields; P(y = 1) = σ(3 R[x_0, x_1]) with random signs R, of full rank or an outer product."""
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], (values, values))
    if rank_one:
        signs = np.outer(rng.choice([-1.0, 1.0], values), rng.choice([-1.0, 1.0], values))
    x_NF = rng.integers(0, values, (rows, 4))
    return x_NF, rng.random(rows) < 1 / (1 + np.exp(-3 * signs[x_NF[:, 0], x_NF[:, 1]]))


def bilinear_pairs(rows: int, values: int, seed: int) -> tuple[Ids, npt.NDArray[np.bool_]]:
    """Six fields; y = [Σ_f w_f + Σ_pairs ⟨v_i, v_j⟩ + noise > 0] over (0, 1), (2, 5), (3, 4), as in AutoFIS."""
    rng = np.random.default_rng(seed)
    weights, vectors = rng.normal(size=(6, values)), rng.normal(size=(6, values, 5))
    x_NF = rng.integers(0, values, (rows, 6))
    score_N: Floats = weights[np.arange(6), x_NF].sum(1) / 6**0.5 + 0.5 * rng.normal(size=rows)
    for i, j in ((0, 1), (2, 5), (3, 4)):
        score_N = score_N + (vectors[i][x_NF[:, i]] * vectors[j][x_NF[:, j]]).sum(1) / 5**0.5
    return x_NF, score_N > 0


def small(hidden: int = 16, dim: int = 2, **options: Any) -> OptInter.Config:
    """A toy: vectors of width 2, one hidden layer without a norm, logits that start small."""
    from ctrlib.embedding import FeatureEmbedding
    from ctrlib.interactions.mlp import MLP

    return OptInter.Config(
        embedding=FeatureEmbedding.Config(dim=dim, init_std=0.1),
        pair_dim=dim,
        mlp=MLP.Config(hidden_units=(hidden,)),
        arch_gain=0.1,
        **options,
    )
