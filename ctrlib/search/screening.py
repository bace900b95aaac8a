"""Ranking fields by what they tell of the label, before any model: OutRank (Škrlj and Mramor, RecSys 2023,
doi:10.1145/3604915.3610636) and its 3MR order of relevance, redundancy and relation.

Plain mutual information grows with the number of a field's values: of 50,000 values that mean nothing it is the highest. So
the information that a field of the same values, but no meaning, would seem to have is taken off.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from ctrlib.batch import Batch
from ctrlib.config import ConfigError, check_choice, positive, to_json
from ctrlib.data.loader import Loader
from ctrlib.data.store import Store
from ctrlib.progress import track
from ctrlib.schema import BatchLayout, DataError, suggest
from ctrlib.search.ranking import Top, best_fields, check_top, number_to_keep
from ctrlib.search.selection import Selection

Noise = Literal["none", "shift", "permute", "exact"]
Aggregate = Literal["median", "mean", "sum"]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_log = logging.getLogger("ctrlib")
_CONTROLS = (2, 100, 2_000, 10_000, 50_000)  # values of random fields that no field should fall behind
_PARTIAL_ROWS = 1024  # a last block that is not full counts from here on
_PAIRS_REPORTED = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class OutRankConfig:
    """
    Args:
        top: fields to keep, as a number or a share; ``None``: those with z > 3 and a score above every noise control's.
        noise: what is taken off the mutual information; see :func:`relevance`.
        permutations: of the label, with ``permute``; z needs two.
        block_rows: rows, drawn at random, whose scores are worked out together; a field's score is the median over the blocks.
        subsampling: read every n-th row.
        num_bins: quantile bins of a number.
        redundancy: order the fields by 3MR (:func:`rank_3mr`), which also looks at every pair of them.
        max_pairs: of fields in one block; those looked at least often come first.
        label: against which to score; ``None``: the first.
    """

    top: Top | None = None
    noise: Noise = "permute"
    permutations: int = 5
    block_rows: int = 2**14
    subsampling: int = 1
    num_bins: int = 32
    redundancy: bool = False
    max_pairs: int = 2**15
    label: str | None = None

    def __post_init__(self) -> None:
        if self.top is not None:
            check_top("outrank.top", self.top)
        check_choice("outrank.noise", self.noise, get_args(Noise))
        positive("outrank.subsampling", self.subsampling)
        positive("outrank.max_pairs", self.max_pairs)
        for name, value in (
            ("permutations", self.permutations),
            ("block_rows", self.block_rows),
            ("num_bins", self.num_bins),
        ):
            if value < 2:
                raise ConfigError(f"outrank.{name} is {value}; expected 2 or more")
        if self.top is None and self.noise != "permute":
            raise ConfigError(
                f"outrank.top is None, which needs z, but noise {self.noise!r} has none; set top, or noise to 'permute'"
            )

    @classmethod
    def released_code(cls, top: Top) -> OutRankConfig:
        """The defaults of the authors' code: labels shifted instead of permuted, every tenth row."""
        return cls(top=top, noise="shift", subsampling=10)


@dataclass(frozen=True, slots=True)
class Relevance:
    """What a field tells of a label, in nats.

    Attributes:
        score: I(x; y) − noise.
        plain: I(x; y) = H(y) − H(y | x), as counted.
        z: ``score`` in standard deviations of the permutations; NaN with another noise.
    """

    score: float
    plain: float
    z: float


def relevance(
    x_N: npt.ArrayLike,
    y_N: npt.ArrayLike,
    *,
    noise: Noise = "permute",
    permutations: int = 5,
    rng: np.random.Generator | None = None,
) -> Relevance:
    """Mutual information without the part that noise of the same cardinality would have:

        S(x, y) = H̃(y | x) − H(y | x),   H(y | x) = −Σ_v (n_v/n) Σ_c p(c | v) ln p(c | v)

    ============ =========================================================================================
    noise        H̃(y | x)
    ============ =========================================================================================
    none         H(y): the score is the plain mutual information
    shift        with the label of row t + n_v in row t, n_v the rows that share its value: the released
                 code's stand-in for a permutation. Where labels come in runs it takes off signal
    permute      mean over so many permutations of the label
    exact        expectation over all of them (Vinh et al., JMLR 11, 2010), from the counts alone
    ============ =========================================================================================

    Args:
        x_N, y_N: [N] codes of the field and of the label, any whole numbers.
        noise, permutations: see above.
        rng: of the permutations; ``None``: seed 0.

    Raises:
        DataError: no rows, or different numbers of them.
    """
    x, y = (np.asarray(values) for values in (x_N, y_N))
    if x.ndim != 1 or x.shape != y.shape or not len(x):
        raise DataError(f"the field is of shape {x.shape} and the label of shape {y.shape}; expected [rows] for both")
    check_choice("noise", noise, get_args(Noise))
    x_N, y_N = dense_codes(x), dense_codes(y)
    # NOTE[DIFF] the released code takes columns of equal sums for the same column; here, equal ones
    if np.array_equal(x_N, y_N):
        noise = "none"
    twins_RN = permuted(y_N, permutations, np.random.default_rng(0) if rng is None else rng) if noise == "permute" else None
    return coded_relevance(x_N, y_N, np.arange(len(y_N)), noise, twins_RN)


def rank_3mr(
    relevance_F: Floats,
    redundancy_FF: Floats,
    relation_FF: Floats,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    aggregate: Aggregate = "median",
) -> list[int]:
    """The order in which fields are best added: the most relevant one, then again and again the largest

        J(f) = R_f − α·agg_{g ranked} D_fg + β·agg_{g ranked} T_fg

    R, D and T are each scaled to [0, 1] before; a pair that is not known (NaN) counts 0.

    Args:
        relevance_F: R, what each field tells of the label.
        redundancy_FF: D, what two fields tell of each other; symmetric.
        relation_FF: T, what both together tell of the label; symmetric.
        alpha, beta, aggregate: see above.

    Returns:
        The numbers of the fields, best first.
    """
    check_choice("aggregate", aggregate, get_args(Aggregate))
    gather: Callable[..., Floats] = getattr(np, aggregate)
    r_F = _scaled(relevance_F)
    gain_FF, loss_FF = (_scaled(np.where(np.eye(len(r_F), dtype=bool), np.nan, m)) for m in (relation_FF, redundancy_FF))
    ranked = [int(np.argmax(r_F))]
    left = [f for f in range(len(r_F)) if f != ranked[0]]
    while left:
        pairs = np.ix_(left, ranked)
        j = r_F[left] - alpha * gather(loss_FF[pairs], axis=1) + beta * gather(gain_FF[pairs], axis=1)
        ranked.append(left.pop(int(np.argmax(j))))
    return ranked


def search_outrank(store: Store, config: OutRankConfig, *, seed: int) -> Selection:
    """Rank the fields of the training rows by :func:`relevance`, block by block, and keep the best.

    Ids and quantile bins of numbers are scored as they are; of a sequence, every value of a row is one observation of the row's
    label. Row weights are not looked at. The report has ``plain`` and ``z`` by field, ``controls`` (scores of fields of random
    values and of the row's number in its block), and with ``redundancy`` the 3MR ``order`` and the ``relation`` of the best
    pairs, which are candidates for crosses.

    Args:
        store: of which only the training rows are read.
        config: see :class:`OutRankConfig`.
        seed: of the blocks, the permutations and the controls.

    Raises:
        ConfigError: no such label, or ``top`` larger than the number of fields.
        DataError: no field passes where ``top`` is ``None``.
    """
    # NOTE[DIFF] the released code makes one 0/1 field out of every value of a list; here a field has one score
    # NOTE[DIFF] it ranks 3MR's three families by mutual information without correction; here all three have the same noise off
    started = time.perf_counter()
    schema = store.encoder.schema
    if config.top is not None:
        number_to_keep(schema, config.top)
    layout, split = store.encoder.layout, store.split("train")
    column = label_column(layout, config.label)
    rng = np.random.default_rng(seed)
    tally = Tally(layout.names, config)
    some = None if config.subsampling == 1 else torch.arange(0, split.num_rows, config.subsampling)
    # NOTE[DIFF] the released code takes its blocks as the file has them; of a file by time or by label, a block may then have
    # one value of a slow field, or one label, and no score
    blocks = Loader(split, config.block_rows, rows=some, shuffle=True, seed=seed)
    used = 0
    with track("outrank", len(blocks), "blocks") as tracker:
        for batch in blocks:
            if used and too_short(len(batch), config.block_rows):
                break
            assert batch.labels is not None
            tally.add(layout, batch, dense_codes(batch.labels[:, column].numpy()), rng)
            used += len(batch)
            tracker.advance(1)

    scores = tally.medians("score")
    z = tally.medians("z")
    report: dict[str, Any] = {
        "settings": to_json(config),
        "label": layout.labels[column],
        "rows": used,
        "blocks": tally.blocks,
        "plain": tally.medians("plain"),
        "z": z,
        "controls": tally.controls,
    }
    order = sorted(layout.names, key=lambda name: -scores[name])
    if config.redundancy:
        order = tally.order_3mr()
        best = sorted(tally.relation_of_pairs(), key=lambda pair: -pair[1])[:_PAIRS_REPORTED]
        report |= {"order": order, "relation": dict(best)}
    if config.top is None:
        bar = max(tally.controls.values())
        passed = {f.name for f in schema.fields if z[f.name] > 3 and scores[f.name] > bar}  # gaps follow their histories
        if not passed:
            raise DataError(
                f"no field tells more of {layout.labels[column]!r} than noise does (z above 3, score above {bar:.2g}); "
                "give more rows, or set outrank.top to keep the best fields all the same"
            )
        passed |= {name for cross in schema.crosses if cross.name in passed for name in cross.of}
        kept = tuple(f.name for f in schema.fields if f.name in passed)
    else:
        place = {name: -float(i) for i, name in enumerate(order)}
        kept = best_fields(schema, place, config.top)
    report["seconds"] = time.perf_counter() - started
    _log.info("outrank keeps %d of %d fields", len(kept), len(schema.fields))
    return Selection(method="outrank", encoder_hash=store.encoder.hash, fields=kept, scores=scores, report=report)


def too_short(rows: int, block_rows: int) -> bool:
    """Whether a last block has too few rows to count as much as a full one."""
    return rows <= min(_PARTIAL_ROWS, block_rows - 1)


def label_column(layout: BatchLayout, label: str | None) -> int:
    """The column of ``Batch.labels`` that holds a label; ``None``: the first.

    Raises:
        ConfigError: no such label; names the nearest.
    """
    if label is None:
        return 0
    if label not in layout.labels:
        raise ConfigError(f"the data has no label {label!r}{suggest(label, layout.labels)} (all: {', '.join(layout.labels)})")
    return layout.labels.index(label)


class Tally:
    """The scores of fields, noise controls and pairs of fields, block by block."""

    def __init__(self, names: Sequence[str], config: OutRankConfig) -> None:
        self._names, self._config = tuple(names), config
        self.blocks = 0
        self._found: dict[str, list[Relevance]] = {name: [] for name in names}
        self._noise: dict[str, list[float]] = {name: [] for name in (*(f"random_{size}" for size in _CONTROLS), "row_number")}
        self._pairs = list(combinations(range(len(names)), 2)) if config.redundancy else []
        self._times_P = np.zeros(len(self._pairs), dtype=np.int64)
        self._redundancy: dict[tuple[int, int], list[float]] = {}
        self._relation: dict[tuple[int, int], list[float]] = {}

    def add(self, layout: BatchLayout, batch: Batch, y_N: Ints, rng: np.random.Generator) -> None:
        """Score one block."""
        noise, rows = self._config.noise, np.arange(len(y_N))
        twins_RN = permuted(y_N, self._config.permutations, rng) if noise == "permute" else None
        plain: dict[str, Ints] = {}
        for name, codes, row in columns(layout, batch, self._config.num_bins):
            x = dense_codes(codes)
            self._found[name].append(coded_relevance(x, y_N, rows if row is None else row, noise, twins_RN))
            if row is None:
                plain[name] = x
        random = [rng.integers(0, size, len(y_N)) for size in _CONTROLS]
        for scores, codes in zip(self._noise.values(), [*random, rows], strict=True):
            scores.append(coded_relevance(dense_codes(codes), y_N, rows, noise, twins_RN).score)
        self.blocks += 1

        least = np.argsort(self._times_P, kind="stable")[: self._config.max_pairs]
        self._times_P[least] += 1
        for p in least:
            i, j = self._pairs[p]
            a, b = plain.get(self._names[i]), plain.get(self._names[j])
            if a is None or b is None:  # a sequence has several values in a row: there is no pair of two values
                continue
            both = dense_codes(a * (int(b.max()) + 1) + b)
            b_twins_RN = permuted(b, self._config.permutations, rng) if noise == "permute" else None
            self._redundancy.setdefault((i, j), []).append(coded_relevance(a, b, rows, noise, b_twins_RN).score)
            self._relation.setdefault((i, j), []).append(coded_relevance(both, y_N, rows, noise, twins_RN).score)

    def medians(self, what: Literal["score", "plain", "z"]) -> dict[str, float]:
        """By field, over the blocks."""
        return {name: float(np.median([getattr(r, what) for r in found])) for name, found in self._found.items()}

    @property
    def controls(self) -> dict[str, float]:
        """The medians of the scores of noise."""
        return {name: float(np.median(scores)) for name, scores in self._noise.items()}

    def pairs(self) -> tuple[Floats, Floats]:
        """Redundancy and relation, [F, F], NaN where not known."""
        size = len(self._names)
        full = np.full((2, size, size), np.nan)
        for matrix, known in zip(full, (self._redundancy, self._relation), strict=True):
            for (i, j), values in known.items():
                matrix[i, j] = matrix[j, i] = np.median(values)
        return full[0], full[1]

    def order_3mr(self) -> list[str]:
        """The fields by :func:`rank_3mr`, best first."""
        redundancy_FF, relation_FF = self.pairs()
        scores = self.medians("score")
        relevance_F = np.array([scores[name] for name in self._names])
        return [self._names[f] for f in rank_3mr(relevance_F, redundancy_FF, relation_FF)]

    def relation_of_pairs(self) -> Iterator[tuple[str, float]]:
        """``"user*item"`` and what the two together tell of the label."""
        for (i, j), values in self._relation.items():
            yield f"{self._names[i]}*{self._names[j]}", float(np.median(values))


def columns(layout: BatchLayout, batch: Batch, num_bins: int) -> Iterator[tuple[str, npt.NDArray[Any], Ints | None]]:
    """Name, codes, and for a sequence the row of each code, of every field."""
    for i, sparse in enumerate(layout.sparse):
        yield sparse.name, batch.sparse[:, i].numpy(), None
    for i, dense in enumerate(layout.dense):
        yield dense.name, quantile_bins(batch.dense[:, i].numpy(), num_bins), None
    for column in layout.sequences:
        yield column.name, *list_codes(batch, column.name)


def list_codes(batch: Batch, name: str) -> tuple[npt.NDArray[Any], Ints]:
    """The values of a sequence, and the row of each. An empty one has a value of its own: that there is none may tell
    something."""
    ragged = batch.sequences[name].flat
    lengths = ragged.offsets.diff().numpy()
    row, empty = np.repeat(np.arange(len(lengths)), lengths), np.flatnonzero(lengths == 0)
    codes = np.concatenate([ragged.values.numpy(), np.zeros(len(empty), dtype=np.int32)])
    return codes, np.concatenate([row, empty])


def quantile_bins(x_N: npt.NDArray[np.float32], num_bins: int) -> Ints:
    """The quantile bin of every number among those present; missing ones have a bin of their own.

    So has a number that is an edge: of one that is mostly a single value all edges are that value, and what is told by being
    above or below it would be lost.
    """
    gone_N = np.isnan(x_N)
    if gone_N.all():
        return np.zeros(len(x_N), dtype=np.int64)
    edges = np.unique(np.quantile(x_N[~gone_N], np.arange(1, num_bins) / num_bins))
    between_N = np.searchsorted(edges, x_N, side="left") + np.searchsorted(edges, x_N, side="right")
    return np.where(gone_N, 2 * len(edges) + 1, between_N)


def dense_codes(values: npt.NDArray[Any]) -> Ints:
    """Codes from 0 without gaps, equal where the values are."""
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


def permuted(y_N: Ints, count: int, rng: np.random.Generator) -> Ints:
    """[count, N]"""
    return rng.permuted(np.broadcast_to(y_N, (count, len(y_N))), axis=1)


def coded_relevance(x_M: Ints, y_N: Ints, row_M: Ints, noise: Noise, twins_RN: Ints | None) -> Relevance:
    """:func:`relevance` of codes without gaps; observation m has the value x_m and the label of row m."""
    y_M = y_N[row_M]
    classes = int(y_N.max()) + 1
    count_V = np.bincount(x_M)
    count_C = np.bincount(y_M, minlength=classes)
    total, sum_V = len(x_M), _sum_n_log_n(count_V)

    def conditional(label_M: Ints) -> float:  # H(y | x), from the counts of pairs of codes
        return (sum_V - _sum_n_log_n(np.bincount(x_M * classes + label_M))) / total

    entropy = float(np.log(total) - _sum_n_log_n(count_C) / total)
    plain, z = entropy - conditional(y_M), float("nan")
    if noise == "none":
        return Relevance(plain, plain, z)
    if noise == "exact":
        return Relevance(plain - _expected_information(count_V, count_C), plain, z)
    if noise == "shift":
        shifted = conditional(y_N[(row_M + count_V[x_M]) % len(y_N)])
        return Relevance(shifted - (entropy - plain), plain, z)
    assert twins_RN is not None
    twins = np.array([conditional(twin_N[row_M]) for twin_N in twins_RN])
    score, spread = float(twins.mean()) - (entropy - plain), float(twins.std(ddof=1))
    return Relevance(score, plain, score / spread if spread > 0 else 0.0)


def _sum_n_log_n(counts: Ints) -> float:
    some = counts[counts > 1].astype(np.float64)
    return float((some * np.log(some)).sum())


def _expected_information(count_V: Ints, count_C: Ints) -> float:
    """E[I(x; y)] over all permutations of the rows of one of them:

    Σ_{v,c} Σ_k (k/n) ln(n k / (n_v n_c)) P(k),   P hypergeometric: k of the n_v rows are among the n_c of N.
    """
    n = int(count_V.sum())
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    sizes, times = np.unique(count_V, return_counts=True)  # values that are equally frequent have equal terms
    total = 0.0
    for c in count_C[count_C > 0].tolist():
        low, high = np.maximum(1, sizes + c - n), np.minimum(sizes, c)
        lengths = high - low + 1
        a = np.repeat(sizes, lengths)
        starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
        k = np.arange(len(a)) - starts + np.repeat(low, lengths)
        log_p = log_factorial[a] + log_factorial[n - a] + log_factorial[c] + log_factorial[n - c] - log_factorial[n]
        log_p -= log_factorial[k] + log_factorial[a - k] + log_factorial[c - k] + log_factorial[n - a - c + k]
        terms = np.exp(log_p) * (k / n) * np.log(n * k / (a * float(c)))
        total += float((terms * np.repeat(times, lengths)).sum())
    return total


def _scaled(values: Floats) -> Floats:
    """Known values to [0, 1]; unknown ones 0, and all of them if they are all alike."""
    known = values[~np.isnan(values)]
    spread = known.max() - known.min() if len(known) else 0.0
    return np.nan_to_num((values - known.min()) / spread) if spread > 0 else np.zeros_like(values)
