"""20 fields that tell something among 80 that do not: the methods find them, and the committed results say so."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from ctrlib.data.store import Store
from ctrlib.search.ranking import kendall_tau
from experiments.field_ranking import planted


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return planted.store(tmp_path_factory.mktemp("planted") / "store", 0)


@pytest.mark.parametrize(
    "method", [("outrank", ""), ("permutation", "lr"), ("gradient", "lr"), ("gbdt", "scikit-learn"), ("autofield", "deepfm")]
)
def test_eighteen_of_twenty(data: Store, method: tuple[str, str]) -> None:
    """By the median of three seeds: one run of AutoField finds 17 to 20."""
    selections = [planted.METHODS[method](data, seed) for seed in range(3)]
    assert all(len(selection.scores) == 100 for selection in selections)
    assert all(len(selection.fields or ()) == planted.TOP for selection in selections)
    assert statistics.median(planted.found(selection) for selection in selections) >= 18


def test_two_seeds_rank_alike(data: Store) -> None:
    a, b = (planted.METHODS["outrank", ""](data, seed).scores for seed in (0, 1))
    assert 0.3 < kendall_tau(a, b) < 1


def test_plain_mutual_information_finds_none(data: Store) -> None:
    """The test above is not easy: what has many values is ahead."""
    assert planted.found(planted.METHODS["outrank, noise=none", ""](data, 0)) == 0


def test_committed_results() -> None:
    results = json.loads((planted.HERE / "results.json").read_text(encoding="utf-8"))
    assert [(r["method"], r["model"]) for r in results] == list(planted.METHODS)
    assert Path(planted.HERE / "README.md").read_text(encoding="utf-8") == planted.page(results)
    assert all(len(r["found"]) == 5 and len(r["tau"]) == 10 for r in results)
    good = {r["method"] for r in results if min(r["found"]) >= 18}
    assert len(good) >= 3
