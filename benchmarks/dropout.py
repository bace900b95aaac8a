"""What dropout costs beside the layer before it, on one thread of a CPU: ``python -m benchmarks.dropout``."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.common import interleaved, medians
from ctrlib.cpu import tune_cpu
from ctrlib.dropout import dropout

ROWS, WIDTH, REPEATS = 1024, 400, 50


def main() -> None:
    """Print the times of a linear layer, of torch's dropout and of ours."""
    tune_cpu(threads=1)
    x, weight = torch.randn(ROWS, WIDTH), torch.randn(WIDTH, WIDTH)
    variants = {
        "linear layer": lambda: F.linear(x, weight),
        "torch's dropout": lambda: F.dropout(x, 0.5),
        "ctrlib's dropout": lambda: dropout(x, 0.5),
    }
    seconds = medians(interleaved(variants, repeats=REPEATS, inner=3))
    print(f"{ROWS} × {WIDTH}: " + ", ".join(f"{name} {1e3 * s:.2f} ms" for name, s in seconds.items()))


if __name__ == "__main__":
    main()
