"""A table as a checkpoint holds it, as packed rows in the order of their ids.

A checkpoint has `[shards, rows, dim]` in chunks of about 64 MiB, and neighbouring ids lie on
neighbouring shards. Where the chunks of a stretch of all shards fit into memory, stretches are read
one after the other. Where each chunk is long and of few shards, as after training on many devices,
each is read once and its packed rows are sorted into stretches in a temporary file.

Shapes: S shards, R rows of a shard, W of them in a stretch, D columns, U rows, B bytes of a row.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from etils import epath

from engram_jax.config import require
from engram_jax.errors import MachineError
from engram_jax.offload.formats import RowFormat
from engram_jax.storage import first_line, refusals

STRETCH = 64 * 2**20  # bytes of the table that are read at a time, or a chunk if that is larger
MOST = 2**28  # bytes of the chunks of one stretch
_PACKED_AT_ONCE = 16 * 1024  # rows


def packed_rows(
    state: epath.Path, name: str, shape: tuple[int, int, int], rows: int, format: RowFormat,
    scratch: str | os.PathLike[str], stretch: int = STRETCH, most: int = MOST,
) -> Iterator[np.ndarray]:
    """All rows in the order of their ids, uint8 [U, B] at a time.

    Args:
      state: where orbax saved the arrays.
      name: of the table among them.
      shape, rows: of the table: (S, R, D), and how many of these rows are not padding.
      format: of the rows that are wanted.
      scratch: a folder on a disk for the temporary file, which is as large as the packed table.
      stretch, most: bytes of the table in memory at a time, and of chunks that must be.

    Raises:
      UserError: the table has another shape or dtype, or an entry is not finite.
      MachineError: it cannot be read, or the temporary file cannot be written.
    """
    table = _Saved(state, name, shape)
    pieces = (_in_order(table, format, stretch) if table.stretch_bytes <= most
              else _sorted_on_disk(table, format, Path(scratch), stretch))
    left = rows
    for packed_UB in pieces:
        yield packed_UB[:left]  # without the padding, which comes last
        left = max(0, left - len(packed_UB))


class _Saved:
    """A table as a checkpoint holds it.

    Args:
      state, name, shape: as `packed_rows` takes them.

    Attributes:
      shape: (S, R, D).
      chunk: how much of S and of R is read at a time, at least.
      stretch_bytes: of the chunks that the first rows of all shards lie in.
    """

    def __init__(self, state: epath.Path, name: str, shape: tuple[int, int, int]):
        self._name = f"{state}: {name}"
        base = os.fspath(state) if "://" in os.fspath(state) else f"file://{os.fspath(state)}"
        self._array = self._result(tensorstore.open({
            "driver": "zarr3",
            "kvstore": {"driver": "ocdbt", "base": f"{base}/", "path": f"{name}/"}}, read=True))
        self.shape = tuple(self._array.shape)
        require(self.shape == shape, self._name, self.shape, f"must have the shape {shape}")
        dtype = self._array.dtype.numpy_dtype
        require(dtype in (np.float32, np.uint16), self._name, str(dtype),
                "must be float32, or the bits of bfloat16 as uint16")
        self.chunk = tuple(self._array.chunk_layout.read_chunk.shape[:2])
        self.shard_row_bytes = self.shape[-1] * dtype.itemsize
        self.stretch_bytes = self.shape[0] * self.chunk[1] * self.shard_row_bytes

    def read(self, shards: slice, rows: slice) -> np.ndarray:
        """Read the table as it is stored, [shards, rows, D]."""
        part: np.ndarray = self._result(self._array[shards, rows, :].read())
        return part

    def _result(self, future: Any) -> Any:
        try:
            return future.result()
        except Exception as error:  # tensorstore's have no common base
            raise MachineError(f"{self._name} cannot be read: {first_line(error)}") from error


def _in_order(table: _Saved, format: RowFormat, stretch: int) -> Iterator[np.ndarray]:
    """Stretch after stretch, each of whole chunks."""
    shards, rows, _ = table.shape
    chunk = table.chunk[1]
    window = max(stretch // (shards * table.shard_row_bytes) // chunk, 1) * chunk
    at_once = max(1, _PACKED_AT_ONCE // shards)
    for start in range(0, rows, window):
        table_SWD = table.read(slice(0, shards), slice(start, min(start + window, rows)))
        for first in range(0, table_SWD.shape[1], at_once):
            part_USD = table_SWD[:, first:first + at_once].swapaxes(0, 1)
            yield format.pack_stored(part_USD.reshape(-1, table.shape[-1]))


def _sorted_on_disk(
    table: _Saved, format: RowFormat, scratch: Path, stretch: int
) -> Iterator[np.ndarray]:
    """Chunk after chunk into a file of stretches [S, W, B]; then stretch after stretch."""
    (shards, rows, _), width = table.shape, format.row_bytes
    window = min(rows, max(1, stretch // (shards * width)))
    stretches = -(-rows // window)
    with refusals(scratch, "written"), tempfile.TemporaryFile(dir=scratch) as file:
        file.truncate(stretches * shards * window * width)
        for shard, start, packed_UB in _chunks(table, format):
            done = 0
            while done < len(packed_UB):
                nth, offset = divmod(start + done, window)
                part_UB = packed_UB[done:done + window - offset]
                file.seek(((nth * shards + shard) * window + offset) * width)
                file.write(part_UB.reshape(-1).data)
                done += len(part_UB)
        file.seek(0)
        for _ in range(stretches):
            data = np.frombuffer(file.read(shards * window * width), np.uint8)
            yield data.reshape(shards, window, width).swapaxes(0, 1).reshape(-1, width)


def _chunks(table: _Saved, format: RowFormat) -> Iterator[tuple[int, int, np.ndarray]]:
    """Shard, first row of it and packed rows, for each shard of each chunk."""
    shards, rows, _ = table.shape
    for shard in range(0, shards, table.chunk[0]):
        for start in range(0, rows, table.chunk[1]):
            chunk = table.read(slice(shard, min(shard + table.chunk[0], shards)),
                               slice(start, min(start + table.chunk[1], rows)))
            for nth, part_RD in enumerate(chunk):
                for first in range(0, len(part_RD), _PACKED_AT_ONCE):
                    yield shard + nth, start + first, format.pack_stored(
                        part_RD[first:first + _PACKED_AT_ONCE])
