"""α-entmax: softmax, sparsemax and what lies between (Peters, Niculae & Martins, ACL 2019, arXiv:1905.05702)."""

from __future__ import annotations

from typing import Any, cast

import torch
from entmax import entmax15, entmax_bisect, sparsemax
from torch import Tensor


def entmax(z: Tensor, alpha: float | Tensor, dim: int = -1) -> Tensor:
    """p_j = [(α − 1) z_j − τ]₊^{1/(α − 1)} with the τ that makes Σ p = 1: argmax over the simplex of ⟨p, z⟩ + T_α(p).

    Same shape as ``z``. Softmax for α = 1, exact by sorting for 1.5 and 2 (sparsemax), by bisection for other numbers and for a
    tensor, which then gets a gradient and must stay above 1. A score of −∞ gets weight 0; where all are −∞ the weights are 0.
    """
    if z.dtype in (torch.float16, torch.bfloat16):  # rows would miss a sum of 1 by up to 6e-3
        z = z.float()
    dead = z.amax(dim=dim, keepdim=True).isneginf()
    z = z.masked_fill(dead, 0.0)
    p = z.softmax(dim=dim) if not isinstance(alpha, Tensor) and alpha == 1 else cast(Tensor, _Entmax.apply(z, alpha, dim))  # type: ignore[no-untyped-call]
    return p.masked_fill(dead, 0.0)


class _Entmax(torch.autograd.Function):
    """The package's values. The gradient is written out because torch.compile cannot trace the package's."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, alpha: float | Tensor, dim: int) -> Tensor:
        if isinstance(alpha, Tensor) or alpha not in (1.5, 2):
            halvings = 50 if z.dtype == torch.float64 else 30  # 24 reach what float32 can tell apart
            p = entmax_bisect(z, alpha, dim=dim, n_iter=halvings)
        else:
            p = entmax15(z, dim=dim) if alpha == 1.5 else sparsemax(z, dim=dim)
        ctx.dim = dim
        ctx.number = None if isinstance(alpha, Tensor) else alpha
        ctx.save_for_backward(p, *([alpha] if isinstance(alpha, Tensor) else []))
        return cast(Tensor, p)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        p, *learned = ctx.saved_tensors
        alpha = learned[0] if learned else ctx.number
        # dp/dz = diag(s) − s sᵀ / Σ s with s = p^{2 − α} on the support
        s = (p ** (2 - alpha)).masked_fill(p == 0, 0.0)
        share = s / s.sum(dim=ctx.dim, keepdim=True)
        to_z = s * gradient - share * (s * gradient).sum(dim=ctx.dim, keepdim=True)
        if not learned:
            return to_z, None, None
        entropy = torch.xlogy(p, p)
        slope = (p - share) / (alpha - 1) ** 2 - (entropy - share * entropy.sum(dim=ctx.dim, keepdim=True)) / (alpha - 1)
        return to_z, (gradient * slope).sum(), None
