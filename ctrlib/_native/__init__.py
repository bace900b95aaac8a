"""Plain C, built by setuptools where there is a compiler, loaded through ctypes.

``kernel.c``: embedding tables; everything it does, :mod:`ctrlib.rowwise` also does in torch operations. ``lookup.c``: finding
values; :mod:`ctrlib.data.vocabulary` also does it in NumPy. They are only faster.
"""

from __future__ import annotations

import ctypes
import warnings
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch  # before the kernel, so that both use one pool of OpenMP threads
from torch import Tensor

_VERSION = 1  # of what C and Python expect of each other; the same number stands in kernel.c


class TableStruct(ctypes.Structure):
    """``Table`` of ``kernel.c``, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "first", "second", "last", "slot", "quadrature")),
        *((name, ctypes.c_int64) for name in ("rows", "dim", "step")),
        *((name, ctypes.c_int32) for name in ("rule", "bf16", "l2_elapsed")),
        ("seed", ctypes.c_uint32),
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "scale", "l2")),
    )


@cache
def kernel() -> Any:
    """The loaded library, or ``None`` where it was not built, or for another version of this file."""
    here = Path(__file__).parent
    path = next((p for suffix in EXTENSION_SUFFIXES if (p := here / f"kernel{suffix}").is_file()), None)
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError:  # built for another machine, or without its OpenMP library
        return None
    if getattr(library, "ctrlib_version", lambda: 0)() != _VERSION:
        warnings.warn(f"{path} was built for another version of ctrlib and is not used; install ctrlib again", stacklevel=2)
        return None
    pointer, size, number, table = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.POINTER(TableStruct)
    library.ctrlib_gather.argtypes = [pointer, number, pointer, pointer, size, size, size, number]
    library.ctrlib_gather.restype = size
    library.ctrlib_catch_up.argtypes = [table, pointer, number, size, pointer, number]
    library.ctrlib_catch_up_all.argtypes = [table, number]
    library.ctrlib_coalesce.argtypes = [table, pointer, pointer, size, *[pointer] * 6, number]
    library.ctrlib_update.argtypes = [table, *[pointer] * 4, number]
    library.ctrlib_index.argtypes = [pointer, size, size, pointer, ctypes.c_uint64]
    library.ctrlib_find.argtypes = [pointer, size, pointer, pointer, pointer, ctypes.c_uint64, *[pointer] * 3]
    for name in ("catch_up", "catch_up_all", "coalesce", "update", "index", "find"):
        getattr(library, f"ctrlib_{name}").restype = None
    return library


def gathers(weight: Tensor) -> bool:
    """Whether :func:`gather` takes this table."""
    usable = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()
    return usable and kernel() is not None


def gather(weight: Tensor, ids: Tensor) -> Tensor:
    """``weight[ids]`` for a float32 table [V, D] on the CPU and int32 or int64 ids of any shape.

    Raises:
        IndexError: an id outside the table.
    """
    ids = ids.contiguous()
    rows, dim = weight.shape
    out = torch.empty(*ids.shape, dim)
    wide = int(ids.dtype == torch.int64)
    threads = torch.get_num_threads() if ids.numel() * dim > 32_768 else 1
    bad = kernel().ctrlib_gather(ids.data_ptr(), wide, weight.data_ptr(), out.data_ptr(), ids.numel(), rows, dim, threads)
    if bad >= 0:
        raise IndexError(f"id {int(ids.view(-1)[bad])} is outside the embedding table of {rows} rows")
    return out
