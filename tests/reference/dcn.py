"""DCN (arXiv:1708.05123 eq. 1 to 6) and parallel DCN-V2 (arXiv:2008.13535) of one row, before the sigmoid."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from tests.reference.cross_net import cross_v1, cross_v2
from tests.reference.mlp import linear, mlp

Array = npt.NDArray[np.float64]


def dcn(
    x: Array,
    version: Literal[1, 2],
    cross: tuple[list[Array], list[Array]],
    hidden: list[tuple[Array, Array]],
    last: tuple[Array, Array],
) -> float:
    """x [F, D]; the last layer reads the cross network's output, then the MLP's."""
    flat = np.array([v for row in x for v in row])
    crossed = cross_v1(flat, *cross) if version == 1 else cross_v2(flat, *cross)
    (logit,) = linear(np.concatenate([crossed, mlp(x, hidden, "relu", None)]), *last)
    return float(logit)
