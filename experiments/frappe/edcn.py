"""EDCN on Frappe_x1 with the settings of BARS."""

from __future__ import annotations

from ctrlib.experiment import Experiment
from experiments.frappe.common import frappe, fuxictr


def experiment() -> Experiment:
    """The whole run."""
    return frappe(
        "edcn",
        fuxictr("edcn", {"interaction.temperature": "5", "interaction.dropout": "0.3"}),
        embedding_l2=0.05,
        published={"auc": 0.985012, "log_loss": 0.15474, "parameters": 86351},
    )
