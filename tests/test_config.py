"""Configs: JSON by name from a closed table, options by dotted path, and errors that name the nearest option."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest

from ctrlib.config import (
    Component,
    ConfigError,
    Table,
    check_literals,
    fraction,
    from_json,
    option_paths,
    override,
    positive,
    to_json,
)
from ctrlib.embedding import FeatureEmbedding
from ctrlib.interactions.compose import Stack
from ctrlib.interactions.mlp import MLP
from ctrlib.models.ctr import build_model
from ctrlib.models.presets import preset
from ctrlib.schema import BatchLayout, SparseColumn


class Block(Component):
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Component.Config):
        pass


class Wide(Block):
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Block.Config):
        hidden_units: tuple[int, ...] = (4, 4)
        dropout: float = 0.0
        activation: Literal["relu", "gelu"] = "relu"
        bias: bool = True
        limit: int | None = None
        title: str = ""

        def __post_init__(self) -> None:
            fraction("dropout", self.dropout)


class Deep(Block):
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Block.Config):
        layers: int
        rates: Mapping[str, float] = field(default_factory=dict)


class Both(Block):
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Block.Config):
        streams: tuple[Block.Config, ...] = (Wide.Config(), Deep.Config(layers=2))
        head: Wide.Config | None = None
        first: Block.Config = field(default_factory=Wide.Config)


@dataclass(frozen=True, kw_only=True)
class Run:
    model: Block.Config
    epochs: int = 1
    width: int | tuple[int, ...] = 3


TABLE: Table = {"Wide": Wide, "Deep": Deep, "Both": Both}
RUN = Run(
    model=Both.Config(
        streams=(Deep.Config(layers=3, rates={"a.b": 0.5, "c": 1.0}), Wide.Config(hidden_units=(), limit=4, dropout=0.25)),
        head=Wide.Config(title="naïve"),
    ),
    width=(1, 2),
)


def test_a_config_knows_its_component() -> None:
    assert Wide.Config.component is Wide
    assert Both.Config().streams[1].component is Deep


def test_round_trip() -> None:
    data = json.loads(json.dumps(to_json(RUN)))
    assert data["model"]["type"] == "Both"
    assert data["model"]["streams"][0] == {"type": "Deep", "layers": 3, "rates": {"a.b": 0.5, "c": 1.0}}
    assert from_json(data, Run, TABLE) == RUN
    assert isinstance(from_json(data, Run, TABLE).model.streams, tuple)  # type: ignore[attr-defined]


def test_a_concrete_option_needs_no_type() -> None:
    assert from_json({"head": {"dropout": 0.5}}, Both.Config, TABLE).head == Wide.Config(dropout=0.5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"model": {"type": "Wid"}}, "config.model.type is 'Wid', which is unknown; did you mean 'Wide'"),
        ({"model": {"type": ["Wide"]}}, r"config.model.type is \['Wide'\], which is unknown"),
        ({"model": {}}, "config.model has no type; expected the name of a Block"),
        ({"model": {"type": "Wide", "droput": 0.1}}, "config.model has no option 'droput'; did you mean 'dropout'"),
        ({"model": {"type": "Wide", "dropout": "x"}}, "config.model.dropout is 'x'; expected float"),
        ({"model": {"type": "Wide", "dropout": True}}, "config.model.dropout is True; expected float"),
        ({"model": {"type": "Wide", "dropout": 1}}, "dropout is 1.0; expected a number from 0 up to"),
        ({"model": {"type": "Wide", "hidden_units": [1, 2.5]}}, r"config.model.hidden_units.1 is 2.5; expected int"),
        ({"model": {"type": "Wide", "hidden_units": [True]}}, r"config.model.hidden_units.0 is True; expected int"),
        (
            {"model": {"type": "Wide", "activation": "rely"}},
            "activation is 'rely'; expected one of 'relu', 'gelu'; did you mean 'relu'",
        ),
        ({"model": {"type": "Wide", "bias": 1}}, "config.model.bias is 1; expected bool"),
        ({"model": {"type": "Wide", "limit": "4"}}, "config.model.limit is '4'; expected int"),
        ({"model": {"type": "Wide", "title": 4}}, "config.model.title is 4; expected str"),
        ({"model": {"type": "Deep"}}, "config.model lacks the option 'layers', which has no default"),
        ({"model": {"type": "Deep", "layers": 1, "rates": [1]}}, r"config.model.rates is \[1\]; expected an object"),
        ({"model": {"type": "Deep", "layers": 1, "rates": {"a": "x"}}}, "config.model.rates.a is 'x'; expected float"),
        (
            {"model": {"type": "Both", "head": {"type": "Deep", "layers": 1}}},
            "config.model.head.type is 'Deep'; expected a Wide",
        ),
        ({"model": {"type": "Both", "streams": [{"type": "Deep"}]}}, "config.model.streams.0 lacks the option 'layers'"),
        ({"model": [1]}, r"config.model is \[1\]; expected an object with the options of Block.Config"),
        ({}, "config lacks the option 'model'"),
        ([], r"config is \[\]; expected an object"),
    ],
)
def test_bad_json(data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_json(data, Run, TABLE)


def test_nothing_is_looked_up_outside_the_table() -> None:
    with pytest.raises(ConfigError, match="unknown"):
        from_json({"model": {"type": "os.system"}}, Run, TABLE)
    with pytest.raises(ConfigError, match="unknown"):
        from_json({"model": {"type": "Deep", "layers": 1}}, Run, {"Wide": Wide})


@pytest.mark.parametrize(
    ("path", "text", "read"),
    [
        ("epochs", "7", lambda r: r.epochs == 7),
        ("width", "9", lambda r: r.width == 9),
        ("width", "9,8", lambda r: r.width == (9, 8)),
        ("model.streams.1.hidden_units", "400,300", lambda r: r.model.streams[1].hidden_units == (400, 300)),
        ("model.streams.1.hidden_units", "[400]", lambda r: r.model.streams[1].hidden_units == (400,)),
        ("model.streams.1.hidden_units", "400", lambda r: r.model.streams[1].hidden_units == (400,)),
        ("model.streams.1.hidden_units", "[]", lambda r: r.model.streams[1].hidden_units == ()),
        ("model.streams.1.dropout", "1e-3", lambda r: r.model.streams[1].dropout == 0.001),
        ("model.streams.1.dropout", "0", lambda r: type(r.model.streams[1].dropout) is float),
        ("model.streams.1.limit", "null", lambda r: r.model.streams[1].limit is None),
        ("model.streams.1.limit", "None", lambda r: r.model.streams[1].limit is None),
        ("model.streams.1.bias", "false", lambda r: r.model.streams[1].bias is False),
        ("model.streams.1.bias", "False", lambda r: r.model.streams[1].bias is False),
        ("model.streams.1.activation", "gelu", lambda r: r.model.streams[1].activation == "gelu"),
        ("model.head.title", "plain text", lambda r: r.model.head.title == "plain text"),
        ("model.head.title", '"12"', lambda r: r.model.head.title == "12"),
        ("model.head", "null", lambda r: r.model.head is None),
        ("model.head", '{"dropout": 0.5}', lambda r: r.model.head == Wide.Config(dropout=0.5)),
        ("model.first", '{"type": "Deep", "layers": 9}', lambda r: r.model.first == Deep.Config(layers=9)),
        ("model.streams.0", '{"type": "Wide"}', lambda r: r.model.streams[0] == Wide.Config()),
        ("model.streams.0.rates.c", "2", lambda r: r.model.streams[0].rates == {"a.b": 0.5, "c": 2.0}),
        ("model.streams.0.rates.a.b", "0.75", lambda r: r.model.streams[0].rates == {"a.b": 0.75, "c": 1.0}),
        ("model.streams.0.rates.new", "3", lambda r: r.model.streams[0].rates["new"] == 3.0),
    ],
)
def test_override(path: str, text: str, read: Any) -> None:
    before = to_json(RUN)
    changed = override(RUN, {path: text}, TABLE)
    assert read(changed)
    assert to_json(RUN) == before


def test_several_overrides_apply_in_order() -> None:
    changed = override(RUN, {"model.head": "null", "epochs": "2", "model.streams.1.limit": "8"}, TABLE)
    assert changed.epochs == 2
    assert changed.model.head is None  # type: ignore[attr-defined]
    assert changed.model.streams[1].limit == 8  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("epoch", "1", "no option 'epoch'; did you mean 'epochs'"),
        ("model.streams.1.droput", "1", "no option 'model.streams.1.droput'; did you mean 'model.streams.1.dropout'"),
        ("model.streams.2.dropout", "1", "'2' is not a position; expected 0 to 1"),
        ("model.streams.x.dropout", "1", "'x' is not a position"),
        ("model.streams.0", "5", "model.streams.0 is 5; expected an object"),
        ("epochs.x", "1", "no option 'epochs.x': epochs is 1 and has no options of its own"),
        ("model.streams.1.limit.x", "1", "limit is 4 and has no options"),
        ("epochs", "many", "epochs is 'many'; expected int"),
        ("epochs", "1.5", "epochs is 1.5; expected int"),
        ("epochs", "true", "epochs is True; expected int"),
        ("model.streams.1.dropout", "1.5", "dropout is 1.5; expected a number from 0"),
        ("model.streams.1.dropout", "NaN", "dropout is nan; expected a number from 0"),
        ("model.streams.1.activation", "tanh", "expected one of 'relu', 'gelu'"),
        ("model.first", '{"type": "Nope"}', "model.first.type is 'Nope', which is unknown"),
        ("", "1", "no option ''"),
    ],
)
def test_bad_overrides(path: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(RUN, {path: text}, TABLE)


def test_every_listed_path_can_be_set() -> None:
    def at(config: Any, path: str) -> Any:
        for step in path.split("."):
            config = config[int(step)] if isinstance(config, tuple) else getattr(config, step)
        return config

    paths = option_paths(RUN)
    assert {"model", "model.streams", "model.streams.0", "model.streams.1.dropout", "model.head.title", "epochs"} <= set(paths)
    for path in paths:
        text = json.dumps(to_json(at(RUN, path)))
        assert override(RUN, {path: text}, TABLE) == RUN, path


def test_positive_and_fraction() -> None:
    positive("x", 1, 0.1)
    fraction("x", 0, 0.999)
    for value in (0, -1, math.nan):
        with pytest.raises(ConfigError, match=f"x is {value}; expected a number above 0"):
            positive("x", 1, value)
    for value in (1, -0.1, math.nan):
        with pytest.raises(ConfigError, match=f"x is {value}; expected a number from 0"):
            fraction("x", 0.5, value)


def test_names_that_are_none_of_an_option() -> None:
    """Also where the config was made in Python, and in parts of parts; what may be any text is left alone."""
    check_literals(RUN)
    config = Stack.Config(blocks=(MLP.Config(hidden_units=(4,)), MLP.Config(hidden_units=(4,), norm="batchnorm")))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"MLP\.norm is 'batchnorm'; expected one of 'none', 'batch', 'layer'; did you mean"):
        check_literals(config)
    layout = BatchLayout(sparse=(SparseColumn("a", 9, "a"), SparseColumn("b", 9, "b")))
    wrong = replace(preset("dnn"), weight_init="xavier")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"CTRModel\.weight_init is 'xavier'"):
        build_model(wrong, layout)
    with pytest.raises(ConfigError, match="the rows are nodes of a graph with the classes x, y; expected a model of nodes"):
        build_model(preset("dnn"), replace(layout, classes=("x", "y")))
    with pytest.raises(ConfigError, match=r"embedding\.fields names a field twice: a, b, a"):
        FeatureEmbedding.Config(fields=("a", "b", "a"))
