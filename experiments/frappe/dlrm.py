"""DLRM (without dot products, so a plain MLP) on Frappe_x1 with the settings of BARS."""

from __future__ import annotations

from ctrlib.experiment import Experiment
from experiments.frappe.common import frappe, fuxictr


def experiment() -> Experiment:
    """The whole run."""
    return frappe(
        "dlrm",
        fuxictr("dnn", {"interaction.dropout": "0.4"}),
        embedding_l2=0.1,
        published={"auc": 0.984, "log_loss": 0.1444, "parameters": 417891},
    )
