"""AFM on Frappe_x1 with the settings of BARS."""

from __future__ import annotations

from ctrlib.experiment import Experiment
from experiments.frappe.common import frappe, fuxictr


def experiment() -> Experiment:
    """The whole run."""
    return frappe(
        "afm",
        fuxictr(
            "afm",
            {
                "interaction.blocks.0.attention_dim": "128",
                "interaction.blocks.0.attention_dropout": "0.1",
                "interaction.blocks.0.dropout": "0.1",
            },
        ),
        embedding_l2=1e-05,
        published={"auc": 0.969733, "log_loss": 0.226424, "parameters": 60826},
    )
