"""What models show of rows: the interaction's, by place, and first-order weights."""

from __future__ import annotations

import torch

from ctrlib.interactions.pairs import pair_labels
from ctrlib.models.final_mlp import FinalMLPModel
from ctrlib.models.hiformer import HiformerModel
from ctrlib.models.presets import preset
from tests.models.small import LAYOUT, awake, make, rows, shrunk

NAMES = LAYOUT.names


def test_fm_is_the_sum_of_what_it_shows() -> None:
    model, batch = awake(make(preset("fm"))), rows(6)
    shown = model.explain(batch)
    assert model.axes == {"pair": (pair_labels(NAMES),), "first_order/field": (NAMES,)}
    constant = model.get_parameter("first_order.1.bias")
    torch.testing.assert_close(shown["pair"].sum(1) + shown["first_order/field"].sum(1) + constant, model(batch).logits)


def test_lr_shows_what_every_field_adds() -> None:
    model, batch = awake(make(preset("lr"))), rows(6)
    assert model.axes == {"field": (NAMES,)}
    constant = model.get_parameter("interaction.bias")
    torch.testing.assert_close(model.explain(batch)["field"].sum(1) + constant, model(batch).logits)


def test_names_begin_with_the_place() -> None:
    model = make(shrunk(preset("autoint_plus")))
    assert list(model.axes) == [f"streams.0/blocks.0/attention/{i}" for i in range(3)]
    assert model.axes["streams.0/blocks.0/attention/0"] == (("head_0", "head_1"), NAMES, NAMES)
    assert make(shrunk(preset("dnn"))).explain(rows(3)) == {}


def test_an_ensemble_shows_its_first_tower() -> None:
    model = make(shrunk(preset("arm_net_plus")))
    shown = model.explain(rows(3))
    assert list(shown) == ["blocks.0/gates", "blocks.0/weights"]
    torch.testing.assert_close(shown["blocks.0/gates"].sum(2), torch.ones(3, 16))


def test_hiformer_names_dense_and_task_tokens() -> None:
    model = make(shrunk(preset("hiformer")))
    assert isinstance(model, HiformerModel)
    ((_, asking, read),) = model.axes.values()
    assert asking == ("task_0",)
    assert read == (*model.embedding.out.names, *(f"dense_{i}" for i in range(6)), "task_0")


def test_final_mlp_gates_read_their_contexts() -> None:
    config = shrunk(preset("final_mlp"))
    assert isinstance(config, FinalMLPModel.Config)
    model = awake(make(FinalMLPModel.Config(embedding=config.embedding, block=config.block, context_1=("user",))))
    gates = model.explain(rows(6))["gate_1"]
    assert gates.shape == (6, len(NAMES), 4)
    assert (gates != gates[0]).any()
