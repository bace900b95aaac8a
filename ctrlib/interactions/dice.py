"""Dice, the activation of DIN that adapts to its inputs' distribution (arXiv:1706.06978 eq. 4)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dice(nn.Module):
    """f(s) = p·s + (1 − p)·α·s with p = σ((s − E[s]) / √(Var[s] + ε)). Shape: [N, units] → [N, units].

    E and Var are of the rows of a batch in training, else running averages of them; α is learned, one a unit, and starts at 0.
    Rows of behaviours come without padding, so that padding is not counted among them, as it is in released code. A batch of
    one row, or of none, has no variance, and is read with the running averages in training too.
    """

    def __init__(self, units: int, eps: float = 1e-8, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.alpha = nn.Parameter(torch.zeros(units))
        self.mean: Tensor
        self.variance: Tensor
        self.register_buffer("mean", torch.zeros(units))
        self.register_buffer("variance", torch.ones(units))

    def forward(self, s_NU: Tensor) -> Tensor:
        """[N, units] → [N, units]."""
        training = self.training and s_NU.shape[0] > 1
        normed_NU = F.batch_norm(s_NU, self.mean, self.variance, training=training, momentum=self.momentum, eps=self.eps)
        return s_NU * torch.addcmul(self.alpha, torch.sigmoid(normed_NU), 1 - self.alpha)


@contextmanager
def unrecorded(module: nn.Module) -> Iterator[None]:
    """Inside, the :class:`Dice` of a module leave their running averages alone: rows that no evaluation will see pass by."""
    found = [(m, m.momentum) for m in module.modules() if isinstance(m, Dice)]
    for dice, _ in found:
        dice.momentum = 0.0
    try:
        yield
    finally:
        for dice, momentum in found:
            dice.momentum = momentum
