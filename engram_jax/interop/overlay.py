"""Rows that were changed after an import, as a small file to lay over the released table.

The file is safetensors: `ids` I64 [U], ascending, and `rows` U8 [U, B], packed as the table's are;
what the table must be stands in its metadata. The table itself is never written to: taken off, it
is what it was.

Shapes: U changed rows, N ids asked for, B bytes of a packed row, S shards, R rows of a shard, D
columns, K blocks.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import require
from engram_jax.errors import UserError
from engram_jax.interop import safetensors
from engram_jax.interop.released import stretches
from engram_jax.offload.counters import TierCounts
from engram_jax.offload.disk import DiskTable
from engram_jax.offload.file import BLOCK_BYTES
from engram_jax.offload.formats import RowFormat
from engram_jax.offload.home import Home
from engram_jax.tables.layout import TableLayout

FORMAT, VERSION = "engram_jax overlay", "1"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Overlay:
    """Changed rows of one table.

    Attributes:
      format: how rows are packed.
      base: `table_digest` of the table without them.
      ids_U: int64, ascending.
      rows_UB: uint8, the rows instead.

    Raises:
      UserError: ids that do not ascend, or rows of another number or width.
    """

    format: RowFormat
    base: str
    ids_U: np.ndarray
    rows_UB: np.ndarray

    def __post_init__(self) -> None:
        require(self.ids_U.ndim == 1 and bool((self.ids_U[1:] > self.ids_U[:-1]).all())
                and bool((self.ids_U[:1] >= 0).all()), "overlay ids", self.ids_U.shape,
                "must be ascending row ids")
        require(self.rows_UB.dtype == np.uint8 and self.rows_UB.shape == (
            len(self.ids_U), self.format.row_bytes), "overlay rows", self.rows_UB.shape,
            f"must be uint8 {(len(self.ids_U), self.format.row_bytes)}")

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file; it appears whole or not at all.

        Raises:
          MachineError: it cannot be written.
        """
        safetensors.save(Path(path), {"ids": self.ids_U.astype(np.int64), "rows": self.rows_UB}, {
            "format": FORMAT, "version": VERSION, "base": self.base, "dtype": self.format.dtype,
            "dim": str(self.format.dim)})


def read_overlay(path: str | os.PathLike[str]) -> Overlay:
    """The overlay in a file.

    Raises:
      UserError: it is none, or a field of it is wrong.
      MachineError: it cannot be read.
    """
    tensors = safetensors.open_tensors(path)
    said = tensors.metadata
    require((said.get("format"), said.get("version")) == (FORMAT, VERSION), f"{path}: format",
            (said.get("format"), said.get("version")), f"must be {(FORMAT, VERSION)}")
    require(said.get("dim", "").isdecimal() and len(said["dim"]) < 10
            and len(said.get("base", "")) == 64, f"{path}: dim", said.get("dim"),
            "must be a number, beside the base's digest")
    for name, dtype in (("ids", "I64"), ("rows", "U8")):
        require(tensors[name].dtype == dtype, f"{path}: {name}: dtype", tensors[name].dtype,
                f"must be {dtype}")
    try:
        return Overlay(format=RowFormat(said.get("dtype", ""), int(said["dim"])),
                       base=said["base"], ids_U=tensors["ids"].read(),
                       rows_UB=tensors["rows"].read())
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def table_digest(home: Home) -> str:
    """sha256 (hex) of a table's format, rows and the CRC-32 of each block: one for all homes.

    A table file has the checksums in its trailer; any other home is read whole.

    Raises:
      MachineError: the table cannot be read.
    """
    checksums_K = home.checksums_K if isinstance(home, DiskTable) else _checksums(home)
    head = json.dumps([home.format.dtype, home.format.dim, home.rows]).encode()
    return hashlib.sha256(head + np.asarray(checksums_K, "<u4").tobytes()).hexdigest()


def _checksums(home: Home) -> np.ndarray:
    """uint32 [K], as `offload.file` has them."""
    block_rows = max(1, BLOCK_BYTES // home.format.row_bytes)
    sums_K, row = np.zeros(-(-home.rows // block_rows), np.uint32), 0
    for packed_UB in stretches(home):
        packed_UB, start = np.ascontiguousarray(packed_UB), 0
        while start < len(packed_UB):
            block, done = divmod(row, block_rows)
            stop = min(start + block_rows - done, len(packed_UB))
            sums_K[block] = zlib.crc32(packed_UB[start:stop].data, int(sums_K[block]))
            row, start = row + stop - start, stop
    return sums_K


def difference(base: Home, changed: Iterable[np.ndarray]) -> Overlay:
    """The overlay that makes a table of another: the rows that differ in a bit.

    Args:
      base: the table as it was released.
      changed: all rows of the other in order, uint8 [U, B] a stretch at a time.

    Raises:
      UserError: rows of another width or number.
      MachineError: the base cannot be read.
    """
    ids, rows, start = [np.empty(0, np.int64)], [np.empty((0, base.format.row_bytes), np.uint8)], 0
    for packed_UB in changed:
        stop = start + len(packed_UB)
        require(packed_UB.shape[1] == base.format.row_bytes and stop <= base.rows, "changed rows",
                (stop, packed_UB.shape[1]), "(rows, bytes of one) must be "
                f"{(base.rows, base.format.row_bytes)}")
        old_UB = base.lookup(np.arange(start, stop))
        differ_U = np.flatnonzero((old_UB != packed_UB).any(axis=1))
        ids.append(start + differ_U)
        rows.append(packed_UB[differ_U].copy())
        start = stop
    require(start == base.rows, "changed rows", start, f"must be {base.rows}")
    return Overlay(format=base.format, base=table_digest(base), ids_U=np.concatenate(ids),
                   rows_UB=np.concatenate(rows))


def write_difference(base: str | os.PathLike[str], changed: str | os.PathLike[str],
                     out: str | os.PathLike[str]) -> None:
    """Write the overlay that makes one table file of another.

    Raises:
      UserError: tables that are not alike.
      MachineError: something cannot be read or written.
    """
    for table in (base, changed):
        require(Path(out).resolve() != Path(table).resolve(), "overlay", os.fspath(out),
                "is one of the two tables, and would be written over")
    with (contextlib.closing(DiskTable.open(base, check="read")) as before,
          contextlib.closing(DiskTable.open(changed, check="read")) as after):
        for field in ("site", "fingerprint", "rows", "dim", "dtype"):
            old, new = getattr(before.info, field), getattr(after.info, field)
            require(old == new, f"changed table's {field}", new, f"must be {old!r}, the base's")
        difference(before, stretches(after)).write(out)


class OverlaidTable:
    """A home with an overlay on it; every other home can be below (`offload.home.Home`).

    Args:
      below: the table; closed with this, and looked up again as it was once this is let go.
      overlay: the rows instead of its own.

    Raises:
      UserError: an overlay of another table.
      MachineError: the table cannot be read.
    """

    def __init__(self, below: Home, overlay: Overlay):
        require(below.group == 1, "table below an overlay", type(below).__name__,
                "must be whole: lay the overlay under a cache and not over it")
        require(overlay.format == below.format, "overlay of rows", overlay.format,
                f"the table has {below.format}")
        _check_base(table_digest(below), overlay, below.rows)
        self.format, self.rows, self.group = below.format, below.rows, below.group
        self.fingerprint = below.fingerprint
        self.below, self.overlay = below, overlay

    def lookup(self, ids_N: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """See `Home.lookup`."""
        rows_NB, ids_U = self.below.lookup(ids_N, out), self.overlay.ids_U
        at_N = np.searchsorted(ids_U, ids_N)
        at_N[at_N == len(ids_U)] = 0
        changed_N = np.flatnonzero(ids_U[at_N] == ids_N) if len(ids_U) else at_N[:0]
        rows_NB[changed_N] = self.overlay.rows_UB[at_N[changed_N]]
        return rows_NB

    def fill(self, ids_GK: np.ndarray) -> None:
        """See `Home.fill`."""
        self.below.fill(ids_GK)

    def tiers(self) -> dict[str, TierCounts]:
        """See `Home.tiers`: those below."""
        return self.below.tiers()

    def close(self) -> None:
        """See `Home.close`."""
        self.below.close()


def lay_on_device(layout: TableLayout, table_SRD: jax.Array, overlay: Overlay
                  ) -> tuple[jax.Array, Overlay]:
    """A table on the device with an overlay's rows, and the overlay that takes them off again.

    Args:
      layout: of the table.
      table_SRD: float32, or the bits of bfloat16.
      overlay: of a table of the same bits in any home, in the table's own dtype.

    Raises:
      UserError: an overlay of another table, or of another dtype.
    """
    dtype = {"float32": "float32", "uint16": "bfloat16"}[str(table_SRD.dtype)]
    require(overlay.format == RowFormat(dtype, layout.dim), "overlay of rows", overlay.format,
            f"the table has {RowFormat(dtype, layout.dim)}")
    _check_base(table_digest(_OnDevice(layout, table_SRD, overlay.format)), overlay, layout.rows)
    stored, ids = np.dtype(str(table_SRD.dtype)), jnp.asarray(overlay.ids_U, jnp.int32)
    before_UB = np.ascontiguousarray(layout.gather(table_SRD, ids)).view(np.uint8)
    table_SRD = layout.put(table_SRD, ids, jnp.asarray(overlay.rows_UB.view(stored)))
    off = dataclasses.replace(
        overlay, rows_UB=before_UB,
        base=table_digest(_OnDevice(layout, table_SRD, overlay.format)))
    return table_SRD, off


def _check_base(digest: str, overlay: Overlay, rows: int) -> None:
    require(overlay.base == digest, "overlay of the table", overlay.base[:12],
            f"this table is {digest[:12]}: it is another, or has been changed")
    require(bool((overlay.ids_U < rows).all()), "overlay ids", int(overlay.ids_U.max(initial=0)),
            f"must be row ids of the table, in 0..{rows - 1}")


class _OnDevice:
    """Offers as much of a home as a digest needs, over a table on the device."""

    group, fingerprint = 1, ""

    def __init__(self, layout: TableLayout, table_SRD: jax.Array, format: RowFormat):
        self.format, self.rows, self._layout, self._table = format, layout.rows, layout, table_SRD

    def lookup(self, ids_U: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        rows_UD = self._layout.gather(self._table, jnp.asarray(ids_U, jnp.int32))
        return np.ascontiguousarray(rows_UD).view(np.uint8)

    def fill(self, ids_GK: np.ndarray) -> None:
        pass

    def tiers(self) -> dict[str, TierCounts]:
        return {}

    def close(self) -> None:
        pass
