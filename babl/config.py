"""Text to dataclass: defaults < TOML < dotted overrides, and every key checked."""

import dataclasses
import json
import tomllib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

from babl.errors import UserError, did_you_mean

T = TypeVar("T")


def load_config(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Returns the configuration in a TOML file, with `section.key=value` overrides on top.

    Args:
        cls: A dataclass whose fields are dataclasses, one per section.
        path: The TOML file.
        overrides: `section.key=value`; the value is read as TOML, or as a plain string where that fails.

    Raises:
        UserError: The file cannot be read, or a section, key or value is not what `cls` declares.
    """
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: {error}") from None
    for override in overrides:
        key, equals, text = override.partition("=")
        section, dot, name = key.partition(".")
        if not (equals and dot and name):
            raise UserError(f"'{override}': expected section.key=value")
        if not isinstance(tree.setdefault(section, {}), dict):
            raise UserError(f"{path}: {section} is not a section")
        tree[section][name] = _parse(text)
    return build_config(cls, tree, str(path))


def build_config(cls: type[T], tree: dict[str, Any], source: str) -> T:
    """Returns the configuration of a parsed TOML file; errors name `source` and are those of `load_config`."""
    return _build(cls, tree, source, "")


def save_config(config: Any, path: Path) -> None:
    """The file holds every key of the configuration, defaults included."""
    path.write_bytes(tomli_w.dumps(dataclasses.asdict(config)).encode())


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _build(cls: type[T], tree: dict[str, Any], file: str, prefix: str) -> T:
    """Returns cls(**tree), each value checked against the type its field declares."""
    types = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, value in tree.items():
        key = prefix + name
        if name not in types:
            what = "key" if prefix else "section"
            raise UserError(f"{file}: unknown {what} '{key}'{did_you_mean(name, types)}")
        if dataclasses.is_dataclass(types[name]):
            if not isinstance(value, dict):
                raise UserError(f"{file}: '{key}' must be a section")
            values[name] = _build(typing.cast(type, types[name]), value, file, f"{key}.")
        else:
            values[name] = _check(value, types[name], file, key)
    return cls(**values)


def _check(value: Any, expected: Any, file: str, key: str) -> Any:
    """Returns the value, an int widened where a float is declared."""
    if typing.get_origin(expected) is typing.Literal:
        choices = typing.get_args(expected)
        if value not in choices:
            near = did_you_mean(str(value), choices)
            raise UserError(f"{file}: {key} is {json.dumps(value)}, expected one of {', '.join(choices)}{near}")
        return value
    if expected is float and type(value) is int:
        return float(value)
    if typing.get_origin(expected) is list and type(value) is list:
        (item,) = typing.get_args(expected)
        return [_check(each, item, file, f"{key}[{i}]") for i, each in enumerate(value)]
    expected = typing.get_origin(expected) or expected
    if type(value) is not expected:
        raise UserError(f"{file}: {key} is {json.dumps(value, default=str)}, expected {expected.__name__}")
    return value


def at_least(bound: float, **values: float) -> None:
    """Every value is at least the bound; the keyword is its key, with `__` for the dot.

    Raises:
        UserError: One is not.
    """
    for name, value in values.items():
        if not value >= bound:
            raise UserError(f"{name.replace('__', '.')} is {value}, expected at least {bound:g}")
