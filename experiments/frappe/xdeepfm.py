"""xDeepFM on Frappe_x1 with the settings of BARS."""

from __future__ import annotations

from ctrlib.experiment import Experiment
from experiments.frappe.common import frappe, fuxictr


def experiment() -> Experiment:
    """The whole run."""
    return frappe(
        "xdeepfm",
        fuxictr("xdeepfm", {"interaction.streams.1.dropout": "0.2"}),
        embedding_l2=0.1,
        published={"auc": 0.984507, "log_loss": 0.146604, "parameters": 429809},
    )
