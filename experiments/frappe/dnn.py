"""MLP on Frappe_x1 with the settings of BARS."""

from __future__ import annotations

from ctrlib.experiment import Experiment
from ctrlib.interactions.mlp import MLP
from ctrlib.models.ctr import CTRModel
from experiments.frappe.common import EMBEDDING, frappe


def experiment() -> Experiment:
    """The whole run."""
    model = CTRModel.Config(
        embedding=EMBEDDING,
        weight_init="xavier_normal",
        interaction=MLP.Config(hidden_units=(400, 400, 400), norm="batch", dropout=0.2, output_dim=1),
        head=None,
    )
    return frappe(
        "dnn",
        model,
        embedding_l2=0.05,
        published={"auc": 0.983323, "log_loss": 0.162229, "parameters": 781892},
        note="the logged model had two copies of the MLP, ours has the one of the public class (417,891 parameters)",
    )
