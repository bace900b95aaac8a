"""AFN's logarithmic neurons as products of powers (arXiv:1909.03276 eq. 5 and 6), field by field."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Norm:
    """Batch normalisation in use; one number per channel."""

    mean: Array
    variance: Array
    gain: Array
    shift: Array

    def __call__(self, value: float, channel: int) -> float:
        scaled = (value - self.mean[channel]) / math.sqrt(self.variance[channel] + 1e-5)
        return float(self.gain[channel] * scaled + self.shift[channel])


def log_transform(
    x: Array, weight: Array, bias: Array | None, eps: float, norm_log: Norm | None = None, norm_exp: Norm | None = None
) -> Array:
    """x [F, D], weight [L, F], bias [L] → [L, D]."""
    y = np.zeros((len(weight), x.shape[1]))
    for j in range(len(weight)):
        for d in range(x.shape[1]):
            product = 1.0 if bias is None else math.exp(bias[j])
            for f in range(len(x)):
                factor = max(abs(x[f, d]), eps)
                if norm_log is not None:
                    factor = math.exp(norm_log(math.log(factor), f))
                product *= factor ** weight[j, f]
            y[j, d] = product if norm_exp is None else norm_exp(product, j)
    return y
