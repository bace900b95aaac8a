"""HOFM on Frappe_x1 with the settings of BARS, but for 100 epochs at a constant learning rate.

With a patience of 2 the runs stop after a few epochs, on a plateau that no public run ended on.
"""

from __future__ import annotations

from ctrlib.experiment import Experiment
from experiments.frappe.common import frappe, fuxictr


def experiment() -> Experiment:
    """The whole run."""
    return frappe(
        "hofm",
        fuxictr("hofm", {}),
        embedding_l2=1e-06,
        net_l2=1e-06,
        patience=None,
        schedule="constant",
        published={"auc": 0.974228, "log_loss": 0.207269, "parameters": 113170},
        note="100 epochs at a constant learning rate",
    )
