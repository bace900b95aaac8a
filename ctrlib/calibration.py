"""Calibration: a map of logits, fitted on validation rows after training, so that probabilities are what is observed.

Every method is non-decreasing, so the order of candidates stays: a line, z ↦ a·z + b (Platt, temperature, sampling), or a
curve (isotonic regression). They are kept in the artifact and applied wherever it gives probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from numpy.typing import ArrayLike

from ctrlib.config import ConfigError
from ctrlib.metrics import checked_rows, ece, log_loss, run_starts
from ctrlib.plots import figure_class, save_png
from ctrlib.schema import DataError, suggest

Method = Literal["none", "temperature", "platt", "isotonic"]
Floats = npt.NDArray[np.float64]
_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A map of the logits of one label.

    Attributes:
        method: how it was fitted.
        slope, intercept: z ↦ slope·z + intercept.
        x, y: of ``isotonic`` instead: the logit is y at x, linear between, constant outside; then ``intercept`` is added.
    """

    method: Method
    slope: float = 1.0
    intercept: float = 0.0
    x: tuple[float, ...] = ()
    y: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise DataError(f"calibration has method {self.method!r}; expected one of {', '.join(get_args(Method))}")
        numbers = (self.slope, self.intercept, *self.x, *self.y)
        if not all(isinstance(v, int | float) and math.isfinite(v) for v in numbers) or self.slope <= 0:
            raise DataError("calibration has numbers that are not finite, or a slope that is not above 0; fit it again")
        if len(self.x) != len(self.y) or any(b <= a for a, b in zip(self.x, self.x[1:], strict=False)):
            raise DataError("calibration has points that do not rise; fit it again")

    def logits(self, z: Floats) -> Floats:
        """Calibrated logits, of any shape."""
        mapped: Floats = np.interp(z, self.x, self.y) if self.x else self.slope * z
        return mapped + self.intercept


def sigmoid(z: Floats) -> Floats:
    """1 / (1 + e^−z), without overflow."""
    small = np.exp(-np.abs(z))
    return np.where(z >= 0, 1.0, small) / (1.0 + small)


def calibrate_tasks(calibrations: Sequence[Calibration], logits: Floats) -> Floats:
    """Calibrated logits of one label ([N]) or of several ([N, T]), each with its own map; none: as they are."""
    if not calibrations:
        return logits
    if logits.ndim == 1:
        return calibrations[0].logits(logits)
    return np.stack([c.logits(logits[:, t]) for t, c in enumerate(calibrations)], axis=1)


def sampling_intercept(rate: float) -> float:
    """ln r: what is added to logits where only a share r of the negatives was kept in training.

    From p = p′ / (p′ + (1 − p′)/r), "Practical Lessons from Predicting Clicks on Ads at Facebook" (He et al., 2014), §6.3.

    Raises:
        ConfigError: the rate is not in (0, 1].
    """
    if not 0 < rate <= 1:
        raise ConfigError(f"the sampling rate is {rate}; expected the share of negatives that was kept, above 0 and at most 1")
    return math.log(rate)


def fit_calibration(
    method: str, labels: ArrayLike, logits: ArrayLike, weight: ArrayLike | None = None, *, sampling_rate: float = 1.0
) -> Calibration:
    """Fit a method on validation rows.

    * ``temperature``: z/T, T by maximum likelihood (Guo et al., arXiv:1706.04599).
    * ``platt``: a·z + b by maximum likelihood, with Platt's targets (N₊ + 1)/(N₊ + 2) and 1/(N₋ + 2) instead of 1 and 0.
    * ``isotonic``: the non-decreasing curve with the least squares, by pooling adjacent violators; its values are kept away
      from 0 and 1 by half a row. Ties that it makes are of rows that validation could not tell apart.

    Args:
        method: one of those, or ``none``.
        labels: [N] of 0 and 1.
        logits: [N].
        weight: [N] row weights; only how they compare matters, since they are scaled to a mean of 1.
        sampling_rate: share of the negatives that was kept, in training and in these rows alike; probabilities are then
            those of all rows (:func:`sampling_intercept`).

    Raises:
        ConfigError: an unknown method.
        DataError: no row of one of the classes, or a model that ranks backwards.
    """
    if method not in get_args(Method):
        raise ConfigError(
            f"the calibration method is {method!r}; expected {', '.join(get_args(Method))}{suggest(method, get_args(Method))}"
        )
    shift = sampling_intercept(sampling_rate)
    if method == "none":
        return Calibration(method="none", intercept=shift)
    y_N, z_N, w_N = checked_rows(labels, logits, weight, "logits")
    positive, negative = float(w_N @ y_N), float(w_N @ (1 - y_N))
    if not positive > 0 or not negative > 0:
        raise DataError("calibration needs rows with label 0 and rows with label 1; give more validation rows")
    scale = np.count_nonzero(w_N) / (positive + negative)  # so that the sum is of rows, as Platt's targets take it to be
    w_N, positive, negative = w_N * scale, positive * scale, negative * scale
    if method == "isotonic":
        x, y = _isotonic(z_N, y_N, w_N)
        return Calibration(method="isotonic", intercept=shift, x=tuple(x.tolist()), y=tuple(y.tolist()))
    target_N = y_N
    if method == "platt":
        target_N = np.where(y_N > 0, (positive + 1) / (positive + 2), 1 / (negative + 2))
    slope, intercept = _line(z_N, target_N, w_N, with_intercept=method == "platt")
    if slope <= 0 and method == "temperature":
        raise DataError(
            "no temperature above 0 fits these rows: it cannot move the level of the probabilities, which is wrong (as after "
            "sampling of negatives), or the model ranks backwards; fit platt, which tells the two apart"
        )
    if slope <= 0:
        raise DataError(
            "the model ranks these rows backwards (the fitted slope is not above 0); expected rows like its training rows"
        )
    known: Method = "platt" if method == "platt" else "temperature"
    return Calibration(method=known, slope=slope, intercept=intercept + shift)


def choose_calibration(
    labels: ArrayLike, logits: ArrayLike, weight: ArrayLike | None = None, *, sampling_rate: float = 1.0
) -> tuple[Calibration, dict[str, float]]:
    """The method with the least log loss on validation rows that it was not fitted on: in two halves, each judged by the other.

    Returns:
        The method, fitted on all rows, and the log loss of each one; without temperature where it cannot be fitted.

    Raises:
        DataError: as :func:`fit_calibration` of the other methods, of either half.
    """
    y_N, z_N, w_N = checked_rows(labels, logits, weight, "logits")
    half_N = np.random.default_rng(0).permutation(len(y_N)) % 2 == 0
    losses: dict[str, float] = {}
    for method in get_args(Method):
        total = 0.0
        try:
            for fitted_N in (half_N, ~half_N):
                found = fit_calibration(method, y_N[fitted_N], z_N[fitted_N], w_N[fitted_N])
                judged_N = ~fitted_N
                total += log_loss(y_N[judged_N], sigmoid(found.logits(z_N[judged_N])), w_N[judged_N]) * w_N[judged_N].sum()
        except DataError:
            if method == "temperature":  # which may not fit where the others do; what is wrong with the rows, they tell
                continue
            raise
        losses[method] = float(total / w_N.sum())
    best = min(losses, key=lambda method: losses[method])
    return fit_calibration(best, y_N, z_N, w_N, sampling_rate=sampling_rate), losses


def _line(z_N: Floats, target_N: Floats, w_N: Floats, *, with_intercept: bool) -> tuple[float, float]:
    """Newton's method on the log loss of slope·z + intercept, with halved steps where it would rise."""
    columns = np.stack([z_N, np.ones_like(z_N)], axis=1)[:, : 1 + with_intercept]
    x = np.array([1.0, 0.0][: 1 + with_intercept])

    def loss(v: Floats) -> float:
        z = columns @ v
        return float(w_N @ (np.logaddexp(0, z) - target_N * z))

    before = loss(x)
    for _ in range(_STEPS):
        p_N = sigmoid(columns @ x)
        gradient = columns.T @ (w_N * (p_N - target_N))
        hessian = (columns * (w_N * p_N * (1 - p_N))[:, None]).T @ columns
        step = np.linalg.lstsq(hessian, gradient, rcond=None)[0]
        size = 1.0
        while (after := loss(x - size * step)) > before and size > 1e-10:
            size /= 2
        if not after < before:
            break
        done = before - after <= 1e-15 * abs(before)
        x, before = x - size * step, after
        if done:
            break
    return float(x[0]), float(x[1]) if with_intercept else 0.0


def _isotonic(z_N: Floats, y_N: Floats, w_N: Floats) -> tuple[Floats, Floats]:
    """Points of the curve, in logits: both ends of every pool."""
    order_N = np.argsort(z_N, kind="stable")
    order_N = order_N[w_N[order_N] > 0]
    z_N, y_N, w_N = z_N[order_N], y_N[order_N], w_N[order_N]
    starts = run_starts(z_N)
    low = high = z_N[starts]
    weight, mass = np.add.reduceat(w_N, starts), np.add.reduceat(w_N * y_N, starts)
    while True:
        # Neighbours that fall end up in one pool, so a whole falling run may be pooled at once.
        value = mass / weight
        begins = np.append(True, value[1:] > value[:-1])
        if begins.all():
            break
        at = np.flatnonzero(begins)
        weight, mass = np.add.reduceat(weight, at), np.add.reduceat(mass, at)
        low, high = low[at], high[np.append(at[1:], len(begins)) - 1]
    edge = 0.5 / weight.sum()
    value = np.clip(mass / weight, edge, 1 - edge)
    x, y = np.stack([low, high], axis=1).ravel(), np.repeat(np.log(value / (1 - value)), 2)
    first = np.append(True, np.diff(x) > 0)
    return x[first], y[first]


def reliability(
    labels: ArrayLike, probabilities: ArrayLike, weight: ArrayLike | None = None, *, num_bins: int = 20
) -> dict[str, Any]:
    """Bins of equal weight, by rising probability: what was predicted and what was observed in each.

    Returns:
        ``predicted``, ``observed``, ``weight`` and ``error`` (one standard error of the observed rate) of every bin, and
        ``ece`` (:func:`ctrlib.metrics.ece`).
    """
    y_N, p_N, w_N = checked_rows(labels, probabilities, weight, "probabilities")
    if num_bins < 1:
        raise DataError(f"num_bins is {num_bins}; expected 1 or more")
    order_N = np.argsort(p_N, kind="stable")
    p_N, y_N, w_N = p_N[order_N], y_N[order_N], w_N[order_N]
    total = w_N.sum()
    if not total > 0:
        raise DataError("a reliability plot needs rows; expected at least one with a weight above 0")
    bin_N = np.minimum((np.cumsum(w_N) - w_N / 2) / total * num_bins, num_bins - 1).astype(np.int64)
    mass = np.bincount(bin_N, w_N)
    used = mass > 0
    mass, predicted, observed = mass[used], np.bincount(bin_N, w_N * p_N)[used], np.bincount(bin_N, w_N * y_N)[used]
    rate = observed / mass
    return {
        "predicted": (predicted / mass).tolist(),
        "observed": rate.tolist(),
        "weight": mass.tolist(),
        "error": np.sqrt(rate * (1 - rate) / mass).tolist(),
        "ece": ece(y_N, p_N, num_bins, w_N),
    }


def plot_reliability(path: str | Path, curves: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw curves of :func:`reliability` by name, as PNG, with the diagonal of perfect calibration.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure = figure_class()(figsize=(5, 5))
    axes = figure.subplots()
    top = 0.0
    for name, curve in curves.items():
        label = f"{name} (ECE {curve['ece']:.4f})"
        axes.errorbar(curve["predicted"], curve["observed"], yerr=curve["error"], marker="o", markersize=3, label=label)
        top = max(top, *curve["predicted"], *curve["observed"])
    axes.plot([0, top], [0, top], color="black", linewidth=0.8, linestyle="--")
    axes.set(xlabel="predicted probability", ylabel="observed rate")
    axes.grid(alpha=0.3)
    axes.legend()
    save_png(figure, path)


def to_json(calibrations: Mapping[str, Calibration]) -> dict[str, Any]:
    """For an artifact: by label."""
    return {
        label: {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(c).items()} for label, c in calibrations.items()
    }


def from_json(data: Mapping[str, Any], labels: Sequence[str]) -> tuple[Calibration, ...]:
    """The inverse of :func:`to_json`, in the order of the labels.

    Raises:
        DataError: not what :func:`to_json` makes, or of other labels.
    """
    if list(data) != list(labels):
        raise DataError(f"calibration is of labels {', '.join(data)}; expected {', '.join(labels)}: fit it again")
    try:
        return tuple(_read(dict(data[label])) for label in labels)
    except DataError:
        raise
    except (TypeError, ValueError) as error:
        raise DataError(f"calibration is damaged ({error}); fit it again") from error


def _read(data: Mapping[str, Any]) -> Calibration:
    options: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    return Calibration(**options)
