"""Which n-grams a cache holds, and where: a set-associative index on the host.

The K heads of an n-gram are always asked for together, so they hit and miss together and share one
entry. Each n-gram has one set of `WAYS` entries that it may be in; the one that was used least
recently makes room.

Shapes: G n-grams asked for, M of them that were missing, K heads, S sets, W ways, C = S * W
entries.
"""

import numpy as np

from engram_jax.config import require
from engram_jax.offload.dedup import signatures

WAYS = 8
_NOBODY = -1


class NgramIndex:
    """Knows which entry of a cache holds which n-gram; not for several threads at once.

    Args:
      group: K, how many ids, one after another, are one n-gram's.
      entry_bytes, capacity_bytes: of one entry and of the whole cache.

    Raises:
      UserError: no group; a cache of no whole number of bytes, or too small for one set.
    """

    def __init__(self, group: int, entry_bytes: int, capacity_bytes: int):
        require(group >= 1, "group", group, "must be at least 1")
        least = WAYS * entry_bytes
        require(isinstance(capacity_bytes, int | np.integer) and capacity_bytes >= least,
                "capacity_bytes", capacity_bytes,
                f"must be a whole number, at least {least}, {WAYS} n-grams of {group} rows")
        self.group, self._sets = group, capacity_bytes // least
        self.entries = self._sets * WAYS
        self._lookups = 0
        self._ids_CK = np.full((self.entries, group), _NOBODY, np.int64)
        self._signatures_SW = np.zeros((self._sets, WAYS), np.uint64)
        self._used_SW = np.zeros((self._sets, WAYS), np.int64)  # the lookup that used it last

    def clear(self) -> None:
        """Forget all n-grams."""
        self._ids_CK.fill(_NOBODY)
        self._signatures_SW.fill(0)
        self._used_SW.fill(self._lookups - WAYS)

    def claim_all(self, ids_GK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Forget all n-grams and claim entries for these different ones, the first of each set.

        Returns:
          As `claim`.

        Raises:
          UserError: they have another number of ids.
        """
        require(ids_GK.ndim == 2 and ids_GK.shape[1] == self.group, "n-grams", ids_GK.shape,
                f"must be [G, {self.group}]")
        self.clear()
        return self.claim(ids_GK)

    def probe(self, ids_GK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Look n-grams up: the entry of each, intp [G], and whether it is there, bool [G]."""
        signatures_G = signatures(ids_GK)
        sets_G = self._set(signatures_G)
        match_GW = self._signatures_SW[sets_G] == signatures_G[:, None]
        entry_G = sets_G * WAYS + match_GW.argmax(axis=1)
        # Different n-grams may have the same signature: only the ids prove it.
        hit_G = (self._ids_CK[entry_G] == ids_GK).all(axis=1)
        self._lookups += 1
        self._used_SW.reshape(-1)[entry_G[hit_G]] = self._lookups
        return entry_G, hit_G

    def claim(self, ids_MK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Empty entries for n-grams that are not there; of one set, as many as it has ways.

        Nobody is in these entries until `enter`: whatever happens to their rows meanwhile, none of
        them is served.

        Returns:
          The numbers in `ids_MK` of those that have an entry, and the entry of each, both intp.
        """
        sets_M = self._set(signatures(ids_MK))
        order = np.argsort(sets_M, kind="stable")
        in_order = sets_M[order]
        rank = np.arange(len(order)) - np.searchsorted(in_order, in_order)
        kept = order[rank < WAYS]
        oldest_MW = np.argsort(self._used_SW[sets_M[kept]], axis=1, kind="stable")
        way_M = oldest_MW[np.arange(len(kept)), rank[rank < WAYS]]
        entry_M = sets_M[kept] * WAYS + way_M
        self._ids_CK[entry_M] = _NOBODY
        self._signatures_SW.reshape(-1)[entry_M] = 0
        return kept, entry_M

    def enter(self, ids_MK: np.ndarray, entry_M: np.ndarray, first_stay: bool = False) -> None:
        """Have n-grams in the entries that were claimed for them, now that their rows are there.

        Args:
          ids_MK: the n-grams.
          entry_M: the entry of each.
          first_stay: of one set, those that were claimed first make room last.
        """
        self._ids_CK[entry_M] = ids_MK
        self._signatures_SW.reshape(-1)[entry_M] = signatures(ids_MK)
        self._used_SW.reshape(-1)[entry_M] = self._lookups - (entry_M % WAYS) * first_stay

    def _set(self, signatures_G: np.ndarray) -> np.ndarray:
        # The lowest bits of a signature are those of a sum of ids, however alike the ids are.
        return ((signatures_G >> np.uint64(32)) % np.uint64(self._sets)).astype(np.intp)
