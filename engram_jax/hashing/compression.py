"""Compression of the vocabulary: tokens that differ only by case, accents or spaces are one.

Shape suffixes: V raw vocabulary.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import normalizers

from engram_jax.config import require

_REPLACEMENT = "\ufffd"  # what decoding leaves of bytes that are not whole characters
_LONE_SPACE = "\ue000"  # stands for a lone space, so that stripping does not remove it


@dataclasses.dataclass(frozen=True, eq=False)
class CompressedVocabulary:
    """Maps each raw token id to its canonical id (docs/spec.md (1)).

    Two are equal when their digests are, so one can be a static argument or a module's attribute.

    Attributes:
      lookup: np.int32 [V], read-only; the canonical id of each raw id. May be given as a list or
        any array of whole numbers, for example from a checkpoint.

    Raises:
      UserError: `lookup` is not a list of whole numbers that covers 0..max without a gap.
    """

    lookup: np.ndarray

    def __post_init__(self) -> None:
        given_V = np.asarray(self.lookup)
        require(given_V.ndim == 1 and given_V.size > 0, "lookup.shape", given_V.shape,
                "must be [V], one canonical id for each raw id")
        require(np.issubdtype(given_V.dtype, np.integer), "lookup.dtype", str(given_V.dtype),
                "must be a whole-number type")
        used = np.unique(given_V)
        require(bool(used[0] == 0 and used[-1] == used.size - 1), "lookup", (used[0], used[-1]),
                f"has {used.size} different ids, which must be 0..{used.size - 1}")
        lookup_V = given_V.astype(np.int32)
        lookup_V.setflags(write=False)
        object.__setattr__(self, "lookup", lookup_V)

    @classmethod
    def from_tokenizer(cls, tokenizer: tokenizers.Tokenizer) -> "CompressedVocabulary":
        """Compress the vocabulary of a tokenizer; V is its largest id + 1.

        Raises:
          UserError: the tokenizer has no token.
        """
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        require(len(vocabulary) > 0, "tokenizer", "", "has an empty vocabulary")
        ids = range(max(vocabulary.values()) + 1)
        texts = tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False)
        names = {number: token for token, number in vocabulary.items()}
        normalizer = _normalizer()
        return cls(_by_first_appearance(
            names.get(i, text) if _REPLACEMENT in text else normalizer.normalize_str(text) or text
            for i, text in zip(ids, texts, strict=True)))

    @classmethod
    def identity(cls, vocab_size: int) -> "CompressedVocabulary":
        """No compression: every raw id is its own canonical id.

        Raises:
          UserError: `vocab_size` is below 1.
        """
        require(vocab_size >= 1, "vocab_size", vocab_size, "must be at least 1")
        return cls(np.arange(vocab_size, dtype=np.int32))

    @functools.cached_property
    def size(self) -> int:
        """How many canonical ids there are."""
        return int(self.lookup.max()) + 1

    @functools.cached_property
    def digest(self) -> str:
        """sha256 (hex) of the lookup as little-endian int64 bytes."""
        return hashlib.sha256(self.lookup.astype("<i8").tobytes()).hexdigest()

    def canonical(self, ids: Any) -> Any:
        """Map raw ids of any shape to canonical ids, int32: NumPy in, NumPy out; jax in, jax out.

        Under jax, where nothing can be raised, the canonical id of an id out of range is -1, which
        `NgramHash` gives no row.

        Raises:
          UserError: not whole numbers; or (NumPy only) an id that the vocabulary does not have.
        """
        raw = ids if isinstance(ids, jax.Array) else np.asarray(ids)
        require(bool(jnp.issubdtype(raw.dtype, jnp.integer)), "ids.dtype", str(raw.dtype),
                "must be a whole-number type")
        if isinstance(raw, jax.Array):
            return jnp.asarray(self.lookup).at[raw].get(
                mode="fill", fill_value=-1, wrap_negative_indices=False,
                out_sharding=jax.typeof(raw).sharding)
        if raw.size:
            for extreme in (int(raw.min()), int(raw.max())):
                require(0 <= extreme < self.lookup.size, "token id", extreme,
                        f"must be in 0..{self.lookup.size - 1}, the tokenizer's vocabulary")
        return self.lookup[raw]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CompressedVocabulary) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return (f"CompressedVocabulary({self.lookup.size} -> {self.size} ids, "
                f"digest {self.digest[:12]})")


def _normalizer() -> normalizers.Normalizer:
    """Make what turns a text into its class's key, in the order of docs/spec.md section 1.1."""
    return normalizers.Sequence([
        normalizers.NFKC(),
        normalizers.NFD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
        normalizers.Replace(tokenizers.Regex(r"[ \t\r\n]+"), " "),
        normalizers.Replace(tokenizers.Regex(r"^ $"), _LONE_SPACE),
        normalizers.Strip(),
        normalizers.Replace(_LONE_SPACE, " "),
    ])


def _by_first_appearance(keys: Iterable[str]) -> np.ndarray:
    """Number the keys 0, 1, ... in the order in which each is first seen."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int32)
