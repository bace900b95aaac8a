"""DeepFM on Frappe_x1 with the settings of BARS."""

from __future__ import annotations

from ctrlib.experiment import Experiment
from ctrlib.interactions.compose import Parallel
from ctrlib.interactions.fm import FM
from ctrlib.interactions.linear import FirstOrder
from ctrlib.interactions.mlp import MLP
from ctrlib.models.ctr import CTRModel
from experiments.frappe.common import EMBEDDING, frappe


def experiment() -> Experiment:
    """The whole run."""
    model = CTRModel.Config(
        embedding=EMBEDDING,
        weight_init="xavier_normal",
        interaction=Parallel.Config(
            streams=(FM.Config(), MLP.Config(hidden_units=(400, 400, 400), norm="batch", dropout=0.2, output_dim=1)),
            fusion="sum",
        ),
        head=None,
        first_order=FirstOrder.Config(bias=False),
    )
    return frappe(
        "deepfm",
        model,
        embedding_l2=0.05,
        published={"auc": 0.984243, "log_loss": 0.148174, "parameters": 423280},
    )
