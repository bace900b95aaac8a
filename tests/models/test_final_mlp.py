"""FinalMLPModel: gates that read fields through tables of their own. The block itself is tested in tests/interactions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from ctrlib.batch import Batch, embedding_parameters
from ctrlib.config import ConfigError
from ctrlib.embedding import FeatureEmbedding
from ctrlib.interactions.final_mlp import FinalMLP
from ctrlib.interactions.mlp import MLP
from ctrlib.losses import add_embedding_l2
from ctrlib.models.final_mlp import FinalMLPModel
from tests.models.small import LAYOUT, awake, make, rows

STREAM = MLP.Config(hidden_units=(6,))
BLOCK = FinalMLP.Config(mlp1=STREAM, mlp2=STREAM, fs_hidden_units=(5,), num_heads=2)


def final_mlp(**options: Any) -> FinalMLPModel:
    embedding = FeatureEmbedding.Config(dim=4, init_std=0.5)
    config = FinalMLPModel.Config(**({"embedding": embedding, "block": BLOCK} | options))
    return cast(FinalMLPModel, make(config))


def gates(model: FinalMLPModel, batch: Batch) -> dict[str, Tensor]:
    return model.explain(batch)


def test_without_contexts_one_gate_for_all_rows_and_exactly_one_at_the_start() -> None:
    model = final_mlp(weight_init="xavier_normal")
    batch = rows(5)
    for name in ("gate_1", "gate_2"):
        assert (gates(model, batch)[name] == 1).all()
    plain = final_mlp(block=replace(BLOCK, use_fs=False), weight_init="xavier_normal")
    shared = {name: value for name, value in model.state_dict().items() if name in plain.state_dict()}
    assert set(shared) == set(plain.state_dict())
    plain.load_state_dict(shared)
    torch.testing.assert_close(model(batch).logits, plain(batch).logits)
    moved = gates(cast(FinalMLPModel, awake(model)), batch)["gate_1"]
    assert (moved == moved[0]).all()
    assert (moved != 1).any()


def test_gate_changes_with_the_context_alone() -> None:
    model = final_mlp(context_1=("user",), context_2=("item", "history"))
    batch = rows(4)
    other_item = batch.sparse.clone()
    other_item[:, 1] = (other_item[:, 1] + 1) % 12
    before, after = gates(model, batch), gates(model, replace(batch, sparse=other_item))
    assert torch.equal(before["gate_1"], after["gate_1"])
    assert (before["gate_2"] != after["gate_2"]).any(dim=1).all()
    for name in ("gate_1", "gate_2"):
        assert ((before[name] > 0) & (before[name] < 2)).all()


def test_contexts_have_tables_of_their_own() -> None:
    model = final_mlp(context_1=("user",), context_2=("item", "history"))
    assert model.context_1 is not None
    assert model.context_2 is not None
    assert model.context_2.out.names == ("item", "history")
    assert [len(table) for table in embedding_parameters(model)] == [9 + 12 + 5, 9, 12]
    batch = rows(4)
    before = gates(model, batch)
    model.embedding.tables[0].rows.weight.data.add_(1.0)  # type: ignore[operator, union-attr]
    assert torch.equal(before["gate_1"], gates(model, batch)["gate_1"])
    model.context_1.tables[0].rows.weight.data.add_(1.0)  # type: ignore[operator, union-attr]
    after = gates(model, batch)
    assert (before["gate_1"] != after["gate_1"]).any()
    assert torch.equal(before["gate_2"], after["gate_2"])


def test_embedding_l2_covers_the_contexts_tables() -> None:
    model = final_mlp(context_1=("user",), context_2=("item",))
    tables = embedding_parameters(model)
    add_embedding_l2(tables, 0.5, "full_table")
    assert len(tables) == 3
    for table in tables:
        assert table.grad is not None
        np.testing.assert_allclose(table.grad.numpy(), 0.5 * table.detach().numpy(), rtol=1e-6)
        assert table.grad.any()


def test_contexts_of_pretrained_vocabularies_are_trained() -> None:
    # Their rows start as zero vectors and pretrained ones go into the main tables: frozen, the gate would never see the field.
    embedding = FeatureEmbedding.Config(dim=4, init_std=0.5, frozen=("user",), dims={"user": 3})
    model = final_mlp(embedding=embedding, context_1=("user",))
    assert model.context_1 is not None
    assert all(p.requires_grad for p in model.context_1.parameters())
    shown = gates(model, replace(rows(2), sparse=torch.tensor([[2, 2, 2], [3, 2, 2]], dtype=torch.int32)))["gate_1"]
    assert not torch.equal(shown[0], shown[1])


def test_a_context_may_be_a_field_that_the_streams_do_not_read() -> None:
    embedding = FeatureEmbedding.Config(dim=4, fields=("item", "price"))
    model = final_mlp(embedding=embedding, context_1=("user",))
    assert model.embedding.out.names == ("item", "price")
    assert model(rows(3)).logits.shape == (3,)


def test_without_gates_contexts_have_no_tables() -> None:
    model = final_mlp(block=replace(BLOCK, use_fs=False), context_1=("user",))
    assert len(embedding_parameters(model)) == 1
    assert model(rows(3)).logits.shape == (3,)


def test_errors() -> None:
    with pytest.raises(ConfigError, match=r"reads field 'usr', which the data lacks; did you mean 'user'\?"):
        final_mlp(context_2=("usr",))
    with pytest.raises(ConfigError, match="one logit, but the data has labels click, buy"):
        make(FinalMLPModel.Config(block=BLOCK), replace(LAYOUT, labels=("click", "buy")))
