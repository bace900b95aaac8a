"""FiGNN on Frappe_x1 with the settings of BARS."""

from __future__ import annotations

from ctrlib.experiment import Experiment
from experiments.frappe.common import frappe, fuxictr


def experiment() -> Experiment:
    """The whole run."""
    return frappe(
        "fignn",
        fuxictr("fignn", {"interaction.blocks.0.num_layers": "17", "interaction.blocks.0.gru": "false"}),
        embedding_l2=0.001,
        published={"auc": 0.976115, "log_loss": 0.203715, "parameters": 89090},
    )
