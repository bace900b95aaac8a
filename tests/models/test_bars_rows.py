"""Rows of BARS' leaderboard: published settings, as changes of the ``fuxictr`` flavour, give the logged parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from ctrlib.config import override
from ctrlib.models.presets import COMPONENTS, preset
from ctrlib.schema import BatchLayout
from tests.models.test_ctr import FRAPPE_1, MOVIELENS_1, count

Changes = dict[str, object]


def afm(width: int, dropout: float) -> Changes:
    options = {"attention_dim": width, "attention_dropout": dropout, "dropout": dropout}
    return {f"interaction.blocks.0.{name}": value for name, value in options.items()}


def nfm(dropout: float) -> Changes:
    return {"interaction.blocks.1.norm": "none", "interaction.blocks.1.dropout": dropout}


def afn(neurons: int, units: int, deep_dropout: float | None = None) -> Changes:
    changes: Changes = {
        "interaction.blocks.0.num_neurons": neurons,
        "interaction.blocks.1.hidden_units": [units],
        "interaction.blocks.1.norm": "none",
        "interaction.blocks.1.dropout": 0.4,
    }
    return changes if deep_dropout is None else {**changes, "deep.norm": "none", "deep.dropout": deep_dropout}


def sam(num_layers: int, pooling: str, dropout: float) -> Changes:
    options = {"kind": "sam3a", "num_layers": num_layers, "residual": True, "pooling": pooling, "dropout": dropout}
    return {f"interaction.{name}": value for name, value in options.items()}


def aoanet(num_layers: int) -> Changes:
    options = {"0.num_layers": num_layers, "0.num_subspaces": 2, "1.dropout": 0.3}
    return {f"interaction.streams.{name}": value for name, value in options.items()}


def destine(num_layers: int, width: int, attention_dropout: float, dropout: float) -> Changes:
    options = {
        "num_layers": num_layers,
        "num_heads": 1,
        "head_dim": width,
        "scale": True,
        "attention_dropout": attention_dropout,
    }
    changes: Changes = {f"interaction.streams.0.blocks.0.{name}": value for name, value in options.items()}
    return {**changes, "interaction.streams.1.dropout": dropout, "first_order": None}


def no_effect(num_layers: int, width: int) -> int:
    """FuxiCTR's biases of DESTINE's queries, keys and unary term, which cancel in the softmaxes; here there are none."""
    return num_layers * (2 * width + 1)


ROWS: Mapping[tuple[str, str], tuple[Changes, int]] = {
    ("frappe", "afm"): (afm(128, 0.1), 60_826),
    ("frappe", "nfm"): (nfm(0.4), 384_880),
    ("frappe", "afn"): (afn(1000, 400), 4_066_711),
    ("frappe", "afn_plus"): (afn(1000, 400, 0.2), 4_482_205),
    ("frappe", "sam"): (sam(4, "none", 0.2), 58_791),
    ("frappe", "aoanet"): (aoanet(1), 418_331),
    ("frappe", "destine_plus"): (destine(4, 128, 0.0, 0.2), 623_346 - no_effect(4, 128)),
    ("movielens", "afm"): (afm(16, 0.4), 992_832),
    ("movielens", "nfm"): (nfm(0.2), 1_318_230),
    ("movielens", "afn"): (afn(800, 200), 2_506_797),
    ("movielens", "afn_plus"): (afn(800, 200, 0.5), 3_742_791),
    ("movielens", "sam"): (sam(2, "weighted", 0.0), 902_984),
    ("movielens", "aoanet"): (aoanet(3), 1_239_113),
    ("movielens", "destine_plus"): (destine(3, 64, 0.1, 0.3), 1_274_821 - no_effect(3, 64)),
}
LAYOUTS: Mapping[str, BatchLayout] = {"frappe": FRAPPE_1, "movielens": MOVIELENS_1}


@pytest.mark.parametrize(("data", "name"), ROWS)
def test_has_the_logged_parameters(data: str, name: str) -> None:
    changes, published = ROWS[data, name]
    config = override(preset(name, "fuxictr"), {path: json.dumps(value) for path, value in changes.items()}, COMPONENTS)
    assert count(config, LAYOUTS[data]) == published
