"""Each row that tokens ask for is read once: which rows those are, and who asked for them.

Shapes: B batch, T time, H rows of a token, U distinct rows, G n-grams of K heads each, N ids.
"""

import functools
from typing import NamedTuple

import numpy as np

_MANY = 2**13  # ids; so many are taken a head at a time


class Fetch(NamedTuple):
    """Says which rows to read, and where each asked one is among them.

    Attributes:
      ids_U: int64, distinct row ids.
      inverse: int32, of the shape of the asked ids: `ids_U[inverse]` are these.
    """

    ids_U: np.ndarray
    inverse: np.ndarray


def distinct(ids: np.ndarray, group: int = 1) -> Fetch:
    """Take each id once, in order; where none repeats, as for a few tokens, in the order asked.

    Args:
      ids: whole numbers of any shape, 0 or more and below 2**31. Many are told apart quickest when
        the last axis is heads, each of which has its own range of ids, as tables do.
      group: how many ids of the last axis, the heads of one n-gram, stay together, for a home that
        is keyed by n-gram: then it is n-grams that come once, and an id that two of them share
        comes with both.
    """
    ids = ids.astype(np.int64, copy=False)
    if group > 1:
        return _whole_groups(ids, group)
    if ids.size > _MANY and (fetch := _by_head(ids.reshape(-1, ids.shape[-1]))) is not None:
        return Fetch(fetch.ids_U, fetch.inverse.reshape(ids.shape))
    flat = ids.reshape(-1)
    ordered = np.sort(flat)
    if not np.count_nonzero(ordered[1:] == ordered[:-1]):
        return Fetch(flat, np.arange(flat.size, dtype=np.int32).reshape(ids.shape))
    ids_U, order_N, new_N = _sorted(flat)
    return Fetch(ids_U, _inverse(order_N, new_N).reshape(ids.shape))


def signatures(ids_GK: np.ndarray) -> np.ndarray:
    """The signatures of n-grams, uint64 [G] of int64 [G, K]: numbers that tell them apart.

    The same ids have the same signature; different ones very likely not.

    A sum of products with odd random numbers, modulo 2**64.
    """
    signatures_G: np.ndarray = ids_GK.view(np.uint64) @ _odd_numbers(ids_GK.shape[1])
    return signatures_G


@functools.cache
def _odd_numbers(count: int) -> np.ndarray:
    random = np.random.default_rng(0).integers(0, 2**63, count, dtype=np.uint64)
    return random * np.uint64(2) + np.uint64(1)


def _whole_groups(ids: np.ndarray, group: int) -> Fetch:
    ids_GK = np.ascontiguousarray(ids).reshape(-1, group)
    _, first_U, inverse_G = np.unique(signatures(ids_GK), return_index=True, return_inverse=True)
    distinct_UK = ids_GK[first_U]
    if not np.array_equal(distinct_UK[inverse_G], ids_GK):  # different ones had the same signature
        distinct_UK, inverse_G = np.unique(ids_GK, axis=0, return_inverse=True)
    inverse_GK = inverse_G.reshape(-1, 1) * group + np.arange(group)
    return Fetch(distinct_UK.reshape(-1), inverse_GK.astype(np.int32).reshape(ids.shape))


def _by_head(ids_NH: np.ndarray) -> Fetch | None:
    """`distinct` with arrays that stay in the cache; None if two heads' ranges overlap."""
    inverse_NH = np.empty(ids_NH.shape, np.int32)
    parts: list[np.ndarray] = []
    count = 0
    for head in range(ids_NH.shape[1]):
        ids_U, order_N, new_N = _sorted(ids_NH[:, head])
        if parts and ids_U[0] <= parts[-1][-1]:
            return None
        np.add(_inverse(order_N, new_N), count, out=inverse_NH[:, head])
        parts.append(ids_U)
        count += ids_U.size
    return Fetch(np.concatenate(parts), inverse_NH)


def _sorted(ids_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each id once, in order; the order of all ids, as indices; which of these is new, bool.

    An id and its index are sorted as one number: a third of the time that it takes to sort indices
    by ids, as `np.unique` does.
    """
    bits = max(1, ids_N.size - 1).bit_length()
    both_N = ids_N << bits
    both_N |= np.arange(ids_N.size)
    both_N.sort()
    ordered_N = both_N >> bits
    new_N = np.ones(ids_N.size, bool)
    np.not_equal(ordered_N[1:], ordered_N[:-1], out=new_N[1:])
    both_N &= (1 << bits) - 1
    return ordered_N[new_N], both_N, new_N


def _inverse(order_N: np.ndarray, new_N: np.ndarray) -> np.ndarray:
    """The rank of each id among the distinct ones, int32 [N]."""
    rank_N = np.cumsum(new_N, dtype=np.int32)
    rank_N -= 1
    inverse_N = np.empty(rank_N.size, np.int32)
    inverse_N[order_N] = rank_N
    return inverse_N
