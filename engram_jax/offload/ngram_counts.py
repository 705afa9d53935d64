"""How often a text has each n-gram, so that a cache can be filled before anybody asks.

Shapes: N n-grams of the text, G different ones, K heads.
"""

from typing import NamedTuple

import numpy as np

from engram_jax.offload.dedup import signatures


class NgramCounts:
    """Counts the n-grams of one table's ids, on the host, in memory of 8 * (K + 2) bytes for each
    different one.

    Two n-grams of the same signature (`dedup.signatures`) are counted as one.

    Args:
      group: K, how many ids, one after another, are one n-gram's.
    """

    def __init__(self, group: int):
        self.group = group
        self._parts = [_counted(np.empty((0, group), np.int64), np.empty(0, np.int64))]

    def add(self, ids: np.ndarray) -> None:
        """Count n-grams: whole numbers of any shape whose last axis is whole n-grams."""
        ids_NK = np.ascontiguousarray(ids, np.int64).reshape(-1, self.group)
        self._parts.append(_counted(ids_NK, np.ones(len(ids_NK), np.int64)))
        whole, *others = (len(part.times_G) for part in self._parts)
        if sum(others) > whole:  # else each part would cost as much as all before it
            self._merge()

    def most_frequent(self) -> np.ndarray:
        """All different n-grams, the most frequent first: int64 [G, K]."""
        self._merge()
        part, = self._parts
        return part.ids_GK[np.argsort(-part.times_G, kind="stable")]

    def _merge(self) -> None:
        ids, times = zip(*self._parts, strict=True)
        self._parts = [_counted(np.concatenate(ids), np.concatenate(times))]


class _Part(NamedTuple):
    """Different n-grams, int64 [G, K], and how often each came, int64 [G]."""

    ids_GK: np.ndarray
    times_G: np.ndarray


def _counted(ids_NK: np.ndarray, times_N: np.ndarray) -> _Part:
    _, first_G, inverse_N = np.unique(signatures(ids_NK), return_index=True, return_inverse=True)
    times_G = np.zeros(len(first_G), np.int64)
    np.add.at(times_G, inverse_N, times_N)
    return _Part(ids_NK[first_G], times_G)
