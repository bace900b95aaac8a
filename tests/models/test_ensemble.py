from __future__ import annotations

from dataclasses import replace

import torch

from ctrlib.batch import Batch
from ctrlib.interactions.mlp import MLP
from ctrlib.models.ensemble import EnsembleModel
from tests.models.small import LAYOUT, make, rows

CONFIG = EnsembleModel.Config(interaction=MLP.Config(hidden_units=(8,)), deep=MLP.Config(hidden_units=(6,)))
LABELS = replace(LAYOUT, labels=("click", "buy", "cart"))


def towers(model: EnsembleModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    deep = model.embedding if model.deep_embedding is None else model.deep_embedding
    return model.head(model.interaction(model.embedding(batch))), model.deep_head(model.deep(deep(batch)))


def ensemble(config: EnsembleModel.Config = CONFIG, layout: object = LAYOUT) -> EnsembleModel:
    model = make(config, layout)  # type: ignore[arg-type]
    assert isinstance(model, EnsembleModel)
    return model


def test_starts_as_the_mean_of_both() -> None:
    model, batch = ensemble(), rows(6)
    first, second = towers(model, batch)
    torch.testing.assert_close(model(batch).logits, (first + second).flatten() / 2)


def test_every_label_has_its_own_weights() -> None:
    model, batch = ensemble(layout=LABELS), rows(6)
    weight, bias = torch.randn(2, 3), torch.randn(3)
    model.weight_2T.data, model.bias_T.data = weight, bias
    first, second = (logits.detach() for logits in towers(model, batch))
    expected = [[weight[0, t] * first[b, t] + weight[1, t] * second[b, t] + bias[t] for t in range(3)] for b in range(6)]
    torch.testing.assert_close(model(batch).logits, torch.tensor(expected))


def test_tables_are_shared_only_where_asked() -> None:
    assert ensemble().deep_embedding is not None
    shared, batch = ensemble(replace(CONFIG, share_embedding=True)), rows(6)
    first, second = towers(shared, batch)
    assert shared.deep_embedding is None
    torch.testing.assert_close(shared(batch).logits, (first + second).flatten() / 2)


def test_frozen_tables_are_not_frozen_in_the_second_tower() -> None:
    model = ensemble(replace(CONFIG, embedding=replace(CONFIG.embedding, frozen=("user",))))
    assert model.deep_embedding is not None
    assert not all(p.requires_grad for p in model.embedding.parameters())
    assert all(p.requires_grad for p in model.deep_embedding.parameters())
