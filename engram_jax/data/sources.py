"""Where text comes from: one small interface over every kind of `data.path`.

    data.path            documents
    "stdlib"             every source file of Python's standard library (a folder of that name
                         is "./stdlib")
    FILE                 the file is one document
    FILE.jsonl           one document a line, in the field data.text_field
    FOLDER               every file below it, in sorted order, hidden ones left out
    "hf:NAME", "hf:NAME:SPLIT", "hf:NAME:CONFIG:SPLIT"
                         a Hugging Face dataset, one document a row; the split is "train" if unnamed

Paths may be object storage (`gs://`, `s3://`). A folder of ready token shards is `tokens.py`'s.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from engram_jax.config import DataConfig
from engram_jax.errors import UserError
from engram_jax.storage import check_readable, refusals

# Folders of the standard library that are not its source.
SKIPPED_FOLDERS = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"))
HUGGING_FACE = "hf:"


@dataclasses.dataclass(frozen=True)
class TextSummary:
    """What one reading of a source finds out.

    Attributes:
      fingerprint: hex sha256 over the UTF-8 texts in order, each after its length in bytes.
      sizes: UTF-8 bytes of each document, int64 [documents].
    """

    fingerprint: str
    sizes: np.ndarray


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents that can be read again and again, always the same ones in the same order.

    Attributes:
      path: data.path as the user wrote it, for messages.
      read: starts a reading; `documents` is the one to call.
    """

    path: str
    read: Callable[[], Iterator[str]]

    def documents(self) -> Iterator[str]:
        """The texts, in order; those of nothing but white space are left out.

        Raises:
          UserError: text that is not text (binary, not UTF-8, a JSONL line without the field).
          MachineError: a file that the machine refuses to read.
        """
        with refusals(self.path, "read", f"data.path = {self.path!r}"):
            for text in self.read():
                if text and not text.isspace():
                    yield _encodable(text)

    @functools.cached_property
    def summary(self) -> TextSummary:
        """Fingerprint and sizes, from one reading of everything.

        Raises:
          UserError: there is no text.
        """
        digest, sizes = hashlib.sha256(), []
        for text in self.documents():
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
            sizes.append(len(data))
        if not sizes:
            raise UserError(f"data.path = {self.path!r}: holds no text; name a file, a folder or "
                            "a data set with at least one document")
        return TextSummary(digest.hexdigest(), np.asarray(sizes, np.int64))

    @property
    def fingerprint(self) -> str:
        """Hex sha256 over the texts in order; equal texts have equal fingerprints anywhere."""
        return self.summary.fingerprint

    @property
    def amount(self) -> str:
        """How much text there is, for messages."""
        sizes = self.summary.sizes
        return f"{len(sizes):,} documents, {sizes.sum() / 1e6:.1f} MB"


def open_source(config: DataConfig) -> Source:
    """The source that `config.path` names; nothing but its existence is looked at yet.

    Raises:
      UserError: the path does not exist, or a folder holds no documents.
    """
    path, field = config.path, config.text_field
    if path == "stdlib":
        return Source(path, _standard_library)
    if path.startswith(HUGGING_FACE):
        return Source(path, functools.partial(_hugging_face, path, field))
    check_readable(path, "data.path")
    place = epath.Path(path).expanduser()
    with refusals(path, "read", f"data.path = {path!r}"):
        if place.is_dir():
            return Source(path, functools.partial(_folder, place, path, field))
        if not place.exists():
            raise UserError(f"data.path = {path!r}: does not exist; name a text file, a folder, a "
                            '.jsonl file, a folder of token shards, "stdlib" or "hf:NAME"')
    return Source(path, functools.partial(_file, place, path, field))


def _encodable(text: str) -> str:
    """`text` with lone surrogates, which JSON can hold and UTF-8 cannot, as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _decoded(data: bytes) -> str:
    """Text of a file: UTF-8, a byte order mark dropped, line ends as they are.

    Raises:
      ValueError: binary data, and why.
    """
    if b"\0" in data:
        raise ValueError(f"holds a NUL byte at offset {data.index(0)}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start}") from error


def _standard_library() -> Iterator[str]:
    """Python's own source, sorted by path; files in other encodings are left out."""
    root = sysconfig.get_path("stdlib")
    paths = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in SKIPPED_FOLDERS]
        paths += [os.path.relpath(os.path.join(folder, name), root)
                  for name in names if name.endswith(".py")]
    for path in sorted(paths, key=lambda path: path.split(os.sep)):
        with contextlib.suppress(ValueError):
            yield _decoded(epath.Path(root, path).read_bytes())


def _folder(place: epath.Path, path: str, field: str) -> Iterator[str]:
    files = list(_files_below(place))
    if not files:
        raise UserError(f"data.path = {path!r}: the folder holds no documents; put text or .jsonl "
                        "files into it")
    for file in files:
        yield from _file(file, path, field)


def _files_below(place: epath.Path) -> Iterator[epath.Path]:
    for entry in sorted(place.iterdir(), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _files_below(entry)
        else:
            yield entry


def _file(file: epath.Path, path: str, field: str) -> Iterator[str]:
    if file.suffix == ".jsonl":
        yield from _jsonl(file, path, field)
        return
    try:
        text = _decoded(file.read_bytes())
    except ValueError as error:
        raise UserError(f"data.path = {path!r}: {file} {error}; only text in UTF-8 can be "
                        "trained on") from error
    yield text


def _jsonl(file: epath.Path, path: str, field: str) -> Iterator[str]:
    """One document a line; blank lines are left out. Lines count from 1 in messages."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _json_text(line, field, path, f"line {number} of {file}")


def _json_text(line: bytes, field: str, path: str, where: str) -> str:
    try:
        row = json.loads(_decoded(line))
    except json.JSONDecodeError as error:
        raise UserError(f"data.path = {path!r}: {where} is not JSON: {error.msg} at column "
                        f"{error.colno}") from error
    except ValueError as error:
        raise UserError(f"data.path = {path!r}: {where} {error} of the line; JSONL is text in "
                        "UTF-8") from error
    if not isinstance(row, dict):
        raise UserError(f"data.path = {path!r}: {where} is not a JSON object with a field "
                        f"{field!r}")
    if field not in row:
        raise UserError(f"data.text_field = {field!r}: {where} has no such field; it has "
                        f"{', '.join(map(repr, row)) or 'none'}")
    return _text_of(row[field], field, where)


def _text_of(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"data.text_field = {field!r}: {where} holds "
                        f"{type(value).__name__} there; it must be text")
    return value


HuggingFaceName = collections.namedtuple("HuggingFaceName", ["name", "config", "split"])


def hugging_face_name(path: str) -> HuggingFaceName:
    """The parts of "hf:NAME[[:CONFIG]:SPLIT]"; a colon in brackets belongs to its split.

    Raises:
      UserError: no name, an empty part, or more than three parts.
    """
    parts = re.split(r":(?![^\[]*\])", path.removeprefix(HUGGING_FACE))
    if not all(parts) or len(parts) > 3:
        raise UserError(f"data.path = {path!r}: must be hf:NAME, hf:NAME:SPLIT or "
                        "hf:NAME:CONFIG:SPLIT")
    name, *rest = parts
    split = rest.pop() if rest else "train"
    return HuggingFaceName(name, rest[0] if rest else None, split)


def _hugging_face(path: str, field: str) -> Iterator[str]:
    wanted = hugging_face_name(path)
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(f"data.path = {path!r}: needs the Hugging Face datasets library; pip "
                        "install engram_jax[datasets]") from error
    try:
        rows = library.load_dataset(wanted.name, wanted.config, split=wanted.split)
    except Exception as error:  # of many kinds, none of them in its documentation
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"data.path = {path!r}: Hugging Face datasets cannot load it: "
                        f"{type(error).__name__}: {reason}") from error
    if field not in rows.column_names:
        raise UserError(f"data.text_field = {field!r}: {path} has no such field; it has "
                        f"{', '.join(map(repr, rows.column_names))}")
    for number, row in enumerate(rows.select_columns([field])):
        yield _text_of(row[field], field, f"row {number} of {path}")
