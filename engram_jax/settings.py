"""Configs to plain values and back, and `--set field=value`."""

import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from engram_jax.config import RunConfig, require
from engram_jax.errors import UserError


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON values."""
    return typing.cast(dict[str, Any], json.loads(to_json(config)))


def to_json(config: Any) -> str:
    """The config as JSON text, keys sorted: equal configs give equal text."""
    return json.dumps(dataclasses.asdict(config), sort_keys=True, indent=1)


def from_dict(values: Mapping[str, Any], kind: Any = RunConfig, where: str = "") -> Any:
    """Build `kind` from the plain values that `to_dict` wrote.

    Raises:
      UserError: an unknown field, a missing one, or a value of the wrong type.
    """
    require(isinstance(values, Mapping), where.rstrip(".") or "config", values,
            "must be an object with fields")
    hints = _fields(kind)
    for name in values:
        _known(name, hints, where)
    missing = [f.name for f in dataclasses.fields(kind)
               if f.name not in values and f.default is dataclasses.MISSING]
    if missing:
        raise UserError(f"{where}{missing[0]}: is missing")
    return kind(**{name: _coerce(value, hints[name], where + name)
                   for name, value in values.items()})


def with_settings(config: Any, settings: Iterable[str]) -> Any:
    """A copy of `config` with every "field.field=value" applied, checked as a whole at the end.

    Values of text fields are taken as they are; others are JSON (numbers, lists, true, null), and
    "none" stands for null.

    Raises:
      UserError: no "=", an unknown field, a part that the recipe does not have, a wrong type, or
        settings that do not fit together.
    """
    values = dataclasses.asdict(config)
    for setting in settings:
        path, found, text = setting.partition("=")
        if not found:
            raise UserError(f"--set {setting}: write it as field=value, for example "
                            "training.steps=100")
        _put(values, type(config), path.strip().split("."), text.strip(), "")
    return from_dict(values, type(config))


def _put(values: dict[str, Any], kind: Any, path: list[str], text: str, where: str) -> None:
    """Put one value, read as the field's type, into the tree of plain values of a `kind`."""
    hints = _fields(kind)
    name, rest = path[0], path[1:]
    _known(name, hints, where)
    if not rest:
        made = _coerce(_parsed(text, hints[name]), hints[name], where + name)
        values[name] = to_dict(made) if dataclasses.is_dataclass(made) else made
        return
    inner = _not_none(hints[name])
    if not dataclasses.is_dataclass(inner):
        raise UserError(f"{where}{'.'.join(path)}: {name} has no fields of its own")
    if values[name] is None:
        raise UserError(f"{where}{name}: is not part of this recipe, so "
                        f"{'.'.join(path)} cannot be set")
    _put(values[name], inner, rest, text, f"{where}{name}.")


def _not_none(hint: Any) -> Any:
    """The type T of T | None; any other type as it is."""
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    return options[0] if isinstance(hint, types.UnionType) else hint


def _fields(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _known(name: str, hints: Mapping[str, Any], where: str) -> None:
    if name not in hints:
        raise UserError(f"{where}{name}: no such field; there are {', '.join(sorted(hints))}")


def _parsed(text: str, hint: Any) -> Any:
    if hint is str:
        return text
    if text.lower() in ("none", "null"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotated type `hint`, or a UserError that names both."""
    origin = typing.get_origin(hint)
    if isinstance(hint, types.UnionType):
        if value is None and type(None) in typing.get_args(hint):
            return None
        return _coerce(value, _not_none(hint), where)
    if dataclasses.is_dataclass(hint):
        return from_dict(value, hint, f"{where}.")
    if origin is tuple:
        item = typing.get_args(hint)[0]
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = [value]
        require(isinstance(value, (list, tuple)), where, value,
                f"must be a list of {item.__name__}, for example [1, 2]")
        return tuple(_coerce(v, item, where) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    require(type(value) is hint, where, value, f"must be {_described(hint)}")
    return value


def _described(hint: Any) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false",
            str: "text"}.get(hint, str(hint))


def first_difference(before: Any, now: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """The first field in which two trees of plain values differ: (name, before, now)."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            found = first_difference(before.get(key), now.get(key), f"{where}.{key}".lstrip("."))
            if found:
                return found
        return None
    return None if before == now else (where, before, now)
