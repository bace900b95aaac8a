"""AFN on Frappe_x1 with the settings of BARS."""

from __future__ import annotations

from ctrlib.experiment import Experiment
from experiments.frappe.common import frappe, fuxictr


def experiment() -> Experiment:
    """The whole run."""
    return frappe(
        "afn",
        fuxictr(
            "afn",
            {
                "interaction.blocks.0.num_neurons": "1000",
                "interaction.blocks.1.hidden_units": "400",
                "interaction.blocks.1.norm": "none",
                "interaction.blocks.1.dropout": "0.4",
            },
        ),
        embedding_l2=0.001,
        precision="bf16",
        published={"auc": 0.981099, "log_loss": 0.23309, "parameters": 4066711},
    )
