"""A cache in host memory over a slower home, such as a table on disk.

It is keyed by n-gram (`NgramIndex`). An entry is a row of each head, so a gigabyte keeps fifteen
times the n-grams that the system's page cache would (V4.1: rows of 264 bytes, pages of 4096).

Shapes: U ids, G n-grams asked for, M of them that were missing, K heads, C entries, B bytes of a
packed row.
"""

import collections
import threading
import time

import numpy as np

from engram_jax.config import require
from engram_jax.memory.homes import Home, checked_ids, room
from engram_jax.memory.host import touched_zeros
from engram_jax.memory.ngram_index import NgramIndex

_REMEMBERED = 4096  # lookups, for the percentiles of latency


class CachedTable:
    """A home: rows from a cache, or from the home below, whose rows it then keeps.

    Several threads may use it; they take turns.

    Args:
      below: the whole table; closed with this.
      group: K, how many ids, one after another, are one n-gram's. All lookups come in such groups
        (`fetch.distinct` with this `group`).
      capacity_bytes: of the cache's rows.

    Raises:
      UserError: no group, or a cache too small for one set.
      MachineError: not enough memory.
    """

    def __init__(self, below: Home, group: int, capacity_bytes: int):
        self.format, self.rows, self.group = below.format, below.rows, group
        self._entry_bytes = group * below.format.row_bytes
        self._index = NgramIndex(group, self._entry_bytes, capacity_bytes)
        self._below, self._lock = below, threading.Lock()
        entries = self._index.entries
        self._entries = touched_zeros(entries * self._entry_bytes).reshape(entries, -1)
        self._seconds: collections.deque[float] = collections.deque(maxlen=_REMEMBERED)

    def lookup(self, ids_U: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """As `Home.lookup`, of whole groups.

        Raises:
          UserError: also if the ids are no whole number of groups.
        """
        started = time.perf_counter()
        ids = checked_ids(ids_U, self.rows)
        if ids.size % self.group:
            require(False, "row ids", ids.size, f"must be n-grams of {self.group} ids each")
        out = room(out, ids.size, self.format)
        with self._lock:
            self._fill(ids.reshape(-1, self.group), out.reshape(-1, self._entry_bytes))
            self._seconds.append(time.perf_counter() - started)
        return out

    def close(self) -> None:
        """As `Home.close`."""
        self._below.close()
        self.rows = 0

    def metrics(self) -> dict[str, float]:
        """What it has done since it was made.

        Returns:
          lookups; hits and misses (n-grams), hit_rate; hit_bytes and miss_bytes, the latter read
          from below; latency_us_p50 and latency_us_p99, of the last 4096 lookups.
        """
        with self._lock:
            seconds, index = np.array(self._seconds or [0.0]), self._index
            return {
                "lookups": index.lookups, "hits": index.hits, "misses": index.misses,
                "hit_rate": index.hit_rate, "hit_bytes": index.hits * self._entry_bytes,
                "miss_bytes": index.misses * self._entry_bytes,
                "latency_us_p50": 1e6 * float(np.percentile(seconds, 50)),
                "latency_us_p99": 1e6 * float(np.percentile(seconds, 99)),
            }

    def _fill(self, ids_GK: np.ndarray, out: np.ndarray) -> None:
        """Write the n-grams' rows, uint8 [G, K * B]; the missing ones are fetched and kept."""
        entry_G, hit_G = self._index.probe(ids_GK)
        out[hit_G] = self._entries[entry_G[hit_G]]
        misses = np.flatnonzero(~hit_G)
        if len(misses):
            rows = self._below.lookup(ids_GK[misses].reshape(-1)).reshape(len(misses), -1)
            out[misses] = rows
            kept, entry_M = self._index.admit(ids_GK[misses])
            self._entries[entry_M] = rows[kept]
