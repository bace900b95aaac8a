"""The encoder as a whole: training rows only, exact round trips, refusals that name the place."""

from __future__ import annotations

import json
import math
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrlib.data.encoder import Encoded, Encoder
from ctrlib.data.source import open_source
from ctrlib.data.vocabulary import Vocabulary
from ctrlib.schema import DataError, DenseField, Field, Schema, SequenceField, SparseField

DATA = Path(os.environ.get("CTRLIB_DATA", Path(__file__).parents[3] / "shared" / "data"))
SCHEMA = Schema(
    fields=(
        SparseField(name="user", side="context", min_count=2),
        DenseField(name="price", encoding="log"),
        SequenceField(name="seen", shares="item", max_length=2),
        SparseField(name="item"),
        DenseField(name="age", encoding="bucket", num_bins=3),
        DenseField(name="clicks", encoding="criteo_log"),
        SparseField(name="agent", hash_size=50),
        DenseField(name="height", encoding="piecewise", num_bins=4),
    ),
    labels=("click", "buy"),
    group="user",
    weight="w",
)


def rows(n: int = 300, seed: int = 0) -> pd.DataFrame:
    r = np.random.default_rng(seed)

    def gaps(values: Any) -> list[Any]:
        return [None if r.random() < 0.1 else v for v in values.tolist()]

    return pd.DataFrame(
        {
            "click": r.integers(0, 2, n),
            "buy": r.integers(0, 2, n).astype(bool),
            "user": gaps(np.array([f"u{k}" for k in r.zipf(1.5, n) % 40])),
            "item": r.integers(2**53, 2**53 + 30, n),
            "seen": [None if r.random() < 0.1 else r.integers(2**53, 2**53 + 40, r.integers(0, 5)).tolist() for _ in range(n)],
            "price": gaps(r.lognormal(2, 1, n)),
            "age": gaps(r.integers(18, 80, n).astype(float)),
            "clicks": pd.array(gaps(r.integers(0, 500, n)), "Int64"),
            "agent": gaps(np.array([f"agent {k}" for k in r.integers(0, 9, n)])),
            "height": r.normal(170, 10, n),
            "w": r.random(n),
        }
    )


def table(data: pd.DataFrame) -> pa.Table:
    return pa.Table.from_pandas(data, preserve_index=False)


def same(a: Encoded, b: Encoded) -> None:
    for name in ("sparse", "dense", "labels", "weight", "group"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert a.sequences.keys() == b.sequences.keys()
    for name, (values, lengths) in a.sequences.items():
        np.testing.assert_array_equal(values, b.sequences[name][0])
        np.testing.assert_array_equal(lengths, b.sequences[name][1])


def stack(blocks: list[Encoded]) -> Encoded:
    def cat(name: str) -> Any:
        return np.concatenate([getattr(b, name) for b in blocks])

    sequences = {
        n: (np.concatenate([b.sequences[n][0] for b in blocks]), np.concatenate([b.sequences[n][1] for b in blocks]))
        for n in blocks[0].sequences
    }
    return Encoded(cat("sparse"), cat("dense"), sequences, cat("labels"), cat("weight"), cat("group"))


def one(*fields: Field, **options: Any) -> Schema:
    return Schema(fields=fields, labels=("y",), **options)


def test_layout_and_types() -> None:
    encoder = Encoder.fit(SCHEMA, rows())
    layout = encoder.layout
    assert [c.name for c in layout.sparse] == ["user", "item", "age", "clicks", "agent"]
    assert [c.name for c in layout.dense] == ["price", "height"]
    assert [(c.name, c.table, c.vocab_size) for c in layout.sequences] == [("seen", "item", layout.sparse[1].vocab_size)]
    assert layout.labels == ("click", "buy")
    assert [c.missing for c in layout.dense] == [True, False]
    batch = encoder.transform(rows(), labels=True)
    found = [str(t.dtype) for t in (batch.sparse, batch.dense, batch.labels, batch.weight, batch.group)]  # type: ignore[union-attr]
    assert found == ["torch.int32", "torch.float32", "torch.float32", "torch.float32", "torch.int64"]
    for i, column in enumerate(layout.sparse):
        assert 1 <= int(batch.sparse[:, i].min()) <= int(batch.sparse[:, i].max()) < column.vocab_size


def test_sequences_against_a_loop() -> None:
    data = rows()
    encoder = Encoder.fit(SCHEMA, data)
    counts: dict[int, int] = {}
    for value in [*data.item.tolist(), *(v for bag in data.seen if bag is not None for v in bag)]:
        counts[value] = counts.get(value, 0) + 1
    ids = {v: i + 2 for i, v in enumerate(sorted(counts, key=lambda v: (-counts[v], v)))}
    batch = encoder.transform(data)
    assert batch.sparse[:, 1].tolist() == [ids[v] for v in data.item]
    bag = batch.sequences["seen"]
    for row, raw in enumerate(data.seen):
        want = [ids[v] for v in (raw if raw is not None else [])][-2:]
        assert bag.values[bag.offsets[row] : bag.offsets[row + 1]].tolist() == want


def test_fit_sees_training_rows_only() -> None:
    data, mask = rows(), np.arange(300) % 4 != 1
    before = Encoder.fit(SCHEMA, open_source(data).select(mask))
    other = rows(seed=9)
    changed = pd.concat([data[mask], other[~mask]]).sort_index()
    changed.loc[~mask, "price"] = 1e30
    assert not changed.equals(data)
    assert Encoder.fit(SCHEMA, open_source(changed).select(mask)).hash == before.hash
    assert Encoder.fit(SCHEMA, data[mask]).hash == before.hash
    assert Encoder.fit(SCHEMA, changed).hash != before.hash


def test_row_order_does_not_change_the_encoder() -> None:
    data = rows()
    assert Encoder.fit(SCHEMA, data.sample(frac=1, random_state=1)).hash == Encoder.fit(SCHEMA, data).hash


@pytest.mark.parametrize("block", [1, 2, 7, 299, 300, 1000])
def test_block_size_changes_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = rows()
    encoder = Encoder.fit(SCHEMA, data)
    (whole,) = encoder.encode(data)
    blocks = list(encoder.encode(data, block_rows=block))
    assert [len(b.sparse) for b in blocks] == [block] * (300 // block) + [300 % block] * (300 % block > 0)
    same(stack(blocks), whole)
    monkeypatch.setattr("ctrlib.data.source.BLOCK_ROWS", block)
    assert Encoder.fit(SCHEMA, data).hash == encoder.hash
    same(stack(list(encoder.encode(data, block_rows=50))), whole)


def test_threads_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = rows(5000)
    pq.write_table(table(data), tmp_path / "a.parquet", row_group_size=700)
    hashes, outputs = set(), []
    for cores in (1, 4):
        monkeypatch.setattr("ctrlib.data.encoder.cpu_count", lambda cores=cores: cores)
        encoder = Encoder.fit(SCHEMA, tmp_path / "a.parquet")
        hashes.add(encoder.hash)
        outputs.append(stack(list(encoder.encode(tmp_path / "a.parquet", block_rows=512))))
    assert len(hashes) == 1
    same(*outputs)


@pytest.mark.parametrize("group", [1, 40, 700])
@pytest.mark.parametrize("read", [7, 64, 1 << 17])
def test_row_groups_and_their_dictionaries_change_nothing(
    group: int, read: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = rows(1000).astype({"agent": "category"})
    pq.write_table(table(data), tmp_path / "a.parquet", row_group_size=group, dictionary_pagesize_limit=40)
    mask = np.random.default_rng(1).random(1000) < 0.3
    whole, part = (Encoder.fit(SCHEMA, rows_of) for rows_of in (data, data[mask]))
    monkeypatch.setattr("ctrlib.data.source.BLOCK_ROWS", read)
    source = open_source(tmp_path / "a.parquet")
    assert Encoder.fit(SCHEMA, source).hash == whole.hash
    assert Encoder.fit(SCHEMA, source.select(mask)).hash == part.hash
    same(stack(list(part.encode(source, block_rows=90))), next(part.encode(data)))
    same(stack(list(part.encode(source.select(mask), block_rows=90))), next(part.encode(data[mask])))


def test_a_wide_range_and_a_narrow_one_encode_alike() -> None:
    r = np.random.default_rng(3)
    narrow = r.integers(-50, 200, 3000)
    wide = np.append(narrow, [10**12, -(10**12)])  # the same values, but no range that could be looked up
    fields = [SparseField(name="id"), SparseField(name="hashed", hash_size=30)]
    numbers = [
        DenseField(name=e, encoding=e, num_bins=8)
        for e in ("standardize", "log", "minmax", "piecewise", "bucket", "criteo_log")
    ]
    names = ["id", "hashed", *(f.name for f in numbers)]
    schema = Schema(fields=(*fields, *numbers), labels=("y",), weight="w", group="g")
    gap = r.random(3000) < 0.1
    columns = {n: pa.array(narrow, pa.int32(), mask=gap) for n in names}
    special = {"y": pa.array(narrow % 2, pa.int8()), "w": pa.array(narrow + 50), "g": pa.array(narrow)}
    encoder = Encoder.fit(schema, pa.table({**columns, **special}))
    floats = {n: pa.array(narrow.astype(float), mask=gap) for n in names}
    assert Encoder.fit(schema, {**floats, **special}).hash == encoder.hash
    found = next(encoder.encode(pa.table({**columns, **special})))
    longer = {n: pa.array(wide, mask=np.append(gap, [False, False])) for n in names}
    ends = {"y": [0, 1], "w": [1, 10**12], "g": [10**15, -5]}
    extra = {n: pa.concat_arrays([a.cast(pa.int64()), pa.array(ends[n])]) for n, a in special.items()}
    slow = next(encoder.encode(pa.table({**longer, **extra})))
    for name in ("sparse", "dense", "labels", "weight", "group"):
        np.testing.assert_array_equal(getattr(found, name), getattr(slow, name)[:3000])
    assert found.group is not None
    assert found.group.tolist() == narrow.tolist()


@pytest.mark.parametrize("rows_of_error", [3, 4500, 9999])
def test_an_error_in_any_block_comes_out_and_ends_the_threads(rows_of_error: int, tmp_path: Path) -> None:
    labels = np.zeros(10_000, np.int64)
    labels[rows_of_error] = 5
    path = write(tmp_path / "a.parquet", x=[str(i % 7) for i in range(10_000)], y=labels)
    encoder = Encoder.fit(one(SparseField(name="x")), path)
    before = threading.active_count()
    with pytest.raises(DataError, match=rf"column 'y', .*a\.parquet, row {rows_of_error + 1}: the label is 5"):
        list(encoder.encode(path, block_rows=1000))
    assert threading.active_count() == before


def test_blocks_that_nobody_wants_end_the_threads() -> None:
    data = {"x": list(range(10_000)), "y": [0] * 10_000}
    encoder = Encoder.fit(one(SparseField(name="x")), data)
    before = threading.active_count()
    blocks = encoder.encode(data, block_rows=10)
    assert next(blocks).sparse[:, 0].tolist() == list(range(2, 12))
    blocks.close()
    assert threading.active_count() == before


def test_save_and_load(tmp_path: Path) -> None:
    schema = Schema(
        fields=(*SCHEMA.fields, SparseField(name="a/b:ü"), SequenceField(name="bag", separator="|")),
        labels=SCHEMA.labels,
        weight="w",
    )
    data = rows().assign(**{"a/b:ü": 2**63 - 1, "bag": "x|y"})
    encoder = Encoder.fit(schema, data)
    encoder.save(tmp_path)
    loaded = Encoder.load(tmp_path)
    assert loaded.hash == encoder.hash
    assert loaded.schema == schema
    assert loaded.layout == encoder.layout
    assert loaded.numeric == encoder.numeric
    assert repr(loaded.transform(data)) == repr(encoder.transform(data))
    assert loaded.ids("item", [2**53 + 1, None]).tolist() == encoder.ids("item", [2**53 + 1, None]).tolist()


def damage_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0x01
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["encoder.json", "schema.json", "vocabularies/0001.parquet"])
@pytest.mark.parametrize("how", ["missing", "short", "empty", "byte"])
def test_a_damaged_encoder_is_refused(file: str, how: str, tmp_path: Path) -> None:
    Encoder.fit(SCHEMA, rows()).save(tmp_path)
    path = tmp_path / file
    if how == "missing":
        path.unlink()
    elif how == "short":
        path.write_bytes(path.read_bytes()[:-30])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        damage_byte(path)
    with pytest.raises(DataError):
        Encoder.load(tmp_path)


@pytest.mark.parametrize("change", ["value", "count", "order", "edge", "buckets", "list", "no numeric", "min_count"])
def test_a_changed_encoder_is_refused(change: str, tmp_path: Path) -> None:
    Encoder.fit(SCHEMA, rows()).save(tmp_path)
    data = json.loads((tmp_path / "encoder.json").read_text(encoding="utf-8"))
    item = tmp_path / data["vocabularies"]["item"]["file"]
    values = pq.read_table(item)
    if change == "value":
        pq.write_table(values.set_column(0, "value", pa.array([1, *values["value"].to_pylist()[1:]])), item)
    elif change == "count":
        pq.write_table(values.set_column(1, "count", pa.array([99, *values["count"].to_pylist()[1:]])), item)
    elif change == "order":
        pq.write_table(values.take([1, 0, *range(2, len(values))]), item)
    elif change == "edge":
        data["numeric"]["height"]["edges"][1] += 1e-9
    elif change == "buckets":
        data["vocabularies"]["agent"]["buckets"] = 51
    elif change == "list":
        data = [1]
    elif change == "no numeric":
        del data["numeric"]["price"]
    else:
        schema = json.loads((tmp_path / "schema.json").read_text(encoding="utf-8"))
        schema["fields"][0]["min_count"] = 3
        (tmp_path / "schema.json").write_text(json.dumps(schema), encoding="utf-8")
    (tmp_path / "encoder.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(DataError, match=r"encoder in .*(differs from what was saved|missing or damaged).*make it again"):
        Encoder.load(tmp_path)


def test_labels_weights_and_groups() -> None:
    schema = Schema(fields=(SparseField(name="x"),), labels=("a", "b"), weight="w", group="g")
    data = {"x": [1, 2, 3], "a": [0, 1, 1], "b": ["1", "0", "1.0"], "w": [0, 2.5, 1], "g": [2**62, None, 2**62]}
    batch = Encoder.fit(schema, data).transform(data, labels=True)
    assert batch.labels is not None
    assert batch.weight is not None
    assert batch.group is not None
    assert batch.labels.tolist() == [[0, 1], [1, 0], [1, 1]]
    assert batch.weight.tolist() == [0, 2.5, 1]
    assert batch.group.tolist()[::2] == [2**62, 2**62]
    assert batch.group[1] != batch.group[0]
    texts = Encoder.fit(schema, data).transform({**data, "g": ["u1", "u2", "u1"]}, labels=True).group
    assert texts is not None
    assert len(set(texts.tolist())) == 2
    assert texts[0] == texts[2]


def test_serving_needs_the_fields_only() -> None:
    encoder = Encoder.fit(SCHEMA, rows())
    features = rows().drop(columns=["click", "buy", "w"])
    batch = encoder.transform(features)
    assert batch.labels is batch.weight is batch.group is None
    with pytest.raises(DataError, match=r"has no column 'click'.*which the schema names as label"):
        encoder.transform(features, labels=True)
    with pytest.raises(DataError, match="has no column 'item', which the model reads"):
        encoder.transform(features.drop(columns="item"))
    with pytest.raises(DataError, match="has no rows"):
        encoder.transform(features[:0])


def test_unseen_values_are_oov_in_every_kind_of_field() -> None:
    encoder = Encoder.fit(SCHEMA, rows())
    served = {"user": ["new"], "price": [None], "seen": [[5, 6, 7]], "item": [5], "age": [None], "clicks": [10**9]}
    batch = encoder.transform({**served, "agent": [None], "height": [None]})
    missing_age = encoder.numeric["age"].vocab_size - 1
    assert batch.sparse.tolist() == [[1, 1, missing_age, 1, 1]]
    assert batch.sequences["seen"].values.tolist() == [1, 1]
    assert all(math.isnan(v) for v in batch.dense[0].tolist())


def test_columns_without_a_type_are_missing_values() -> None:
    encoder = Encoder.fit(SCHEMA, rows())
    names = ["user", "price", "seen", "item", "age", "clicks", "agent", "height"]
    batch = encoder.transform({name: [None, None] for name in names})
    assert batch.sparse[:, 1].tolist() == [1, 1]
    assert batch.sequences["seen"].offsets.tolist() == [0, 0, 0]


def test_ids_of_values() -> None:
    encoder = Encoder.fit(one(SparseField(name="x"), DenseField(name="d")), {"x": ["a", "b", "a"], "d": [1, 2, 3]})
    assert encoder.ids("x", ["b", "a", "c", None]).tolist() == [3, 2, 1, 1]
    assert encoder.ids("x", []).tolist() == []
    with pytest.raises(DataError, match="'d' is dense"):
        encoder.ids("d", [1])
    with pytest.raises(DataError, match="no field 'xx'; did you mean 'x'"):
        encoder.ids("xx", [1])
    with pytest.raises(DataError, match="field 'x' mix kinds"):
        encoder.ids("x", [1, "a"])
    with pytest.raises(DataError, match="value 2 given for field 'x'"):
        encoder.ids("x", [1.0, 1.5])


# ---------------------------------------------------------------------------------------------------------- bad input


def write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    ("labels", "row", "shown"),
    [
        ([0, 1, 2], 3, "2"),
        ([0, None, 1], 2, "None"),
        ([1.0, 0.0, 0.5], 3, "0.5"),
        (["0", "1", "yes"], 3, "'yes'"),
        (["0", "", "2"], 2, "''"),
        ([0.0, math.inf, 1.0], 2, "inf"),
        ([0.0, 1.0, math.nan], 3, "nan"),
        ([-1, 1, 0], 1, "-1"),
    ],
)
def test_labels_other_than_0_and_1(labels: list[Any], row: int, shown: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", x=[1, 2, 3], y=labels)
    encoder = Encoder.fit(one(SparseField(name="x")), path)
    with pytest.raises(DataError, match=rf"column 'y', .*a\.parquet, row {row}: the label is {shown}; expected 0 or 1"):
        next(encoder.encode(path))


@pytest.mark.parametrize("weight", [-1.0, None, math.nan, math.inf])
def test_bad_weights(weight: float | None, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", x=[1, 2, 3], y=[0, 1, 0], w=[1.0, 0.0, weight])
    encoder = Encoder.fit(one(SparseField(name="x"), weight="w"), path)
    with pytest.raises(DataError, match=r"column 'w', .*a\.parquet, row 3: the (row weight|value) is"):
        next(encoder.encode(path))


def test_the_row_named_is_the_row_of_the_file(tmp_path: Path) -> None:
    write(tmp_path / "1.parquet", x=["1", "2", "3"], y=[0, 0, 0])
    write(tmp_path / "2.parquet", x=["4", "5", "bad"], y=[0, 0, 7])
    source = open_source(tmp_path)
    encoder = Encoder.fit(one(DenseField(name="x")), source.select(np.arange(6) < 5))
    chosen = source.select(np.array([False, True, False, True, False, True]))
    for block in (1, 2, 100):
        with pytest.raises(DataError, match=r"column 'x', .*2\.parquet, row 3: 'bad' is not a number"):
            list(encoder.encode(chosen, block_rows=block))


def test_list_and_scalar_columns_declared_otherwise(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", bag=[[1], [2]], text=["a|b", "c"], number=[1, 2], pair=[{"a": 1}, {"a": 2}])
    for name in ("bag", "pair"):
        with pytest.raises(
            DataError, match=rf"column '{name}', .*a\.parquet, row 1: the column holds .*declare the field as a"
        ):
            Encoder.fit(one(SparseField(name=name)), path)
    with pytest.raises(DataError, match=r"column 'bag', .*a\.parquet, row 1: .* is not a number"):
        Encoder.fit(one(DenseField(name="bag")), path)
    with pytest.raises(DataError, match=r"column 'text', .*a\.parquet, row 1: .*not lists; set the field's separator"):
        Encoder.fit(one(SequenceField(name="text")), path)
    with pytest.raises(
        DataError, match=r"column 'number', .*a\.parquet, row 1: .*not lists; declare the field sparse or dense"
    ):
        Encoder.fit(one(SequenceField(name="number")), path)


def test_a_missing_value_inside_a_list(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", bag=[[1, 2], None, [], [3, None]])
    with pytest.raises(DataError, match=r"column 'bag', .*a\.parquet, row 4: a list holds a missing value"):
        Encoder.fit(one(SequenceField(name="bag")), path)


def test_a_bad_value_inside_a_list_names_its_row(tmp_path: Path) -> None:
    encoder = Encoder.fit(one(SequenceField(name="bag")), {"bag": [[1, 2], [3]]})
    with pytest.raises(DataError, match=r"column 'bag', the table, row 4: 'x' is not an integer id"):
        encoder.transform({"bag": [["1", "2"], None, [], ["3", "x"]]})
    with pytest.raises(DataError, match=r"column 'bag', the training table, row 3: 1.5 is not an integer id"):
        Encoder.fit(one(SequenceField(name="bag")), {"bag": [[1.0, 2.0], [], [3.0, 1.5]]})


@pytest.mark.parametrize("field", [SparseField(name="x"), DenseField(name="x"), SequenceField(name="x")])
def test_declared_columns_of_missing_values_only(field: Field, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column 'x' of the training table has only missing values"):
        Encoder.fit(one(field), {"x": [None, None]})
    (tmp_path / "a.csv").write_text("y,x\n0,\n1,\n")
    with pytest.raises(DataError, match="column 'x'"):
        Encoder.fit(one(field), tmp_path / "a.csv")


def test_missing_columns_and_no_fields() -> None:
    with pytest.raises(
        DataError, match=r"the training table has no column 'itm', which the schema declares.*did you mean 'item'"
    ):
        Encoder.fit(one(SparseField(name="itm")), rows())
    with pytest.raises(DataError, match="no field left"):
        Encoder.fit(one(), rows())
    with pytest.raises(DataError, match="no training rows"):
        Encoder.fit(SCHEMA, rows()[:0])


# ---------------------------------------------------------------------------------------------------------- real data


@pytest.fixture(scope="module")
def criteo() -> Path:
    path = DATA / "criteo-1tb-80k" / "sample.parquet"
    if not path.is_file():
        pytest.skip("needs criteo-1tb-80k/sample.parquet under $CTRLIB_DATA")
    return path


def test_criteo_ids_equal_those_counted_by_pandas(criteo: Path) -> None:
    numbers, categories = [f"I{i}" for i in range(1, 14)], [f"C{i}" for i in range(1, 27)]
    fields: list[Field] = [DenseField(name=n, encoding="criteo_log") for n in numbers]
    fields += [SparseField(name=c, min_count=3) for c in categories]
    schema = Schema(fields=tuple(fields), labels=("label",))
    train = open_source(criteo).select(np.arange(80_000) < 64_000)
    encoder = Encoder.fit(schema, train)
    batch = encoder.transform(criteo, labels=True)
    frame = pq.read_table(criteo).to_pandas(types_mapper={pa.int64(): pd.Int64Dtype(), pa.int32(): pd.Int32Dtype()}.get)
    assert batch.labels is not None
    assert round(float(batch.labels.mean()), 4) == 0.0322
    for i, name in enumerate([*numbers, *categories]):
        column = frame[name]
        if name in numbers:
            column = column.map(lambda x: math.floor(math.log(x) ** 2) if x > 2 else x, na_action="ignore").astype("Int64")
        counts = column[:64_000].value_counts(dropna=False).rename_axis("value").reset_index()
        counts = counts[counts["count"] >= (1 if name in numbers else 3)].sort_values(
            ["count", "value"], ascending=[False, True]
        )
        ids = {None if pd.isna(v) else int(v): k + 2 for k, v in enumerate(counts["value"])}
        want = [ids.get(None if pd.isna(v) else int(v), 1) for v in column]
        assert batch.sparse[:, i].tolist() == want, name


def test_a_number_beyond_32_bits_is_named() -> None:
    encoder = Encoder.fit(Schema(fields=(DenseField(name="x"),), labels=("y",)), {"x": [1.0, 2.0, 3.0], "y": [0, 1, 0]})
    with pytest.raises(DataError, match=r"column 'x', the table, row 2: 1e\+39 is beyond what 32-bit floats hold"):
        encoder.transform({"x": [1.0, 1e39]})


def test_dropped_values_are_saved_and_older_files_without_them_read(tmp_path: Path) -> None:
    data = rows()
    full = Encoder.fit(SCHEMA, data)
    vocabularies = dict(full.vocabularies)
    for name, oov in (("user", True), ("item", False)):
        old = vocabularies[name]
        assert isinstance(old, Vocabulary)
        kept = np.arange(old.size) % 3 != 0
        kept[1] = oov
        vocabularies[name], _ = old.keep(kept)
    derived = Encoder(full.schema, vocabularies, full.numeric)
    assert derived.hash != full.hash
    for name, encoder in (("full", full), ("derived", derived)):
        (tmp_path / name).mkdir()
        encoder.save(tmp_path / name)
        again = Encoder.load(tmp_path / name)
        assert again.hash == encoder.hash
        assert again.layout == encoder.layout
        same(stack(list(again.encode(data))), stack(list(encoder.encode(data))))
    # what is not dropped leaves no trace in the files: stores and artifacts made before stay as they are
    assert "dropped" not in (tmp_path / "full" / "encoder.json").read_text()
    entries = json.loads((tmp_path / "derived" / "encoder.json").read_text())["vocabularies"]
    assert {name: {k: v for k, v in e.items() if "dropped" in k} for name, e in entries.items() if len(e) > 1} == {
        "user": {"dropped": full.layout.sparse[0].vocab_size - derived.layout.sparse[0].vocab_size},
        "item": {"oov_dropped": True},
    }
    batch = derived.transform(data)
    assert (batch.sparse[:, 0] == 0).any()
    assert (batch.sequences["seen"].values == 0).any()
