"""What Hiformer's low rank and pruning save when it serves: ``python -m benchmarks.hiformer``.

The attention block at the paper's sizes (arXiv:2311.05884): 37 tokens of width 128 and a task token, 4 heads, d_k 16, d_v 64,
FFN 512, ranks 128 and 1024; one layer, without gradients. Variants take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.common import interleaved, medians, print_table, write_result
from ctrlib.interactions.hiformer import Hiformer
from ctrlib.schema import FieldLayout

FIELDS, DIM = 37, 128
PRODUCTION = "Hiformer, low rank, pruned"
CONFIGS = {
    PRODUCTION: Hiformer.Config(),
    "Hiformer, low rank": Hiformer.Config(prune_last=False),
    "Hiformer, full, pruned": Hiformer.Config(rank_key=None, rank_value=None),
    "Hiformer, full": Hiformer.Config(rank_key=None, rank_value=None, prune_last=False),
    "HeteroAtt, pruned": Hiformer.Config(attention="hetero"),
    "HeteroAtt": Hiformer.Config(attention="hetero", prune_last=False),
    "Transformer, pruned": Hiformer.Config(attention="shared", ffn="shared"),
    "Transformer": Hiformer.Config(attention="shared", ffn="shared", prune_last=False),
}


def score(block: Hiformer, x_BFD: Tensor) -> Tensor:
    """One forward pass."""
    with torch.inference_mode():
        return block(x_BFD)


def main() -> None:
    """Print the table and write ``results/hiformer.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 256])
    arguments = parser.parse_args()
    layout = FieldLayout(tuple(f"f{i}" for i in range(FIELDS)), DIM)
    torch.manual_seed(0)
    blocks = {name: Hiformer(config, layout).eval() for name, config in CONFIGS.items()}
    sizes = {name: sum(p.numel() for p in block.parameters()) for name, block in blocks.items()}
    results = []
    for rows in arguments.batches:
        x_BFD = torch.randn(rows, FIELDS, DIM)
        variants: dict[str, Callable[[], object]] = {name: partial(score, block, x_BFD) for name, block in blocks.items()}
        found = medians(interleaved(variants, repeats=arguments.repeats, inner=3))
        for name, seconds in found.items():
            line = {"rows": rows, "variant": name, "parameters": sizes[name], "ms": seconds * 1e3}
            results.append({**line, "ratio": seconds / found[PRODUCTION]})
    print_table(
        ["rows", "variant", "M parameters", "ms", f"times the cost of {PRODUCTION}"],
        [[r["rows"], r["variant"], r["parameters"] / 1e6, r["ms"], r["ratio"]] for r in results],
    )
    write_result("hiformer", {"repeats": arguments.repeats, "threads": torch.get_num_threads(), "results": results})


if __name__ == "__main__":
    main()
