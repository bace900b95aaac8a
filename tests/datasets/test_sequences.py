"""Scripts of behaviour sequences: the last of each user is held out, histories came before, negatives were not met by then."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ctrlib.data.encoder import Encoder
from ctrlib.data.source import open_source
from ctrlib.data.store import Store
from ctrlib.schema import DataError, HistoryColumn, Schema

PROJECT = Path(__file__).resolve().parents[2]
if TYPE_CHECKING:
    from datasets import amazon_grocery, beauty
else:  # from their folder, as scripts: an installed package may also be called datasets
    sys.path.insert(0, str(PROJECT / "datasets"))
    import amazon_grocery
    import beauty

SHARED = Path(os.environ.get("CTRLIB_DATA", PROJECT.parent / "shared" / "data"))
DAY = 86_400
# By user: items in order of time, with the day of each. Users 30 and 10 bought twice on one day.
BOUGHT = {30: [(5, 1), (6, 2), (6, 2), (7, 4), (8, 4)], 10: [(9, 3), (5, 3), (8, 5)], 20: [(6, 1), (5, 7), (9, 8), (8, 9)]}
CATEGORY = {5: 0, 6: 3, 7: 3, 8: 12, 9: 0, 11: 1, 12: 1}
ATTRIBUTES = {"5": [1, 2], "6": [3], "8": [2, 2, 9], "11": [4], "77": [5]}


@pytest.fixture
def grocery(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    parts: dict[str, list[tuple[int, int, int]]] = {"train": [], "dev": [], "test": []}
    for user, bought in BOUGHT.items():
        for i, (item, day) in enumerate(bought):
            left = len(bought) - 1 - i
            parts["train" if left > 1 else ("test", "dev")[left]].append((user, item, day * DAY))
    for name, rows in parts.items():
        lines = ["user_id,item_id,time", *(",".join(map(str, row)) for row in sorted(rows, key=lambda row: row[2]))]
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    meta = ["item_id,i_category,r_complement", *(f'{item},{c},"[1, 2]"' for item, c in reversed(CATEGORY.items()))]
    (folder / "item_meta.csv").write_text("\n".join(meta) + "\n")
    return folder


@pytest.fixture
def cosmetics(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    lines = [" ".join(map(str, (user, *(item for item, _ in bought)))) for user, bought in BOUGHT.items()]
    (folder / "Beauty.txt").write_text("\n".join(lines) + "\n")
    (folder / "Beauty_item2attributes.json").write_text(json.dumps(ATTRIBUTES))
    return folder


def sessions(path: Path) -> list[list[dict[str, Any]]]:
    """The rows of every session."""
    found: dict[int, list[dict[str, Any]]] = {}
    for row in pq.read_table(path).to_pylist():
        found.setdefault(row["session"], []).append(row)
    return list(found.values())


def test_grocery(grocery: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    files = amazon_grocery.prepare(grocery, out, train_negatives=2, eval_negatives=1, seed=7)
    assert [(f.path.name, f.rows) for f in files] == [
        ("train.parquet", 6 * 3),
        ("valid.parquet", 3 * 2),
        ("test.parquet", 3 * 2),
    ]
    assert pq.read_table(files[0].path).schema.names == [
        "label", "session", "user", "item", "category", "hist_item", "hist_category", "hist_time", "time",
    ]  # fmt: skip
    seen = set()
    for split, file in zip(("train", "valid", "test"), files, strict=True):
        for rows in sessions(file.path):
            [positive] = [row for row in rows if row["label"]]
            bought = BOUGHT[positive["user"]]
            place = len(positive["hist_item"])
            assert bought[place] == (positive["item"], positive["time"] // DAY)
            assert {"train": place < len(bought) - 2, "valid": place == len(bought) - 2, "test": place == len(bought) - 1}[
                split
            ]
            seen.add((positive["user"], place))
            assert len({row["item"] for row in rows}) == len(rows)
            for row in rows:
                assert row["category"] == CATEGORY[row["item"]]
                met = bought[: len(bought) - {"train": 2, "valid": 1, "test": 0}[split]]
                assert (row["item"] in {item for item, _ in met}) == bool(row["label"])
                past = bought[:place]
                assert row["hist_item"] == [item for item, _ in past]
                assert row["hist_category"] == [CATEGORY[item] for item, _ in past]
                assert row["hist_time"] == [day * DAY for _, day in past]
                assert [row[name] for name in ("user", "time")] == [positive[name] for name in ("user", "time")]
    assert len(seen) == 12  # every interaction once
    printed = capsys.readouterr()
    assert "train: 6 sessions, mean history" in printed.out
    assert "uniform over items not met by then, seed 7" in printed.out
    assert printed.err.count("warning: ") == 4


def test_grocery_is_read_through_its_guard(grocery: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    amazon_grocery.prepare(grocery, out, train_negatives=1, eval_negatives=2)
    schema = Schema.load(out / "schema.json")
    sources = {name: open_source(out / f"{name}.parquet") for name in ("train", "valid", "test")}
    encoder = Encoder.fit(schema, sources["train"])
    assert encoder.layout.histories == (HistoryColumn("history", ("hist_item", "hist_category"), ("item", "category")),)
    store = Store.create(tmp_path / "store", encoder, sources)
    # The same day as before: user 30's item 8 (test) after 7; item 6 (train) after 6; user 10's item 5 (valid) after 9.
    assert store.leaks["test"]["history"] == {"behaviours": 3, "rows": 3}
    assert store.leaks["valid"]["history"] == {"behaviours": 3, "rows": 3}
    assert store.leaks["train"]["history"] == {"behaviours": 2, "rows": 2}
    lengths = store.split("test").sequences["hist_item"][1].diff()
    assert sorted(lengths.tolist()) == [2] * 3 + [3] * 6


def test_seeds(grocery: Path, tmp_path: Path) -> None:
    def written(name: str, seed: int) -> list[str]:
        files = amazon_grocery.prepare(grocery, tmp_path / name, train_negatives=1, eval_negatives=1, seed=seed)
        return [file.sha256 for file in files]

    assert written("a", 1) == written("b", 1)
    assert written("c", 2) != written("b", 1)


def test_negatives_of_training_do_not_know_what_is_held_out(grocery: Path, tmp_path: Path) -> None:
    """A held-out item is as often a negative of training as any other: its absence would give it away."""
    drawn: dict[int, int] = {}
    for seed in range(40):
        amazon_grocery.prepare(grocery, tmp_path / str(seed), train_negatives=2, eval_negatives=1, seed=seed)
        for row in pq.read_table(tmp_path / str(seed) / "train.parquet", columns=["user", "item", "label"]).to_pylist():
            if row["user"] == 10 and not row["label"]:
                drawn[row["item"]] = drawn.get(row["item"], 0) + 1
    # User 10's training row is item 9; validation is 5, test 8. Two of six others, 40 times: 13.3 each, standard deviation 3.
    assert drawn.keys() == {5, 6, 7, 8, 11, 12}
    assert all(3 <= count <= 25 for count in drawn.values())


def test_the_positive_has_no_place_of_its_own(grocery: Path, tmp_path: Path) -> None:
    places = set()
    for seed in range(4):
        amazon_grocery.prepare(grocery, tmp_path / str(seed), train_negatives=2, eval_negatives=1, seed=seed)
        rows = pq.read_table(tmp_path / str(seed) / "train.parquet")["label"].to_pylist()
        places |= {i % 3 for i, label in enumerate(rows) if label}
    assert places == {0, 1, 2}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_grocery_files_that_are_wrong(grocery: Path, tmp_path: Path) -> None:
    edit(grocery / "item_meta.csv", '9,0,"[1, 2]"\n', "")
    with pytest.raises(DataError, match=r"item 9 of user 10 is not in item_meta\.csv"):
        amazon_grocery.read(grocery)
    edit(grocery / "test.csv", "20,8,", "20,eight,")
    with pytest.raises(DataError, match=r"test\.csv, line 4: '20,eight,777600'; expected integers user_id, item_id, time"):
        amazon_grocery.read(grocery)
    edit(grocery / "test.csv", "user_id", "uid")
    with pytest.raises(DataError, match=r"test\.csv: no column user_id in its first line"):
        amazon_grocery.read(grocery)
    (grocery / "dev.csv").unlink()
    assert amazon_grocery.main(["--raw", str(grocery), "--out", str(tmp_path / "out")]) == 2


def test_grocery_splits_that_are_wrong(grocery: Path) -> None:
    edit(grocery / "dev.csv", f"30,7,{4 * DAY}", f"30,7,{1 * DAY}")
    with pytest.raises(DataError, match=r"user 30 has times in dev\.csv or test\.csv before those in train\.csv"):
        amazon_grocery.read(grocery)
    edit(grocery / "dev.csv", f"30,7,{1 * DAY}\n", "")
    with pytest.raises(DataError, match=r"user 30 does not have exactly its last interaction in test\.csv"):
        amazon_grocery.read(grocery)


def test_beauty(cosmetics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    files = beauty.prepare(cosmetics, out, train_negatives=1, eval_negatives=1)
    assert [f.rows for f in files] == [12, 6, 6]
    table = pq.read_table(files[2].path)
    assert table.schema.names == ["label", "session", "user", "item", "attributes", "hist_item", "hist_attributes"]
    for row in table.to_pylist():
        bought = [item for item, _ in BOUGHT[row["user"]]]
        assert row["hist_item"] == bought[:-1]
        assert row["hist_attributes"] == [ATTRIBUTES.get(str(item), []) for item in bought[:-1]]
        assert row["attributes"] == ATTRIBUTES.get(str(row["item"]), [])
        assert (row["item"] == bought[-1]) == bool(row["label"])
    schema = Schema.load(out / "schema.json")
    encoder = Encoder.fit(schema, files[0].path)
    assert encoder.layout.histories[0].targets == ("item", "attributes")
    batch = encoder.transform(table)
    attributes = batch.sequences["hist_attributes"]
    assert attributes.inner is not None
    assert torch.equal(attributes.offsets, batch.sequences["hist_item"].offsets)
    assert "arXiv:2008.07873" in capsys.readouterr().out
    assert beauty.main(["--raw", str(cosmetics), "--out", str(out), "--train-negatives", "2", "--seed", "3"]) == 2  # 99 of 5


def test_beauty_files_that_are_wrong(cosmetics: Path) -> None:
    edit(cosmetics / "Beauty_item2attributes.json", "[3]", "3")
    with pytest.raises(DataError, match=r"item2attributes\.json: .*; expected lists of integers by item"):
        beauty.read(cosmetics)
    edit(cosmetics / "Beauty.txt", "20 6", "30 6")
    with pytest.raises(DataError, match=r"Beauty\.txt: 1 users have two lines"):
        beauty.read(cosmetics)
    edit(cosmetics / "Beauty.txt", "30 6", "30 x")
    with pytest.raises(DataError, match=r"Beauty\.txt, line 3: '30 x.*expected integers, the user first"):
        beauty.read(cosmetics)


@pytest.mark.skipif(not (SHARED / "amazon-grocery").is_dir(), reason="no amazon-grocery under CTRLIB_DATA")
def test_the_known_grocery_files() -> None:
    data = amazon_grocery.read(SHARED / "amazon-grocery")
    places = data.leave_one_out()
    assert {name: len(found) for name, found in places.items()} == {"train": 121_892, "valid": 14_681, "test": 14_681}
    assert len(np.unique(data.items["category"])) == 57


@pytest.mark.skipif(not (SHARED / "s3rec-beauty").is_dir(), reason="no s3rec-beauty under CTRLIB_DATA")
def test_the_known_beauty_files() -> None:
    data = beauty.read(SHARED / "s3rec-beauty")
    places = data.leave_one_out()
    assert {name: len(found) for name, found in places.items()} == {"train": 153_776, "valid": 22_363, "test": 22_363}
