"""Requests get the ids and numbers that the encoder gives a table of the same rows, bit for bit."""

from __future__ import annotations

import datetime
import decimal
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch

from ctrlib.batch import Ragged
from ctrlib.data import requests as requests_module
from ctrlib.data.encoder import Encoder
from ctrlib.data.requests import RequestEncoder, repeated
from ctrlib.schema import CrossField, DataError, DenseField, History, Schema, SequenceField, SparseField
from tests.clicks import clicks

SCHEMA = Schema(
    fields=(
        SparseField(name="user", min_count=2, side="context"),
        SparseField(name="city"),
        SparseField(name="hashed", hash_size=50),
        DenseField(name="price"),
        DenseField(name="piece", encoding="piecewise", num_bins=4, side="context"),
        DenseField(name="age", encoding="bucket", num_bins=4, side="context"),
        DenseField(name="count", encoding="criteo_log"),
        SequenceField(name="genres", separator="|", max_length=2),
        SequenceField(name="tags", side="context", max_length=2),
        CrossField(name="user*city", of=("user", "city")),
        CrossField(name="user*age", of=("user", "age"), side="context"),
    ),
    labels=("label",),
)


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = clicks(count, seed).to_pylist()
    for i, row in enumerate(found):
        row["hashed"] = row["id"] % 7
        row["piece"] = None if i % 11 == 0 else float(i % 13)
        row["count"] = None if i % 7 == 0 else i % 19 - 2
        row["tags"] = None if i % 5 == 0 else list(range(i % 4))
    return found


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.fit(SCHEMA, rows(1500, 0))


def both(encoder: Encoder, context: dict[str, Any], candidates: list[dict[str, Any]], memory: RequestEncoder) -> None:
    expected = encoder.transform([{**context, **row} for row in candidates])
    shown = memory.encode(context, candidates).batch()
    assert torch.equal(shown.sparse, expected.sparse)
    assert torch.equal(shown.dense.view(torch.int32), expected.dense.view(torch.int32))  # NaN too
    for name, bag in expected.sequences.items():
        assert torch.equal(shown.sequences[name].values, bag.values), name
        assert torch.equal(shown.sequences[name].offsets, bag.offsets), name


def test_ids_are_the_encoders(encoder: Encoder) -> None:
    memory = RequestEncoder(encoder)
    table = rows(400, 3)
    for start in range(0, 400, 40):  # more users and cities than one request has: some are remembered, some new
        context = {name: table[start][name] for name in memory.context_inputs}
        both(encoder, context, [{n: row[n] for n in memory.candidate_inputs} for row in table[start : start + 40]], memory)


ARRAY = pa.array
PLAIN: dict[str, Any] = {"user": 1, "piece": 1.0, "age": 30, "tags": [1]}
CANDIDATE: dict[str, Any] = {"city": "Stadt 1", "hashed": 3, "price": 2.0, "count": 4, "genres": "g1|g2"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[
            ("user", v)
            for v in (
                1,
                1.0,
                "1",
                True,
                None,
                float("nan"),
                987_654,
                2**62,
                2**63,
                2**64 - 1,
                -(2**63),
                -0.0,
                np.int32(1),
                "-5",
            )
        ],
        *[("city", v) for v in ("Stadt 1", "", None, 7, 7.0, True, "nowhere", "ü\0", np.str_("Stadt 1"))],
        *[("city", v) for v in (decimal.Decimal("1.5"), datetime.date(2020, 1, 1))],
        *[("hashed", v) for v in (0, "0", None, "a")],
        *[("price", v) for v in (1, "2.5", True, None, float("nan"), 1e30, np.float32(0.1), 2**62, 2**63 + 2**12)],
        *[("age", v) for v in (-1, 500, None, "33")],
        *[("count", v) for v in (0, 1.7, -3, None, 10**6)],
        *[("genres", v) for v in ("", None, "g1", "g1|g2|g3|never", "|")],
        *[("tags", v) for v in (None, [], [1, 2, 3, 4, 5, 6], ["1", "2"], (1, 2), [10**12])],
    ],
)
def test_every_kind_of_value(encoder: Encoder, field: str, value: object) -> None:
    memory = RequestEncoder(encoder)
    context = PLAIN | ({field: value} if field in PLAIN else {})
    candidate = CANDIDATE | ({field: value} if field in CANDIDATE else {})
    expected_context = {k: list(v) if isinstance(v, tuple) else v for k, v in context.items()}
    for _ in range(2):  # the second time from memory
        expected = encoder.transform([{**expected_context, **candidate}])
        shown = memory.encode(context, [candidate]).batch()
        assert torch.equal(shown.sparse, expected.sparse)
        assert torch.equal(shown.dense.view(torch.int32), expected.dense.view(torch.int32))
        for name, bag in expected.sequences.items():
            assert torch.equal(shown.sequences[name].values, bag.values)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("user", "007", r"the context, field 'user': .*'007' is not an integer id"),
        ("user", 1.5, "field 'user'"),
        ("user", 2.0**53, "field 'user'"),
        ("user", 2**64, "field 'user'"),
        ("user", -(2**63) - 1, "field 'user'"),
        ("user", [1], "field 'user'"),
        ("user", {}, "field 'user'"),
        ("city", 1.5, "candidate 1, field 'city'"),
        ("city", "\ud800", "not valid text"),
        ("price", "dear", "candidate 1, field 'price': 'dear' is not a number"),
        ("price", float("inf"), "field 'price'"),
        ("price", 1e300, "field 'price'.*beyond what 32-bit floats hold"),
        ("price", 10**400, "field 'price'"),
        ("price", [1.0], "field 'price'"),
        ("count", "x", "field 'count'"),
        ("genres", 3, "candidate 1, field 'genres'.*expected a list"),
        ("genres", ["g1", None], "a list holds a missing value"),
        ("tags", "g1", "set the field's separator"),
        ("tags", [[1]], "field 'tags'"),
    ],
)
def test_wrong_values_are_named(encoder: Encoder, field: str, value: object, message: str) -> None:
    memory = RequestEncoder(encoder)
    context = PLAIN | ({field: value} if field in PLAIN else {})
    candidate = CANDIDATE | ({field: value} if field in CANDIDATE else {})
    for _ in range(2):
        with pytest.raises(DataError, match=message):
            memory.encode(context, [candidate])


def test_a_number_that_equals_a_remembered_one_of_another_type(encoder: Encoder) -> None:
    memory = RequestEncoder(encoder)
    for city in (1, True, 1.0, decimal.Decimal(1), "1", "true"):
        both(encoder, PLAIN, [CANDIDATE | {"city": city}], memory)
    memory.encode(PLAIN | {"user": 2**53}, [CANDIDATE])
    with pytest.raises(DataError, match=r"field 'user'"):
        memory.encode(PLAIN | {"user": 2.0**53}, [CANDIDATE])


def test_one_wrong_value_of_many_is_found_in_few_tries(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    ids = Encoder.ids

    def counted(self: Encoder, name: str, values: Any) -> Any:
        calls.append(len(values))
        return ids(self, name, values)

    monkeypatch.setattr(Encoder, "ids", counted)
    values: list[object] = [str(i) for i in range(3000)]
    assert len(requests_module._resolved(encoder, "user", values, str)) == 3000
    values[2777] = "x"
    with pytest.raises(DataError, match="2777: 'x' is not"):
        requests_module._resolved(encoder, "user", values, str)
    assert len(calls) < 40


def test_long_text_is_not_remembered() -> None:
    memory = requests_module._Memory(lambda values, place: np.full(len(values), 7, np.int32), 100)
    assert memory.ids(["x" * 257, "y"], str) == [7, 7]
    assert list(memory._known) == ["y"]


def test_mixed_kinds_in_one_request(encoder: Encoder) -> None:
    memory = RequestEncoder(encoder)
    cities: list[Any] = ["Stadt 1", 5, None, True, "Stadt 2", 2.0]
    shown = memory.encode(PLAIN, [CANDIDATE | {"city": city} for city in cities]).batch().sparse[:, 1].tolist()
    alone = [int(encoder.transform([PLAIN | CANDIDATE | {"city": city}]).sparse[0, 1]) for city in cities]
    assert shown == alone
    with pytest.raises(DataError, match="candidate 4, field 'city'"):
        memory.encode(PLAIN, [CANDIDATE | {"city": city} for city in ["Stadt 1", 5, None, 1.5]])


def test_absent_fields_and_other_shapes(encoder: Encoder) -> None:
    memory = RequestEncoder(encoder)
    with pytest.raises(DataError, match="the context has no field 'user'; give it a value, or null"):
        memory.encode({k: v for k, v in PLAIN.items() if k != "user"}, [CANDIDATE])
    with pytest.raises(DataError, match=r"candidate 2 has no field 'price', did you mean|candidate 2 has no field 'price'"):
        memory.encode(PLAIN, [CANDIDATE, {k: v for k, v in CANDIDATE.items() if k != "price"} | {"prize": 1}])
    with pytest.raises(DataError, match="candidate 1 is a int"):
        memory.encode(PLAIN, [3])
    with pytest.raises(DataError, match="the context is a list"):
        memory.encode([], [CANDIDATE])  # type: ignore[arg-type]
    empty = memory.encode(PLAIN, [])
    assert len(empty) == 0
    assert empty.batch().sparse.shape == (0, 7)


@pytest.mark.parametrize(
    "kind",
    [
        *[pa.timestamp(unit) for unit in ("s", "ms", "us", "ns")],
        pa.timestamp("ms", "UTC"),
        pa.time32("s"),
        pa.time64("us"),
        pa.duration("s"),
    ],
)
def test_times_are_no_categories(encoder: Encoder, kind: Any) -> None:
    plain = pa.array([0, 5, 0], pa.int32() if kind == pa.time32("s") else pa.int64()).cast(kind)
    label = ("label", [0, 1, 0])
    for column, field in (
        (plain, SparseField(name="at")),
        (plain.dictionary_encode(), SparseField(name="at")),
        (plain, SparseField(name="at", hash_size=9)),
        (pa.array([[value] for value in plain.to_pylist()], pa.list_(kind)), SequenceField(name="at")),
    ):
        schema = Schema(fields=(field, SparseField(name="item")), labels=("label",))
        table = pa.table({"at": column, "item": [1, 2, 1], label[0]: label[1]})
        with pytest.raises(DataError, match=r"column 'at'.*row 1: the column holds .*which is no category; derive"):
            Encoder.fit(schema, table).transform(table)
    with pytest.raises(DataError, match=r"candidate 1, field 'city': .*is no category"):
        RequestEncoder(encoder).encode(PLAIN, [CANDIDATE | {"city": plain[0].as_py()}])


def test_unsigned_ids() -> None:
    big = 2**63 + 5
    ids = pa.array([big, 7, big + 1, big, None, None, None], pa.uint64())
    lists = pa.array([[big], [7, big + 1], [], [big], [], [], []], pa.list_(pa.uint64()))
    table = pa.table({"id": ids, "seen": lists, "item": [1] * 7, "label": [0, 1, 0, 1, 0, 1, 0]})
    fields = (SparseField(name="id", side="context"), SequenceField(name="seen"), SparseField(name="item"))
    encoder = Encoder.fit(Schema(fields=fields, labels=("label",)), table)
    assert encoder.transform(table).sparse[:, 0].tolist() == [3, 5, 4, 3, 2, 2, 2]  # by count, then by the 64 bits
    assert encoder.transform(table).sequences["seen"].values.tolist() == [2, 4, 3, 2]
    memory = RequestEncoder(encoder)
    for value, known in ((big, 3), (str(big), 3), (7, 5), (big + 1, 4), (big + 2, 1), (None, 2)):
        request = memory.encode({"id": value}, [{"seen": [big, 7], "item": 1}, {"seen": [], "item": 1}])
        assert request.batch().sparse[:, 0].tolist() == [known, known]
        assert encoder.transform([{"id": value, "seen": [7], "item": 1}]).sparse[0, 0] == known
        assert request.batch().sequences["seen"].values.tolist() == [2, 4]


def test_dates_of_any_unit_are_the_same_categories() -> None:
    days = [datetime.date(2020, 1, 1), datetime.date(2021, 2, 3), datetime.date(2020, 1, 1)]
    schema = Schema(fields=(SparseField(name="day"), SparseField(name="item", side="context")), labels=("label",))
    for kind in (pa.date32(), pa.date64()):
        table = pa.table({"day": pa.array(days, kind), "item": [1, 1, 1], "label": [0, 1, 0]})
        encoder = Encoder.fit(schema, table)
        assert encoder.transform(table).sparse[:, 0].tolist() == [2, 3, 2]
        shown = RequestEncoder(encoder).encode({"item": 1}, [{"day": d} for d in days] + [{"day": "2021-02-03"}])
        assert shown.batch().sparse[:, 0].tolist() == [2, 3, 2, 3]


def test_frames(encoder: Encoder) -> None:
    memory = RequestEncoder(encoder)
    table = [{n: row[n] for n in memory.candidate_inputs} for row in rows(30, 5)]
    expected = memory.encode(PLAIN, table).batch()
    arrow = pa.Table.from_pylist(table)
    columns = {name: [row[name] for row in table] for name in memory.candidate_inputs}
    for frame in (arrow, pl.from_arrow(arrow), arrow.to_pandas(), pd.DataFrame(columns), columns):
        shown = memory.encode(PLAIN, frame).batch()
        assert torch.equal(shown.sparse, expected.sparse)
        assert torch.equal(shown.dense.view(torch.int32), expected.dense.view(torch.int32))


def test_no_kind_of_value_is_encoded_one_by_one(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays are what takes time: as many for 300 candidates as for 30, and fewer once values are remembered."""
    kinds: list[tuple[Any, Any]] = [
        (lambda i: i % 2 == 0, lambda i: i % 3 == 0),
        (lambda i: np.int64(i % 7), lambda i: np.float32(i / 3)),
        (lambda i: np.str_(f"Stadt {i % 5}"), lambda i: str(i / 3)),
        (lambda i: i % 7 if i % 3 else f"Stadt {i % 5}", lambda i: [i, i / 3, str(i), True][i % 4]),
    ]
    for city, price in kinds:
        memory = RequestEncoder(encoder)
        tables = {n: [CANDIDATE | {"city": city(i), "price": price(i)} for i in range(n)] for n in (30, 300)}
        made: list[int] = []
        for n in (30, 300, 300):
            arrays = [0]

            def counted(*given: Any, arrays: list[int] = arrays, **options: Any) -> Any:
                arrays[0] += 1
                return ARRAY(*given, **options)

            monkeypatch.setattr(pa, "array", counted)
            shown = memory.encode(PLAIN, tables[n]).batch()
            monkeypatch.setattr(pa, "array", ARRAY)
            made.append(arrays[0])
            for at in range(0, n, 29):
                expected = encoder.transform([PLAIN | tables[n][at]])
                assert torch.equal(shown.sparse[at : at + 1], expected.sparse)
                assert torch.equal(shown.dense[at : at + 1].view(torch.int32), expected.dense.view(torch.int32))
        assert made[2] <= made[1] <= 40


def test_columns_of_frames_stay_columns(encoder: Encoder) -> None:
    memory = RequestEncoder(encoder)
    table = pa.table({name: [CANDIDATE[name]] * 2 + [None] for name in CANDIDATE})
    expected = encoder.transform([PLAIN | row for row in table.to_pylist()])
    for frame in (table, table.set_column(0, "city", table["city"].combine_chunks().dictionary_encode())):
        shown = memory.encode(PLAIN, frame).batch()
        assert torch.equal(shown.sparse, expected.sparse)
        assert torch.equal(shown.dense.view(torch.int32), expected.dense.view(torch.int32))
    assert len(memory.encode(PLAIN, table.slice(0, 0))) == 0
    with pytest.raises(DataError, match="candidate 2, field 'price': 'dear' is not a number"):
        memory.encode(PLAIN, table.set_column(table.column_names.index("price"), "price", pa.array(["1", "dear", "2"])))


def test_the_memory_is_bounded(encoder: Encoder) -> None:
    memory = RequestEncoder(encoder)
    for start in range(0, 200_000, 20_000):
        memory.encode(PLAIN, [CANDIDATE | {"city": f"c{i}"} for i in range(start, start + 20_000)])
    both(encoder, PLAIN, [CANDIDATE, CANDIDATE | {"city": "c7"}], memory)
    sizes = [len(m._known) for _, m, _ in memory._candidates._sparse if m is not None]
    assert max(sizes) <= (1 << 17) // len(SCHEMA.fields)


HISTORY = Schema(
    fields=(
        SparseField(name="item"),
        SequenceField(name="clicked", side="context", ordered=True, shares="item"),
        SequenceField(name="words", side="context", ordered=True, nested=True),
    ),
    labels=("label",),
    time="now",
    histories=(History(name="h", fields=("clicked", "words"), times="when", gaps="gap", max_length=2),),
)


def test_histories_are_guarded_and_cut_as_in_tables() -> None:
    past: dict[str, Any] = {"clicked": [1, 2, 3, 4], "words": [["a"], [], ["b", "c"], ["a"]], "when": [1, 5, 8, 12], "now": 10}
    encoder = Encoder.fit(HISTORY, [{**past, "item": i % 5, "label": i % 2} for i in range(20)])
    memory = RequestEncoder(encoder)
    assert set(memory.context_inputs) == {"clicked", "words", "when", "now"}
    for context in (past, past | {"now": 100}, past | {"now": 0}, {"clicked": None, "words": None, "when": None, "now": 3}):
        if context["when"] is None:  # a column of nothing has no times to compare
            context = {"clicked": [], "words": [], "when": [], "now": 3}
        expected = encoder.transform([{**context, "item": i} for i in range(3)])
        shown = memory.encode(context, [{"item": i} for i in range(3)]).batch()
        for name, bag in expected.sequences.items():
            assert torch.equal(shown.sequences[name].values, bag.values), name
            assert torch.equal(shown.sequences[name].offsets, bag.offsets), name
            assert (bag.inner is None) == (shown.sequences[name].inner is None)
            if bag.inner is not None:
                assert torch.equal(shown.sequences[name].inner, bag.inner)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="one for every behaviour"):
        memory.encode(past | {"clicked": [1]}, [{"item": 1}])


def test_times_of_requests_are_of_the_kind_of_training() -> None:
    day = [datetime.datetime(2024, 1, d) for d in (1, 2, 4)]
    past: dict[str, Any] = {"clicked": [1, 2], "words": [["a"], ["b"]], "when": day[:2], "now": day[2]}
    rows = [{**past, "item": i % 3, "label": i % 2} for i in range(6)]
    memory = RequestEncoder(Encoder.fit(HISTORY, rows))
    expected = memory.encoder.transform(rows[:1]).sequences["gap"].values
    assert expected.tolist() == [2 + 17, 2 + 17]  # 2¹⁷ ≤ 172,801 and 259,201 < 2¹⁸
    zoned: dict[str, Any] = {"when": ["2024-01-01T02:00:00+02:00", "2024-01-02T00:00:00Z"], "now": "2024-01-04"}
    for times in (zoned, {"when": [t.isoformat() for t in day[:2]], "now": day[2].isoformat()}, {}):
        found = memory.encode({**past, **times}, [{"item": 1}]).context.sequences["gap"].values
        assert torch.equal(found, expected)
    millis = {"when": [1704067200000, 1704153600000], "now": 1704326400000}
    with pytest.raises(DataError, match=r"the context: column 'when' .*training had timestamps"):
        memory.encode(past | millis, [{"item": 1}])
    with pytest.raises(DataError, match="the context, field 'when': 'yesterday' is no time; expected ISO 8601"):
        memory.encode(past | {"when": ["yesterday", "today"]}, [{"item": 1}])
    with pytest.raises(DataError, match="the context, field 'now': '5' is no time"):
        memory.encode(past | {"now": "5"}, [{"item": 1}])
    for beyond in ("0001-01-01T00:00:00+23:00", "9999-12-31T23:59:59-23:00"):  # no time in UTC
        with pytest.raises(DataError, match="is no time"):
            memory.encode(past | {"now": beyond}, [{"item": 1}])
    deep: Any = []
    for _ in range(900):
        deep = [deep]
    with pytest.raises(DataError, match="a list of times holds a list"):
        memory.encode(past | {"when": deep}, [{"item": 1}])
    numbers = RequestEncoder(Encoder.fit(HISTORY, [{**row, "when": [1, 2], "now": 9} for row in rows]))
    with pytest.raises(DataError, match="the context, field 'when': '2024-01-01' is text, but training had numbers"):
        numbers.encode({**past, "when": ["2024-01-01"] * 2, "now": 9}, [{"item": 1}])


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"when": "x"}, ["when"]),
        ({"when": [1, None, 8, 12]}, ["when"]),
        ({"when": [1, 5, 8, "y"]}, ["when"]),
        ({"clicked": "x"}, ["clicked"]),
        ({"clicked": [[1]]}, ["clicked"]),
        ({"words": [["a"], "b", [], []]}, ["words"]),
        ({"now": None}, ["now"]),
        ({"now": "x", "when": 3, "clicked": 1.5, "words": {}}, ["clicked", "words", "when", "now"]),
        ({"words": [["a"]]}, ["words"]),  # fewer than behaviours
        ({"when": [1]}, ["when"]),
        ({"when": [9, 5, 8, 12]}, ["when"]),  # they fall
        ({"item": [], "when": "x"}, ["when", "item"]),
        ({"item": []}, ["item"]),
    ],
)
def test_problems_of_histories_have_a_field(change: dict[str, Any], fields: list[str]) -> None:
    past: dict[str, Any] = {"clicked": [1, 2, 3, 4], "words": [["a"], [], ["b", "c"], ["a"]], "when": [1, 5, 8, 12], "now": 10}
    encoder = RequestEncoder(Encoder.fit(HISTORY, [{**past, "item": i % 5, "label": i % 2} for i in range(20)]))
    context, candidates = past | {k: v for k, v in change.items() if k != "item"}, [{"item": change.get("item", 1)}]
    with pytest.raises(DataError):
        encoder.encode(context, candidates)
    found = encoder.problems(context, candidates)
    assert sorted(problem.field for problem in found) == sorted(fields)
    assert all(problem.message for problem in found)
    assert encoder.problems(past, [{"item": 1}]) == []


def test_repeated_rows_by_hand() -> None:
    flat = repeated(Ragged(torch.tensor([5, 6]), torch.tensor([0, 2])), 3)
    assert flat.values.tolist() == [5, 6, 5, 6, 5, 6]
    assert flat.offsets.tolist() == [0, 2, 4, 6]
    nested = repeated(Ragged(torch.tensor([5, 6, 7]), torch.tensor([0, 2]), torch.tensor([0, 1, 3])), 2)
    assert nested.offsets.tolist() == [0, 2, 4]
    assert nested.inner is not None
    assert nested.inner.tolist() == [0, 1, 3, 4, 6]


def test_sides_of_histories_with_a_candidates_attribute() -> None:
    fields = tuple(replace(f, side="candidate") if f.name == "words" else f for f in HISTORY.fields)
    encoder = Encoder.fit(
        replace(HISTORY, fields=fields),
        [{"clicked": [1, 2], "words": [["a"], ["b"]], "when": [1, 5], "now": 10, "item": i, "label": i % 2} for i in range(4)],
    )
    memory = RequestEncoder(encoder)
    assert memory.sides.sequences == frozenset()
    context = {"clicked": [1, 2]}
    candidates = [{"item": 1, "words": [["a"], [w]], "when": [1, 5], "now": 10} for w in "ab"]
    assert memory.context_inputs == ("clicked",)
    expected = encoder.transform([{**context, **row} for row in candidates])
    shown = memory.encode(context, candidates).batch()
    for name, bag in expected.sequences.items():
        assert torch.equal(shown.sequences[name].values, bag.values), name
