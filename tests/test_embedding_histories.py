"""Behaviours and targets of FeatureEmbedding against loops over rows; they are the rows that tokens are made of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from ctrlib import ragged
from ctrlib.batch import Batch, Ragged
from ctrlib.config import ConfigError
from ctrlib.embedding import FeatureEmbedding
from ctrlib.optim import OptimizerConfig, build_optimizer
from ctrlib.schema import BatchLayout, HistoryColumn, Pooling, SequenceColumn, SparseColumn
from ctrlib.search.gates import ClosedGates

D = 3
ITEMS = [[2, 3, 2], [], [5], [0, 4]]  # a dropped value is a behaviour too
GAPS = [[7, 6, 2], [], [3], [4, 4]]
TAGS = [[[2, 3], [], [4]], [], [[1, 0, 1]], [[0], [3]]]
CANDIDATE_TAGS = [[2], [3, 4], [], [0, 2]]
SPARSE = [[1, 2], [2, 0], [1, 5], [3, 1]]


def layout(pooling: Pooling = "mean") -> BatchLayout:
    return BatchLayout(
        sparse=(SparseColumn("user", 4, "user"), SparseColumn("item", 6, "item")),
        sequences=(
            SequenceColumn("tags", 5, "tags", pooling),
            SequenceColumn("h_item", 6, "item", "mean", True),
            SequenceColumn("h_tags", 5, "tags", pooling, True, True),
            SequenceColumn("gap", 9, "gap", "mean", True),
        ),
        histories=(HistoryColumn("seen", ("h_item", "h_tags", "gap"), ("item", "tags", None)),),
    )


LAYOUT = layout()


def embedding(columns: BatchLayout = LAYOUT, unpooled: tuple[str, ...] = (), **options: Any) -> FeatureEmbedding:
    torch.manual_seed(1)
    return FeatureEmbedding(FeatureEmbedding.Config(**({"dim": D, "init_std": 1.0} | options)), columns, unpooled)


def ids(lists: list[Any]) -> Tensor:
    return torch.tensor(lists, dtype=torch.int32)


def offsets(lists: list[Any]) -> Tensor:
    return ids([0, *np.cumsum([len(one) for one in lists]).tolist()])


def bag(lists: list[list[int]]) -> Ragged:
    return Ragged(ids([v for one in lists for v in one]), offsets(lists))


def nested(lists: list[list[list[int]]]) -> Ragged:
    flat = [one for row in lists for one in row]
    return Ragged(ids([v for one in flat for v in one]), offsets(lists), offsets(flat))


def rows(at: list[int] | None = None) -> Batch:
    chosen = list(range(4)) if at is None else at
    return Batch(
        sparse=ids([SPARSE[b] for b in chosen]).reshape(len(chosen), 2),
        dense=torch.zeros(len(chosen), 0),
        sequences={
            "tags": bag([CANDIDATE_TAGS[b] for b in chosen]),
            "h_item": bag([ITEMS[b] for b in chosen]),
            "h_tags": nested([TAGS[b] for b in chosen]),
            "gap": bag([GAPS[b] for b in chosen]),
        },
    )


def pooled(table: Tensor, values: list[int], how: str) -> Tensor:
    kept = [table[v] for v in values if v > 0]
    if not kept:
        return torch.zeros(table.shape[1])
    each = torch.stack(kept)
    return each.amax(0) if how == "max" else each.sum(0) if how == "sum" else each.mean(0)


@pytest.mark.parametrize("pooling", ["mean", "sum", "max"])
@pytest.mark.parametrize("by_rows", [False, True])
def test_behaviours_and_targets_are_rows_of_the_tables(pooling: Pooling, by_rows: bool) -> None:
    module = embedding(layout(pooling))
    if by_rows:
        build_optimizer(module, OptimizerConfig())
    found = module.behaviours(rows(), "seen")
    tables = module.vocabularies
    assert found.offsets_B1.tolist() == [0, 3, 3, 4, 6]
    assert found.x_NAD.shape == (6, 3, D)
    behaviours = [(b, m) for b in range(4) for m in range(len(ITEMS[b]))]
    for n, (b, m) in enumerate(behaviours):
        item = tables["item"][ITEMS[b][m]] if ITEMS[b][m] else torch.zeros(D)
        want = torch.stack([item, pooled(tables["tags"], TAGS[b][m], pooling), tables["gap"][GAPS[b][m]]])
        torch.testing.assert_close(found.x_NAD[n], want)
    targets_BAD = module.targets(rows(), "seen")
    for b in range(4):
        item = tables["item"][SPARSE[b][1]] if SPARSE[b][1] else torch.zeros(D)
        want = torch.stack([item, pooled(tables["tags"], CANDIDATE_TAGS[b], pooling), torch.zeros(D)])
        torch.testing.assert_close(targets_BAD[b], want)
    assert module.attributes("seen").names == ("h_item", "h_tags", "gap")
    assert module.attributes("seen").dim == D


def test_a_token_pools_the_behaviours() -> None:
    module = embedding()
    names, x_BFD = module.out.names, module(rows())
    assert names == ("user", "item", "tags", "h_item", "h_tags", "gap")
    found = module.behaviours(rows(), "seen")
    gaps_BD = ragged.segment_mean(found.x_NAD[:, 2], found.offsets_B1)
    torch.testing.assert_close(x_BFD[:, names.index("gap")], gaps_BD)
    for b in range(4):  # all values of all behaviours alike
        values = [v for one in TAGS[b] for v in one]
        torch.testing.assert_close(x_BFD[b, names.index("h_tags")], pooled(module.vocabularies["tags"], values, "mean"))


@pytest.mark.parametrize("options", [{}, {"dims": {"item": 2}}, {"frozen": ("tags",)}])
def test_behaviours_that_the_model_reads_have_no_token(options: dict[str, Any]) -> None:
    plain, module = embedding(**options), embedding(unpooled=("seen",), **options)
    assert module.out.names == tuple(n for n in plain.out.names if n not in ("h_item", "h_tags", "gap"))
    module.load_state_dict(plain.state_dict())  # the same tables and projections
    at = [plain.out.names.index(name) for name in module.out.names]
    torch.testing.assert_close(module(rows()), plain(rows())[:, at])
    torch.testing.assert_close(module.behaviours(rows(), "seen").x_NAD, plain.behaviours(rows(), "seen").x_NAD)
    torch.testing.assert_close(module.targets(rows(), "seen"), plain.targets(rows(), "seen"))


def test_projections_are_those_of_the_tokens() -> None:
    module = embedding(dims={"item": 2, "gap": 2})
    items = module.behaviours(rows([2]), "seen").x_NAD[0]
    x_FD = module(rows([2]))[0]
    names = module.out.names
    torch.testing.assert_close(items[0], x_FD[names.index("h_item")])  # a single behaviour
    torch.testing.assert_close(items[2], x_FD[names.index("gap")])
    torch.testing.assert_close(module.targets(rows([2]), "seen")[0, 0], x_FD[names.index("item")])


def test_gates_close_behaviours_and_targets() -> None:
    module = embedding()
    plain, targets = module.behaviours(rows(), "seen").x_NAD, module.targets(rows(), "seen")
    kept = np.array([True, True, False, True, True, True])
    first = {"item": 0}
    module.attach(first, ClosedGates({"item": kept}, scale=2.0).__call__)
    gated, gated_targets = module.behaviours(rows(), "seen").x_NAD, module.targets(rows(), "seen")
    closed = ids([v for one in ITEMS for v in one]) == 2
    assert not gated[closed, 0].any()
    torch.testing.assert_close(gated[~closed, 0], 2 * plain[~closed, 0])
    torch.testing.assert_close(gated[:, 1:], plain[:, 1:])
    torch.testing.assert_close(gated_targets[1:], torch.cat([2 * targets[1:, :1], targets[1:, 1:]], dim=1))
    assert not gated_targets[0, 0].any()


def test_dropout_of_tokens_and_of_coordinates() -> None:
    module = embedding(token_dropout=0.999999).train()
    oov = module.vocabularies["item"][1]
    items = module.behaviours(rows(), "seen").x_NAD[:, 0]
    real = ids([v for one in ITEMS for v in one]) > 0
    torch.testing.assert_close(items[real], oov.expand(int(real.sum()), D))
    assert not items[~real].any()
    module = embedding(dropout=0.5).train()
    torch.manual_seed(3)
    found = module.behaviours(rows([0] * 40), "seen").x_NAD
    share = (found[:, 0] == 0).double().mean()
    assert 0.35 < share < 0.65
    module.eval()
    assert (module.behaviours(rows([0] * 40), "seen").x_NAD[:, 0] != 0).all()


def test_gradients_reach_the_rows_that_were_read() -> None:
    module = embedding(unpooled=("seen",))
    module.behaviours(rows([0, 2]), "seen").x_NAD.sum().backward()  # type: ignore[no-untyped-call]
    table = cast(Any, module.tables[0])
    grad, first = table.rows.weight.grad, table.first_row
    read = {first["item"] + v for v in (2, 3, 5)} | {first["tags"] + v for v in (1, 2, 3, 4)}
    read |= {first["gap"] + v for v in (7, 6, 2, 3)}
    assert set(grad.abs().sum(1).nonzero().flatten().tolist()) == read


@pytest.mark.parametrize("at", [[], [1], [1, 1]])
def test_without_any_behaviour(at: list[int]) -> None:
    module = embedding()
    found = module.behaviours(rows(at), "seen")
    assert found.x_NAD.shape == (0, 3, D)
    assert found.offsets_B1.tolist() == [0] * (len(at) + 1)
    assert module.targets(rows(at), "seen").shape == (len(at), 3, D)


def test_some_fields_only() -> None:
    module = embedding(fields=("user", "h_item", "h_tags"))
    assert module.attributes("seen").names == ("h_item", "h_tags")
    whole = embedding()
    for name, table in module.vocabularies.items():
        table.copy_(whole.vocabularies[name])
    assert torch.equal(module.behaviours(rows(), "seen").x_NAD, whole.behaviours(rows(), "seen").x_NAD[:, :2])
    assert not module.targets(rows(), "seen").any()  # the candidate's item and tags are not embedded


def test_what_cannot_be_read() -> None:
    with pytest.raises(ConfigError, match="the embedding reads no history 'sen'; did you mean 'seen'"):
        embedding().behaviours(rows(), "sen")
    with pytest.raises(ConfigError, match=r"the embedding reads no history 'seen'$"):
        embedding(fields=("user", "item")).targets(rows(), "seen")
    with pytest.raises(ConfigError, match="the model reads history 'sen', which the data lacks; did you mean 'seen'"):
        embedding(unpooled=("sen",))
    with pytest.raises(ConfigError, match="the embedding has no token: all its fields are of histories"):
        embedding(unpooled=("seen",), fields=("h_item", "gap"))


def test_several_histories() -> None:
    columns = replace(
        LAYOUT,
        sequences=(*LAYOUT.sequences, SequenceColumn("carted", 6, "item", "mean", True)),
        histories=(*LAYOUT.histories, HistoryColumn("carts", ("carted",), ("item",))),
    )
    module = embedding(columns, ("carts",))
    batch = rows()
    batch = replace(batch, sequences={**batch.sequences, "carted": bag([[3], [4, 4], [], [2, 1, 5]])})
    assert module.behaviours(batch, "carts").offsets_B1.tolist() == [0, 1, 3, 3, 6]
    assert module.behaviours(batch, "seen").offsets_B1.tolist() == [0, 3, 3, 4, 6]
    assert "h_item" in module.out.names
    assert "carted" not in module.out.names
    torch.testing.assert_close(module.targets(batch, "carts")[:, 0], module.targets(batch, "seen")[:, 0])


class Pooled(nn.Module):
    """Tensors in, tensor out, as an exported program has it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = embedding(unpooled=("seen",))

    def forward(self, *parts: Tensor) -> Tensor:
        sparse, tags, items, gaps, o, values, inner, of = parts
        batch = Batch(
            sparse=sparse,
            dense=sparse.new_zeros(sparse.shape[0], 0, dtype=torch.float32),
            sequences={
                "tags": Ragged(tags, of),
                "h_item": Ragged(items, o),
                "h_tags": Ragged(values, o, inner),
                "gap": Ragged(gaps, o),
            },
        )
        found = self.embedding.behaviours(batch, "seen")
        rows_N = ragged.segment_ids(found.offsets_B1, found.x_NAD.shape[0])
        products = found.x_NAD * ragged.expand(self.embedding.targets(batch, "seen"), rows_N)
        return torch.cat([self.embedding(batch), ragged.segment_sum(products, found.offsets_B1)], dim=1)


def tensors(batch: Batch) -> tuple[Tensor, ...]:
    tags, items, tags_of, gaps = (batch.sequences[name] for name in ("tags", "h_item", "h_tags", "gap"))
    assert tags_of.inner is not None
    return batch.sparse, tags.values, items.values, gaps.values, items.offsets, tags_of.values, tags_of.inner, tags.offsets


def test_compiles_to_one_graph_and_exports() -> None:
    module = Pooled().eval()
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    sizes = (tuple({0: Dim.DYNAMIC} for _ in range(8)),)
    program = torch.export.export(module, tensors(rows()), dynamic_shapes=sizes).module()
    for at in ([0, 1, 2, 3], [3, 2, 0, 0, 1, 1], [0, 3]):
        want = module(*tensors(rows(at)))
        torch.testing.assert_close(compiled(*tensors(rows(at))), want)
        torch.testing.assert_close(program(*tensors(rows(at))), want)
