"""A compacted model computes what the model with closed gates does: every preset, sequences, shared vocabularies, crosses."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctrlib import artifact
from ctrlib.batch import Batch, Ragged, embedding_parameters
from ctrlib.config import ConfigError
from ctrlib.data.encoder import Encoder
from ctrlib.data.source import open_source
from ctrlib.data.store import Store
from ctrlib.embedding import FeatureEmbedding
from ctrlib.experiment import RunConfig, train
from ctrlib.models.ctr import ModelComponent
from ctrlib.models.hiformer import HiformerModel
from ctrlib.models.presets import PRESETS, Flavour, preset
from ctrlib.schema import DataError
from ctrlib.search.selection import Selection, apply_to_store, compact
from ctrlib.training import FitConfig
from tests.models.small import awake, make, shrunk
from tests.search.test_selection import SCHEMA, masks, raw, select

CASES = [(name, flavour) for name, p in PRESETS.items() if not p.needs_history for flavour in p.flavours]
ROWS = raw(40, seed=7)  # with values that the encoder has never seen


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.fit(SCHEMA, raw())


@pytest.fixture(scope="module")
def crossed() -> Encoder:
    return Encoder.fit(SCHEMA.with_crosses([("user", "item"), ("item", "age")], min_count=2), raw())


def model(config: ModelComponent.Config, encoder: Encoder) -> ModelComponent:
    # AFN's norms have seen no data: without a larger ε its logits are 1e6, and float32's rounding shows
    return awake(make(shrunk(config, eps=0.1), encoder.layout))


def without(batch: Batch, encoder: Encoder, values: Mapping[str, Any]) -> Batch:
    """The rows with padding in place of the values that are not kept: closed gates, as they are defined."""
    sparse, sequences = batch.sparse.clone(), dict(batch.sequences)
    for i, column in enumerate(encoder.layout.sparse):
        if column.table in values:
            sparse[:, i] *= torch.from_numpy(values[column.table])[sparse[:, i].long()]
    for sequence in encoder.layout.sequences:
        if sequence.table in values:
            ragged = sequences[sequence.name]
            open_ = torch.from_numpy(values[sequence.table])[ragged.values.long()]
            sequences[sequence.name] = Ragged(ragged.values * open_, ragged.offsets)
    return replace(batch, sparse=sparse, sequences=sequences)


@contextmanager
def gated(model: nn.Module, closed: set[str]) -> Any:
    """The model with a gate on every token: 0 for the closed fields, 1 for the others."""

    def gate(part: nn.Module, _: Any, tokens_BFD: Tensor) -> Tensor:
        assert isinstance(part, FeatureEmbedding)
        return tokens_BFD * torch.tensor([float(name not in closed) for name in part.out.names]).unsqueeze(1)

    with ExitStack() as hooks:
        for part in model.modules():
            if isinstance(part, FeatureEmbedding):
                hooks.callback(part.register_forward_hook(gate).remove)
        yield model


def check(full: ModelComponent, selection: Selection, encoder: Encoder, closed: set[str]) -> ModelComponent:
    small, derived = compact(full, selection, encoder)
    assert type(small) is type(full)
    assert not small.training
    with torch.no_grad(), gated(full, closed):
        expected = full(without(encoder.transform(ROWS), encoder, selection.values or {})).logits
        found = small(derived.transform(ROWS)).logits
        assert (full(encoder.transform(ROWS)).logits - expected).abs().max() > 1e-3 or closed
    assert expected.std() > 1e-4
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    return small


@pytest.mark.parametrize(("name", "flavour"), CASES)
def test_values_of_every_preset(name: str, flavour: Flavour, encoder: Encoder) -> None:
    full = model(preset(name, flavour), encoder)
    small = check(full, select(encoder, values=masks(encoder)), encoder, set())
    before, after = (sum(w.numel() for w in embedding_parameters(m)) for m in (full, small))
    assert after < 0.85 * before
    rest = [sum(p.numel() for p in m.parameters()) for m in (full, small)]
    assert rest[0] - before == rest[1] - after


@pytest.mark.parametrize(("name", "flavour"), CASES)
def test_fields_of_every_preset(name: str, flavour: Flavour, encoder: Encoder) -> None:
    config = preset(name, flavour)
    closed = {"user", "agent", "age", "seen", "clicks", "tags"}
    if not isinstance(config, HiformerModel.Config):  # which may read numbers beside its embedding
        closed.add("height")
    kept = tuple(f.name for f in SCHEMA.fields if f.name not in closed)
    check(model(config, encoder), select(encoder, fields=kept), encoder, closed)


@pytest.mark.parametrize(
    "closed", [{"item"}, {"seen"}, {"item", "seen"}, {"item", "last", "seen"}, {"price", "height"}], ids=str
)
@pytest.mark.parametrize("dims", [{}, {"item": 3, "user": 3}, {"item": 3}], ids=str)
def test_shared_vocabularies_and_widths(closed: set[str], dims: dict[str, int], encoder: Encoder) -> None:
    config = preset("deepfm")
    config = replace(config, embedding=replace(config.embedding, dims=dims))
    kept = tuple(f.name for f in SCHEMA.fields if f.name not in closed)
    full = model(config, encoder)
    for values in (None, masks(encoder)):
        check(full, select(encoder, fields=kept, values=values), encoder, closed)


def test_contexts_and_single_fields(encoder: Encoder) -> None:
    config: Any = preset("final_mlp")
    config = replace(config, context_1=("user",), context_2=("item", "tags"))
    values = masks(encoder)
    full = model(config, encoder)
    check(full, select(encoder, values=values), encoder, set())
    check(
        full,
        select(encoder, fields=("user", "tags", "price", "last")),
        encoder,
        set(encoder.layout.names) - {"user", "tags", "price", "last"},
    )
    some = replace(preset("dnn"), embedding=replace(preset("dnn").embedding, fields=("seen", "user", "price")))
    check(model(some, encoder), select(encoder, fields=("seen",), values=values), encoder, {"user", "price"})


def test_crosses(crossed: Encoder) -> None:
    full = model(preset("deepfm"), crossed)
    small = check(full, select(crossed, pairs={"user*item": "memorize", "item*age": "naive"}), crossed, {"item*age"})
    assert [t.shape[0] for t in embedding_parameters(small)] < [t.shape[0] for t in embedding_parameters(full)]
    closed = {"user", "user*item", "item*age"}
    kept = tuple(n for n in crossed.layout.names if n not in closed)
    check(full, select(crossed, fields=kept, values={"item": masks(crossed)["item"]}), crossed, closed)


def test_frozen_vectors_stay_frozen(encoder: Encoder) -> None:
    config = preset("dnn")
    config = replace(config, embedding=replace(config.embedding, frozen=("item",)))
    full = make(shrunk(config), encoder.layout)
    size = encoder.layout.sparse[1].vocab_size
    vectors = np.random.default_rng(0).normal(size=(size, 4)).astype(np.float32)
    full.embedding.load_pretrained("item", np.arange(size, dtype=np.int32), vectors)
    small = check(full, select(encoder, values=masks(encoder)), encoder, set())
    assert len(embedding_parameters(small)) == len(embedding_parameters(full)) == 1
    kept = tuple(n for n in encoder.layout.names if n != "item")
    heir = check(full, select(encoder, fields=kept), encoder, {"item"})
    assert len(embedding_parameters(heir)) == 1


def test_the_model_is_left_alone_and_no_random_numbers_are_used(encoder: Encoder) -> None:
    full = model(preset("deepfm"), encoder)
    before = {name: value.clone() for name, value in full.state_dict().items()}
    state = torch.get_rng_state()
    small, derived = compact(full, select(encoder, values=masks(encoder)), encoder)
    assert torch.equal(torch.get_rng_state(), state)
    for parameter in small.parameters():
        parameter.data.zero_()
    assert all(torch.equal(full.state_dict()[name], value) for name, value in before.items())
    assert derived.layout.names == encoder.layout.names


def test_what_is_dropped_has_no_row_left(encoder: Encoder) -> None:
    selection = select(encoder, values=masks(encoder))
    small, derived = compact(model(preset("dnn"), encoder), selection, encoder)
    assert derived.hash == selection.apply(encoder).hash
    (table,) = embedding_parameters(small)
    sizes = {c.table: c.vocab_size for c in derived.layout.sparse}
    sizes |= {c.table: c.vocab_size for c in derived.layout.sequences}
    assert table.shape[0] == sum(sizes.values())


def test_an_artifact_of_a_compacted_model_reads_raw_rows(encoder: Encoder, tmp_path: Path) -> None:
    full = model(preset("deepfm"), encoder)
    selection = select(encoder, values=masks(encoder))
    small, derived = compact(full, selection, encoder)
    config: Any = small.config
    artifact.save(tmp_path / "small", derived, small, config)
    expected = full(without(encoder.transform(ROWS), encoder, selection.values or {})).logits.sigmoid()
    np.testing.assert_allclose(artifact.load(tmp_path / "small").predict(ROWS), expected.detach().numpy(), atol=1e-6)


def test_a_number_that_is_read_beside_the_embedding_cannot_be_closed(encoder: Encoder) -> None:
    config: Any = preset("hiformer")
    full = model(replace(config, num_dense_tokens=2), encoder)
    kept = tuple(n for n in encoder.layout.names if n != "price")
    with pytest.raises(DataError, match="field 'price' is not kept, but HiformerModel reads it beside its embedding"):
        compact(full, select(encoder, fields=kept), encoder)


def test_another_encoder_is_refused(encoder: Encoder, crossed: Encoder) -> None:
    with pytest.raises(DataError, match="was made with another encoder"):
        compact(model(preset("dnn"), crossed), select(encoder, fields=("user",)), crossed)


def test_training_starts_from_the_weights_of_a_selection(encoder: Encoder, tmp_path: Path) -> None:
    config = shrunk(preset("deepfm"))
    full = awake(make(config, encoder.layout))
    selection = select(encoder, values=masks(encoder), model=config, weights=full.state_dict())
    store = Store.create(tmp_path / "old", encoder, {"train": open_source(raw()), "valid": open_source(ROWS)})
    derived = apply_to_store(selection, store, tmp_path / "new")
    run = RunConfig(model=config, fit=FitConfig(epochs=1), device="cpu")
    still = replace(run, fit=replace(run.fit, optimizer=replace(run.fit.optimizer, learning_rate=1e-30)), ridge=0.0)
    train(derived, still, tmp_path / "run", start=selection.start(encoder))
    trained = artifact.load(tmp_path / "run").model.state_dict()
    expected = compact(full, selection, encoder)[0].state_dict()
    assert all(torch.equal(trained[name], value) for name, value in expected.items() if "running" not in name)
    with pytest.raises(ConfigError, match="the weights to start from do not fit the model"):
        train(derived, run, tmp_path / "other", start=full.state_dict())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old", "run"]


def test_weights_to_start_from_are_of_all_fields(encoder: Encoder) -> None:
    with pytest.raises(DataError, match="has no weights to start from"):
        select(encoder, values=masks(encoder)).start(encoder)
    config = shrunk(preset("dnn"))
    weights = make(config, encoder.layout).state_dict()
    with pytest.raises(DataError, match="drops fields, and its weights are of all"):
        select(encoder, fields=("user",), model=config, weights=weights).start(encoder)
