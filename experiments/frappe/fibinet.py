"""FiBiNET on Frappe_x1 with the settings of BARS."""

from __future__ import annotations

from ctrlib.experiment import Experiment
from experiments.frappe.common import frappe, fuxictr


def experiment() -> Experiment:
    """The whole run."""
    return frappe(
        "fibinet",
        fuxictr("fibinet", {"interaction.blocks.1.dropout": "0.3"}),
        embedding_l2=0.05,
        published={"auc": 0.983182, "log_loss": 0.194074, "parameters": 743480},
    )
