from __future__ import annotations

import numpy as np
import pytest

from ctrlib.config import ConfigError, from_json, to_json
from ctrlib.experiment import RunConfig
from ctrlib.models.ctr import build_model
from ctrlib.models.presets import COMPONENTS, preset
from ctrlib.search.hedge import Axis
from ctrlib.search.space import COMPOSED, MODELS, AutoSpace, Candidate, Draw, Portfolio, candidate_of
from tests.models.small import LAYOUT


def _draw(space: AutoSpace, seed: int = 0, **fixed: object) -> tuple[Draw, Candidate]:
    draw = Draw(np.random.default_rng(seed), fixed)
    return draw, space(draw)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_of_the_space_is_built(model: str) -> None:
    for seed in range(6):
        draw, candidate = _draw(AutoSpace(encodes=True, numbers=True), seed, model=model)
        built = build_model(candidate.run.model, LAYOUT)
        assert sum(p.numel() for p in built.parameters()) > 0
        assert from_json(to_json(candidate.run), RunConfig, COMPONENTS) == candidate.run
        assert candidate.name == model
        assert draw.params["min_count"] == candidate.min_count


def test_conditional_parameters_are_absent_when_what_they_are_of_is() -> None:
    draw, _ = _draw(AutoSpace(), model="dnn", schedule="plateau")
    assert not {"block", "structure", "layers", "log2_epochs", "min_count", "numeric"} & set(draw.params)
    draw, _ = _draw(AutoSpace(), model=COMPOSED, block="products", structure="single", schedule="cosine")
    assert not {"layers", "depth", "log2_width", "dropout", "norm"} & set(draw.params)
    assert {"block", "structure", "log2_epochs"} <= set(draw.params)


def test_sizes_reach_the_model() -> None:
    _, candidate = _draw(AutoSpace(), model="dcnv2", layers=2, log2_width=7, depth=3, log2_dim=5, dropout=0.3, norm="batch")
    found = to_json(candidate.run.model)
    assert found["embedding"]["dim"] == 32
    cross, deep = found["interaction"]["streams"]
    assert cross["num_layers"] == 2
    assert (deep["hidden_units"], deep["norm"]) == ([128] * 3, "batch")
    assert deep["dropout"] == pytest.approx(0.3)


def test_batches_fit_the_rows_and_dense_tables_are_small() -> None:
    sizes = {_draw(AutoSpace(rows=2000), seed)[1].run.batch_size for seed in range(20)}
    assert max(s for s in sizes if s is not None) <= 2000 / 8
    choices = {_draw(AutoSpace(table_rows=10**7), seed)[0].params["table_optimizer"] for seed in range(30)}
    assert choices == {"adagrad", "lazy_adam"}


def test_learning_rate_is_tied_to_the_batch() -> None:
    small, large = (_draw(AutoSpace(), learning_rate=1e-3, log2_batch=n)[1].run for n in (8, 12))
    assert large.fit.optimizer.learning_rate / small.fit.optimizer.learning_rate == pytest.approx(4)


def test_portfolio_is_in_the_space_and_follows_the_models() -> None:
    assert len(Portfolio().draws(AutoSpace(encodes=True, numbers=True, table_rows=1000))) == 8
    assert [d.params["model"] for d in Portfolio().draws(AutoSpace(models=("dnn", "ipnn")))] == ["ipnn", "dnn"]
    assert Portfolio().draws(AutoSpace(models=("fm",))) == []


def test_portfolio_of_large_tables_has_another_optimizer_for_them() -> None:
    small, large = (Portfolio().draws(AutoSpace(table_rows=rows)) for rows in (1000, 10**7))
    dense = [d.params["table_optimizer"] == "dense" for d in small]
    assert dense == [False, True, True, False, False, False, False, False]
    for few, many, changed in zip(small, large, dense, strict=True):
        assert many.params == few.params | ({"table_optimizer": "adagrad"} if changed else {})


@pytest.mark.parametrize("rows", [2_000, 10_000, 16_383])
def test_portfolio_of_few_rows_has_the_largest_batch_they_allow(rows: int) -> None:
    draws = Portfolio().draws(AutoSpace(rows=rows, table_rows=1000))
    whole = Portfolio().draws(AutoSpace(table_rows=1000))
    assert len(draws) == 8
    assert {d.params["log2_batch"] for d in draws} == {int(np.log2(rows / 16))}
    for few, many in zip(draws, whole, strict=True):
        assert {**few.params, "log2_batch": 10} == many.params


def test_drawing_again_keeps_some_of_what_was_good() -> None:
    space = AutoSpace()
    first, _ = _draw(space, 1)
    again = Draw(np.random.default_rng(2), first.params, keep=0.7)
    space(again)
    same = [again.params.get(name) == value for name, value in first.params.items()]
    assert 0.3 < np.mean(same) < 1


def test_a_jitter_moves_numbers_a_little_and_nothing_else() -> None:
    space = AutoSpace()
    first, _ = _draw(space, 1)
    moved = [Draw(np.random.default_rng(seed), first.params, jitter=0.1) for seed in range(300)]
    for draw in moved:
        space(draw)
        assert {n: v for n, v in draw.params.items() if n not in ("ridge", "learning_rate")} == {
            n: v for n, v in first.params.items() if n not in ("ridge", "learning_rate")
        }
    axis = Axis(low=1e-1, high=1e6, log=True)
    apart = [axis.place(draw.params["ridge"]) - axis.place(first.params["ridge"]) for draw in moved]
    assert 0.05 < np.std(apart) < 0.12  # the ends of the range are walls
    assert all(1e-1 <= float(str(draw.params["ridge"])) <= 1e6 for draw in moved)


def test_places_and_values_of_an_axis_are_each_others_inverse() -> None:
    for axis in (Axis(low=-2, high=5), Axis(low=1e-4, high=10, log=True)):
        for place in (0.0, 0.3, 1.0):
            assert axis.place(axis.value(place)) == pytest.approx(place, abs=1e-12)


def test_bad_spaces() -> None:
    with pytest.raises(ConfigError, match=r"no model 'dcn2'; did you mean"):
        AutoSpace(models=("dcn2",))
    with pytest.raises(ConfigError, match="no models"):
        AutoSpace(models=())
    with pytest.raises(ConfigError, match="the space returned dict; expected a Candidate or a RunConfig"):
        candidate_of({})
    assert candidate_of(RunConfig(model=preset("fm"))).name == "model"
