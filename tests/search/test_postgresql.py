"""Two searches on one PostgreSQL server, which the test starts; skipped where none is installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

optuna = pytest.importorskip("optuna")
pytest.importorskip("psycopg")

from ctrlib.search.sampling import opened_storage  # noqa: E402
from tests.clicks import write  # noqa: E402
from tests.search.test_tuning import _started  # noqa: E402

pytestmark = pytest.mark.skipif(
    shutil.which("initdb") is None or shutil.which("pg_ctl") is None, reason="no PostgreSQL server installed"
)


def _as_server(command: list[str]) -> None:
    """The server refuses to run as root."""
    user = "postgres" if os.getuid() == 0 else None
    subprocess.run(command, check=True, user=user, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, cwd="/", timeout=60)


@pytest.fixture
def server() -> Iterator[str]:
    folder = Path(tempfile.mkdtemp(prefix="ctrlib-pg-"))  # a socket's path must be short
    folder.chmod(0o777)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        _as_server(["initdb", "--pgdata", str(folder / "db"), "--username", "ctr", "--auth", "trust"])
        settings = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        _as_server(["pg_ctl", "--pgdata", str(folder / "db"), "-o", settings, "-l", str(folder / "log"), "-w", "start"])
        yield f"postgresql://ctr@127.0.0.1:{port}/postgres"
    finally:
        if (folder / "db" / "postmaster.pid").exists():
            _as_server(["pg_ctl", "--pgdata", str(folder / "db"), "-m", "immediate", "stop"])
        shutil.rmtree(folder, ignore_errors=True)


def test_two_searches_share_a_study(server: str, tmp_path: Path) -> None:
    data = write(tmp_path / "clicks")
    logs = [tmp_path / f"log-{i}" for i in range(2)]
    with (
        _started(data, tmp_path / "run-0", 4, 1, logs[0], server) as first,
        _started(data, tmp_path / "run-1", 4, 1, logs[1], server) as second,
    ):
        assert [p.wait(timeout=500) for p in (first, second)] == [0, 0], "".join(log.read_text() for log in logs)
    with opened_storage(server, tmp_path) as storage:
        [summary] = optuna.get_all_study_summaries(storage)  # one study of both
        trials = optuna.load_study(study_name=summary.study_name, storage=storage).trials
    assert 4 <= len(trials) <= 5
    assert len({t.user_attrs["worker"] for t in trials}) == 2
    assert not any("error" in t.user_attrs for t in trials)
    for i in range(2):
        assert (tmp_path / f"run-{i}" / "report.json").is_file()
