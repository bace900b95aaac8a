"""ARM-Net on Frappe_x1 with one head of ten neurons, as in the authors' repository (their splits differ, hence the note)."""

from __future__ import annotations

from ctrlib.config import override
from ctrlib.experiment import Experiment
from ctrlib.models.presets import COMPONENTS, preset
from experiments.frappe.common import frappe

OPTIONS = {"num_heads": "1", "num_neurons": "10", "bilinear": "shared", "scale": "true", "alpha": "1.7"}


def experiment() -> Experiment:
    """The whole run."""
    options = {f"interaction.blocks.0.{name}": value for name, value in OPTIONS.items()}
    return frappe(
        "arm_net",
        override(
            preset("arm_net", "official"),
            {**options, "interaction.blocks.1.hidden_units": "300,300", "embedding.dim": "10"},
            COMPONENTS,
        ),
        published={"auc": 0.9777, "parameters": 177421},
        note="published for other splits of the same rows",
    )
