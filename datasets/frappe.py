"""Frappe_x1: which app a phone user opened in which context, in the 7:2:1 split of NFM, AFN and ARM-Net.

    python datasets/frappe.py [--raw DIR] --out DIR

The raw folder holds frappe.train.libfm (or train_rebuilt.parquet, whose train negatives are re-drawn),
frappe.validation.libfm and frappe.test.libfm. Writes train.parquet, valid.parquet, test.parquet and schema.json.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

if TYPE_CHECKING or __package__:
    from . import common
else:  # a script: Python looks in this folder, not in the project's, and ctrlib need not be installed
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    import common
from ctrlib.schema import DataError, Schema, SparseField

URL = (
    "https://raw.githubusercontent.com/hexiangnan/neural_factorization_machine/"
    "ca2a5d11b929816aa44c6e470e795af144608507/data/frappe/"
)
TERMS = (
    "Frappe: for research only, no commercial use, no redistribution without permission, no de-anonymising; publications\n"
    "acknowledge it and cite Baltrunas, Church, Karatzoglou and Oliver, 'Frappe: Understanding the Usage and Perception of\n"
    "Mobile App Recommendations In-The-Wild', arXiv:1505.03014. Split and negatives: He and Chua, NFM, arXiv:1708.05027."
)

TRAIN, TRAIN_REBUILT = "frappe.train.libfm", "train_rebuilt.parquet"
VALIDATION, TEST = "frappe.validation.libfm", "frappe.test.libfm"
KNOWN = {
    VALIDATION: common.KnownFile(
        4_163_044, "fdf4be563a7dd9b15f7a6e8b32671e90e6e7a2a2bd3af4e10bf13c5ad7e76e9e", "the file in the NFM repository"
    ),
    TEST: common.KnownFile(
        2_081_389, "a2ebaef3a9af8e55f8bb0d08bc4923965e42e43760ebd7635ac2f8c5db99e097", "the file in the NFM repository"
    ),
    TRAIN_REBUILT: common.KnownFile(
        1_140_071, "71146ca5e3f6dc3b7ce0ecd9735c60394fd1e1505ddfbf4552ce65dcc7e0f143", "the rebuilt training rows"
    ),
}
# Rows, and md5 of the comma-separated file that BARS publishes as Frappe_x1 (github.com/reczoo/Datasets).
PUBLISHED = {
    "train": (202_027, "ba7306e6c4fc19dd2cd84f2f0596d158"),
    "valid": (57_722, "88d51bf2173505436d3a8f78f2a59da8"),
    "test": (28_860, "3470f6d32713dc5f7715f198ca7c612a"),
}
# Smallest and largest value of each column. Ids are numbered through all fields, so a wrong column order cannot pass.
RANGES = {
    "label": (0, 1),
    "user": (0, 956),
    "item": (957, 5038),
    "daytime": (5039, 5045),
    "weekday": (5046, 5052),
    "isweekend": (5053, 5054),
    "homework": (5055, 5057),
    "cost": (5058, 5059),
    "weather": (5060, 5068),
    "country": (5069, 5148),
    "city": (5149, 5381),
}
FIELDS = tuple(RANGES)[1:]
LINE = re.compile(r"(?:-1|1)(?: \d{1,9}:1){10}\s*")
ARROW_SCHEMA = pa.schema([("label", pa.int8()), *((name, pa.int32()) for name in FIELDS)])


def make_schema() -> Schema:
    """The ten fields; an app and its price are the candidate, everything else is its context."""
    return Schema(
        fields=tuple(SparseField(name=n, side="candidate" if n in ("item", "cost") else "context") for n in FIELDS),
        labels=("label",),
    )


def _check_ranges(values: npt.NDArray[np.int64], path: Path, unit: str) -> npt.NDArray[np.int64]:
    for column, (name, (low, high)) in enumerate(RANGES.items()):
        wrong = np.flatnonzero((values[:, column] < low) | (values[:, column] > high))
        if wrong.size:
            raise DataError(
                f"{path}, {unit} {wrong[0] + 1}: {name} is {values[wrong[0], column]}; expected {low} to {high}. "
                f"The columns are {', '.join(RANGES)}, and ids are numbered through all fields"
            )
    return values


def _read_libfm(path: Path) -> npt.NDArray[np.int64]:
    rows: list[list[int]] = []
    with path.open(encoding="ascii", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not LINE.fullmatch(line):
                raise DataError(f"{path}, line {number}: {line[:80]!r}; expected '-1' or '1', then ten cells such as '204:1'")
            label, *cells = line.split()
            rows.append([int(label == "1"), *(int(cell[:-2]) for cell in cells)])
    return _check_ranges(np.array(rows, dtype=np.int64).reshape(-1, len(RANGES)), path, "line")


def _read_rebuilt(path: Path) -> npt.NDArray[np.int64]:
    table = common.open_parquet(path, tuple(RANGES)).read(columns=list(RANGES))
    for name in RANGES:
        if not pa.types.is_integer(table[name].type) or table[name].null_count:
            raise DataError(
                f"{path}: column {name} is {table[name].type} with {table[name].null_count} nulls; expected integers"
            )
    return _check_ranges(np.column_stack([table[name].to_numpy() for name in RANGES]).astype(np.int64), path, "row")


def _compare_with_published(split: str, values: npt.NDArray[np.int64]) -> None:
    rows, md5 = PUBLISHED[split]
    if len(values) != rows:
        print(f"note: {split} has {len(values):,} rows; the published split has {rows:,}")
        return
    lines = [",".join(RANGES), *(",".join(map(str, row)) for row in values.tolist()), ""]
    same = hashlib.md5("\r\n".join(lines).encode(), usedforsecurity=False).hexdigest() == md5
    print(f"{split}: {'exactly the' if same else 'as many rows as, but not the'} rows of the published Frappe_x1 split")


def prepare(raw: Path | None, out: Path) -> tuple[common.OutputFile, ...]:
    """Write the three splits and the schema; the columns are ``label`` (int8) and the ten raw ids (int32).

    Args:
        raw: folder of the raw files; ``None``: download them to ``out/raw``.
        out: folder to write to.

    Returns:
        The files of train, validation and test, in this order.

    Raises:
        DataError: a raw file is missing, cannot be downloaded, or is not what its name says.
    """
    if raw is None:
        raw = out / "raw"
        for name in (TRAIN, VALIDATION, TEST):
            common.download(URL + name, raw / name)
    train = TRAIN_REBUILT if not (raw / TRAIN).is_file() and (raw / TRAIN_REBUILT).is_file() else TRAIN
    common.require_files(raw, train, VALIDATION, TEST)
    splits: dict[str, npt.NDArray[np.int64]] = {}
    for split, name in (("train", train), ("valid", VALIDATION), ("test", TEST)):
        common.check_known(raw / name, KNOWN)
        splits[split] = _read_rebuilt(raw / name) if name == TRAIN_REBUILT else _read_libfm(raw / name)
    files = []
    for split, values in splits.items():
        table = pa.Table.from_arrays(
            [pa.array(c).cast(t) for c, t in zip(values.T, ARROW_SCHEMA.types, strict=True)], schema=ARROW_SCHEMA
        )
        files.append(common.write_parquet([table], ARROW_SCHEMA, out / f"{split}.parquet"))
        _compare_with_published(split, values)
    make_schema().save(out / "schema.json")
    if train == TRAIN_REBUILT:
        print(
            "note: train negatives re-drawn: positives and contexts are the published ones, the item of each negative is not; "
            "say so beside every result"
        )
    print(TERMS)
    return tuple(files)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = common.argument_parser(__doc__).parse_args(argv)
    return common.run(lambda: prepare(args.raw, args.out))


if __name__ == "__main__":
    sys.exit(main())
