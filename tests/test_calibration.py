from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from ctrlib.calibration import (
    Calibration,
    calibrate_tasks,
    choose_calibration,
    fit_calibration,
    from_json,
    plot_reliability,
    reliability,
    sampling_intercept,
    sigmoid,
    to_json,
)
from ctrlib.config import ConfigError
from ctrlib.metrics import ece
from ctrlib.schema import DataError

RNG = np.random.default_rng(7)
TRUTH = RNG.normal(-1.5, 1.2, 20_000)
LABELS = (RNG.random(len(TRUTH)) < sigmoid(TRUTH)).astype(float)
WRONG = 2.5 * TRUTH + 1.0  # too sure of itself, and too high


def test_platt_finds_the_line_that_was_planted() -> None:
    found = fit_calibration("platt", LABELS, WRONG)
    assert found.slope == pytest.approx(1 / 2.5, rel=0.03)
    assert found.intercept == pytest.approx(-1 / 2.5, abs=0.05)
    model = LogisticRegression(C=1e12, tol=1e-10).fit(WRONG[:, None], LABELS)  # without Platt's targets: nearly the same
    assert found.slope == pytest.approx(float(model.coef_[0, 0]), rel=1e-3)
    assert found.intercept == pytest.approx(float(model.intercept_[0]), rel=2e-3)


def test_temperature_by_hand() -> None:
    # Two logits, ±1, right three times of four: σ(1/T) = 3/4, so 1/T = ln 3.
    found = fit_calibration("temperature", [1, 1, 1, 0, 0, 0, 0, 1], [1.0] * 4 + [-1.0] * 4)
    assert found.slope == pytest.approx(np.log(3), rel=1e-9)
    assert found.intercept == 0


def test_isotonic_is_that_of_another_implementation() -> None:
    z, y = np.round(WRONG[:3000], 1), LABELS[:3000]
    w = RNG.integers(1, 4, 3000).astype(float)
    found = fit_calibration("isotonic", y, z, w)
    expected = IsotonicRegression().fit(z, y, sample_weight=w).predict(z)
    inside = (expected > 1e-3) & (expected < 1 - 1e-3)
    np.testing.assert_allclose(sigmoid(found.logits(z))[inside], expected[inside], atol=1e-9)
    assert (np.diff(found.logits(np.linspace(-20, 20, 1001))) >= 0).all()


@pytest.mark.parametrize("method", ["temperature", "platt", "isotonic"])
def test_error_falls_on_other_rows_and_the_order_stays(method: str) -> None:
    half = len(LABELS) // 2
    found = fit_calibration(method, LABELS[:half], WRONG[:half])
    before, after = sigmoid(WRONG[half:]), sigmoid(found.logits(WRONG[half:]))
    if method != "temperature":  # which cannot move the level
        assert ece(LABELS[half:], after) < 0.5 * ece(LABELS[half:], before)
    allowed = 2e-3 if method == "isotonic" else 1e-12
    assert roc_auc_score(LABELS[half:], after) == pytest.approx(roc_auc_score(LABELS[half:], before), abs=allowed)


def test_sampled_negatives_are_corrected() -> None:
    rate = 0.1
    kept = (LABELS == 1) | (RNG.random(len(LABELS)) < rate)
    # Of rows with logit z, positives are all kept and negatives with chance r: the odds of what is left are e^z / r.
    sampled = TRUTH - np.log(rate)
    assert ece(LABELS[kept], sigmoid(sampled[kept])) < 0.02
    found = fit_calibration("none", [], [], sampling_rate=rate)
    np.testing.assert_allclose(found.logits(sampled), TRUTH, rtol=0, atol=1e-12)
    p = sigmoid(sampled)
    np.testing.assert_allclose(sigmoid(found.logits(sampled)), p / (p + (1 - p) / rate), rtol=1e-9)
    both = fit_calibration("platt", LABELS[kept], 2 * sampled[kept], sampling_rate=rate)
    assert ece(LABELS, sigmoid(both.logits(2 * sampled))) < 0.02


def test_the_choice_is_by_rows_that_were_not_fitted() -> None:
    found, losses = choose_calibration(LABELS, WRONG)
    assert found.method in ("platt", "isotonic")
    assert losses["none"] > losses["temperature"] > losses["platt"]
    assert choose_calibration(LABELS, WRONG)[0] == found
    right, _ = choose_calibration(LABELS, TRUTH)
    assert np.abs(right.logits(TRUTH) - TRUTH).mean() < 0.1


def test_the_choice_goes_on_where_temperature_cannot_fit() -> None:
    """Trained on 1 % of the negatives, calibrated on all rows: ln 100 too high."""
    truth = RNG.normal(-3, 1, 20_000)
    labels = (RNG.random(len(truth)) < sigmoid(truth)).astype(float)
    high = truth + np.log(100)
    with pytest.raises(DataError, match="it cannot move the level"):
        fit_calibration("temperature", labels, high)
    found, losses = choose_calibration(labels, high)
    assert set(losses) == {"none", "platt", "isotonic"}
    assert found.method in ("platt", "isotonic")
    np.testing.assert_allclose(sigmoid(found.logits(high)).mean(), labels.mean(), rtol=0.01)
    with pytest.raises(DataError, match="ranks these rows backwards"):
        choose_calibration(labels, -high)


@pytest.mark.parametrize("method", ["temperature", "platt", "isotonic"])
def test_the_scale_of_row_weights_does_not_matter(method: str) -> None:
    y, z, w = LABELS[:500], WRONG[:500], RNG.integers(1, 4, 500).astype(float)
    expected = fit_calibration(method, y, z, w / w.mean())
    for scale in (1e-4, 1.0, 1e5):
        found = fit_calibration(method, np.append(y, 1), np.append(z, -9.0), np.append(w * scale, 0))  # a row of no weight
        assert found.slope == pytest.approx(expected.slope, rel=1e-6)
        assert found.intercept == pytest.approx(expected.intercept, rel=1e-6)
        np.testing.assert_allclose(found.logits(z), expected.logits(z), rtol=1e-6, atol=1e-9)
    plain, equal = fit_calibration(method, y, z), fit_calibration(method, y, z, np.full(500, 1e-3))
    np.testing.assert_allclose(equal.logits(z), plain.logits(z), rtol=1e-6)


def test_wrong_rows_and_options() -> None:
    with pytest.raises(ConfigError, match=r"'plat'; expected .*did you mean 'platt'"):
        fit_calibration("plat", LABELS, WRONG)
    with pytest.raises(DataError, match="rows with label 0 and rows with label 1"):
        fit_calibration("platt", [1, 1], [0.3, 0.2])
    with pytest.raises(DataError, match="ranks these rows backwards"):
        fit_calibration("platt", LABELS, -WRONG)
    for rate in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="the sampling rate is"):
            sampling_intercept(rate)


def test_json_and_tasks() -> None:
    calibrations = {
        "click": Calibration(method="platt", slope=2.0, intercept=1.0),
        "buy": fit_calibration("isotonic", LABELS[:99], WRONG[:99]),
    }
    again = from_json(to_json(calibrations), ("click", "buy"))
    assert again == tuple(calibrations.values())
    logits = np.array([[0.0, 1.0], [1.0, -3.0]])
    shown = calibrate_tasks(again, logits)
    assert shown[:, 0].tolist() == [1.0, 3.0]
    np.testing.assert_array_equal(shown[:, 1], again[1].logits(logits[:, 1]))
    np.testing.assert_array_equal(calibrate_tasks((), logits), logits)
    with pytest.raises(DataError, match="is of labels"):
        from_json(to_json(calibrations), ("buy", "click"))
    for damage in (
        {"method": "x"},
        {"slope": -1},
        {"slope": float("nan")},
        {"x": [1, 1], "y": [0, 1]},
        {"x": [1]},
        {"z": 1},
        {"slope": "1"},
    ):
        with pytest.raises(DataError, match="calibration"):
            from_json({"click": {"method": "platt", **damage}}, ("click",))


def test_reliability(tmp_path: Path) -> None:
    curve = reliability([0, 1, 1, 1], [0.1, 0.3, 0.6, 0.8], num_bins=2)
    assert curve["predicted"] == pytest.approx([0.2, 0.7])
    assert curve["observed"] == [0.5, 1.0]
    assert curve["weight"] == [2, 2]
    assert curve["error"] == pytest.approx([np.sqrt(0.125), 0])
    plot_reliability(tmp_path / "r.png", {"before": curve, "after": reliability(LABELS, sigmoid(TRUTH))})
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError):
        reliability([], [])
