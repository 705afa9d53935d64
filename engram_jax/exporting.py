"""The tables of a trained run as files that inference reads: `engram-jax export`.

A checkpoint holds a table as `[shards, rows, dim]` in chunks. It is read a stretch of all shards at
a time, which is a stretch of row ids, packed and written; the whole table is never in memory.

Shapes: S shards, R rows of a shard, W of them at a time, D columns, U rows.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from etils import epath

from engram_jax.config import require
from engram_jax.errors import MachineError, UserError
from engram_jax.memory.formats import RowFormat
from engram_jax.memory.host import HostTable
from engram_jax.memory.layout import TableLayout
from engram_jax.memory.sites import Site
from engram_jax.memory.table_file import TableInfo, TableWriter, require_local, table_info
from engram_jax.storage import first_line
from engram_jax.training.checkpoints import last_checkpoint
from engram_jax.training.inputs import Reader, open_reader
from engram_jax.training.records import RunDirectory

READ_AT_ONCE = 64 * 2**20  # bytes of a table, or a chunk of each shard if these are larger
_PACKED_AT_ONCE = 16 * 1024  # rows
_CHUNKS_KEPT = 2**30  # bytes of decoded chunks, for stretches that share one


def export_tables(directory: epath.PathLike, dtype: str, out: str | os.PathLike[str] | None = None,
                  say: Callable[[str], None] = lambda line: None) -> list[Path]:
    """Write every table of a run's last checkpoint to a file of its own, and return their paths.

    Args:
      directory: of the run.
      dtype: of the rows, one of `config.ROW_DTYPES`.
      out: the folder for `SITE.DTYPE.table`, on a disk; DIR/tables by default.
      say: told of each file.

    Raises:
      UserError: no run, no checkpoint, no table in it, or `out` is not on a disk.
      MachineError: the checkpoint cannot be read or the files cannot be written. Tables that were
        finished before stay; no file is left half written.
    """
    records = RunDirectory(directory)
    folder = records.path / "tables" if out is None else out
    require_local(folder)
    run = records.config()
    reader = open_reader(run, records.tokenizer())
    require(bool(reader.addressing.sites), "model", run.name,
            "has no memory, so there is no table to export")
    saved, written = SavedTables(records, reader), []
    for site in saved.sites:
        path = saved.to_disk(site, dtype, folder)
        say(f"wrote {path}: {site.layout.rows:,} rows, {path.stat().st_size:,} bytes")
        written.append(path)
    return written


class SavedTables:
    """The tables of a run's last checkpoint, read a stretch at a time.

    Args:
      records: of the run.
      reader: of the run.

    Attributes:
      sites: of the tables.
      step: of the checkpoint; it stays the same when the run writes another.

    Raises:
      UserError: no checkpoint, or one of another tokenizer or hash.
      MachineError: it cannot be read.
    """

    def __init__(self, records: RunDirectory, reader: Reader):
        self.sites = reader.addressing.sites
        self._addressing, self._run = reader.addressing, records.config().name
        with last_checkpoint(records, reader) as found:
            self.step, self._state = found.last_state()

    def info(self, site: Site, dtype: str) -> TableInfo:
        """What the table of a site is with rows of `dtype`."""
        return table_info(self._addressing, site.name, dtype, self._run, self.step)

    def packed(self, site: Site, dtype: str) -> Iterator[tuple[int, np.ndarray]]:
        """A site's rows in the order of their ids: first id, packed rows uint8 [U, B]."""
        format = RowFormat(dtype, site.layout.dim)
        for start, rows_UD in table_rows(self._state, f"tables.{site.name}", site.layout):
            for first in range(0, len(rows_UD), _PACKED_AT_ONCE):
                part_UD = rows_UD[first:first + _PACKED_AT_ONCE]
                try:
                    yield start + first, format.pack(part_UD)
                except UserError as error:
                    raise UserError(
                        f"{site.name}, from row {start + first} on: {error}") from error

    def on_host(self, site: Site, dtype: str) -> HostTable:
        """A site's table in host memory.

        Raises:
          MachineError: there is not enough of it, or the checkpoint cannot be read.
        """
        table = HostTable.allocate(RowFormat(dtype, site.layout.dim), site.layout.rows)
        for start, packed_UB in self.packed(site, dtype):
            table.write(start, packed_UB)
        return table

    def to_disk(self, site: Site, dtype: str, folder: str | os.PathLike[str]) -> Path:
        """A site's table written to a file of the folder; its path.

        Raises:
          MachineError: the checkpoint cannot be read or the file cannot be written.
        """
        path = Path(folder) / f"{site.name}.{dtype}.table"
        with TableWriter(path, self.info(site, dtype)) as writer:
            for _, packed_UB in self.packed(site, dtype):
                writer.write(packed_UB)
        return path


def table_rows(
    state: epath.Path, name: str, layout: TableLayout, at_once: int = READ_AT_ONCE
) -> Iterator[tuple[int, np.ndarray]]:
    """The rows of a saved table in the order of their ids: first id, float32 [U, D].

    Args:
      state: where orbax saved the arrays.
      name: of the table among them.
      layout: its shape.
      at_once: bytes of the table in memory at a time.

    Raises:
      UserError: the table has another shape.
      MachineError: it cannot be read.
    """
    array = _open(state, name)
    require(tuple(array.shape) == layout.shape, f"{state}: {name}", tuple(array.shape),
            f"must have the shape {layout.shape}")
    window = _window(array, at_once)
    for start in range(0, layout.shape[1], window):
        stop = min(start + window, layout.shape[1])
        table_SWD = _result(array[:, start:stop, :].read(), state, name)
        rows_UD = table_SWD.swapaxes(0, 1).reshape(-1, layout.dim)
        first = start * layout.shards
        yield first, _values(rows_UD[:layout.rows - first])


def _open(state: epath.Path, name: str) -> Any:
    base = os.fspath(state)
    url = base if "://" in base else f"file://{base}"
    return _result(tensorstore.open(
        {"driver": "zarr3", "kvstore": {
            "driver": "ocdbt", "base": f"{url}/", "path": f"{name}/"}},
        read=True, open=True, context=tensorstore.Context(
            {"cache_pool": {"total_bytes_limit": _CHUNKS_KEPT}})), state, name)


def _result(future: Any, state: epath.Path, name: str) -> Any:
    try:
        return future.result()
    except Exception as error:  # tensorstore's have no common base
        raise MachineError(f"{state}: {name} cannot be read: {first_line(error)}") from error


def _window(array: Any, at_once: int) -> int:
    """W: whole chunks of the row axis if some fit, so that none is read twice."""
    shards, rows, dim = array.shape
    fit = max(1, at_once // (shards * dim * array.dtype.numpy_dtype.itemsize))
    chunk: int = array.chunk_layout.read_chunk.shape[1]
    return min(rows, fit - fit % chunk if fit >= chunk else fit)


def _values(rows_UD: np.ndarray) -> np.ndarray:
    """float32 of rows as a table stores them (`codec`)."""
    if rows_UD.dtype == np.float32:
        return rows_UD
    return RowFormat("bfloat16", rows_UD.shape[1]).unpack_numpy(
        np.ascontiguousarray(rows_UD).view(np.uint8))
