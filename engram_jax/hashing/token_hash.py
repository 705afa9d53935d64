"""Raw tokens to the rows of a table: vocabulary, hash, and the rules of documents and dead tokens.

Under jit it is uint32 arithmetic (`ngrams.py`), on the host NumPy's int64; both give the same ids.

Shapes: B batch, T time, P = N - 1 tokens before a chunk, S = P + T, H rows of a token.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import require
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.hashing.ngrams import NgramHash, reach_from_dead, reach_from_documents

BEFORE = -1  # in a history: before the start of the text


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenHash:
    """All that turns the tokens of one model into row ids.

    Attributes:
      hashing: canonical ids to rows.
      vocabulary: raw ids to canonical ids.
      end_id: the raw id that ends a document; look-backs of what follows it stop behind it. None
        lets them cross it.
      dead_ids: raw ids, such as an image's, that hide themselves and all that is older.

    Raises:
      UserError: a vocabulary of another size than the hash's, or an id that it does not have.
    """

    hashing: NgramHash
    vocabulary: CompressedVocabulary
    end_id: int | None = None
    dead_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require(self.vocabulary.size == self.hashing.vocab_size, "token_map",
                self.vocabulary.size, f"different ids must be {self.hashing.vocab_size}, the "
                "vocab_size of the hash")
        size = self.vocabulary.lookup.size
        for name, ids in (("end_id", () if self.end_id is None else (self.end_id,)),
                          ("dead_ids", self.dead_ids)):
            for raw in ids:
                require(0 <= raw < size, name, raw, f"must be a raw token id, in 0..{size - 1}")

    @property
    def fingerprint(self) -> str:
        """What a checkpoint carries: digests of hash and vocabulary."""
        return f"{self.hashing.fingerprint}:{self.vocabulary.digest}"

    def dead(self, tokens_BT: jax.Array) -> jax.Array:
        """Which tokens see nothing at all, bool [B, T]."""
        return jnp.isin(tokens_BT, jnp.array(self.dead_ids, jnp.int32))

    def table_ids(self, tokens_BT: jax.Array, layer: int,
                  history: jax.Array | None = None) -> jax.Array:
        """Rows of a layer's table that the tokens ask for, int32 [B, T, H]; for use under jit.

        Args:
          tokens_BT: raw ids, int32.
          layer: one of `hashing.layers`.
          history: int32 [B, P], the raw ids before these, oldest first; `BEFORE` before the start.
            None is all `BEFORE`.
        """
        batch, reach_BT = tokens_BT.shape[0], None
        if history is None:
            history = jnp.full((batch, self.hashing.max_order - 1), BEFORE, jnp.int32)
        joined_BS = jnp.concatenate([history, tokens_BT], axis=1)
        canonical_BS = jnp.where(joined_BS == BEFORE, jnp.int32(self.hashing.pad_id),
                                 self.vocabulary.canonical(joined_BS))
        before = history.shape[1]
        if self.end_id is not None:
            first_BS = jnp.pad(joined_BS[:, :-1] == self.end_id, ((0, 0), (1, 0)))
            reach_BT = reach_from_documents(first_BS[:, before:], first_BS[:, :before])
        if self.dead_ids:
            dead_BS = self.dead(joined_BS)
            alive_BT = reach_from_dead(dead_BS[:, before:], dead_BS[:, :before])
            reach_BT = alive_BT if reach_BT is None else jnp.minimum(reach_BT, alive_BT)
        return self.hashing.table_ids(
            canonical_BS[:, before:], layer, canonical_BS[:, :before], reach_BT)

    def table_ids_numpy(self, tokens_BT: np.ndarray, layer: int,
                        history: np.ndarray | None = None) -> np.ndarray:
        """`table_ids` in NumPy, int32 [B, T, H].

        Raises:
          UserError: as `NgramHash.row_ids_numpy`, and for a token that there is not.
        """
        tokens_BT, before = np.asarray(tokens_BT), self.hashing.max_order - 1
        if history is None:
            history = np.full((len(tokens_BT), before), BEFORE)
        joined_BS = np.concatenate([np.asarray(history), tokens_BT], axis=1)
        started_BS = joined_BS != BEFORE
        canonical_BS = np.full(joined_BS.shape, self.hashing.pad_id)
        canonical_BS[started_BS] = self.vocabulary.canonical(joined_BS[started_BS])
        return self.hashing.table_ids_numpy(
            canonical_BS[:, before:], layer, canonical_BS[:, :before], self.reach_numpy(joined_BS))

    def reach_numpy(self, joined_BS: np.ndarray) -> np.ndarray | None:
        """How many tokens each may see, itself included, as `NgramHash.row_ids` takes it.

        Args:
          joined_BS: the raw ids of P tokens of history, then those of the chunk.

        Returns:
          int [B, T]; None where each sees all.
        """
        at_1S, far = np.arange(joined_BS.shape[1])[None], 2 * joined_BS.shape[1]
        reaches = []
        if self.end_id is not None:
            first_BS = np.zeros(joined_BS.shape, bool)
            first_BS[:, 1:] = joined_BS[:, :-1] == self.end_id
            reaches.append(at_1S + 1 - np.maximum.accumulate(
                np.where(first_BS, at_1S, -far), axis=1))
        if self.dead_ids:
            dead_BS = np.isin(joined_BS, self.dead_ids)
            reaches.append(at_1S - np.maximum.accumulate(np.where(dead_BS, at_1S, -far), axis=1))
        if not reaches:
            return None
        return np.minimum.reduce(reaches)[:, self.hashing.max_order - 1:]
