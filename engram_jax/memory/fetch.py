"""Which rows a home has to read for the ids that tokens ask for: each once.

Shapes: B batch, T time, H rows of a token, U distinct rows.
"""

from typing import NamedTuple

import numpy as np


class Fetch(NamedTuple):
    """Rows to read, and where each asked one is among them.

    Attributes:
      ids_U: int64, distinct row ids.
      inverse: int32, of the shape of the asked ids: `ids_U[inverse]` are these.
    """

    ids_U: np.ndarray
    inverse: np.ndarray


def distinct(ids: np.ndarray) -> Fetch:
    """Each id once; ids of any shape, 0 or more and below 2**31.

    An id and its place are sorted as one number, which costs a third of sorting places by ids (as
    `np.unique` does). Where no id repeats, as for a few tokens, the ids keep their order.
    """
    flat = ids.reshape(-1).astype(np.int64, copy=False)
    if flat.size < 2:
        return Fetch(flat, np.zeros(ids.shape, np.int32))
    bits = int(flat.size - 1).bit_length()
    places = np.arange(flat.size)
    sorted_ = flat << bits
    sorted_ |= places
    sorted_.sort()
    ordered = sorted_ >> bits
    new = np.empty(flat.size, bool)
    new[0] = True
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    ids_U = ordered[new]
    if ids_U.size == flat.size:
        return Fetch(flat, places.astype(np.int32).reshape(ids.shape))
    inverse = np.empty(flat.size, np.int32)
    sorted_ &= (1 << bits) - 1
    inverse[sorted_] = np.cumsum(new, dtype=np.int32) - np.int32(1)
    return Fetch(ids_U, inverse.reshape(ids.shape))
