"""Token shards: .npy files of ids that are written once, checked, and read through memory maps.

Shapes: T tokens of a shard or a stretch.
"""

import contextlib
import functools
import hashlib
import os
import pathlib
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from engram_jax.data.cache import cache_key, noted_folder
from engram_jax.errors import UserError
from engram_jax.storage import download, is_local, refusals

SHARD_TOKENS = 64 * 2**20
READ_AT_ONCE = 2**22  # bytes
LONGEST_HEAD = 256  # bytes
HEAD = re.compile(rb"\x93NUMPY\x01\x00(?P<length>..)(?P<fields>\{'descr': '(?P<dtype>[<>|]\w+)', "
                  rb"'fortran_order': False, 'shape': \((?P<shape>[\d, ]*)\), \} *\n)", re.DOTALL)
NO_ARRAY = "is missing, truncated or no NumPy array of token ids"
MOST_MAPPED = 256  # shards of a stream; each holds a file open
SETTLED_NS = 2 * 10**9  # a file that has just been written may change within one tick of its clock


def shard_name(split: str, number: int) -> str:
    """File name of a split's shard."""
    return f"{split}-{number:05d}.npy"


def _head(data: bytes) -> tuple[np.dtype, str, int]:
    """dtype, shape and the first byte behind the head of a .npy file.

    NumPy's own reader evaluates the head as Python, which two threads of Python 3.11 cannot do at
    once (ast, "recursion depth mismatch").

    Raises:
      ValueError: it is no such file.
    """
    match = HEAD.match(data)
    if not match or int.from_bytes(match["length"], "little") != len(match["fields"]):
        raise ValueError("no head of a .npy file")
    try:
        return np.dtype(match["dtype"].decode()), match["shape"].decode(), match.end()
    except TypeError as error:
        raise ValueError(str(error)) from error


class ShardInfo(NamedTuple):
    """What meta.json says of a shard: its tokens, and the hex sha256 of its ids' bytes."""

    tokens: int
    sha256: str


class ShardWriter:
    """Writes a stream of ids into shards of SHARD_TOKENS, the last one shorter."""

    def __init__(self, folder: pathlib.Path, split: str, dtype: str):
        self._folder, self._split = folder, split
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._file: Any = None
        self._shards: list[ShardInfo] = []

    def add(self, ids: np.ndarray) -> None:
        """Append ids, [T]."""
        array = ids.astype(self._dtype)
        while array.size:
            if self._file is None:
                self._begin()
            head, array = np.split(array, [SHARD_TOKENS - self._tokens])
            self._file.write(head.data)
            self._digest.update(head.data)
            self._tokens += head.size
            if self._tokens == SHARD_TOKENS:
                self._end()

    def close(self) -> list[ShardInfo]:
        """End the last shard; returns them all."""
        if self._file is not None:
            self._end()
        return self._shards

    def _begin(self) -> None:
        path = self._folder / shard_name(self._split, len(self._shards))
        self._file, self._tokens, self._digest = path.open("wb"), 0, hashlib.sha256()
        self._head()

    def _head(self) -> None:
        """The file's beginning; of one length for any number of tokens."""
        np.lib.format.write_array_header_1_0(self._file, {
            "descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False,
            "shape": (self._tokens,)})

    def _end(self) -> None:
        self._file.seek(0)
        self._head()
        self._file.close()
        self._shards.append(ShardInfo(self._tokens, self._digest.hexdigest()))
        self._file = None


class Shard:
    """A shard of a packed text, on this disk or in object storage.

    Attributes:
      path: its file.
      dtype, info: what it must be.
      below: ids must be.
      copy: where one of object storage is copied to, for good, when it is first read.
    """

    def __init__(self, path: epath.Path, dtype: str, info: ShardInfo, below: int,
                 copy: pathlib.Path):
        self.path, self.dtype, self.info, self.below, self.copy = path, dtype, info, below, copy

    def __len__(self) -> int:
        return self.info.tokens

    def map(self) -> np.ndarray:
        """Its ids, [T], mapped.

        Raises:
          UserError: it is missing, or not what meta.json says.
        """
        return self.mapped(self.path if is_local(self.path) else self._copied())

    def check(self) -> None:
        """Read it whole, unless that has been done since it was written.

        Raises:
          UserError: it is damaged, or has ids that the tokenizer does not have.
        """
        self._check(self.path)

    def read_whole(self) -> None:
        """Read it whole, also if that has been done.

        Raises:
          UserError: as `check`.
        """
        file = self.path if is_local(self.path) else self._copied()
        self._read_whole(file, self.mapped(file).offset)

    def _copied(self) -> pathlib.Path:
        if not self.copy.exists():
            download(self.path, self.copy)
        try:
            self._check(self.copy)
        except UserError:
            self.copy.unlink(missing_ok=True)  # so that the next start copies it again
            raise
        return self.copy

    def mapped(self, file: epath.PathLike) -> np.memmap:
        """The ids of `file`, mapped, of the right dtype and length."""
        try:
            with open(file, "rb") as raw:
                dtype, shape, offset = _head(raw.read(LONGEST_HEAD))
                size = os.fstat(raw.fileno()).st_size
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: {NO_ARRAY} ({error})") from error
        if dtype != self.dtype or shape != f"{len(self)},":
            raise UserError(f"{file}: holds {dtype} ({shape}), but meta.json says "
                            f"{self.dtype} ({len(self)},)")
        end = offset + len(self) * dtype.itemsize
        if size != end:
            raise UserError(f"{file}: {NO_ARRAY} (is {size} bytes long, but its ids end at byte "
                            f"{end})")
        return np.memmap(file, dtype, "r", offset, (len(self),))

    def _check(self, file: epath.PathLike) -> None:
        offset = self.mapped(file).offset
        note = self._note(file)
        if note is not None and note.exists():
            return
        self._read_whole(file, offset)
        if note is not None and note == self._note(file):  # not written meanwhile
            with contextlib.suppress(OSError):  # a disk for reading only: checked at every start
                note.parent.mkdir(parents=True, exist_ok=True)
                note.touch()

    def _note(self, file: epath.PathLike) -> pathlib.Path | None:
        """A file that is there if this one has been checked as it is; None while it is new."""
        status = os.stat(file)
        times = status.st_mtime_ns, status.st_ctime_ns
        if max(times) + SETTLED_NS > time.time_ns():
            return None
        return noted_folder() / cache_key(
            os.path.abspath(file), status.st_ino, status.st_size, *times, *self.info, self.below)

    def _read_whole(self, file: epath.PathLike, offset: int) -> None:
        digest, largest = hashlib.sha256(), 0
        with refusals(file, "read"), open(file, "rb") as raw:
            raw.seek(offset)
            # Not by the map: what is mapped counts as this process's memory.
            while block := raw.read(READ_AT_ONCE):
                digest.update(block)
                largest = max(largest, int(np.frombuffer(block, self.dtype).max()))
        if digest.hexdigest() != self.info.sha256:
            raise UserError(f"{file}: its ids' sha256 is {digest.hexdigest()}, but meta.json says "
                            f"{self.info.sha256}")
        require_below(largest, self.below, file)


def require_below(largest: int, below: int, file: object) -> None:
    """Refuse ids that the tokenizer does not have.

    Raises:
      UserError: there is one.
    """
    if largest >= below:
        raise UserError(f"{file}: holds token id {largest}, but the tokenizer's are below {below}; "
                        "it is damaged or of another tokenizer")


class TokenStream:
    """A long row of token ids, in shards one after the other."""

    def __init__(self, shards: Sequence[np.ndarray | Shard]):
        """Shards are arrays, or files that are mapped when they are first read."""
        self._shards = shards
        self._ends = np.cumsum([0] + [len(shard) for shard in shards])
        self._mapped: Callable[[int], np.ndarray] = functools.lru_cache(MOST_MAPPED)(self._map)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids start..stop-1, int32 [stop - start], 0 <= start <= stop <= len.

        Raises:
          UserError: a shard has been damaged since it was opened.
        """
        ids = np.empty(stop - start, np.int32)
        number = int(np.searchsorted(self._ends, start, side="right")) - 1
        while start < stop:
            begin, end = self._ends[number : number + 2]
            part = self._mapped(number)[start - begin : stop - begin]
            ids[len(ids) - (stop - start) :][: len(part)] = part
            self._check(number, part)
            start, number = min(stop, int(end)), number + 1
        return ids

    def _check(self, number: int, part: np.ndarray) -> None:
        shard = self._shards[number]
        if isinstance(shard, Shard) and part.size:
            require_below(int(part.max()), shard.below, shard.path)

    def _map(self, number: int) -> np.ndarray:
        shard = self._shards[number]
        return shard.map() if isinstance(shard, Shard) else shard
