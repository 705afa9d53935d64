"""A trained run is served: its parameters are on the device, its tables where they should be."""

import contextlib
import dataclasses
from typing import Any

import jax
from etils import epath

from engram_jax.config import ROW_DTYPES, RunConfig, require
from engram_jax.hashing.addressing import Site
from engram_jax.inference.device_rows import DeviceRows
from engram_jax.inference.engine import Engine
from engram_jax.inference.stages import serving_params
from engram_jax.offload.disk import DiskTable
from engram_jax.offload.home import Home
from engram_jax.offload.prefetch import HostRows
from engram_jax.offload.source import RowSource
from engram_jax.runs.checkpoints import last_checkpoint
from engram_jax.runs.directory import RunDirectory
from engram_jax.runs.export import SavedTables
from engram_jax.runs.reader import Reader, reader_of
from engram_jax.training.placement import placed_state, serving_mesh

HOMES = ("device", "host", "disk")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """Holds what an engine needs of a run.

    Attributes:
      run, reader: its config, and how it reads text.
      step: of its checkpoint.
      params, router_bias: of the model, split over the mesh; the parameters as
        `stages.serving_params` keeps them.
      rows: where its rows come from.
    """

    run: RunConfig
    reader: Reader
    step: int
    params: dict[str, Any]
    router_bias: list[jax.Array | None]
    rows: RowSource

    @property
    def length(self) -> int:
        """The most tokens that the run reads: what it was trained at, or extended to."""
        yarn = self.run.model.attention.yarn
        extended = int(yarn.factor * yarn.original_length) if yarn else 0
        return max(self.run.data.sequence_length, extended)

    def engine(self, **settings: Any) -> Engine:
        """Make an engine of the run; `slots`, `length` and so on are as `Engine` takes them."""
        reader = self.reader
        return Engine(
            self.run.model, self.params, self.router_bias, self.rows, pad_id=reader.pad_id,
            end_id=reader.end_id, known=reader.vocab_size, **settings)


def engine(
    directory: epath.PathLike, memory: str = "device", dtype: str = "", mesh: str | None = None,
    **settings: Any,
) -> Engine:
    """Make an engine of a run's last checkpoint; leaving it as a context closes its tables.

    Args:
      directory: of the run.
      memory, dtype, mesh: where its tables and parameters are, as `served` takes them.
      settings: `slots`, `length`, `chunk` and `overlap`, as `Engine` takes them.

    Raises:
      UserError, MachineError: as `served`; or a setting out of range.
    """
    model = served(RunDirectory(directory), memory, dtype, mesh=mesh)
    try:
        return model.engine(**settings)
    except BaseException:
        model.rows.close()
        raise


def served(
    records: RunDirectory, memory: str = "device", dtype: str = "", step: int | None = None,
    mesh: str | None = None,
) -> Served:
    """Load a checkpoint of a run to be served.

    Args:
      records: of the run.
      memory: "device", as in training; "host", read from the checkpoint into host memory; "disk", a
        file in the run's folder, which is written if it is not there.
      dtype: of the rows on host or disk, one of `config.ROW_DTYPES`; "" is that of training.
      step: of the checkpoint; None is the last one.
      mesh: as `serving_mesh` takes it. A model that does not fit one device is split as in
        training, and its programs by XLA: each device computes a part of each token.

    Raises:
      UserError: no such checkpoint, or a setting out of range.
      MachineError: what is on disk cannot be read or written.
    """
    require(memory in HOMES, "memory", memory, f"must be one of {', '.join(HOMES)}")
    require(not dtype or dtype in ROW_DTYPES, "dtype", dtype,
            f"must be one of {', '.join(ROW_DTYPES)}")
    require(not dtype or memory != "device", "dtype", dtype,
            "is of tables on host or disk; on the device they are as in training")
    run = records.config()
    there = serving_mesh(run, mesh, tables=memory == "device")
    reader = reader_of(records)
    saved = SavedTables(records, reader, step)
    fields = ("params", "router_bias", *(["tables"] if memory == "device" else []))
    with last_checkpoint(records, reader) as checkpoint:
        state = checkpoint.restore(placed_state(run, there), step=saved.step, only=fields)
    end_id = reader.end_id if run.model.isolate_documents else None
    rows: RowSource
    if memory == "device":
        rows = DeviceRows(run.model, reader.addressing, state.tables, end_id)
    else:
        rows = HostRows(reader.addressing, _homes(records, saved, memory, dtype), end_id)
    return Served(run=run, reader=reader, step=saved.step,
                  params=serving_params(state.params, run.model), router_bias=state.router_bias,
                  rows=rows)


def _homes(records: RunDirectory, saved: SavedTables, memory: str, dtype: str) -> dict[str, Home]:
    """The run's tables off the device; none stays open if one cannot be opened."""
    homes: dict[str, Home] = {}
    with contextlib.ExitStack() as opened:
        for site in saved.sites:
            own = dtype or site.hash_config.table_dtype
            homes[site.name] = (saved.on_host(site, own) if memory == "host"
                                else _on_disk(records, saved, site, own))
            opened.callback(homes[site.name].close)
        opened.pop_all()
    return homes


def _on_disk(records: RunDirectory, saved: SavedTables, site: Site, dtype: str) -> DiskTable:
    """A table's file in the run's folder, written first if it is not of the checkpoint."""
    folder, wanted = records.path / "tables", saved.info(site, dtype)
    path = folder / f"{site.name}.{dtype}.table"
    if path.exists():
        table = DiskTable.open(path, expect=wanted, check="read")
        if (table.info.step, table.info.saved_ns) == (wanted.step, wanted.saved_ns):
            return table
        table.close()
    return DiskTable.open(saved.to_disk(site, dtype, folder), expect=wanted, check="read")
