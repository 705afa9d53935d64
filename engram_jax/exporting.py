"""The tables of a trained run as files that inference reads: `engram-jax export`."""

import os
from collections.abc import Callable
from pathlib import Path

import orbax.checkpoint.experimental.v1 as ocp
from etils import epath

from engram_jax.config import require
from engram_jax.errors import MachineError, UserError
from engram_jax.memory.saved import packed_rows
from engram_jax.memory.sites import Site
from engram_jax.memory.table_file import TableInfo, TableWriter, require_local, table_info
from engram_jax.storage import first_line
from engram_jax.training.checkpoints import Checkpoints
from engram_jax.training.inputs import Reader, open_reader
from engram_jax.training.records import RunDirectory


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
    sites = reader.addressing.sites
    require(bool(sites), "model", run.name, "has no memory, so there is no table to export")
    step, state = _last_state(records, reader)
    written = []
    for site in sites:
        path = Path(folder) / f"{site.name}.{dtype}.table"
        _export(state, site, table_info(reader.addressing, site.name, dtype, run.name, step), path)
        say(f"wrote {path}: {site.layout.rows:,} rows, {path.stat().st_size:,} bytes")
        written.append(path)
    return written


def _last_state(records: RunDirectory, reader: Reader) -> tuple[int, epath.Path]:
    """Step and place of the last checkpoint, which must be of the run's own hash and tokenizer."""
    if not records.checkpoints.exists():
        raise UserError(f"{records.path}: has no checkpoint yet; train it first")
    with Checkpoints(records.checkpoints, 1, reader.fingerprints()) as found:
        step = found.latest
    if step is None:
        raise UserError(f"{records.checkpoints}: holds no whole checkpoint")
    place = records.checkpoints / str(step)
    try:
        carried = ocp.checkpointables_metadata(place).custom_metadata or {}
    except Exception as error:  # of orbax and what it is built on: no common base
        raise MachineError(f"{place}: cannot be read: {first_line(error)}") from error
    if carried.get("fingerprints") != reader.fingerprints():
        raise UserError(f"{place}: was trained with another tokenizer or hash than those of "
                        f"{records.path}")
    return step, place / "state"


def _export(state: epath.Path, site: Site, info: TableInfo, path: Path) -> None:
    with TableWriter(path, info) as writer:
        try:
            for packed_UB in packed_rows(
                    state, f"tables.{site.name}", site.layout, info.format, path.parent):
                writer.write(packed_UB)
        except UserError as error:
            raise UserError(f"{site.name}: {error}") from error
