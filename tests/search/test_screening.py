"""OutRank: golden values of the released code, what its tricks get wrong, planted fields, 3MR."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ctrlib.config import ConfigError, to_json
from ctrlib.data.loader import Loader
from ctrlib.schema import CrossField, DataError, DenseField, Field, SequenceField, SparseField
from ctrlib.search import screening
from ctrlib.search.screening import Noise, OutRankConfig, rank_3mr, relevance, search_outrank
from tests.reference.mutual_information import expected_information, mutual_information
from tests.search.stores import click_store, coin, make

I = np.arange(4096)  # noqa: E741
Y = ((7919 * I) % 10007 < 2000).astype(np.int64)


def values(size: int) -> npt.NDArray[np.int64]:
    return (104729 * I % 1000003) % size


@pytest.mark.parametrize(
    ("x", "plain", "corrected"),
    [
        (values(2), 0.000000, 0.000677),
        (values(16), 0.000192, 0.002432),
        (values(256), 0.018991, -0.002869),
        (values(4096), 0.451526, 0.001833),
        (3 * Y + values(3), 0.499996, 0.443803),
    ],
    ids=["2", "16", "256", "4096", "signal"],
)
def test_golden_values_of_the_released_code(x: npt.NDArray[np.int64], plain: float, corrected: float) -> None:
    found = relevance(x, Y, noise="shift")
    assert found.plain == pytest.approx(plain, abs=1e-6)
    assert found.score == pytest.approx(corrected, abs=1e-6)
    assert relevance(x, Y, noise="none").score == found.plain


@pytest.mark.parametrize(
    ("x", "plain", "corrected"),
    [([1, 0, 0, 0, 1, 1, 1, 1], 0.380396, 0.107881), ([1, 1, 0, 0, 1, 1, 1, 1], 0.215762, 0.042475)],
)
def test_small_golden_values(x: list[int], plain: float, corrected: float) -> None:
    y = [1, 0, 0, 0, 1, 1, 1, 0]
    found = relevance(x, y, noise="shift")
    assert found.plain == pytest.approx(plain, abs=1e-6)
    assert found.score == pytest.approx(corrected, abs=1e-6)
    assert relevance(y, y, noise="shift").score == pytest.approx(np.log(2), abs=1e-12)


def test_different_columns_of_one_sum_are_not_the_same_column() -> None:
    """The released code takes them for one, and then takes no noise off."""
    x, y = [0, 1, 1, 0, 1, 0], [1, 0, 0, 1, 1, 0]
    assert sum(x) == sum(y)
    assert relevance(x, y, noise="exact").score < relevance(x, y, noise="none").score


def test_equals_the_formula() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 7, 60), rng.integers(0, 3, 60)
    plain = mutual_information(x.tolist(), y.tolist())
    expected = expected_information(x.tolist(), y.tolist())
    found = relevance(x, y, noise="exact")
    assert found.plain == pytest.approx(plain, abs=1e-12)
    assert found.score == pytest.approx(plain - expected, abs=1e-12)
    many = relevance(x, y, permutations=2000, rng=rng)
    assert many.score == pytest.approx(plain - expected, abs=0.005)


@pytest.mark.parametrize("noise", ["none", "permute", "exact"])
def test_names_of_values_and_order_of_rows_do_not_matter(noise: Noise) -> None:
    rng = np.random.default_rng(2)
    x, y = rng.integers(0, 50, 3000), rng.integers(0, 2, 3000)
    score = relevance(x, y, noise=noise).score
    assert relevance(rng.permutation(1000)[x], y, noise=noise).score == pytest.approx(score, abs=1e-12)
    order = rng.permutation(3000)
    # of another permutation of the label
    assert relevance(x[order], y[order], noise=noise).score == pytest.approx(score, abs=2e-3 if noise == "permute" else 1e-12)


def test_shift_erases_signal_of_rows_in_the_order_of_time() -> None:
    """A slow field and a slow label: of .4 nats the released trick leaves nothing; permutations leave nearly all."""
    t = np.arange(16384)
    x, y = t // 400, (t // 4096) % 2
    assert relevance(x, y, noise="shift").score < 0.1 * relevance(x, y, noise="permute").score
    mixed = np.random.default_rng(0).permutation(len(t))
    assert relevance(x[mixed], y[mixed]).score == pytest.approx(relevance(x, y).score, rel=0.01)


def noisy(rows: int, seed: int) -> dict[str, Any]:
    """A label, a copy of it that is right in 60 % of the rows and a coin in the others, and noise of 2 to 50,000 values."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, rows)
    signal = np.where(rng.random(rows) < 0.6, label, rng.integers(0, 2, rows))
    columns = {f"noise_{size}": rng.integers(0, size, rows) for size in (2, 10, 100, 1_000, 10_000, 50_000)}
    return {"label": label, "signal": signal, **columns}


def test_noise_of_any_cardinality_ranks_below_a_signal(tmp_path: Path) -> None:
    data = make(tmp_path, {"train": noisy(2 * 16384, 3)})
    found = search_outrank(data, OutRankConfig(), seed=0)
    assert found.fields == ("signal",)
    assert max(found.scores, key=lambda name: found.scores[name]) == "signal"
    assert all(abs(z) < 4 for name, z in found.report["z"].items() if name != "signal")
    assert found.report["blocks"] == 2
    # without the correction the field of 50,000 values that mean nothing is the best: the test would notice
    wrong = search_outrank(data, OutRankConfig(noise="none", top=1), seed=0)
    assert wrong.fields == ("noise_50000",)
    assert found.report["plain"]["noise_50000"] > found.report["plain"]["signal"]
    assert set(found.report["controls"]) == {*(f"random_{n}" for n in (2, 100, 2000, 10000, 50000)), "row_number"}
    again = search_outrank(data, OutRankConfig(), seed=0)
    assert again.scores == found.scores
    assert search_outrank(data, OutRankConfig(), seed=1).scores != found.scores


def test_the_median_of_equal_blocks_is_that_of_one(tmp_path: Path) -> None:
    data = make(tmp_path, {"train": noisy(1000, 4)})
    layout, rng = data.encoder.layout, np.random.default_rng(0)
    [batch] = Loader(data.split("train"), 1000)
    assert batch.labels is not None
    config = OutRankConfig(noise="exact", top=1, block_rows=1000)
    tally = screening.Tally(layout.names, config)
    for _ in range(3):
        tally.add(layout, batch, screening.dense_codes(batch.labels[:, 0].numpy()), rng)
    assert tally.blocks == 3
    assert tally.medians("score") == pytest.approx(search_outrank(data, config, seed=0).scores, abs=1e-12)


def test_the_order_of_the_rows_does_not_matter(tmp_path: Path) -> None:
    """A label that goes up and down with the day, a weak copy of it, noise; four days, of a block's rows each."""
    rng = np.random.default_rng(14)
    day = np.arange(4 * 2000) // 2000
    label = coin(np.where(day % 2, 0.4, -1.4), rng)
    columns = {
        "label": label,
        "day": day,
        "weak": np.where(rng.random(8000) < 0.3, label, rng.integers(0, 2, 8000)),
        "noise": rng.integers(0, 9, 8000),
    }
    # H(label) - H(label | day), of rates 1/(1+e^1.4) and 1/(1+e^-0.4), both half of the rows
    p = np.array([label[day % 2 == d].mean() for d in (0, 1)])
    entropies = [-(q * np.log(q) + (1 - q) * np.log(1 - q)) for q in (p.mean(), p)]
    known = entropies[0] - entropies[1].mean()
    orders = {"time": np.arange(8000), "label": np.argsort(label, kind="stable"), "shuffled": rng.permutation(8000)}
    for name, order in orders.items():
        data = make(tmp_path / name, {"train": {key: column[order] for key, column in columns.items()}})
        found = search_outrank(data, OutRankConfig(block_rows=2000), seed=0)
        assert found.report["blocks"] == 4
        assert found.fields == ("day", "weak"), name
        assert found.scores["day"] == pytest.approx(known, rel=0.15)
        assert abs(found.scores["noise"]) < 0.002


def test_a_short_last_block_is_left_out_and_rows_are_subsampled(tmp_path: Path) -> None:
    data = make(tmp_path, {"train": noisy(5000, 5)})
    reports = [search_outrank(data, OutRankConfig(top=1, block_rows=2000, subsampling=n), seed=0).report for n in (1, 2, 10)]
    assert [(r["blocks"], r["rows"]) for r in reports] == [(2, 4000), (1, 2000), (1, 500)]


def test_a_needle_and_its_multiple(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    columns = {f"f{i}": rng.integers(10, 100, 4000) for i in range(100)}
    columns["f31"] = 19 * columns["f30"]
    found = search_outrank(
        make(tmp_path, {"train": {"label": (columns["f30"] > 60).astype(int), **columns}}), OutRankConfig(top=2), seed=0
    )
    assert found.fields == ("f30", "f31")


def test_xor_is_seen_by_pairs_only(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    a, b, c = rng.integers(0, 2, (3, 4000))
    data = make(tmp_path, {"train": {"label": a ^ b, "a": a, "b": b, "c": c}})
    found = search_outrank(data, OutRankConfig(top=2, redundancy=True), seed=0)
    assert max(found.scores.values()) < 0.01
    assert next(iter(found.report["relation"])) == "a*b"
    assert found.report["relation"]["a*b"] > 0.6
    assert found.report["relation"]["a*c"] < 0.01


def test_3mr_golden_order() -> None:
    """A, its copy B, and C and D, weak alone and strong together: the copy is last, though more relevant than C and D."""
    r = np.array([1.0, 0.98, 0.3, 0.05])
    d, t = np.zeros((4, 4)), np.full((4, 4), 0.1)
    d[0, 1] = d[1, 0] = 1
    t[0, 1] = t[1, 0] = 0
    t[2, 3] = t[3, 2] = 0.9
    assert rank_3mr(r, d, t) == [0, 2, 3, 1]
    assert rank_3mr(r, d, t, alpha=0, beta=0) == [0, 1, 2, 3]
    assert rank_3mr(r, d, t, aggregate="mean")[0] == 0
    unknown = np.full((4, 4), np.nan)
    assert rank_3mr(r, unknown, unknown) == [0, 1, 2, 3]


def test_3mr_puts_a_copy_behind_what_adds_to_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    a, c = rng.integers(0, 8, (2, 6000))
    label = coin(np.sin(2.0 * a) * 2 + 0.8 * (c % 2) - 0.4, rng)
    data = make(tmp_path, {"train": {"label": label, "a": a, "copy": a + 100, "c": c}})
    assert search_outrank(data, OutRankConfig(top=2), seed=0).fields == ("a", "copy")
    found = search_outrank(data, OutRankConfig(top=2, redundancy=True), seed=0)
    assert found.fields == ("a", "c")
    assert found.report["order"][-1] == "copy"


def test_a_cap_on_pairs_covers_all_of_them_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(9)
    columns = {f"f{i}": rng.integers(0, 3, 3000) for i in range(5)}
    data = make(tmp_path, {"train": {"label": rng.integers(0, 2, 3000), **columns}})
    seen: Counter[tuple[int, int]] = Counter()
    pairs = screening.Tally.pairs

    def spy(self: screening.Tally) -> Any:
        seen.update({pair: len(values) for pair, values in self._relation.items()})
        return pairs(self)

    monkeypatch.setattr(screening.Tally, "pairs", spy)
    config = OutRankConfig(top=5, redundancy=True, max_pairs=4, block_rows=1000)  # 10 pairs, 4 in each of 3 blocks
    search_outrank(data, config, seed=0)
    assert sorted(seen.values()) == [1] * 8 + [2] * 2


def test_every_kind_of_field(tmp_path: Path) -> None:
    found = search_outrank(click_store(tmp_path), OutRankConfig(top=0.6, redundancy=True), seed=0)
    assert set(found.scores) == {"user", "city", "price", "age", "genres"}
    assert found.fields is not None
    assert len(found.fields) == 3
    assert "age" not in found.fields  # means nothing
    assert not [pair for pair in found.report["relation"] if "genres" in pair]  # a list is no pair's member
    assert found.report["settings"] == to_json(OutRankConfig(top=0.6, redundancy=True))


def test_lists_and_numbers_that_tell_something(tmp_path: Path) -> None:
    rng = np.random.default_rng(10)
    label = rng.integers(0, 2, 3000)
    tags = [
        [f"t{rng.integers(0, 9)}", "yes" if y and rng.random() < 0.6 else "no"] if rng.random() < 0.8 else [] for y in label
    ]
    number = np.where(rng.random(3000) < 0.1, np.nan, label + rng.normal(size=3000))
    columns = {"label": label, "tags": tags, "number": number, "noise": rng.integers(0, 500, 3000)}
    fields = (SequenceField(name="tags"), DenseField(name="number"), SparseField(name="noise"))
    data = make(tmp_path, {"train": columns}, fields)
    noises: tuple[Noise, ...] = ("permute", "shift", "exact")
    for noise in noises:
        found = search_outrank(data, OutRankConfig(top=2, noise=noise), seed=0)
        assert found.fields == ("tags", "number")
    assert search_outrank(data, OutRankConfig(), seed=0).fields == ("tags", "number")


def test_errors(tmp_path: Path) -> None:
    data = click_store(tmp_path)
    with pytest.raises(ConfigError, match="no label 'labl'; did you mean 'label'"):
        search_outrank(data, OutRankConfig(label="labl"), seed=0)
    with pytest.raises(ConfigError, match="top is 9, but the data has 5 fields"):
        search_outrank(data, OutRankConfig(top=9), seed=0)
    with pytest.raises(ConfigError, match=r"noise 'exact' has none; set top"):
        OutRankConfig(noise="exact")
    with pytest.raises(ConfigError, match=r"outrank.permutations is 1; expected 2 or more"):
        OutRankConfig(permutations=1)
    with pytest.raises(DataError, match=r"expected \[rows\] for both"):
        relevance([1, 2], [1])
    rng = np.random.default_rng(11)
    noise = make(tmp_path / "noise", {"train": {"label": rng.integers(0, 2, 3000), "a": rng.integers(0, 9, 3000)}})
    with pytest.raises(DataError, match="no field tells more of 'label' than noise does"):
        search_outrank(noise, OutRankConfig(), seed=0)
    assert OutRankConfig.released_code(5) == OutRankConfig(top=5, noise="shift", subsampling=10)


def test_fields_may_have_the_names_of_controls(tmp_path: Path) -> None:
    block = noisy(2000, 12)
    columns = {"label": block["label"], "row_number": block["signal"], "random_2": block["noise_2"]}
    found = search_outrank(make(tmp_path, {"train": columns}), OutRankConfig(top=1), seed=0)
    assert found.fields == ("row_number",)
    assert set(found.scores) == {"row_number", "random_2"}
    assert found.report["controls"]["row_number"] < found.scores["row_number"]


def test_fields_of_a_cross_that_passes_are_kept_with_it(tmp_path: Path) -> None:
    """The label is a XOR b: each of the two tells nothing, their cross everything."""
    rng = np.random.default_rng(13)
    a, b, c = rng.integers(0, 2, (3, 4000))
    fields: tuple[Field, ...] = (*(SparseField(name=name) for name in "abc"), CrossField(name="a*b", of=("a", "b")))
    data = make(tmp_path, {"train": {"label": a ^ b, "a": a, "b": b, "c": c}}, fields)
    found = search_outrank(data, OutRankConfig(), seed=0)
    assert found.fields == ("a", "b", "a*b")
    assert [f.name for f in found.apply(data.encoder).schema.fields] == ["a", "b", "a*b"]
