"""What all plots share: matplotlib, which is optional, and a PNG that appears whole or not at all; and the map of gates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ctrlib.config import ConfigError
from ctrlib.files import new_file
from ctrlib.schema import DataError


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
    with new_file(Path(path)) as part:
        figure.savefig(part, dpi=150, bbox_inches="tight", format="png")


def plot_gates(gate_UK: ArrayLike, lengths_U: ArrayLike, path: str | Path) -> None:
    """A heat map of gates, users × experts, users with the shortest histories on top; a PNG.

    Args:
        gate_UK: [U, K], ``"gate"`` of :meth:`.AWMoE.explain` or :meth:`.MoE.explain`, a row for each user.
        lengths_U: [U] behaviours of each.
        path: of the image.

    Raises:
        DataError: there are no users, not one length for each, or a gate is not finite.
        ConfigError: matplotlib is not installed.
    """
    new_figure = figure_class("heat map")
    gate_UK, lengths_U = np.asarray(gate_UK, float), np.asarray(lengths_U)
    if gate_UK.ndim != 2 or not gate_UK.size or lengths_U.shape != gate_UK.shape[:1] or not np.isfinite(gate_UK).all():
        raise DataError(
            f"gates of shape {gate_UK.shape} and lengths of shape {lengths_U.shape}; expected finite numbers [users, experts], "
            "and a length for every user"
        )
    order_U = np.argsort(lengths_U, kind="stable")
    most = float(np.abs(gate_UK).max()) or 1.0
    figure = new_figure(figsize=(2 + 0.5 * gate_UK.shape[1], 6))
    axes = figure.subplots()
    image = axes.imshow(gate_UK[order_U], aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=-most, vmax=most)
    axes.set_xticks(range(gate_UK.shape[1]))
    at = np.unique(np.linspace(0, len(order_U) - 1, 9).round().astype(int))
    axes.set_yticks(at, [str(length) for length in lengths_U[order_U][at]])
    axes.set(xlabel="expert", ylabel=f"behaviours in the history of {len(order_U):,} users")
    figure.colorbar(image, label="gate")
    save_png(figure, path)
