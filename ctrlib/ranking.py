"""A saved model at work: one context, its candidates, calibrated probabilities. Raw values in, no table on the way."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from ctrlib.artifact import Artifact, load
from ctrlib.batch import Batch, Ragged
from ctrlib.calibration import calibrate_tasks, sigmoid
from ctrlib.config import ConfigError, Table
from ctrlib.data.requests import Encoded, Request, RequestEncoder
from ctrlib.hoisting import Hoisted, Side, export_model, fuse, hoist
from ctrlib.models.presets import COMPONENTS
from ctrlib.schema import BatchLayout, DataError, suggest

_log = logging.getLogger("ctrlib")
Floats = npt.NDArray[np.float64]

TOLERANCE = 1e-6
"""How far a probability may be from that of the model itself, on rows without a context of their own."""

_SAMPLE_ROWS = 32


@dataclass(frozen=True, slots=True)
class Ranked:
    """The best candidates: ``order`` [K] are their places in the request, best first; ``probability`` [K] is of each."""

    order: npt.NDArray[np.int64]
    probability: Floats


class Ranker:
    """Scores the candidates of a context. Several threads may use one.

    What depends on the context alone is computed once per request, not once per candidate (:mod:`ctrlib.hoisting`);
    :attr:`hoisted` tells what that is.

    Args:
        artifact: a loaded model, see :meth:`load`.
        hoisting: compute the context once; without it every candidate is a row with the whole context, as in evaluation.

    Raises:
        ConfigError: the model is one of nodes.
    """

    def __init__(self, artifact: Artifact, *, hoisting: bool = True) -> None:
        artifact.require_rows("ranking")
        self.artifact = artifact
        artifact.model.requires_grad_(False).eval()
        self.encoder = RequestEncoder(artifact.encoder)
        self.sequences = sequence_inputs(artifact.encoder.layout)
        self.hoisted: tuple[Hoisted, ...] = ()
        self._hoisted: fx.GraphModule | None = None
        if hoisting:
            self._hoist()

    @classmethod
    def load(cls, path: str | Path, *, hoisting: bool = True, table: Table = COMPONENTS) -> Ranker:
        """A ranker of a run or artifact folder; its tables are mapped, and shared by all processes that serve it.

        Raises:
            DataError, ConfigError: as :func:`ctrlib.artifact.load`.
        """
        return cls(load(path, table), hoisting=hoisting)

    @property
    def labels(self) -> tuple[str, ...]:
        """What the model predicts."""
        return self.artifact.schema.labels

    @property
    def context_fields(self) -> tuple[str, ...]:
        """What a context must have."""
        return self.encoder.context_inputs

    @property
    def candidate_fields(self) -> tuple[str, ...]:
        """What every candidate must have."""
        return self.encoder.candidate_inputs

    @property
    def hoisted_share(self) -> float:
        """The share of multiplications (of matrix products) done once per request instead of once per candidate."""
        total = sum(h.multiplications for h in self.hoisted)
        return sum(h.multiplications * h.share for h in self.hoisted) / total if total else 0.0

    def score(self, context: Mapping[str, object], candidates: object) -> Floats:
        """Probabilities of the candidates, in their order.

        Args:
            context: raw values of the fields with side ``context``; ``None`` is a missing value.
            candidates: raw values of the other fields: a list of dicts, a dict of lists, or a frame (Arrow, Polars, pandas).

        Returns:
            [N] probabilities, or [N, T] for several labels; calibrated if the artifact has a calibration.

        Raises:
            DataError: a field is absent, or a value cannot be what its field says; names the field and the candidate. Or the
                model's numbers overflow, since a value is far from those that it was trained on.
        """
        return self.probabilities(self.encoder.encode(context, candidates))

    def rank(
        self, context: Mapping[str, object], candidates: object, top_k: int | None = None, *, label: str | None = None
    ) -> Ranked:
        """The best candidates, best first; equal ones in the order given.

        Args:
            context, candidates: see :meth:`score`.
            top_k: so many at most; ``None``: all.
            label: by which to rank, where the model has several; by default the first.

        Raises:
            DataError: as :meth:`score`.
            ConfigError: no such label, or ``top_k`` below 1.
        """
        return self.best(self.score(context, candidates), top_k, label=label)

    def best(self, probability: Floats, top_k: int | None = None, *, label: str | None = None) -> Ranked:
        """What :meth:`rank` makes of probabilities."""
        if top_k is not None and top_k < 1:
            raise ConfigError(f"top_k is {top_k}; expected 1 or more, or nothing for all candidates")
        if label is not None and label not in self.labels:
            raise ConfigError(f"the model has no label {label!r}{suggest(label, self.labels)}")
        at = 0 if label is None else self.labels.index(label)
        chosen = probability if probability.ndim == 1 else probability[:, at]
        order = np.argsort(-chosen, kind="stable")[:top_k]
        return Ranked(order.astype(np.int64), chosen[order])

    def probabilities(self, request: Request) -> Floats:
        """Of an encoded request; see :meth:`score`."""
        if not len(request):
            return np.zeros((0,) if len(self.labels) == 1 else (0, len(self.labels)))
        found = self._served(request)
        _check_finite(found)
        return found

    def score_together(self, requests: Sequence[Request]) -> list[Floats]:
        """Probabilities of several small requests by one pass of the model, in which every candidate is a row of its own.

        Raises:
            DataError: those of one request are no numbers (see :meth:`score`); :meth:`probabilities` tells of which.
        """
        sizes = [len(request) for request in requests]
        if sum(sizes) == 0:
            return [self.probabilities(request) for request in requests]
        with torch.inference_mode():
            found = self._probabilities(self.artifact.model(_joined([r.batch() for r in requests if len(r)])).logits)
        _check_finite(found)
        return np.split(found, np.cumsum(sizes)[:-1].tolist())

    def check(self) -> float:
        """The largest difference of a probability between what serves and the model itself, on random rows.

        Raises:
            DataError: a probability is not a number.
        """
        differences = []
        for seed in range(3):
            request = sample_request(self.artifact.encoder.layout, self.encoder, seed)
            with torch.inference_mode():
                expected = self._probabilities(self.artifact.model(request.batch()).logits)
            if not np.isfinite(expected).all():
                raise DataError("the model gives probabilities that are no numbers; train it again")
            differences.append(np.abs(self._served(request) - expected).max())
        return float(np.max(differences))  # NaN stays NaN, which Python's max would drop

    def _served(self, request: Request) -> Floats:
        with torch.inference_mode():
            if self._hoisted is None:
                return self._probabilities(self.artifact.model(request.batch()).logits)
            return self._probabilities(self._hoisted(*hoisted_inputs(request, self.sequences)))

    def _probabilities(self, logits: Tensor) -> Floats:
        return sigmoid(calibrate_tasks(self.artifact.calibration, logits.double().numpy()))

    def _hoist(self) -> None:
        sides = self.encoder.sides
        if not (sides.sparse.any() or sides.dense.any() or sides.sequences):
            return
        layout = self.artifact.encoder.layout
        side = Side(
            tuple(np.flatnonzero(sides.sparse).tolist()), tuple(np.flatnonzero(sides.dense).tolist()), tuple(sides.sequences)
        )
        example = sample_request(layout, self.encoder, 0).batch()
        try:
            module, found = hoist(export_model(self.artifact.model, example, self.sequences), side, self.sequences)
            self._hoisted, self.hoisted = fuse(module), found
            worst = self.check()
        except DataError:  # of the model itself
            raise
        except Exception as error:  # of a block of one's own, anything: it is served as it is
            self._hoisted, self.hoisted = None, ()
            _log.warning("the context is not computed once: the model cannot be rewritten (%s)", str(error)[:300])
            return
        if not worst <= TOLERANCE:
            self._hoisted, self.hoisted = None, ()
            _log.warning("the context is not computed once: probabilities would differ by %.1e; report this, please", worst)


def _check_finite(probability: Floats) -> None:
    wrong = ~np.isfinite(probability).reshape(len(probability), -1).all(1)
    if wrong.any():
        raise DataError(
            f"candidate {int(np.argmax(wrong)) + 1}: the model's numbers overflow, so it has no probability; "
            "expected numbers nearer to those of the training rows"
        )


def sequence_inputs(layout: BatchLayout) -> tuple[tuple[str, bool], ...]:
    """The sequences of a batch in the order in which programs take them, and whether each is nested."""
    return tuple((c.name, c.nested) for c in layout.sequences)


def hoisted_inputs(request: Request, sequences: Sequence[tuple[str, bool]]) -> tuple[Tensor, ...]:
    """The tensors that :func:`ctrlib.hoisting.hoist` asks for."""
    tensors = []
    for name in ("sparse", "dense"):
        tensors += [torch.from_numpy(getattr(part, name)) for part in (request.context, request.candidates)]
    tensors = [tensors[0], tensors[2], tensors[1], tensors[3]]
    for name, nested in sequences:
        bag = (request.context if name in request.sides.sequences else request.candidates).sequences[name]
        tensors += [bag.values, bag.offsets]
        if nested:
            assert bag.inner is not None
            tensors.append(bag.inner)
    return tuple(tensors)


def sample_request(layout: BatchLayout, encoder: RequestEncoder, seed: int, rows: int = _SAMPLE_ROWS) -> Request:
    """A random request of the layout: any ids, numbers of which some are missing, sequences of one to four values."""
    rng = np.random.default_rng(seed)

    def side(context: bool, count: int) -> Encoded:
        sizes = [c.vocab_size for c, mine in zip(layout.sparse, encoder.sides.sparse, strict=True) if mine == context]
        columns = [c for c, mine in zip(layout.dense, encoder.sides.dense, strict=True) if mine == context]
        dense = rng.normal(size=(count, len(columns))).astype(np.float32)
        for i, column in enumerate(columns):
            if column.num_bins:
                dense[:, i] = rng.uniform(0, column.num_bins, count)
            if column.missing:
                dense[rng.random(count) < 0.2, i] = np.nan
        sequences: dict[str, Ragged] = {}
        lengths = {h.name: rng.integers(1, 5, count) for h in layout.histories}
        owner = {name: h.name for h in layout.histories for name in h.fields}
        for c in layout.sequences:
            if (c.name in encoder.sides.sequences) == context:
                own = lengths[owner[c.name]] if c.name in owner else rng.integers(1, 5, count)
                sequences[c.name] = _random_bag(rng, own, c.vocab_size, c.nested)
        sparse = np.zeros((count, len(sizes)), np.int32)
        for i, size in enumerate(sizes):
            sparse[:, i] = rng.integers(0, size, count)
        return Encoded(sparse, dense, sequences)

    return Request(side(True, 1), side(False, rows), encoder.sides)


def _random_bag(rng: np.random.Generator, lengths: npt.NDArray[np.int64], size: int, nested: bool) -> Ragged:
    def bounds(counts: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.append(0, np.cumsum(counts)).astype(np.int32))

    inner = rng.integers(1, 3, int(lengths.sum())) if nested else None
    total = int(lengths.sum() if inner is None else inner.sum())
    values = torch.from_numpy(rng.integers(0, size, total).astype(np.int32))
    return Ragged(values, bounds(lengths), None if inner is None else bounds(inner))


def _joined(batches: Sequence[Batch]) -> Batch:
    """The rows of all, one after another."""
    if len(batches) == 1:
        return batches[0]

    def following(bounds: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        return torch.cat([bounds[0][:1], *(b[1:] + start for b, start in zip(bounds, starts, strict=True))])

    sequences: dict[str, Ragged] = {}
    for name in batches[0].sequences:
        bags = [batch.sequences[name] for batch in batches]
        inner = [bag.inner for bag in bags if bag.inner is not None]
        counts = [len(i) - 1 for i in inner] or [len(bag.values) for bag in bags]
        sequences[name] = Ragged(
            torch.cat([bag.values for bag in bags]),
            following([bag.offsets for bag in bags], counts),
            following(inner, [len(bag.values) for bag in bags]) if inner else None,
        )
    return Batch(
        sparse=torch.cat([b.sparse for b in batches]), dense=torch.cat([b.dense for b in batches]), sequences=sequences
    )
