"""FinalNet, two blocks, on Frappe_x1 with the settings of BARS."""

from __future__ import annotations

from ctrlib.experiment import Experiment
from experiments.frappe.common import frappe, fuxictr


def experiment() -> Experiment:
    """The whole run."""
    return frappe(
        "final_net_2b",
        fuxictr(
            "final_net_2b",
            {
                "block.block1.hidden_units": "400,400",
                "block.block1.activation": "relu",
                "block.block1.dropout": "0.1",
                "block.gate": "concat",
                "block.block2.hidden_units": "400",
                "block.block2.activation": "relu",
                "block.block2.dropout": "0.1",
            },
        ),
        embedding_l2=0.1,
        published={"auc": 0.985744, "log_loss": 0.13107, "parameters": 338502},
    )
