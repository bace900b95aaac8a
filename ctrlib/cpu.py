"""What makes torch fast on a CPU for these models: allocator thresholds, the route of fp32 matrix products, threads."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Literal

import torch

_FP32_TOLERANCE = 5e-6  # fp32 products measure below 1e-6, TF32 about 3e-4, bf16 about 3e-3

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4


@dataclass(frozen=True, slots=True)
class CpuTuning:
    """What :func:`tune_cpu` did.

    Attributes:
        allocator: ``"tuned"``, or ``"unavailable"`` where the C library is not glibc.
        matmul: ``"onednn"``: fp32 products go to oneDNN and were verified to be fp32; ``"default"``: they did not pass
            and torch's setting was put back; ``"unavailable"``: this torch has no such route.
        threads: what torch uses now.
    """

    allocator: Literal["tuned", "unavailable"]
    matmul: Literal["onednn", "default", "unavailable"]
    threads: int


def tune_cpu(threads: int | None = None) -> CpuTuning:
    """Tune this process for training and serving on a CPU; results stay those of fp32. May be called again.

    * glibc keeps freed memory instead of returning it to the system: tensors above 32 MB are otherwise mapped, faulted in
      page by page and unmapped at every operation.
    * fp32 matrix products go to oneDNN instead of MKL, whose kernels for CPUs of other makers than Intel are slow. The
      switch is named bf16, and on some CPUs really rounds; so the products are compared with float64, and the switch is
      put back unless they are true fp32.

    Args:
        threads: for torch's operations; ``None`` leaves the number as it is.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    return CpuTuning(allocator=_tune_allocator(), matmul=_route_matmul(), threads=torch.get_num_threads())


def _tune_allocator() -> Literal["tuned", "unavailable"]:
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return "unavailable"
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 256 << 20))
    accepted = [mallopt(ctypes.c_int(parameter), ctypes.c_int(value)) for parameter, value in settings]
    return "tuned" if all(accepted) else "unavailable"


def _route_matmul() -> Literal["onednn", "default", "unavailable"]:
    backend: Any = torch.backends.mkldnn  # untyped in torch
    setting: Any = getattr(backend, "matmul", None)
    if not backend.is_available() or not hasattr(setting, "fp32_precision"):
        return "unavailable"
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    if _matmul_error() < _FP32_TOLERANCE:
        return "onednn"
    setting.fp32_precision = before
    return "default"


def _matmul_error() -> float:
    """The largest error of fp32 products against float64, relative to the largest entry of the product.

    Sizes are those of a layer, of its transposed gradient and of attention over fields; torch routes only products of more
    than 16³ multiplications.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    a, b, bias = normal(192, 256), normal(256, 160), normal(160)
    wide = normal(160, 256)
    q, k = normal(48, 39, 32), normal(48, 32, 39)
    pairs = (
        (torch.mm(a, b), a.double() @ b.double()),
        (torch.mm(a, wide.T), a.double() @ wide.double().T),
        (torch.addmm(bias, a, b), bias.double() + a.double() @ b.double()),
        (torch.bmm(q, k), q.double() @ k.double()),
    )
    return max(float((fp32.double() - exact).abs().max() / exact.abs().max()) for fp32, exact in pairs)
