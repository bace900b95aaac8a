"""Twitch gamers (MUSAE): streamers of a country, what they play and do as sets of categories, and who knows whom.

    python datasets/twitch.py [--raw DIR] --out DIR

The raw folder holds DE.json, DE_edges.csv, DE_target.csv, and the same of ENGB. Writes for each country nodes and edges:
de_nodes.parquet (id, features, mature, partner, views, days) and de_edges.parquet (source, target), engb_… likewise.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING or __package__:
    from . import common
else:  # a script: Python looks in this folder, not in the project's, and ctrlib need not be installed
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    import common
from ctrlib.files import new_file
from ctrlib.schema import DataError

COUNTRIES = ("DE", "ENGB")
URL = "https://raw.githubusercontent.com/benedekrozemberczki/MUSAE/5f901232957b6c9985d750aac48cda39a4b24285/input/"
FOLDERS = {"{}.json": "features/", "{}_edges.csv": "edges/", "{}_target.csv": "target/"}
TERMS = (
    "Twitch: the data is in the repository of MUSAE, whose licence is GPL-3.0; publications cite Rozemberczki, Allen and\n"
    "Sarkar, 'Multi-scale Attributed Node Embedding', arXiv:1909.13021."
)
KNOWN = {
    "DE.json": common.KnownFile(
        1_167_905, "7b39c42570f05cd46017c765df8d8a1bc03f19787c3eb0f9684f50a52476ae3a", "the file in the MUSAE repository"
    ),
    "DE_edges.csv": common.KnownFile(
        1_499_865, "54feaf3e3e70a485fe07f8611e4d2677841b97f77b8358204bcf4a48cc884d86", "the file in the MUSAE repository"
    ),
    "DE_target.csv": common.KnownFile(
        338_721, "2188f58a093bb9db363d3eaf7c3a52c2adc8ff6b23cbcb4f53875f87061c0321", "the file in the MUSAE repository"
    ),
    "ENGB.json": common.KnownFile(
        893_931, "d55948bd911ab28e0a89c4946562d5a8b363b9a7e4216e1a4986f37c74caa777", "the file in the MUSAE repository"
    ),
    "ENGB_edges.csv": common.KnownFile(
        342_162, "5ea4d7f7267454e9523577eb2a9b4dcb7a22dd660a548240f01b815d08e0e3cc", "the file in the MUSAE repository"
    ),
    "ENGB_target.csv": common.KnownFile(
        253_352, "e9d51399878216d2dd662b0a152b602cccde7b5cbb8452cb91d9379f64114443", "the file in the MUSAE repository"
    ),
}
NODES = pa.schema(
    [
        ("id", pa.int32()),
        ("features", pa.list_(pa.int32())),
        ("mature", pa.bool_()),
        ("partner", pa.bool_()),
        ("views", pa.int64()),
        ("days", pa.int32()),
    ]
)
EDGES = pa.schema([("source", pa.int32()), ("target", pa.int32())])


def _read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames is None or any(name not in reader.fieldnames for name in columns):
            raise DataError(f"{path}: the columns are {reader.fieldnames}; expected {', '.join(columns)}")
        return list(reader)


def read_nodes(raw: Path, country: str) -> pa.Table:
    """The nodes, by id; a category that is listed twice for a node counts once."""
    path = raw / f"{country}.json"
    try:
        features: dict[str, list[int]] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error
    target = raw / f"{country}_target.csv"
    rows = sorted(_read_rows(target, ["new_id", "mature", "partner", "views", "days"]), key=lambda row: int(row["new_id"]))
    missing = [row["new_id"] for row in rows if not features.get(row["new_id"])]
    if missing:
        raise DataError(f"{path}: node {missing[0]} of {target} has no features; expected a list of categories for every node")
    columns = {
        "id": [int(row["new_id"]) for row in rows],
        "features": [sorted(set(features[row["new_id"]])) for row in rows],
        "mature": [row["mature"] == "True" for row in rows],
        "partner": [row["partner"] == "True" for row in rows],
        "views": [int(row["views"]) for row in rows],
        "days": [int(row["days"]) for row in rows],
    }
    return pa.table(columns, schema=NODES)


def read_edges(raw: Path, country: str) -> pa.Table:
    """The edges, each once, in one direction."""
    rows = _read_rows(raw / f"{country}_edges.csv", ["from", "to"])
    columns = {"source": [int(row["from"]) for row in rows], "target": [int(row["to"]) for row in rows]}
    return pa.table(columns, schema=EDGES)


def prepare(raw: Path | None, out: Path) -> tuple[Path, ...]:
    """Write nodes and edges of both countries.

    Args:
        raw: folder of the raw files; ``None``: download them to ``out/raw``.
        out: folder to write to.

    Returns:
        The files: nodes and edges of each country.

    Raises:
        DataError: a raw file is missing, cannot be downloaded, or is not what its name says.
    """
    names = [(pattern.format(country), folder) for country in COUNTRIES for pattern, folder in FOLDERS.items()]
    if raw is None:
        raw = out / "raw"
        for name, folder in names:
            common.download(URL + folder + name, raw / name)
    common.require_files(raw, *(name for name, _ in names))
    for name, _ in names:
        common.check_known(raw / name, KNOWN)
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for country in COUNTRIES:
        for kind, table in (("nodes", read_nodes(raw, country)), ("edges", read_edges(raw, country))):
            files.append(out / f"{country.lower()}_{kind}.parquet")
            with new_file(files[-1]) as part:
                pq.write_table(table, part, compression="zstd")
            print(f"{files[-1]}: {table.num_rows:,} {kind}")
    print(TERMS)
    return tuple(files)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = common.argument_parser(__doc__).parse_args(argv)
    return common.run(lambda: prepare(args.raw, args.out))


if __name__ == "__main__":
    sys.exit(main())
