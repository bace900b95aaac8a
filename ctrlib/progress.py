"""A progress bar on a terminal, silence everywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Tracker:
    """Counts work done; this one shows nothing."""

    def advance(self, n: int, note: str = "") -> None:
        """Report ``n`` more units; ``note`` replaces the text at the end of the bar (empty: keeps it)."""


@contextmanager
def track(title: str, total: int | None, unit: str = "rows") -> Iterator[Tracker]:
    """Show a bar with count, speed, time left and a note while the block runs, if standard error is a terminal.

    The bar is removed at the end, so that what is logged afterwards starts on a clean line.

    Args:
        title: text before the bar.
        total: units in all; ``None`` if unknown.
        unit: what is counted.
    """
    if not sys.stderr.isatty():
        yield Tracker()
        return

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class SpeedColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed or 0:,.0f} {unit}/s")

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        SpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task(title, total=total, note="")

    class Shown(Tracker):
        def advance(self, n: int, note: str = "") -> None:
            if note:
                bar.update(task, note=note)
            bar.advance(task, n)

    with bar:
        yield Shown()
