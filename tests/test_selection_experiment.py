"""The experiment on selection: its cases can be run, and its page says what was not."""

from __future__ import annotations

import pytest

from ctrlib.search.select import METHODS, method_options
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
