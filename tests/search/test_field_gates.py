"""Gates on fields: open they are not there, closed the field is not there, under every preset."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from ctrlib.config import ConfigError
from ctrlib.models.hiformer import HiformerModel
from ctrlib.models.presets import PRESETS, preset
from ctrlib.search.field_gates import FieldGates
from ctrlib.training import predict
from tests.models.small import LAYOUT, awake, make, rows, shrunk, take


@pytest.mark.parametrize("name", PRESETS)
def test_under_every_preset(name: str) -> None:
    config = shrunk(preset(name))
    if PRESETS[name].needs_history:
        with (
            pytest.raises(ConfigError, match="no embedding of the model reads field 'history'"),
            FieldGates(LAYOUT.names).on(make(config)),
        ):
            pass
        return
    if isinstance(config, HiformerModel.Config):
        with (
            pytest.raises(ConfigError, match="no embedding of the model reads field 'price'"),
            FieldGates(LAYOUT.names).on(make(config)),
        ):
            pass
        config = replace(config, num_dense_tokens=None)
    model, batch = awake(make(config)), rows(6)
    expected, keys = model(batch).logits, list(model.state_dict())
    gates = FieldGates(LAYOUT.names)
    with gates.on(model):
        torch.testing.assert_close(model(batch).logits, expected, rtol=0, atol=0)
        assert list(model.state_dict()) == keys

        gates.values_F = torch.full_like(gates.values_F, 0.5)
        half = model(batch).logits
        assert not torch.allclose(half, expected)

        gates.values_F = torch.ones(len(LAYOUT.names))
        gates.values_F[[LAYOUT.names.index(name) for name in ("user", "price", "history")]] = 0
        closed = model(batch).logits
        moved = replace(
            batch, sparse=batch.sparse.clone(), dense=batch.dense.clone(), sequences=take(batch, [5, 4, 3, 2, 1, 0]).sequences
        )
        moved.sparse[:, 0] = (moved.sparse[:, 0] + 3) % 9
        moved.dense[:, 0] = 2.5
        torch.testing.assert_close(model(moved).logits, closed, rtol=0, atol=0)
        moved.sparse[:, 1] = (moved.sparse[:, 1] + 3) % 12  # an open field
        assert not torch.allclose(model(moved).logits, closed)
    torch.testing.assert_close(model(batch).logits, expected, rtol=0, atol=0)
    assert not [m for m in model.modules() if m._forward_hooks]


def test_gradient_of_a_gate_by_hand() -> None:
    """The logit of logistic regression is b + Σ g_f w_f, so ∂/∂g_f = w_f."""
    model, batch = awake(make(preset("lr"))), rows(4)
    gates = FieldGates(LAYOUT.names)
    gates.values_F.requires_grad_()
    with gates.on(model):
        (grad_F,) = torch.autograd.grad(model(batch).logits.sum(), [gates.values_F])
    tokens_F = model.embedding(batch).sum(dim=(0, 2))
    order = [LAYOUT.names.index(name) for name in model.embedding.out.names]
    torch.testing.assert_close(grad_F[order], tokens_F)


def test_an_evaluation_moves_no_gate() -> None:
    model = make(shrunk(preset("deepfm")))
    gates = FieldGates(LAYOUT.names)
    gates.values_F = torch.rand(len(LAYOUT.names))
    before = gates.values_F.clone()
    with gates.on(model):
        first, second = (predict(model, [rows(5), rows(7)]).logits for _ in range(2))
    assert (first == second).all()
    assert torch.equal(gates.values_F, before)


def test_gone_after_an_error() -> None:
    model = make(shrunk(preset("deepfm")))
    with pytest.raises(KeyboardInterrupt), FieldGates(LAYOUT.names).on(model):
        raise KeyboardInterrupt
    assert not [m for m in model.modules() if m._forward_hooks]


def test_errors() -> None:
    gates = FieldGates(["user", "item", "hour", "price", "age", "times", "history"])
    message = "reads field 'time', which is not among the fields to look at; did you mean 'times'"
    with pytest.raises(ConfigError, match=message), gates.on(make(preset("lr"))):
        pass
    with pytest.raises(ConfigError, match="no embedding of the model reads field 'user'"), gates.on(nn.Linear(1, 1)):
        pass
