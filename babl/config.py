"""Text to dataclass: defaults < TOML < dotted overrides, and every key checked."""

import dataclasses
import json
import math
import tomllib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tomli_w
from msgspec import Meta

from babl.errors import UserError, did_you_mean

T = TypeVar("T")

# Types of fields with bounds, which are checked wherever a configuration is read.
PositiveInt = Annotated[int, Meta(ge=1)]
NonNegativeInt = Annotated[int, Meta(ge=0)]
NonNegativeFloat = Annotated[float, Meta(ge=0)]
Seed = Annotated[int, Meta(ge=0, lt=2**32)]
NonEmptyStr = Annotated[str, Meta(min_length=1)]


def load_config(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Returns the configuration in a TOML file, with `section.key=value` overrides on top.

    Args:
        cls: A dataclass whose fields are dataclasses, one per section.
        path: The TOML file.
        overrides: `section.key=value`; the value is read as TOML, or as a plain string where that fails or the key is
            declared as one. Further dots lead into a table: `model.shape.d_model=64`.

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
        _override(tree, cls, override, str(path))
    return build_config(cls, tree, str(path))


def build_config(cls: type[T], tree: dict[str, Any], source: str) -> T:
    """Returns the configuration of a parsed TOML file; errors name `source` and are those of `load_config`."""
    return _build(cls, tree, source, "")


def save_config(config: Any, path: Path) -> None:
    """Writes every key of the configuration, defaults included."""
    path.write_bytes(tomli_w.dumps(dataclasses.asdict(config)).encode())


def _override(tree: dict[str, Any], cls: type, override: str, file: str) -> None:
    """Puts the value of `section.key=value` into the tree."""
    key, equals, text = override.partition("=")
    *sections, name = key.split(".")
    if not (equals and sections and name):
        raise UserError(f"'{override}': expected section.key=value")
    node, types = tree, _types(cls)
    for depth, section in enumerate(sections, 1):
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise UserError(f"{file}: {'.'.join(sections[:depth])} is not a section")
        types = _types(types.get(section))
    value = _parse(text)
    is_text = _without_bounds(types.get(name)) is str
    node[name] = text if is_text and not isinstance(value, str) else value


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _types(cls: Any) -> dict[str, Any]:
    """Returns what the fields of a dataclass are declared as, bounds included; nothing for what is none."""
    return typing.get_type_hints(cls, include_extras=True) if dataclasses.is_dataclass(cls) else {}


def _without_bounds(declared: Any) -> Any:
    return typing.get_args(declared)[0] if typing.get_origin(declared) is Annotated else declared


def _build(cls: type[T], tree: dict[str, Any], file: str, prefix: str) -> T:
    """Returns cls(**tree), each value checked against the type its field declares."""
    types = _types(cls)
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
    if typing.get_origin(expected) is Annotated:
        bare, bounds = typing.get_args(expected)
        value = _check(value, bare, file, key)
        if broken := _broken_bound(value, bounds):
            raise UserError(f"{file}: {key} is {json.dumps(value)}, expected {broken}")
        return value
    if typing.get_origin(expected) is typing.Literal:
        choices = typing.get_args(expected)
        if value not in choices:
            near = did_you_mean(str(value), choices)
            raise UserError(f"{file}: {key} is {json.dumps(value)}, expected one of {', '.join(choices)}{near}")
        return value
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is float and not math.isfinite(value):
        raise UserError(f"{file}: {key} is {value}, expected a finite number")
    if typing.get_origin(expected) is list and type(value) is list:
        (item,) = typing.get_args(expected)
        return [_check(each, item, file, f"{key}[{i}]") for i, each in enumerate(value)]
    expected = typing.get_origin(expected) or expected
    if type(value) is not expected:
        raise UserError(f"{file}: {key} is {json.dumps(value, default=str)}, expected {expected.__name__}")
    return value


def _broken_bound(value: Any, bounds: Meta) -> str | None:
    """Returns the bound that the value breaks, in words, or None."""
    if bounds.ge is not None and value < bounds.ge:
        return f"at least {bounds.ge:g}"
    if bounds.lt is not None and value >= bounds.lt:
        return f"less than {bounds.lt}"
    if bounds.min_length is not None and len(value) < bounds.min_length:
        return f"at least {bounds.min_length} character"
    return None


def at_least(bound: float, **values: float) -> None:
    """Checks that every value is at least the bound; the keyword is its key, with `__` for the dot.

    Raises:
        UserError: One is not.
    """
    for name, value in values.items():
        if not value >= bound:
            raise UserError(f"{name.replace('__', '.')} is {value}, expected at least {bound:g}")
