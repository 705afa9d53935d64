"""Files of records to documents: JSON lines, an array of JSON objects, Parquet.

A record is an object with the text in one field; what else it holds does not matter.
"""

import dataclasses
import importlib
import itertools
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple, cast

from etils import epath

from engram_jax.data.reading import (
    BLOCK,
    PACKED_SUFFIXES,
    Part,
    Unreadable,
    decoded,
    json_value,
    opened,
    text_blocks,
    text_parts,
)
from engram_jax.errors import UserError

LINES = (".jsonl", ".ndjson")
LONGEST_RECORD = 2**27  # bytes or characters; held in memory several times while it is parsed
PARQUET_ROWS = 64  # read at once


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What the user asked for, for messages.

    Attributes:
      setting: the setting that names the source, as "data.path = 'x'".
      field: data.text_field, the field of a record that holds the text.
    """

    setting: str
    field: str


def file_parts(file: epath.Path, wanted: Wanted) -> Iterator[Part]:
    """The documents of one file, which its name says how to read; .gz and .zst are looked through.

    Raises:
      UserError: it is not of its kind; names the file, and the line or record.
      OSError: it cannot be read.
    """
    name = file.name.lower()
    for suffix in PACKED_SUFFIXES:
        name = name.removesuffix(suffix)
    try:
        if name.endswith(".parquet"):
            yield from _parquet(file, wanted)
            return
        with opened(file) as stream:
            if name.endswith(LINES):
                yield from _lines(stream, file, wanted)
            elif name.endswith(".json"):
                yield from _json(stream, file, wanted)
            else:
                yield from text_parts(stream)
    except Unreadable as error:
        raise UserError(f"{wanted.setting}: {file} {error}; only text in UTF-8 can be "
                        "trained on") from error


def _json(stream: BinaryIO, file: epath.Path, wanted: Wanted) -> Iterator[Part]:
    """Lines where the first one is an object, records where an array of objects begins; anything
    else, such as the settings of a program in a folder of code, is a text."""
    start = _Start(stream)
    begin = start.begin.removeprefix(b"\xef\xbb\xbf").lstrip()
    if re.match(rb"\[\s*\{", begin):
        yield from _array(start, file, wanted)
    elif _is_object(begin.partition(b"\n")[0]):
        yield from _lines(start, file, wanted)
    else:
        yield from text_parts(cast(BinaryIO, start))


def _is_object(line: bytes) -> bool:
    """Whether a line is an object by itself; a line that is longer than what was looked at, too."""
    if len(line) >= BLOCK // 2:
        return line.startswith(b"{")
    try:
        return isinstance(json_value(decoded(line)), dict)
    except Unreadable:
        return line.startswith(b"{") and line.rstrip().endswith(b"}")


class _Start:
    """A stream whose first bytes have been looked at."""

    def __init__(self, stream: BinaryIO):
        self.begin = self._waiting = stream.read(BLOCK)
        self._stream = stream

    def read(self, size: int) -> bytes:
        """The next bytes, at most `size`."""
        data, self._waiting = self._waiting[:size], self._waiting[size:]
        return data or self._stream.read(size)

    def readline(self, size: int) -> bytes:
        """The next line, at most `size` bytes of it."""
        end = self._waiting.find(b"\n", 0, size) + 1 or min(size, len(self._waiting))
        line, self._waiting = self._waiting[:end], self._waiting[end:]
        if line.endswith(b"\n") or len(line) == size:
            return line
        return line + self._stream.readline(size - len(line))


# --- JSON ---


def _lines(stream: Any, file: epath.Path, wanted: Wanted) -> Iterator[Part]:
    """One document a line; blank lines are left out. Lines count from 1 in messages."""
    for number in itertools.count(1):
        line = stream.readline(LONGEST_RECORD + 1)
        if not line:
            return
        where = f"line {number} of {file}"
        if len(line) > LONGEST_RECORD:
            raise UserError(f"{wanted.setting}: {where} is longer than {LONGEST_RECORD:,} bytes")
        if line.strip():
            try:
                text = decoded(line)
            except Unreadable as error:
                raise UserError(f"{wanted.setting}: {where} {error} of the line; JSONL is text in "
                                "UTF-8") from error
            yield Part(_text_of_json(text, where, wanted))


def _text_of_json(record: str, where: str, wanted: Wanted) -> str:
    try:
        values = json_value(record)
    except Unreadable as error:
        raise UserError(f"{wanted.setting}: {where} {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{wanted.setting}: {where} is not a JSON object with a field "
                        f"{wanted.field!r}")
    if wanted.field not in values:
        raise UserError(f"data.text_field = {wanted.field!r}: {where} has no such field; it has "
                        f"{_listed(values)}")
    return checked_text(values[wanted.field], where, wanted)


def _listed(names: Any) -> str:
    shown = [repr(name)[:40] for name in itertools.islice(names, 20)]
    return ", ".join(shown) + ", ..." * (len(names) > 20) if shown else "none"


def checked_text(value: Any, where: str, wanted: Wanted) -> str:
    """The text of a record.

    Raises:
      UserError: it is something else.
    """
    if not isinstance(value, str):
        raise UserError(f"data.text_field = {wanted.field!r}: {where} holds "
                        f"{type(value).__name__} there; it must be text")
    return value


class _Token(NamedTuple):
    """A bracket, comma or string of JSON."""

    kind: str
    end: int


# The quote that ends a string is missing where the block ends inside of it.
_TOKENS = re.compile(r'"(?:[^"\\]++|\\.)*+(?P<quote>")?|[\[\]{},]', re.DOTALL)


def _array(stream: Any, file: epath.Path, wanted: Wanted) -> Iterator[Part]:
    """One document an object of the array. Records count from 1 in messages."""
    number = 0
    for number, record in enumerate(_elements(text_blocks(stream)), start=1):
        yield Part(_text_of_json(record, f"record {number} of {file}", wanted))
    if not number:
        raise Unreadable("is an array without records")


def _elements(blocks: Iterator[str]) -> Iterator[str]:
    """The values of a JSON array, as they stand, each cut out where its brackets close.

    Raises:
      Unreadable: the array does not end, something stands behind it, or a value is too long.
    """
    text, looked, begin, depth = "", 0, 0, 0
    for block in blocks:
        text += block
        for kind, end in _tokens(text, looked):
            looked = end
            if kind in "[{":
                depth += 1
                begin = end if depth == 1 else begin
            elif kind in "]}":
                depth -= 1
            if (kind == "," and depth == 1) or depth == 0:
                yield text[begin : end - 1]
                begin = end
            if depth == 0:
                rest = text[end:] + "".join(blocks)
                if rest.strip():
                    raise Unreadable("goes on behind its array")
                return
        text, looked, begin = text[begin:], looked - begin, 0
        if len(text) > LONGEST_RECORD:
            raise Unreadable(f"has a record of more than {LONGEST_RECORD:,} characters")
    raise Unreadable("ends inside of its array")


def _tokens(text: str, start: int) -> Iterator[_Token]:
    """Brackets, commas and strings from `start` on, without a string that has no end yet."""
    for match in _TOKENS.finditer(text, start):
        kind = match.group()[0]
        if kind == '"' and not match["quote"]:
            return
        yield _Token(kind, match.end())


# --- Parquet ---


def _parquet(file: epath.Path, wanted: Wanted) -> Iterator[Part]:
    """One document a row. Rows count from 0 in messages, as in other tools."""
    try:
        library = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise Unreadable("is a Parquet file, which needs `pip install "
                         "'engram_jax[parquet]'`") from error
    with file.open("rb") as raw:
        try:
            table = library.ParquetFile(raw, buffer_size=BLOCK)
            names = table.schema_arrow.names
            if wanted.field in names:
                yield from _rows(table, file, wanted)
                return
        except (ValueError, OSError, KeyError) as error:  # pyarrow's own are kinds of these
            if isinstance(error, UserError) or getattr(error, "errno", None):
                raise
            reason = (str(error).splitlines() or [""])[0]
            raise Unreadable(f"is a damaged Parquet file ({reason[:200]})") from error
    raise UserError(f"data.text_field = {wanted.field!r}: {file} has no such column; it has "
                    f"{_listed(names)}")


def _rows(table: Any, file: epath.Path, wanted: Wanted) -> Iterator[Part]:
    number = 0
    for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=[wanted.field]):
        for value in batch.column(0).to_pylist():
            yield Part(checked_text(value, f"row {number} of {file}", wanted))
            number += 1
