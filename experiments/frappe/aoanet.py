"""AOANet on Frappe_x1 with the settings of BARS."""

from __future__ import annotations

from ctrlib.experiment import Experiment
from experiments.frappe.common import frappe, fuxictr


def experiment() -> Experiment:
    """The whole run."""
    return frappe(
        "aoanet",
        fuxictr(
            "aoanet",
            {
                "interaction.streams.0.num_layers": "1",
                "interaction.streams.0.num_subspaces": "2",
                "interaction.streams.1.dropout": "0.3",
            },
        ),
        embedding_l2=0.1,
        published={"auc": 0.9844, "log_loss": 0.142379, "parameters": 418331},
    )
