"""BST against the formula place by place; positions, the cut-off, and what is read of the sequence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from ctrlib.config import ConfigError
from ctrlib.embedding import FeatureEmbedding
from ctrlib.interactions.mlp import MLP
from ctrlib.models.bst import BST
from tests.models.histories import LAYOUT, TWO_LABELS, behaviours, rows, with_behaviours
from tests.models.small import awake, make
from tests.reference import bst as reference


def bst(layout: Any = LAYOUT, **options: Any) -> BST:
    chosen: dict[str, Any] = {
        "embedding": FeatureEmbedding.Config(dim=4, init_std=0.5),
        "interaction": MLP.Config(hidden_units=(6,)),
        "num_heads": 2,
        "ffn_dim": 5,
        "max_length": 3,
    }
    return cast(BST, awake(make(BST.Config(**(chosen | options)), layout)))


def weights(layer: nn.Module) -> dict[str, Any]:
    """The matrices of a layer in float64."""
    found: dict[str, Any] = {}
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear | nn.LayerNorm):
            arrays = [p.detach().double().numpy() for p in module.parameters()]
            found[name.replace("ffn.0", "ffn_in").replace("ffn.2", "ffn_out")] = arrays if len(arrays) > 1 else arrays[0]
    return found


def test_is_the_formula() -> None:
    model, batch = bst(num_layers=2), rows(4, lengths=[0, 2, 3, 5])
    x_BLW, there_BL = model.sequence(batch)
    assert there_BL.sum(1).tolist() == [1, 3, 4, 4]
    tokens = model.tokens(batch)[:, -12:].reshape(4, 4, 12).detach().double().numpy()
    shown = model.explain(batch)
    for b in range(4):
        count = int(there_BL[b].sum())
        y = x_BLW[b, :count].detach().double().numpy()
        for i, layer in enumerate(model.layers):
            attended = reference.attention(y, weights(layer)["query"], weights(layer)["key"], 2)
            np.testing.assert_allclose(shown[f"history/attention/{i}"][b, :, :count, :count], attended, rtol=0, atol=1e-5)
            y = reference.layer(y, weights(layer), 2)
        np.testing.assert_allclose(tokens[b, :count], y, rtol=1e-4, atol=1e-5)
        assert not tokens[b, count:].any()


def test_what_the_first_layer_reads() -> None:
    model, batch = bst(), rows(3, lengths=[5, 1, 0])
    x_BLW, _ = model.sequence(batch)
    h_NW = model.embedding.behaviours(batch, "history").x_NAD.flatten(1)
    c_BW = model.embedding.targets(batch, "history").flatten(1)
    for b, at in ((0, [4, 3, 2]), (1, [5])):
        expected = torch.cat([c_BW[b : b + 1], h_NW[at]]) + model.position[: 1 + len(at)]
        torch.testing.assert_close(x_BLW[b, : 1 + len(at)], expected)
    assert model.places == ("target", "recent_0", "recent_1", "recent_2")


def test_order_matters_and_what_is_long_ago_does_not() -> None:
    model, batch = bst(), rows(4, lengths=[4, 4, 4, 4])
    expected, lists = model(batch).logits, behaviours(batch)
    turned = model(with_behaviours(batch, [row[::-1] for row in lists])).logits
    assert (turned - expected).abs().min() > 1e-4
    cut = model(with_behaviours(batch, [row[1:] for row in lists])).logits
    torch.testing.assert_close(cut, expected)
    longer = model(with_behaviours(batch, [[row[2], *row] for row in lists])).logits
    torch.testing.assert_close(longer, expected)


@pytest.mark.parametrize(("read", "places"), [("concat", 4), ("target", 1), ("mean", 1)])
def test_what_is_read(read: str, places: int) -> None:
    model, batch = bst(read=read), rows(5)
    tokens = model.tokens(batch)
    assert tokens.shape == (5, 6 + 3 * places, 4)
    if read == "mean":
        other = bst(read="concat")
        there_BL = other.sequence(batch)[1]
        outputs = other.tokens(batch)[:, 6:].reshape(5, 4, 12)
        torch.testing.assert_close(tokens[:, 6:].flatten(1), outputs.sum(1) / there_BL.sum(1, keepdim=True))
    logits = model(rows(6, lengths=[0] * 6)).logits
    assert logits.isfinite().all()
    assert len(set(logits.tolist())) == 6


def test_several_labels() -> None:
    assert bst(TWO_LABELS)(rows(3, num_labels=2)).logits.shape == (3, 2)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="BST reads a history of behaviours, but the data has none"):
        bst(replace(LAYOUT, histories=()))
    with pytest.raises(ConfigError, match=r"num_heads is 5, which does not divide .* 12 \(3 attributes of width 4\)"):
        bst(num_heads=5)
    fields = ("user", "hour", "hist_item", "hist_category")
    with pytest.raises(ConfigError, match=r"BST compares .* expected both of: hist_item and item, hist_category and category"):
        bst(embedding=FeatureEmbedding.Config(dim=4, fields=fields))
    with pytest.raises(ConfigError, match=r"'targt'.*did you mean 'target'"):
        BST.Config(read=cast(Any, "targt"))
    for options in ({"max_length": 0}, {"num_layers": 0}, {"ffn_dim": 0}):
        with pytest.raises(ConfigError, match=rf"BST\.{next(iter(options))} is 0"):
            BST.Config(**cast(dict[str, Any], options))
