"""Writing so that nothing is ever half there: folders and JSON files appear under their names only when they are whole."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ctrlib.schema import DataError

_log = logging.getLogger("ctrlib")
WRITER = "writer.pid"  # in an unfinished folder: the process at work on it
KEPT = "best.safetensors"
_SILENT = 1800.0  # seconds without a change after which a writer on another machine counts as gone


def sealed(info: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a JSON file with a checksum of its own."""
    content = {key: value for key, value in info.items() if key != "checksum"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return {**content, "checksum": digest}


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """A folder ``<target>.part`` that is renamed to ``target`` at the end of the block.

    After an error it is removed, unless it holds ``best.safetensors``: trained weights stay where they are, and that is logged.

    Raises:
        DataError: ``target`` exists, cannot be written, or another process is writing it.
    """
    target = Path(target)
    part = _claim(target)
    try:
        (part / WRITER).write_text(_me())
        yield part
        (part / WRITER).unlink()
        part.rename(target)
    except BaseException as error:
        if (part / KEPT).is_file():
            _log.error("the best weights of the unfinished %s are in %s", target.name, part)
        else:
            shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError):
            reason, named = error.strerror or error, str(error.filename or part)
            if not named.startswith(str(part)):
                raise DataError(f"{named}: cannot be read or written ({reason})") from error
            raise DataError(f"{target}: cannot be written ({reason}); free some space or choose another place") from error
        raise


def check_new_folder(target: str | Path) -> None:
    """Raise what :func:`new_folder` would, before long work."""
    _claim(Path(target)).rmdir()


def discard_unfinished(target: str | Path) -> None:
    """Remove what was left of an unfinished :func:`new_folder`, weights too, by a process that is gone or by this one."""
    target = Path(target)
    part = target.with_name(target.name + ".part")
    if (part / WRITER).is_file() and ((writer := _writer(part)) is None or _mine(writer)):
        shutil.rmtree(part)


def _claim(target: Path) -> Path:
    if target.exists():
        raise DataError(f"{target} exists already; choose another folder, or remove it")
    part = target.with_name(target.name + ".part")
    if part.exists():
        _clear(part)
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"{target}: cannot be written ({error.strerror}); choose another folder") from error
    return part


def _clear(part: Path) -> None:
    """Remove what a writer that is gone left unfinished; nothing else."""
    writer = _writer(part) if (part / WRITER).is_file() else None
    kept = (part / KEPT).is_file()
    if writer is not None and not (kept and _mine(writer)):  # of this process, weights are what an error left
        name, host = part.name.removesuffix(".part"), writer.split()[1:2]
        if host and host[0] != socket.gethostname():
            raise DataError(
                f"{name}: a process of the machine {host[0]} writes it, or did until a while ago; choose another folder, wait, "
                f"or remove {part} if that process is gone"
            )
        raise DataError(f"{name}: another process is writing it; choose another folder, or wait")
    if kept:
        raise DataError(f"{part} holds the weights of a run that was not finished; move or remove it")
    if not (part / WRITER).is_file():
        raise DataError(f"{part} is in the way, and not an unfinished folder of ours; move or remove it")
    shutil.rmtree(part)


def _me() -> str:
    """Number, machine and beginning of this process: on a disk that machines share, numbers mean nothing to others."""
    return f"{os.getpid()} {socket.gethostname()} {process_began(os.getpid()) or ''}".strip()


def _mine(writer: str) -> bool:
    process, host = (*writer.split(), "")[:2]
    return process == str(os.getpid()) and host in ("", socket.gethostname())


def _writer(part: Path) -> str | None:
    """The process that writes the folder, as :func:`_me` names it, unless it is known to be gone."""
    text = (part / WRITER).read_text()
    process, host, began = (*text.split(), "", "", "")[:3]
    if not process.isdecimal():
        return None
    if host and host != socket.gethostname():  # of which only its silence tells
        last = max(path.stat().st_mtime for path in (part, *part.rglob("*")) if path.exists())
        return text if time.time() - last < _SILENT else None
    return text if process_runs(int(process), began or None) else None


def process_began(process: int) -> str | None:
    """When a process of this machine began, in ticks since the machine did; ``None`` where the system does not say."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()[19]  # field 22; the second one, a name in brackets, may hold spaces


def process_runs(process: int, began: str | None = None) -> bool:
    """Whether a process of this machine runs: the one that began then, see :func:`process_began`, where both are known. In a
    container that was started again a new process has the number of the old."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    now = process_began(process)
    return began is None or now is None or began == now


def write_json(path: Path, data: object) -> None:
    """Write strict JSON (see :func:`finite`) under a temporary name, then rename."""
    write_text(path, json_text(data) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text under a temporary name, then rename."""
    with new_file(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A file ``<target>.part`` that takes the place of ``target`` at the end of the block, and is removed after an error."""
    part = target.with_name(target.name + ".part")
    try:
        yield part
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def json_text(data: object) -> str:
    """Strict, indented JSON of plain values; see :func:`finite`."""
    return json.dumps(finite(data), indent=2, ensure_ascii=False, allow_nan=False)


def finite(data: object) -> Any:
    """``data`` for JSON, which has no NaN and no infinity: they become null."""
    if isinstance(data, Mapping):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def sha256(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
