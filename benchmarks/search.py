"""Whether a search beats random search: ``python -m benchmarks.search --replay`` (seconds) and ``--real`` (hours).

Both exit with status 1 where a gate fails. ``--real`` compares wall time, so it needs a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.common import print_table, write_result
from benchmarks.search_real import DATA, RUNS, Setting, run_real
from benchmarks.search_replay import EVALUATIONS, Regrets, hedged, random_regrets, read_grids, replay, tpe
from ctrlib.cpu import tune_cpu

SEEDS, TPE_SEEDS = 20, 2  # Optuna's sampler takes longer than the rest together
SHOWN = (1, 4, 8, EVALUATIONS)


def gates(found: Regrets, chance: Regrets) -> list[tuple[str, float, str, float, bool]]:
    """What the hedged strategy must reach: name, value, direction, limit, whether it does. Regrets are in AUC."""
    limits = [
        ("mean regret after 8", found.mean(8), "≤", 4.0e-4),
        ("median regret after 8", found.median(8), "≤", 2.2e-4),
        ("win share over random after 8", found.win_share(chance, 8), "≥", 0.75),
        ("mean regret after 12", found.mean(12), "≤", 1.5e-4),
    ]
    return [(*gate, gate[1] <= gate[3] if gate[2] == "≤" else gate[1] >= gate[3]) for gate in limits]


def run_replay(seeds: int) -> bool:
    """Replay the three strategies, print and write what they reach; whether every gate holds."""
    started = time.perf_counter()
    grids = read_grids()
    chance = random_regrets(grids)
    found = replay("hedged", hedged(), grids, seeds)
    others = [chance, replay("tpe", tpe, grids, min(TPE_SEEDS, seeds)), found]
    print(f"{len(grids)} grids, {sum(len(g.auc_N) for g in grids):,} runs, {seeds} seeds\n")
    print(
        "mean / median regret in validation AUC, in 1e-4, and the share of grids won over random, after so many evaluations\n"
    )
    rows = [
        [
            r.name,
            *(f"{r.mean(t) * 1e4:.1f} / {r.median(t) * 1e4:.1f}" for t in SHOWN),
            *(r.win_share(chance, t) for t in SHOWN[1:]),
        ]
        for r in others
    ]
    print_table(["", *map(str, SHOWN), *(f"won, {t}" for t in SHOWN[1:])], rows)
    checked = gates(found, chance)
    print()
    for name, value, direction, limit, holds in checked:
        print(f"{'ok  ' if holds else 'FAIL'} {name}: {value:.3g} {direction} {limit:.3g}")
    result = {
        "grids": len(grids),
        "seeds": seeds,
        "tpe_seeds": min(TPE_SEEDS, seeds),
        "seconds": time.perf_counter() - started,
        "regret": {r.name: {str(t): {"mean": r.mean(t), "median": r.median(t)} for t in SHOWN} for r in others},
        "won": {r.name: {str(t): r.win_share(chance, t) for t in SHOWN} for r in others},
        "gates": [{"name": n, "value": v, "limit": f"{d} {limit}", "holds": bool(h)} for n, v, d, limit, h in checked],
    }
    print(f"\nwritten to {write_result('search_replay', result)}")
    return all(holds for *_, holds in checked)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read options, run, return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replay", action="store_true", help="on the log of BARS runs, $CTRLIB_DATA/bars/tuning_log.csv")
    parser.add_argument("--real", action="store_true", help="train, on Frappe, a sample of Criteo and synthetic clicks")
    parser.add_argument("--seeds", type=int, help=f"default: {SEEDS} of the replay, {Setting().seeds} of real searches")
    parser.add_argument("--seconds", type=float, help=f"of every real search; default: {dict(Setting().seconds)}")
    parser.add_argument("--frappe-seconds", type=float, default=Setting().frappe_seconds, help="against published settings")
    parser.add_argument("--data", nargs="+", choices=tuple(DATA), default=tuple(DATA), help="of real searches")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of the real searches")
    options = parser.parse_args(arguments)
    if not (options.replay or options.real):
        parser.error("say what to run: --replay, --real, or both")
    held = run_replay(options.seeds or SEEDS) if options.replay else True
    if options.real:
        tune_cpu()
        setting = Setting(seeds=options.seeds or Setting().seeds, frappe_seconds=options.frappe_seconds)
        if options.seconds is not None:
            setting = replace(setting, seconds=dict.fromkeys(DATA, options.seconds))
        held = run_real(setting, options.data, options.runs) and held
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
