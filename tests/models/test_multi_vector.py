"""MultiVectorModel: several vectors per value, side by side in one table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from ctrlib.batch import embedding_parameters
from ctrlib.config import ConfigError
from ctrlib.embedding import FeatureEmbedding
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.compose import Stack
from ctrlib.interactions.fgcnn import FGCNN
from ctrlib.interactions.field_weighted import FwFM
from ctrlib.interactions.hofm import HOFM
from ctrlib.interactions.mlp import MLP
from ctrlib.models.ctr import CTRModel, Head, build_model
from ctrlib.models.multi_vector import MultiVectorModel
from ctrlib.models.presets import preset
from tests.models.small import LAYOUT, awake, make, rows, shrunk


def model(**options: Any) -> MultiVectorModel:
    embedding = FeatureEmbedding.Config(dim=4, init_std=0.5)
    config = MultiVectorModel.Config(**({"embedding": embedding, "interaction": MLP.Config(hidden_units=(6,))} | options))
    return cast(MultiVectorModel, make(config))


@pytest.mark.parametrize(("vectors", "count"), [(1, 1), (3, 3), ("others", 6), ("fields", 7)])
def test_width_of_the_tokens(vectors: Any, count: int) -> None:
    m = model(vectors=vectors)
    assert m.embedding(rows(5)).shape == (5, 7, 4 * count)
    assert [tuple(table.shape) for table in embedding_parameters(m)] == [(9 + 12 + 5, 4 * count)]


def test_counts_the_fields_that_are_embedded() -> None:
    embedding = FeatureEmbedding.Config(dim=4, fields=("item", "price", "user"))
    assert model(embedding=embedding, vectors="others").embedding(rows(2)).shape == (2, 3, 8)
    assert model(embedding=replace(embedding, fields=("item",)), vectors="others").embedding(rows(2)).shape == (2, 1, 4)


def test_one_vector_is_a_ctr_model() -> None:
    m = model(vectors=1)
    plain = make(CTRModel.Config(embedding=m.config.embedding, interaction=m.config.interaction, head=Head.Config()))
    assert torch.equal(m(rows(5)).logits, plain(rows(5)).logits)


def test_config_is_the_one_given_so_that_it_can_be_built_again() -> None:
    m = model(vectors=3)
    assert m.config.embedding.dim == 4
    again = build_model(m.config, LAYOUT)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in m.named_parameters()}


def test_first_order_has_one_weight_per_value() -> None:
    m = cast(MultiVectorModel, make(shrunk(preset("fgcnn_deepfm"))))
    assert m.first_order is not None
    assert cast(FeatureEmbedding, m.first_order[0])(rows(3)).shape == (3, 7, 1)


def test_fgcnn_generates_from_the_second_vectors_and_classifies_the_first() -> None:
    m = cast(MultiVectorModel, awake(make(shrunk(preset("fgcnn_ipnn")))))
    block = cast(FGCNN, m.interaction.blocks[0])  # type: ignore[index]
    (table,) = embedding_parameters(m)
    before = block(m.embedding(rows(5)))
    assert before.shape[2] == 4
    table.data[:, 4:] += 0.5
    after = block(m.embedding(rows(5)))
    assert torch.equal(after[:, :7], before[:, :7])
    assert (after[:, 7:] != before[:, 7:]).any()
    table.data[:, :4] += 0.5
    assert torch.equal(block(m.embedding(rows(5)))[:, 7:], after[:, 7:])


@pytest.mark.parametrize(
    ("interaction", "reads"),
    [
        (HOFM.Config(order=5), 4),
        (HOFM.Config(order=3, share_embedding=True), 1),
        (FwFM.Config(linear="value"), 2),
        (FGCNN.Config(share_embedding=True), 1),
        (Stack.Config(blocks=(FGCNN.Config(share_embedding=False), MLP.Config(hidden_units=(4,)))), 2),
    ],
    ids=str,
)
def test_blocks_that_read_another_number_of_vectors(interaction: Interaction.Config, reads: int) -> None:
    with pytest.raises(ConfigError, match=f"vectors is 12, 12 per value here, but the interaction reads {reads}; set vectors"):
        model(vectors=12, interaction=interaction)


def test_errors() -> None:
    with pytest.raises(ConfigError, match="vectors is 0; expected a number above 0"):
        MultiVectorModel.Config(vectors=0)
