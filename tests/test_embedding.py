"""FeatureEmbedding against loops over rows and fields, and what must never happen to its tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from ctrlib.batch import Batch, Ragged, embedding_parameters
from ctrlib.config import ConfigError
from ctrlib.embedding import FeatureEmbedding
from ctrlib.schema import BatchLayout, DenseColumn, Pooling, SequenceColumn, SparseColumn
from tests.reference import embedding as reference

D = 3
NAN = math.nan
LAYOUT = BatchLayout(
    sparse=(SparseColumn("user", 5, "user"), SparseColumn("item", 6, "item"), SparseColumn("last_item", 6, "item")),
    dense=(DenseColumn("price"), DenseColumn("hour", 3, True), DenseColumn("age", 0, True), DenseColumn("size", 2)),
    sequences=(SequenceColumn("history", 6, "item", "mean", True), SequenceColumn("tags", 4, "tags", "max")),
)
# Rows of the single table: user 0..4, item 5..10, tags 11..14.
FIRST = {"user": 0, "item": 5, "tags": 11}
SPARSE = [[2, 3, 3], [0, 5, 0], [1, 1, 2], [4, 0, 5]]
DENSE = [[1.5, 0.25, NAN, 1.0], [-2.0, 3.0, 0.5, 0.0], [0.0, NAN, 1.0, 2.0], [NAN, 1.75, -1.0, NAN]]
HISTORY = [[2, 3], [], [5, 5, 4, 1], [0, 2, 0]]
TAGS = [[3], [2, 3, 1], [0], []]


def embedding(layout: BatchLayout = LAYOUT, **options: Any) -> FeatureEmbedding:
    """With weights around 1, so that nothing passes for zero."""
    torch.manual_seed(1)
    module = FeatureEmbedding(FeatureEmbedding.Config(**({"dim": D, "init_std": 1.0} | options)), layout)
    for name, p in module.named_parameters():
        if name.endswith("bias"):
            p.data.normal_()
    return module


def ragged(lists: Sequence[Sequence[int]], dtype: torch.dtype = torch.int32) -> Ragged:
    offsets = np.cumsum([0, *map(len, lists)])
    return Ragged(torch.tensor([v for row in lists for v in row], dtype=dtype), torch.tensor(offsets, dtype=torch.int32))


def rows(
    sparse: Sequence[Sequence[int]] = SPARSE,
    dense: Sequence[Sequence[float]] = DENSE,
    dtype: torch.dtype = torch.int32,
    **sequences: Sequence[Sequence[int]],
) -> Batch:
    lists = {"history": HISTORY, "tags": TAGS} | sequences
    return Batch(
        sparse=torch.tensor(sparse, dtype=dtype).reshape(len(sparse), -1),
        dense=torch.tensor(dense, dtype=torch.float32).reshape(len(dense), -1),
        sequences={name: ragged(values, dtype) for name, values in lists.items()},
    )


def table(module: FeatureEmbedding, at: int = 0) -> nn.Embedding:
    return cast(nn.Embedding, module.tables[at].rows)


def tokens(module: FeatureEmbedding, batch: Batch) -> dict[str, npt.NDArray[np.float64]]:
    """[B, D] by field name."""
    with torch.no_grad():
        x_BFD = module(batch)
    assert x_BFD.shape == (len(batch), module.out.num_fields, module.out.dim)
    return {name: x_BFD[:, i].double().numpy() for i, name in enumerate(module.out.names)}


def arrays(module: FeatureEmbedding) -> dict[str, npt.NDArray[np.float64]]:
    return {name: p.detach().double().numpy() for name, p in module.named_parameters()}


def test_token_order_and_width() -> None:
    # sparse, numbers, piecewise numbers, sequences
    names = ("user", "item", "last_item", "price", "age", "hour", "size", "history", "tags")
    assert embedding().out.names == names
    assert embedding().out.dim == D
    assert embedding()(rows()).shape == (4, 9, D)


def test_every_token_is_the_formula() -> None:
    module = embedding()
    shown, weights = tokens(module, rows()), arrays(module)
    all_rows = weights["tables.0.rows.weight"]
    assert all_rows.shape == (15, D)
    tables = {"user": all_rows[:5], "item": all_rows[5:11], "tags": all_rows[11:]}
    price, age = weights["scalars.vectors"]
    (age_missing,) = weights["scalars.missing.vectors"]
    bins, bias = weights["piecewise.weight"], weights["piecewise.bias"]
    (hour_missing,) = weights["piecewise.missing.vectors"]
    for b in range(4):
        expected = {
            "user": reference.lookup(tables["user"], SPARSE[b][0]),
            "item": reference.lookup(tables["item"], SPARSE[b][1]),
            "last_item": reference.lookup(tables["item"], SPARSE[b][2]),
            "price": reference.number(DENSE[b][0], price, None),
            "age": reference.number(DENSE[b][2], age, age_missing),
            "hour": reference.piecewise(DENSE[b][1], bins[:3], bias[0], hour_missing),
            "size": reference.piecewise(0.0 if math.isnan(DENSE[b][3]) else DENSE[b][3], bins[3:], bias[1], None),
            "history": reference.bag(tables["item"], HISTORY[b], "mean"),
            "tags": reference.bag(tables["tags"], TAGS[b], "max"),
        }
        for name, vector in expected.items():
            np.testing.assert_allclose(shown[name][b], vector, rtol=1e-6, atol=1e-7, err_msg=f"{name}, row {b}")


def test_piecewise_positions_outside_the_bins_count_as_the_edges() -> None:
    layout = BatchLayout(dense=(DenseColumn("hour", 3),))
    module = embedding(layout)
    below, first, last, above = tokens(module, rows([[]] * 4, [[-5.0], [0.0], [3.0], [9.0]]))["hour"]
    weights = arrays(module)
    np.testing.assert_allclose(below, weights["piecewise.bias"][0], rtol=1e-6)
    np.testing.assert_array_equal(below, first)
    np.testing.assert_allclose(last, weights["piecewise.bias"][0] + weights["piecewise.weight"].sum(0), rtol=1e-6)
    np.testing.assert_array_equal(last, above)


@pytest.mark.parametrize("pooling", ["mean", "sum", "max"])
def test_pooling(pooling: Pooling) -> None:
    layout = BatchLayout(
        sparse=(SparseColumn("x", 4, "x"),), sequences=(SequenceColumn("bag", 7, "bag", pooling),)
    )  # the bag's rows do not begin at 0
    module = embedding(layout)
    bags: list[list[int]] = [[], [6], [2, 3, 4], [2, 2, 3, 3, 4, 4], [0, 2, 0, 3, 4], [0, 0], [1, 5, 5]]
    shown = tokens(module, rows([[2]] * 7, [[]] * 7, bag=bags))["bag"]
    own = arrays(module)["tables.0.rows.weight"][4:]
    for b, values in enumerate(bags):
        np.testing.assert_allclose(shown[b], reference.bag(own, values, pooling), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(shown[4], shown[2], rtol=1e-6)  # padding changes nothing
    if pooling != "sum":
        np.testing.assert_allclose(shown[3], shown[2], rtol=1e-6)  # nor do repeats
    assert not shown[[0, 5]].any()


@pytest.mark.parametrize("pooling", ["mean", "sum", "max"])
def test_only_empty_sequences(pooling: Pooling) -> None:
    module = embedding(BatchLayout(sequences=(SequenceColumn("bag", 7, "bag", pooling),)))
    x_BFD = module(rows([[]] * 3, [[]] * 3, bag=[[], [], []]))
    x_BFD.square().sum().backward()  # type: ignore[no-untyped-call]
    assert x_BFD.shape == (3, 1, D)
    assert not x_BFD.any()
    gradient = table(module).weight.grad
    assert gradient is not None
    assert not gradient.any()


def test_maximum_of_negative_vectors_is_negative() -> None:
    module = embedding(BatchLayout(sequences=(SequenceColumn("bag", 7, "bag", "max"),)))
    table(module).weight.data[1:] = -1.0
    assert (tokens(module, rows([[]], [[]], bag=[[0, 2, 0, 3]]))["bag"] == -1.0).all()


def test_sharing_fields_read_the_same_rows() -> None:
    module = embedding()
    assert table(module).num_embeddings == 5 + 6 + 4  # the item vocabulary is there once
    shown = tokens(module, rows([[2, 4, 4]], [DENSE[1]], history=[[4]], tags=[[2]]))
    np.testing.assert_array_equal(shown["item"], shown["last_item"])
    np.testing.assert_array_equal(shown["item"], shown["history"])
    table(module).weight.data[FIRST["item"] + 4] = 7.0
    shown = tokens(module, rows([[2, 4, 4]], [DENSE[1]], history=[[4]], tags=[[2]]))
    assert (shown["item"] == 7).all()
    assert (shown["last_item"] == 7).all()
    assert (shown["history"] == 7).all()
    assert not (shown["tags"] == 7).any()


def test_sequence_and_sparse_gradients_meet_in_the_shared_row() -> None:
    module = embedding()
    module(rows([[2, 4, 4]], [DENSE[1]], history=[[4, 4]], tags=[[2]])).sum().backward()  # type: ignore[no-untyped-call]
    gradient = table(module).weight.grad
    assert gradient is not None
    np.testing.assert_allclose(gradient[FIRST["item"] + 4].numpy(), [3.0] * D)  # two fields and a mean over itself


@pytest.mark.parametrize("dims", [{}, {"user": 2, "item": 5}])
def test_padding_is_zero_without_gradient_and_stays_so(dims: dict[str, int]) -> None:
    module = embedding(dims=dims, token_dropout=0.3)
    padding = rows([[0, 0, 0], [0, 0, 0]], [[1.0] * 4] * 2, history=[[0], [0, 0]], tags=[[0], []])
    shown = tokens(module, padding)
    assert not any(shown[name].any() for name in ("user", "item", "last_item", "history", "tags"))
    module(padding).square().sum().backward()  # type: ignore[no-untyped-call]
    for weight in embedding_parameters(module):
        assert weight.grad is not None
        assert not weight.grad.any()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (module(rows()) - 1).square().sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for at, first_rows in enumerate([[0, 5, 11]] if not dims else [[0], [0], [0]]):
        assert not table(module, at).weight[first_rows].any()
    shown = tokens(module.eval(), padding)
    assert not any(shown[name].any() for name in ("user", "item", "last_item", "history", "tags"))


def test_only_rows_that_occur_get_a_gradient_and_oov_is_one_of_them() -> None:
    module = embedding()
    tag_lists = [[3], [0, 2], [1], []]  # under a maximum, only the greatest gets a gradient
    module(rows(tags=tag_lists)).sum().backward()  # type: ignore[no-untyped-call]
    gradient = table(module).weight.grad
    assert gradient is not None
    user = {v for row in SPARSE for v in row[:1]}
    item = {v for row in SPARSE for v in row[1:]} | {v for row in HISTORY for v in row}
    tags = {v for row in tag_lists for v in row}
    expected = {FIRST[name] + v for name, ids in (("user", user), ("item", item), ("tags", tags)) for v in ids if v}
    assert {1, FIRST["item"] + 1, FIRST["tags"] + 1} <= expected
    assert set(gradient.any(1).nonzero().flatten().tolist()) == expected


def test_numbers_are_linear() -> None:
    layout = BatchLayout(dense=(DenseColumn("a"), DenseColumn("b", 0, True)))
    module = embedding(layout)
    zero, one, two, minus = module(rows([[]] * 4, [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [-1.0, -1.0]]))
    assert not zero.any()
    assert one.any(dim=1).all()
    torch.testing.assert_close(two, 2 * one)
    torch.testing.assert_close(minus, -one)


def test_nan_never_reaches_a_gradient() -> None:
    module = embedding()
    module(rows(dense=[[NAN] * 4] * 4)).square().sum().backward()  # type: ignore[no-untyped-call]
    for name, p in module.named_parameters():
        assert p.grad is not None
        assert p.grad.isfinite().all(), name
    assert module.scalars is not None
    assert not cast(Tensor, module.scalars.vectors.grad).any()  # no number was seen
    assert cast(Tensor, cast(nn.Module, module.scalars.missing).vectors.grad).any()


def test_missing_vector_belongs_to_its_column() -> None:
    module = embedding(BatchLayout(dense=(DenseColumn("a"), DenseColumn("b", 0, True), DenseColumn("c", 0, True))))
    weights = arrays(module)
    assert weights["scalars.missing.vectors"].shape == (2, D)
    shown = tokens(module, rows([[]], [[NAN, NAN, NAN]]))
    assert not shown["a"].any()
    np.testing.assert_allclose(shown["b"][0], weights["scalars.missing.vectors"][0], rtol=1e-6)
    np.testing.assert_allclose(shown["c"][0], weights["scalars.missing.vectors"][1], rtol=1e-6)
    np.testing.assert_allclose(tokens(module, rows([[]], [[0.0, 2.0, 0.0]]))["b"][0], 2 * weights["scalars.vectors"][1])


def test_widths_of_single_vocabularies_are_projected() -> None:
    module = embedding(dims={"item": 5, "tags": 2})
    plain = embedding()
    assert set(module.out.names) == set(plain.out.names)
    assert module.out.dim == D
    shown, weights = tokens(module, rows()), arrays(module)
    item, tags = weights["tables.1.rows.weight"], weights["tables.2.rows.weight"]
    assert weights["tables.0.rows.weight"].shape == (5, D)
    assert item.shape == (6, 5)
    assert tags.shape == (4, 2)
    # A projection for every token: item, last_item, history.
    projections = weights["tables.1.projection"]
    assert projections.shape == (3, 5, D)
    for b in range(4):
        np.testing.assert_allclose(
            shown["item"][b], reference.lookup(item, SPARSE[b][1]) @ projections[0], rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            shown["last_item"][b], reference.lookup(item, SPARSE[b][2]) @ projections[1], rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            shown["history"][b], reference.bag(item, HISTORY[b], "mean") @ projections[2], rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            shown["tags"][b], reference.bag(tags, TAGS[b], "max") @ weights["tables.2.projection"][0], rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(shown["user"][b], reference.lookup(weights["tables.0.rows.weight"], SPARSE[b][0]), rtol=1e-6)


def test_a_width_equal_to_the_others_needs_no_projection() -> None:
    assert not any("projection" in name for name, _ in embedding(dims={"item": D}).named_parameters())


def test_subset_of_fields() -> None:
    module = embedding(fields=("tags", "last_item", "hour"))
    assert module.out.names == ("last_item", "hour", "tags")
    assert table(module).num_embeddings == 6 + 4
    shown, weights = tokens(module, rows()), arrays(module)
    for b in range(4):
        own = weights["tables.0.rows.weight"]
        np.testing.assert_allclose(shown["last_item"][b], reference.lookup(own[:6], SPARSE[b][2]), rtol=1e-6)
        np.testing.assert_allclose(shown["tags"][b], reference.bag(own[6:], TAGS[b], "max"), rtol=1e-6)
        expected = reference.piecewise(
            DENSE[b][1], weights["piecewise.weight"], weights["piecewise.bias"][0], weights["piecewise.missing.vectors"][0]
        )
        np.testing.assert_allclose(shown["hour"][b], expected, rtol=1e-6)


def test_int32_and_int64_ids_agree() -> None:
    for fields in (None, ("last_item", "user", "history")):
        module = embedding(fields=fields)
        torch.testing.assert_close(module(rows()), module(rows(dtype=torch.int64)), rtol=0, atol=0)


def test_token_dropout_gives_oov_at_the_stated_rate_in_training_only() -> None:
    layout = BatchLayout(sparse=(SparseColumn("x", 3, "x"),), sequences=(SequenceColumn("bag", 3, "bag", "sum"),))
    module = embedding(layout, dim=1, token_dropout=0.2)
    table(module).weight.data.copy_(torch.tensor([[0.0], [1.0], [10.0]] * 2))
    count = 20_000
    batch = rows([[2]] * count, [[]] * count, bag=[[2, 2]] * count)
    torch.manual_seed(0)
    x_BF = module(batch).squeeze(-1)
    # Five standard deviations of a share of 20,000 draws are 0.014.
    assert (x_BF[:, 0] == 1).float().mean() == pytest.approx(0.2, abs=0.014)
    assert (x_BF[:, 0] == 10).float().mean() == pytest.approx(0.8, abs=0.014)
    assert (x_BF[:, 1] == 11).float().mean() == pytest.approx(2 * 0.2 * 0.8, abs=0.017)
    assert (x_BF[:, 1] == 2).float().mean() == pytest.approx(0.04, abs=0.007)
    assert not module(rows([[0]] * count, [[]] * count, bag=[[0, 0]] * count)).any()  # padding stays padding
    x_BF = module.eval()(batch).squeeze(-1)
    assert (x_BF == torch.tensor([10.0, 20.0])).all()


def test_dropout_scales_what_it_keeps_in_training_only() -> None:
    module = embedding(dropout=0.5)
    whole = module.eval()(rows())
    dropped = module.train()(rows())
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * whole[kept])
    assert 0 < (kept & (whole != 0)).sum() < (whole != 0).sum()


def test_rows_start_with_the_stated_deviation() -> None:
    module = embedding(BatchLayout(sparse=(SparseColumn("x", 2000, "x"),)), dim=10, init_std=0.01)
    assert float(table(module).weight[1:].detach().std()) == pytest.approx(0.01, rel=0.02)
    assert not table(module).weight[0].any()


def test_same_seed_same_weights() -> None:
    assert torch.equal(embedding()(rows()), embedding()(rows()))


IDS = np.array([3, 0, 5, 1], dtype=np.int32)
VECTORS = np.arange(4 * D, dtype=np.float32).reshape(4, D) + 100


@pytest.mark.parametrize("frozen", [(), ("item",)])
def test_pretrained_vectors_land_in_their_rows(frozen: tuple[str, ...]) -> None:
    module = embedding(frozen=frozen)
    before = {name: p.clone() for name, p in module.named_parameters()}
    module.load_pretrained("item", IDS, VECTORS)
    shown = tokens(module, rows([[2, 3, 5]], [DENSE[1]], history=[[5, 3]], tags=[[2]]))
    np.testing.assert_array_equal(shown["item"][0], VECTORS[0])
    np.testing.assert_array_equal(shown["last_item"][0], VECTORS[2])
    np.testing.assert_allclose(shown["history"][0], (VECTORS[0] + VECTORS[2]) / 2)
    name, first = ("tables.1.rows.weight", 0) if frozen else ("tables.0.rows.weight", FIRST["item"])
    now = dict(module.named_parameters())
    changed = (now[name] != before[name]).any(1).nonzero().flatten().tolist()
    assert changed == [first + 3, first + 5]  # neither padding nor OOV
    assert all(torch.equal(now[other], before[other]) for other in before if other != name)


def test_frozen_rows_do_not_move_and_the_others_do() -> None:
    module = embedding(frozen=("item",))
    module.load_pretrained("item", IDS, VECTORS)
    frozen = table(module, module.out.names.index("user") + 1)
    assert frozen.num_embeddings == 6
    assert not frozen.weight.requires_grad
    assert [w.shape[0] for w in embedding_parameters(module)] == [5 + 4]
    before = frozen.weight.clone()
    user = table(module).weight.clone()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    (module(rows()) - 1).square().sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert torch.equal(frozen.weight, before)
    assert not torch.equal(table(module).weight, user)
    assert not frozen.weight[[0, 1, 2, 4]].any()  # without a vector, frozen rows are zero


def test_pretrained_vectors_of_their_own_width() -> None:
    module = embedding(frozen=("item",), dims={"item": 5})
    vectors = np.ones((2, 5), np.float32)
    module.load_pretrained("item", np.array([2, 4], np.int32), vectors)
    projection = arrays(module)["tables.1.projection"][0]
    np.testing.assert_allclose(
        tokens(module, rows([[2, 4, 0]], [DENSE[1]], history=[[]], tags=[[]]))["item"][0], projection.sum(0), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("table_name", "ids", "vectors", "message"),
    [
        ("itm", IDS, VECTORS, r"no vocabulary 'itm'; did you mean 'item'\?"),
        ("last_item", IDS, VECTORS, "no vocabulary 'last_item'"),  # it has none of its own
        ("price", IDS, VECTORS, "no vocabulary 'price'"),
        ("item", IDS, VECTORS[:, :2], r"'item' have shape \(4, 2\); expected \(4, 3\).*embedding.dims.item"),
        ("item", IDS[:3], VECTORS, r"shape \(4, 3\); expected \(3, 3\): one row for every id"),
        ("user", IDS + 2, VECTORS, "'user' run from 2 to 7; expected 0 to 4"),  # 7 would be a row of item
        ("item", IDS - 1, VECTORS, "'item' run from -1 to 4; expected 0 to 5"),
    ],
)
def test_pretrained_errors(table_name: str, ids: Any, vectors: Any, message: str) -> None:
    module = embedding()
    before = table(module).weight.clone()
    with pytest.raises(ConfigError, match=message):
        module.load_pretrained(table_name, ids, vectors)
    assert torch.equal(table(module).weight, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "embedding.dim is 0"),
        ({"dims": {"item": -2}}, "embedding.dims.item is -2"),
        ({"dropout": 1.0}, "embedding.dropout is 1.0"),
        ({"token_dropout": -0.1}, "embedding.token_dropout is -0.1"),
        ({"init_std": -1.0}, "embedding.init_std is -1.0"),
        ({"fields": ("user", "itm")}, r"reads field 'itm', which the data lacks; did you mean 'item'\?"),
        ({"fields": ()}, "no field to read"),
        ({"dims": {"usr": 2}}, r"vocabulary 'usr', which the data lacks; did you mean 'user'\?"),
        ({"frozen": ("last_item",)}, "vocabulary 'last_item'"),
        ({"frozen": ("usr",), "fields": ("item",)}, r"did you mean 'user'\?"),
    ],
)
def test_config_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        embedding(**options)


def test_options_of_vocabularies_that_are_not_read_are_no_error() -> None:
    module = embedding(fields=("user",), dims={"item": 5}, frozen=("tags",))
    assert module.out.names == ("user",)
    assert [p.shape for p in module.parameters()] == [(5, D)]


def test_data_without_fields() -> None:
    with pytest.raises(ConfigError, match="no field to read"):
        embedding(BatchLayout())


def test_state_dict_holds_weights_only() -> None:
    names = set(embedding(dims={"item": 5}).state_dict())
    assert names == {name for name, _ in embedding(dims={"item": 5}).named_parameters()}
