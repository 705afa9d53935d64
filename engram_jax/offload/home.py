"""What every home of a table off the device can do: give packed rows for row ids.

Shapes: U ids, B bytes of a packed row.
"""

from typing import Protocol, runtime_checkable

import numpy as np

from engram_jax.config import require
from engram_jax.offload.counters import TierCounts
from engram_jax.offload.formats import RowFormat


@runtime_checkable
class Home(Protocol):
    """Serves a table from host memory, a disk, or both; the same ids give the same bytes from each.

    Attributes:
      format: how its rows are packed.
      rows: how many it has.
      group: how many ids, one after another, must be one n-gram's in every lookup; 1 for any ids.
      fingerprint: of the hash and vocabulary that its rows are for, as in
        `Addressing.fingerprints`; "" where nobody has said.
    """

    format: RowFormat
    rows: int
    group: int
    fingerprint: str

    def lookup(self, ids_U: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Read packed rows, uint8 [U, B].

        Args:
          ids_U: whole numbers, in any order; repeats are allowed.
          out: uint8 [at least U, B], C-contiguous, to write into; what is returned is a view of it.

        Raises:
          UserError: an id out of range.
          MachineError: the table cannot be read, or fails its check; then `out` holds nothing that
            may be used.
        """

    def fill(self, ids_GK: np.ndarray) -> None:
        """Keep the rows of these n-grams where they are read fastest, as many as there is room for.

        A whole table has them all, and does nothing.

        Args:
          ids_GK: int64, different n-grams of `group` ids, those that matter most first.

        Raises:
          As `lookup`; then a cache has what it was filled with until then, and nothing else.
        """

    def tiers(self) -> dict[str, TierCounts]:
        """Tell what each tier has done, by what it is; this one first.

        "host" and "disk" are whole tables, "host cache" keeps rows of one of them.
        """

    def close(self) -> None:
        """Give the memory or the file back; nothing can be looked up afterwards."""


def checked_ids(ids_U: np.ndarray, rows: int) -> np.ndarray:
    """Check row ids, and give them as np.intp.

    Raises:
      UserError: not a list of whole numbers, or one that is not in 0..rows - 1.
    """
    given = np.asarray(ids_U)
    if given.ndim != 1 or given.dtype.kind not in "iu":  # the message costs as much as a gather
        require(False, "row ids", f"{given.dtype} {given.shape}", "must be whole numbers [U]")
    ids = given.astype(np.intp, copy=False)
    # One comparison for both ends: as an unsigned number, a negative one is large.
    unsigned: np.ndarray = ids.view(np.uintp)
    if ids.size and unsigned.max() >= rows:
        wrong = ids[(ids < 0) | (ids >= rows)]
        require(False, "row id", int(wrong[0]), f"must be in 0..{rows - 1}")
    return ids


def room(out: np.ndarray | None, ids: int, format: RowFormat) -> np.ndarray:
    """Find where `ids` packed rows go: the first rows of `out`, or new memory.

    Raises:
      UserError: `out` has another dtype or width, is too short or not contiguous.
    """
    if out is None:
        return np.empty((ids, format.row_bytes), np.uint8)
    right = (out.dtype == np.uint8 and out.ndim == 2 and out.shape[0] >= ids
             and out.shape[1] == format.row_bytes and out.flags.c_contiguous)
    if not right:
        require(False, "out", f"{out.dtype} {out.shape}",
                f"must be contiguous uint8 [at least {ids}, {format.row_bytes}]")
    return out[:ids]
