"""A cache in host memory over a slower home, such as a table on disk.

It is keyed by n-gram (`NgramIndex`). An entry is a row of each head, so a gigabyte keeps fifteen
times the n-grams that the system's page cache would (V4.1: rows of 264 bytes, pages of 4096).

Shapes: U ids, G n-grams asked for, M of them that were missing, K heads, C entries, B bytes of a
packed row.
"""

import threading
import time

import numpy as np

from engram_jax.config import require
from engram_jax.offload.counters import TierCounts, TierMeter
from engram_jax.offload.home import Home, checked_ids, room
from engram_jax.offload.host import touched_zeros
from engram_jax.offload.ngram_index import NgramIndex

FILLED_AT_ONCE = 2**14  # n-grams
_TIER = "host cache"  # its name among what each tier counts


class CachedTable:
    """Serves rows from a cache, or from the home below it, whose rows it then keeps.

    Several threads may use it; they take turns.

    Args:
      below: the whole table; closed with this.
      group: K, how many ids, one after another, are one n-gram's. All lookups come in such groups
        (`dedup.distinct` with this `group`).
      capacity_bytes: of the cache's rows.

    Raises:
      UserError: no group, a cache too small for one set, or another such cache below.
      MachineError: not enough memory.
    """

    def __init__(self, below: Home, group: int, capacity_bytes: int):
        require(_TIER not in below.tiers(), "below", _TIER,
                "is a cache in host memory itself; one is enough")
        self.format, self.rows, self.group = below.format, below.rows, group
        self.fingerprint = below.fingerprint
        self._entry_bytes = group * below.format.row_bytes
        self._index = NgramIndex(group, self._entry_bytes, capacity_bytes)
        self._below, self._lock = below, threading.Lock()
        entries = self._index.entries
        self._entries = touched_zeros(entries * self._entry_bytes).reshape(entries, -1)
        self._meter = TierMeter()

    def lookup(self, ids_U: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """See `Home.lookup`; what is asked for are whole groups.

        Raises:
          UserError: also if the ids are no whole number of groups.
        """
        started = time.perf_counter()
        ids = checked_ids(ids_U, self.rows)
        if ids.size % self.group:
            require(False, "row ids", ids.size, f"must be n-grams of {self.group} ids each")
        out = room(out, ids.size, self.format)
        with self._lock:
            hits = self._serve(ids.reshape(-1, self.group), out.reshape(-1, self._entry_bytes))
        self._meter.count(ids.size, hits * self.group, self.format.row_bytes,
                          time.perf_counter() - started)
        return out

    def fill(self, ids_GK: np.ndarray) -> None:
        """See `Home.fill`; what it held before goes. The home below keeps what it has room for."""
        self._below.fill(ids_GK)
        with self._lock:
            kept, entry_M = self._index.claim_all(ids_GK)
            for start in range(0, len(kept), FILLED_AT_ONCE):
                part = slice(start, start + FILLED_AT_ONCE)
                part_MK = ids_GK[kept[part]]
                rows = self._below.lookup(part_MK.reshape(-1))
                self._entries[entry_M[part]] = rows.reshape(-1, self._entry_bytes)
                self._index.enter(part_MK, entry_M[part], first_stay=True)

    def tiers(self) -> dict[str, TierCounts]:
        """See `Home.tiers`."""
        return {_TIER: self._meter.counts(), **self._below.tiers()}

    def close(self) -> None:
        """See `Home.close`."""
        self._below.close()
        self.rows = 0

    def _serve(self, ids_GK: np.ndarray, out: np.ndarray) -> int:
        """Write the n-grams' rows, uint8 [G, K * B]; the missing ones are fetched and kept. Returns
        how many were not missing."""
        entry_G, hit_G = self._index.probe(ids_GK)
        out[hit_G] = self._entries[entry_G[hit_G]]
        misses = np.flatnonzero(~hit_G)
        if len(misses):
            rows = self._below.lookup(ids_GK[misses].reshape(-1)).reshape(len(misses), -1)
            out[misses] = rows
            kept, entry_M = self._index.claim(ids_GK[misses])
            self._entries[entry_M] = rows[kept]
            self._index.enter(ids_GK[misses[kept]], entry_M)
        return len(ids_GK) - len(misses)
