"""Gates of values under every preset: open they change nothing, closed they are padding; and their numbers by hand."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from ctrlib.batch import Batch, Ragged
from ctrlib.config import ConfigError
from ctrlib.embedding import FeatureEmbedding
from ctrlib.interactions.fm import FM
from ctrlib.interactions.inner_product import InnerProduct
from ctrlib.losses import total_loss
from ctrlib.models.ctr import CTRModel, ModelComponent
from ctrlib.models.presets import PRESETS, Flavour, preset
from ctrlib.optim import OptimizerConfig, build_optimizer
from ctrlib.schema import BatchLayout, SequenceColumn, SparseColumn
from ctrlib.search.gates import ClosedGates, GatedModel, Gates, ValueGates, embeddings
from tests.models.small import LAYOUT, awake, make, rows, shrunk

CASES = [(name, flavour) for name, p in PRESETS.items() for flavour in p.flavours]
every_model = pytest.mark.parametrize(("name", "flavour"), CASES)
SIZES = {"user": 9, "item": 12, "hour": 5}
S = 1.6065306597  # 1/σ(½)
# Gates by τ (rows) and logit (columns) with g_c⁰ = ½, from the specification.
LOGITS = (0.5, 0.1, 0.01, 0.0, -0.01, -0.1)
GOLDEN = {
    1: (1, 0.843395, 0.807282, 0.803265, 0.799249, 0.763135),
    10: (1.595778, 1.174468, 0.843395, 0.803265, 0.763135, 0.432063),
    100: (1.606531, 1.606458, 1.174468, 0.803265, 0.432063, 7.3e-5),
    1000: (1.606531, 1.606531, 1.606458, 0.803265, 7.3e-5, 0.0),
}


def model(name: str, flavour: Flavour = "paper") -> ModelComponent:
    return awake(make(shrunk(preset(name, flavour))))


def some_values(seed: int = 0) -> dict[str, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    rng = np.random.default_rng(seed)
    kept = {name: np.append([False, True, False], rng.random(size - 3) < 0.5) for name, size in SIZES.items()}
    kept["hour"][:] = False  # a whole field
    return kept


def without(batch: Batch, values: dict[str, np.ndarray[tuple[int], np.dtype[np.bool_]]]) -> Batch:
    """The rows with padding in the place of dropped values."""
    tables = {name: torch.from_numpy(kept) for name, kept in values.items()}
    columns = [batch.sparse[:, i] * tables[c.table][batch.sparse[:, i].long()] for i, c in enumerate(LAYOUT.sparse)]
    history = batch.sequences["history"]
    pruned = Ragged(history.values * tables["item"][history.values.long()], history.offsets)
    return replace(batch, sparse=torch.stack(columns, 1).to(torch.int32), sequences={"history": pruned})


@every_model
def test_open_gates_change_nothing(name: str, flavour: Flavour) -> None:
    m, batch = model(name, flavour), rows(7)
    expected, state = m(batch).logits, {key: value.clone() for key, value in m.state_dict().items()}
    gated = GatedModel(m, ValueGates(SIZES)).eval()
    torch.testing.assert_close(gated(batch).logits, expected, rtol=1e-6, atol=1e-6)
    assert gated(batch).auxiliary == {}
    assert m.state_dict().keys() == state.keys()
    assert all(torch.equal(m.state_dict()[key], value) for key, value in state.items())
    assert {"gates.logits", "gates.temperature"} <= gated.state_dict().keys()
    assert [n for n, _ in m.named_parameters() if "gate.logits" in n] == []


# not of OptInter, whose crosses are made of the ids: those of a dropped value would change
@pytest.mark.parametrize(("name", "flavour"), [case for case in CASES if not case[0].startswith("optinter")])
def test_closed_gates_are_padding(name: str, flavour: Flavour) -> None:
    m, batch, values = model(name, flavour), rows(9), some_values()
    expected = m(without(batch, values)).logits
    assert (m(batch).logits - expected).abs().max() > 1e-3
    gated = GatedModel(m, ClosedGates(values)).eval()
    torch.testing.assert_close(gated(batch).logits, expected, rtol=1e-6, atol=1e-6)


@every_model
def test_every_gate_of_a_value_in_the_batch_has_a_data_gradient(name: str, flavour: Flavour) -> None:
    # shared by all embeddings of the model; MaskNet and the like may cancel single ones, hence many rows
    gates = ValueGates(SIZES)
    gated, batch = GatedModel(model(name, flavour), gates).eval(), rows(300)
    total_loss(gated(batch), batch).backward()  # type: ignore[no-untyped-call]
    assert gates.logits.grad is not None
    assert gates.logits.grad.isfinite().all()
    assert gates.logits.grad[0] == 0
    for i, column in enumerate(LAYOUT.sparse):
        there = np.unique(batch.sparse[:, i].numpy())
        assert (gates.by_value(gates.logits.grad)[column.table][there[there > 0] - 1] != 0).all(), column.name


@pytest.mark.parametrize("temperature", GOLDEN)
def test_golden_gates(temperature: int) -> None:
    gates = ValueGates({"a": 4, "b": 5}).double()
    assert gates.scale == pytest.approx(S, abs=1e-10)
    with torch.no_grad():
        gates.logits[1:7, 0] = torch.tensor(LOGITS)
        gates.temperature.fill_(temperature)
    shown = gates(torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int32))
    assert shown.shape == (2, 3, 1)
    np.testing.assert_allclose(shown.flatten().detach(), GOLDEN[temperature], atol=1e-6)
    assert gates(torch.tensor([0])).item() == 1  # nothing gates padding


def test_numbers_of_gates() -> None:
    gates = Gates({"a": 4, "b": 3})
    assert (gates.count, gates.first) == (5, {"a": 0, "b": 3})
    parts = gates.by_value(torch.arange(6))
    assert {name: part.tolist() for name, part in parts.items()} == {"a": [1, 2, 3], "b": [4, 5]}


def test_kept_are_logits_above_zero() -> None:
    gates = ValueGates({"a": 4, "b": 3})
    with torch.no_grad():
        gates.logits[:, 0] = torch.tensor([9.0, 1e-6, -1.0, 0.0, -1e-6, 2.0])
    assert {name: kept.tolist() for name, kept in gates.kept().items()} == {
        "a": [False, True, False, False],
        "b": [False, False, True],
    }


def test_each_vocabulary_has_its_own_gates_and_others_none() -> None:
    """``hour`` is not gated; ``item`` is, under both its column and the sequence that shares it."""
    m, batch = model("dnn"), rows(8)
    gates = ValueGates({"item": 12, "user": 9})
    with torch.no_grad():
        gates.logits[1:, 0] = torch.linspace(-2, 2, gates.count)
    plain = m.embedding(batch)
    GatedModel(m, gates)
    shown, names = m.embedding(batch), m.embedding.out.names
    for name, ids in (("user", batch.sparse[:, 0]), ("item", batch.sparse[:, 1])):
        numbers = torch.where(ids > 0, ids + gates.first[name], 0)
        at = names.index(name)
        torch.testing.assert_close(shown[:, at], plain[:, at] * gates(numbers))
    for name in ("hour", "price", "age", "time"):
        at = names.index(name)
        assert torch.equal(shown[:, at], plain[:, at])
    history, rows_of = batch.sequences["history"], m.embedding.vocabularies["item"]
    numbers = torch.where(history.values > 0, history.values + gates.first["item"], 0)
    scaled_ND = rows_of[history.values.long()] * gates(numbers)
    for b in range(8):
        stretch = slice(int(history.offsets[b]), int(history.offsets[b + 1]))
        own = scaled_ND[stretch][history.values[stretch] > 0]
        expected = own.mean(0) if len(own) else torch.zeros(4)
        torch.testing.assert_close(shown[b, names.index("history")], expected)


@pytest.mark.parametrize("pooling", ["mean", "sum", "max"])
@pytest.mark.parametrize("sparse", [False, True])
def test_pooling_leaves_dropped_values_out(pooling: str, sparse: bool) -> None:
    layout = BatchLayout(sequences=(SequenceColumn("tags", 6, "tags", pooling),))  # type: ignore[arg-type]
    embedding = FeatureEmbedding(FeatureEmbedding.Config(dim=3), layout)
    table = embedding.vocabularies["tags"]
    with torch.no_grad():
        table[1:] = torch.randn(5, 3)
    if sparse:
        build_optimizer(embedding, OptimizerConfig())
    kept = np.array([False, False, True, False, True, True])
    embedding.attach({"tags": 0}, ClosedGates({"tags": kept}, scale=2.0).__call__)
    ragged = Ragged(torch.tensor([1, 2, 4, 3, 0, 5, 3, 1], dtype=torch.int32), torch.tensor([0, 4, 6, 8], dtype=torch.int32))
    batch = Batch(sparse=torch.zeros(3, 0, dtype=torch.int32), dense=torch.zeros(3, 0), sequences={"tags": ragged})
    both = torch.stack([table[2], table[4]]) * 2
    first = {"mean": both.mean(0), "sum": both.sum(0), "max": both.amax(0)}[pooling]
    torch.testing.assert_close(embedding(batch)[:, 0].detach(), torch.stack([first, 2 * table[5], torch.zeros(3)]))


def test_token_dropout_reads_the_gate_of_oov() -> None:
    layout = BatchLayout(sparse=(SparseColumn("a", 6, "a"),))
    embedding = FeatureEmbedding(FeatureEmbedding.Config(dim=2, token_dropout=0.999999), layout).train()
    embedding.attach({"a": 0}, ClosedGates({"a": np.array([False, False, True, True, True, True])}).__call__)
    batch = Batch(sparse=torch.full((4, 1), 3, dtype=torch.int32), dense=torch.zeros(4, 0))
    assert not embedding(batch).any()
    assert embedding.eval()(batch).all()


def test_widths_and_frozen_tables_are_gated() -> None:
    config = FeatureEmbedding.Config(dim=4, dims={"item": 3}, frozen=("user",))
    embedding, batch = FeatureEmbedding(config, LAYOUT), rows(6)
    embedding.load_pretrained("user", np.arange(9, dtype=np.int32), np.ones((9, 4), np.float32))
    plain, gates = embedding(batch), ClosedGates({name: np.arange(size) > 0 for name, size in SIZES.items()}, scale=3.0)
    embedding.attach(gates.first, gates.__call__)
    names = [embedding.out.names.index(name) for name in ("user", "item", "hour", "history")]
    torch.testing.assert_close(embedding(batch)[:, names], 3 * plain[:, names])


def test_gates_of_pairs_are_products_of_gates() -> None:
    """With inner products, gating the vectors is gating the pairs: g_i g_j ⟨e_i, e_j⟩. Three fields, ĝ = (1, 0, 1)."""
    layout = BatchLayout(sparse=tuple(SparseColumn(name, 4, name) for name in "abc"))
    config = CTRModel.Config(embedding=FeatureEmbedding.Config(dim=5, init_std=1.0), interaction=FM.Config(), head=None)
    m = cast(CTRModel, make(config, layout))
    batch = Batch(sparse=torch.tensor([[2, 3, 2]], dtype=torch.int32), dense=torch.zeros(1, 0))
    e_FD = m.embedding(batch)[0].detach()
    kept = {"a": [0, 1, 1, 0], "b": [0, 1, 1, 0], "c": [0, 1, 1, 1]}
    GatedModel(m, ClosedGates({name: np.array(k, dtype=bool) for name, k in kept.items()}, scale=S))
    torch.testing.assert_close(m(batch).logits[0], S**2 * (e_FD[0] @ e_FD[2]))

    gates = ValueGates({"a": 4, "b": 4, "c": 4})
    with torch.no_grad():
        gates.logits[1:, 0] = torch.randn(9)
        gates.temperature.fill_(3.0)
    g_F = gates(torch.tensor([0 + 2, 3 + 3, 6 + 2]))[:, 0]
    expected = sum(g_F[i] * g_F[j] * (e_FD[i] @ e_FD[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    GatedModel(m, gates)
    torch.testing.assert_close(m(batch).logits[0], expected)
    products = InnerProduct(InnerProduct.Config(), m.embedding.out).explain(m.embedding(batch))["product"][0]  # 12, 13, 23
    pairs = [g_F[i] * g_F[j] * (e_FD[i] @ e_FD[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    torch.testing.assert_close(products, torch.stack(pairs).detach())


def test_ipnn_answers_to_the_temperature() -> None:
    """In the released code IPNN asks for its gates without τ or ticket: neither has an effect."""
    gates, batch = ValueGates(SIZES), rows(5)
    gated = GatedModel(model("ipnn"), gates).eval()
    with torch.no_grad():
        gates.logits.add_(0.5 * torch.randn_like(gates.logits))
        before = gated(batch).logits
        gates.temperature.fill_(50.0)
    assert (gated(batch).logits - before).abs().min() > 1e-4
    ticket = GatedModel(model("ipnn"), ClosedGates(values := some_values()))
    tokens, names = ticket.model.embedding(batch), ticket.model.embedding.out.names
    dropped = ~torch.from_numpy(values["item"])[batch.sparse[:, 1].long()]
    assert dropped.any()
    assert not tokens[dropped, names.index("item")].any()
    assert not tokens[:, names.index("hour")].any()


def test_the_penalty_is_of_training_alone_and_reaches_every_value() -> None:
    gates, batch = ValueGates(SIZES), rows(4)
    gated = GatedModel(model("deepfm"), gates, strength=1e-3)
    with torch.no_grad():
        gates.logits[1:, 0] = torch.linspace(-1, 1, gates.count)
        gates.temperature.fill_(2.0)
    logits = gates.logits.detach().double()[1:, 0].numpy()
    opened = 1 / (1 + np.exp(-2 * logits))
    penalty = gated.train()(batch).auxiliary["gates"]
    assert penalty.item() == pytest.approx(1e-3 * opened.sum(), rel=1e-6)
    penalty.backward()  # type: ignore[no-untyped-call]
    gradient = cast(Tensor, gates.logits.grad)
    assert not gradient.is_sparse
    np.testing.assert_allclose(gradient[1:, 0], 1e-3 * 2 * opened * (1 - opened), rtol=1e-5)  # also of values not in the batch
    assert gated.eval()(batch).auxiliary == {}
    assert GatedModel(model("fm"), ValueGates(SIZES)).train()(batch).auxiliary == {}


def test_the_optimizer_of_the_weights_knows_no_gates() -> None:
    gates, batch = ValueGates(SIZES), rows(16)
    gated = GatedModel(model("dnn"), gates, strength=1e-3)
    config = OptimizerConfig(embedding="dense", embedding_l2=0.1, net_l2=0.1, weight_decay=0.1)
    optimizer = build_optimizer(gated.model, config)
    before = gates.logits.detach().clone()
    total_loss(gated.train()(batch), batch).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert torch.equal(gates.logits, before)


def test_evaluation_moves_nothing() -> None:
    gated, batch = GatedModel(model("dcn"), ValueGates(SIZES), strength=1e-3).eval(), rows(6)
    before = copy.deepcopy(gated.state_dict())
    for _ in range(3):
        gated(batch)
    assert all(torch.equal(value, before[key]) for key, value in gated.state_dict().items())


def test_gates_for_another_model_are_refused() -> None:
    m = model("dnn")
    with pytest.raises(ConfigError, match="'usr', which the model does not read; did you mean 'user'"):
        GatedModel(m, ValueGates({"usr": 9}))
    with pytest.raises(ConfigError, match="10 ids of vocabulary 'user', of which the model has 9"):
        GatedModel(m, ValueGates({"user": 10}))
    assert len(embeddings(model("fm"))) == 2
