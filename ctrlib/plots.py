"""What all plots share: matplotlib, which is optional, and a PNG that appears whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ctrlib.config import ConfigError


def figure_class(what: str = "plot") -> Any:
    """The class of figures of matplotlib: without ``pyplot``, whose state is the caller's.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ConfigError(f"the {what} needs matplotlib; pip install 'ctrlib[search]', or leave the {what} out") from error
    return matplotlib.figure.Figure


def save_png(figure: Any, path: str | Path) -> None:
    """Write a figure."""
    target = Path(path)
    part = target.with_name(target.name + ".part")
    figure.savefig(part, dpi=150, bbox_inches="tight", format="png")
    part.replace(target)
