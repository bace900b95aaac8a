"""What a search writes for people: ``report.json``, ``report.md``, ``curve.png`` and ``report.html``, which holds all of it."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctrlib.config import ConfigError
from ctrlib.files import new_file, write_json, write_text
from ctrlib.plots import figure_class

_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}th,td{border-bottom:1px solid #ddd;padding:.3rem .7rem;text-align:left}"
    "img{max-width:100%}td.params{font-size:12px;color:#555}"
)
Row = list[str]


def write_report(report: Mapping[str, Any], target: Path) -> None:
    """Write all files; without matplotlib, no curve."""
    write_json(target / "report.json", report)
    write_text(target / "report.md", markdown(report))
    picture = _curve(report)
    if picture is not None:
        with new_file(target / "curve.png") as part:
            part.write_bytes(picture)
    write_text(target / "report.html", page(report, picture))


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    text = f"# Search by {report['method']}, {report['metric']}\n\n" + "".join(f"* {line}\n" for line in _lines(report))
    for title, header, rows in _tables(report):
        text += f"\n## {title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}\n"
        text += "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in rows)
    return text


def page(report: Mapping[str, Any], picture: bytes | None) -> str:
    """The report as one HTML file that needs no other."""
    body = f"<h1>Search by {html.escape(report['method'])}, {html.escape(report['metric'])}</h1>\n<ul>"
    body += "".join(f"<li>{html.escape(line)}</li>" for line in _lines(report)) + "</ul>\n"
    if picture is not None:
        body += f'<img alt="best so far" src="data:image/png;base64,{base64.b64encode(picture).decode()}">\n'
    for title, header, rows in _tables(report):
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
        body += f"<h2>{html.escape(title)}</h2>\n<table><tr>{head}</tr>\n{lines}</table>\n"
    return f'<!doctype html><meta charset="utf-8"><title>ctrlib search</title><style>{_STYLE}</style>\n{body}'


def _lines(report: Mapping[str, Any]) -> list[str]:
    trials = ", ".join(f"{count} {state}" for state, count in report["trials"].items() if count)
    rungs = ", ".join(f"{r['share']:.3g}{'' if r['used'] else ' (misled, given up)'}" for r in report["rungs"])
    test = report["test"]
    lines = [
        f"best: trial {report['best']}, {report['leaderboard'][0]['name']}; its artifact is in {report['artifact']}/",
        f"test rows, read once: AUC {_shown(test['auc'])}, log loss {_shown(test['log_loss'])}",
        f"trials: {trials}; {report['lost']} taken up again after their process was gone",
        f"rungs, as shares of the training rows: {rungs}",
    ]
    if report["compared_on"] < 1:
        lines.append(
            f"no trial had the time for all training rows: the best on {report['compared_on']:.3g} of them were trained again"
        )
    if report["noise"] is not None:
        lines.append(f"noise of seeds on the lowest rung: standard deviation {report['noise']:.2g}; less is no difference")
    if report["runner_up"] is not None and report["runner_up"]["ahead"] is not None:
        ahead = report["runner_up"]
        lines.append(
            f"ahead of the next, trial {ahead['trial']}, seed by seed: {_shown(ahead['ahead'])} ({ahead['seeds']} seeds)"
        )
    if report["one_epoch"]:
        lines.append("this data is learned in one epoch, and overfitted after it: later trials trained for one")
    return lines


def _tables(report: Mapping[str, Any]) -> list[tuple[str, Row, list[Row]]]:
    header = ["trial", "model", "valid log loss", "valid AUC", "parameters", "MB", "ms for 100 rows", "settings"]
    tables: list[tuple[str, Row, list[Row]]] = [("Leaderboard", header, [_row(e) for e in report["leaderboard"]])]
    front = [[*_row(e)[:7], _shown(e["test"]["log_loss"]), e["artifact"]] for e in report["pareto"]]
    tables.append(("Quality, latency, size: no other is better in all", [*header[:7], "test log loss", "artifact"], front))
    if report["left_out"]:
        rows = [[str(f["trial"]), f["name"], f"{f['search']:.5f}"] for f in report["left_out"]]
        tables.append(("On the front by their trials, but no time to train again", ["trial", "model", report["metric"]], rows))
    if report["importance"]:
        rows = [[name, f"{share:.3f}"] for name, share in report["importance"].items()]
        tables.append(("Importance of parameters (PED-ANOVA)", ["parameter", "share"], rows))
    if report["failures"]:
        rows = [[str(f["trial"]), f["reason"], _settings(f["params"])] for f in report["failures"]]
        tables.append(("Failures", ["trial", "reason", "settings"], rows))
    if report["stopped"]:
        rows = [[str(s["trial"]), str(s["name"]), s["reason"]] for s in report["stopped"]]
        tables.append(("Stopped early", ["trial", "model", "reason"], rows))
    return tables


def _row(entry: Mapping[str, Any]) -> list[str]:
    return [
        str(entry["trial"]),
        entry["name"],
        _shown(entry["log_loss"]),
        _shown(entry["auc"]),
        f"{entry['parameters']:,}",
        f"{entry['bytes'] / 2**20:.2f}",
        f"{entry['latency_ms']:.2f}",
        _settings(entry["params"]),
    ]


def _settings(params: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in params.items())


def _shown(value: Mapping[str, float]) -> str:
    spread = value["std"]
    return f"{value['mean']:.5f}" + ("" if spread is None or math.isnan(spread) else f" ± {spread:.5f}")


def _curve(report: Mapping[str, Any]) -> bytes | None:
    """Best metric of a trial on all rows so far, over the seconds since the search began."""
    points = report["curve"]
    try:
        figure = figure_class()(figsize=(7, 4))
    except ConfigError:  # no matplotlib
        return None
    axes = figure.subplots()
    better = min if report["metric"] == "log_loss" else max
    best: list[float] = []
    for point in points:
        best.append(point["value"] if not best else better(best[-1], point["value"]))
    seconds = [point["seconds"] for point in points]
    axes.scatter(seconds, [point["value"] for point in points], s=14, color="C7", label="trials on all rows")
    axes.step(seconds, best, where="post", color="C3", label="best so far")
    axes.set(xlabel="seconds of the budget", ylabel=f"validation {report['metric'].replace('_', ' ')}")
    axes.legend()
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, bbox_inches="tight", format="png")
    return buffer.getvalue()
