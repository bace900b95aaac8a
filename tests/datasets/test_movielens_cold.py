"""Cold start: cold movies are in no training row, few-shot ones in few, and negatives are of the segment and never rated."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import pytest

from ctrlib.data.encoder import Encoder
from ctrlib.schema import Schema

PROJECT = Path(__file__).resolve().parents[2]
if TYPE_CHECKING:
    from datasets import movielens_cold
else:  # from their folder, as scripts: an installed package may also be called datasets
    sys.path.insert(0, str(PROJECT / "datasets"))
    import movielens_cold

DATA = Path(os.environ.get("CTRLIB_DATA", PROJECT.parent / "shared" / "data")) / "movielens-1m"
USERS, MOVIES = 60, 50


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Movie 1 is never rated; every user rates each other movie with chance 0.4, from 1 to 5 stars."""
    folder = tmp_path / "raw"
    folder.mkdir()
    rng = np.random.default_rng(0)
    users = "".join(f"{u}::{'FM'[u % 2]}::25::{u % 5}::4806{u % 3}\n" for u in range(1, USERS + 1))
    movies = "".join(f"{m}::The {m} of X ({1950 + m})::Drama|G{m % 4}\n" for m in range(1, MOVIES + 1))
    pairs = [(u, m) for u in range(1, USERS + 1) for m in range(2, MOVIES + 1) if rng.random() < 0.4]
    ratings = "".join(f"{u}::{m}::{rng.integers(1, 6)}::{9**9}\n" for u, m in pairs)
    for name, text in (("users.dat", users), ("movies.dat", movies), ("ratings.dat", ratings)):
        (folder / name).write_text(text, encoding="latin-1")
    return folder


def test_segments(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = movielens_cold.prepare(raw, tmp_path / "out", train_negatives=2, eval_negatives=1, sessions=12, seed=5)
    train, valid, test = (pq.read_table(file.path).to_pylist() for file in files)
    rated = {tuple(map(int, line.split("::")[:3])) for line in (raw / "ratings.dat").read_text().splitlines()}
    stars = {(u, m): s for u, m, s in rated}
    clicks = {"train": set(), "valid": set(), "test": set()}  # type: dict[str, set[tuple[int, int]]]
    movies: dict[tuple[str, str], set[int]] = {}
    for split, rows in (("train", train), ("valid", valid), ("test", test)):
        sessions: dict[int, list[dict[str, object]]] = {}
        for row in rows:
            pair = row["user_id"], row["movie_id"]
            assert stars.get(pair, 0) >= 4 if row["label"] else pair not in stars
            movies.setdefault((split, row["segment"]), set()).add(row["movie_id"])
            sessions.setdefault(row["session"], []).append(row)
            if row["label"]:
                clicks[split].add(pair)
        for found in sessions.values():
            assert len(found) == len({row["movie_id"] for row in found}) == (3 if split == "train" else 2)
            assert sum(bool(row["label"]) for row in found) == 1
            assert len({(row["user_id"], row["segment"]) for row in found}) == 1
    assert not clicks["train"] & clicks["valid"] | clicks["train"] & clicks["test"] | clicks["valid"] & clicks["test"]
    assert set(movies) == {("train", "warm"), ("train", "few"), ("valid", "warm"), ("valid", "cold")} | {
        ("test", name) for name in ("warm", "few", "cold")
    }
    trained = movies["train", "warm"] | movies["train", "few"]
    for split in ("valid", "test"):
        assert not movies[split, "cold"] & trained
    assert not movies["valid", "cold"] & movies["test", "cold"]
    assert not movies["test", "warm"] & movies["test", "few"]
    counts = {movie: sum(m == movie for _, m in clicks["train"]) for movie in movies["test", "few"]}
    assert max(counts.values()) == 5
    assert not any(1 in found for found in movies.values())
    for segment in ("warm", "few", "cold"):
        assert sum(row["segment"] == segment and row["label"] for row in test) == 12
    out = capsys.readouterr().out
    assert "test: cold: " in out
    schema = Schema.load(tmp_path / "out" / "schema.json")
    assert schema.group == "session"
    encoder = Encoder.fit(schema, files[0].path)
    at = [c.name for c in encoder.layout.sparse].index("movie_id")
    cold = [row for row in test if row["segment"] == "cold"]
    assert set(encoder.transform(cold).sparse[:, at].tolist()) == {1}  # never seen
    assert {tuple(row["title"]) for row in cold} <= {("the", str(m), "of", "x") for m in range(MOVIES + 1)}


def test_seeds(raw: Path, tmp_path: Path) -> None:
    def written(name: str, seed: int) -> list[str]:
        files = movielens_cold.prepare(raw, tmp_path / name, train_negatives=1, eval_negatives=1, sessions=5, seed=seed)
        return [file.sha256 for file in files]

    assert written("a", 1) == written("b", 1)
    assert written("c", 2) != written("b", 1)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="no movielens-1m under CTRLIB_DATA")
def test_the_known_files(tmp_path: Path) -> None:
    files = movielens_cold.prepare(DATA, tmp_path / "out", train_negatives=1, sessions=1000)
    assert [round(file.positive_rate, 4) for file in files] == [0.5, 0.01, 0.01]
    assert [file.rows for file in files[1:]] == [200_000, 300_000]
