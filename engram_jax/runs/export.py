"""The tables of a trained run as files that inference reads: `engram-jax export`.

Shapes: U rows, B bytes of a packed row.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from etils import epath

from engram_jax.config import require
from engram_jax.errors import UserError
from engram_jax.hashing.addressing import Site
from engram_jax.offload.checkpointed import packed_rows
from engram_jax.offload.file import TableInfo, TableWriter, require_local, table_info
from engram_jax.offload.formats import RowFormat
from engram_jax.offload.host import HostTable
from engram_jax.runs.checkpoints import last_checkpoint
from engram_jax.runs.directory import RunDirectory
from engram_jax.runs.reader import Reader, reader_of
from engram_jax.tables.layout import layout_of


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
    reader = reader_of(records)
    require(bool(reader.addressing.sites), "model", run.name,
            "has no memory, so there is no table to export")
    saved, written = SavedTables(records, reader), []
    for site in saved.sites:
        path = saved.to_disk(site, dtype, folder)
        say(f"wrote {path}: {site.rows:,} rows, {path.stat().st_size:,} bytes")
        written.append(path)
    return written


class SavedTables:
    """The tables of a run's checkpoint, read a stretch at a time.

    Args:
      records: of the run.
      reader: of the run.
      step: of the checkpoint; None is the last one.

    Attributes:
      sites: of the tables.
      step: of the checkpoint; it stays the same when the run writes another.

    Raises:
      UserError: no checkpoint, or one of another tokenizer or hash.
      MachineError: it cannot be read.
    """

    def __init__(self, records: RunDirectory, reader: Reader, step: int | None = None):
        self.sites = reader.addressing.sites
        self._addressing, self._run = reader.addressing, records.config().name
        with last_checkpoint(records, reader) as checkpoints:
            self._saved = checkpoints.saved_state(step)
        self.step = self._saved.step

    def info(self, site: Site, dtype: str) -> TableInfo:
        """What the table of a site is with rows of `dtype`."""
        return table_info(self._addressing, site.name, dtype, self._run, self.step,
                          self._saved.saved_ns)

    def packed(self, site: Site, dtype: str, scratch: Path | None = None
               ) -> Iterator[tuple[int, np.ndarray]]:
        """A site's rows in the order of their ids: first id, packed rows uint8 [U, B].

        Args:
          site, dtype: of the table.
          scratch: the folder for what `checkpointed.packed_rows` may have to sort on disk; the
            system's for temporary files by default.
        """
        start = 0
        try:
            for packed_UB in packed_rows(
                    self._saved.place, f"tables.{site.name}", layout_of(site).shape, site.rows,
                    RowFormat(dtype, site.dim), scratch or tempfile.gettempdir()):
                yield start, packed_UB
                start += len(packed_UB)
        except UserError as error:
            raise UserError(f"{site.name}, from row {start} on: {error}") from error

    def on_host(self, site: Site, dtype: str) -> HostTable:
        """A site's table in host memory.

        Raises:
          MachineError: there is not enough of it, or the checkpoint cannot be read.
        """
        table = HostTable.allocate(RowFormat(dtype, site.dim), site.rows)
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
            for _, packed_UB in self.packed(site, dtype, path.parent):
                writer.write(packed_UB)
        return path
