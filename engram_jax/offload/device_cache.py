"""From a home off the device to the device: straight, or by way of a cache on the device.

What the cache holds does not have to travel. It is keyed by n-gram (`NgramIndex`): the index is on
the host; the rows, packed as they came, are on the device. What was missing is fetched, sent, used
and kept by one compiled program, which writes it into the donated array in place.

Shapes: U ids, G n-grams asked for, M of them that were missing, K heads, C entries, B bytes of a
packed row, X = K * B.
"""

import contextlib
import functools
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import require
from engram_jax.offload.counters import TierCounts, TierMeter
from engram_jax.offload.home import Home, checked_ids
from engram_jax.offload.host_cache import FILLED_AT_ONCE
from engram_jax.offload.ngram_index import NgramIndex


class Sent(NamedTuple):
    """Holds packed rows on the device.

    Attributes:
      packed_UB: uint8 [at least U, B].
      bytes: that travelled.
    """

    packed_UB: jax.Array
    bytes: int


class Sender:
    """Sends rows from a home to the device each time.

    Args:
      home: of the table; closed with this.
    """

    def __init__(self, home: Home):
        self.group, self._home = home.group, home

    def fetch(self, ids_U: np.ndarray) -> Sent:
        """Send the rows at `ids_U`; raises as `Home.lookup`."""
        packed_UB = np.empty((padded_size(ids_U.size), self._home.format.row_bytes), np.uint8)
        self._home.lookup(ids_U, out=packed_UB)
        return Sent(jax.device_put(packed_UB), packed_UB.nbytes)

    def fill(self, ids_GK: np.ndarray) -> None:
        """See `Home.fill`."""
        self._home.fill(ids_GK)

    def tiers(self) -> dict[str, TierCounts]:
        """See `Home.tiers`."""
        return self._home.tiers()

    def close(self) -> None:
        self._home.close()


class DeviceCache:
    """Keeps the rows of the n-grams that were asked for last on a device, and sends the others.

    One thread at a time may use it: what it sends is used in the order of its fetches.

    Args:
      below: the whole table; closed with this.
      group: K, how many ids, one after another, are one n-gram's.
      capacity_bytes: of the rows on the device.

    Raises:
      UserError: no group, or a cache too small for one set.
    """

    def __init__(self, below: Home, group: int, capacity_bytes: int):
        entry_bytes = group * below.format.row_bytes
        self.group = group
        self._index = NgramIndex(group, entry_bytes, capacity_bytes)
        self._below, self._meter = below, TierMeter()
        self._rows_CX = self._empty()

    def fetch(self, ids_U: np.ndarray) -> Sent:
        """Bring the rows of n-grams to the device.

        Args:
          ids_U: whole n-grams of K ids each, each n-gram once (`dedup.distinct` with `group`).

        Raises:
          UserError: ids out of range, or no whole number of n-grams.
          MachineError: the home below cannot be read; then nothing has changed.
          Whatever else goes wrong on the way to the device: what did not get there is not kept, and
          is asked for again.
        """
        started = time.perf_counter()
        group, format = self.group, self._below.format
        ids = checked_ids(ids_U, self._below.rows)
        if ids.size % group:
            require(False, "row ids", ids.size, f"must be n-grams of {group} ids each")
        ids_GK = ids.reshape(-1, group)
        entry_G, hit_G = self._index.probe(ids_GK)
        misses = np.flatnonzero(~hit_G)
        sent_MX = np.empty((padded_size(len(misses)), self._rows_CX.shape[1]), np.uint8)
        self._below.lookup(ids_GK[misses].reshape(-1),
                           out=sent_MX.reshape(-1, format.row_bytes))
        # Where each n-gram's rows are: an entry, or behind all entries its number among the sent.
        at_G = np.zeros(padded_size(len(ids_GK)), np.int32)
        at_G[np.flatnonzero(hit_G)] = entry_G[hit_G]
        at_G[misses] = self._index.entries + np.arange(len(misses), dtype=np.int32)
        kept, entries = self._index.claim(ids_GK[misses])
        entry_M = np.full(len(sent_MX), self._index.entries, np.int32)  # out of range: dropped
        entry_M[kept] = entries
        rows_GX = self._serve(sent_MX, at_G, entry_M)
        self._index.enter(ids_GK[misses[kept]], entries)
        travelled = sent_MX.nbytes + at_G.nbytes + entry_M.nbytes
        self._meter.count(ids.size, ids.size - group * len(misses), format.row_bytes,
                          time.perf_counter() - started)
        return Sent(rows_GX.reshape(-1, format.row_bytes), travelled)

    def fill(self, ids_GK: np.ndarray) -> None:
        """See `Home.fill`; what it held before goes. The home below keeps what it has room for."""
        self._below.fill(ids_GK)
        kept, entries = self._index.claim_all(ids_GK)
        for start in range(0, len(kept), FILLED_AT_ONCE):
            part = slice(start, start + FILLED_AT_ONCE)
            self._keep(ids_GK[kept[part]], entries[part])
            self._index.enter(ids_GK[kept[part]], entries[part], first_stay=True)

    def _serve(self, sent_MX: np.ndarray, at_G: np.ndarray, entry_M: np.ndarray) -> jax.Array:
        """The rows that were asked for, after what was missing has been sent and kept."""
        with self._emptied_if_lost():
            self._rows_CX, rows_GX = _served(
                self._rows_CX, *jax.device_put((sent_MX, at_G, entry_M)))
        return rows_GX

    def _keep(self, ids_MK: np.ndarray, entries: np.ndarray) -> None:
        """Read n-grams' rows from below and put them into their entries."""
        below = self._below
        sent_MX = np.empty((padded_size(len(ids_MK)), self._rows_CX.shape[1]), np.uint8)
        below.lookup(ids_MK.reshape(-1), out=sent_MX.reshape(-1, below.format.row_bytes))
        entry_M = np.full(len(sent_MX), self._index.entries, np.int32)  # out of range: dropped
        entry_M[:len(entries)] = entries
        with self._emptied_if_lost():
            self._rows_CX = _kept(self._rows_CX, *jax.device_put((sent_MX, entry_M)))

    @contextlib.contextmanager
    def _emptied_if_lost(self) -> Iterator[None]:
        """Begin anew with an empty cache where a program failed that had been given its rows."""
        try:
            yield
        except BaseException:
            if self._rows_CX.is_deleted():
                self._index.clear()
                self._rows_CX = self._empty()
            raise

    def _empty(self) -> jax.Array:
        entry_bytes = self.group * self._below.format.row_bytes
        return jnp.zeros((self._index.entries, entry_bytes), jnp.uint8)

    def tiers(self) -> dict[str, TierCounts]:
        """See `Home.tiers`; the "device cache" comes first."""
        return {"device cache": self._meter.counts(), **self._below.tiers()}

    def close(self) -> None:
        """Give the memory back, and close the home below."""
        self._rows_CX.delete()
        self._below.close()


def padded_size(count: int) -> int:
    """A size for `count` things: few sizes, so that few programs are compiled."""
    return max(16, 1 << max(0, count - 1).bit_length())


@functools.partial(jax.jit, donate_argnums=0)
def _kept(rows_CX: jax.Array, sent_MX: jax.Array, entry_M: jax.Array) -> jax.Array:
    """The cache with what was sent in it."""
    return rows_CX.at[entry_M].set(sent_MX, mode="drop")


@functools.partial(jax.jit, donate_argnums=0)
def _served(
    rows_CX: jax.Array, sent_MX: jax.Array, at_G: jax.Array, entry_M: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The cache with what was sent in it, and the rows that were asked for."""
    entries = rows_CX.shape[0]
    kept_GX = rows_CX.at[at_G].get(mode="fill", fill_value=0)
    new_GX = sent_MX.at[at_G - entries].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    rows_GX = jnp.where((at_G < entries)[:, None], kept_GX, new_GX)
    return _kept(rows_CX, sent_MX, entry_M), rows_GX
