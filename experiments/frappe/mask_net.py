"""MaskNet (parallel) on Frappe_x1 with the settings of BARS."""

from __future__ import annotations

from ctrlib.experiment import Experiment
from experiments.frappe.common import frappe, fuxictr


def experiment() -> Experiment:
    """The whole run."""
    return frappe(
        "mask_net",
        fuxictr("mask_net_parallel", {"interaction.blocks.0.dropout": "0.1", "interaction.blocks.1.dropout": "0.1"}),
        embedding_l2=0.1,
        published={"auc": 0.983683, "log_loss": 0.16958, "parameters": 571691},
    )
