"""A table that lies in safetensors shards, read row by row: opening it reads no row.

A row is packed as `offload.formats` has it, from the bytes that the shards hold: fp8 with its
scales bit for bit, bfloat16 and float32 as they are, float16 as float32. Where one scale is of the
whole table, the rows keep scales of one and whoever imports it gives the scale to the weights that
multiply them.

Shapes: U ids, B bytes of a packed row, W bytes of a row of a shard.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator, Sequence

import numpy as np

from engram_jax.config import require
from engram_jax.interop.safetensors import Tensor, read_at
from engram_jax.offload.counters import TierCounts, TierMeter
from engram_jax.offload.formats import GROUP, RowFormat
from engram_jax.offload.home import checked_ids, room
from engram_jax.storage import refusals

_ROW_DTYPES = {"F8_E4M3": "fp8", "BF16": "bfloat16", "F32": "float32", "F16": "float32"}
_ONE = 127  # the byte of e8m0 that is 2^0
_AT_ONCE = 2**24  # bytes of packed rows


@dataclasses.dataclass(frozen=True)
class Part:
    """Neighbouring rows of a table.

    Attributes:
      weight: [rows, columns], of a dtype in `_ROW_DTYPES`.
      scale: e8m0 [rows, columns / 32] beside fp8; None is scales of one.
    """

    weight: Tensor
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        weight, what = self.weight, f"{self.weight.path}: {self.weight.name}"
        require(weight.dtype in _ROW_DTYPES, f"{what}: dtype", weight.dtype,
                f"must be one of {', '.join(_ROW_DTYPES)} for the rows of a table")
        require(len(weight.shape) == 2 and min(weight.shape) >= 1, f"{what}: shape", weight.shape,
                "must be [rows, columns]")
        if self.scale is not None:
            rows, columns = weight.shape
            self.scale.require_shape(rows, -(-columns // GROUP))
            require((weight.dtype, self.scale.dtype) == ("F8_E4M3", "F8_E8M0"), f"{what}: dtypes",
                    (weight.dtype, self.scale.dtype), "must be F8_E4M3 with F8_E8M0")

    @property
    def format(self) -> RowFormat:
        return RowFormat(_ROW_DTYPES[self.weight.dtype], self.weight.shape[1])

    def packed(self, weight_UW: np.ndarray, scale_UW: np.ndarray | None) -> np.ndarray:
        """Packed rows, uint8 [U, B], of rows as the shard holds them."""
        if self.weight.dtype == "F16":
            return np.ascontiguousarray(weight_UW.view("<f2").astype("<f4")).view(np.uint8)
        if self.weight.dtype != "F8_E4M3":
            return weight_UW
        packed_UB = np.empty((len(weight_UW), self.format.row_bytes), np.uint8)
        packed_UB[:, :self.format.dim] = weight_UW
        packed_UB[:, self.format.dim:] = _ONE if scale_UW is None else scale_UW
        return packed_UB


class ShardTable:
    """A home in shards (`offload.home.Home`); the parts lie one behind the other.

    Args:
      parts: of the table.
      rows: how many of their rows are ever asked for; what is behind them is padding.
      fingerprint: of the hash and vocabulary that they are for; "" where nobody has said.

    Raises:
      UserError: parts that do not go together, or with fewer rows.
      MachineError: a file cannot be opened.
    """

    group = 1
    fingerprint = ""  # the files do not say

    def __init__(self, parts: Sequence[Part], rows: int, fingerprint: str = ""):
        require(bool(parts), "parts", 0, "must be at least 1")
        self.format, self.rows, self.fingerprint = parts[0].format, rows, fingerprint
        for part in parts:
            require(part.format == self.format, f"{part.weight.path}: {part.weight.name}",
                    f"{part.weight.dtype} {part.weight.shape}",
                    f"must hold rows as {parts[0].weight.name} does")
        self._parts, self._meter = tuple(parts), TierMeter()
        self._starts = np.cumsum([0, *(part.weight.shape[0] for part in parts)])
        require(rows <= self._starts[-1], f"{parts[0].weight.path}: rows of "
                f"{parts[0].weight.name}", int(self._starts[-1]), f"the primes sum to {rows}")
        self._files: dict[str, int] = {}
        with contextlib.ExitStack() as opened:
            for part in parts:
                for tensor in filter(None, (part.weight, part.scale)):
                    name = str(tensor.path)
                    if name not in self._files:
                        with refusals(name, "read"):
                            self._files[name] = os.open(name, os.O_RDONLY)
                        opened.callback(os.close, self._files[name])
            self._opened = opened.pop_all()

    def lookup(self, ids_U: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """See `Home.lookup`."""
        started = time.perf_counter()
        wanted_U, inverse_U = np.unique(checked_ids(ids_U, self.rows), return_inverse=True)
        out = room(out, len(inverse_U), self.format)
        rows_UB = np.empty((len(wanted_U), self.format.row_bytes), np.uint8)
        bounds = np.searchsorted(wanted_U, self._starts)
        for part, start, first, last in zip(self._parts, self._starts.tolist(),
                                            bounds.tolist(), bounds[1:].tolist(), strict=False):
            if last > first:
                local_U = wanted_U[first:last] - start
                rows_UB[first:last] = part.packed(
                    self._gather(part.weight, local_U),
                    None if part.scale is None else self._gather(part.scale, local_U))
        rows_UB.take(inverse_U, axis=0, mode="clip", out=out)
        self._meter.count(len(out), len(out), self.format.row_bytes, time.perf_counter() - started)
        return out

    def _gather(self, tensor: Tensor, local_U: np.ndarray) -> np.ndarray:
        """Rows of one tensor, uint8 [U, W]; all are announced before the first is read."""
        file, width = self._files[str(tensor.path)], tensor.row_bytes
        offsets = (tensor.start + local_U * width).tolist()
        if hasattr(os, "posix_fadvise"):
            for offset in offsets:
                os.posix_fadvise(file, offset, width, os.POSIX_FADV_WILLNEED)
        rows_UW = np.empty((len(offsets), width), np.uint8)
        with refusals(tensor.path, "read"):
            for row_W, offset in zip(rows_UW, offsets, strict=True):
                read_at(file, offset, row_W, tensor.path)
        return rows_UW

    def stretches(self) -> Iterator[np.ndarray]:
        """All packed rows in order, uint8 [U, B], some megabytes at a time.

        Raises:
          MachineError: a file cannot be read.
        """
        at_once, left = max(1, _AT_ONCE // self.format.row_bytes), self.rows
        for part in self._parts:
            rows = min(left, part.weight.shape[0])
            for start in range(0, rows, at_once):
                count = min(at_once, rows - start)
                yield part.packed(self._stretch(part.weight, start, count),
                                  None if part.scale is None
                                  else self._stretch(part.scale, start, count))
            left -= rows

    def _stretch(self, tensor: Tensor, start: int, count: int) -> np.ndarray:
        rows_UW = np.empty((count, tensor.row_bytes), np.uint8)
        with refusals(tensor.path, "read"):
            read_at(self._files[str(tensor.path)], tensor.start + start * tensor.row_bytes,
                    rows_UW, tensor.path)
        return rows_UW

    def fill(self, ids_GK: np.ndarray) -> None:
        """See `Home.fill`: it has them all."""

    def tiers(self) -> dict[str, TierCounts]:
        """See `Home.tiers`."""
        return {"disk": self._meter.counts()}

    def close(self) -> None:
        """See `Home.close`."""
        self.rows = 0
        self._opened.close()
