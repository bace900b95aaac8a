"""Schemas: validation, JSON written and read back, and edited by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ctrlib.schema import (
    BatchLayout,
    CrossField,
    DataError,
    DenseColumn,
    DenseField,
    Field,
    FieldLayout,
    History,
    NumericEncoding,
    Schema,
    SequenceColumn,
    SequenceField,
    SparseColumn,
    SparseField,
    suggest,
)

FULL = Schema(
    fields=(
        SparseField(name="user", side="context", min_count=5, max_size=1000),
        SparseField(name='Ünïcode "quoted"\n', hash_size=7),
        SparseField(name="plain"),
        DenseField(name="price", encoding="piecewise", num_bins=8, side="context"),
        DenseField(name="count", encoding="criteo_log", min_count=2),
        SequenceField(name="seen", ordered=True, pooling="max", max_length=50, shares="plain"),
        SequenceField(name="tags", separator="|", max_size=9),
    ),
    labels=("click", "buy"),
    group="user",
    time="day",
    weight="w",
    ignored={"row": "all different", "ä": "constant"},
)


def entry(**options: Any) -> dict[str, Any]:
    return {"labels": ["y"], "fields": [options]}


def test_round_trip(tmp_path: Path) -> None:
    for schema in (FULL, Schema(fields=(SparseField(name="x"),), labels=("y",)), Schema(fields=(), labels=("y",))):
        schema.save(tmp_path / "schema.json")
        assert Schema.load(tmp_path / "schema.json") == schema
        assert Schema.from_json(json.loads(json.dumps(schema.to_json()))) == schema
    assert [p.name for p in tmp_path.iterdir()] == ["schema.json"]


def test_the_file_holds_one_field_a_line_without_defaults(tmp_path: Path) -> None:
    FULL.save(tmp_path / "schema.json")
    text = (tmp_path / "schema.json").read_text(encoding="utf-8")
    assert '    {"name": "plain", "kind": "sparse"},\n' in text
    assert '    {"name": "price", "kind": "dense", "side": "context", "encoding": "piecewise", "num_bins": 8},\n' in text
    assert "Ünïcode" in text


def test_columns_and_look_up() -> None:
    assert FULL.columns == ("user", 'Ünïcode "quoted"\n', "plain", "price", "count", "seen", "tags", "click", "buy", "day", "w")
    assert FULL["price"] == FULL.fields[3]
    with pytest.raises(DataError, match="no field 'pric'; did you mean 'price'"):
        FULL["pric"]
    changed = FULL.with_fields(DenseField(name="price"), SparseField(name="tags"))
    assert [f.name for f in changed.fields] == [f.name for f in FULL.fields]
    assert (changed["price"], changed["tags"]) == (DenseField(name="price"), SparseField(name="tags"))
    with pytest.raises(DataError, match="no field 'x'"):
        FULL.with_fields(DenseField(name="x"))


def test_suggestions() -> None:
    assert suggest("min_cuont", ["min_count", "max_size"]) == "; did you mean 'min_count'?"
    assert suggest("zzz", ["min_count"]) == ""


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"labels": ["y"], "feilds": []}, "unknown key 'feilds'; did you mean 'fields'"),
        (
            entry(name="x", kind="sparze"),
            "field 'x' has kind 'sparze'; expected sparse, dense, sequence, cross; did you mean 'sparse'",
        ),
        (entry(name="x"), "field 'x' has kind None"),
        (entry(name="x", kind=["sparse"]), r"field 'x' has kind \['sparse'\]"),
        (entry(kind="sparse"), "a sparse field has no name"),
        (
            entry(name="x", kind="sparse", min_cuont=2),
            r"field 'x' \(sparse\) has no option 'min_cuont'; did you mean 'min_count'",
        ),
        (entry(name="x", kind="dense", max_size=2), r"field 'x' \(dense\) has no option 'max_size'"),
        (entry(name="x", kind="sparse", min_count="5"), "field 'x': min_count is '5'; expected int"),
        (entry(name="x", kind="sparse", min_count=2.0), "field 'x': min_count is 2.0; expected int"),
        (entry(name="x", kind="sparse", min_count=True), "field 'x': min_count is True; expected int"),
        (entry(name="x", kind="sparse", min_count=None), "field 'x': min_count is None; expected int"),
        (entry(name="x", kind="sparse", max_size="5"), "field 'x': max_size is '5'; expected int or null"),
        (entry(name="x", kind="sparse", shares=1), "field 'x': shares is 1; expected str or null"),
        (entry(name="x", kind="sequence", ordered="yes"), "field 'x': ordered is 'yes'; expected bool"),
        (entry(name="x", kind="sparse", side=1), "field 'x': side is 1; expected str"),
        (entry(name=7, kind="sparse"), "name is 7; expected str"),
        (entry(name="x", kind="sparse", side="ctx"), "side is 'ctx'; expected one of context, candidate"),
        (entry(name="x", kind="dense", encoding="zscore"), "encoding is 'zscore'; expected one of standardize, log"),
        (entry(name="x", kind="sequence", pooling="avg"), "pooling is 'avg'; expected one of mean, sum, max"),
        ({"labels": "click", "fields": []}, "labels is 'click'; expected a list of column names"),
        ({"labels": [1], "fields": []}, r"labels is \[1\]; expected a list of column names"),
        ({"labels": ["y"], "fields": {"x": "sparse"}}, "fields is .*; expected a list of objects"),
        ({"labels": ["y"], "fields": ["x"]}, "fields is .*; expected a list of objects"),
        ({"labels": ["y"], "ignored": ["x"]}, "ignored is .*; expected an object"),
        ({"labels": ["y"], "group": ["x"]}, r"group is \['x'\]; expected a column name or null"),
        ({"fields": []}, "names no label"),
        ({"labels": [], "fields": []}, "names no label"),
    ],
)
def test_json_edited_by_hand(data: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        Schema.load(tmp_path / "schema.json")


def test_null_options_are_read() -> None:
    data = {**entry(name="x", kind="sparse", max_size=None, shares=None), "group": None}
    assert Schema.from_json(data) == Schema(fields=(SparseField(name="x"),), labels=("y",))


def test_files_that_are_no_schema(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: cannot be read \(No such file"):
        Schema.load(tmp_path / "none.json")
    for content, message in (
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[]", "holds a list; expected an object"),
    ):
        (tmp_path / "s.json").write_bytes(content)
        with pytest.raises(DataError, match=rf"s\.json: {message}"):
            Schema.load(tmp_path / "s.json")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (SparseField, {"min_count": 0}, "min_count is 0; expected 1"),
        (SparseField, {"max_size": 0}, "max_size is 0"),
        (SparseField, {"hash_size": 0}, "hash_size is 0"),
        (SparseField, {"hash_size": 5, "min_count": 2}, "hash_size learns no vocabulary"),
        (SequenceField, {"hash_size": 5, "max_size": 2}, "hash_size learns no vocabulary"),
        (SequenceField, {"max_length": 0}, "max_length is 0"),
        (SequenceField, {"separator": ""}, "separator is empty"),
        (SequenceField, {"pooling": "avg"}, "pooling is 'avg'"),
        (DenseField, {"num_bins": 1}, "num_bins is 1; expected 2 or more"),
        (DenseField, {"min_count": 0}, "min_count is 0"),
        (DenseField, {"encoding": "z"}, "encoding is 'z'"),
        (DenseField, {"side": "z"}, "side is 'z'"),
    ],
)
def test_options_of_fields(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"field 'x': {message}"):
        kind(name="x", **options)


X, D = SparseField(name="x"), DenseField(name="d")


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ((X, X), {}, "names column 'x' twice"),
        ((X, SequenceField(name="x")), {}, "names column 'x' twice"),
        ((X, SparseField(name="y")), {}, "names column 'y' twice"),
        ((X,), {"labels": ("y", "y")}, "names column 'y' twice"),
        ((X,), {"weight": "x"}, "'x' is the row weight and also a field or label"),
        ((X,), {"weight": "y"}, "'y' is the row weight and also a field or label"),
        ((SparseField(name="s", shares="xx"), X), {}, "shares the vocabulary of 'xx', .*did you mean 'x'"),
        ((SparseField(name="s", shares="d"), D), {}, "shares the vocabulary of 'd', which is not another sparse or sequence"),
        ((SparseField(name="s", shares="s"),), {}, "shares the vocabulary of 's', which is not another"),
        (
            (SparseField(name="s", shares="t"), SparseField(name="t", shares="x"), X),
            {},
            "field 's' shares with 't', which itself shares with 'x'",
        ),
        ((SparseField(name="s", shares="x", min_count=2), X), {}, "so its own min_count, max_size and hash_size mean nothing"),
        ((SequenceField(name="s", shares="x", hash_size=2), X), {}, "set them on 'x' only"),
    ],
)
def test_contradictions(fields: tuple[Field, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Schema(fields=fields, **{"labels": ("y",), **options})


def test_sharing_with_a_field_named_later() -> None:
    schema = Schema(fields=(SequenceField(name="seen", shares="x"), SparseField(name="x", min_count=3)), labels=("y",))
    assert Schema.from_json(schema.to_json()) == schema


def test_a_group_may_be_a_field_and_time_need_not_be_one() -> None:
    schema = Schema(fields=(X,), labels=("y",), group="x", time="t")
    assert schema.columns == ("x", "y", "t")


def test_which_numeric_encodings_are_categories() -> None:
    kinds: list[NumericEncoding] = ["standardize", "log", "minmax", "piecewise", "criteo_log", "bucket"]
    assert [k for k in kinds if DenseField(name="x", encoding=k).is_category] == ["criteo_log", "bucket"]


def test_layouts() -> None:
    layout = BatchLayout((SparseColumn("a", 5, "a"),), (DenseColumn("b"),), (SequenceColumn("c", 5, "a"),))
    assert layout.names == ("a", "b", "c")
    fields = FieldLayout(("a", "b", "c"), 8)
    assert (fields.num_fields, fields.width) == (3, 24)


CROSSED = Schema(
    fields=(
        SparseField(name="user", side="context"),
        SparseField(name="hour", side="context"),
        DenseField(name="age", encoding="bucket"),
        DenseField(name="price"),
        SequenceField(name="tags"),
    ),
    labels=("y",),
)


def test_crosses(tmp_path: Path) -> None:
    schema = CROSSED.with_crosses(min_count=4)
    assert [(f.name, f.of, f.side, f.min_count) for f in schema.crosses] == [
        ("user*hour", ("user", "hour"), "context", 4),
        ("user*age", ("user", "age"), "candidate", 4),
        ("hour*age", ("hour", "age"), "candidate", 4),
    ]
    assert schema.inputs == ("user", "hour", "age", "price", "tags")
    assert schema.columns == ("user", "hour", "age", "price", "tags", "y")
    one = CROSSED.with_crosses([("age", "user")], hash_size=9)
    assert [f.name for f in one.fields] == ["user", "hour", "age", "price", "tags", "user*age"]
    for each in (schema, one):
        each.save(tmp_path / "schema.json")
        assert Schema.load(tmp_path / "schema.json") == each
        assert Schema.from_json(json.loads(json.dumps(each.to_json()))) == each
    text = (tmp_path / "schema.json").read_text(encoding="utf-8")
    assert '{"name": "user*age", "kind": "cross", "of": ["user", "age"], "hash_size": 9}' in text


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("user", "tags"), "'user\\*tags' crosses 'tags', which is not a field of categories"),
        (("user", "price"), "'user\\*price' crosses 'price', which is not a field of categories"),
        (("user", "user"), r"of is \['user', 'user'\]; expected the names of two different fields"),
        (("user", "huor"), "no field 'huor'; did you mean 'hour'"),
        (("user", "user*hour"), r"crosses 'user\*hour', which is not a field of categories"),
        (("hour", "user"), r"names column 'user\*hour' twice"),
    ],
)
def test_what_cannot_be_crossed(pair: tuple[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        CROSSED.with_crosses([("user", "hour")]).with_crosses([pair])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, 'field .x. .cross. has no "of"; expected the names of two fields'),
        ({"of": "a"}, "of is 'a'; expected list"),
        ({"of": ["a"]}, "expected the names of two different fields"),
        ({"of": ["a", 1]}, "expected the names of two different fields"),
        ({"of": ["a", "c"]}, "crosses 'c', which is not a field of categories"),
        ({"of": ["a", "b"], "side": "context"}, "has side 'context', but crosses 'b' of side 'candidate'"),
        ({"of": ["a", "b"], "min_count": 0}, "min_count is 0"),
        ({"of": ["a", "b"], "hash_size": 5, "max_size": 2}, "hash_size learns no vocabulary"),
        ({"of": ["a", "b"], "shares": "a"}, "has no option 'shares'"),
    ],
)
def test_crosses_edited_by_hand(options: dict[str, Any], message: str) -> None:
    fields = [{"name": "a", "kind": "sparse", "side": "context"}, {"name": "b", "kind": "sparse"}]
    with pytest.raises(DataError, match=message):
        Schema.from_json({"labels": ["y"], "fields": [*fields, {"name": "x", "kind": "cross", **options}]})


def test_a_pair_is_crossed_once_and_its_vocabulary_not_shared() -> None:
    schema = CROSSED.with_crosses([("user", "hour")])
    again = CrossField(name="z", of=("hour", "user"))
    with pytest.raises(DataError, match=r"'user\*hour' and 'z' cross the same two fields"):
        Schema(fields=(*schema.fields, again), labels=("y",))
    with pytest.raises(
        DataError, match=r"shares the vocabulary of 'user\*hour', which is not another sparse or sequence field"
    ):
        Schema(fields=(*schema.fields, SparseField(name="n", shares="user*hour")), labels=("y",))


SEQUENCES = Schema(
    fields=(
        SparseField(name="item"),
        SequenceField(name="bag"),
        SequenceField(name="hist_item", ordered=True, shares="item"),
        SequenceField(name="hist_tags", ordered=True, nested=True),
        SequenceField(name="searched", ordered=True),
    ),
    labels=("y",),
    time="now",
    histories=(
        History(fields=("hist_item", "hist_tags"), times="hist_time", gaps="hist_gap", max_length=9, on_leak="refuse"),
        History(name="searches", fields=("searched",)),
    ),
)


def test_histories(tmp_path: Path) -> None:
    assert SEQUENCES.inputs == ("item", "bag", "hist_item", "hist_tags", "searched", "hist_time", "now")
    assert SEQUENCES.columns == (*SEQUENCES.inputs, "y")
    SEQUENCES.save(tmp_path / "schema.json")
    assert Schema.load(tmp_path / "schema.json") == SEQUENCES
    assert SEQUENCES.to_json()["histories"][1] == {"name": "searches", "fields": ["searched"]}
    assert "histories" not in FULL.to_json()
    without = replace(SEQUENCES, histories=SEQUENCES.histories[1:], fields=(*SEQUENCES.fields[:3], SEQUENCES.fields[4]))
    assert without.inputs == ("item", "bag", "hist_item", "searched")


def test_a_schema_with_some_fields_only() -> None:
    kept = SEQUENCES.with_only(f for f in SEQUENCES.fields if f.name not in ("hist_tags", "searched", "bag"))
    assert [f.name for f in kept.fields] == ["item", "hist_item"]
    assert kept.histories == (replace(SEQUENCES.histories[0], fields=("hist_item",)),)
    assert SEQUENCES.with_only(SEQUENCES.fields) == SEQUENCES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fields": ()}, r"history 'h': fields is \(\); expected the names of one or more"),
        ({"fields": ("a", "a")}, r"history 'h': fields is \('a', 'a'\)"),
        ({"fields": ("hist_item",), "on_leak": "ignore"}, "on_leak is 'ignore'; expected one of drop, refuse"),
        ({"fields": ("hist_item",), "max_length": 0}, "max_length is 0; expected 1 or more, or null"),
        ({"fields": ("hist_item",), "gaps": "g"}, "gaps needs the times of the behaviours"),
        ({"fields": ("hist_itm",)}, "history 'h' has 'hist_itm', which is not a sequence .* did you mean 'hist_item'"),
        ({"fields": ("item",)}, "history 'h' has 'item', which is not a sequence field with ordered"),
        ({"fields": ("bag",)}, "history 'h' has 'bag', which is not a sequence field with ordered"),
        ({"fields": ("short",)}, "field 'short' is in history 'h'; set max_length there"),
        ({"fields": ("hist_item",), "times": "y"}, "times is 'y', a label or one of its fields"),
        ({"fields": ("hist_item",), "times": "hist_item"}, "times is 'hist_item', a label or one of its fields"),
        ({"fields": ("hist_item",), "times": "t", "gaps": "t"}, "gaps is 't', a column of the data"),
        ({"fields": ("hist_item",), "times": "t", "gaps": "item"}, "gaps is 'item', a column of the data"),
        ({"fields": ("hist_item",), "times": "t", "gaps": "now"}, "gaps is 'now', a column of the data"),
    ],
)
def test_histories_that_contradict(options: dict[str, Any], message: str) -> None:
    fields = (*SEQUENCES.fields[:3], SequenceField(name="short", ordered=True, max_length=3))
    with pytest.raises(DataError, match=message):
        Schema(fields=fields, labels=("y",), time="now", histories=(History(name="h", **options),))


def test_histories_that_contradict_each_other_or_the_schema() -> None:
    one = History(name="h", fields=("hist_item",))
    fields = SEQUENCES.fields[:3]
    for histories, message in (
        ((one, one), "two histories named 'h'"),
        ((one, replace(one, name="i")), "field 'hist_item' is in histories 'h' and 'i'"),
        ((replace(one, times="t", gaps="g"),), "gaps needs the time of the row"),
    ):
        with pytest.raises(DataError, match=message):
            Schema(fields=fields, labels=("y",), histories=histories)
    with pytest.raises(DataError, match="field 'hist_tags' is nested, but in no history"):
        Schema(fields=SEQUENCES.fields[3:4], labels=("y",))
    with pytest.raises(DataError, match="field 'x': nested needs a column of lists of lists"):
        SequenceField(name="x", ordered=True, nested=True, separator="|")


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ({"name": "h"}, "history 'h' has no \"fields\""),
        ({"name": "h", "fields": "item"}, "history 'h': fields is 'item'; expected list"),
        ({"name": "h", "fields": [1]}, r"history 'h': fields is \(1,\); expected the names"),
        ({"name": "h", "fields": ["a"], "time": "t"}, "history 'h' has no option 'time'; did you mean 'times'"),
        ({"name": "h", "fields": ["a"], "max_length": "9"}, "history 'h': max_length is '9'; expected int or null"),
        ("h", "histories is .*; expected a list of objects with name and fields"),
    ],
)
def test_histories_edited_by_hand(history: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Schema.from_json({"labels": ["y"], "histories": [history]})
