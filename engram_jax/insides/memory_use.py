"""How a text uses a memory's rows: which are read, how often and by how many n-grams, and what a
cache of some size would have spared.

All of it follows from row ids. Shapes: N positions, H rows of a token, R rows of the table.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Occupancy(NamedTuple):
    """How one text uses the rows of one table.

    Attributes:
      rows: of the table.
      touched: rows that were read at all.
      reads: in all.
      collided: of the distinct n-grams of one head each, the share that reads a row which another
        n-gram reads, too.
      heads_collided: the share of n-grams that collide in all heads of their order, be it with one
        other n-gram or with one in each.
    """

    rows: int
    touched: int
    reads: int
    collided: float
    heads_collided: float

    @property
    def share(self) -> float:
        return self.touched / self.rows


FREQUENCIES = (1, 2, 5, 10, 100, 1000)  # bands of how often an n-gram comes, from ... on
READS = (0, *FREQUENCIES)  # and of how often a row is read


def access_counts(ids_NH: np.ndarray, rows: int) -> np.ndarray:
    """How often each row is read, int64 [R]."""
    return np.bincount(np.asarray(ids_NH).ravel(), minlength=rows)


def zipf(counts_R: np.ndarray) -> np.ndarray:
    """Reads of the rows that were read, the most read first: int64."""
    read = counts_R[counts_R > 0]
    return np.sort(read)[::-1]


def occupancy(ids_NK: np.ndarray, ngrams_N: np.ndarray, rows: int) -> Occupancy:
    """How full the rows of one order's heads are.

    Args:
      ids_NK: row ids of the K heads of one order.
      ngrams_N: a number for each position's n-gram, equal for equal n-grams.
      rows: that these heads have together.
    """
    _, first = np.unique(ngrams_N, return_index=True)
    distinct_GK = np.asarray(ids_NK)[first]
    shared_GK = np.empty(distinct_GK.shape, bool)
    for head in range(distinct_GK.shape[1]):
        _, index, times = np.unique(distinct_GK[:, head], return_inverse=True, return_counts=True)
        shared_GK[:, head] = times[index] > 1
    return Occupancy(rows=rows, touched=len(np.unique(ids_NK)), reads=int(np.size(ids_NK)),
                     collided=float(shared_GK.mean()),
                     heads_collided=float(shared_GK.all(axis=1).mean()))


def collisions_by_frequency(
    ids_NK: np.ndarray, ngrams_N: np.ndarray, bands: Sequence[int] = FREQUENCIES
) -> dict[int, float]:
    """For n-grams that come at least so often (and less than the next band): of the reads of their
    rows, the share that belongs to other n-grams. 0 is a row of one's own."""
    ids_NK = np.asarray(ids_NK)
    _, first, times_G = np.unique(ngrams_N, return_index=True, return_counts=True)
    foreign_G = np.zeros(len(first))
    for head in range(ids_NK.shape[1]):
        _, row_N, reads_R = np.unique(ids_NK[:, head], return_inverse=True, return_counts=True)
        foreign_G += 1 - times_G / reads_R[row_N[first]]
    band_G = np.searchsorted(bands, times_G, side="right") - 1
    return {low: float(foreign_G[band_G == band].mean() / ids_NK.shape[1])
            for band, low in enumerate(bands) if (band_G == band).any()}


def lru_hit_rates(keys_N: np.ndarray, sizes: Sequence[int]) -> list[float]:
    """The share of accesses that a cache of so many entries would have, the least recently used
    going first (Mattson et al. 1970: an access hits if fewer different keys came since its last).

    Args:
      keys_N: what is accessed, in order.
      sizes: entries of each cache.
    """
    numbers_N = np.unique(np.asarray(keys_N), return_inverse=True)[1]
    distances = _stack_distances(numbers_N.astype(np.int64).tobytes())
    return [float(np.mean(distances < size)) for size in sizes]


@functools.lru_cache(maxsize=8)  # tables of any size are read with the same n-grams
def _stack_distances(keys: bytes) -> np.ndarray:
    """For each access how many different keys came since the same key's last, or infinity.

    A Fenwick tree over positions marks where each key was used last.

    Args:
      keys: int64 [N].
    """
    keys_N = np.frombuffer(keys, np.int64)
    count = len(keys_N)
    tree = [0] * (count + 1)
    last: dict[int, int] = {}
    out = np.full(count, np.inf)

    def add(position: int, amount: int) -> None:
        position += 1
        while position <= count:
            tree[position] += amount
            position += position & -position

    def marked_before(position: int) -> int:
        total = 0
        while position > 0:
            total += tree[position]
            position -= position & -position
        return total

    for position, key in enumerate(keys_N.tolist()):
        if (before := last.get(key)) is not None:
            out[position] = marked_before(position) - marked_before(before + 1)
            add(before, -1)
        add(position, 1)
        last[key] = position
    return out


def norms_by_count(
    table_RC: np.ndarray, counts_R: np.ndarray, bands: Sequence[int] = READS
) -> dict[int, float]:
    """The mean length of rows that were read at least so often (and less than the next band)."""
    norm_R = np.sqrt(np.square(np.asarray(table_RC, np.float64)).sum(axis=1))
    band_R = np.searchsorted(bands, counts_R, side="right") - 1
    return {low: float(norm_R[band_R == band].mean())
            for band, low in enumerate(bands) if (band_R == band).any()}
