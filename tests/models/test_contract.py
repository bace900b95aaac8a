"""What holds for every preset in every flavour, shrunk to a few units, on data with every kind of column."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from ctrlib.batch import Batch, Ragged
from ctrlib.config import ConfigError, from_json, to_json
from ctrlib.losses import total_loss
from ctrlib.models.ctr import CTRModel, ModelComponent
from ctrlib.models.final_mlp import FinalMLPModel
from ctrlib.models.final_net import FinalNetModel
from ctrlib.models.presets import COMPONENTS, PRESETS, Flavour, preset
from ctrlib.schema import BatchLayout
from tests.models.small import LAYOUT, awake, make, rows, shrunk, take

CASES = [(name, flavour) for name, p in PRESETS.items() for flavour in p.flavours]
every_model = pytest.mark.parametrize(("name", "flavour"), CASES)
TWO_LABELS = replace(LAYOUT, labels=("click", "buy"))


def model(name: str, flavour: Flavour, layout: BatchLayout = LAYOUT, **changes: object) -> ModelComponent:
    return awake(make(shrunk(preset(name, flavour), **changes), layout))


def has_one_logit(config: ModelComponent.Config) -> bool:
    """Whether the model is of one label: its block makes the logit, or first-order weights are added to it."""
    if isinstance(config, CTRModel.Config):
        return config.head is None or config.first_order is not None
    return isinstance(config, FinalMLPModel.Config | FinalNetModel.Config)


def backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


@every_model
def test_logits_and_nothing_else(name: str, flavour: Flavour) -> None:
    output = model(name, flavour)(rows(7))
    assert output.logits.shape == (7,)
    assert output.logits.dtype == torch.float32
    assert output.logits.isfinite().all()
    assert output.auxiliary == {}


@every_model
def test_every_parameter_gets_a_gradient(name: str, flavour: Flavour) -> None:
    # In eval mode, where a bias before batch norm has an effect; without dead ReLUs to excuse a zero.
    m = model(name, flavour, activation="silu", projection_activation="none")
    backward(total_loss(m(rows(64)), rows(64)))
    assert [n for n, p in m.named_parameters() if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()] == []


@every_model
def test_training_reaches_every_parameter_too(name: str, flavour: Flavour) -> None:
    m = make(shrunk(preset(name, flavour))).train()
    backward(total_loss(m(rows(64)), rows(64)))
    assert [n for n, p in m.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@every_model
def test_rows_do_not_see_each_other(name: str, flavour: Flavour) -> None:
    m, batch = model(name, flavour), rows(5)
    expected = m(batch).logits
    torch.testing.assert_close(m(take(batch, [2, 0, 4])).logits, expected[[2, 0, 4]])
    moved = replace(batch, sparse=batch.sparse.clone(), dense=batch.dense.clone())
    moved.sparse[2] = (moved.sparse[2] + 1) % 5
    moved.dense[2] = 3.0
    shown = m(moved).logits
    assert (shown[2] - expected[2]).abs() > 1e-3
    torch.testing.assert_close(shown[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


@every_model
def test_batch_of_one_and_odd_batches(name: str, flavour: Flavour) -> None:
    # AFN's ε: while its norms have seen no data, powers of 1e-4 give logits of 1e6, in which float32's rounding shows.
    # Without ReLUs, all eight of which may be dead for several rows. FM of FGCNN adds up 200 products, rounded as the batch is.
    m, batch = model(name, flavour, eps=0.1, activation="silu"), rows(7)
    expected = m(batch).logits
    assert len(set(expected.tolist())) == 7
    torch.testing.assert_close(torch.cat([m(take(batch, [i])).logits for i in range(7)]), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(m(take(batch, [0, 1, 2])).logits, expected[:3], rtol=1e-4, atol=1e-5)


@every_model
def test_padding_has_no_effect(name: str, flavour: Flavour) -> None:
    m, batch = model(name, flavour), rows(5)
    ragged = batch.sequences["history"]
    lengths = ragged.offsets.diff() + 2
    values = [
        torch.cat([torch.zeros(1), ragged.values[ragged.offsets[i] : ragged.offsets[i + 1]], torch.zeros(1)]).to(torch.int32)
        for i in range(5)
    ]
    offsets = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32)
    padded = replace(batch, sequences={"history": Ragged(torch.cat(values), offsets)})
    torch.testing.assert_close(m(padded).logits, m(batch).logits)


@every_model
def test_config_survives_json(name: str, flavour: Flavour) -> None:
    config = shrunk(preset(name, flavour))
    again = from_json(json.loads(json.dumps(to_json(config))), ModelComponent.Config, COMPONENTS)
    assert again == config
    batch = rows(4)
    assert torch.equal(make(again)(batch).logits, make(config)(batch).logits)


@every_model
def test_state_dict_round_trip_is_exact(name: str, flavour: Flavour) -> None:
    m, batch = model(name, flavour), rows(9)
    m.train()(batch)  # moves the batch norm statistics
    m.eval()
    other = make(shrunk(preset(name, flavour)), seed=5)
    assert not torch.equal(other(batch).logits, m(batch).logits)
    other.load_state_dict(m.state_dict())
    assert torch.equal(other(batch).logits, m(batch).logits)


@every_model
def test_overfits_one_batch(name: str, flavour: Flavour) -> None:
    batch = rows(16)
    if name == "lr":  # can only learn what is separable: here, by the user
        batch = replace(batch, labels=(batch.sparse[:, :1] > 4).float())
    # Nothing but the labels is to be learned: AW-MoE's contrastive loss, of weight λ, draws masks anew in every step.
    config = shrunk(preset(name, flavour), dropout=0.0, hidden_units=[32, 32], fs_hidden_units=[32], weight=0.0)
    m = make(config).train()
    optimizer = torch.optim.Adam(m.parameters(), lr=0.05 if name == "lr" else 0.02)
    first = float(total_loss(m(batch), batch).detach())
    loss = first
    for _ in range(200):
        value = total_loss(m(batch), batch)
        loss = float(value.detach())
        if loss < 0.1 * first:
            break
        optimizer.zero_grad()
        backward(value)
        optimizer.step()
    assert loss < 0.1 * first


@every_model
def test_same_seed_same_losses(name: str, flavour: Flavour) -> None:
    def losses() -> list[float]:
        config = shrunk(preset(name, flavour))
        m = make(replace(config, embedding=replace(config.embedding, token_dropout=0.1, dropout=0.1))).train()
        optimizer = torch.optim.Adam(m.parameters(), lr=0.01)
        seen = []
        for step in range(3):
            batch = rows(16, seed=step)
            optimizer.zero_grad()
            loss = total_loss(m(batch), batch)
            backward(loss)
            optimizer.step()
            seen.append(float(loss.detach()))
        return seen

    assert losses() == losses()


@every_model
def test_bf16_autocast(name: str, flavour: Flavour) -> None:
    m, batch = model(name, flavour), rows(32)
    expected = m(batch).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        shown = m(batch).logits
        loss = total_loss(m.train()(batch), batch)
    backward(loss)
    assert (shown.float() - expected).abs().max() <= 0.05 * expected.abs().max()
    assert all(p.grad is None or p.grad.isfinite().all() for p in m.parameters())


@every_model
def test_several_labels(name: str, flavour: Flavour) -> None:
    config = shrunk(preset(name, flavour))
    if has_one_logit(config):
        with pytest.raises(ConfigError, match=r"one logit.*click, buy|click, buy.*one logit"):
            make(config, TWO_LABELS)
        return
    m, batch = awake(make(config, TWO_LABELS)), rows(6, num_labels=2)
    logits = m(batch).logits
    assert logits.shape == (6, 2)
    assert not torch.isclose(logits[:, 0], logits[:, 1]).any()
    assert total_loss(m(batch), batch).isfinite()


@every_model
def test_explains_each_row(name: str, flavour: Flavour) -> None:
    m, batch = model(name, flavour), rows(5)
    expected = m(batch).logits
    m.train()
    shown = m.explain(batch)
    assert all(module.training for module in m.modules())
    assert {name: value.shape for name, value in shown.items()} == {
        name: (5, *map(len, labels)) for name, labels in m.axes.items()
    }
    for key, value in m.explain(take(batch, [2, 0, 4])).items():
        torch.testing.assert_close(value, shown[key][[2, 0, 4]])
        assert not value.requires_grad
    torch.testing.assert_close(m.eval()(batch).logits, expected)


@every_model
def test_compiles_to_one_graph(name: str, flavour: Flavour) -> None:
    torch.compiler.reset()  # models share a __call__, and only so many compiled versions of one function are kept
    m, batch = model(name, flavour), rows(5)
    compiled = torch.compile(m, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(batch).logits, m(batch).logits)


class Exported(nn.Module):
    """Tensors in, tensor out: what an exported program may have."""

    def __init__(self, m: ModelComponent) -> None:
        super().__init__()
        self.model = m

    def forward(self, sparse: Tensor, dense: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
        return self.model(Batch(sparse=sparse, dense=dense, sequences={"history": Ragged(values, offsets)})).logits


def inputs(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ragged = batch.sequences["history"]
    return batch.sparse, batch.dense, ragged.values, ragged.offsets


@every_model
def test_export_with_any_number_of_rows(name: str, flavour: Flavour) -> None:
    m = model(name, flavour)
    sizes = ({0: Dim.DYNAMIC}, {0: Dim.DYNAMIC}, {0: Dim.DYNAMIC}, {0: Dim.DYNAMIC})
    program = torch.export.export(Exported(m), inputs(rows(4)), dynamic_shapes=sizes).module()
    for count in (2, 9):
        batch = rows(count)
        torch.testing.assert_close(program(*inputs(batch)), m(batch).logits)
