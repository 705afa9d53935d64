"""Rows of a Hugging Face dataset, streamed: nothing is downloaded but what is being read."""

import contextlib
import dataclasses
import importlib
import itertools
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from engram_jax.data.reading import Part
from engram_jax.data.records import Wanted, checked_text
from engram_jax.errors import MachineError, UserError
from engram_jax.storage import first_line

PREFIX = "hf:"
COMMIT = "[0-9a-f]{40}"


class Name(NamedTuple):
    """The parts of "hf:NAME[[:CONFIG]:SPLIT]"; `rows` is a slice of the split, as "10:20"."""

    name: str
    config: str | None
    split: str
    rows: str


def parsed_name(path: str, setting: str) -> Name:
    """The parts of a name; a colon in brackets belongs to its split.

    Raises:
      UserError: no name, an empty part, or more than three parts.
    """
    parts = re.split(r":(?![^\[]*\])", path.removeprefix(PREFIX))
    split = parts[-1] if len(parts) > 1 else "train"
    match = re.fullmatch(r"([^\[\]+]+)(?:\[(\d*%?:\d*%?)\])?", split)
    if not all(parts) or len(parts) > 3 or not match:
        raise UserError(f"{setting}: must be hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT; rows "
                        "of a split are SPLIT[1000:2000] or SPLIT[:10%]")
    return Name(parts[0], parts[1] if len(parts) == 3 else None, match[1], match[2] or "")


@dataclasses.dataclass(frozen=True)
class Rows:
    """A dataset that the user named.

    Attributes:
      name: its parts.
      commit: of the hub, so that what is read does not change; "" where the hub does not know it.
      wanted: for messages.
    """

    name: Name
    commit: str
    wanted: Wanted

    @classmethod
    def named(cls, path: str, revision: str, wanted: Wanted) -> "Rows":
        """The dataset that `path` names, at `revision` of the hub; "" is the newest.

        Raises:
          UserError: a name of another form.
        """
        name = parsed_name(path, wanted.setting)
        return cls(name, _commit(name.name, revision), wanted)

    def stamp(self) -> Any:
        """What the rows are known by; None where no commit pins them."""
        pinned = re.fullmatch(COMMIT, self.commit)  # a branch is not
        return [*self.name, self.commit, self.wanted.field] if pinned else None

    def parts(self) -> Iterator[Part]:
        """One document a row. Rows count from 0 in messages.

        Raises:
          UserError: no library, no such dataset or field.
          MachineError: it cannot be read to its end.
        """
        rows = iter(self._opened())
        for number in itertools.count():
            try:
                row = next(rows, None)
            except Exception as error:  # of the network's many kinds
                raise MachineError(f"{self.wanted.setting}: could not be read from row {number} on "
                                   f"({first_line(error)})") from error
            if row is None:
                return
            yield Part(checked_text(row[self.wanted.field], f"row {number} of {self.name.name}",
                                    self.wanted))

    def _opened(self) -> Any:
        setting, field, name = self.wanted.setting, self.wanted.field, self.name
        try:
            library = importlib.import_module("datasets")
        except ImportError as error:
            raise UserError(f"{setting}: needs the Hugging Face datasets library; pip "
                            "install engram_jax[datasets]") from error
        try:
            rows = library.load_dataset(name.name, name.config, split=name.split, streaming=True,
                                        revision=self.commit or None)
            columns = rows.column_names or list(next(iter(rows)))
        except Exception as error:  # of many kinds, none of them in its documentation
            raise UserError(f"{setting}: Hugging Face datasets cannot load it: "
                            f"{first_line(error)}") from error
        if field not in columns:
            raise UserError(f"data.text_field = {field!r}: {name.name} has no such field; it has "
                            f"{', '.join(map(repr, columns))}")
        return self._sliced(rows.select_columns([field]))

    def _sliced(self, rows: Any) -> Any:
        """The rows that the split's brackets ask for."""
        if not self.name.rows:
            return rows
        first, last = self.name.rows.split(":")
        begin, end = self._row(first or "0", rows), self._row(last, rows) if last else None
        rows = rows.skip(begin)
        return rows if end is None else rows.take(max(end - begin, 0))

    def _row(self, text: str, rows: Any) -> int:
        """A row's number, or the row that is nearest to a percentage of all."""
        if not text.endswith("%"):
            return int(text)
        total = None
        with contextlib.suppress(AttributeError, KeyError, TypeError):
            total = rows.info.splits[self.name.split].num_examples
        if not total:
            raise UserError(f"{self.wanted.setting}: the dataset does not say how many rows it "
                            "has, so write numbers of rows for percentages")
        return round(total * int(text[:-1]) / 100)


def _commit(name: str, revision: str) -> str:
    """The commit that a revision of the hub stands for; "" for a folder, or without the hub."""
    if re.fullmatch(COMMIT, revision) or os.path.exists(name):
        return revision
    with contextlib.suppress(Exception):  # no network, no library: `load_dataset` says so
        hub = importlib.import_module("huggingface_hub")
        return str(hub.HfApi().dataset_info(name, revision=revision or None).sha)
    return revision
