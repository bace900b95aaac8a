"""What each field is worth to a model: to a trained one by permuting the field or by gradients, or to boosted trees."""

from __future__ import annotations

import importlib.util
import logging
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrlib.batch import Batch, Output
from ctrlib.config import ConfigError, check_choice, check_not_negative, positive, to_json
from ctrlib.data.loader import Loader
from ctrlib.data.store import Split, Store
from ctrlib.embedding import FeatureEmbedding
from ctrlib.models.ctr import ModelComponent, build_model
from ctrlib.progress import track
from ctrlib.schema import BatchLayout, DataError
from ctrlib.search.field_gates import field_embeddings
from ctrlib.search.ranking import Top, best_fields, check_top
from ctrlib.search.screening import label_column
from ctrlib.search.selection import Selection
from ctrlib.training import FitConfig, evaluate, fit, seed_everything

Metric = Literal["auc", "log_loss"]
Engine = Literal["auto", "lightgbm", "scikit-learn"]
Floats = npt.NDArray[np.float64]

_log = logging.getLogger("ctrlib")
_BATCH_ROWS = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class PermutationConfig:
    """
    Args:
        top: fields to keep, as a number or a share.
        metric: whose loss by permutation is the score.
        repeats: permutations of each field.
    """

    top: Top
    metric: Metric = "auc"
    repeats: int = 5

    def __post_init__(self) -> None:
        check_top("permutation.top", self.top)
        check_choice("permutation.metric", self.metric, get_args(Metric))
        positive("permutation.repeats", self.repeats)


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientConfig:
    """
    Args:
        top: fields to keep, as a number or a share.
    """

    top: Top

    def __post_init__(self) -> None:
        check_top("gradient.top", self.top)


@dataclass(frozen=True, kw_only=True, slots=True)
class GBDTConfig:
    """
    Args:
        top: fields to keep, as a number or a share.
        engine: ``auto`` takes LightGBM where it is installed.
        trees: boosting rounds.
        leaves: of a tree, at most.
        learning_rate: shrinkage of a tree.
        max_rows: a random part of the training rows, if they are more.
        folds: of the rows; an id becomes the label rate of its rows in the other folds.
        smoothing: rows of average label added to those of every id.
        label: which the trees predict; ``None``: the first.
    """

    top: Top
    engine: Engine = "auto"
    trees: int = 100
    leaves: int = 15
    learning_rate: float = 0.1
    max_rows: int = 100_000
    folds: int = 5
    smoothing: float = 10.0
    label: str | None = None

    def __post_init__(self) -> None:
        check_top("gbdt.top", self.top)
        check_choice("gbdt.engine", self.engine, get_args(Engine))
        positive("gbdt.trees", self.trees)
        positive("gbdt.learning_rate", self.learning_rate)
        check_not_negative("gbdt.smoothing", self.smoothing)
        for name, value in (("leaves", self.leaves), ("max_rows", self.max_rows), ("folds", self.folds)):
            if value < 2:
                raise ConfigError(f"gbdt.{name} is {value}; expected 2 or more")


def permutation_scores(
    model: nn.Module,
    split: Split,
    layout: BatchLayout,
    *,
    metric: Metric = "auc",
    repeats: int = 5,
    seed: int = 0,
) -> dict[str, list[float]]:
    """How much worse a trained model gets when a field's values are dealt to other rows (Breiman, doi:10.1023/A:1010933404324):

        I_f = auc(D) − auc(D with column f permuted),   or the rise of the log loss

    All values of a row's sequence move together. In one repeat every field has the same permutation of all rows.

    Args:
        model: ``Batch → Output``, trained.
        split: rows with labels, best such as training did not see.
        layout: of the batches.
        metric, repeats: see :class:`PermutationConfig`.
        seed: of the permutations.

    Returns:
        By field, one number for each repeat.

    Raises:
        DataError: the metric is undefined on these rows.
    """

    def measure(batches: Any) -> float:
        return float(evaluate(model, batches, label_names=layout.labels)[metric])

    base = measure(Loader(split, _BATCH_ROWS))
    if math.isnan(base):
        raise DataError(f"the {metric} of these rows is undefined; expected rows of both labels: give more, or another split")
    sign = 1.0 if metric == "auc" else -1.0
    found: dict[str, list[float]] = {}
    with track("permutation", len(layout.names), "fields") as tracker:
        for name in layout.names:
            dealt = _Dealt(split, layout, name, seed)
            found[name] = [sign * (base - measure(dealt)) for _ in range(repeats)]
            tracker.advance(1)
    return found


def gradient_scores(model: nn.Module, split: Split, layout: BatchLayout, *, batch_size: int = _BATCH_ROWS) -> dict[str, float]:
    """The first-order effect on the loss of replacing a field's token by its mean: SHARK's F-permutation (CIKM 2023,
    arXiv:2308.09395):

        I_f = mean_x |⟨∂L(x)/∂e_f, ē_f − e_f(x)⟩|

    One forward and backward pass whatever the number of fields, and one more of the embedding for the means ē, over the same
    rows. Where a model reads a field through several embeddings, the inner products are summed before the absolute value.
    Row weights weigh both means.

    Args:
        model: trained; its fields are read through :class:`~ctrlib.embedding.FeatureEmbedding`.
        split: rows with labels, best such as training did not see.
        layout: of the batches.
        batch_size: has no effect on the result: no row's gradient depends on another row.

    Raises:
        ConfigError: a field is not read through an embedding; see :func:`~ctrlib.search.field_gates.field_embeddings`.
    """
    # NOTE[DIFF] a released port reads gradients off the table, which are wrong where an id repeats in a batch, and so takes
    # batches of one row; here they are those of the tokens
    embeddings = field_embeddings(model, layout.names)
    was_training = model.training
    model.eval()
    try:
        return _gradient_scores(model, embeddings, Loader(split, batch_size), layout)
    finally:
        model.train(was_training)


def search_permutation(
    model: ModelComponent.Config,
    store: Store,
    config: PermutationConfig,
    *,
    fit: FitConfig,
    batch_size: int,
    seed: int,
) -> Selection:
    """Train a model, rank the fields by :func:`permutation_scores` on the validation rows, and keep the best.

    The report has the standard deviation over the repeats by field, ``std``, and the ``valid`` metrics of the model.

    Args:
        model: to train.
        store: of which training and validation rows are read.
        config: see :class:`PermutationConfig`.
        fit, batch_size: of the training.
        seed: of the model, of the order of rows, and of the permutations.

    Raises:
        DataError: the store has no validation rows.
        ConfigError: ``top`` larger than the number of fields.
    """
    started = time.perf_counter()
    trained, report = _trained(model, store, fit, batch_size, seed)
    layout = store.encoder.layout
    found = permutation_scores(trained, store.split("valid"), layout, metric=config.metric, repeats=config.repeats, seed=seed)
    scores = {name: statistics.fmean(values) for name, values in found.items()}
    if config.repeats > 1:
        report["std"] = {name: statistics.stdev(values) for name, values in found.items()}
    return _selection("permutation", store, scores, config.top, config, report, started)


def search_gradient(
    model: ModelComponent.Config,
    store: Store,
    config: GradientConfig,
    *,
    fit: FitConfig,
    batch_size: int,
    seed: int,
) -> Selection:
    """Train a model, rank the fields by :func:`gradient_scores` on the validation rows, and keep the best.

    Arguments and errors are those of :func:`search_permutation`.
    """
    started = time.perf_counter()
    trained, report = _trained(model, store, fit, batch_size, seed)
    scores = gradient_scores(trained, store.split("valid"), store.encoder.layout)
    return _selection("gradient", store, scores, config.top, config, report, started)


def search_gbdt(store: Store, config: GBDTConfig, *, seed: int) -> Selection:
    """Rank the fields by their share in the gain of boosted trees (Friedman, doi:10.1214/aos/1013203451), and keep the best.

    Trees read one number a field. An id becomes the label rate of its rows outside the row's own fold,

        r = (clicks + s·rate) / (rows + s),   s = ``smoothing``

    so that a value that is seen once does not bring its own label along; a sequence, the mean over its values. A missing number
    (or an empty sequence) stands below all others. The report names the ``engine``.

    Args:
        store: of which only the training rows are read.
        config: see :class:`GBDTConfig`.
        seed: of the part of the rows, the folds and the trees.

    Raises:
        ConfigError: neither LightGBM nor scikit-learn is installed (or not the one that is asked for); no such label; ``top``
            larger than the number of fields.
        DataError: all labels are the same.
    """
    started = time.perf_counter()
    engine = _engine(config.engine)
    layout, split = store.encoder.layout, store.split("train")
    column = label_column(layout, config.label)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(split.num_rows, generator=generator)[: config.max_rows].sort().values
    batch = next(iter(Loader(split, len(chosen), rows=chosen)))
    assert batch.labels is not None
    y_N = batch.labels[:, column].numpy().astype(np.float64)
    if y_N.min() == y_N.max():
        raise DataError(f"all {len(y_N)} rows have the label {y_N[0]:g}; trees need rows of both labels: give more rows")
    w_N = np.ones(len(y_N)) if batch.weight is None else batch.weight.numpy().astype(np.float64)
    x_NF = _features(layout, batch, y_N, w_N, config, np.random.default_rng(seed))
    gain = (_lightgbm_gain if engine == "lightgbm" else _sklearn_gain)(x_NF, y_N, w_N, config, seed)
    scores = dict(zip(layout.names, (gain / max(gain.sum(), np.finfo(np.float64).tiny)).tolist(), strict=True))
    report = {"engine": engine, "rows": len(y_N), "label": layout.labels[column]}
    return _selection("gbdt", store, scores, config.top, config, report, started)


class _Dealt:
    """Batches in which one field has the values of other rows; another permutation each time it is iterated."""

    def __init__(self, split: Split, layout: BatchLayout, name: str, seed: int) -> None:
        self._layout, self._name = layout, name
        self._rows, self._others = Loader(split, _BATCH_ROWS), Loader(split, _BATCH_ROWS, shuffle=True, seed=seed)

    def __iter__(self) -> Iterator[Batch]:
        for batch, other in zip(self._rows, self._others, strict=True):
            yield _with_field(batch, other, self._layout, self._name)


def _with_field(batch: Batch, other: Batch, layout: BatchLayout, name: str) -> Batch:
    """``batch`` with one field of ``other``; an attribute of a history brings the others with it."""

    def swapped(into: Tensor, values: Tensor, columns: tuple[Any, ...]) -> Tensor:
        at = [i for i, column in enumerate(columns) if column.name == name]
        if not at:
            return into
        into = into.clone()
        into[:, at] = values[:, at]
        return into

    together = next((h.fields for h in layout.histories if name in h.fields), (name,))  # else behaviours would fall apart
    sequences = {key: other.sequences[key] if key in together else ragged for key, ragged in batch.sequences.items()}
    return replace(
        batch,
        sparse=swapped(batch.sparse, other.sparse, layout.sparse),
        dense=swapped(batch.dense, other.dense, layout.dense),
        sequences=sequences,
    )


def _gradient_scores(
    model: nn.Module, embeddings: list[FeatureEmbedding], batches: Loader, layout: BatchLayout
) -> dict[str, float]:
    device = next(model.parameters()).device
    sums: dict[FeatureEmbedding, Tensor] = {}
    total = 0.0
    with torch.no_grad():
        for batch in batches:
            moved = batch.to(device)
            w_B = _weights(moved)
            for embedding in embeddings:
                sum_FD = torch.einsum("b,bfd->fd", w_B, embedding(moved).double())
                sums[embedding] = sums[embedding] + sum_FD if embedding in sums else sum_FD
            total += float(w_B.sum())
    means = {embedding: (sum_FD / total).float() for embedding, sum_FD in sums.items()}

    tokens: list[tuple[FeatureEmbedding, Tensor]] = []

    def leaf(module: nn.Module, _: tuple[Any, ...], token_BFD: Tensor) -> Tensor:
        assert isinstance(module, FeatureEmbedding)
        tokens.append((module, token_BFD.detach().requires_grad_()))
        return tokens[-1][1]

    found = dict.fromkeys(layout.names, 0.0)
    handles = [embedding.register_forward_hook(leaf) for embedding in embeddings]
    try:
        for batch in batches:
            tokens.clear()
            moved = batch.to(device)
            output: Output = model(moved)
            leaves = [token for _, token in tokens]
            grads = torch.autograd.grad(_summed_loss(output, moved), leaves, allow_unused=True)
            effects: dict[str, Tensor] = {}
            for (embedding, token_BFD), grad_BFD in zip(tokens, grads, strict=True):
                if grad_BFD is None:
                    continue
                effect_BF = (grad_BFD * (means[embedding] - token_BFD.detach())).sum(dim=2)
                for i, name in enumerate(embedding.out.names):
                    effects[name] = effects[name] + effect_BF[:, i] if name in effects else effect_BF[:, i]
            for name, effect_B in effects.items():
                found[name] += float(effect_B.abs().double().sum()) / total
    finally:
        for handle in handles:
            handle.remove()
    return found


def _weights(batch: Batch) -> Tensor:
    """[B] float64"""
    return (
        torch.ones(len(batch), dtype=torch.float64, device=batch.sparse.device)
        if batch.weight is None
        else batch.weight.double()
    )


def _summed_loss(output: Output, batch: Batch) -> Tensor:
    """Σ_b w_b L_b, the mean over tasks for each row: its gradient at a row's token is that row's own."""
    if batch.labels is None:
        raise DataError("the rows have no labels; gradients of the loss need the label columns that the schema names")
    logits_BT = output.logits.unsqueeze(1) if output.logits.ndim == 1 else output.logits
    losses_BT = F.binary_cross_entropy_with_logits(logits_BT, batch.labels, reduction="none")
    return (losses_BT.mean(dim=1) * _weights(batch)).sum()


def _trained(
    model: ModelComponent.Config, store: Store, config: FitConfig, batch_size: int, seed: int
) -> tuple[ModelComponent, dict[str, Any]]:
    """The model, trained, and what a report says of that."""
    if "valid" not in store.rows:
        raise DataError(
            f"store {store.path} has no validation rows, on which the fields are scored; it has {', '.join(store.rows)}: "
            "prepare it with some"
        )
    seed_everything(seed)
    built = build_model(model, store.encoder.layout)
    rows = Loader(store.split("train"), batch_size, shuffle=True, seed=seed)
    valid = Loader(store.split("valid"), max(batch_size, _BATCH_ROWS))
    result = fit(built, rows, valid, config, title="to be explained", label_names=store.encoder.layout.labels)
    return built, {"training_seconds": result.seconds, "epochs": result.epochs, "valid": result.metrics}


def _selection(
    method: str,
    store: Store,
    scores: Mapping[str, float],
    top: Top,
    config: object,
    report: Mapping[str, Any],
    started: float,
) -> Selection:
    kept = best_fields(store.encoder.schema, scores, top)
    _log.info("%s keeps %d of %d fields", method, len(kept), len(scores))
    seconds = time.perf_counter() - started
    report = {"settings": to_json(config), **report, "seconds": seconds}
    return Selection(method=method, encoder_hash=store.encoder.hash, fields=kept, scores=scores, report=report)


def _engine(asked: Engine) -> Literal["lightgbm", "scikit-learn"]:
    modules: dict[Literal["lightgbm", "scikit-learn"], str] = {"lightgbm": "lightgbm", "scikit-learn": "sklearn"}
    for engine, module in modules.items():
        if asked in ("auto", engine) and importlib.util.find_spec(module) is not None:
            return engine
    wanted = "LightGBM or scikit-learn" if asked == "auto" else asked
    raise ConfigError(f"gbdt needs {wanted}, which is not installed; install the extra: pip install 'ctrlib[search]'")


def _features(
    layout: BatchLayout, batch: Batch, y_N: Floats, w_N: Floats, config: GBDTConfig, rng: np.random.Generator
) -> Floats:
    """[N, F], in the order of ``layout.names``, without NaN."""
    fold_N = rng.permutation(len(y_N)) % config.folds
    every_N = np.arange(len(y_N))
    columns = [
        _label_rates(batch.sparse[:, i].numpy(), every_N, c.vocab_size, y_N, w_N, fold_N, config)
        for i, c in enumerate(layout.sparse)
    ]
    columns += [batch.dense[:, i].numpy().astype(np.float64) for i in range(len(layout.dense))]
    for column in layout.sequences:
        ragged = batch.sequences[column.name].flat
        lengths = ragged.offsets.diff().numpy()
        row = np.repeat(every_N, lengths)
        rates = _label_rates(ragged.values.numpy(), row, column.vocab_size, y_N, w_N, fold_N, config)
        sums = np.bincount(row, rates, minlength=len(y_N))
        columns.append(np.where(lengths > 0, sums / np.maximum(lengths, 1), np.nan))
    return np.stack([_gaps_lowest(column) for column in columns], axis=1)


def _label_rates(
    ids_M: npt.NDArray[np.int32],
    row_M: npt.NDArray[np.int64],
    size: int,
    y_N: Floats,
    w_N: Floats,
    fold_N: npt.NDArray[np.int64],
    config: GBDTConfig,
) -> Floats:
    """[M]: the smoothed label rate of each id in the folds other than its row's."""
    fold_M = fold_N[row_M]
    at_M = fold_M * size + ids_M
    rows_KV = np.bincount(at_M, w_N[row_M], minlength=config.folds * size).reshape(config.folds, size)
    clicks_KV = np.bincount(at_M, (w_N * y_N)[row_M], minlength=config.folds * size).reshape(config.folds, size)
    rows_KV, clicks_KV = rows_KV.sum(axis=0) - rows_KV, clicks_KV.sum(axis=0) - clicks_KV
    rate = np.average(y_N, weights=w_N)
    support_KV = rows_KV + config.smoothing
    rates_KV = np.divide(clicks_KV + config.smoothing * rate, support_KV, out=np.full_like(rows_KV, rate), where=support_KV > 0)
    return np.asarray(rates_KV.reshape(-1)[at_M])


def _gaps_lowest(values: Floats) -> Floats:
    gone = np.isnan(values)
    return np.where(gone, values[~gone].min() - 1 if not gone.all() else 0.0, values)


def _lightgbm_gain(x_NF: Floats, y_N: Floats, w_N: Floats, config: GBDTConfig, seed: int) -> Floats:
    import lightgbm

    options = {
        "objective": "binary",
        "num_leaves": config.leaves,
        "learning_rate": config.learning_rate,
        "seed": seed,
        "deterministic": True,
        "force_row_wise": True,  # the other way round sums in an order that depends on the threads
        "verbosity": -1,
    }
    trees = lightgbm.train(options, lightgbm.Dataset(x_NF, y_N, weight=w_N, free_raw_data=True), config.trees)
    return np.asarray(trees.feature_importance("gain"), dtype=np.float64)


def _sklearn_gain(x_NF: Floats, y_N: Floats, w_N: Floats, config: GBDTConfig, seed: int) -> Floats:
    from sklearn.ensemble import GradientBoostingClassifier

    # Some rows and fields for each tree and split: exact splits, unlike LightGBM's histograms, cost too much otherwise.
    trees = GradientBoostingClassifier(
        n_estimators=config.trees,
        learning_rate=config.learning_rate,
        max_depth=None,
        max_leaf_nodes=config.leaves,
        subsample=0.5,
        max_features="sqrt",
        random_state=seed,
    )
    trees.fit(x_NF, y_N, sample_weight=w_N)
    return np.asarray(trees.feature_importances_, dtype=np.float64)
