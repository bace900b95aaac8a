"""SAM on Frappe_x1 with the settings of BARS."""

from __future__ import annotations

from ctrlib.experiment import Experiment
from experiments.frappe.common import frappe, fuxictr


def experiment() -> Experiment:
    """The whole run."""
    return frappe(
        "sam",
        fuxictr(
            "sam",
            {
                "interaction.kind": "sam3a",
                "interaction.num_layers": "4",
                "interaction.residual": "true",
                "interaction.dropout": "0.2",
            },
        ),
        embedding_l2=0.05,
        published={"auc": 0.98012, "log_loss": 0.173521, "parameters": 58791},
    )
