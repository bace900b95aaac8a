"""DualMLP on Frappe_x1 with the settings of its authors; monitors AUC − log loss."""

from __future__ import annotations

from ctrlib.experiment import Experiment
from ctrlib.interactions.compose import Parallel
from ctrlib.interactions.mlp import MLP
from ctrlib.models.ctr import CTRModel
from experiments.frappe.common import EMBEDDING, frappe


def experiment() -> Experiment:
    """The whole run."""
    model = CTRModel.Config(
        embedding=EMBEDDING,
        weight_init="xavier_normal",
        interaction=Parallel.Config(
            streams=(
                MLP.Config(hidden_units=(400, 400, 400), norm="batch", dropout=0.2, output_dim=1),
                MLP.Config(hidden_units=(500, 500, 500), norm="batch", dropout=0.3, output_dim=1),
            ),
            fusion="sum",
        ),
        head=None,
    )
    return frappe(
        "dual_mlp",
        model,
        embedding_l2=0.05,
        monitor="auc-log_loss",
        published={"auc": 0.98465, "log_loss": 0.147083, "parameters": 972992},
    )
