"""CIN on Frappe_x1 with the settings of BARS."""

from __future__ import annotations

from ctrlib.experiment import Experiment
from experiments.frappe.common import frappe, fuxictr


def experiment() -> Experiment:
    """The whole run."""
    return frappe(
        "cin",
        fuxictr("cin", {}),
        embedding_l2=0.0005,
        published={"auc": 0.978241, "log_loss": 0.23522, "parameters": 147984},
    )
