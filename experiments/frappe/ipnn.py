"""IPNN on Frappe_x1 with the settings of BARS."""

from __future__ import annotations

from ctrlib.experiment import Experiment
from experiments.frappe.common import frappe, fuxictr


def experiment() -> Experiment:
    """The whole run."""
    return frappe(
        "ipnn",
        fuxictr("ipnn", {"interaction.blocks.1.dropout": "0.3"}),
        embedding_l2=0.05,
        patience=3,
        published={"auc": 0.984122, "log_loss": 0.154003, "parameters": 433491},
    )
