"""Bytes to text, in one way for all: what is trained on, and the files that an analysis reads.

Text is UTF-8. A byte order mark at the beginning is no part of it; line ends are kept as they are.
What gzip or Zstandard has packed is unpacked, known by its first bytes whatever its name. Files
are read in blocks, so a file may be larger than memory.
"""

import codecs
import contextlib
import gzip
import importlib
import io
import json
import os
import re
import stat
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple, cast

from etils import epath

from engram_jax.config import require
from engram_jax.errors import UserError
from engram_jax.storage import is_local, refusals

BLOCK = 2**20  # bytes read at once
DEEPEST = 200  # brackets within brackets in JSON; a limit of its own in each Python otherwise
BYTE_ORDER_MARK = "\ufeff"
GZIP, ZSTANDARD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # no text in UTF-8 begins with these
PACKED_SUFFIXES = (".gz", ".gzip", ".zst", ".zstd")


class Unreadable(ValueError):
    """What is wrong with a file or a line, as the end of a sentence that begins with its name."""


class Part(NamedTuple):
    """A stretch of a document; `ends` where it is the last of it."""

    text: str
    ends: bool = True


@contextlib.contextmanager
def opened(file: epath.Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked.

    Raises:
      Unreadable: it is no regular file, or packed and damaged, or its library is missing.
      OSError: it cannot be read.
    """
    if is_local(file) and not stat.S_ISREG(os.stat(file).st_mode):
        raise Unreadable("is no regular file")  # opening a pipe would wait for ever
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(file.open("rb"))
        start = raw.read(len(ZSTANDARD))
        raw.seek(0)
        # Files of object storage read no line of a limited length.
        stream = raw if is_local(file) else io.BufferedReader(raw, BLOCK)
        if start.startswith(GZIP):
            stream = stack.enter_context(gzip.GzipFile(fileobj=stream))
        elif start == ZSTANDARD:
            stream = io.BufferedReader(_Unzstd(stream), BLOCK)
        try:
            yield cast(BinaryIO, stream)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise Unreadable(f"is a damaged gzip file ({error})") from error


class _Unzstd(io.RawIOBase):
    """What a Zstandard file holds: all its frames, the last of them whole."""

    def __init__(self, raw: Any):
        try:
            self._library = importlib.import_module("zstandard")
        except ImportError as error:
            raise Unreadable("is packed by Zstandard, which needs `pip install "
                             "'engram_jax[zstd]'`") from error
        self._raw, self._waiting = raw, b""
        self._frame: Any = None
        self._behind = b""  # bytes of the next frame

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            while not self._waiting and self._more():
                pass
        except self._library.ZstdError as error:
            raise Unreadable(f"is a damaged Zstandard file ({error})") from error
        size = min(len(buffer), len(self._waiting))
        buffer[:size], self._waiting = self._waiting[:size], self._waiting[size:]
        return size

    def _more(self) -> bool:
        """Unpack some more; whether there was any."""
        packed = self._behind or self._raw.read(2**14)
        if not packed:
            if self._frame is not None:
                raise Unreadable("is a damaged Zstandard file (it ends inside of a frame)")
            return False
        if self._frame is None:
            self._frame = self._library.ZstdDecompressor().decompressobj()
        self._waiting = self._frame.decompress(packed)
        self._behind = b""
        if self._frame.eof:
            self._behind, self._frame = self._frame.unused_data, None
        return True


def text_blocks(stream: BinaryIO) -> Iterator[str]:
    """The text of a file, a block at a time; together they are the whole.

    Raises:
      Unreadable: a NUL byte, or not UTF-8; says at which byte.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    begin, blank = 0, True  # the byte at which the block begins; whether there was no text yet
    while block := stream.read(BLOCK):
        if 0 in block:
            raise Unreadable(f"holds a NUL byte at offset {begin + block.index(0)}")
        text = _decoded(decoder, block, begin, False)
        yield text.removeprefix(BYTE_ORDER_MARK) if blank else text
        begin, blank = begin + len(block), blank and not text
    yield _decoded(decoder, b"", begin, True)


def _decoded(decoder: Any, block: bytes, begin: int, final: bool) -> str:
    before = len(decoder.getstate()[0])
    try:
        return cast(str, decoder.decode(block, final))
    except UnicodeDecodeError as error:
        raise Unreadable(f"is not UTF-8 at byte {begin - before + error.start}") from error


def decoded(data: bytes) -> str:
    """Text that is in memory.

    Raises:
      Unreadable: as `text_blocks`.
    """
    return "".join(text_blocks(io.BytesIO(data)))


def text_parts(stream: BinaryIO) -> Iterator[Part]:
    """A file as one document.

    Raises:
      Unreadable: as `text_blocks`.
    """
    before: str | None = None
    for block in text_blocks(stream):
        if before is not None:
            yield Part(before, ends=False)
        before = block
    yield Part(before or "")


def read_file(file: epath.PathLike, field: str) -> str:
    """A whole text file that the user named in `field`, as training would read it.

    Raises:
      UserError: it is not there, or no text.
      MachineError: it cannot be read.
    """
    path = epath.Path(file).expanduser()
    require(path.is_file(), field, os.fspath(file), "must be a text file")
    with refusals(path, "read"):
        try:
            with opened(path) as stream:
                return "".join(text_blocks(stream))
        except Unreadable as error:
            raise UserError(f"{field} = {os.fspath(file)!r}: {error}; must be text in "
                            "UTF-8") from error


def json_value(text: str) -> Any:
    """A JSON value.

    Raises:
      Unreadable: it is none, has a number that is too long, or is nested too deep.
    """
    if text.count("[") + text.count("{") > DEEPEST and _depth(text) > DEEPEST:
        raise Unreadable(f"is nested deeper than {DEEPEST} levels")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise Unreadable(f"is not JSON: {error.msg} at column {error.colno}") from error
    except ValueError as error:  # a number of thousands of digits
        raise Unreadable(f"is not JSON: {error}") from error


def _depth(text: str) -> int:
    """Levels of brackets, strings left out."""
    deepest = depth = 0
    for match in re.finditer(r'"(?:[^"\\]++|\\.)*+"|[\[{]|[\]}]', text, re.DOTALL):
        if match.group() in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif match.group() in "]}":
            depth -= 1
    return deepest
