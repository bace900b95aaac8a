"""HiformerModel: numbers as a few tokens, one tower per task token, and the parameter counts of the paper's tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from ctrlib.batch import embedding_parameters
from ctrlib.config import ConfigError
from ctrlib.embedding import FeatureEmbedding
from ctrlib.interactions.hiformer import Hiformer
from ctrlib.interactions.mlp import MLP
from ctrlib.losses import bce_loss
from ctrlib.models.ctr import build_model
from ctrlib.models.hiformer import HiformerModel
from ctrlib.models.presets import preset
from ctrlib.schema import BatchLayout, DenseColumn, SparseColumn
from tests.models.small import LAYOUT, make, rows

BLOCK = Hiformer.Config(num_heads=2, key_dim=2, value_dim=3, rank_key=3, rank_value=4)
TWO_LABELS = replace(LAYOUT, labels=("click", "buy"))


def hiformer(layout: BatchLayout = LAYOUT, **options: Any) -> HiformerModel:
    chosen: dict[str, Any] = {
        "embedding": FeatureEmbedding.Config(dim=4, init_std=0.5),
        "block": BLOCK,
        "num_dense_tokens": 2,
        "dense_mlp": MLP.Config(hidden_units=(5,)),
        "tower": MLP.Config(hidden_units=(6,), activation="silu"),
    }
    return cast(HiformerModel, make(HiformerModel.Config(**(chosen | options)), layout))


def test_all_numbers_share_the_dense_tokens() -> None:
    model = hiformer()
    assert model.embedding.out.names == ("user", "item", "hour", "history")
    assert model.dense is not None
    assert model.dense.out.names == ("dense_0", "dense_1")
    assert model.interaction.out.names == ("task_0",)
    assert len(model.interaction.tokens(torch.zeros(1, 6, 4))[0]) == 7
    first = cast(nn.Linear, model.dense.mlp.layers[0])
    assert first.in_features == 3 + 2  # price, age, time; whether age and whether time is missing
    dense = torch.tensor([[1.0, -2.0, 3.0]], requires_grad=True)
    for j in range(2):  # every dense token mixes all numbers
        (gradient,) = torch.autograd.grad(model.dense(dense)[0, j].square().sum(), dense)
        assert gradient.all()


def test_what_the_dense_network_reads() -> None:
    model = hiformer()
    assert model.dense is not None
    seen: list[Tensor] = []
    model.dense.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    nan = float("nan")
    model.dense(torch.tensor([[0.5, -1.0, 3.0], [nan, nan, nan]]))
    # a number as it comes; a position among 4 bins as its share; missing values, noted where training rows had some
    assert seen[0].squeeze(-1).tolist() == [[0.5, -1.0, 0.75, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 1.0]]


def test_numbers_may_have_a_token_each() -> None:
    model = hiformer(num_dense_tokens=None)
    assert model.dense is None
    assert model.embedding.out.num_fields == 7


def test_without_numbers_there_are_no_dense_tokens() -> None:
    assert hiformer(replace(LAYOUT, dense=())).dense is None
    model = hiformer(embedding=FeatureEmbedding.Config(dim=4, fields=("user", "price")))
    assert model.dense is not None
    assert model.dense.columns.tolist() == [0]
    assert model.embedding.out.names == ("user",)


def test_a_tower_for_each_label() -> None:
    model = hiformer(TWO_LABELS)
    assert model.interaction.out.names == ("task_0", "task_1")
    batch = rows(6, num_labels=2)
    assert batch.labels is not None
    loss = bce_loss(model(batch).logits[:, 0], batch.labels[:, :1])
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    touched = {name for name, gradient in zip(named, gradients, strict=True) if gradient is not None and gradient.any()}
    assert any(name.startswith("towers.0") for name in touched)
    assert not any(name.startswith("towers.1") for name in touched)


def test_logits_come_from_the_task_tokens() -> None:
    for prune in (True, False):
        model = hiformer(TWO_LABELS, block=replace(BLOCK, prune_last=prune))
        batch = rows(5, num_labels=2)
        assert model.dense is not None
        y_BLD = model.interaction(torch.cat([model.embedding(batch), model.dense(batch.dense)], dim=1))
        for k in range(2):
            expected = model.towers[k](y_BLD[:, -2 + k].unsqueeze(1))[:, 0, 0]
            torch.testing.assert_close(model(batch).logits[:, k], expected)


def test_config_errors() -> None:
    with pytest.raises(ConfigError, match=r"HiformerModel\.num_dense_tokens is 0"):
        HiformerModel.Config(num_dense_tokens=0)
    for name in ("tower", "dense_mlp"):
        with pytest.raises(ConfigError, match=rf"HiformerModel\.{name}\.output_dim is 1; expected None"):
            HiformerModel.Config(**{name: MLP.Config(output_dim=1)})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="numbers only; set num_dense_tokens to None"):
        hiformer(BatchLayout(dense=(DenseColumn("price"),)))


PAPER = BatchLayout(
    sparse=tuple(SparseColumn(f"c{i}", 3, f"c{i}") for i in range(31)), dense=tuple(DenseColumn(f"d{i}") for i in range(30))
)


@pytest.mark.parametrize(
    ("name", "changes", "millions"),
    [
        ("hiformer", {"rank_key": None, "rank_value": None}, 59.95),
        ("hiformer", {}, 16.68),
        ("hetero_att", {"num_layers": 1}, 2.36),
        ("hetero_att", {}, 10.50),
    ],
)
def test_the_parameters_of_the_paper(name: str, changes: dict[str, Any], millions: float) -> None:
    """31 categories, 30 numbers in 6 tokens, one task token. The map of the numbers and the tower are not in the paper's notes;
    with one hidden layer each, as wide as their outputs, all four counts of tables 1 and 2 come out."""
    config = cast(HiformerModel.Config, preset(name))
    model = build_model(replace(config, block=replace(config.block, **changes)), PAPER)
    tables = sum(p.numel() for p in embedding_parameters(model))
    total = sum(p.numel() for p in model.parameters()) - tables
    expected = {59.95: 59_950_593, 16.68: 16_680_449, 2.36: 2_360_833, 10.50: 10_498_305}[millions]
    assert total == expected
    assert round(total / 1e6, 2) == millions
