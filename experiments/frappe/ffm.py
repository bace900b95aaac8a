"""FFM on Frappe_x1 with the settings of BARS."""

from __future__ import annotations

from ctrlib.experiment import Experiment
from experiments.frappe.common import frappe, fuxictr


def experiment() -> Experiment:
    """The whole run."""
    return frappe(
        "ffm",
        fuxictr("ffm", {}),
        embedding_l2=1e-06,
        net_l2=1e-06,
        published={"auc": 0.97862, "log_loss": 0.186032, "parameters": 490400},
    )
