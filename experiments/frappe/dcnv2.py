"""DCN-V2 (parallel) on Frappe_x1 with the settings of BARS."""

from __future__ import annotations

from ctrlib.experiment import Experiment
from ctrlib.interactions.compose import Parallel
from ctrlib.interactions.cross_net import CrossNetV2
from ctrlib.interactions.mlp import MLP
from ctrlib.models.ctr import CTRModel, Head
from experiments.frappe.common import EMBEDDING, frappe


def experiment() -> Experiment:
    """The whole run."""
    model = CTRModel.Config(
        embedding=EMBEDDING,
        weight_init="xavier_normal",
        interaction=Parallel.Config(
            streams=(CrossNetV2.Config(num_layers=4), MLP.Config(hidden_units=(400, 400, 400), norm="batch", dropout=0.4)),
            fusion="concat",
        ),
        head=Head.Config(),
    )
    return frappe(
        "dcnv2",
        model,
        embedding_l2=0.05,
        published={"auc": 0.984478, "log_loss": 0.149149, "parameters": 458391},
    )
