"""FinalMLP on Frappe_x1 with the settings of its authors: gates by user and item."""

from __future__ import annotations

from ctrlib.experiment import Experiment
from ctrlib.interactions.final_mlp import FinalMLP
from ctrlib.interactions.mlp import MLP
from ctrlib.models.final_mlp import FinalMLPModel
from experiments.frappe.common import EMBEDDING, frappe


def experiment() -> Experiment:
    """The whole run."""
    model = FinalMLPModel.Config(
        embedding=EMBEDDING,
        weight_init="xavier_normal",
        block=FinalMLP.Config(
            mlp1=MLP.Config(hidden_units=(400,), norm="batch", dropout=0.4),
            mlp2=MLP.Config(hidden_units=(100,), norm="batch", dropout=0.4),
            fs_hidden_units=(400,),
            num_heads=5,
        ),
        context_1=("user",),
        context_2=("item",),
    )
    return frappe(
        "final_mlp",
        model,
        embedding_l2=0.05,
        published={"auc": 0.986072, "log_loss": 0.148415, "parameters": 253392},
    )
