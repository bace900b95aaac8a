"""The experiment on selection: its cases can be run, and its page says what was not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ctrlib.data.encoder import Encoder
from ctrlib.data.source import open_source
from ctrlib.data.store import Store
from ctrlib.data.vocabulary import Vocabulary
from ctrlib.schema import Schema, SparseField
from ctrlib.search.select import METHODS, method_options
from ctrlib.search.selection import Selection
from experiments.selection import run as experiment


@pytest.mark.parametrize("name", experiment.CASES)
def test_settings_fit_the_method(name: str) -> None:
    case = experiment.CASES[name]
    options = method_options(case.method, settings=case.settings)
    assert isinstance(options, METHODS[case.method].options)
    assert options != METHODS[case.method].options()
    assert case.run().model.embedding.dim >= 10


def test_a_page_without_results_names_every_case() -> None:
    assert experiment.page({}).endswith(f"Not run yet: {', '.join(experiment.CASES)}.\n")


def test_as_many_values_the_most_frequent(tmp_path: Path) -> None:
    rows = pa.table({"a": ["x"] * 5 + ["y"] * 3, "b": ["u"] * 4 + ["v"] * 2 + ["w"] * 2, "label": [0, 1] * 4})
    schema = Schema(fields=(SparseField(name="a"), SparseField(name="b")), labels=("label",))
    encoder = Encoder.fit(schema, open_source(rows))
    store = Store.create(tmp_path / "store", encoder, {"train": open_source(rows)})
    masks = {"a": np.array([False, True, False, True]), "b": np.array([False, True, False, False, True])}  # OOV: id 1
    chosen = Selection(method="optfs", encoder_hash=encoder.hash, values=masks)
    frequent = experiment.most_frequent(chosen, store)
    assert frequent.values is not None
    kept = {name: mask.tolist() for name, mask in frequent.values.items()}
    assert kept == {"a": [False, False, True, True], "b": [False, False, True, True, False]}
    vocabularies = [v for v in encoder.vocabularies.values() if isinstance(v, Vocabulary)]
    assert [v.values.to_pylist() for v in vocabularies] == [["x", "y"], ["u", "v", "w"]]
