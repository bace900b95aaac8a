"""Exported programs score as the model does, or are not written; damaged ones are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ctrlib import artifact
from ctrlib import export as exporting
from ctrlib.artifact import Artifact
from ctrlib.config import ConfigError
from ctrlib.export import SmallRows, export, load_export, verify
from ctrlib.files import sealed
from ctrlib.ranking import TOLERANCE
from ctrlib.schema import DataError
from ctrlib.table import EmbeddingTable
from tests.clicks import clicks
from tests.test_ranking import save

ROWS = clicks(120, 7)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return artifact.load(save(tmp_path_factory.mktemp("artifacts") / "a"))


@pytest.fixture(scope="module")
def written(loaded: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "torch"
    export(loaded, folder)
    return folder


def differences(loaded: Artifact, folder: Path) -> dict[str, float]:
    """Of a program that takes 120 rows at once, and of the ranker."""
    return {name: found["difference"] for name, found in verify(loaded, ROWS, {"program": load_export(folder)}).items()}


def test_every_path_scores_raw_rows_alike(loaded: Artifact, written: Path) -> None:
    report = verify(loaded, ROWS, {"torch": load_export(written)}, rows=60)
    assert list(report) == ["ranker", "ranker, context in every row", "torch"]
    for found in report.values():
        assert found["difference"] <= TOLERANCE
        assert abs(found["auc_change"]) <= 1e-6
    info = load_export(written).info
    assert info["inputs"] == ["sparse", "dense", "genres.values", "genres.offsets"]
    assert info["columns"]["sparse"] == ["user", "city", "age"]
    weights = (written / "weights.safetensors").stat().st_size
    assert weights < 2 * sum(p.numel() * 4 for p in loaded.model.parameters()) + 4096  # each weight once


def test_no_rows_to_verify(loaded: Artifact) -> None:
    with pytest.raises(DataError, match="the table has 0 rows; expected at least one"):
        verify(loaded, ROWS.slice(0, 0), {})
    with pytest.raises(DataError, match="has 120 rows, of which 0 are wanted"):
        verify(loaded, ROWS, {}, rows=0)


@pytest.mark.parametrize("rows", ["bfloat16", "int8"])
def test_small_rows(loaded: Artifact, tmp_path: Path, rows: str) -> None:
    expected = loaded.predict(ROWS)
    info = export(loaded, tmp_path / "small", rows=rows)
    assert 0 < info["difference"] < 0.1
    assert 0 < differences(loaded, tmp_path / "small")["program"] < 0.1
    np.testing.assert_array_equal(loaded.predict(ROWS), expected)  # the model has its own rows again


def test_small_rows_by_hand() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.27, -0.635], [0.01, 2.54]])
    int8 = SmallRows(weight, "int8")
    assert int8.rows.tolist() == [[0, 0], [127, -64], [0, 127]]  # halves go to the even number
    torch.testing.assert_close(int8(torch.tensor([0, 1])), torch.tensor([[0.0, 0.0], [1.27, -0.64]]))
    table = EmbeddingTable(50, 3).requires_grad_(False)
    with torch.no_grad():
        table.weight[0] = 0
    ids, offsets = torch.tensor([3, 0, 7, 9, 0, 2, 2]), torch.tensor([0, 2, 4, 4, 5, 7], dtype=torch.int32)
    for rows, allowed in (("bfloat16", 1 / 256), ("int8", 1 / 127)):
        small = SmallRows(table.weight, rows)
        for mode in ("sum", "mean", "max"):
            difference: Tensor = small.pool(ids, offsets, mode) - table.pool(ids, offsets, mode)
            assert difference.abs().max() <= 2 * allowed * table.weight.abs().max()


@pytest.mark.filterwarnings("ignore")  # torch's exporter meets deprecations of its own
def test_onnx(loaded: Artifact, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    export(loaded, tmp_path / "onnx", "onnx")
    assert differences(loaded, tmp_path / "onnx")["program"] <= TOLERANCE


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler meets deprecations of its own
def test_aoti(loaded: Artifact, tmp_path: Path) -> None:
    export(loaded, tmp_path / "aoti", "aoti")
    assert differences(loaded, tmp_path / "aoti")["program"] <= TOLERANCE


@pytest.mark.parametrize("error", [1e-4, np.nan])
def test_a_program_that_scores_otherwise_is_not_written(
    loaded: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: float
) -> None:
    read = exporting._READERS["torch"]

    def wrong(folder: Path) -> Any:
        run = read(folder)
        return lambda inputs: run(inputs) + (error if len(inputs[0]) > 1 else 0)

    monkeypatch.setitem(exporting._READERS, "torch", wrong)
    with pytest.raises(DataError, match=r"scores otherwise than the model: .*nothing was written"):
        export(loaded, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_damaged_exports_and_wrong_options(loaded: Artifact, written: Path, tmp_path: Path) -> None:
    for name in ("program.pt2", "weights.safetensors"):
        copy = tmp_path / name
        shutil.copytree(written, copy)
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name} is missing or damaged"):
            load_export(copy)
        (copy / name).write_bytes(content[:50])
        with pytest.raises(DataError, match=f"{name} is missing or damaged"):
            load_export(copy)
    info = json.loads((written / "export.json").read_text())
    changes: list[tuple[dict[str, Any], str]] = [
        ({"format": 1}, "has format 1; this version reads 2: export the model again"),
        ({"kind": "onxn"}, "is of kind 'onxn'; .*did you mean 'onnx'"),
        ({"files": {}}, "is missing or damaged"),
        ({"files": 3}, "export.json is damaged"),
        ({"sequences": None}, "export.json is damaged"),
        ({"inputs": None}, "export.json is damaged"),
    ]
    copy = tmp_path / "changed"
    shutil.copytree(written, copy)
    for change, message in changes:
        (copy / "export.json").write_text(json.dumps(sealed(info | change)))
        with pytest.raises(DataError, match=message):
            load_export(copy)
    for change in ({"sequences": []}, {"inputs": info["inputs"][::-1]}, {"checksum": "0"}):
        (copy / "export.json").write_text(json.dumps(info | change))
        with pytest.raises(DataError, match=r"export.json is damaged or was changed"):
            load_export(copy)
    (copy / "export.json").write_text("[]")
    with pytest.raises(DataError, match="is no export"):
        load_export(copy)
    with pytest.raises(DataError, match="is no export"):
        load_export(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="format is 'onxn'"):
        export(loaded, tmp_path / "x", "onxn")
    with pytest.raises(ConfigError, match="rows is 'int4'"):
        export(loaded, tmp_path / "x", rows="int4")
    with pytest.raises(DataError, match="exists already"):
        export(loaded, written)
