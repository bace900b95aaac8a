"""Configs: frozen dataclasses from which components are built; to and from JSON by name; options set by dotted path.

Standard library only. Names in files are looked up in a closed table passed as an argument; nothing is evaluated or imported.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from ctrlib.schema import suggest


class ConfigError(ValueError):
    """An option that does not exist or has a value that cannot be. Says which, what was expected, and the nearest name."""


class Component:
    """Anything that is built from a nested ``Config``.

    A subclass declares ``@dataclass(frozen=True, kw_only=True, slots=True) class Config(Parent.Config)``; the class then knows
    its component (``AutoInt.Config.component is AutoInt``), so a composite can build its parts without a registry.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        """What a person chooses; validated in ``__post_init__``."""

        component: ClassVar[type[Any]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        own = cls.__dict__.get("Config")
        if own is not None:
            own.component = cls


C = TypeVar("C")
Table = Mapping[str, type[Component]]


def positive(name: str, *values: float) -> None:
    """Raise :class:`ConfigError` unless every value is above zero."""
    for value in values:
        if not value > 0:  # also NaN
            raise ConfigError(f"{name} is {value}; expected a number above 0")


def check_literals(config: object) -> None:
    """Raise :class:`ConfigError` unless every option that is one of some names is one, in this config and those inside it."""
    if isinstance(config, Mapping):
        config = tuple(config.values())
    if isinstance(config, tuple):
        for item in config:
            check_literals(item)
    if not isinstance(config, Component.Config):
        return
    for name, choices in _literals(type(config)).items():
        value = getattr(config, name)
        if isinstance(value, str) and value not in choices:
            check_choice(f"{type(config).__qualname__.removesuffix('.Config')}.{name}", value, choices)
    for f in dataclasses.fields(config):
        check_literals(getattr(config, f.name))


def _literals(cls: type) -> dict[str, tuple[str, ...]]:
    """The names that an option may be, of the options that may be nothing else as text."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        parts = [hint] if typing.get_origin(hint) is Literal else typing.get_args(hint)
        choices = [arg for part in parts if typing.get_origin(part) is Literal for arg in typing.get_args(part)]
        if choices and str not in parts:
            found[name] = tuple(choice for choice in choices if isinstance(choice, str))
    return found


def check_seed(seed: int) -> None:
    """Raise :class:`ConfigError` unless it is a seed that NumPy takes."""
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed is {seed}; expected a whole number from 0 to {2**32 - 1}")


def fraction(name: str, *values: float) -> None:
    """Raise :class:`ConfigError` unless every value is in [0, 1)."""
    for value in values:
        if not 0 <= value < 1:
            raise ConfigError(f"{name} is {value}; expected a number from 0 up to, not including, 1")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise :class:`ConfigError` unless ``value`` is one of ``choices``."""
    choices = tuple(choices)
    if value not in choices:
        expected = ", ".join(map(repr, choices))
        raise ConfigError(f"{name} is {value!r}; expected one of {expected}{suggest(str(value), choices)}")


def check_not_negative(name: str, value: float) -> None:
    """Raise :class:`ConfigError` if ``value`` is below zero."""
    if not value >= 0:
        raise ConfigError(f"{name} is {value}; expected 0 or more")


def to_json(config: object) -> Any:
    """A config as plain JSON values; the config of a component carries ``"type"``, the component's name."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        component = getattr(type(config), "component", None)
        tag = {"type": component.__name__} if component is not None else {}
        return tag | {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [to_json(item) for item in config]
    if isinstance(config, Mapping):
        return {key: to_json(value) for key, value in config.items()}
    return config


def from_json(data: object, expected: type[C], table: Table, path: str = "config") -> C:
    """The inverse of :func:`to_json`.

    Args:
        data: parsed JSON.
        expected: the config class to return, or a base of it.
        table: component classes by name; a ``"type"`` outside it is an error.
        path: how errors name the place.

    Raises:
        ConfigError: unknown type or option, or a value of the wrong kind.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path} is {data!r}; expected an object with the options of {expected.__qualname__}")
    options = dict(data)
    name = options.pop("type", None)
    cls: type[Any] = expected
    if name is None and getattr(cls, "component", None) not in (None, *table.values()):
        raise ConfigError(f"{path} has no type; expected the name of a {expected.__qualname__.removesuffix('.Config')}")
    if name is not None:
        if not isinstance(name, str) or name not in table:
            raise ConfigError(f"{path}.type is {name!r}, which is unknown{suggest(str(name), table)}")
        cls = table[name].Config
        if not issubclass(cls, expected):
            raise ConfigError(f"{path}.type is {name!r}; expected a {expected.__qualname__}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for option in options:
        if option not in names:
            raise ConfigError(f"{path} has no option {option!r}{suggest(option, names)}")
    for f in dataclasses.fields(cls):
        if f.name not in options and f.default is f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{path} lacks the option {f.name!r}, which has no default")
    return typing.cast(C, cls(**{k: _convert(v, hints[k], table, f"{path}.{k}") for k, v in options.items()}))


def override(config: C, assignments: Mapping[str, str], table: Table) -> C:
    """A copy of ``config`` with options set by dotted path: ``{"interaction.num_layers": "4", "fit.epochs": "2"}``.

    Values are JSON, or plain text for strings; lists may be written ``400,400``. Items of tuples are addressed by position
    (``interaction.streams.1.dropout``).

    Raises:
        ConfigError: a path that does not exist (the nearest that does is named) or a value of the wrong kind.
    """
    for path, text in assignments.items():
        config = _set(config, path.split("."), text, table, path)
    return config


def option_paths(config: object, prefix: str = "") -> list[str]:
    """Every dotted path that :func:`override` accepts for this config."""
    paths: list[str] = []
    items: list[tuple[str, object]] = []
    if dataclasses.is_dataclass(config):
        items = [(f.name, getattr(config, f.name)) for f in dataclasses.fields(config)]
    elif isinstance(config, tuple):
        items = [(str(i), item) for i, item in enumerate(config)]
    for name, value in items:
        nested = option_paths(value, f"{prefix}{name}.") if _is_nested(value) else []
        paths += [f"{prefix}{name}", *nested]
    return paths


def _is_nested(value: object) -> bool:
    return dataclasses.is_dataclass(value) or (isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)))


def _set(config: Any, steps: list[str], text: str, table: Table, path: str, items: Any = None) -> Any:
    """``config`` with one option set; ``items`` is the annotation of its items where it is a tuple."""
    step, rest = steps[0], steps[1:]
    if isinstance(config, tuple):
        if not step.isdigit() or int(step) >= len(config):
            raise ConfigError(f"{path}: {step!r} is not a position; expected 0 to {len(config) - 1}")
        at = int(step)
        item = _set(config[at], rest, text, table, path) if rest else _convert(_parse(text), items, table, path)
        return (*config[:at], item, *config[at + 1 :])
    if isinstance(config, Mapping) and not rest:
        return {**config, step: _parse(text)}
    names = [f.name for f in dataclasses.fields(config)] if dataclasses.is_dataclass(config) else []
    if step not in names:
        done = path.split(".")[: -len(steps)]
        known = [".".join([*done, p]) for p in option_paths(config)]
        raise ConfigError(f"there is no option {path!r}{suggest(path, known)}")
    current = getattr(config, step)
    hint = typing.get_type_hints(type(config))[step]
    if rest and isinstance(current, Mapping):
        value = _convert({**current, ".".join(rest): _parse(text)}, hint, table, path)
    elif rest:
        if not _is_nested(current):
            raise ConfigError(f"there is no option {path!r}: {step} is {current!r} and has no options of its own")
        options = [hint, *typing.get_args(hint)]  # a tuple, or a tuple or None
        items = next((typing.get_args(a)[0] for a in options if typing.get_origin(a) is tuple), None)
        value = _set(current, rest, text, table, path, items)
    else:
        value = _convert(_parse(text), hint, table, path)
    return dataclasses.replace(config, **{step: value})


def _parse(text: str) -> object:
    if text in ("None", "True", "False"):
        return {"None": None, "True": True, "False": False}[text]
    try:
        return json.loads(text)
    except ValueError:
        return [_parse(part) for part in text.split(",") if part] if "," in text else text


def _convert(value: object, hint: Any, table: Table, path: str) -> Any:
    """``value`` (JSON) as ``hint`` (an annotation of a config), or a :class:`ConfigError` that names ``path``."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        for option in options:
            try:
                return _convert(value, option, table, path)
            except ConfigError:
                if option is options[-1]:
                    raise
    if origin is Literal:
        if value not in args:
            raise ConfigError(
                f"{path} is {value!r}; expected one of {', '.join(map(repr, args))}"
                + suggest(str(value), [str(a) for a in args])
            )
        return value
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(item, args[0], table, f"{path}.{i}") for i, item in enumerate(items))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} is {value!r}; expected an object")
        return {str(k): _convert(v, args[1], table, f"{path}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, typing.cast(type, hint)) else from_json(value, hint, table, path)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{path} is {value!r}; expected {getattr(hint, '__name__', hint)}")
