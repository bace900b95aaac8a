"""DCN on Frappe_x1 with the settings of BARS."""

from __future__ import annotations

from ctrlib.experiment import Experiment
from ctrlib.interactions.compose import Parallel
from ctrlib.interactions.cross_net import CrossNet
from ctrlib.interactions.mlp import MLP
from ctrlib.models.ctr import CTRModel, Head
from experiments.frappe.common import EMBEDDING, frappe


def experiment() -> Experiment:
    """The whole run."""
    model = CTRModel.Config(
        embedding=EMBEDDING,
        weight_init="xavier_normal",
        interaction=Parallel.Config(
            streams=(CrossNet.Config(num_layers=3), MLP.Config(hidden_units=(400, 400, 400), norm="batch", dropout=0.2)),
            fusion="concat",
        ),
        head=Head.Config(),
    )
    return frappe(
        "dcn",
        model,
        embedding_l2=0.05,
        published={"auc": 0.983907, "log_loss": 0.15266, "parameters": 418591},
    )
