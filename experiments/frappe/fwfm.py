"""FwFM on Frappe_x1 with the settings of BARS."""

from __future__ import annotations

from ctrlib.experiment import Experiment
from experiments.frappe.common import frappe, fuxictr


def experiment() -> Experiment:
    """The whole run."""
    return frappe(
        "fwfm",
        fuxictr("fwfm", {"interaction.linear": "value", "vectors": "2"}),
        embedding_l2=5e-06,
        net_l2=5e-06,
        published={"auc": 0.977585, "log_loss": 0.202971, "parameters": 107826},
    )
