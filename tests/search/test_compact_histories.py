"""Models that read histories: compacted they compute what they did with closed gates; fields of a history cannot be closed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ctrlib.data.encoder import Encoder
from ctrlib.data.source import open_source
from ctrlib.data.store import Store
from ctrlib.models.presets import PRESETS, preset
from ctrlib.schema import DataError
from ctrlib.search.gates import ClosedGates, GatedModel
from ctrlib.search.ranking import best_fields
from ctrlib.search.selection import apply_to_store, compact
from tests.models.small import awake, make, shrunk
from tests.models.test_history_runs import SCHEMA, raw
from tests.search.test_compact import without
from tests.search.test_selection import masks, select

NAMES = [name for name, p in PRESETS.items() if p.needs_history]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.fit(SCHEMA, raw(300, 0))


@pytest.mark.parametrize("name", NAMES)
def test_values(name: str, encoder: Encoder) -> None:
    full = awake(make(shrunk(preset(name)), encoder.layout))
    kept = {table: mask for table, mask in masks(encoder).items() if table != "hist_gap"}
    rows = raw(50, 1)
    small, derived = compact(full, select(encoder, values=kept), encoder)
    with torch.no_grad():
        batch = encoder.transform(rows)
        expected = full(without(batch, encoder, kept)).logits
        assert (full(batch).logits - expected).abs().max() > 1e-3
        torch.testing.assert_close(small(derived.transform(rows)).logits, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(GatedModel(full, ClosedGates(kept)).eval()(batch).logits, expected, atol=1e-5, rtol=0)


HISTORY = tuple(f.name for f in SCHEMA.fields if f.name.startswith("hist"))
OTHERS = tuple(f.name for f in SCHEMA.fields if f.name not in HISTORY)


@pytest.mark.parametrize(
    ("fields", "gaps"),
    [((*OTHERS, *HISTORY), True), (("hour", "hist_category"), True), (OTHERS, False), ((*OTHERS, "hist_gap"), False)],
    ids=str,
)
def test_time_gaps_follow_their_history(fields: tuple[str, ...], gaps: bool, encoder: Encoder, tmp_path: Path) -> None:
    """They are no field of the schema, so that no ranking names them."""
    rows = raw(60, 2)
    store = Store.create(tmp_path / "store", encoder, {"train": open_source(rows)})
    selection = select(encoder, fields=fields)
    derived = selection.apply(encoder)
    kept = tuple(name for name in (*OTHERS, *HISTORY) if name in fields)
    assert derived.layout.names == ((*kept, "hist_gap") if gaps else kept)
    assert [h.gaps for h in derived.schema.histories] == (["hist_gap"] if gaps else [])
    found, want = derived.transform(rows).sequences, encoder.transform(rows).sequences
    stored = apply_to_store(selection, store, tmp_path / "kept").split("train").sequences
    assert set(found) == set(stored) == {name for name in kept if name in HISTORY} | ({"hist_gap"} if gaps else set())
    if gaps:
        assert torch.equal(found["hist_gap"].values, want["hist_gap"].values)
        assert torch.equal(stored["hist_gap"][0], want["hist_gap"].values)


def test_all_fields_are_all_there_was(encoder: Encoder) -> None:
    kept = best_fields(SCHEMA, dict.fromkeys(encoder.layout.names, 1.0), 1.0)
    assert select(encoder, fields=kept).apply(encoder).hash == encoder.hash
    with pytest.raises(DataError, match="keeps no field"):
        select(encoder, fields=("hist_gap",)).apply(encoder)


@pytest.mark.parametrize("name", NAMES)
def test_fields(name: str, encoder: Encoder) -> None:
    full = awake(make(shrunk(preset(name)), encoder.layout))
    kept = tuple(f.name for f in SCHEMA.fields if f.name != "hist_item")
    with pytest.raises(DataError, match=r"field 'hist_item' is not kept, but .* reads it beside its embedding"):
        compact(full, select(encoder, fields=kept), encoder)
