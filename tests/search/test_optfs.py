"""The search of OptFS: its clock and its gates by published and independent numbers, what it returns, what it must not do."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from ctrlib.batch import Batch, Ragged
from ctrlib.config import ConfigError, override
from ctrlib.data.encoder import Encoder
from ctrlib.data.loader import Loader
from ctrlib.data.source import open_source
from ctrlib.data.store import Store
from ctrlib.files import json_text
from ctrlib.models.ctr import ModelComponent, build_model
from ctrlib.models.presets import COMPONENTS, preset
from ctrlib.optim import OptimizerConfig
from ctrlib.schema import BatchLayout, DataError, DenseField, Schema, SequenceField, SparseField
from ctrlib.search import optfs
from ctrlib.search.gates import ClosedGates, GatedModel, ValueGates, Values, embeddings
from ctrlib.search.optfs import OptFSConfig, control_weights, search_optfs, ticket
from ctrlib.search.passes import train_pass
from ctrlib.search.selection import Selection
from ctrlib.table import EmbeddingTable
from ctrlib.training import FitConfig, evaluate, fit, seed_everything
from tests.clicks import clicks
from tests.models.small import LAYOUT, awake, make, rows, shrunk
from tests.reference.optfs import never_seen

Ids = Mapping[str, npt.NDArray[np.int32]]
S = 1.6065306597
FIT = FitConfig(optimizer=OptimizerConfig(learning_rate=0.01))
QUICK = OptFSConfig(penalty=1e-4, gamma=100, epochs=3, rewind=1, learning_rate=0.1)  # drops some of the values below
SCHEMA = Schema(
    fields=(
        SparseField(name="user"),
        SparseField(name="city", hash_size=4),
        DenseField(name="price"),
        DenseField(name="age", encoding="bucket", num_bins=4),
        SequenceField(name="genres"),
    ),
    labels=("label",),
)


def small(name: str = "dnn", **options: str) -> ModelComponent.Config:
    given = {path.replace("__", "."): value for path, value in {"embedding__init_std": "0.2", **options}.items()}
    return shrunk(override(preset(name, "paper"), given, COMPONENTS))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Training rows alone: a search that asked for another split would fail."""
    table = clicks(1200, 0)
    return Store.create(
        tmp_path_factory.mktemp("optfs") / "store", Encoder.fit(SCHEMA, table), {"train": open_source(table, "the table")}
    )


def search(store: Store, config: OptFSConfig = QUICK, name: str = "dnn", seed: int = 3) -> Selection:
    return search_optfs(small(name), store, config, fit=FIT, batch_size=200, seed=seed)


# τ by epoch, and g_c of a value that no batch contains at the end of each; from the specification.
TEMPERATURES: dict[tuple[int, float, str], tuple[float, ...]] = {
    (5, 10000, "code"): (1, 10, 100, 1000, 10000),
    (5, 10000, "paper"): (6.309573, 39.810717, 251.188643, 1584.893192, 10000),
    (5, 5000, "code"): (1, 8.408964, 70.710678, 594.603558, 5000),
    (5, 5000, "paper"): (5.492803, 30.170882, 165.722700, 910.282102, 5000),
    (10, 1000, "code"): (1, 2.154435, 4.641589, 10, 21.544347, 46.415888, 100, 215.443469, 464.158883, 1000),
    (10, 1000, "paper"): (
        1.995262,
        3.981072,
        7.943282,
        15.848932,
        31.622777,
        63.095734,
        125.892541,
        251.188643,
        501.187234,
        1000,
    ),
}
NEVER_SEEN: dict[tuple[float, float, int, float, int], tuple[float, ...]] = {
    (2e-9, 3e-4, 10, 1000, 8953): (0.3778, 0.1341, -0.3177, -0.4283, *(-0.4295,) * 6),  # Criteo FM
    (5e-9, 3e-4, 15, 200, 8953): (0.2101, -0.2037, -0.6709, -0.9293, -1.0007, -1.0119, *(-1.0126,) * 9),  # Criteo DeepFM
    (1e-8, 3e-4, 5, 10000, 8953): (-0.0293, -0.5247, -0.5248, -0.5248, -0.5248),  # Criteo DCN
    (5e-9, 3e-4, 10, 2000, 8953): (0.2101, -0.3777, -0.6753, *(-0.6788,) * 7),  # Criteo IPNN
    (2e-9, 3e-4, 5, 5000, 7896): (0.3924, 0.1012, -0.0916, -0.0916, -0.0916),  # Avazu
    (2e-9, 3e-5, 10, 1000, 29200): (0.4605, 0.3896, 0.2878, 0.1656, -0.1043, -0.1331, *(-0.1332,) * 4),  # KDD12
    (5e-9, 3e-5, 5, 1000, 29200): (0.4070, 0.1693, -0.1245, -0.1246, -0.1246),  # KDD12 DCN
}


@pytest.mark.parametrize(("epochs", "gamma", "schedule"), TEMPERATURES)
def test_temperatures(epochs: int, gamma: float, schedule: Any) -> None:
    config = OptFSConfig(epochs=epochs, gamma=gamma, schedule=schedule)
    assert config.temperatures == pytest.approx(TEMPERATURES[epochs, gamma, schedule], rel=1e-6)


def test_flavours() -> None:
    assert OptFSConfig.released_code() == OptFSConfig()
    paper = OptFSConfig.paper()
    assert (paper.schedule, paper.regulariser, paper.keep_scale) == ("paper", "gate", "one")


@pytest.mark.parametrize(("penalty", "rate", "epochs", "gamma", "steps"), NEVER_SEEN)
def test_a_value_never_seen(penalty: float, rate: float, epochs: int, gamma: float, steps: int) -> None:
    """Every published setting drops it, whatever the data."""
    temperatures = OptFSConfig(epochs=epochs, gamma=gamma).temperatures
    found = never_seen(penalty, rate, temperatures, steps)
    assert found == pytest.approx(NEVER_SEEN[penalty, rate, epochs, gamma, steps], abs=6e-5)


@pytest.mark.parametrize(("epsilon", "last"), [(1e-7, 0.4345), (1e-8, -0.4295), (1e-10, -2.3722)])
def test_whether_it_is_dropped_depends_on_epsilon(epsilon: float, last: float) -> None:
    temperatures = OptFSConfig(epochs=10, gamma=1000).temperatures
    assert never_seen(2e-9, 3e-4, temperatures, 8953, epsilon=epsilon)[-1] == pytest.approx(last, abs=6e-5)


def test_our_gates_follow_that_path() -> None:
    """The first epoch of the setting for DCN on Criteo, with our gates in single precision and torch's Adam."""
    gates = ValueGates({"a": 5})
    optimizer = torch.optim.Adam([gates.logits], lr=3e-4, eps=OptFSConfig().epsilon)
    for _ in range(8953):
        optimizer.zero_grad()
        (1e-8 * gates.openness()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    np.testing.assert_allclose(gates.logits.detach()[1:, 0], -0.0293, atol=5e-4)


def test_values_that_are_not_in_the_batch_have_a_gradient() -> None:
    """σ(.5)·(1 − σ(.5)) = .235004 each of the penalty; those in the batch that of the loss besides. A sparse gradient would
    leave the others where they are."""
    gates = ValueGates({"a": 4, "b": 3})
    loss = gates(torch.tensor([1, 3])).sum()
    torch.autograd.backward(loss + 0.1 * gates.openness())
    grad = gates.logits.grad
    assert grad is not None
    assert grad.layout == torch.strided
    slope = 0.2350037
    seen = slope * 1.6065307  # 1/σ(.5): gates start at 1
    expected = torch.tensor([0, seen, 0, seen, 0, 0]) + 0.1 * slope * torch.tensor([0, 1, 1, 1, 1, 1])
    torch.testing.assert_close(grad[:, 0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("own", "rate"), [(None, 0.003), (0.02, 0.02)])
def test_the_rate_of_the_tables(own: float | None, rate: float, store: Store) -> None:
    """``fit`` has adagrad's, higher than ``learning_rate``; the search's dense optimizer has not."""
    config = FitConfig(optimizer=OptimizerConfig(embedding="adagrad", learning_rate=0.003, embedding_learning_rate=own))
    assert own is not None or config.optimizer.table_learning_rate > rate
    network, _, optimizer = optfs._set_up(small(), store, OptFSConfig(), config, 64, 0, "cpu")
    tables = {id(m.weight) for m in network.modules() if isinstance(m, EmbeddingTable)}
    groups = [g for g in optimizer.param_groups if any(id(p) in tables for p in g["params"])]
    assert groups
    assert all(g["lr"] == rate for g in groups)


def test_the_search_moves_unseen_values_along_that_path(tmp_path: Path) -> None:
    """Of 40 values, the rows have two: the median logit in the report is that of a value never seen."""
    seen = pa.table({"v": ["a", "b"] * 50, "y": [0, 1] * 50})
    every = pa.table({"v": [f"v{i}" for i in range(40)], "y": [0] * 40})
    encoder = Encoder.fit(Schema(fields=(SparseField(name="v"),), labels=("y",)), pa.concat_tables([seen, every]))
    unseen = Store.create(tmp_path / "store", encoder, {"train": open_source(seen, "the table")})
    for config in (
        OptFSConfig(penalty=1e-3, gamma=50, epochs=4, learning_rate=0.02, epsilon=1e-4),
        OptFSConfig(penalty=1e-3, gamma=50, epochs=4, schedule="paper", regulariser="gate"),
    ):
        found = search_optfs(small(), unseen, config, fit=FIT, batch_size=10, seed=0)
        scale = S if config.regulariser == "gate" else 1
        expected = never_seen(
            scale * config.penalty, config.learning_rate or 0.01, config.temperatures, 10, epsilon=config.epsilon
        )
        assert [epoch["logits"][2] for epoch in found.report["epochs"]] == pytest.approx(expected, abs=1e-4)


class Recorder:
    """``train_pass`` that notes temperature and weights after every pass, and evaluates in between."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self.temperatures: list[float] = []
        self.weights: list[dict[str, Tensor]] = []
        self._batch = next(iter(Loader(store.split("train"), 64)))
        self._run = train_pass
        monkeypatch.setattr(optfs, "train_pass", self)

    def __call__(self, gated: GatedModel, *arguments: Any, **options: Any) -> float:
        assert isinstance(gated.gates, ValueGates)
        loss = self._run(gated, *arguments, **options)
        for _ in range(3):
            gated.eval()(self._batch)
        self.temperatures.append(gated.gates.temperature.item())
        self.weights.append({name: value.clone() for name, value in gated.model.state_dict().items()})
        return loss


def equal(a: Mapping[str, Tensor] | None, b: Mapping[str, Tensor]) -> bool:
    return a is not None and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


def test_evaluation_does_not_move_the_clock(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = search(store)
    recorder = Recorder(store, monkeypatch)
    found = search(store)
    assert recorder.temperatures == pytest.approx(QUICK.temperatures)
    assert found.values is not None
    assert plain.values is not None
    assert equal(found.weights, dict(plain.weights or {}))
    assert all((plain.values[name] == kept).all() for name, kept in found.values.items())


@pytest.mark.parametrize("name", ["dcn", "ipnn"])
def test_everything_is_rewound(store: Store, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Biases of the cross network and batch norm's statistics included."""
    recorder = Recorder(store, monkeypatch)
    config = shrunk(preset(name, "fuxictr"))
    options = replace(QUICK, rewind=2, keep_scale="one")
    found = search_optfs(config, store, options, fit=FIT, batch_size=200, seed=3)
    assert equal(found.weights, recorder.weights[1])
    changed = [key for key, value in recorder.weights[2].items() if not torch.equal(value, recorder.weights[1][key])]
    assert len(changed) == len(recorder.weights[1])
    if name == "dcn":
        assert any("running_mean" in key for key in changed) or any(".biases" in key for key in changed)


def test_where_re_training_starts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(store, monkeypatch)
    seed_everything(3)
    initial = build_model(small(), store.encoder.layout).state_dict()
    plain = replace(QUICK, keep_scale="one")
    assert equal(search(store, replace(plain, start="same_seed")).weights, initial)
    assert equal(search(store, replace(plain, rewind=0)).weights, initial)
    assert equal(search(store, replace(plain, start="none")).weights, recorder.weights[-1])
    assert search(store, replace(plain, start="random")).weights is None


def test_kept_rows_are_scaled_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(store, monkeypatch)
    found = search_optfs(small("deepfm"), store, QUICK, fit=FIT, batch_size=200, seed=3)
    assert found.weights is not None
    network = build_model(small("deepfm"), store.encoder.layout)
    network.load_state_dict(recorder.weights[0])
    gated = {"user", "genres"}
    for embedding in embeddings(network):  # the first-order weights too
        assert set(embedding.vocabularies) == {"user", "genres", "city", "age"}
        for name, table in embedding.vocabularies.items():
            table[1:] *= S if name in gated else 1
    for name, value in network.state_dict().items():
        torch.testing.assert_close(found.weights[name], value, rtol=1e-6, atol=0)


def test_what_is_gated(store: Store) -> None:
    """Learned vocabularies that the model reads; not hashed fields, not buckets."""
    found = search(store)
    sizes = {name: store.encoder.vocabularies[name].size for name in ("user", "genres")}
    assert found.values is not None
    assert {name: kept.shape for name, kept in found.values.items()} == {name: (size,) for name, size in sizes.items()}
    assert not any(kept[0] for kept in found.values.values())
    assert found.method == "optfs"
    assert found.encoder_hash == store.encoder.hash
    assert found.model == small()
    one = search_optfs(small(embedding__fields='["genres","price"]'), store, QUICK, fit=FIT, batch_size=200, seed=0)
    assert set(one.values or {}) == {"genres"}
    with pytest.raises(ConfigError, match=r"the model reads none.*without hash_size"):
        search_optfs(small(embedding__fields='["city","price"]'), store, QUICK, fit=FIT, batch_size=200, seed=0)


def test_data_with_crosses_is_refused_before_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = clicks(300, 0)
    encoder = Encoder.fit(SCHEMA.with_crosses([("user", "city"), ("user", "age")]), table)
    crossed = Store.create(tmp_path / "store", encoder, {"train": open_source(table)})
    monkeypatch.delattr(optfs, "train_pass")
    with pytest.raises(DataError, match=r"OptFS drops values, but the data has crosses \(user\*city, user\*age\)"):
        search(crossed)


@pytest.mark.parametrize("run", [search_optfs, control_weights])
def test_tables_that_a_search_cannot_train_are_refused(store: Store, run: Any) -> None:
    options: dict[str, Any] = {"fit": FIT, "batch_size": 200, "seed": 0}
    with pytest.raises(ConfigError, match="frozen names user, but the search has no pretrained vectors"):
        run(small(embedding__frozen='["user"]'), store, QUICK, **options)
    halved = small(embedding__row_dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"need a row-wise optimizer; set optfs\.embedding"):
        run(halved, store, QUICK, **options)
    run(halved, store, replace(QUICK, embedding=None), **options)


def test_l2_is_paid_as_fit_says_where_the_optimizer_is_its_own(store: Store) -> None:
    """``batch_rows`` was lost on the way, and dense Adam paid for whole tables."""
    spared = FitConfig(
        optimizer=OptimizerConfig(embedding="dense", learning_rate=0.01, embedding_l2=0.1, embedding_l2_mode="batch_rows")
    )
    options = replace(QUICK, penalty=0.0, start="none", keep_scale="one")
    found = search_optfs(small("lr"), store, options, fit=spared, batch_size=200, seed=3)
    seed_everything(3)
    initial = build_model(small("lr"), store.encoder.layout)
    initial_rows = embeddings(initial)[0].vocabularies["user"].clone()
    assert found.weights is not None
    initial.load_state_dict(found.weights)
    assert torch.equal(embeddings(initial)[0].vocabularies["user"][1], initial_rows[1])  # OOV, which no row has


def test_a_search_on_another_device(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model, its gates and its optimizer are there from the first step on; what is returned is in main memory."""
    places: list[torch.device] = []

    def noted(gated: GatedModel, batches: Loader, optimizers: Any, **options: Any) -> float:
        places.extend(tensor.device for tensor in gated.state_dict().values())
        places.extend(p.device for group in optimizers[-1].param_groups for p in group["params"])
        raise KeyboardInterrupt

    monkeypatch.setattr(optfs, "train_pass", noted)
    with pytest.raises(KeyboardInterrupt):
        search_optfs(small(), store, QUICK, fit=FIT, batch_size=200, seed=0, device="meta")
    assert set(places) == {torch.device("meta")}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("embedding", ["dense", "adam"])
def test_a_search_on_a_gpu_finds_the_same(store: Store, embedding: Any) -> None:
    config = replace(QUICK, embedding=embedding)
    here = search(store, config, "deepfm")
    there = search_optfs(small("deepfm"), store, config, fit=FIT, batch_size=200, seed=3, device="cuda")
    assert here.values is not None
    assert there.values is not None
    assert here.weights is not None
    assert there.weights is not None
    same = np.concatenate([here.values[name] == kept for name, kept in there.values.items()])
    assert same.mean() > 0.9
    for name, value in there.weights.items():
        torch.testing.assert_close(value, here.weights[name], rtol=1e-2, atol=1e-3)
    small_start = there.start(store.encoder)
    assert {value.device.type for value in small_start.values()} == {"cpu"}


def test_report(store: Store) -> None:
    found = search(store)
    report = json.loads(json_text(found.report))
    values = found.values
    assert values is not None
    assert [epoch["temperature"] for epoch in report["epochs"]] == pytest.approx(QUICK.temperatures)
    assert report["settings"]["penalty"] == 1e-4
    total, kept = sum(len(k) - 1 for k in values.values()), int(sum(k.sum() for k in values.values()))
    assert 0 < kept < total
    assert (report["values"]["total"], report["values"]["kept"]) == (total, kept)
    assert report["epochs"][-1]["kept"] == pytest.approx(kept / total)
    assert report["fields"] == {name: {"values": len(k) - 1, "kept": int(k.sum())} for name, k in values.items()}
    batch = store.encoder.transform(clicks(1200, 0))
    ids = {"user": batch.sparse[:, 0].numpy(), "genres": batch.sequences["genres"].values.numpy()}
    counts = np.concatenate([np.bincount(ids[name], minlength=len(k))[1:] for name, k in values.items()])
    kept_M = np.concatenate([k[1:] for k in values.values()])
    assert report["values"]["rows_kept"] == pytest.approx(counts[kept_M].sum() / counts.sum())
    assert sum(bucket["values"] for bucket in report["frequency"]) == total
    for bucket in report["frequency"]:
        inside = (counts >= bucket["from"]) & (counts <= bucket["to"])
        assert (bucket["values"], bucket["kept"]) == (inside.sum(), kept_M[inside].sum())
    assert report["frequency"][0]["from"] == report["frequency"][0]["to"] == 0  # OOV of both: nothing is rare here
    assert 0 <= report["margin"]["near"] <= 1
    assert report["margin"]["nearest"] >= 0


def test_one_seed_one_result(store: Store) -> None:
    a, b, c = search(store), search(store), search(store, seed=4)
    assert equal(a.weights, dict(b.weights or {}))
    assert not equal(a.weights, dict(c.weights or {}))
    assert a.values is not None
    assert b.values is not None
    assert all((b.values[name] == kept).all() for name, kept in a.values.items())


def test_row_wise_adam_searches_as_dense_adam_does(store: Store) -> None:
    dense = search(store, replace(QUICK, start="none"))
    lazy = search(store, replace(QUICK, start="none", embedding="adam"))
    assert dense.weights is not None
    assert lazy.weights is not None
    for name, value in dense.weights.items():
        torch.testing.assert_close(lazy.weights[name], value, rtol=1e-2, atol=1e-3)


def test_a_penalty_that_closes_everything_is_refused(store: Store) -> None:
    with pytest.raises(ConfigError, match=r"closed the gates of all \d+ values: penalty 10 outweighs.*lower it"):
        search(store, replace(QUICK, penalty=10, learning_rate=0.5))


def test_a_search_that_drops_nothing_says_so(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    found = search(store, replace(QUICK, learning_rate=1e-4))
    assert found.report["values"]["kept"] == found.report["values"]["total"]
    assert re.search(r"dropped no value: the lowest logit is 0\.49\d after 18 steps at learning rate 0\.0001", caplog.text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rewind": 5}, r"optfs.rewind is 5 with 5 epochs; expected 0 to 4"),
        ({"rewind": -1}, r"optfs.rewind is -1"),
        ({"epochs": 1, "rewind": 0}, "optfs.epochs is 1.*2 or more, or schedule to 'paper'"),
        ({"penalty": -1.0}, "optfs.penalty is -1"),
        ({"gamma": 0.5}, "optfs.gamma is 0.5; expected 1 or more"),
        ({"gate_init": 0.0}, "optfs.gate_init is 0"),
        ({"epsilon": 0.0}, "optfs.epsilon is 0"),
        ({"learning_rate": 0.0}, "optfs.learning_rate is 0"),
        ({"schedule": "paaper"}, "did you mean 'paper'"),
        ({"regulariser": "l1"}, "optfs.regulariser is 'l1'"),
        ({"keep_scale": "two"}, "optfs.keep_scale is 'two'"),
        ({"start": "rewnd"}, "did you mean 'rewind'"),
        ({"embedding": "lamb"}, "optfs.embedding is 'lamb'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptFSConfig(**options)


def test_control_starts_where_the_search_does_and_has_no_gates(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    seed_everything(3)
    initial = build_model(small(), store.encoder.layout).state_dict()
    options = {"fit": FIT, "batch_size": 200, "seed": 3}
    start = control_weights(small(), store, replace(QUICK, rewind=0), **options)  # type: ignore[arg-type]
    assert equal(start, initial)
    # With gates that stay at 1, a search is the control.
    still = replace(QUICK, penalty=0.0, learning_rate=1e-30, keep_scale="one", gamma=1.0)
    trained = control_weights(small(), store, still, **options)  # type: ignore[arg-type]
    found = search_optfs(small(), store, still, fit=FIT, batch_size=200, seed=3)
    assert found.weights is not None
    assert not equal(trained, initial)
    for name, value in trained.items():
        torch.testing.assert_close(found.weights[name], value, rtol=1e-3, atol=1e-5)


def test_the_ticket(store: Store) -> None:
    found = search(store, name="deepfm")
    batch = next(iter(Loader(store.split("train"), 200)))
    model = ticket(found, store.encoder).eval()
    assert [name for name, _ in model.gates.named_parameters()] == []  # nothing moves them in re-training
    plain = build_model(small("deepfm"), store.encoder.layout).eval()
    plain.load_state_dict(dict(found.weights or {}))
    values = found.values
    assert values is not None
    assert not values["user"][2:].all()
    user = batch.sparse.clone()
    user[:, 0] *= torch.from_numpy(values["user"])[user[:, 0].long()]
    genres = batch.sequences["genres"]
    kept = Ragged(genres.values * torch.from_numpy(values["genres"])[genres.values.long()], genres.offsets)
    expected = plain(replace(batch, sparse=user, sequences={"genres": kept})).logits
    torch.testing.assert_close(model(batch).logits, expected, rtol=1e-6, atol=1e-6)


def test_transfer_to_another_backbone_and_refusal_of_another_encoder(store: Store) -> None:
    found = search(store)
    other = ticket(found, store.encoder, small("fm"))
    assert isinstance(other.gates, ClosedGates)
    assert other.gates.sizes == {"user": len((found.values or {})["user"]), "genres": len((found.values or {})["genres"])}
    narrow = ticket(found, store.encoder, small("fm", embedding__fields='["user","price"]'))
    assert set(narrow.gates.sizes) == {"user"}
    with pytest.raises(DataError, match="made with another encoder"):
        ticket(found, Encoder.fit(SCHEMA, clicks(1200, 1)))
    with pytest.raises(ConfigError, match="has no values"):
        ticket(replace(found, values=None), store.encoder)
    with pytest.raises(ConfigError, match="has no model"):
        ticket(replace(found, model=None), store.encoder)


def pruned(gated: GatedModel, layout: BatchLayout, values: Values) -> tuple[ModelComponent, dict[str, Tensor]]:
    """A plain model without the dropped rows, and the new id of every old one: compaction by hand."""
    news = {name: np.cumsum(kept) * kept + kept for name, kept in values.items()}  # 0 padding; id 1 is left empty
    sizes = {name: int(kept.sum()) + 2 for name, kept in values.items()}
    smaller = replace(
        layout,
        sparse=tuple(replace(c, vocab_size=sizes[c.table]) for c in layout.sparse),
        sequences=tuple(replace(c, vocab_size=sizes[c.table]) for c in layout.sequences),
    )
    model = build_model(gated.model.config, smaller).eval()  # type: ignore[arg-type]
    tables = [name for name, _ in model.named_parameters() if name.endswith("rows.weight")]
    rest = {name: value for name, value in gated.model.state_dict().items() if name not in tables}
    assert set(model.load_state_dict(rest, strict=False).missing_keys) == set(tables)
    for small_one, large_one in zip(embeddings(model), embeddings(gated.model), strict=True):
        for name, table in small_one.vocabularies.items():
            table[2:] = large_one.vocabularies[name][torch.from_numpy(values[name])]
    return model, {name: torch.from_numpy(new.astype(np.int32)) for name, new in news.items()}


def renumbered(batch: Batch, layout: BatchLayout, news: Mapping[str, Tensor]) -> Batch:
    sparse = torch.stack([news[c.table][batch.sparse[:, i].long()] for i, c in enumerate(layout.sparse)], 1)
    sequences = {
        c.name: Ragged(news[c.table][batch.sequences[c.name].values.long()], batch.sequences[c.name].offsets)
        for c in layout.sequences
    }
    return replace(batch, sparse=sparse, sequences=sequences)


@pytest.mark.parametrize("name", ["fm", "deepfm", "dcn", "ipnn"])
def test_the_ticket_is_the_pruned_model(name: str) -> None:
    """With a sequence that shares the vocabulary of ``item``, and a field without any value left."""
    rng = np.random.default_rng(0)
    sizes = {"user": 9, "item": 12, "hour": 5}
    values = {key: np.append(False, rng.random(size - 1) < (0.5 if key != "hour" else 0)) for key, size in sizes.items()}
    gated = GatedModel(awake(make(small(name))), ClosedGates(values)).eval()
    model, news = pruned(gated, LAYOUT, values)
    batch = rows(40)
    torch.testing.assert_close(model(renumbered(batch, LAYOUT, news)).logits, gated(batch).logits, rtol=1e-6, atol=1e-6)


FIELDS = "abcde"


@dataclass(frozen=True)
class Planted:
    """5 fields of 50 values, two of them informative by weights [2, 50] ~ N(0, 1.5²), and 10 ids each that no row has."""

    store: Store
    weights: npt.NDArray[np.float64]
    seen: Ids
    unseen: Ids


def planted(folder: Path, seed: int) -> Planted:
    rng = np.random.default_rng(seed)
    weights = rng.normal(0, 1.5, (2, 50))

    def table(count: int) -> Any:
        ids = rng.integers(0, 50, (count, 5))
        logit = weights[0][ids[:, 0]] + weights[1][ids[:, 1]]
        label = rng.random(count) < 1 / (1 + np.exp(-logit))
        return pa.table({**{name: ids[:, i] for i, name in enumerate(FIELDS)}, "y": label.astype(int)})

    train, valid = table(100_000), table(50_000)
    every = pa.table({**{name: np.arange(60) for name in FIELDS}, "y": np.zeros(60, int)})
    schema = Schema(fields=tuple(SparseField(name=name) for name in FIELDS), labels=("y",))
    encoder = Encoder.fit(schema, pa.concat_tables([train, every]))
    sources = {"train": open_source(train, "training rows"), "valid": open_source(valid, "validation rows")}
    seen, unseen = ({name: encoder.ids(name, list(values)) for name in FIELDS} for values in (range(50), range(50, 60)))
    return Planted(Store.create(folder, encoder, sources), weights, seen, unseen)


MODEL = override(preset("dnn"), {"embedding.dim": "4", "interaction.hidden_units": "16"}, COMPONENTS)


def shares(data: Planted, penalty: float, seed: int) -> tuple[Selection, float, float, float]:
    """The selection; and the kept shares of informative, noise and unseen values."""
    config = OptFSConfig(penalty=penalty, gamma=200, epochs=5, rewind=1)
    found = search_optfs(MODEL, data.store, config, fit=FIT, batch_size=500, seed=seed)
    assert found.values is not None

    def share(names: str, ids: Ids) -> float:
        assert found.values is not None
        return float(np.mean([found.values[name][ids[name]].mean() for name in names]))

    return found, share("ab", data.seen), share("cde", data.seen), share(FIELDS, data.unseen)


def check_planted(data: Planted, seed: int) -> Selection:
    found, informative, noise, unseen = shares(data, 1e-4, seed)
    assert informative >= 0.75
    assert noise == 0
    assert unseen == 0
    assert found.values is not None
    dropped = [abs(data.weights[i][~found.values[name][data.seen[name]]]) for i, name in enumerate("ab")]
    assert np.concatenate(dropped).mean() < 0.3  # those that say little
    return found


def test_planted(tmp_path: Path) -> None:
    """λ where the specification measured .77–.83 of the informative values, no noise, nothing unseen; and the smaller model."""
    data = planted(tmp_path / "store", 0)
    found = check_planted(data, 0)
    assert found.values is not None

    def trained(model: Any) -> float:
        quiet = replace(FIT, epochs=2, patience=None)
        fit(model, Loader(data.store.split("train"), 500, shuffle=True, seed=1), None, quiet)
        return float(evaluate(model, Loader(data.store.split("valid"), 10_000))["auc"])

    seed_everything(0)
    full = trained(build_model(MODEL, data.store.encoder.layout))
    again = ticket(found, data.store.encoder)
    assert trained(again) >= full - 0.002
    model, news = pruned(again, data.store.encoder.layout, found.values)
    batch = next(iter(Loader(data.store.split("valid"), 1000)))
    shown = model(renumbered(batch, data.store.encoder.layout, news)).logits
    torch.testing.assert_close(shown, again(batch).logits, rtol=1e-6, atol=1e-6)
    parameters = (sum(p.numel() for p in m.parameters()) for m in (model, again.model))
    assert next(parameters) < 0.65 * next(parameters)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_planted_with_other_seeds_and_penalties(tmp_path: Path, seed: int) -> None:
    data = planted(tmp_path / "store", seed)
    check_planted(data, seed)
    # The rows of these epochs are the same, so that noise is learned by heart where λ lets it.
    _, _, some_noise, _ = shares(data, 1e-5, seed)
    assert 0.2 < some_noise < 0.6
    _, informative, noise, _ = shares(data, 1e-3, seed)
    assert informative < 0.35
    assert noise == 0
    _, _, noise, unseen = shares(data, 1e-9, seed)  # the paper's scale, for tens of millions of rows: prunes nothing here
    assert noise > max(0.8, some_noise)
    assert unseen == 1
