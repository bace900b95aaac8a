"""Logistic regression on Frappe_x1 with the settings of BARS: L2 1e-5 on every parameter."""

from __future__ import annotations

from ctrlib.experiment import Experiment
from ctrlib.models.presets import lr
from experiments.frappe.common import frappe


def experiment() -> Experiment:
    """The whole run."""
    return frappe(
        "lr",
        lr("fuxictr"),
        embedding_l2=1e-5,
        net_l2=1e-5,
        published={"auc": 0.935584, "log_loss": 0.307643, "parameters": 5390},
    )
