"""FinalNet, one block, on Frappe_x1 with the settings of BARS."""

from __future__ import annotations

from ctrlib.experiment import Experiment
from experiments.frappe.common import frappe, fuxictr


def experiment() -> Experiment:
    """The whole run."""
    return frappe(
        "final_net_1b",
        fuxictr(
            "final_net_1b",
            {"block.block1.hidden_units": "400,400", "block.block1.activation": "relu", "block.block1.dropout": "0.2"},
        ),
        embedding_l2=0.1,
        published={"auc": 0.985223, "log_loss": 0.136554, "parameters": 256791},
    )
