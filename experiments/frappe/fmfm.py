"""FmFM (vector kernels) on Frappe_x1 with the settings of BARS."""

from __future__ import annotations

from ctrlib.experiment import Experiment
from experiments.frappe.common import frappe, fuxictr


def experiment() -> Experiment:
    """The whole run."""
    return frappe(
        "fmfm",
        fuxictr("fmfm", {"interaction.kernel": "vector"}),
        embedding_l2=1e-05,
        net_l2=1e-05,
        published={"auc": 0.974947, "log_loss": 0.200439, "parameters": 59730},
    )
