"""DeepFM (arXiv:1703.04247 eq. 1 to 4) of one row: first-order weights + pairwise inner products + MLP, before the sigmoid."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tests.reference.fm import fm
from tests.reference.mlp import first_order, mlp

Array = npt.NDArray[np.float64]


def deepfm(weights: Array, x: Array, hidden: list[tuple[Array, Array]], last: tuple[Array, Array]) -> float:
    """weights [F], the first-order weight of each field's value; x [F, D] → scalar."""
    (deep,) = mlp(x, hidden, "relu", last)
    return first_order(weights[:, None], 0.0) + fm(x) + float(deep)
