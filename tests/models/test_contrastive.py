"""Contrastive models: views, the loss's closed forms, ids of cold users and items, and the plain model with λ = 0."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ctrlib import artifact
from ctrlib.batch import Batch
from ctrlib.config import ConfigError, from_json, override, to_json
from ctrlib.data.encoder import Encoder
from ctrlib.export import export
from ctrlib.interactions.fm import FM
from ctrlib.interactions.mlp import MLP
from ctrlib.losses import total_loss
from ctrlib.models.catgcn import CatGCN
from ctrlib.models.contrastive import (
    Contrast,
    ContrastConfig,
    Contrasted,
    ContrastiveModel,
    Identity,
    KnownIds,
    contrastive,
    view,
)
from ctrlib.models.ctr import CTRModel, ModelComponent, build_model
from ctrlib.models.presets import COMPONENTS, preset
from ctrlib.ranking import Ranker
from ctrlib.schema import BatchLayout, History, Schema, SequenceColumn, SequenceField, SparseColumn, SparseField
from tests.models.small import LAYOUT, crossed, make, rows, shrunk, with_crosses

NAMES = LAYOUT.names
PLAIN = CTRModel.Config(interaction=MLP.Config(hidden_units=(8,), dropout=0.2))


def plain(name: str) -> CTRModel.Config:
    config = shrunk(preset(name))
    assert type(config) is CTRModel.Config
    return config


def loss_of(config: ContrastConfig, x_BFD: Tensor, ids_BF: Tensor | None = None) -> float:
    """λ·L of an encoder that returns its tokens."""
    count = x_BFD.shape[0]
    layout = BatchLayout(sparse=tuple(SparseColumn(f"f{i}", 100, f"f{i}") for i in range(x_BFD.shape[1])))
    names = [c.name for c in layout.sparse]
    ids_BF = torch.arange(2, count + 2).view(-1, 1).repeat(1, x_BFD.shape[1]) if ids_BF is None else ids_BF
    batch = Batch(sparse=ids_BF.int(), dense=torch.zeros(count, 0))
    return float(Contrast(config, names, (), names, layout)(batch, x_BFD, lambda x: x))


def whole(temperature: float) -> ContrastConfig:
    """Views that leave nothing out."""
    return ContrastConfig(weight=1.0, temperature=temperature, field_mask=0.0, id_mask=0.0, feature_dropout=0.0)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_identical_orthonormal_views(temperature: float) -> None:
    """−ln(e^{1/τ} / (e^{1/τ} + B − 1))"""
    count = 6
    expected = -math.log(math.exp(1 / temperature) / (math.exp(1 / temperature) + count - 1))
    assert loss_of(whole(temperature), torch.eye(count).unsqueeze(1)) == pytest.approx(expected, abs=1e-6)


def test_equal_vectors_give_log_b() -> None:
    assert loss_of(whole(0.2), torch.ones(7, 1, 3)) == pytest.approx(math.log(7), abs=1e-6)


def test_temperature_to_zero() -> None:
    """Nothing where the own view is the nearest, (s_other − s_own)/τ where another is."""
    assert loss_of(whole(1e-3), torch.eye(5).unsqueeze(1)) == pytest.approx(0, abs=1e-6)
    assert loss_of(whole(1e-5), torch.eye(5).unsqueeze(1)) == pytest.approx(0, abs=1e-6)


def test_only_the_first_rows_have_views() -> None:
    x_BFD = torch.randn(7, 1, 3)
    expected = loss_of(whole(0.2), x_BFD[:4])
    assert loss_of(replace(whole(0.2), rows=4), x_BFD) == pytest.approx(expected, abs=1e-6)
    assert loss_of(replace(whole(0.2), rows=9), x_BFD) == pytest.approx(loss_of(whole(0.2), x_BFD), abs=1e-6)
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    batch = Batch(sparse=torch.arange(2, 9, dtype=torch.int32).view(-1, 1), dense=torch.zeros(7, 0), weight=weight)
    layout = BatchLayout(sparse=(SparseColumn("f", 100, "f"),))
    contrast = Contrast(replace(whole(0.2), rows=4), ["f"], (), ["f"], layout)
    kept = torch.tensor([0, 2, 3])
    found = contrast(batch, x_BFD, lambda x: x)
    assert float(found) == pytest.approx(loss_of(whole(0.2), x_BFD[kept]), abs=1e-6)


def test_the_same_item_twice_is_no_negative() -> None:
    """Rows 0 and 1 are one item: neither stands in the denominator of the other."""
    x_BFD = torch.eye(3)[[0, 0, 1, 2]].unsqueeze(1)
    ids = torch.tensor([[5], [5], [6], [7]])
    e = math.exp(1 / 0.5)
    twice, once = -math.log(e / (e + 2)), -math.log(e / (e + 3))
    assert loss_of(whole(0.5), x_BFD, ids) == pytest.approx((2 * twice + 2 * once) / 4, abs=1e-6)
    assert loss_of(whole(0.5), x_BFD, torch.tensor([[5], [8], [6], [7]])) > loss_of(whole(0.5), x_BFD, ids) + 0.1


def test_rows_are_the_same_where_all_ids_agree() -> None:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(-3, 3, (200, 4), generator=g).int()
    layout = BatchLayout(sparse=tuple(SparseColumn(f"f{i}", 9, f"f{i}") for i in range(4)))
    batch = Batch(sparse=ids, dense=torch.zeros(200, 0))
    same = Identity(["f0", "f2", "f3"], (), layout).same(batch)
    assert same is not None
    assert torch.equal(same, (ids[:, None, [0, 2, 3]] == ids[None, :, [0, 2, 3]]).all(-1))
    assert same.sum() > 200
    assert Identity([], (), layout).same(batch) is None


def test_a_known_id_tells_rows_apart_whatever_else_changes() -> None:
    """User 5 at two hours is one user; the unknown ones (1) are told apart by what else is known of them."""
    layout = BatchLayout(sparse=tuple(SparseColumn(name, 9, name) for name in ("user", "hour", "item")))
    ids = torch.tensor([[5, 2, 7], [5, 3, 8], [6, 2, 9], [1, 2, 4], [1, 3, 4], [1, 3, 6]]).int()
    same = Identity(["user", "hour"], ("user", "item"), layout).same(Batch(sparse=ids, dense=torch.zeros(6, 0)))
    assert same is not None
    assert [pair for pair in same.nonzero().tolist() if pair[0] < pair[1]] == [[0, 1], [4, 5]]


def test_views_leave_out_fields_with_their_chance() -> None:
    torch.manual_seed(0)
    x_BFD = torch.ones(20_000, 4, 2)
    x_BFD[:, 3] = 0
    seen = view(x_BFD, torch.tensor([0.0, 0.25, 0.5, 0.5]), 0.0)
    shares = (seen != 0).any(-1).float().mean(0)
    torch.testing.assert_close(shares, torch.tensor([1.0, 0.75, 0.5, 0.0]), rtol=0, atol=0.02)
    assert set(seen.flatten().tolist()) == {0.0, 1.0}


def test_a_view_keeps_a_field_that_is_present() -> None:
    torch.manual_seed(0)
    x_BFD = torch.ones(5000, 3, 2)
    x_BFD[:, 2] = 0
    seen = view(x_BFD, torch.full((3,), 0.99), 0.0)
    assert (seen != 0).any(-1).any(-1).all()
    assert view(torch.zeros(2, 3, 2), torch.full((3,), 0.5), 0.2).tolist() == torch.zeros(2, 3, 2).tolist()


def test_feature_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    seen = view(torch.ones(2000, 3, 8), torch.zeros(3), 0.2)
    assert sorted(set(seen.flatten().tolist())) == pytest.approx([0.0, 1.25], abs=2**-16)
    assert float(seen.mean()) == pytest.approx(1, abs=0.02)


def trained(config: ModelComponent.Config, steps: int = 5) -> tuple[dict[str, Tensor], list[float], Tensor]:
    """Weights, losses, and the state of the random numbers after some steps from a fixed seed."""
    torch.manual_seed(3)
    model = build_model(config, LAYOUT).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for step in range(steps):
        batch = rows(16, seed=step)
        optimizer.zero_grad()
        loss = total_loss(model(batch), batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return model.state_dict(), losses, torch.get_rng_state()


@pytest.mark.parametrize("name", ["dnn", "deepfm", "autoint", "dcnv2"])
def test_without_weight_it_is_the_plain_model_to_the_bit(name: str) -> None:
    config = plain(name)
    off = contrastive(config, ContrastConfig(weight=0.0), encoder=MLP.Config(hidden_units=(4,)))
    (weights, losses, state), (other_weights, other_losses, other_state) = trained(config), trained(off)
    assert losses == other_losses
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[key], other_weights[key]) for key in weights)
    assert torch.equal(state, other_state)


def test_with_weight_the_loss_is_there_in_training_only() -> None:
    model, batch = make(contrastive(PLAIN)), rows(16)
    assert model(batch).auxiliary == {}
    torch.testing.assert_close(model(batch).logits, make(PLAIN)(batch).logits, rtol=0, atol=0)
    auxiliary = model.train()(batch).auxiliary
    assert list(auxiliary) == ["contrastive"]
    assert 0 < float(auxiliary["contrastive"].detach()) < 0.1 * 2 * math.log(16)


def test_weight_scales_the_loss() -> None:
    def loss(weight: float) -> Tensor:
        model = make(contrastive(PLAIN, ContrastConfig(weight=weight))).train()
        torch.manual_seed(0)
        return model(rows(16)).auxiliary["contrastive"]

    torch.testing.assert_close(3 * loss(0.1), loss(0.3))


def test_two_groups_of_fields_are_two_losses() -> None:
    groups = (("user", "age"), ("item", "history"))
    model = make(contrastive(PLAIN, views_of=groups)).train()
    assert isinstance(model, ContrastiveModel)
    assert len(model.contrasts) == 2
    seen: list[Tensor] = []

    def encode(x_BFD: Tensor) -> Tensor:
        seen.append(x_BFD)
        return x_BFD

    x_BFD = torch.ones(16, len(NAMES), 16)
    for loss in model.contrasts:
        loss(rows(16), x_BFD, encode)
    for i, x in enumerate(seen):
        others = [j for j, name in enumerate(NAMES) if name not in groups[i // 2]]
        assert not x[:, others].any()
        assert x.any()


def test_an_encoder_of_its_own_leaves_the_interaction_alone() -> None:
    model = make(contrastive(plain("deepfm"), encoder=MLP.Config(hidden_units=(8,)))).train()
    model(rows(32)).auxiliary["contrastive"].backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None for p in model.interaction.parameters())
    assert all(p.grad is not None and p.grad.any() for p in model.embedding.tables.parameters())


class TestKnownIds:
    CONFIG = contrastive(
        CTRModel.Config(interaction=MLP.Config(hidden_units=(8,))), ContrastConfig(weight=0.0), id_fields=("item",)
    )

    def test_an_unseen_id_reads_no_row(self) -> None:
        """Neither in the forward pass nor in the gradient; not the OOV row either."""
        model, batch = make(self.CONFIG), rows(8)
        batch.sparse[:, 1] = 1
        batch = replace(batch, sequences={"history": replace(batch.sequences["history"], values=torch.zeros(
            len(batch.sequences["history"].values), dtype=torch.int32))})  # fmt: skip
        expected = model(batch).logits
        rows_of_item = model.embedding.vocabularies["item"]
        rows_of_item[1:] = 100.0
        torch.testing.assert_close(model(batch).logits, expected, rtol=0, atol=0)
        model.train()(batch).logits.sum().backward()  # type: ignore[no-untyped-call]
        (table,) = (p for name, p in model.named_parameters() if "tables" in name)
        assert table.grad is not None
        first = model.embedding.tables[0].first_row["item"]  # type: ignore[index]
        assert not table.grad[first : first + 12].any()
        assert table.grad.any()

    def test_padding_and_unseen_are_alike_and_known_ids_are_read(self) -> None:
        model, batch = make(self.CONFIG), rows(8)
        unseen, padding = (replace(batch, sparse=batch.sparse.clone()) for _ in range(2))
        unseen.sparse[:, 1], padding.sparse[:, 1] = 1, 0
        torch.testing.assert_close(model(unseen).logits, model(padding).logits, rtol=0, atol=0)
        assert not torch.equal(model(batch).logits, model(padding).logits)
        assert torch.equal(batch.sparse, rows(8).sparse)  # the batch itself is not changed

    def test_dropout_is_of_training_and_of_its_chance(self) -> None:
        model = make(replace(self.CONFIG, id_dropout=0.4))
        assert isinstance(model, ContrastiveModel)
        batch = Batch(sparse=torch.full((10_000, 3), 4, dtype=torch.int32), dense=torch.zeros(10_000, 3))
        assert torch.equal(model.known(batch).sparse, batch.sparse)
        dropped = model.train().known(batch).sparse
        assert (dropped[:, [0, 2]] == 4).all()
        assert float((dropped[:, 1] == 0).float().mean()) == pytest.approx(0.4, abs=0.02)
        assert set(dropped[:, 1].tolist()) == {0, 4}

    def test_errors(self) -> None:
        with pytest.raises(ConfigError, match=r"id_fields names 'price', which is no sparse field"):
            make(replace(self.CONFIG, id_fields=("price",)))
        with pytest.raises(ConfigError, match=r"id_dropout is 0\.4, but id_fields is empty"):
            make(replace(self.CONFIG, id_fields=(), id_dropout=0.4))
        with pytest.raises(ConfigError, match=r"id_dropout is 1\.0"):
            make(replace(self.CONFIG, id_dropout=1.0))


def test_config_survives_json() -> None:
    config = contrastive(
        plain("deepfm"),
        ContrastConfig(weight=0.3, similarity="dot"),
        views_of=(("user",), ("item", "history")),
        encoder=MLP.Config(hidden_units=(4,)),
        id_fields=("item",),
        id_dropout=0.3,
    )
    assert from_json(json.loads(json.dumps(to_json(config))), ModelComponent.Config, COMPONENTS) == config


def test_compiles_to_one_graph() -> None:
    torch.compiler.reset()
    # no dropout: a compiled graph draws other masks from the same seed
    quiet = replace(PLAIN, interaction=MLP.Config(hidden_units=(8,)))
    model = make(contrastive(quiet, ContrastConfig(feature_dropout=0.0), id_fields=("item",))).train()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.manual_seed(0)
    expected = model(rows(6)).auxiliary["contrastive"]
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(rows(6)).auxiliary["contrastive"], expected)


def test_explains_what_the_plain_model_does() -> None:
    model, batch = make(contrastive(plain("autoint"), id_fields=("item",))), rows(5)
    assert list(model.explain(batch)) == list(model.axes) != []


def test_bf16_autocast() -> None:
    model, batch = make(contrastive(PLAIN)).train(), rows(32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = total_loss(model(batch), batch)
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -0.1}, r"contrast\.weight is -0\.1"),
        ({"temperature": 0.0}, r"contrast\.temperature is 0\.0"),
        ({"field_mask": 1.0}, r"contrast\.field_mask is 1\.0"),
        ({"similarity": "euclid"}, r"contrast\.similarity is 'euclid'"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ContrastConfig(**options)


def test_errors() -> None:
    hashed = BatchLayout(sparse=(SparseColumn("item", 9, "item", hashed=True),))
    with pytest.raises(ConfigError, match=r"id_fields names 'item', whose ids are hashed, .* give the field a vocabulary"):
        KnownIds(("item",), 0.0, hashed)
    with pytest.raises(ConfigError, match=r"views_of names 'itm', which the model does not read; did you mean 'item'"):
        make(contrastive(PLAIN, views_of=(("itm",),)))
    with pytest.raises(ConfigError, match=r"the interaction \(FM\) returns one number"):
        make(contrastive(CTRModel.Config(interaction=FM.Config(), head=None)))
    with pytest.raises(ConfigError, match=r"the interaction \(MLP\) has batch norms"):
        make(contrastive(CTRModel.Config(interaction=MLP.Config(hidden_units=(8,), norm="batch"))))
    with pytest.raises(ConfigError, match=r"the interaction \(MLP\) has .*dice activations, whose running statistics"):
        make(contrastive(CTRModel.Config(interaction=MLP.Config(hidden_units=(8,), activation="dice"))))
    with pytest.raises(ConfigError, match=r"a FinalMLPModel has no block that could encode views alone; set encoder to one"):
        contrastive(preset("final_mlp"))
    for wrapped in (contrastive(PLAIN), contrastive(preset("din"), encoder=ENCODER)):
        with pytest.raises(ConfigError, match="which has a contrastive loss of views already"):
            contrastive(wrapped, encoder=ENCODER)
    with pytest.raises(ConfigError, match=r"views_of names 'itm', which the model does not read; did you mean 'item'"):
        make(contrastive(preset("final_mlp"), encoder=ENCODER, views_of=(("itm",),)))
    nodes = BatchLayout(sequences=(SequenceColumn("words", 9, "words"),), labels=("kind",), classes=("a", "b"))
    with pytest.raises(ConfigError, match="the rows are nodes of a graph with the classes"):
        make(contrastive(CatGCN.Config(), encoder=ENCODER), nodes)


ENCODER = MLP.Config(hidden_units=(8,))
ANY = (
    "final_mlp", "fgcnn_ipnn", "fwfm", "ffm", "hofm", "onn", "hiformer", "hetero_att", "transformer", "final_net_1b",
    "arm_net_plus", "afn_plus", "optinter", "din", "bst", "moe", "mmoe", "aw_moe",
)  # fmt: skip


def layout_of(name: str) -> BatchLayout:
    return with_crosses(LAYOUT) if name == "optinter" else LAYOUT


def run(config: ModelComponent.Config, layout: BatchLayout) -> tuple[dict[str, Tensor], list[float], Tensor, ModelComponent]:
    """Weights, losses, the state of the random numbers, and the model after some steps from a fixed seed."""
    torch.manual_seed(3)
    model = build_model(config, layout).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for step in range(2):
        batch = crossed(rows(16, seed=step), layout) if layout is not LAYOUT else rows(16, seed=step)
        optimizer.zero_grad()
        loss = total_loss(model(batch), batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return model.state_dict(), losses, torch.get_rng_state(), model


@pytest.mark.parametrize("name", ANY)
def test_any_model_without_weight_is_itself_to_the_bit(name: str) -> None:
    config, layout = shrunk(preset(name)), layout_of(name)
    weights, losses, state, _ = run(config, layout)
    wrapped = contrastive(config, ContrastConfig(weight=0.0), encoder=ENCODER)
    assert isinstance(wrapped, Contrasted.Config)
    found, other_losses, other_state, _ = run(wrapped, layout)
    assert losses == other_losses
    assert {f"model.{key}" for key in weights} == found.keys()
    assert all(torch.equal(weights[key], found[f"model.{key}"]) for key in weights)
    assert torch.equal(state, other_state)


@pytest.mark.parametrize("name", ANY)
def test_any_model_has_the_loss_in_training_only(name: str) -> None:
    config, layout = contrastive(shrunk(preset(name)), encoder=ENCODER, id_fields=("item",)), layout_of(name)
    assert from_json(json.loads(json.dumps(to_json(config))), ModelComponent.Config, COMPONENTS) == config
    torch.manual_seed(1)
    model = build_model(config, layout)
    assert isinstance(model, Contrasted)
    batch = rows(16) if layout is LAYOUT else crossed(rows(16), layout)
    others = model.model(model.known(batch)).auxiliary.keys()
    auxiliary = model(batch).auxiliary
    assert auxiliary.keys() == {*others, "contrastive_views"}
    auxiliary["contrastive_views"].backward()  # type: ignore[no-untyped-call]
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(name.startswith("model.embedding.tables") for name in touched)
    assert all(name.startswith(("model.embedding.", "encoder.")) for name in touched)
    model.eval()
    torch.testing.assert_close(model(batch).logits, model.model(model.known(batch)).logits, rtol=0, atol=0)
    assert model(batch).auxiliary.keys() == model.model(batch).auxiliary.keys()
    unseen = replace(batch, sparse=batch.sparse.clone())
    unseen.sparse[:, 1] = 1
    padding = replace(batch, sparse=batch.sparse.clone())
    padding.sparse[:, 1] = 0
    if name != "optinter":  # whose crosses have ids of their own
        torch.testing.assert_close(model(unseen).logits, model(padding).logits, rtol=0, atol=0)
    assert list(model.explain(batch)) == list(model.axes) == list(model.model.axes)


def test_the_loss_is_that_of_the_views_of_the_main_tokens() -> None:
    """With views that leave nothing out, by the formula: vectors of the encoder, rows of the same ids apart."""
    still = ContrastConfig(weight=0.3, temperature=0.5, field_mask=0.0, id_mask=0.0, feature_dropout=0.0)
    model, batch = make(contrastive(shrunk(preset("final_mlp"), dropout=0.0), still, encoder=ENCODER)).train(), rows(12)
    assert isinstance(model, Contrasted)
    assert model.encoder is not None
    z_BK = torch.nn.functional.normalize(model.encoder(model.model.embedding(batch)).flatten(1), dim=1)
    s_BB = (z_BK @ z_BK.T / 0.5).tolist()
    ids, total = batch.sparse.tolist(), 0.0
    for i in range(12):
        others = [math.exp(s_BB[i][j]) for j in range(12) if ids[j] != ids[i]]
        total -= math.log(math.exp(s_BB[i][i]) / (math.exp(s_BB[i][i]) + sum(others)))
    assert float(model(batch).auxiliary["contrastive_views"].detach()) == pytest.approx(0.3 * total / 12, rel=1e-5)


def test_options_of_the_embedding_are_those_of_the_wrapper() -> None:
    config = override(contrastive(preset("din"), encoder=ENCODER), {"embedding.dim": "6"}, COMPONENTS)
    model = make(config)
    assert isinstance(model, Contrasted)
    assert model.embedding.out.dim == model.model.embedding.out.dim == 6


@pytest.mark.parametrize("name", ["final_mlp", "din"])
def test_any_model_is_saved_ranked_and_exported(name: str, tmp_path: Path) -> None:
    fields = (
        SparseField(name="user", side="context"),
        SparseField(name="item"),
        SequenceField(name="seen", ordered=True, shares="item", side="context"),
    )
    schema = Schema(fields=fields, labels=("y",), histories=(History(fields=("seen",)),))
    table = [{"user": i % 5, "item": i % 7, "seen": [j % 7 for j in range(i % 4)], "y": i % 2} for i in range(40)]
    encoder = Encoder.fit(schema, table)
    config = contrastive(shrunk(preset(name), init_std=0.5), encoder=ENCODER, id_fields=("item",), id_dropout=0.3)
    model = make(config, encoder.layout)
    artifact.save(tmp_path / "model", encoder, model, config)
    loaded = artifact.load(tmp_path / "model")
    assert loaded.config == config
    want = model(encoder.transform(table)).logits.sigmoid().double()
    np.testing.assert_allclose(loaded.predict(table), want.detach().numpy(), rtol=0, atol=1e-6)
    context = {"user": 3, "seen": [1, 2]}
    candidates = [{"item": item} for item in (1, 5, 999)]
    expected = loaded.predict([{**context, **c} for c in candidates])
    np.testing.assert_allclose(Ranker(loaded).score(context, candidates), expected, rtol=0, atol=1e-6)
    assert export(loaded, tmp_path / "program")["difference"] < 1e-5
    assert len(set(expected.tolist())) == 3
