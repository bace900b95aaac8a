"""FinalNetModel: the loss of its branches, and published parameter counts. The block itself is tested in tests/interactions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from ctrlib.config import ConfigError, override
from ctrlib.embedding import FeatureEmbedding
from ctrlib.interactions.final_net import FactorizedMLP, FinalNet
from ctrlib.losses import bce_loss, total_loss
from ctrlib.models.ctr import ModelComponent, build_model
from ctrlib.models.final_net import FinalNetModel
from ctrlib.models.presets import COMPONENTS, preset
from ctrlib.schema import BatchLayout, SparseColumn
from tests.models.small import LAYOUT, awake, make, rows
from tests.reference.final_net import losses

BLOCK = FinalNet.Config(
    block1=FactorizedMLP.Config(hidden_units=(6,), norm="none"), block2=FactorizedMLP.Config(hidden_units=(4,), norm="none")
)


def final_net(**options: Any) -> FinalNetModel:
    chosen: dict[str, Any] = {"embedding": FeatureEmbedding.Config(dim=4, init_std=0.5), "block": BLOCK}
    return cast(FinalNetModel, awake(make(FinalNetModel.Config(**(chosen | options)))))


def test_golden_losses() -> None:
    """y_1 = 1, y_2 = −.5, y = 1: ŷ = .562177."""
    expected = (0.575939, 0.751085, 0.755165)
    assert losses(1.0, -0.5, 1.0) == pytest.approx(expected, abs=1e-6)
    model = final_net().train()
    for linear, value in ((model.interaction.linear_1, 1.0), (model.interaction.linear_2, -0.5)):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.constant_(linear.bias, value)
    batch = replace(rows(3), labels=torch.ones(3, 1))
    output = model(batch)
    assert output.logits.sigmoid().tolist() == pytest.approx([0.562177] * 3, abs=1e-6)
    assert output.auxiliary["distillation"].item() == pytest.approx(expected[1] + expected[2], abs=1e-6)
    assert total_loss(output, batch).item() == pytest.approx(2.082190, abs=1e-6)


def test_loss_equals_the_formula_also_with_weights() -> None:
    model, batch = final_net().train(), rows(6)
    branches = model.interaction.branches(model.embedding(batch)).detach().double()
    each = torch.tensor([losses(float(a), float(b), 1.0)[1:] for a, b in branches]).sum(1)
    assert model(batch).auxiliary["distillation"].item() == pytest.approx(each.mean().item(), rel=1e-5)
    weight = torch.arange(6.0)
    weighted = model(replace(batch, weight=weight)).auxiliary["distillation"].item()
    assert weighted == pytest.approx((each * weight).sum().item() / weight.sum().item(), rel=1e-5)


def test_no_gradient_flows_into_the_mean_through_the_distillation() -> None:
    model, batch = final_net().train(), rows(6)
    assert batch.labels is not None
    parameters = list(model.parameters())
    found = torch.autograd.grad(total_loss(model(batch), batch), parameters)
    branches = model.interaction.branches(model.embedding(batch))
    mean = branches.mean(1)
    target = torch.tensor(mean.detach().sigmoid().tolist()).unsqueeze(1)  # numbers, no graph
    loss = bce_loss(mean, batch.labels) + sum(bce_loss(branches[:, s], target) for s in range(2))
    for one, two in zip(found, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(one, two)


def test_only_training_with_two_branches_has_the_loss() -> None:
    assert final_net().eval()(rows(3)).auxiliary == {}
    assert final_net(block=replace(BLOCK, block2=None)).train()(rows(3)).auxiliary == {}


def test_the_gate_starts_open_whatever_the_initialisation() -> None:
    config = FinalNetModel.Config(block=BLOCK, weight_init="xavier_normal")
    gate = cast(FinalNetModel, make(config)).interaction.gate
    assert gate is not None
    assert not gate.weight.any()
    assert (gate.bias == 1).all()


def test_several_labels() -> None:
    with pytest.raises(ConfigError, match="one logit, but the data has labels click, buy"):
        make(FinalNetModel.Config(block=BLOCK), replace(LAYOUT, labels=("click", "buy")))


def layout(*sizes: int) -> BatchLayout:
    return BatchLayout(tuple(SparseColumn(f"f{i}", size, f"f{i}") for i, size in enumerate(sizes)))


FRAPPE = layout(956, 4084, 9, 9, 4, 5, 4, 11, 82, 235)
MOVIELENS = layout(16_977, 23_606, 49_659)


def parameters(config: ModelComponent.Config, data: BatchLayout) -> int:
    return sum(p.numel() for p in build_model(config, data).parameters())


@pytest.mark.parametrize(("name", "expected"), [("final_net_1b", 256_791), ("final_net_2b", 338_502)])
def test_presets_have_the_published_parameters(name: str, expected: int) -> None:
    assert parameters(preset(name), FRAPPE) == expected


# What BARS changes of FuxiCTR's defaults.
FRAPPE_1B = {"block1.hidden_units": "400,400", "block1.activation": "relu", "block1.dropout": "0.2"}
FRAPPE_2B = {
    "block1.hidden_units": "400,400",
    "block1.activation": "relu",
    "block1.dropout": "0.1",
    "gate": "concat",
    "block2.hidden_units": "400",
    "block2.activation": "relu",
    "block2.dropout": "0.1",
}
MOVIELENS_1B = {"block1.hidden_units": "400", "block1.activation": "relu", "block1.dropout": "0.1"}
MOVIELENS_2B = {
    "block1.hidden_units": "400,400",
    "block1.activation": "relu",
    "gate": "concat",
    "block2.hidden_units": "500",
    "block2.activation": "relu",
}


@pytest.mark.parametrize(
    ("name", "changes", "data", "expected"),
    [
        ("final_net_1b", FRAPPE_1B, FRAPPE, 256_791),
        ("final_net_2b", FRAPPE_2B, FRAPPE, 338_502),
        ("final_net_1b", MOVIELENS_1B, MOVIELENS, 916_021),
        ("final_net_2b", MOVIELENS_2B, MOVIELENS, 1_106_234),
    ],
)
def test_bars_rows_from_the_fuxictr_flavour(name: str, changes: dict[str, str], data: BatchLayout, expected: int) -> None:
    config = override(preset(name, "fuxictr"), {f"block.{path}": value for path, value in changes.items()}, COMPONENTS)
    assert parameters(config, data) == expected
