import http.server
import importlib
import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrlib.schema import DataError

PROJECT = Path(__file__).resolve().parents[2]
if TYPE_CHECKING:
    from datasets import common
else:  # from their folder, as scripts: an installed package may also be called datasets
    sys.path.insert(0, str(PROJECT / "datasets"))
    import common

SCHEMA = pa.schema([("label", pa.int8()), ("n", pa.int32())])


def table(first: int, last: int) -> pa.Table:
    return pa.table({"label": [i % 2 for i in range(first, last)], "n": list(range(first, last))}, schema=SCHEMA)


def test_write_parquet_regroups_rows_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "ROW_GROUP", 4)
    written = common.write_parquet([table(0, 3), table(3, 9), table(9, 10)], SCHEMA, tmp_path / "new" / "x.parquet")
    file = pq.ParquetFile(written.path)
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [4, 4, 2]
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    assert file.read()["n"].to_pylist() == list(range(10))
    assert (written.rows, written.positive_rate, written.size) == (10, 0.5, written.path.stat().st_size)


def test_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "x.parquet"
    target.write_text("old")

    def tables() -> pa.Table:
        yield table(0, 3)
        raise DataError("line 4")

    with pytest.raises(DataError, match="line 4"):
        common.write_parquet(tables(), SCHEMA, target)
    with pytest.raises(DataError, match="no rows"):
        common.write_parquet([], SCHEMA, target)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"]


@pytest.mark.parametrize("text", ["abc", "abd", "abcd"])
def test_check_known(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # SHA-256 of "abc" from FIPS 180-2, appendix B.1.
    known = {"x": common.KnownFile(3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", "the original")}
    (tmp_path / "x").write_text(text)
    common.check_known(tmp_path / "x", known)
    out, err = capsys.readouterr()
    if text == "abc":
        assert "matches the original" in out
        assert not err
    else:
        assert not out
        assert err.startswith("warning: ")
        assert "the original" in err


def test_download(tmp_path: Path) -> None:
    (tmp_path / "source").write_text("hello")
    target = tmp_path / "raw" / "target"
    common.download((tmp_path / "source").as_uri(), target)
    assert target.read_text() == "hello"
    (tmp_path / "source").unlink()
    common.download((tmp_path / "source").as_uri(), target)  # there already
    with pytest.raises(DataError, match=r"cannot download http://127\.0\.0\.1:9/x .*--raw"):
        common.download("http://127.0.0.1:9/x", tmp_path / "raw" / "other")
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["target"]


class Truncating(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(b"half of it")

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""


def test_broken_off_download_leaves_no_file(tmp_path: Path) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Truncating) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(DataError, match=r"cannot download .*10.*(100|90)"):
            common.download(f"http://127.0.0.1:{server.server_port}/x", tmp_path / "raw" / "x")
    assert list((tmp_path / "raw").iterdir()) == []


@pytest.mark.parametrize("script", ["frappe", "criteo", "movielens"])
def test_scripts_run_though_another_package_is_called_datasets(script: str, tmp_path: Path) -> None:
    other = tmp_path / "datasets"
    other.mkdir()
    (other / "__init__.py").write_text("raise RuntimeError('the other package')")
    done = subprocess.run(
        [sys.executable, f"datasets/{script}.py", "--raw", str(tmp_path / "nothing"), "--out", str(tmp_path)],
        cwd=PROJECT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'nothing'}: no such")


@pytest.mark.parametrize("script", ["frappe", "criteo", "movielens"])
def test_scripts_are_importable_from_the_project(script: str) -> None:
    spec = importlib.util.find_spec("datasets")
    if spec is None or spec.origin is not None:
        pytest.skip("another package called datasets is installed")
    assert callable(importlib.import_module(f"datasets.{script}").prepare)
