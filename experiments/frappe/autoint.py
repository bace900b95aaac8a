"""AutoInt on Frappe_x1 with the settings of BARS: 6 layers, 4 heads of 32."""

from __future__ import annotations

from ctrlib.experiment import Experiment
from ctrlib.interactions.autoint import AutoInt
from ctrlib.models.ctr import CTRModel, Head
from experiments.frappe.common import EMBEDDING, frappe


def experiment() -> Experiment:
    """The whole run."""
    model = CTRModel.Config(
        embedding=EMBEDDING,
        weight_init="xavier_normal",
        interaction=AutoInt.Config(num_layers=6, num_heads=4, head_dim=32, residual="linear_if_needed", head_split="rows"),
        head=Head.Config(),
    )
    return frappe(
        "autoint",
        model,
        embedding_l2=0.05,
        precision="bf16",
        published={"auc": 0.983085, "log_loss": 0.163684, "parameters": 306051},
    )
