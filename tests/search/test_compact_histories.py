"""Models that read histories: compacted they compute what they did with closed gates; fields of a history cannot be closed."""

from __future__ import annotations

import pytest
import torch

from ctrlib.data.encoder import Encoder
from ctrlib.models.presets import PRESETS, preset
from ctrlib.schema import DataError
from ctrlib.search.gates import ClosedGates, GatedModel
from ctrlib.search.selection import compact
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


@pytest.mark.parametrize("name", NAMES)
def test_fields(name: str, encoder: Encoder) -> None:
    full = awake(make(shrunk(preset(name)), encoder.layout))
    kept = tuple(f.name for f in SCHEMA.fields if f.name != "hist_item")
    with pytest.raises(DataError, match=r"field 'hist_item' is not kept, but .* reads it beside its embedding"):
        compact(full, select(encoder, fields=kept), encoder)
