"""A table in a file on a local disk: many reads at once, each bringing a row with its scales.

The system is told of all rows that are wanted before the first is read (`posix_fadvise`), so the
disk's queue is as deep as it can be without a thread; rows that are near each other are read as
one. Reads are `preadv`, not a mapping: what the disk refuses is raised, never zeros or a signal.

Shapes: U ids, B bytes of a packed row, M rows read, S spans of neighbouring rows, K blocks.
"""

import os
import time
from pathlib import Path
from typing import BinaryIO

import numpy as np

from engram_jax.config import require
from engram_jax.errors import MachineError
from engram_jax.offload.counters import TierCounts, TierMeter
from engram_jax.offload.file import (
    TableFile,
    TableInfo,
    check_blocks,
    check_serves,
    read_table_file,
    require_local,
)
from engram_jax.offload.home import checked_ids, room
from engram_jax.storage import refusals

CHECKS = ("none", "read")
_NEAR = 4096  # bytes between rows that are read as one: a page comes whole anyhow
_ROWS_AT_ONCE = 4096  # distinct rows; bounds the memory where whole blocks are read


class DiskTable:
    """Serves the rows of a table file on a disk; `open` opens one."""

    group = 1

    def __init__(self, path: Path, file: BinaryIO, table: TableFile, check: str):
        self.info, self.format, self.rows = table.info, table.info.format, table.info.rows
        self.fingerprint = table.info.fingerprint
        self._path, self._file, self._table = path, file, table
        self._meter = TierMeter()
        # Blocks that need no more checking.
        self._trusted_K = np.full(table.info.blocks, check == "none")

    @classmethod
    def open(cls, path: str | os.PathLike[str], expect: TableInfo | None = None,
             check: str = "none") -> "DiskTable":
        """Open a table file; reads its header and checksums only.

        Args:
          path: of the file, on a local disk.
          expect: what it must be, for example `table_info(addressing, site, dtype)`; its rows must
            mean the same. None takes any table.
          check: "read" reads a block whole and checks it before the first row of it is served;
            "none" trusts the file (`engram-jax verify` checks all of it).

        Raises:
          UserError: no table, one of another hash or size, or not on a disk.
          MachineError: it is cut short, its header is altered, or it cannot be read.
        """
        require(check in CHECKS, "check", check, f"must be one of {', '.join(CHECKS)}")
        require_local(path)
        path = Path(path)
        with refusals(path, "read"):
            file = path.open("rb", buffering=0)
        try:
            table = read_table_file(path, file)
            if expect is not None:
                check_serves(path, table.info, expect)
        except BaseException:
            file.close()
            raise
        # What is read beside a row is not read again soon.
        _advise(file.fileno(), 0, 0, "POSIX_FADV_RANDOM")
        return cls(path, file, table, check)

    @property
    def checksums_K(self) -> np.ndarray:
        """CRC-32 of each block, uint32 [K], as the file has them."""
        return self._table.checksums_K

    def lookup(self, ids_U: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """See `Home.lookup`."""
        started = time.perf_counter()
        wanted_U, inverse_U = np.unique(checked_ids(ids_U, self.rows), return_inverse=True)
        out = room(out, len(inverse_U), self.format)
        rows_UB = np.empty((len(wanted_U), self.format.row_bytes), np.uint8)
        with refusals(self._path, "read"):
            for start in range(0, len(wanted_U), _ROWS_AT_ONCE):
                part = slice(start, start + _ROWS_AT_ONCE)
                self._check(wanted_U[part])
                self._read(wanted_U[part], rows_UB[part])
        packed_UB = rows_UB.take(inverse_U, axis=0, mode="clip", out=out)
        self._meter.count(len(packed_UB), len(packed_UB), self.format.row_bytes,
                          time.perf_counter() - started)
        return packed_UB

    def fill(self, ids_GK: np.ndarray) -> None:
        """See `Home.fill`: it has them all."""

    def tiers(self) -> dict[str, TierCounts]:
        """See `Home.tiers`."""
        return {"disk": self._meter.counts()}

    def close(self) -> None:
        """See `Home.close`."""
        self.rows = 0
        self._file.close()

    def _read(self, ids_U: np.ndarray, rows_UB: np.ndarray) -> None:
        """Read the packed rows of ascending distinct ids into `rows_UB`."""
        near = max(1, _NEAR // self.format.row_bytes)
        new_U = np.ones(len(ids_U), bool)
        np.greater(np.diff(ids_U), near, out=new_U[1:])
        starts = np.flatnonzero(new_U)
        first_S = ids_U[starts]
        count_S = ids_U[np.append(starts[1:], len(ids_U)) - 1] + 1 - first_S
        if len(first_S) == len(ids_U):
            self._read_spans(first_S, count_S, rows_UB)
            return
        scratch_MB = np.empty((count_S.sum(), self.format.row_bytes), np.uint8)
        self._read_spans(first_S, count_S, scratch_MB)
        start_S = np.cumsum(count_S) - count_S
        rows_UB[:] = scratch_MB[ids_U + (start_S - first_S)[np.cumsum(new_U) - 1]]

    def _read_spans(self, first_S: np.ndarray, count_S: np.ndarray, rows_MB: np.ndarray) -> None:
        """Read spans of rows one behind the other into `rows_MB`."""
        width, file = self.format.row_bytes, self._file.fileno()
        offsets = (self._table.data_start + first_S * width).tolist()
        sizes = (count_S * width).tolist()
        for offset, size in zip(offsets, sizes, strict=True):
            _advise(file, offset, size, "POSIX_FADV_WILLNEED")
        view, start = rows_MB.reshape(-1).data, 0
        for offset, size in zip(offsets, sizes, strict=True):
            if os.preadv(file, [view[start:start + size]], offset) != size:
                raise MachineError(f"{self._path}: ended while it was read")
            start += size

    def _check(self, ids_U: np.ndarray) -> None:
        """Read and check the blocks of ascending ids that have not been."""
        size = self.info.block_rows
        blocks_S = np.unique(ids_U // size)
        blocks_S = blocks_S[~self._trusted_K[blocks_S]]
        if not len(blocks_S):
            return
        first_S = blocks_S * size
        count_S = np.minimum(size, self.rows - first_S)
        rows_MB = np.empty((count_S.sum(), self.format.row_bytes), np.uint8)
        self._read_spans(first_S, count_S, rows_MB)
        for block, start in zip(blocks_S.tolist(), (np.cumsum(count_S) - count_S).tolist(),
                                strict=True):
            check_blocks(self._path, self._table, block, rows_MB[start:start + size])
        self._trusted_K[blocks_S] = True


def _advise(file: int, offset: int, size: int, advice: str) -> None:
    """Tell the system how a part of a file will be read, where it listens."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, offset, size, getattr(os, advice))
