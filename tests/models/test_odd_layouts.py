"""Data with few fields, numbers only, sequences only or no rows: every preset works on it or says what it needs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ctrlib.batch import Batch, Ragged
from ctrlib.config import ConfigError
from ctrlib.losses import total_loss
from ctrlib.models.presets import PRESETS, Flavour, preset
from ctrlib.schema import BatchLayout, DenseColumn, HistoryColumn, SequenceColumn, SparseColumn
from tests.models.small import make, shrunk

USER, ITEM = SparseColumn("user", 9, "user"), SparseColumn("item", 12, "item")
PRICE, AGE = DenseColumn("price"), DenseColumn("age", 4, True)
HISTORY = SequenceColumn("history", 12, "item", "mean", True)
READ = HistoryColumn("history", ("history",), ("item",))
MIXED = BatchLayout(sparse=(USER, ITEM), dense=(PRICE,), sequences=(HISTORY,), histories=(READ,))
LAYOUTS = {
    "one_value": BatchLayout(sparse=(USER,)),
    "one_number": BatchLayout(dense=(PRICE,)),
    "one_sequence": BatchLayout(sequences=(HISTORY,)),
    "two_fields": BatchLayout(sparse=(USER,), sequences=(HISTORY,)),
    "numbers": BatchLayout(dense=(PRICE, AGE, DenseColumn("time"))),
}
PAIRS = {"ipnn", "pnn", "pin", "fwfm", "fmfm", "ffm", "onn", "fibinet", "fignn", "dlrm", "afm", "destine", "destine_plus"}
PAIRS |= {"auto_fm", "auto_deepfm"}
DENSE_TOKENS = {"hiformer", "hetero_att", "transformer"}

CASES = [(name, flavour) for name, p in PRESETS.items() for flavour in p.flavours]
every_model = pytest.mark.parametrize(("name", "flavour"), CASES)


def rows(layout: BatchLayout, count: int) -> Batch:
    g = torch.Generator().manual_seed(count)
    sparse = [torch.randint(c.vocab_size, (count, 1), generator=g) for c in layout.sparse]
    offsets = torch.arange(0, 2 * count + 1, 2)
    return Batch(
        sparse=torch.cat([*sparse, torch.zeros(count, 0)], dim=1).to(torch.int32),
        dense=torch.rand(count, len(layout.dense), generator=g),
        sequences={c.name: Ragged(torch.randint(12, (2 * count,), generator=g), offsets) for c in layout.sequences},
        labels=torch.randint(2, (count, 1), generator=g).float(),
    )


def refusal(name: str, kind: str) -> str | None:
    """What the error says, where a preset cannot be."""
    if PRESETS[name].needs_history:
        return "reads a history of behaviours, but the data has none; declare one in the schema"
    if name == "hofm":
        return None if kind == "numbers" else r"HOFM\.order is 3, but its input has fewer fields \([12]\)"
    if name in PAIRS and kind.startswith("one_"):
        return "takes pairs of fields, but its input has the single field '(user|price|history)'; give it two or more"
    if name in DENSE_TOKENS and kind in ("one_number", "numbers"):
        return "reads numbers only; set num_dense_tokens to None"
    return None


@every_model
@pytest.mark.parametrize("kind", LAYOUTS)
def test_works_or_says_what_it_needs(name: str, flavour: Flavour, kind: str) -> None:
    config, layout, message = shrunk(preset(name, flavour)), LAYOUTS[kind], refusal(name, kind)
    if message is not None:
        with pytest.raises(ConfigError, match=message):
            make(config, layout)
        return
    m, batch = make(config, layout), rows(layout, 8)
    assert m(batch).logits.shape == (8,)
    loss = total_loss(m.train()(batch), batch)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.isfinite()
    assert [n for n, p in m.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@every_model
def test_no_rows(name: str, flavour: Flavour) -> None:
    assert make(shrunk(preset(name, flavour)), MIXED)(rows(MIXED, 0)).logits.shape == (0,)


@every_model
@pytest.mark.parametrize("option", ["dims", "fields", "frozen"])
def test_options_of_the_embedding(name: str, flavour: Flavour, option: str) -> None:
    config = shrunk(preset(name, flavour))
    changes = {
        "dims": replace(config.embedding, dims={"user": 6}),
        "fields": replace(config.embedding, fields=("history", "item", "price")),  # the item for those that compare with it
        "frozen": replace(config.embedding, frozen=("user",)),
    }
    m = make(replace(config, embedding=changes[option]), MIXED)
    assert m(rows(MIXED, 8)).logits.isfinite().all()
