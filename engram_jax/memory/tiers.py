"""A cache in host memory over a slower home, such as a table on disk.

It is keyed by n-gram: the K heads of an n-gram are always asked for together, so they hit and miss
together and share one entry. An entry is a row of each head, so a gigabyte keeps fifteen times the
n-grams that the system's page cache would (V4.1: rows of 264 bytes, pages of 4096).

Each n-gram has one set of `WAYS` entries that it may be in; the one that was used least recently
makes room.

Shapes: U ids, G n-grams asked for, K heads, S sets, W ways, C = S * W entries, B bytes of a packed
row.
"""

import collections
import threading
import time

import numpy as np

from engram_jax.config import require
from engram_jax.memory.fetch import group_keys
from engram_jax.memory.homes import Home, checked_ids, room
from engram_jax.memory.host import touched_zeros

WAYS = 8
_REMEMBERED = 4096  # lookups, for the percentiles of latency
_NOBODY = -1


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
        require(group >= 1, "group", group, "must be at least 1")
        entry_bytes = group * below.format.row_bytes
        least = WAYS * entry_bytes
        require(capacity_bytes >= least, "capacity_bytes", capacity_bytes,
                f"must be at least {least}, {WAYS} n-grams of {group} rows")
        self.format, self.rows, self.group = below.format, below.rows, group
        self._below, self._lock = below, threading.Lock()
        self._sets = capacity_bytes // least
        entries = self._sets * WAYS
        self._entries = touched_zeros(entries * entry_bytes).reshape(entries, entry_bytes)
        self._ids_CK = np.full((entries, group), _NOBODY, np.int64)
        self._keys_SW = np.zeros((self._sets, WAYS), np.uint64)
        self._used_SW = np.zeros((self._sets, WAYS), np.int64)  # the lookup that used it last
        self._lookups = self._hits = self._misses = 0
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
            self._fill(ids.reshape(-1, self.group), out.reshape(-1, self._entries.shape[1]))
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
            seconds = np.array(self._seconds or [0.0])
            asked, entry_bytes = self._hits + self._misses, self._entries.shape[1]
            return {
                "lookups": self._lookups, "hits": self._hits, "misses": self._misses,
                "hit_rate": self._hits / asked if asked else 0.0,
                "hit_bytes": self._hits * entry_bytes, "miss_bytes": self._misses * entry_bytes,
                "latency_us_p50": 1e6 * float(np.percentile(seconds, 50)),
                "latency_us_p99": 1e6 * float(np.percentile(seconds, 99)),
            }

    def _fill(self, ids_GK: np.ndarray, out: np.ndarray) -> None:
        """Write the n-grams' rows, uint8 [G, K * B]; the missing ones are fetched and kept."""
        keys_G = group_keys(ids_GK)
        sets_G = (keys_G % np.uint64(self._sets)).astype(np.intp)
        match_GW = self._keys_SW[sets_G] == keys_G[:, None]
        entry_G = sets_G * WAYS + match_GW.argmax(axis=1)
        # Different n-grams may have the same key: only the ids prove it.
        hit_G = (self._ids_CK[entry_G] == ids_GK).all(axis=1)
        hits, misses = np.flatnonzero(hit_G), np.flatnonzero(~hit_G)
        self._lookups += 1
        self._hits += len(hits)
        self._used_SW.reshape(-1)[entry_G[hits]] = self._lookups
        out[hits] = self._entries[entry_G[hits]]
        if len(misses):
            self._misses += len(misses)
            rows = self._below.lookup(ids_GK[misses].reshape(-1)).reshape(len(misses), -1)
            out[misses] = rows
            self._keep(ids_GK[misses], keys_G[misses], sets_G[misses], rows)

    def _keep(self, ids_MK: np.ndarray, keys_M: np.ndarray, sets_M: np.ndarray,
              rows: np.ndarray) -> None:
        """Enter n-grams that were missing; of those of one set, as many as it has ways."""
        order = np.argsort(sets_M, kind="stable")
        in_order = sets_M[order]
        rank = np.arange(len(order)) - np.searchsorted(in_order, in_order)
        kept = order[rank < WAYS]
        oldest_MW = np.argsort(self._used_SW[sets_M[kept]], axis=1, kind="stable")
        way_M = oldest_MW[np.arange(len(kept)), rank[rank < WAYS]]
        entry_M = sets_M[kept] * WAYS + way_M
        self._entries[entry_M] = rows[kept]
        self._ids_CK[entry_M] = ids_MK[kept]
        self._keys_SW.reshape(-1)[entry_M] = keys_M[kept]
        self._used_SW.reshape(-1)[entry_M] = self._lookups
