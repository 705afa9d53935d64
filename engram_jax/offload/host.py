"""A table in host memory: one gather by NumPy, from huge pages where Linux has them.

A row lies anywhere in the table, so with pages of 4 KiB nearly every row costs a walk through the
page tables, too; huge pages of 2 MiB make a gather about a third faster. Pages are touched at
the start and not when the first request comes.

Shapes: R rows of the table, U ids, B bytes of a packed row.
"""

import mmap
import os
import re
import time
from pathlib import Path

import numpy as np

from engram_jax.config import require
from engram_jax.errors import MachineError
from engram_jax.host_memory import available_bytes
from engram_jax.offload.counters import TierCounts, TierMeter
from engram_jax.offload.file import (
    TableInfo,
    check_serves,
    checked_rows,
    read_table_file,
    require_local,
)
from engram_jax.offload.formats import RowFormat
from engram_jax.offload.home import checked_ids, room
from engram_jax.storage import refusals

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14, which Python does not name
_FAULTED_AT_ONCE = 2**30  # bytes
_PAGE = 4096
_RANGE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")


class HostTable:
    """Serves the rows of a table in host memory; `arrays.host_table` makes one of an array.

    Args:
      format: of the rows.
      packed_RB: the rows themselves, contiguous uint8; they are not copied.

    Raises:
      UserError: another shape or dtype.
    """

    group = 1
    fingerprint = ""

    def __init__(self, format: RowFormat, packed_RB: np.ndarray):
        require(packed_RB.dtype == np.uint8 and packed_RB.flags.c_contiguous
                and packed_RB.ndim == 2 and packed_RB.shape[1] == format.row_bytes, "packed",
                f"{packed_RB.dtype} {packed_RB.shape}",
                f"must be contiguous uint8 [R, {format.row_bytes}]")
        self.format, self.rows = format, len(packed_RB)
        self.packed_RB = packed_RB
        self._meter = TierMeter()

    @classmethod
    def allocate(cls, format: RowFormat, rows: int) -> "HostTable":
        """Make a table of zeros, in huge pages as far as Linux gives them.

        Raises:
          UserError: no rows.
          MachineError: there is not enough free memory.
        """
        require(rows >= 1, "rows", rows, "must be at least 1")
        return cls(format, touched_zeros(rows * format.row_bytes).reshape(rows, format.row_bytes))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], expect: TableInfo | None = None
                  ) -> "HostTable":
        """Read a table file whole into host memory, each block checked.

        Args:
          path: of the file.
          expect: what it must be, as for `DiskTable.open`.

        Raises:
          UserError, MachineError: as `DiskTable.open`; a block fails its check; not enough memory.
        """
        require_local(path)
        path = Path(path)
        with refusals(path, "read"), path.open("rb", buffering=0) as file:
            read = read_table_file(path, file)
            if expect is not None:
                check_serves(path, read.info, expect)
            table = cls.allocate(read.info.format, read.info.rows)
            table.fingerprint = read.info.fingerprint
            for start, packed_UB in checked_rows(path, file, read):
                table.write(start, packed_UB)
        return table

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return self.packed_RB.nbytes

    @property
    def huge_bytes(self) -> int:
        """How much of it lies in huge pages now; 0 where the system does not tell."""
        start = self.packed_RB.ctypes.data
        return _huge_bytes(start, start + self.nbytes)

    def write(self, start: int, packed_UB: np.ndarray) -> None:
        """Put packed rows at the ids from `start` on.

        Raises:
          UserError: they are not rows of this table.
        """
        stop = start + len(packed_UB)
        require(0 <= start <= stop <= self.rows, "rows", (start, stop),
                f"must be in 0..{self.rows}")
        self.packed_RB[start:stop] = packed_UB

    def lookup(self, ids_U: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """See `Home.lookup`."""
        started = time.perf_counter()
        ids = checked_ids(ids_U, self.rows)
        # Clipping changes nothing after the check; it is what lets NumPy write to `out` directly.
        packed_UB = self.packed_RB.take(ids, axis=0, mode="clip",
                                        out=room(out, len(ids), self.format))
        self._meter.count(len(ids), len(ids), self.format.row_bytes,
                          time.perf_counter() - started)
        return packed_UB

    def fill(self, ids_GK: np.ndarray) -> None:
        """See `Home.fill`: it has them all."""

    def tiers(self) -> dict[str, TierCounts]:
        """See `Home.tiers`."""
        return {"host": self._meter.counts()}

    def close(self) -> None:
        """See `Home.close`: the memory goes when nobody holds a view of it any more."""
        self.rows, self.packed_RB = 0, np.empty((0, self.format.row_bytes), np.uint8)


def touched_zeros(size: int) -> np.ndarray:
    """Take memory that is zero and touched, uint8 [size], in huge pages as far as Linux gives them.

    Raises:
      MachineError: there is not enough free memory.
    """
    free = available_bytes()
    if free is not None and size > free:
        raise MachineError(f"{size / 2**30:.1f} GiB of host memory are needed, "
                           f"{free / 2**30:.1f} GiB are free")
    try:
        memory = mmap.mmap(-1, size, **_PRIVATE)
    except (OSError, ValueError, OverflowError) as error:
        raise MachineError(f"{size / 2**30:.1f} GiB of host memory are needed: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    _touch(memory)
    return np.frombuffer(memory, np.uint8)


_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


def _touch(memory: mmap.mmap) -> None:
    """Make the system find pages for all of it now."""
    for start in range(0, len(memory), _FAULTED_AT_ONCE):
        size = min(_FAULTED_AT_ONCE, len(memory) - start)
        try:
            memory.madvise(_POPULATE_WRITE, start, size)
        except (OSError, AttributeError, ValueError):  # an older Linux, or another system
            np.frombuffer(memory, np.uint8, size, start)[::_PAGE] = 0


def _huge_bytes(start: int, stop: int) -> int:
    """Bytes of start..stop that are in huge pages, by the kernel's list of mappings.

    Neighbouring mappings are listed as one; then this is its share of their huge pages.
    """
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return 0
    huge, share = 0.0, 0.0
    for line in lines:
        if match := _RANGE.match(line):
            first, last = int(match[1], 16), int(match[2], 16)
            share = max(0, min(stop, last) - max(start, first)) / (last - first)
        elif line.startswith("AnonHugePages:"):
            huge += share * int(line.split()[1]) * 1024
    return round(huge)
