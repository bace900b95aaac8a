"""DIN against the formula row by row; what it reads, refuses and shows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from ctrlib.config import ConfigError
from ctrlib.embedding import FeatureEmbedding
from ctrlib.interactions.autoint import AutoInt
from ctrlib.interactions.mlp import MLP
from ctrlib.models.behaviours import ActivationUnit, TargetAttention
from ctrlib.models.din import DIN
from ctrlib.models.presets import preset
from ctrlib.schema import HistoryColumn, SequenceColumn
from tests.models.histories import LAYOUT, TWO_LABELS, behaviours, rows, with_behaviours
from tests.models.small import awake, make
from tests.reference import behaviours as reference
from tests.reference.mlp import Layers, mlp

Array = npt.NDArray[np.float64]
EMBEDDING = FeatureEmbedding.Config(dim=4, init_std=0.5)
UNIT = ActivationUnit.Config(hidden_units=(5, 3), activation="tanh")


def din(layout: Any = LAYOUT, norm: Any = "none", **options: Any) -> DIN:
    chosen: dict[str, Any] = {
        "embedding": EMBEDDING,
        "attention": TargetAttention.Config(unit=UNIT, norm=norm),
        "interaction": MLP.Config(hidden_units=(6,)),
    }
    return cast(DIN, awake(make(DIN.Config(**(chosen | options)), layout)))


def layers(module: nn.Module) -> Layers:
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    weights = [m.weight.detach().double().numpy() for m in linears]
    return [(w, None if m.bias is None else m.bias.detach().double().numpy()) for w, m in zip(weights, linears, strict=True)]


@pytest.mark.parametrize("norm", ["none", "softmax", "sigmoid"])
def test_is_the_formula(norm: str) -> None:
    model, batch = din(norm=norm), rows(6)
    tokens = model.embedding(batch).detach().double().numpy()
    found = model.embedding.behaviours(batch, "history")
    h_NW = found.x_NAD.detach().flatten(1).double().numpy()
    c_BW = model.embedding.targets(batch, "history").detach().flatten(1).double().numpy()
    attention = cast(TargetAttention, model.attended.attention[0])
    expected = []
    for b, (first, last) in enumerate(zip(found.offsets_B1, found.offsets_B1[1:], strict=False)):
        pooled = reference.attend(h_NW[first:last], c_BW[b], layers(attention.unit), "tanh", norm)
        x = np.concatenate([tokens[b], pooled.reshape(3, 4)])
        hidden = mlp(x, layers(model.interaction), "relu", None)
        expected.append(float(mlp(hidden.reshape(1, -1), [], "relu", layers(model.head)[0])[0]))
    np.testing.assert_allclose(model(batch).logits.detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_tokens_are_fields_and_attended_attributes() -> None:
    model = din()
    assert model.embedding.out.names == ("user", "item", "category", "hour", "price", "tags")
    assert model.attended.out.names == ("hist_item", "hist_category", "hist_gap")
    assert model.tokens(rows(5)).shape == (5, 9, 4)
    names = din(interaction=AutoInt.Config(num_layers=1, head_dim=4)).axes["attention/0"][1]
    assert names == (*model.embedding.out.names, *model.attended.out.names)


def test_order_does_not_matter_but_the_candidate_does() -> None:
    model, batch = din(), rows(6)
    expected = model(batch).logits
    turned = with_behaviours(batch, [row[::-1] for row in behaviours(batch)])
    torch.testing.assert_close(model(turned).logits, expected, rtol=1e-5, atol=1e-6)
    pooled = model.attended(model.embedding, batch)
    moved = replace(batch, sparse=batch.sparse.clone())
    moved.sparse[:, 1] = moved.sparse[:, 1] % 11 + 1
    assert (model.attended(model.embedding, moved) - pooled)[1:].abs().amax(dim=(1, 2)).min() > 1e-4


def test_users_without_behaviours_get_different_scores() -> None:
    model, batch = din(), rows(6, lengths=[0] * 6)
    assert not model.attended(model.embedding, batch).any()
    logits = model(batch).logits
    assert logits.isfinite().all()
    assert len(set(logits.tolist())) == 6


def test_the_weights_of_recent_behaviours() -> None:
    model, batch = din(norm="softmax"), rows(4, lengths=[0, 1, 3, 60])
    assert model.axes["history/weight"][0][:2] == ("recent_0", "recent_1")
    shown = model.explain(batch)["history/weight"]
    assert shown.shape == (4, 50)
    assert not shown[0].any()
    torch.testing.assert_close(shown[:3].sum(1), torch.tensor([0.0, 1, 1]))
    assert (shown[2] != 0).tolist() == [True] * 3 + [False] * 47
    assert 0 < shown[3].sum() < 1  # ten more
    # the last behaviour comes first
    lists = behaviours(batch)
    lists[2] = [*lists[2][:2], lists[2][0]]
    again = model.explain(with_behaviours(batch, lists))["history/weight"][2]
    assert float(again[0]) == pytest.approx(float(again[2]), abs=1e-6)


HISTORY = LAYOUT.histories[0]
VIEWED = SequenceColumn("viewed", 12, "item", "mean", True)
TWO = replace(
    LAYOUT, sequences=(*LAYOUT.sequences, VIEWED), histories=(HISTORY, HistoryColumn("views", ("viewed",), ("item",)))
)


def test_several_histories() -> None:
    batch = rows(5)
    batch = replace(batch, sequences={**batch.sequences, "viewed": rows(5, seed=3).sequences["hist_item"]})
    both, one = din(TWO), din(TWO, histories=("views",))
    assert both.attended.out.names == ("hist_item", "hist_category", "hist_gap", "viewed")
    assert set(both.axes) == {"history/weight", "views/weight"}
    assert len(list(both.attended.attention)) == 2
    assert one.attended.out.names == ("viewed",)  # those of the other history are pooled as any sequence
    assert set(one.embedding.out.names) - set(both.embedding.out.names) == {"hist_item", "hist_category", "hist_gap"}
    for model in (both, one):
        assert model(batch).logits.shape == (5,)


def test_several_labels() -> None:
    assert din(TWO_LABELS)(rows(3, num_labels=2)).logits.shape == (3, 2)


def test_refusals() -> None:
    with pytest.raises(
        ConfigError, match="DIN reads a history of behaviours, but the data has none; declare one in the schema"
    ):
        din(replace(LAYOUT, histories=()))
    with pytest.raises(ConfigError, match="history 'histori', which the data lacks; did you mean 'history'"):
        din(histories=("histori",))
    with pytest.raises(ConfigError, match="histories is empty; name those that it is to read, or None for all"):
        din(histories=())
    lonely = replace(LAYOUT, histories=(replace(HISTORY, targets=(None, None, None)),))
    with pytest.raises(ConfigError, match=r"none of its fields \(hist_item, hist_category, hist_gap\) shares a vocabulary"):
        din(lonely)
    with pytest.raises(ConfigError, match=r"embedding.fields names none of its fields"):
        din(embedding=replace(EMBEDDING, fields=("user", "item")))
    for fields in (("user", "hist_item", "hist_category"), ("user", "item", "hist_category")):
        with pytest.raises(ConfigError, match=r"DIN compares .* both of: hist_item and item, hist_category and category"):
            din(embedding=replace(EMBEDDING, fields=fields))


def test_some_attributes_only() -> None:
    model = din(embedding=replace(EMBEDDING, fields=("user", "item", "hist_item")))
    assert model.attended.out.names == ("hist_item",)
    assert model(rows(4)).logits.shape == (4,)


def test_the_released_flavour() -> None:
    config = cast(DIN.Config, preset("din", "official"))
    assert (config.attention.norm, config.attention.scale) == ("softmax", True)
    model = cast(DIN, make(config, LAYOUT))
    assert cast(TargetAttention, model.attended.attention[0]).divisor == (3 * 64) ** 0.5
