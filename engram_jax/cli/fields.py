"""The command about the config's fields: `fields`, made of the docstrings of their classes."""

import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Iterable

from engram_jax.cli.words import Commands, Options, add_command, add_json
from engram_jax.config import RunConfig
from engram_jax.settings import field_type, part_of, paths

TYPES = {"int": "whole number", "float": "number", "bool": "true or false", "str": "text",
         "tuple[int, ...]": "list of whole numbers", "tuple[float, ...]": "list of numbers"}


class Field(typing.NamedTuple):
    """One field of a run's config.

    Attributes:
      name: with the parts that it is in, such as "model.width".
      type: of its values, in words.
      default: as one would write it; "" where there is none, so that every recipe says it.
      meaning: what the docstring of its class says of it.
    """

    name: str
    type: str
    default: str
    meaning: str


def add(commands: Commands) -> None:
    command = add_command(
        commands, fields, "print the config's fields: name, type, default, meaning",
        "fields model.engram")
    command.add_argument("prefix", metavar="PREFIX", nargs="?", default="",
                         help="only this field, or those of this part (default: all)")
    command.add_argument("--markdown", action="store_true",
                         help="print the page docs/config.md")
    add_json(command)


def fields(options: Options) -> None:
    if options.prefix:
        field_type(RunConfig, options.prefix)  # or it names what may have been meant
    chosen = [field for field in every_field()
              if f"{field.name}.".startswith(f"{options.prefix}.") or not options.prefix]
    if options.json:
        print(json.dumps([field._asdict() for field in chosen], indent=1))
    elif options.markdown:
        print(page(chosen))
    else:
        print("\n".join(f"{field.name}  ({_kind(field)})\n    {field.meaning}"
                        for field in chosen))


def every_field() -> list[Field]:
    """The fields of a run, part after part; parts themselves are not among them."""
    every = [_described(name, hint) for name, hint in paths(RunConfig) if part_of(hint) is None]
    parts = list(dict.fromkeys(_part(field.name) for field in every))
    return sorted(every, key=lambda field: parts.index(_part(field.name)))


def _part(name: str) -> str:
    return name.rpartition(".")[0]


def _described(path: str, hint: typing.Any) -> Field:
    above, _, name = path.rpartition(".")
    kind = part_of(field_type(RunConfig, above)) if above else RunConfig
    default = next(field.default for field in dataclasses.fields(kind) if field.name == name)
    text = "" if default is dataclasses.MISSING else json.dumps(default)
    written = getattr(hint, "__name__", "") if isinstance(hint, type) else str(hint)
    return Field(path, TYPES.get(str(hint), TYPES.get(written, written)), text,
                 meanings(kind).get(name, ""))


def meanings(kind: typing.Any) -> dict[str, str]:
    """What the docstrings of a config class, and of those it extends, say of each field."""
    said: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        _, _, entries = (inspect.cleandoc(owner.__doc__ or "")).partition("Attributes:\n")
        for names, text in re.findall(r"^  (\w[\w, ]*): ((?:.+(?:\n    )?)+)", entries, re.M):
            said |= {name.strip(): " ".join(text.split()) for name in names.split(",")}
    return said


def _kind(field: Field) -> str:
    return f"{field.type}, default {field.default}" if field.default else field.type


def page(chosen: Iterable[Field]) -> str:
    """docs/config.md: a table for each part."""
    lines = [
        "# Every setting", "",
        "Made by `engram-jax fields --markdown > docs/config.md` from the docstrings in "
        "`engram_jax/config/`; do not edit it by hand. Each is set by `--set FIELD=VALUE`, in a "
        "config.json, or by `changed(run, {\"FIELD\": value})`. Where no default stands, every "
        "recipe says its own."]
    part = None  # the one before
    for field in chosen:
        if part != (part := _part(field.name)):
            lines += _heading(part)
        meaning, default = (text.replace("|", "\\|") for text in (field.meaning, field.default))
        name = field.name.rpartition(".")[2]
        lines.append(f"| `{name}` | {field.type} | {default and f'`{default}`'} | {meaning} |")
    return "\n".join(lines)


def _heading(part: str) -> list[str]:
    if not part:
        return ["", "## The run", "", *_COLUMNS]
    hint = field_type(RunConfig, part)
    kind = part_of(hint)
    summary = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0]
    absent = f" May be none: `--set {part}=none`." if type(None) in typing.get_args(hint) else ""
    return ["", f"## {part}", "", f"`{kind.__name__}`: {' '.join(summary.split())}{absent}", "",
            *_COLUMNS]


_COLUMNS = ["| field | type | default | meaning |", "|---|---|---|---|"]
