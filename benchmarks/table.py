"""Write ``benchmarks/README.md`` from the JSON files of the benchmarks: ``python -m benchmarks.table``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS

HEAD = """# Benchmarks

Ratios are measured side by side in one run; the absolute figures hold for the machine named with them.
`python -m benchmarks.NAME` prints a table and writes `results/NAME.json`; `python -m benchmarks.table` writes this page from
those files. A benchmark that starts processes gives them `GOMP_SPINCOUNT=1000`, peers included, but for `ranking`, whose
processes come to rest between turns. No GPU was at hand: nothing here was run on one.
"""


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cells = [[f"{c:,.3g}" if isinstance(c, float) else f"{c:,}" if isinstance(c, int) else str(c) for c in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in [list(header), *cells]]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]]) + "\n"


def _embedding(data: dict[str, Any]) -> str:
    compare = data["compare"]
    rows = [[name, ms, compare["faster"][name]] for name, ms in compare["ms"].items()]
    sweep = [list(line.values()) for line in data["sweep"]]
    return (
        f"Forward, backward and update of 39 fields, batch 4096, {compare['rows']:,} rows × 16:\n\n"
        + _table(["variant", "ms", "times faster than torch's dense Adam"], rows)
        + "\nThe kernel by number of rows:\n\n"
        + _table(["optimizer", "rows", "distinct rows a step", "ms", "ns a distinct row", "ns a look-up"], sweep)
    )


def _train(data: dict[str, Any]) -> str:
    batch = _read("loader")["milliseconds_a_batch"]["Loader, 1 worker"]
    rows = [
        [
            *(r["model"], r["variant"], round(r["rows_per_second"]), r["ms"], r["ratio"], r["products_per_second"] / 1e9),
            f"{r['share_of_products']:.0%}" if "share_of_products" in r else "",
            f"{batch / r['ms']:.1%}",
        ]
        for r in data["results"]
    ]
    header = ["model", "variant", "rows/s", "ms", "ratio to the usual torch form", "GFLOP/s of a product", "share of products"]
    header.append("loader's share")
    return (
        "A whole step, 39 fields, 2M rows × 16, batch 4096. The loader's share is its time for such a batch (below) over that\n"
        "of the step; it works in a thread beside it. The share of matrix products is their floating-point operations at the\n"
        "rate of a single one, over the step: where it is near 100 %, only faster products could make the step faster.\n\n"
        + _table(header, rows)
    )


def _peers(data: dict[str, Any]) -> str:
    speed = [
        [r["case"], r["peer"], r["model"], round(r["peer_rows_per_second"]), r["fp32_ratio"], r["bf16_ratio"]]
        for r in data["speed"]
    ]
    quality = [[r["model"], r["side"], f"{r['auc']:.5f} ± {r['std']:.5f}"] for r in data["quality"]]
    skipped = "".join(f"* {model}: {reason}\n" for model, reason in data["skipped"].items())
    return (
        _table(["tables", "peer", "model", "its rows/s", "ctrlib fp32, ratio", "ctrlib bf16, ratio"], speed)
        + "\nTest AUC on the Kaggle sample of Criteo's logs, 3 seeds; fp32 and bf16 are ctrlib's; .001 is noise:\n\n"
        + _table(["model", "side", "test AUC"], quality)
        + f"\nSkipped:\n\n{skipped}"
    )


def _loader(data: dict[str, Any]) -> str:
    rows = [
        [name, rate / 1e6, data["ratio_to_the_loader"][name], data["milliseconds_a_batch"][name]]
        for name, rate in data["rows_per_second"].items()
    ]
    return f"{data['rows']:,} rows; {data['what']}:\n\n" + _table(
        ["variant", "M rows/s", "ratio to the Loader", "ms a batch"], rows
    )


def _prepare(data: dict[str, Any]) -> str:
    medians = data["medians"]
    rows = []
    for name, seconds in medians["seconds"].items():
        count = data["rows"] * (2 if name.endswith("twice the rows") else 1)
        rows.append([name, count / seconds / 1e6, medians["peak_mb"][name], medians["peak_anonymous_mb"][name]])
    growth = data["peak_growth_with_twice_the_rows"]
    return (
        f"{data['rows']:,} Criteo-shaped rows, fit and encode; ctrlib under a limit of {data['limit_bytes'] / 2**30:g} GiB:\n\n"
        + _table(["variant", "M rows/s", "peak MB", "of which anonymous"], rows)
        + f"\nPeak with twice the rows: × {growth:.3f}. Ids that differ from Polars' on a sample: {data['differing_ids']}.\n"
    )


def _hiformer(data: dict[str, Any]) -> str:
    rows = [[r["rows"], r["variant"], r["parameters"] / 1e6, r["ms"], r["ratio"]] for r in data["results"]]
    return f"One attention layer of the paper's size without gradients, {data['threads']} threads:\n\n" + _table(
        ["rows", "variant", "M parameters", "ms", "times the cost of low rank and pruned"], rows
    )


def _search_replay(data: dict[str, Any]) -> str:
    shown = list(data["won"]["hedged"])
    rows = [
        [name, *(f"{regret[t]['mean'] * 1e4:.1f} / {regret[t]['median'] * 1e4:.1f}" for t in shown)]
        + [f"{data['won'][name][t]:.0%}" for t in shown]
        for name, regret in data["regret"].items()
    ]
    gates = "".join(
        f"* {g['name']}: {g['value']:.3g}, to be {g['limit']}{'' if g['holds'] else ': FAILS'}\n" for g in data["gates"]
    )
    return (
        f"Strategies of `ctrlib search` on a public log of tuning runs: {data['grids']} grids, {data['seeds']} seeds (TPE: "
        f"{data['tpe_seeds']}; random: exact). Mean / median over the grids of the regret in validation AUC, in 1e-4, and the "
        "share of grids won over random, by number of evaluations:\n\n"
        + _table(["", *shown, *(f"won, {t}" for t in shown)], rows)
        + f"\n{gates}"
    )


def _blocks(data: dict[str, Any]) -> str:
    rows = [
        [r["case"], r["model"], r["peer"]]
        + [r[side] or r["stopped"].get(r["peer"] if side == "peer_ms" else "fp32", "") for side in ("peer_ms", "ms")]
        + [r.get("ratio", "")]
        for r in data["results"]
    ]
    notes = "".join(f"* {model}: {note}\n" for model, note in data["notes"].items())
    reasons = dict.fromkeys(data["without_counterpart"].values())
    alone = "".join(
        f"* {reason}: {', '.join(model for model, why in data['without_counterpart'].items() if why == reason)}\n"
        for reason in reasons
    )
    return (
        f"A training step of the same model on both sides, 39 fields × 16 and 10 × 10, batch 4096, fp32; {data['rounds']} "
        f"process(es) of {' or '.join(map(str, data['steps'].values()))} steps a side, taking turns; limits of a process: "
        f"{data['seconds']:g} s and {data['memory'] / 2**30:g} GiB:\n\n"
        + _table(["tables", "model", "peer", "its ms", "ctrlib's ms", "times faster"], rows)
        + f"\n{notes}\nPresets without a counterpart:\n\n{alone}"
    )


def _ranking(data: dict[str, Any]) -> str:
    rows = []
    for r in data["requests"]:
        eager = r["ms"]["eager torch, tiled"]["p50"]
        for side, ms in r["ms"].items():
            faster = eager / ms["p50"] if side != "encoding" else ""
            rows.append([r["model"], r["candidates"], side, ms["p50"], ms["p99"], faster])
    models = {r["model"]: r for r in data["requests"]}
    text = (
        "One context and its candidates, 39 fields of which 19 are of the context, "
        f"{data['rows']:,} rows × 16, fp32, {data['threads']} threads. Each side in a process of its own, taking turns. Tiled: "
        "the context stands in every row; tuned: with `ctrlib.tune_cpu()`, as the ranker and the encoding of raw values:\n\n"
        + _table(["model", "candidates", "side", "p50 ms", "p99 ms", "times faster than eager torch"], rows)
        + "\n| model | multiplications done once a request | largest difference of a probability |\n|---|---|---|\n"
    )
    for name, r in models.items():
        worst = max(q["difference"] for q in data["requests"] if q["model"] == name)
        text += f"| {name} | {r['hoisted_share']:.0%} | {worst:.0e} |\n"
    if "memory_mib" in data:
        cells = ", ".join(f"{m['own']:.1f} of {m['mapped']:.0f}" for m in data["memory_mib"])
        text += f"\nMiB of its own, of the mapped weights, in each process that serves the same artifact: {cells}.\n"
    return text


def _service(data: dict[str, Any]) -> str:
    cells = ("answers", "per_second", "p50_ms", "p99_ms", "not_200", "wrong_scores", "connection_errors")
    names = {"saturated": "as many as go through", "half": "half as many", "swapped": "half as many, ten swaps of the model"}
    rows = [[title, *(data[name][cell] for cell in cells)] for name, title in names.items()]
    header = ["load", "answers", "per second", "p50 ms", "p99 ms", "not 200", "wrong scores", "broken connections"]
    return (
        f"`ctrlib serve` of a DNN, {data['threads']} thread(s), {data['rows']:,} rows × 16, {data['candidates']} candidates a\n"
        f"request; wrk beside it on the same {data['machine']['cores']} cores, which compares every score:\n\n"
        + _table(header, rows)
        + f"\nReady {data['ready_seconds']:.1f} s after the start, "
        f"{data['ready_seconds_after_kill']:.1f} s after kill -9.\n"
    )


def _graph(data: dict[str, Any]) -> str:
    hop = data["propagation_nanoseconds_per_directed_edge_and_hop"]
    return (
        f"One epoch of CatGCN, all nodes in one step with dropout: {data['nodes']:,} nodes × {data['features']} features,\n"
        f"{data['edges']:,} edges, {data['hops']} hops, blocks of {data['block_nodes']:,} nodes:\n"
        f"{data['epoch_seconds']:.0f} s, {1e6 * data['epoch_seconds_per_edge']:.1f} µs an edge. One validation: "
        f"{data['validation_seconds']:.0f} s; propagation\n"
        f"takes {hop:.1f} ns a directed edge and hop. Peak memory: {data['peak_gib']:.1f} GiB, "
        f"{data['peak_gib_before_training']:.1f} before training.\n"
    )


def _search_real(data: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{data['seconds'][name]:.0f}",
            *(f"{r[method]['mean']:.5f} ± {statistics.stdev(r[method]['by_seed']):.5f}" for method in ("hedged", "random")),
            f"{r['wins']} of {data['seeds']}",
            "never" if r["time_share"] is None else f"{r['time_share']:.2f}",
            f"{sum(r['cpu_seconds']['hedged']) / sum(r['cpu_seconds']['random']):.2f}",
            "yes" if r["holds"] else "no",
        ]
        for name, r in data["data"].items()
    ]
    header = ["data", "seconds", "test log loss, hedged", "random", "won", "time to random's median", "CPU", "gates hold"]
    text = (
        f"Searches that train, two at a time with one thread each, {data['seeds']} seeds; the test log loss of what they "
        "end with, after what share of the budget the hedged ones reach the median of random's end (on validation "
        "rows), and their CPU seconds, random = 1:\n\n" + _table(header, rows)
    )
    if "published" in data:
        found = data["published"]
        text += (
            f"\nOn Frappe, by validation AUC, two workers: {found['model']} with {found['search']['mean']:.5f} ± "
            f"{found['search']['std']:.5f}; the published FinalMLP settings {found['final_mlp']['mean']:.5f} ± "
            f"{found['final_mlp']['std']:.5f}.\n"
        )
    return text


SECTIONS = {
    "embedding": _embedding,
    "train": _train,
    "peers": _peers,
    "blocks": _blocks,
    "loader": _loader,
    "prepare": _prepare,
}
SECTIONS["hiformer"] = _hiformer
SECTIONS |= {
    "search_replay": _search_replay,
    "search_real": _search_real,
    "ranking": _ranking,
    "service": _service,
    "graph": _graph,
}
COMMANDS = {"search_replay": "search --replay", "search_real": "search --real"}  # of those whose file has another name


def main() -> None:
    """Write the page; benchmarks without results are left out."""
    text = HEAD
    for name, section in SECTIONS.items():
        if not (RESULTS / f"{name}.json").is_file():
            continue
        data = _read(name)
        machine = data["machine"]
        where = f"{machine['cores']} cores of {machine['cpu']}, torch {machine['torch']}, {machine['date']}"
        command = COMMANDS.get(name, name)
        text += f"\n## `python -m benchmarks.{command}`\n\n{where}; load average at the end {machine['load_average']:.1f}.\n\n"
        text += section(data)
    Path(RESULTS.parent / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
