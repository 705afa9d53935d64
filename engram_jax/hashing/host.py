"""The hash on the host hashes every layer in one pass of ten NumPy calls.

It gives the ids of `Addressing.ids`, and its time for one token is that of calling NumPy, so the
layers that are hashed alike (one tokenizer, one set of heads) are hashed together.

Shapes: B batch, T time, N longest n-gram, O orders 2..N, K heads, L layers hashed together, V raw
vocabulary, H = O * K rows of a token.
"""

import dataclasses

import numpy as np

from engram_jax.config import require
from engram_jax.hashing.addressing import Addressing
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.hashing.ngrams import NgramHash
from engram_jax.hashing.token_hash import BEFORE


class HostHash:
    """Hashes raw tokens to the row ids of every site, on the host.

    Args:
      addressing: what to hash with.

    Raises:
      UserError: a control, whose rows are not those of n-grams.
    """

    def __init__(self, addressing: Addressing):
        addressing.check_serves()
        alike: dict[tuple[NgramHash, CompressedVocabulary], list[tuple[str, int]]] = {}
        for site in addressing.sites:
            key = addressing.hashes[site.name], addressing.vocabularies[site.name]
            alike.setdefault(key, []).append((site.name, site.layer))
        self._groups = [
            _Group.of(*key, tuple(names), tuple(layers))
            for key, members in alike.items() for names, layers in [zip(*members, strict=True)]]
        self.names = tuple(site.name for site in addressing.sites)
        self.history_length = max((group.before for group in self._groups), default=0)

    def __call__(
        self, tokens_BT: np.ndarray, history: np.ndarray | None = None,
        reach_BT: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """Hash tokens to the row ids of each site's table, int64 [B, T, H].

        Args:
          tokens_BT: raw token ids, int32.
          history: int32 [B, `history_length`], the raw ids before the chunk, oldest first;
            `BEFORE` before the start. None is all `BEFORE`.
          reach_BT: how many tokens each may see, itself included, as in `NgramHash.row_ids`; the
            position in the document + 1 stops look-backs at its start. None sees all.

        Raises:
          UserError: another shape, or a token that the tokenizer does not have.
        """
        tokens_BT = np.asarray(tokens_BT)
        _check("tokens", tokens_BT, tokens_BT.shape if tokens_BT.ndim == 2 else "[B, T]")
        if history is not None:
            history = np.asarray(history)
            _check("history", history, (len(tokens_BT), self.history_length))
        if reach_BT is not None:
            reach_BT = np.asarray(reach_BT)
            _check("reach", reach_BT, tokens_BT.shape)
        ids: dict[str, np.ndarray] = {}
        for group in self._groups:
            ids.update(zip(group.names, group.ids(tokens_BT, history, reach_BT), strict=True))
        return {name: ids[name] for name in self.names}


@dataclasses.dataclass(frozen=True, eq=False)
class _Group:
    """Holds the constants of sites that share vocabulary and hash settings.

    Attributes:
      names: of the sites.
      lookup: int64 [V + 1], the canonical id of raw id i at i + 1; the pad's, for `BEFORE`, at 0.
      multipliers: int64 [L, 1, 1, N], of the newest token first.
      primes, offsets: int64 [L, 1, 1, O, K].
    """

    names: tuple[str, ...]
    lookup: np.ndarray
    multipliers: np.ndarray
    primes: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, hashing: NgramHash, vocabulary: CompressedVocabulary, names: tuple[str, ...],
           layers: tuple[int, ...]) -> "_Group":
        multipliers = np.array([hashing.multipliers[layer] for layer in layers], np.int64)
        primes = np.array([hashing.primes[layer] for layer in layers], np.int64)[:, None, None]
        offsets = np.stack([hashing.offsets[layer] for layer in layers]).reshape(primes.shape)
        lookup = np.concatenate([[hashing.pad_id], vocabulary.lookup]).astype(np.int64)
        return cls(names, lookup, multipliers[:, None, None], primes, offsets)

    @property
    def before(self) -> int:
        """N - 1, the tokens that an n-gram looks back."""
        return self.multipliers.shape[-1] - 1

    def ids(self, tokens_BT: np.ndarray, history: np.ndarray | None,
            reach_BT: np.ndarray | None) -> np.ndarray:
        """int64 [L, B, T, H]."""
        x_BTN = self._windows(tokens_BT, history)
        if reach_BT is not None:
            seen_BTN = reach_BT[..., None] > np.arange(self.before + 1)[None, None]
            x_BTN = np.where(seen_BTN, x_BTN, self.lookup[0])
        mix_LBTN = np.bitwise_xor.accumulate(x_BTN * self.multipliers, axis=-1)
        ids = np.remainder(mix_LBTN[..., 1:, None], self.primes)
        ids += self.offsets
        return ids.reshape(*ids.shape[:3], ids.shape[3] * ids.shape[4])

    def _windows(self, tokens_BT: np.ndarray, history: np.ndarray | None) -> np.ndarray:
        """int64 [B, T, N], a view: the canonical ids that end at each token, newest first."""
        batch, time = tokens_BT.shape
        raw_BS = np.empty((batch, self.before + time), np.int64)
        raw_BS[:, self.before:] = tokens_BT
        raw_BS[:, :self.before] = (
            BEFORE if history is None else history[:, history.shape[1] - self.before:])
        raw_BS += 1
        # One comparison for both ends: as an unsigned number, a negative one is large.
        unsigned_BS: np.ndarray = raw_BS.view(np.uint64)
        if tokens_BT.size and (unsigned_BS.max() >= len(self.lookup)
                               or raw_BS[:, self.before:].min() < 1):
            _refuse(tokens_BT, history, len(self.lookup) - 1)
        x_BS = self.lookup.take(raw_BS, mode="clip")
        row, item = x_BS.strides
        return np.ndarray((batch, time, self.before + 1), np.int64, x_BS, self.before * item,
                          (row, item, -item))


def reach_from_end(tokens_BT: np.ndarray, history_BP: np.ndarray, end_id: int) -> np.ndarray:
    """How many tokens each may see where documents begin after `end_id`, int32 [B, T].

    A start further back than the history reaches makes no difference.
    """
    before_BS = np.concatenate([history_BP, tokens_BT], axis=1)
    at_S = np.arange(before_BS.shape[1], dtype=np.int32)
    starts_BS = np.zeros(before_BS.shape, bool)
    starts_BS[:, 1:] = before_BS[:, :-1] == end_id
    since_BS = np.maximum.accumulate(np.where(starts_BS, at_S, -before_BS.shape[1]), axis=1)
    return (at_S[None] - since_BS + 1)[:, history_BP.shape[1]:].astype(np.int32)


def _refuse(tokens_BT: np.ndarray, history: np.ndarray | None, vocab_size: int) -> None:
    for name, array, least in (("token id", tokens_BT, 0), ("history", history, BEFORE)):
        if array is not None and (wrong := (array < least) | (array >= vocab_size)).any():
            require(False, name, int(array[wrong][0]),
                    f"must be in {least}..{vocab_size - 1}, the tokenizer's vocabulary")


def _check(name: str, array: np.ndarray, right: object) -> None:
    if array.shape != right or array.dtype.kind not in "iu":  # the message costs as much as hashing
        require(False, name, f"{array.dtype} {array.shape}", f"must be whole numbers {right}")

