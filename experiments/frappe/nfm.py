"""NFM on Frappe_x1 with the settings of BARS."""

from __future__ import annotations

from ctrlib.experiment import Experiment
from experiments.frappe.common import frappe, fuxictr


def experiment() -> Experiment:
    """The whole run."""
    return frappe(
        "nfm",
        fuxictr("nfm", {"interaction.blocks.1.norm": "none", "interaction.blocks.1.dropout": "0.4"}),
        embedding_l2=0.0001,
        published={"auc": 0.980409, "log_loss": 0.205795, "parameters": 384880},
    )
