"""DESTINE on Frappe_x1 with the settings of BARS."""

from __future__ import annotations

from ctrlib.experiment import Experiment
from experiments.frappe.common import frappe, fuxictr


def experiment() -> Experiment:
    """The whole run."""
    return frappe(
        "destine",
        fuxictr(
            "destine_plus",
            {
                "first_order": "null",
                "interaction.streams.0.blocks.0.num_layers": "4",
                "interaction.streams.0.blocks.0.num_heads": "1",
                "interaction.streams.0.blocks.0.head_dim": "128",
                "interaction.streams.0.blocks.0.scale": "true",
                "interaction.streams.0.blocks.0.attention_dropout": "0",
                "interaction.streams.1.dropout": "0.2",
            },
        ),
        embedding_l2=0.05,
        published={"auc": 0.985629, "log_loss": 0.143421, "parameters": 623346},
    )
