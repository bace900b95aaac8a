"""AutoInt+ on Frappe_x1 with the settings of BARS: 5 layers, 4 heads of 32, layer norm, scaled scores."""

from __future__ import annotations

from ctrlib.experiment import Experiment
from ctrlib.interactions.autoint import AutoInt
from ctrlib.interactions.compose import Parallel, Stack
from ctrlib.interactions.linear import Linear
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
                Stack.Config(
                    blocks=(
                        AutoInt.Config(
                            num_layers=5,
                            num_heads=4,
                            head_dim=32,
                            residual="linear_if_needed",
                            head_split="rows",
                            scale=True,
                            norm="before_relu",
                            attention_dropout=0.1,
                        ),
                        Linear.Config(),
                    )
                ),
                MLP.Config(hidden_units=(400, 400, 400), norm="batch", dropout=0.1, output_dim=1),
            ),
            fusion="sum",
        ),
        head=None,
    )
    return frappe(
        "autoint_plus",
        model,
        embedding_l2=0.1,
        precision="bf16",
        published={"auc": 0.984812, "log_loss": 0.149007, "parameters": 622180},
    )
