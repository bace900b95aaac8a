"""Residual units, number by number (doi:10.1145/2939672.2939704, section 4.3)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def deep_crossing(x: Array, units: list[tuple[Array, Array, Array, Array]], sum_first: bool = True) -> Array:
    """x [N]; per unit w [H, N], b [H], v [N, H], c [N]. ``sum_first=False`` is the wrong variant: the input is added after the
    second ReLU."""
    for w, b, v, c in units:
        hidden = [max(sum(w[h, n] * x[n] for n in range(len(x))) + b[h], 0.0) for h in range(len(w))]
        back = [sum(v[n, h] * hidden[h] for h in range(len(w))) + c[n] for n in range(len(x))]
        if sum_first:
            x = np.array([max(back[n] + x[n], 0.0) for n in range(len(x))])
        else:
            x = np.array([max(back[n], 0.0) + x[n] for n in range(len(x))])
    return x
