"""Two towers: the product of their vectors, their losses, and items that nobody has clicked."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ctrlib.batch import Batch, Ragged
from ctrlib.config import ConfigError, from_json, to_json
from ctrlib.embedding import FeatureEmbedding
from ctrlib.interactions.adaptive_fusion import AdaptiveFusion
from ctrlib.interactions.mlp import MLP
from ctrlib.losses import info_nce, total_loss
from ctrlib.models.contrastive import ContrastConfig
from ctrlib.models.ctr import ModelComponent, build_model
from ctrlib.models.presets import COMPONENTS
from ctrlib.models.two_tower import TwoTower
from ctrlib.ranking_metrics import summarize_ranking
from ctrlib.schema import BatchLayout, SequenceColumn, SparseColumn
from tests.models.small import LAYOUT, make, rows, take

ITEM = ("item", "price", "history")
CONFIG = TwoTower.Config(item_fields=ITEM)


def tower(config: TwoTower.Config = CONFIG, layout: BatchLayout = LAYOUT) -> TwoTower:
    model = make(config, layout)
    assert isinstance(model, TwoTower)
    return model


def test_the_score_is_the_product_of_the_vectors() -> None:
    model, batch = tower(), rows(9)
    model.bias.data.fill_(0.3)
    user_BK, item_BK = model.vectors(batch)
    assert user_BK.shape == item_BK.shape == (9, 16)
    expected = [
        sum(u * v for u, v in zip(a, b, strict=True)) / 4 + 0.3 for a, b in zip(user_BK.tolist(), item_BK.tolist(), strict=True)
    ]
    torch.testing.assert_close(model(batch).logits, torch.tensor(expected))
    assert model(batch).auxiliary == {}


def test_each_side_reads_its_own_fields() -> None:
    model, batch = tower(), rows(9)
    user_BK, item_BK = model.vectors(batch)
    moved = replace(batch, sparse=batch.sparse.clone(), dense=batch.dense.clone())
    moved.sparse[:, 0] = (moved.sparse[:, 0] + 1) % 9
    moved.dense[:, 1] = 2.0
    other_user, other_item = model.vectors(moved)
    torch.testing.assert_close(other_item, item_BK, rtol=0, atol=0)
    assert (other_user != user_BK).any()


def test_rows_do_not_see_each_other() -> None:
    model, batch = tower(), rows(5)
    torch.testing.assert_close(model(take(batch, [3, 0])).logits, model(batch).logits[[3, 0]])


def test_losses_of_training() -> None:
    config = replace(CONFIG, contrast=ContrastConfig(weight=0.2), cross_weight=0.5)
    model, batch = tower(config).train(), rows(32)
    assert list(model(batch).auxiliary) == ["contrastive_user", "contrastive_item", "contrastive_cross"]
    loss = total_loss(model(batch), batch)
    loss.backward()  # type: ignore[no-untyped-call]
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []
    assert list(tower().train()(batch).auxiliary) == []


def test_the_cross_loss_is_of_clicked_rows_of_other_users_and_items() -> None:
    config = replace(CONFIG, cross_weight=1.0, contrast=ContrastConfig(weight=0.0, temperature=0.5))
    model, batch = tower(config), rows(40)
    assert batch.labels is not None
    user_BK, item_BK = model.vectors(batch)
    found = float(model.train()(batch).auxiliary["contrastive_cross"].detach())
    model.eval()
    clicked = [i for i in range(40) if batch.labels[i, 0] == 1]
    users, items = batch.sparse[:, [0, 2]].tolist(), batch.sparse[:, 1].tolist()
    u, v = (torch.nn.functional.normalize(x, dim=1) for x in (user_BK, item_BK))
    total = 0.0
    for i in clicked:
        others = [j for j in clicked if users[j] != users[i] and items[j] != items[i]]
        own = math.exp(float(u[i] @ v[i]) / 0.5)
        total -= math.log(own / (own + sum(math.exp(float(u[i] @ v[j]) / 0.5) for j in others))) / 2
        total -= math.log(own / (own + sum(math.exp(float(v[i] @ u[j]) / 0.5) for j in others))) / 2
    assert found == pytest.approx(total / len(clicked), rel=1e-5)


def test_clicked_items_are_told_from_the_unclicked_of_the_batch() -> None:
    model, batch = tower(replace(CONFIG, unclicked_weight=2.0)).train(), rows(40)
    assert batch.labels is not None
    found = float(model(batch).auxiliary["contrastive_unclicked"].detach())
    user_BK, item_BK = model.vectors(batch)
    items, label = batch.sparse[:, 1].tolist(), batch.labels[:, 0].tolist()
    clicked = [i for i in range(40) if label[i] == 1]

    def score(i: int, j: int) -> float:
        return math.exp(float(user_BK[i] @ item_BK[j]) / model.width**0.5)

    total, left_out = 0.0, 0
    for i in clicked:
        others = [j for j in range(40) if label[j] == 0 and items[j] != items[i]]
        left_out += 40 - len(clicked) - len(others)
        total -= math.log(score(i, i) / (score(i, i) + sum(score(i, j) for j in others)))
    assert left_out > 0
    assert found == pytest.approx(2 * total / len(clicked), rel=1e-5)
    for same in (0.0, 1.0):  # nothing to tell from anything
        assert float(model(replace(batch, labels=torch.full((40, 1), same))).auxiliary["contrastive_unclicked"].detach()) == 0


def test_rows_of_weight_zero_are_left_out_of_the_losses() -> None:
    """Whatever their labels are, and whatever their fields: nothing is learned from them."""
    still = ContrastConfig(weight=1.0, field_mask=0.0, id_mask=0.0, feature_dropout=0.0)
    config = replace(CONFIG, cross_weight=1.0, unclicked_weight=1.0, contrast=still)
    model, batch = tower(config).train(), rows(40)
    kept = [i for i in range(40) if i % 3]
    weighed = replace(batch, weight=torch.tensor([float(i % 3) for i in range(40)]))
    found, expected = model(weighed).auxiliary, model(take(batch, kept)).auxiliary
    assert list(found) == ["contrastive_user", "contrastive_item", "contrastive_cross", "contrastive_unclicked"]
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])
    assert total_loss(model(replace(batch, weight=torch.zeros(40))), replace(batch, weight=torch.zeros(40))).item() == 0.0


def test_without_weight_no_random_number_is_drawn() -> None:
    model = tower(replace(CONFIG, contrast=ContrastConfig(weight=0.0, field_mask=0.9))).train()
    state = torch.get_rng_state()
    model(rows(8))
    assert torch.equal(torch.get_rng_state(), state)


def test_config_survives_json() -> None:
    config = replace(
        CONFIG, contrast=ContrastConfig(), id_fields=("user", "item"), id_dropout=0.3, cross_weight=0.1, unclicked_weight=1.0
    )
    assert from_json(json.loads(json.dumps(to_json(config))), ModelComponent.Config, COMPONENTS) == config


def test_axes_are_those_of_the_towers() -> None:
    model = tower(replace(CONFIG, item_tower=AdaptiveFusion.Config(modalities={"content": ("price", "history")})))
    shown = model.explain(rows(4))
    assert list(shown) == list(model.axes) == ["user/attention", "item/attention", "item/gate"]
    assert model.axes["item/attention"] == (("item", "content"),)
    assert shown["item/attention"].shape == (4, 2)
    assert shown["item/gate"].shape == (4, 3)


def test_compiles_to_one_graph() -> None:
    torch.compiler.reset()
    model, batch = tower(), rows(5)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(batch).logits, model(batch).logits)


def test_errors() -> None:
    with pytest.raises(ConfigError, match="item_fields names 'itm', which the model does not read; did you mean 'item'"):
        tower(TwoTower.Config(item_fields=("itm",)))
    with pytest.raises(ConfigError, match="expected some for the item, and some left for the user"):
        tower(TwoTower.Config(item_fields=LAYOUT.names))
    with pytest.raises(ConfigError, match="the user's tower returns 8 numbers and the item's 16"):
        tower(replace(CONFIG, user_tower=AdaptiveFusion.Config(dim=8)))
    with pytest.raises(ConfigError, match="the data has 2 labels"):
        tower(layout=replace(LAYOUT, labels=("click", "buy")))
    plain, normed = MLP.Config(hidden_units=(16,)), MLP.Config(hidden_units=(16,), norm="batch")
    with pytest.raises(ConfigError, match=r"item_tower \(MLP\) has batch norms"):
        tower(replace(CONFIG, user_tower=plain, item_tower=normed, contrast=ContrastConfig()))
    with pytest.raises(ConfigError, match=r"cross_weight is -1"):
        replace(CONFIG, cross_weight=-1.0)
    with pytest.raises(ConfigError, match=r"unclicked_weight is -1"):
        replace(CONFIG, unclicked_weight=-1.0)


# Planted: 200 users, 300 items in 12 genres, each user likes three genres; the last 80 items are cold.
USERS, ITEMS, COLD, GENRES = 200, 300, 80, 12
PLANTED = BatchLayout(
    sparse=(SparseColumn("user", USERS + 2, "user"), SparseColumn("item", ITEMS - COLD + 2, "item")),
    sequences=(SequenceColumn("genre", GENRES + 2, "genre"),),
)


def planted() -> tuple[Any, Any, Batch]:
    """Genre of every item, likes [USERS, ITEMS], training rows: a quarter of the likes of warm items, with two negatives."""
    rng = np.random.default_rng(0)
    genre = rng.integers(0, GENRES, ITEMS)
    taste = np.array([np.isin(np.arange(GENRES), rng.choice(GENRES, 3, replace=False)) for _ in range(USERS)])
    likes = taste[:, genre]
    user, item = np.nonzero(likes[:, : ITEMS - COLD] & (rng.random((USERS, ITEMS - COLD)) < 0.25))
    negative = rng.integers(0, ITEMS - COLD, 2 * len(item))
    users, items = np.concatenate([user, np.repeat(user, 2)]), np.concatenate([item, negative])
    label = np.concatenate([np.ones(len(item)), np.zeros(len(negative))])
    return genre, likes, batch_of(users, items, genre, label)


def batch_of(users: Any, items: Any, genre: Any, label: Any = None) -> Batch:
    known = np.where(items < ITEMS - COLD, items + 2, 1)
    sparse = torch.from_numpy(np.stack([users + 2, known], axis=1).astype(np.int32))
    values = torch.from_numpy((genre[items] + 2).astype(np.int32))
    sequences = {"genre": Ragged(values, torch.arange(len(items) + 1, dtype=torch.int32))}
    labels = None if label is None else torch.from_numpy(label).float().unsqueeze(1)
    return Batch(sparse=sparse, dense=torch.zeros(len(items), 0), sequences=sequences, labels=labels)


def cold_hit_rate(config: ModelComponent.Config, rows_of: Batch, genre: Any, likes: Any) -> float:
    """HR@10 of one liked cold item among all cold items that the user does not like."""
    torch.manual_seed(0)
    model = build_model(config, PLANTED).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    assert rows_of.labels is not None
    ragged = rows_of.sequences["genre"]
    for _ in range(4):
        for chosen in torch.randperm(len(rows_of)).split(512):  # type: ignore[no-untyped-call]
            part = Batch(
                sparse=rows_of.sparse[chosen],
                dense=rows_of.dense[chosen],
                sequences={"genre": Ragged(ragged.values[chosen], torch.arange(len(chosen) + 1, dtype=torch.int32))},
                labels=rows_of.labels[chosen],
            )
            optimizer.zero_grad()
            total_loss(model(part), part).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    users, items = np.repeat(np.arange(USERS), COLD), np.tile(np.arange(ITEMS - COLD, ITEMS), USERS)
    with torch.no_grad():
        scores = model.eval()(batch_of(users, items, genre)).logits.numpy().reshape(USERS, COLD)
    mine = likes[:, ITEMS - COLD :]
    target: list[Any] = []
    group: list[Any] = []
    label: list[Any] = []
    for user in range(USERS):
        for item in np.flatnonzero(mine[user])[:3]:
            pool = np.append(np.flatnonzero(~mine[user]), item)
            target.append(scores[user, pool])
            label.append(pool == item)
            group.append(np.full(len(pool), len(group)))
    return summarize_ranking(np.concatenate(label), np.concatenate(target), np.concatenate(group))["hr@10"]


def test_taste_that_depends_on_genre_only() -> None:
    """Content finds cold items, ids alone are at chance; popularity, of which cold items have none, is chance too."""
    genre, likes, rows_of = planted()
    embedding = FeatureEmbedding.Config(dim=8, init_std=0.1)
    config = TwoTower.Config(
        embedding=embedding,
        item_fields=("item", "genre"),
        id_fields=("item",),
        id_dropout=0.4,
        contrast=ContrastConfig(weight=0.05),
    )
    ids = TwoTower.Config(
        embedding=replace(embedding, fields=("user", "item")),
        item_fields=("item",),
        user_tower=MLP.Config(hidden_units=(8,)),
        item_tower=MLP.Config(hidden_units=(8,)),
    )
    chance = 10 / (COLD * (1 - 3 / GENRES) + 1)
    assert cold_hit_rate(config, rows_of, genre, likes) >= 3 * chance
    assert cold_hit_rate(ids, rows_of, genre, likes) == pytest.approx(chance, abs=0.03)


def test_info_nce_excludes_as_the_towers_ask() -> None:
    """Both kinds of sameness at once: a row that shares the user and one that shares the item."""
    x_BK: Tensor = torch.eye(4)
    exclude = torch.zeros(4, 4, dtype=torch.bool)
    exclude[0, 1] = exclude[1, 0] = exclude[0, 2] = exclude[2, 0] = True
    e = math.e
    expected = (-math.log(e / (e + 1)) - 2 * math.log(e / (e + 2)) - math.log(e / (e + 3))) / 4
    assert float(info_nce(x_BK, x_BK, temperature=1.0, exclude_BB=exclude)) == pytest.approx(expected)
