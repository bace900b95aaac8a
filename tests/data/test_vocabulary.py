"""Ids against counting in plain Python; values that floats or 32 bits would confuse stay distinct; hashes never change."""

from __future__ import annotations

import decimal
import random
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from ctrlib import _native
from ctrlib.data import vocabulary
from ctrlib.data.encoder import Encoder
from ctrlib.data.vocabulary import HashBuckets, ValueCounter, Vocabulary, as_keys, hash64, key_type
from ctrlib.schema import DataError, Field, Schema, SequenceField, SparseField

NULL = None


def place(row: int) -> str:
    return f"row {row + 1}"


def fit(array: Any, min_count: int = 1, max_size: int | None = None, block: int = 1000) -> Vocabulary:
    kind = key_type(array.type)
    counter = ValueCounter(kind)
    for start in range(0, len(array), block):
        counter.update(as_keys(array.slice(start, block), kind, place))
    return Vocabulary.fit(counter, min_count, max_size)


def ids(vocabulary: Vocabulary, array: Any) -> list[int]:
    found: list[int] = vocabulary.ids(as_keys(array, vocabulary.values.type, place)).tolist()
    return found


def by_hand(values: list[Any], min_count: int = 1, max_size: int | None = None) -> dict[Any, int]:
    counts: dict[Any, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1

    def rank(value: Any) -> Any:
        return (-counts[value], value is None, value.encode() if isinstance(value, str) else value or 0)

    kept = sorted((v for v in counts if counts[v] >= min_count), key=rank)[:max_size]
    return {value: i + 2 for i, value in enumerate(kept)}


def encoder(data: Any, *fields: Field) -> Encoder:
    return Encoder.fit(Schema(fields=fields, labels=("y",)), data)


RANDOM = random.Random(3)
INTS = [RANDOM.choice([None, -5, 0, 7, 7, 7, 2**24, 2**24 + 1, 2**53, 2**53 + 1, -(2**63), 2**63 - 1]) for _ in range(500)]
TEXTS = [
    RANDOM.choice([None, "", " ", "a", "A", "ä", "a\u0308", "日本", "\0", "007", "7", "x" * 300, "🙂"]) for _ in range(500)
]


@pytest.mark.parametrize("values", [INTS, TEXTS], ids=["ints", "texts"])
@pytest.mark.parametrize("min_count", [1, 40, 1000])
@pytest.mark.parametrize("max_size", [None, 1, 5])
@pytest.mark.parametrize("block", [500, 7])
def test_ids_fall_with_count_and_ties_go_by_value(values: list[Any], min_count: int, max_size: int | None, block: int) -> None:
    expected = by_hand(values, min_count, max_size)
    vocabulary = fit(pa.array(values), min_count, max_size, block)
    assert ids(vocabulary, pa.array(values)) == [expected.get(v, 1) for v in values]
    assert vocabulary.size == len(expected) + 2
    assert vocabulary.counts.tolist() == [values.count(v) for v in expected]
    assert vocabulary.missing_id == expected.get(None, 1)


def test_ties_with_missing_values_by_hand() -> None:
    assert ids(fit(pa.array(["b", None, "a", "b", None, "c"])), pa.array(["b", None, "a", "c", "zz"])) == [2, 3, 4, 5, 1]


@pytest.mark.parametrize("values", [INTS, TEXTS], ids=["ints", "texts"])
def test_row_order_does_not_show(values: list[Any]) -> None:
    shuffled = random.Random(1).sample(values, len(values))
    a, b = (encoder({"x": pa.array(v)}, SparseField(name="x", min_count=2)) for v in (values, shuffled))
    assert a.hash == b.hash
    assert a.vocabularies["x"].values.equals(b.vocabularies["x"].values)  # type: ignore[union-attr]


def test_many_distinct_values_over_many_blocks() -> None:
    rng = np.random.default_rng(0)
    values = rng.zipf(1.2, 30_000) % (2**62)
    vocabulary = fit(pa.array(values), block=997)
    distinct, counts = np.unique(values, return_counts=True)
    order = np.lexsort((distinct, -counts))
    assert vocabulary.values.to_pylist() == distinct[order].tolist()
    assert vocabulary.counts.tolist() == counts[order].tolist()


@pytest.mark.parametrize("values", [INTS, TEXTS], ids=["ints", "texts"])
@pytest.mark.parametrize("block", [3, 50])
def test_merging_early_and_often_changes_nothing(values: list[Any], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit(pa.array(values))
    monkeypatch.setattr("ctrlib.data.vocabulary._PENDING", 0)
    assert fit(pa.array(values), block=block).fingerprint() == whole.fingerprint()


NEAR = ["", "\0", "\0\0", "a", "a\0", "abcdefgh", "abcdefg", "abcdefghi", "abcdefgh\0", "x" * 64, "x" * 63, "x" * 65, "ä" * 9]


@pytest.mark.parametrize("bits", [64, 3, 0])
@pytest.mark.parametrize("kind", ["texts", "ints"])
@pytest.mark.parametrize("native", [True, False])
def test_finding_values_whatever_their_hashes(bits: int, kind: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with hashes that are mostly equal, or all of them."""
    if not native:
        monkeypatch.setattr(_native, "kernel", lambda: None)
    elif _native.kernel() is None:
        pytest.skip("the kernel was not built")
    hashes = vocabulary._search_hash
    monkeypatch.setattr(vocabulary, "_search_hash", lambda values: hashes(values) & np.uint64(2**bits - 1))
    texts = [*NEAR, *(f"user-{i}" for i in range(60)), *("y" * 40 + c + "y" * 9 for c in "abc")]
    ints = [*range(-20, 20), 2**62, -(2**62), 2**53, 2**53 + 1]
    values: list[Any] = texts if kind == "texts" else ints
    arrow = pa.large_string() if kind == "texts" else pa.int64()
    for known in (values[::2], values, values[:1], []):
        index = vocabulary._Index(pa.array(known, arrow))
        asked = [*values, *reversed(values)]
        assert index.find(pa.array(asked, arrow)).tolist() == [known.index(v) if v in known else -1 for v in asked]
        assert index.find(pa.array(asked, arrow).slice(3, 7)).tolist() == index.find(pa.array(asked, arrow)).tolist()[3:10]
        sliced = vocabulary._Index(pa.array([*values[:2], *known], arrow).slice(2))
        assert sliced.find(pa.array(asked, arrow)).tolist() == index.find(pa.array(asked, arrow)).tolist()
        assert index.find(pa.array([], arrow)).tolist() == []
        with_null = vocabulary._Index(pa.array([None, *known], arrow), 0)  # in its place in memory stands "" or 0
        assert with_null.find(pa.array(asked, arrow)).tolist() == [known.index(v) + 1 if v in known else -1 for v in asked]


def test_both_ways_of_finding_agree_on_many_values(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    asked = pa.array([f"{x:x}" for x in rng.integers(0, 400_000, 200_000).tolist()], pa.large_string())
    known = pa.array([f"{x:x}" for x in rng.permutation(200_000).tolist()], pa.large_string())
    found = vocabulary._Index(known).find(asked)
    monkeypatch.setattr(_native, "kernel", lambda: None)
    np.testing.assert_array_equal(vocabulary._Index(known).find(asked), found)
    expected = {value: i for i, value in enumerate(known.to_pylist())}
    assert found.tolist() == [expected.get(value, -1) for value in asked.to_pylist()]


@pytest.mark.parametrize("values", [INTS, TEXTS], ids=["ints", "texts"])
def test_dictionaries_that_grow_or_change_are_counted_once(values: list[Any]) -> None:
    present = [v for v in values if v is not None]
    distinct = list(dict.fromkeys(present))
    counter = ValueCounter(key_type(pa.array(present).type))
    for start in range(0, len(present), 20):  # each block brings all values so far; after 200 rows another dictionary
        first = start // 200 * 200
        seen = list(dict.fromkeys(present[first : start + 20])) + (distinct if start % 60 == 40 else [])
        codes = pa.array([seen.index(v) for v in present[start : start + 20]], pa.int32())
        counter.update(as_keys(pa.DictionaryArray.from_arrays(codes, pa.array(seen)), counter._kind, place))
    found, counts = counter.result()
    assert dict(zip(found.to_pylist(), counts.tolist(), strict=True)) == {v: present.count(v) for v in distinct}


def test_weights_are_repetitions() -> None:
    keys = as_keys(pa.array([5, None, 7, 5]), pa.int64(), place)
    counter = ValueCounter(pa.int64())
    counter.update(keys, np.array([2, 3, 4, 10]))
    counter.update(keys)
    found, counts = counter.result()
    assert dict(zip(found.to_pylist(), counts.tolist(), strict=True)) == {5: 14, 7: 5}
    assert counter.nulls == 4


WIDE = [2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1, 2**64 - 2, 2**53, 2**53 + 1, 2**24, 2**24 + 1, 0, 1]


@pytest.mark.parametrize("form", ["arrow", "numpy", "pandas", "polars"])
def test_uint64_above_2_to_63_stays_distinct(form: str) -> None:
    forms: dict[str, Any] = {
        "arrow": pa.table({"x": pa.array(WIDE, pa.uint64())}),
        "numpy": {"x": np.array(WIDE, np.uint64)},
        "pandas": pd.DataFrame({"x": np.array(WIDE, np.uint64)}),
        "polars": pl.DataFrame({"x": pl.Series(WIDE, dtype=pl.UInt64)}),
    }
    learned = encoder(forms[form], SparseField(name="x"))
    found = learned.transform(forms[form]).sparse[:, 0].tolist()
    assert sorted(found) == list(range(2, 2 + len(WIDE)))
    assert learned.ids("x", [str(v) for v in WIDE]).tolist() == found
    assert learned.ids("x", ["12", str(2**63 + 2)]).tolist() == [1, 1]


@pytest.mark.parametrize(
    "kind", [pa.int8(), pa.int16(), pa.int32(), pa.uint8(), pa.uint16(), pa.uint32(), pa.int64(), pa.bool_()]
)
def test_widths_of_integers_do_not_matter(kind: Any) -> None:
    learned = encoder({"x": [0, 1, 1]}, SparseField(name="x"))
    assert learned.transform(pa.table({"x": pa.array([1, 0, None]).cast(kind)})).sparse[:, 0].tolist() == [2, 3, 1]


@pytest.mark.parametrize(
    ("count", "index"),
    [(127, pa.int8()), (128, pa.int8()), (255, pa.uint8()), (256, pa.uint8()), (256, pa.uint32()), (256, pa.int64())],
)
def test_dictionaries_that_fill_their_index_type(count: int, index: Any) -> None:
    codes = pa.array([*range(count), None], index)
    array = pa.DictionaryArray.from_arrays(codes, pa.array([f"{i:03d}" for i in range(count)]))
    learned = encoder(pa.table({"x": array}), SparseField(name="x"))
    assert learned.transform(pa.table({"x": array})).sparse[:, 0].tolist() == list(range(2, count + 3))


def test_integers_with_gaps_as_floats_are_exact() -> None:
    frame = pd.DataFrame({"x": [2**53 - 1, None, -7, 2**53 - 2, 0]})
    assert frame.x.dtype == np.float64
    learned = encoder(frame, SparseField(name="x"))
    assert learned.vocabularies["x"].values.to_pylist() == [-7, 0, 2**53 - 2, 2**53 - 1, None]  # type: ignore[union-attr]
    assert learned.transform({"x": [2**53 - 2, 2**53 - 1, None, 0, -7]}).sparse[:, 0].tolist() == [4, 5, 6, 3, 2]


@pytest.mark.parametrize("form", ["numpy", "polars", "arrow"])
def test_nan_among_ids_is_missing(form: str) -> None:
    numbers = np.array([1.0, np.nan, 1.0, 2.0])
    forms: dict[str, Any] = {"numpy": {"x": numbers}, "polars": pl.DataFrame({"x": numbers}), "arrow": pa.table({"x": numbers})}
    learned = encoder(forms[form], SparseField(name="x"))
    assert learned.transform({"x": [None, 1, 2]}).sparse[:, 0].tolist() == [4, 2, 3]
    assert learned.hash == encoder({"x": [1, None, 1, 2]}, SparseField(name="x")).hash


@pytest.mark.parametrize("value", [2.0**53, -(2.0**53), 1e300, 1.5, float("inf")])
def test_floats_that_are_no_exact_integer_are_refused(value: float) -> None:
    with pytest.raises(DataError, match=r"column 'x', the training table, row 3: .* is not an integer id"):
        encoder({"x": [1.0, 2.0, value]}, SparseField(name="x"))


def test_integers_learned_text_served_and_back() -> None:
    numbers = [5, 5, 5, -8, -8, 2**53 + 1, 2**63 - 1, None]
    texts = [None if n is None else str(n) for n in numbers]
    from_ints, from_texts = encoder({"x": numbers}, SparseField(name="x")), encoder({"x": texts}, SparseField(name="x"))
    for served in (numbers, texts):
        assert from_ints.transform({"x": served}).sparse[:, 0].tolist() == [2, 2, 2, 3, 3, 4, 5, 6]
        assert from_texts.transform({"x": served}).sparse[:, 0].tolist() == [2, 2, 2, 3, 3, 4, 5, 6]
    assert from_texts.transform({"x": [6, 5]}).sparse[:, 0].tolist() == [1, 2]


@pytest.mark.parametrize("value", ["abc", "007", "0x10", " 7", "1.0", ""])
def test_text_that_is_no_integer_is_refused_where_integers_were_learned(value: str) -> None:
    learned = encoder({"x": [7, 16, 1]}, SparseField(name="x"))
    with pytest.raises(DataError, match=r"column 'x', the table, row 2: .* is not an integer id; give the column the type"):
        learned.transform({"x": ["7", value]})


def test_a_bad_value_of_other_rows_of_the_dictionary_is_no_error() -> None:
    learned = encoder({"x": [1, 2, 3]}, SparseField(name="x"))
    array = pa.DictionaryArray.from_arrays(pa.array([0, 2, None], pa.int8()), pa.array(["1", "bad", "3"]))
    assert learned.transform(pa.table({"x": array})).sparse[:, 0].tolist() == [2, 4, 1]


def test_lists_and_structs_are_no_ids() -> None:
    for value, kind in (([1], "large_list<item: int64>"), ({"a": 1}, "struct<a: int64>")):
        with pytest.raises(DataError, match=rf"column 'x', the training table, row 1: the column holds {kind}"):
            encoder({"x": [value, value]}, SparseField(name="x"))


def test_two_integers_with_the_same_float_are_two_values() -> None:
    pair = [2**53, 2**53 + 1]
    assert float(pair[0]) == float(pair[1])
    assert encoder({"x": pair}, SparseField(name="x")).transform({"x": pair}).sparse[:, 0].tolist() == [2, 3]


def test_shared_vocabulary_counts_both_columns() -> None:
    data = {"item": [1, 2, 2, 4], "seen": [[1, 3, 3, 3], [], None, [1, 1]], "text": ["3", "3", "4", None]}
    share = SequenceField(name="seen", shares="item")
    both = encoder(data, SparseField(name="item"), share)
    # 1: 1 + 3, 3: 3, 2: 2, 4: 1
    assert both.transform(data).sparse[:, 0].tolist() == [2, 4, 4, 5]
    assert both.transform(data).sequences["seen"].values.tolist() == [2, 3, 3, 3, 2, 2]
    assert both.layout.sparse[0].table == both.layout.sequences[0].table == "item"
    assert both.layout.sparse[0].vocab_size == both.layout.sequences[0].vocab_size == 6
    # a text column makes the common kind text; 3: 5 times, 1: 4, 2 and 4: 2, null: 1
    all_three = encoder(data, share, SparseField(name="item"), SparseField(name="text", shares="item"))
    assert all_three.transform(data).sparse.tolist() == [[3, 2], [4, 2], [4, 5], [5, 6]]


def test_min_count_of_the_owner_holds_for_both() -> None:
    data = {"item": [1, 2], "seen": [[2, 3], [3]]}
    learned = encoder(data, SparseField(name="item", min_count=2), SequenceField(name="seen", shares="item"))
    assert learned.ids("seen", [1, 2, 3]).tolist() == learned.ids("item", [1, 2, 3]).tolist() == [1, 2, 3]


# ------------------------------------------------------------------------------------------------------------- hashing

# Never change these numbers: models trained with hash_size depend on them.
GOLDEN_INTS = {0: 16294208416658607535, 1: 10451216379200822465, -1: 16490336266968443936, 2**62: 47939714376772075}
GOLDEN_TEXTS = {
    "": 0,
    "a": 14694396061658672615,
    "b": 4899671599934610010,
    "ab": 6050381137262553819,
    "ba": 5839084955898358818,
    "ä": 17973633531273637476,
    "68fd1e64": 17168821485831366285,
    "a\0": 11617198954738144549,
}


def splitmix(x: int) -> int:
    """The published finaliser in Python integers."""
    m = 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & m
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & m
    return x ^ (x >> 31)


def test_hash_of_integers() -> None:
    found = hash64(pa.array(list(GOLDEN_INTS), pa.int64())).tolist()
    assert found == list(GOLDEN_INTS.values())
    assert found == [splitmix((v + 0x9E3779B97F4A7C15) % 2**64) for v in GOLDEN_INTS]


def test_hash_of_text() -> None:
    def by_loop(text: str) -> int:
        data, total, power = text.encode(), 0, 1
        for byte in data:
            total = (total + splitmix(byte + 1) * power) % 2**64
            power = power * 0x9E3779B97F4A7C15 % 2**64
        return splitmix((total + len(data)) % 2**64)

    texts = [*GOLDEN_TEXTS, "x" * 1000]
    array = pa.array(texts, pa.large_string())
    found = hash64(array).tolist()
    assert found == [by_loop(t) for t in texts]
    assert dict(zip(GOLDEN_TEXTS, found, strict=False)) == GOLDEN_TEXTS
    assert hash64(array.slice(2, 3)).tolist() == found[2:5]
    assert hash64(array.slice(0, 1)).tolist() == found[:1]
    assert hash64(array.slice(0, 0)).tolist() == []


def test_hashes_do_not_depend_on_how_many_are_taken_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    array = pa.array([f"{i * i}-{'x' * (i % 40)}" for i in range(100)], pa.large_string())
    whole = hash64(array).tolist()
    monkeypatch.setattr("ctrlib.data.vocabulary._HASHED", 7)
    assert hash64(array).tolist() == whole


def test_hash_buckets() -> None:
    field = SparseField(name="x", hash_size=10)
    learned = encoder({"x": ["a"]}, field)
    values = ["a", "b", "68fd1e64", None, "unseen"]
    expected = [GOLDEN_TEXTS[v] % 10 + 2 for v in values[:3]]  # type: ignore[index]
    found = learned.transform({"x": values}).sparse[:, 0].tolist()
    assert found[:4] == [*expected, 1]
    assert 2 <= found[4] < 12
    assert learned.layout.sparse[0].vocab_size == 12
    assert learned.vocabularies["x"] == HashBuckets(10)
    assert learned.hash == encoder({"x": ["zzz", None]}, field).hash
    assert learned.hash != encoder({"x": ["a"]}, SparseField(name="x", hash_size=11)).hash


def test_hash_buckets_do_not_depend_on_the_type_of_the_column() -> None:
    learned = encoder({"x": [1]}, SparseField(name="x", hash_size=1000))
    as_text = learned.transform({"x": ["12", "-3"]}).sparse[:, 0].tolist()
    assert learned.transform({"x": [12, -3]}).sparse[:, 0].tolist() == as_text
    assert learned.transform({"x": [12.0, -3.0]}).sparse[:, 0].tolist() == as_text
    assert learned.transform(pd.DataFrame({"x": pd.Categorical([12, -3])})).sparse[:, 0].tolist() == as_text


def test_hash_buckets_are_filled_evenly() -> None:
    values = [f"user-{i}" for i in range(20_000)]
    found = encoder({"x": ["a"]}, SparseField(name="x", hash_size=64)).transform({"x": values}).sparse[:, 0].numpy()
    counts = np.bincount(found - 2, minlength=64)
    chi_square = float(((counts - 312.5) ** 2 / 312.5).sum())
    assert chi_square < 103.4  # 0.1 % of chi-square with 63 degrees of freedom lies above


def test_a_fingerprint_changes_with_any_value_order_or_count() -> None:
    base = ["a", "a", "b", "c", None]
    prints = [
        fit(pa.array(values)).fingerprint()
        for values in (base, ["a", "a", "b", "d", None], [*base, "a"], [*base, None], ["a", "a", "b", "c", "d"], base[:4])
    ]
    assert len(set(prints)) == len(prints)


@pytest.mark.parametrize("values", [INTS, TEXTS], ids=["ints", "texts"])
@pytest.mark.parametrize("oov_kept", [True, False])
@pytest.mark.parametrize("null_kept", [True, False])
def test_dropped_values_are_padding_and_unseen_ones_oov(values: list[Any], oov_kept: bool, null_kept: bool) -> None:
    full = fit(pa.array(values), 5)
    old = by_hand(values, 5)
    kept = np.random.default_rng(0).random(full.size) < 0.6
    kept[:2] = True, oov_kept
    kept[old[None]] = null_kept
    vocabulary, new_ids = full.keep(kept)
    assert vocabulary.size == kept[2:].sum() + 2 < full.size
    assert new_ids[kept].tolist() == [0, *[1] * oov_kept, *range(2, vocabulary.size)]
    assert not new_ids[~kept].any()
    unseen = pa.array([12345, 2**60] if values is INTS else ["never", "seen"])
    assert ids(vocabulary, unseen) == [int(oov_kept)] * 2
    assert ids(vocabulary, pa.array(values)) == new_ids[ids(full, pa.array(values))].tolist()
    assert vocabulary.missing_id == (new_ids[old[None]] if null_kept else 0)
    if values is INTS:
        raw = np.array([v for v in values if v is not None])
        assert vocabulary.key_ids(raw).tolist() == ids(vocabulary, pa.array(raw))
    # once more, of what is left
    fewer = np.arange(vocabulary.size) != 3
    again, newer_ids = vocabulary.keep(fewer)
    assert again.size == vocabulary.size - 1
    assert ids(again, pa.array(values)) == newer_ids[ids(vocabulary, pa.array(values))].tolist()
    assert ids(again, unseen) == ids(vocabulary, unseen)
    assert len({v.fingerprint() for v in (full, vocabulary, again)}) == 3


def test_keeping_everything_changes_nothing() -> None:
    full = fit(pa.array(INTS))
    same, new_ids = full.keep(np.ones(full.size, bool))
    assert same.fingerprint() == full.fingerprint()
    assert new_ids.tolist() == [*range(full.size)]
    without_oov, _ = full.keep(np.arange(full.size) != 1)
    assert without_oov.fingerprint() != full.fingerprint()


def test_a_vocabulary_may_keep_nothing() -> None:
    full = fit(pa.array(TEXTS))
    nothing, _ = full.keep(np.zeros(full.size, bool))
    assert nothing.size == 2
    assert set(ids(nothing, pa.array(["a", "new", None]))) == {0}
    oov, _ = full.keep(np.arange(full.size) == 1)
    assert oov.size == 2
    assert ids(oov, pa.array(["a", "new", None])) == [0, 1, 0]


@pytest.mark.parametrize(("kind", "limit"), [(pa.float16(), 2**11), (pa.float32(), 2**24), (pa.float64(), 2**53)])
def test_floats_that_may_stand_for_several_integers(kind: Any, limit: int) -> None:
    fine = pa.array(np.array([limit - 1, limit - 2]).astype(kind.to_pandas_dtype()), kind)
    assert {limit - 1, limit - 2} <= set(fit(fine).values.to_pylist())
    with pytest.raises(DataError, match="is not an integer id"):
        fit(pa.array(np.array([limit]).astype(kind.to_pandas_dtype()), kind))


def test_decimals_are_integers_or_refused() -> None:
    vocabulary = fit(pa.array([decimal.Decimal("12.00"), decimal.Decimal("7.00")], pa.decimal128(10, 2)))
    assert sorted(ids(vocabulary, pa.array([12, 7]))) == sorted(ids(vocabulary, pa.array(["12", "7"]))) == [2, 3]
    with pytest.raises(DataError, match=r"12\.50.* is not an integer id"):
        fit(pa.array([decimal.Decimal("12.50")], pa.decimal128(10, 2)))


def test_long_texts_that_differ_at_their_ends_only() -> None:
    long = ["a" * 10_000 + end for end in "xyz"]
    vocabulary = fit(pa.array(long))
    assert sorted(ids(vocabulary, pa.array(long))) == [2, 3, 4]
    assert ids(vocabulary, pa.array(["a" * 10_000 + "w", "a" * 5_000])) == [1, 1]
