"""Factorization machine on Frappe_x1 with the settings of BARS: L2 5e-6 on every parameter."""

from __future__ import annotations

from ctrlib.experiment import Experiment
from ctrlib.models.presets import fm
from experiments.frappe.common import frappe


def experiment() -> Experiment:
    """The whole run."""
    return frappe(
        "fm",
        fm("fuxictr"),
        embedding_l2=5e-6,
        net_l2=5e-6,
        published={"auc": 0.967108, "log_loss": 0.206515, "parameters": 59280},
    )
