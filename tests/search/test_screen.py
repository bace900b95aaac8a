from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrlib.__main__ import main
from ctrlib.config import ConfigError
from ctrlib.data.store import Store
from ctrlib.experiment import DataOptions, prepare
from ctrlib.memory import table_memory
from ctrlib.optim import OptimizerConfig
from ctrlib.schema import DataError, DenseField, Schema, SequenceField, SparseField
from ctrlib.search.combinations import CombinationTally
from ctrlib.search.screen import ScreenConfig, screen, surrogate_score, table
from ctrlib.search.screening import dense_codes, permuted

ROWS = 6000
NAMES = ("signal", "leak", "constant", "rare", "twin", "ids", "moves", "number")
SCHEMA = Schema(
    fields=(*(SparseField(name=name) for name in NAMES if name != "number"), DenseField(name="number")), labels=("label",)
)


def _table(rows: int = ROWS, seed: int = 0, moved: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    label = (rng.random(rows) < 0.3).astype(int)
    signal = np.where(rng.random(rows) < 0.6, label, rng.integers(0, 2, rows))
    rare = [f"v{v}" if v < 4 else None for v in rng.integers(0, 8, rows)]
    return pa.table(
        {
            "signal": signal,
            "leak": label * 7 + 1,
            "constant": np.ones(rows, dtype=int),
            "rare": rare,
            "twin": np.where(signal == 1, 40, 30),
            "ids": rng.integers(0, 5000, rows),
            "moves": rng.integers(0, 10, rows) + moved,
            "number": rng.normal(size=rows),
            "label": label,
        }
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    options = DataOptions(schema=SCHEMA, valid=_table(2000, 1, moved=5), test=_table(10, 2))
    return screen(_table(), options, config=ScreenConfig(order=2, block_rows=2000))


def _field(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next(f for f in report["fields"] if f["name"] == name)


def test_planted_defects_are_flagged(report: dict[str, Any]) -> None:
    assert _field(report, "leak")["flags"] == ["leak?"]
    assert "constant" in _field(report, "constant")["flags"]
    assert _field(report, "twin")["flags"] == ["copy of signal"]
    assert _field(report, "signal")["flags"] == []
    assert "drift" in _field(report, "moves")["flags"]
    for name in ("ids", "number", "rare"):
        assert _field(report, name)["flags"] == ["noise"], name


def test_coverage_cardinality_and_memory(report: dict[str, Any]) -> None:
    raw = _table()
    rare = _field(report, "rare")
    assert rare["coverage"] == pytest.approx(1 - raw["rare"].null_count / ROWS)
    assert rare["cardinality"] == 5  # a missing value is a value
    ids = np.asarray(raw["ids"])
    assert _field(report, "ids")["cardinality"] == len(np.unique(ids))
    counts = np.unique(ids, return_counts=True)[1]
    assert _field(report, "ids")["mb"] == pytest.approx(table_memory(len(counts) + 2, 16, OptimizerConfig()).total / 2**20)
    fewer = report["memory"]["1"] - report["memory"]["2"]
    dropped = table_memory(int((counts < 2).sum()), 16, OptimizerConfig()).total / 2**20
    assert fewer == pytest.approx(dropped)
    assert _field(report, "ids")["unseen"] > 0.2
    assert _field(report, "number")["cardinality"] is None


def test_the_table_has_every_field_and_flag(report: dict[str, Any]) -> None:
    text = table(report)
    for name in (*NAMES, "copy of signal", "leak?", "min_count 10", "combinations"):
        assert name in text
    assert "rare (5; 5" in text


def test_noise_of_any_cardinality_ranks_last() -> None:
    rng = np.random.default_rng(0)
    label = (rng.random(16_000) < 0.2).astype(int)
    columns: dict[str, Any] = {f"noise_{c}": rng.integers(0, c, len(label)) for c in (2, 10, 100, 1000, 10_000, 50_000)}
    columns["signal"] = np.where(rng.random(len(label)) < 0.6, label, rng.integers(0, 2, len(label)))
    schema = Schema(fields=tuple(SparseField(name=n) for n in columns), labels=("label",))
    found = screen(pa.table({**columns, "label": label}), DataOptions(schema=schema, split="random"))
    assert found["fields"][0]["name"] == "signal"
    assert max(found["fields"], key=lambda f: float(f["plain"]))["name"] == "noise_50000"  # what the correction is for


def test_a_number_that_is_mostly_one_value_is_a_leak_and_drifts() -> None:
    """Money that only clicks bring: nothing in 98 of 100 rows, so that all quantiles are 0."""

    def rows(count: int, seed: int, spends: float) -> Any:
        rng = np.random.default_rng(seed)
        label = (rng.random(count) < 0.02).astype(int)
        other = np.where(rng.random(count) < spends, rng.exponential(size=count), 0)
        return pa.table({"spent": label * rng.exponential(size=count), "moves": other, "label": label})

    schema = Schema(fields=(DenseField(name="spent"), DenseField(name="moves")), labels=("label",))
    found = screen(rows(16_000, 0, 0.0), DataOptions(schema=schema, valid=rows(8000, 1, 0.2), test=rows(10, 2, 0.0)))
    spent = _field(found, "spent")
    assert spent["score"] == pytest.approx(found["entropy"], rel=0.02)
    assert "leak?" in spent["flags"]
    assert "noise" not in spent["flags"]
    # of 24,000 equally likely rows of either split, a fifth of one are known: ln 2 - (1 - .1) H(4/9) nats, of ln 2
    remaining = -0.9 * (4 / 9 * np.log(4 / 9) + 5 / 9 * np.log(5 / 9))
    assert _field(found, "moves")["drift"] == pytest.approx(1 - remaining / np.log(2), abs=0.01)


def test_a_short_last_block_does_not_count_as_much_as_a_full_one() -> None:
    """2000 rows that tell everything, and 300 that tell nothing: a median of the two blocks would lie between them."""
    rng = np.random.default_rng(0)
    label = (rng.random(2300) < 0.5).astype(int)
    field = np.where(np.arange(2300) < 2000, label, 0)
    schema = Schema(fields=(SparseField(name="field"),), labels=("label",))
    few = pa.table({"field": [0], "label": [0]})
    options = DataOptions(schema=schema, valid=few, test=few)
    found = screen(pa.table({"field": field, "label": label}), options, config=ScreenConfig(block_rows=2000))
    assert found["fields"][0]["score"] == pytest.approx(np.log(2), abs=0.01)
    assert found["rows"] == 2300
    assert found["fields"][0]["cardinality"] == 2


def test_lists_and_numbers_are_looked_at_as_categories_are() -> None:
    def rows(count: int, seed: int, last: int) -> Any:
        rng = np.random.default_rng(seed)
        tags = [rng.integers(0, last, rng.integers(1, 4)).tolist() if i % 4 else [] for i in range(count)]
        columns = {"tags": tags, "same": [[7]] * count, "few": [[7]] * (count // 2) + [[]] * (count - count // 2)}
        still = np.where(np.arange(count) % 2000 == 1, rng.normal(size=count), 3.0)
        label = (rng.random(count) < 0.3).astype(int)
        return pa.table(
            {**columns, "still": still, "moving": rng.normal(size=count), "shared": np.arange(count) % 3, "label": label}
        )

    fields: Any = (
        SparseField(name="shared"),
        *(SequenceField(name=name) for name in ("tags", "same", "few")),
        *(DenseField(name=name) for name in ("still", "moving")),
    )
    fields = (fields[0], replace(fields[1], shares="shared"), *fields[2:])
    options = DataOptions(schema=Schema(fields=fields, labels=("label",)), valid=rows(4000, 1, 12), test=rows(10, 2, 6))
    found = screen(rows(4000, 0, 6), options)
    assert [_field(found, name)["cardinality"] for name in ("shared", "tags", "same", "few")] == [3, 6, 1, 1]
    assert "constant" in _field(found, "same")["flags"]
    assert _field(found, "few")["most_frequent"] == 0.5
    assert "almost constant" in _field(found, "still")["flags"]
    assert _field(found, "still")["most_frequent"] == 0.9995
    assert _field(found, "moving")["most_frequent"] < 0.01
    assert _field(found, "tags")["coverage"] == 0.75
    assert _field(found, "tags")["unseen"] == pytest.approx(0.5, abs=0.02)
    assert _field(found, "tags")["drift"] > 0.1
    assert (_field(found, "same")["unseen"], _field(found, "same")["drift"]) == (0, 0)


def test_fields_of_a_value_for_every_row_are_copies_only_in_the_same_order() -> None:
    rng = np.random.default_rng(0)
    price, other = rng.normal(size=3000), rng.normal(size=3000)
    gone = np.arange(3000) % 5 == 0
    columns = {
        "price": price,
        "cents": price * 100 + 7,
        "other": other,
        "paid": np.where(gone, 0, price),
        "owed": np.where(gone, 0, other),
        "id": rng.permutation(3000),
        "number": rng.permutation(3000),
        "label": rng.integers(0, 2, 3000),
    }
    numbers, ids = ("price", "cents", "other", "paid", "owed"), ("id", "number")
    fields: Any = (*(DenseField(name=n) for n in numbers), *(SparseField(name=n) for n in ids))
    options = DataOptions(schema=Schema(fields=fields, labels=("label",)), valid=_few(columns), test=_few(columns))
    found = screen(pa.table(columns), options)
    assert {f["name"]: [x for x in f["flags"] if "copy" in x] for f in found["fields"] if "copy" in str(f["flags"])} == {
        "cents": ["copy of price"]
    }


def _few(columns: dict[str, Any]) -> Any:
    return pa.table({name: values[:50] for name, values in columns.items()})


def _codes(columns: dict[str, Any], y: Any, order: Any, budget: int, blocks: int = 1) -> CombinationTally:
    tally = CombinationTally(list(columns), order, budget)
    rng = np.random.default_rng(0)
    for _ in range(blocks):
        tally.add({n: dense_codes(c) for n, c in columns.items()}, dense_codes(y), permuted(dense_codes(y), 5, rng))
    return tally


def test_xor_is_found_in_pairs_and_a_sum_in_triples() -> None:
    rng = np.random.default_rng(0)
    bits = {f"b{i}": rng.integers(0, 2, 4000) for i in range(4)}
    found = _codes(bits, bits["b1"] ^ bits["b3"], 2, 100).scores()
    assert next(iter(found)) == ("b1", "b3")
    assert found["b1", "b3"] == pytest.approx(np.log(2), abs=0.01)
    assert found["b0", "b1"] < 0.01
    tens = {f"f{i}": rng.integers(0, 6, 8000) for i in range(5)}
    parity = (tens["f0"] + tens["f2"] + tens["f4"]) % 2
    assert next(iter(_codes(tens, parity, 3, 100).scores())) == ("f0", "f2", "f4")
    # of the six pairs and triples with b1, three have b3 too; of those with b0, one has both
    combined = _codes(bits, bits["b1"] ^ bits["b3"], 3, 100).combined()
    assert combined["b1"] == pytest.approx(np.log(2) / 2, abs=0.01)
    assert combined["b0"] < 0.01


def test_joint_codes_do_not_collide() -> None:
    a, b = np.array([1, 11, 1, 11] * 50), np.array([11, 1, 1, 11] * 50)  # as text, "1"+"11" = "11"+"1"
    y = np.array([0, 1, 0, 1] * 50)
    assert _codes({"a": a, "b": b}, y, 2, 10).scores()["a", "b"] == pytest.approx(np.log(2), abs=0.02)


def test_a_budget_covers_all_combinations_over_the_blocks() -> None:
    rng = np.random.default_rng(0)
    columns = {f"f{i}": rng.integers(0, 3, 100) for i in range(5)}  # 10 pairs
    y = rng.integers(0, 2, 100)
    assert _codes(columns, y, 2, 4, blocks=2).looked_at == (8, 10)
    assert _codes(columns, y, 2, 4, blocks=3).looked_at == (10, 10)


def test_surrogate_against_rates_by_hand() -> None:
    x, y = np.array([0, 0, 1, 1, 0, 0, 1, 1]), np.array([1, 1, 0, 0, 1, 0, 0, 1])

    def loss(train: Any, test: Any) -> float:
        overall = (y[train].sum() + 0.5) / (len(train) + 1)
        p = [(y[[i for i in train if x[i] == x[t]]].sum() + 10 * overall) / (sum(x[train] == x[t]) + 10) for t in test]
        return float(np.mean([-np.log(q if y[t] else 1 - q) for q, t in zip(p, test, strict=True)]))

    even, odd = np.arange(0, 8, 2), np.arange(1, 8, 2)
    assert surrogate_score(x, y) == pytest.approx(1 - np.median([loss(odd, even), loss(even, odd)]))


def test_a_store_is_screened_without_its_test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = prepare(_table(800), tmp_path / "store", DataOptions(schema=SCHEMA, split="random"))
    split = Store.split

    def guarded(self: Store, name: str) -> Any:
        assert name != "test"
        return split(self, name)

    monkeypatch.setattr(Store, "split", guarded)
    assert len(screen(store, config=ScreenConfig(redundancy=True))["order"]) == len(NAMES)


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(_table(800), tmp_path / "rows.parquet")
    arguments = ["ctrlib", "screen", str(tmp_path / "rows.parquet"), "--label", "label", "--out", str(tmp_path / "r.json")]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "leak (2; 100%)" in printed
    assert (tmp_path / "r.json").is_file()


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match=r"screen\.order is 4; expected 1, 2 or 3"):
        ScreenConfig(order=4)
    with pytest.raises(DataError, match="which column is the label"):
        screen(_table(100))
    one = _table(200).drop_columns(["label"]).append_column("label", pa.array(np.zeros(200, dtype=int)))
    with pytest.raises(DataError, match="single value in the training rows"):
        screen(one, DataOptions(schema=SCHEMA, split="random"))
