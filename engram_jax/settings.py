"""Configs to plain values and back, and changed: `changed` from code, `--set` from the user."""

import dataclasses
import difflib
import json
import math
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from engram_jax.config import RunConfig, require
from engram_jax.errors import UserError

Config = typing.TypeVar("Config")


def json_text(values: Any, **layout: Any) -> str:
    """JSON as every reader of JSON takes it: what is no finite number is null.

    Args:
      values: plain values.
      layout: `indent`, `sort_keys` and so on, as `json.dumps` takes them.
    """
    return json.dumps(_finite(values), allow_nan=False, **layout)


def _finite(values: Any) -> Any:
    """The plain values, NaN and infinities None."""
    if isinstance(values, Mapping):
        return {name: _finite(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON values."""
    return typing.cast(dict[str, Any], json.loads(to_json(config)))


def to_json(config: Any) -> str:
    """The config as JSON text, keys sorted: equal configs give equal text."""
    return json_text(dataclasses.asdict(config), sort_keys=True, indent=1)


def from_dict(values: Mapping[str, Any], kind: Any = RunConfig, where: str = "") -> Any:
    """Build `kind` from the plain values that `to_dict` wrote.

    Raises:
      UserError: an unknown field, a missing one, or a value of the wrong type.
    """
    require(isinstance(values, Mapping), where.rstrip(".") or "config", values,
            "must be an object with fields")
    hints = _fields(kind)
    for name in values:
        _known(name, kind, where)
    missing = [f.name for f in dataclasses.fields(kind)
               if f.name not in values and f.default is dataclasses.MISSING]
    if missing:
        raise UserError(f"{where}{missing[0]}: is missing")
    return kind(**{name: _coerce(value, hints[name], where + name)
                   for name, value in values.items()})


def from_file(path: object, values: Mapping[str, Any], kind: Any = RunConfig,
              where: str = "") -> Any:
    """Build `kind` from the plain values that a file holds; what is wrong names the file.

    Raises:
      UserError: as `from_dict`.
    """
    try:
        return from_dict(values, kind, where)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy of `config` in which the fields that `changes` names have other values.

    Args:
      config: a run, or any part of one.
      changes: values by dotted names, such as {"model.width": 64, "model.engram": None}. A part is
        replaced before fields within it are.

    Raises:
      UserError: an unknown field, a field of a part that `config` does not have, a value of the
        wrong type, or values that do not fit together.
    """
    return _changed(config, changes, "")


def _changed(config: Config, changes: Mapping[str, Any], where: str) -> Config:
    kind: Any = type(config)
    hints = _fields(kind)
    own: dict[str, Any] = {}
    within: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        _known(name, kind, where, path)
        if rest:
            within.setdefault(name, {})[rest] = value
        else:
            own[name] = _coerce(value, hints[name], where + name)
    for name, inner in within.items():
        part = own.get(name, getattr(config, name))
        _check_part(part, hints[name], f"{where}{name}", next(iter(inner)))
        own[name] = _changed(part, inner, f"{where}{name}.")
    return typing.cast(Config, dataclasses.replace(typing.cast(Any, config), **own))


def _check_part(part: Any, hint: Any, name: str, rest: str) -> None:
    """Refuse a field within what has none."""
    if part_of(hint) is None:
        raise UserError(f"{name}.{rest}: {name} has no fields of its own")
    if part is None:
        raise UserError(f"{name}: is not part of this recipe, so {rest} cannot be set")


def with_settings(config: Config, settings: Iterable[str]) -> Config:
    """A copy of `config` with every "field.field=value" applied, checked as a whole at the end.

    Values of text fields are taken as they are; others are JSON (numbers, lists, true, null), and
    "none" stands for null. The last setting of a field counts.

    Raises:
      UserError: no "=", an unknown field, a part that the recipe does not have, a wrong type, or
        settings that do not fit together.
    """
    changes: dict[str, Any] = {}
    for setting in settings:
        before, sign, text = setting.partition("=")
        if not sign:
            raise UserError(f"--set {setting}: write it as field=value, for example "
                            "training.steps=100")
        path = before.strip()
        for earlier in [name for name in changes if f"{name}.".startswith(f"{path}.")]:
            del changes[earlier]
        changes[path] = _parsed(text.strip(), field_type(type(config), path))
    return changed(config, changes)


def paths(kind: Any) -> Iterator[tuple[str, Any]]:
    """Every field of a config of this kind with its type: "model", "model.width" and so on."""
    for name, hint in _fields(kind).items():
        yield name, hint
        if inner := part_of(hint):
            yield from ((f"{name}.{path}", deeper) for path, deeper in paths(inner))


def field_type(kind: Any, path: str, where: str = "") -> Any:
    """The type of the field `path` of a `kind`."""
    name, _, rest = path.partition(".")
    _known(name, kind, where, path)
    hint = _fields(kind)[name]
    if not rest:
        return hint
    if (inner := part_of(hint)) is None:
        raise UserError(f"{where}{path}: {name} has no fields of its own")
    return field_type(inner, rest, f"{where}{name}.")


def part_of(hint: Any) -> Any:
    """The config class of a field that has fields of its own; None for a plain one."""
    inner = _not_none(hint)
    return inner if dataclasses.is_dataclass(inner) else None


def _not_none(hint: Any) -> Any:
    """The type T of T | None; any other type as it is."""
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    return options[0] if isinstance(hint, types.UnionType) else hint


def _fields(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _known(name: str, kind: Any, where: str, path: str = "") -> None:
    """Refuse a `name` that is no field of `kind`, with the field that may have been meant."""
    fields = _fields(kind)
    if name in fields:
        return
    meant = _meant(path or name, [known for known, _ in paths(kind)])
    names = " or ".join(f"{where}{known}" for known in meant)
    raise UserError(f"{where}{name}: no such field; " + (
        f"did you mean {names}?" if names else f"there are {', '.join(sorted(fields))}"))


def _meant(path: str, known: Sequence[str]) -> list[str]:
    """Which known fields somebody meant who wrote `path`: the same name elsewhere, or one alike."""
    above, _, name = path.rpartition(".")
    names = {field: field.rpartition(".")[2] for field in known}
    beside = [field for field in known if field.rpartition(".")[0] == above]
    return (
        [field for field in known if path and field.endswith(f".{path}")]
        or [field for field in known if names[field] == name]
        or next((alike for fields in (beside, known)
                 if (alike := _alike(name, {field: names[field] for field in fields}))), []))


def _alike(name: str, names: Mapping[str, str]) -> list[str]:
    """The fields whose names begin with `name`, or else those that are spelled most like it."""
    longer = [field for field, full in names.items() if name and full.startswith(name)]
    close = difflib.get_close_matches(name, names.values(), n=1)
    return longer or [field for field, full in names.items() if full in close]


def _parsed(text: str, hint: Any) -> Any:
    if hint is str:
        return text
    if text.lower() in ("none", "null"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotated type `hint`, or a UserError that names both."""
    origin = typing.get_origin(hint)
    if isinstance(hint, types.UnionType):
        if value is None and type(None) in typing.get_args(hint):
            return None
        return _coerce(value, _not_none(hint), where)
    if dataclasses.is_dataclass(hint):
        known = isinstance(value, typing.cast(type, hint))
        return value if known else from_dict(value, hint, f"{where}.")
    if origin is tuple:
        item = typing.get_args(hint)[0]
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = [value]
        require(isinstance(value, (list, tuple)), where, value,
                f"must be a list of {item.__name__}, for example [1, 2]")
        return tuple(_coerce(v, item, where) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        require(abs(value) <= sys.float_info.max, where, value, "must be a number below 1.8e308")
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
            difference = first_difference(
                before.get(key), now.get(key), f"{where}.{key}".lstrip("."))
            if difference:
                return difference
        return None
    return None if before == now else (where, before, now)
