"""Criteo-shaped data of any size with planted interactions and a known Bayes-optimal probability.

The law: every field is drawn independently from a finite distribution (a missing value is one of its values), and

    logit P(label = 1) = bias + Σ_f effect_f[value_f] + Σ_(a, b) left_a[value_a] · right_b[value_b]

Effects and both factors of every interaction have mean zero under their field's distribution. So the mean of an interaction
given the value of either of its fields is exactly zero: a first-order model cannot see it, and what precedes the second sum is
the best additive approximation of the logit in mean square. Fields of high cardinality carry no signal; they are noise.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ctrlib.metrics import auc, log_loss
from ctrlib.schema import DataError

# name: (missing rate, mean and standard deviation of ln(1 + count)); Criteo's, rounded
_NUMERIC = {
    "I1": (0.45, 0.8, 1.0),
    "I2": (0.0, 2.1, 2.0),
    "I3": (0.21, 2.2, 1.2),
    "I4": (0.21, 1.7, 0.9),
    "I5": (0.03, 7.3, 2.0),
    "I6": (0.23, 3.5, 1.7),
    "I7": (0.05, 1.6, 1.3),
    "I8": (0.001, 2.0, 1.1),
    "I9": (0.05, 3.6, 1.6),
    "I10": (0.45, 0.4, 0.4),
    "I11": (0.05, 0.9, 0.8),
    "I12": (0.77, 0.3, 0.6),
    "I13": (0.21, 1.8, 1.0),
}
_MAX_COUNT = 50_000

# name: (missing rate, values); Criteo's rates, rounded; most vocabularies are far smaller, so that 300,000 rows can teach them
_CATEGORICAL = {
    "C1": (0.0, 100),
    "C2": (0.0, 120),
    "C3": (0.03, 100_000),
    "C4": (0.03, 500),
    "C5": (0.0, 100),
    "C6": (0.12, 24),
    "C7": (0.0, 400),
    "C8": (0.0, 100),
    "C9": (0.0, 3),
    "C10": (0.0, 600),
    "C11": (0.0, 300),
    "C12": (0.03, 80_000),
    "C13": (0.0, 200),
    "C14": (0.0, 26),
    "C15": (0.0, 500),
    "C16": (0.03, 60_000),
    "C17": (0.0, 10),
    "C18": (0.0, 200),
    "C19": (0.44, 100),
    "C20": (0.44, 4),
    "C21": (0.03, 70_000),
    "C22": (0.77, 18),
    "C23": (0.0, 15),
    "C24": (0.03, 400),
    "C25": (0.44, 40),
    "C26": (0.44, 300),
}
_ZIPF_EXPONENT = 1.05

_BASE_RATE = 0.25

# standard deviation of each first-order effect, in logits
_EFFECTS = {
    "I6": 0.35,
    "I7": 0.35,
    "I11": 0.3,
    "I13": 0.3,
    "C2": 0.25,
    "C5": 0.25,
    "C6": 0.4,
    "C9": 0.35,
    "C14": 0.5,
    "C17": 0.45,
    "C20": 0.3,
    "C22": 0.25,
    "C23": 0.45,
    "C25": 0.2,
}

# standard deviation of each interaction, in logits
_INTERACTIONS = {
    ("C9", "C17"): 0.55,
    ("C14", "C17"): 0.5,
    ("C20", "C23"): 0.5,
    ("C2", "C9"): 0.3,
    ("I7", "C9"): 0.4,
}

PLANTED_PAIRS: tuple[tuple[str, str], ...] = tuple(_INTERACTIONS)
"""The pairs of fields whose effects are not additive; all other pairs are."""

CHUNK_ROWS = 100_000

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class SyntheticField:
    """One field of the law: V values, the first of them missing.

    Attributes:
        name: the column.
        values: [V] int32 or string; null first.
        probability: [V] sums to 1.
        effect: [V] first-order effect in logits, mean zero; all zero for a field of noise.
    """

    name: str
    values: pa.Array
    probability: Floats
    effect: Floats


@dataclass(frozen=True, slots=True)
class PlantedInteraction:
    """``left[a] · right[b]`` logits for values a and b of the fields ``pair``; factors [V, R] with mean zero."""

    pair: tuple[str, str]
    left: Floats
    right: Floats


@dataclass(frozen=True, slots=True)
class Truth:
    """What no model can know better.

    Attributes:
        probability: [N] the true probability that the label is 1.
        additive_logit: [N] bias + first-order effects: the additive function nearest to the logit in mean square.
    """

    probability: Floats
    additive_logit: Floats


class CriteoLike:
    """The law of one synthetic data set: columns ``label`` (int8), I1..I13 (int32 counts), C1..C26 (strings of 8 hex digits).

    Args:
        seed: which law (effects and interactions); sizes, missing rates and strengths are the same for every seed.

    Attributes:
        bias: the logit without effects; puts the label rate near 0.25.
        fields: the 39 fields, in column order.
        interactions: one for each of :data:`PLANTED_PAIRS`.
    """

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.seed = seed
        numeric = [_numeric_field(name, *law, rng) for name, law in _NUMERIC.items()]
        categorical = [_categorical_field(name, *law, rng) for name, law in _CATEGORICAL.items()]
        self.fields: tuple[SyntheticField, ...] = (*numeric, *categorical)
        by_name = {f.name: f for f in self.fields}
        self.interactions: tuple[PlantedInteraction, ...] = tuple(
            _interaction(by_name[a], by_name[b], scale, rng) for (a, b), scale in _INTERACTIONS.items()
        )
        # The logit is nearly normal, and the mean of σ over N(b, v) is close to σ(b / √(1 + πv/8)).
        variance = sum(s**2 for s in [*_EFFECTS.values(), *_INTERACTIONS.values()])
        self.bias = math.log(_BASE_RATE / (1 - _BASE_RATE)) * math.sqrt(1 + math.pi * variance / 8)
        self._cumulative = {f.name: np.cumsum(f.probability) for f in self.fields}

    def generate(self, rows: int, part: int = 0) -> tuple[pa.Table, Truth]:
        """``rows`` rows and what is true of them. The same arguments give the same rows; other parts are independent rows.

        Args:
            rows: N.
            part: which draw from the law.

        Raises:
            DataError: negative ``rows`` or ``part``.
        """
        if rows < 0 or part < 0:
            raise DataError(f"rows is {rows} and part {part}; expected neither below 0")
        rng = np.random.default_rng([self.seed, part, 1])
        used = {*_EFFECTS, *(name for pair in PLANTED_PAIRS for name in pair)}
        index: dict[str, NDArray[np.intp]] = {}
        columns: dict[str, pa.Array] = {}
        for f in self.fields:
            index_N = np.searchsorted(self._cumulative[f.name][:-1], rng.random(rows), side="right")
            columns[f.name] = f.values.take(pa.array(index_N))
            if f.name in used:
                index[f.name] = index_N
        additive_N = np.full(rows, self.bias)
        for f in self.fields:
            if f.name in _EFFECTS:
                additive_N += f.effect[index[f.name]]
        logit_N = additive_N.copy()
        for interaction in self.interactions:
            a, b = interaction.pair
            logit_N += np.einsum("nr,nr->n", interaction.left[index[a]], interaction.right[index[b]])
        probability_N = 1 / (1 + np.exp(-logit_N))
        label_N = (rng.random(rows) < probability_N).astype(np.int8)
        return pa.table({"label": label_N} | columns), Truth(probability_N, additive_N)


def write_splits(folder: str | Path, rows: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """Write ``train.parquet``, ``valid.parquet`` and ``test.parquet`` (8:1:1) of the law ``CriteoLike(seed)``.

    One chunk of rows is in memory at a time, and 17 bytes for every row of a split. Each file appears only when it is complete.

    Args:
        folder: created if missing; files of these names in it are replaced.
        rows: of the three splits together.
        seed: the law.

    Returns:
        For each split: ``rows``, ``label_rate``, ``bayes_auc`` and ``bayes_log_loss`` (of the true probabilities), and
        ``additive_auc`` (of the additive logit).

    Raises:
        DataError: fewer than 10 rows.
    """
    if rows < 10:
        raise DataError(f"rows is {rows}; expected at least 10, for a row in each of the splits 8:1:1")
    law = CriteoLike(seed)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"train": rows - 2 * (rows // 10), "valid": rows // 10, "test": rows // 10}
    part = 0
    summary: dict[str, dict[str, float]] = {}
    for split, size in sizes.items():
        chunks = [min(CHUNK_ROWS, size - start) for start in range(0, size, CHUNK_ROWS)]
        summary[split] = _write_split(law, folder / f"{split}.parquet", chunks, part)
        part += len(chunks)
    return summary


def _write_split(law: CriteoLike, path: Path, chunks: list[int], first_part: int) -> dict[str, float]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    labels: list[NDArray[np.int8]] = []
    truths: list[Truth] = []
    try:
        schema = law.generate(0)[0].schema
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for part, size in enumerate(chunks, first_part):
                table, truth = law.generate(size, part)
                writer.write_table(table)
                labels.append(table["label"].to_numpy())
                truths.append(truth)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    label_N = np.concatenate(labels)
    probability_N = np.concatenate([truth.probability for truth in truths])
    return {
        "rows": len(label_N),
        "label_rate": float(label_N.mean()),
        "bayes_auc": auc(label_N, probability_N),
        "bayes_log_loss": log_loss(label_N, probability_N),
        "additive_auc": auc(label_N, np.concatenate([truth.additive_logit for truth in truths])),
    }


def _numeric_field(name: str, missing: float, mean: float, std: float, rng: np.random.Generator) -> SyntheticField:
    """Counts with a log-normal density at 0.._MAX_COUNT; the effect is a saturating curve, and any number where missing."""
    log_count = np.log1p(np.arange(_MAX_COUNT + 1))
    probability = _with_missing(missing, np.exp(-((log_count - mean) ** 2) / (2 * std**2) - log_count))
    values = pa.concat_arrays([pa.nulls(1, pa.int32()), pa.array(np.arange(_MAX_COUNT + 1, dtype=np.int32))])
    effect = rng.choice([-1.0, 1.0]) * _curve(name)
    effect[0] = rng.uniform(-1, 1)
    return SyntheticField(name, values, probability, _standardized(effect, probability) * _EFFECTS.get(name, 0.0))


def _curve(name: str) -> Floats:
    """[V] of a numeric field: the standardised ln(1 + count), squashed; 0 where missing."""
    _, mean, std = _NUMERIC[name]
    return np.concatenate([[0.0], np.tanh((np.log1p(np.arange(_MAX_COUNT + 1)) - mean) / std)])


def _categorical_field(name: str, missing: float, size: int, rng: np.random.Generator) -> SyntheticField:
    probability = _with_missing(missing, np.arange(1.0, size + 1) ** -_ZIPF_EXPONENT)
    # Odd multiples and shifted exclusive-ors permute the 32-bit integers, so no two values of a field collide.
    codes = (np.arange(1, size + 1, dtype=np.uint32) + np.uint32(int(name[1:]) << 20)) * np.uint32(2_654_435_761)
    codes = (codes ^ (codes >> np.uint32(15))) * np.uint32(2_246_822_519)
    codes ^= codes >> np.uint32(13)
    text = codes.astype(">u4").tobytes().hex()
    values = pa.array([None, *(text[i : i + 8] for i in range(0, len(text), 8))], pa.string())
    return SyntheticField(
        name, values, probability, _standardized(rng.normal(size=size + 1), probability) * _EFFECTS.get(name, 0.0)
    )


def _with_missing(missing: float, mass: Floats) -> Floats:
    return np.concatenate([[missing], (1 - missing) * mass / mass.sum()])


def _standardized(values: Floats, probability: Floats) -> Floats:
    """``values`` [V] moved and scaled to mean 0 and standard deviation 1."""
    centred = values - probability @ values
    return np.asarray(centred / math.sqrt(probability @ centred**2))


def _interaction(left: SyntheticField, right: SyntheticField, std: float, rng: np.random.Generator) -> PlantedInteraction:
    """Category × category: the cosine of the angle between two points on a circle. Count × category: a slope per category."""
    right_VR = _circle(len(right.values), rng)
    if left.name in _NUMERIC:
        left_VR, right_VR = _curve(left.name)[:, None], right_VR[:, :1]
    else:
        left_VR = _circle(len(left.values), rng)
    left_VR = left_VR - left.probability @ left_VR
    right_VR = right_VR - right.probability @ right_VR
    # E[(l·r)²] for independent l and r is the trace of the product of their second moments.
    variance = np.trace((left_VR.T * left.probability) @ left_VR @ (right_VR.T * right.probability) @ right_VR)
    return PlantedInteraction((left.name, right.name), left_VR * (std / math.sqrt(variance)), right_VR)


def _circle(size: int, rng: np.random.Generator) -> Floats:
    """[size, 2] evenly spaced points on the unit circle in random order, so that no value interacts more than another."""
    angle = 2 * np.pi * (rng.permutation(size) + rng.random()) / size
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)
