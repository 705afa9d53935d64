"""The hash of n-grams, canonical ids to row ids: multiply, xor, modulus (docs/spec.md section 1.2).

The products have 63 bits and accelerators have no fast int64, so under jit everything is uint32:
a 64-bit value is a pair (high, low). `row_ids_numpy` is the same hash in NumPy's int64.

Shape suffixes: B batch, T time, N longest n-gram, O orders 2..N (so O = N - 1), K heads,
H = O * K heads ordered by order, then head.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import MAX_TABLE_ROWS, require
from engram_jax.hashing import variants
from engram_jax.hashing.variants import VARIANTS, HashNumbers

_FAR = 2**30  # further back than any sequence is long
_LOW16 = np.uint32(0xFFFF)
_16 = np.uint32(16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NgramHash:
    """Hashes the n-grams of a model's tokens to the rows of each Engram layer's table.

    Frozen and hashable, so that it can be a static argument or a module's attribute.

    Attributes:
      rows_per_head: one entry for each order 2..N; each head's table gets the next unused prime
        number of rows that is not below it.
      heads: K, heads for each order.
      layers: ascending 0-based layer numbers; primes are never reused between layers, and the
        multipliers depend on the number.
      vocab_size: how many canonical ids there are; the multipliers depend on it.
      pad_id: the canonical id that stands for positions before the start.
      seed: of the multipliers.
      variant: one of `VARIANTS`; how the numbers are made, and whether products may wrap round.
      numbers: multipliers and primes as a file keeps them; None makes them by the variant's rule.

    Raises:
      UserError: a value out of range, or a layer's table of 2**31 rows or more.
    """

    rows_per_head: tuple[int, ...]
    heads: int
    layers: tuple[int, ...]
    vocab_size: int
    pad_id: int
    seed: int = 0
    variant: str = "deepseek"
    numbers: HashNumbers | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows_per_head", tuple(int(rows) for rows in self.rows_per_head))
        object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers))
        rows, layers = self.rows_per_head, self.layers
        require(len(rows) >= 1 and min(rows) >= 2, "rows_per_head", rows,
                "needs one entry for each n-gram order 2..N, each at least 2")
        require(self.heads >= 1, "heads", self.heads, "must be at least 1")
        require(len(layers) >= 1 and list(layers) == sorted(set(layers)) and layers[0] >= 0,
                "layers", layers, "must be ascending block numbers, 0-based")
        require(1 <= self.vocab_size < 2**31, "vocab_size", self.vocab_size,
                "must be in 1..2**31 - 1")
        require(0 <= self.pad_id < self.vocab_size, "pad_id", self.pad_id,
                f"must be a canonical id, in 0..{self.vocab_size - 1}")
        require(self.seed >= 0, "seed", self.seed, "must not be negative")
        require(self.variant in VARIANTS, "variant", self.variant,
                f"must be one of {', '.join(VARIANTS)}")
        if self.numbers is not None:
            self._check_numbers(self.numbers)
        require(sum(rows) * self.heads <= MAX_TABLE_ROWS
                and max(self.table_rows.values()) <= MAX_TABLE_ROWS, "rows_per_head", rows,
                f"times {self.heads} heads makes a table of over 2**31 - 1 rows")

    def _check_numbers(self, numbers: HashNumbers) -> None:
        given, orders = numbers.multipliers, len(self.rows_per_head)
        require([len(m) for m in given] == [orders + 1] * len(self.layers), "multipliers", given,
                f"must be {orders + 1} for each of {len(self.layers)} layers")
        for multiplier in (m for of_layer in given for m in of_layer):
            require(multiplier % 2 == 1 and 0 < multiplier < 2**63, "multipliers", multiplier,
                    "must be odd, in 1..2**63 - 1")
            require(self.variant == "qwen" or multiplier * (self.vocab_size - 1) < 2**63,
                    "multipliers", multiplier,
                    f"times an id of up to {self.vocab_size - 1} overflows 63 bits")
        shape = [[len(heads) for heads in of_layer] for of_layer in numbers.primes]
        require(shape == [[self.heads] * orders] * len(self.layers), "primes", shape,
                f"must be {self.heads} heads for each of {orders} orders and "
                f"{len(self.layers)} layers")
        for prime in (p for of_layer in numbers.primes for heads in of_layer for p in heads):
            require(prime <= MAX_TABLE_ROWS and variants.is_prime(prime), "primes", prime,
                    "must be a prime number below 2**31")

    @property
    def max_order(self) -> int:
        """The length of the longest n-gram, N."""
        return len(self.rows_per_head) + 1

    @property
    def total_heads(self) -> int:
        """How many rows are read for each token, H."""
        return len(self.rows_per_head) * self.heads

    @functools.cached_property
    def multipliers(self) -> Mapping[int, tuple[int, ...]]:
        """Each layer's N odd multipliers, of the newest token first."""
        if self.numbers is not None:
            return dict(zip(self.layers, self.numbers.multipliers, strict=True))
        return {layer: variants.multipliers(self.variant, self.seed, layer, nth, self.vocab_size,
                                            self.max_order)
                for nth, layer in enumerate(self.layers)}

    @functools.cached_property
    def primes(self) -> Mapping[int, tuple[tuple[int, ...], ...]]:
        """How many rows each head's table has, [order][head] by layer; no prime is used twice."""
        if self.numbers is not None:
            return dict(zip(self.layers, self.numbers.primes, strict=True))
        used: set[int] = set()
        return {layer: tuple(variants.unused_primes(rows, self.heads, used)
                             for rows in self.rows_per_head) for layer in self.layers}

    @functools.cached_property
    def table_rows(self) -> Mapping[int, int]:
        """How many rows each layer's one table has, in which all heads' tables lie end to end."""
        return {layer: sum(map(sum, self.primes[layer])) for layer in self.layers}

    @functools.cached_property
    def offsets(self) -> Mapping[int, np.ndarray]:
        """Where each head's rows start in its layer's table, np.int64 [H] by layer, read-only."""
        return {layer: _starts(self.primes[layer]) for layer in self.layers}

    def constants(self) -> dict[str, Any]:
        """Name everything that row ids depend on, as JSON values; checkpoints carry it."""
        variant = {} if self.variant == "deepseek" else {"variant": self.variant}
        return {
            **variant,  # the first variant needs no name: checkpoints older than the others
            "rows_per_head": list(self.rows_per_head), "heads": self.heads,
            "layers": list(self.layers), "vocab_size": self.vocab_size, "pad_id": self.pad_id,
            "seed": self.seed,
            "multipliers": {str(layer): list(m) for layer, m in self.multipliers.items()},
            "primes": {str(layer): [list(heads) for heads in orders]
                       for layer, orders in self.primes.items()},
        }

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of `constants()`; a checkpoint of another fingerprint has other rows."""
        text = json.dumps(self.constants(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def row_ids(self, ids_BT: jax.Array | np.ndarray, layer: int,
                history: jax.Array | np.ndarray | None = None,
                reach_BT: jax.Array | np.ndarray | None = None) -> jax.Array:
        """Hash the n-grams that end at each token to rows of each head's own table; jitted.

        Args:
          ids_BT: canonical ids, any integer dtype.
          layer: one of `layers`.
          history: [B, N-1] canonical ids that precede the chunk, oldest first; None is all pad.
          reach_BT: int32, how many tokens position t may see, itself included: the token j back
            counts only if j < reach, and is pad otherwise. 0 makes even the token itself pad.
            None sees all.

        Returns:
          int32 [B, T, H], each below its head's prime; -1 for an n-gram with an id that is not in
          0..vocab_size - 1, so that it has no row of any other.

        Raises:
          UserError: an unknown layer, or a wrong shape or dtype.
        """
        self._check(ids_BT, layer, history, reach_BT)
        return _row_ids(self, layer, ids_BT, history, reach_BT)

    def table_ids(self, ids_BT: jax.Array | np.ndarray, layer: int,
                  history: jax.Array | np.ndarray | None = None,
                  reach_BT: jax.Array | np.ndarray | None = None) -> jax.Array:
        """Hash to rows of the layer's one table, int32 [B, T, H]: `row_ids` + `offsets`, or -1."""
        offsets_11H = self._offsets_11H(layer)
        rows_BTH = self.row_ids(ids_BT, layer, history, reach_BT)
        return jnp.where(rows_BTH < 0, rows_BTH, rows_BTH + offsets_11H)

    def row_ids_numpy(self, ids_BT: jax.Array | np.ndarray, layer: int,
                      history: jax.Array | np.ndarray | None = None,
                      reach_BT: jax.Array | np.ndarray | None = None) -> np.ndarray:
        """Do as `row_ids` does, in NumPy's int64 for hosts and tests: the same int32 [B, T, H].

        Raises:
          UserError: as `row_ids`, and for an id that is not in 0..vocab_size - 1.
        """
        self._check(ids_BT, layer, history, reach_BT)
        x_BS = self._joined(np.asarray(ids_BT), history)
        batch, time = np.shape(ids_BT)
        rows_BTH = np.empty((batch, time, self.total_heads), np.int32)
        mix_BT = np.zeros((batch, time), np.int64)
        rest_BT = np.empty_like(mix_BT)  # one for all heads: fresh memory costs as much as dividing
        for back, multiplier in enumerate(self.multipliers[layer]):
            start = self.max_order - 1 - back
            token_BT = x_BS[:, start:start + time]
            if reach_BT is not None:
                token_BT = np.where(np.asarray(reach_BT) > back, token_BT, self.pad_id)
            mix_BT ^= token_BT * multiplier
            for head, prime in enumerate(self.primes[layer][back - 1] if back else ()):
                np.remainder(mix_BT, prime, out=rest_BT)
                rows_BTH[..., (back - 1) * self.heads + head] = rest_BT
        return rows_BTH

    def table_ids_numpy(self, ids_BT: jax.Array | np.ndarray, layer: int,
                        history: jax.Array | np.ndarray | None = None,
                        reach_BT: jax.Array | np.ndarray | None = None) -> np.ndarray:
        """Do as `table_ids` does in NumPy: the same ids, int32 [B, T, H]."""
        offsets_11H = self._offsets_11H(layer)
        return self.row_ids_numpy(ids_BT, layer, history, reach_BT) + offsets_11H

    def _check(self, ids_BT: Any, layer: int, history: Any, reach_BT: Any) -> None:
        require(layer in self.layers, "layer", layer, f"must be one of {self.layers}")
        require(np.ndim(ids_BT) == 2, "ids.shape", np.shape(ids_BT), "must be [B, T]")
        batch, _ = shape = np.shape(ids_BT)
        before = (batch, self.max_order - 1)
        for name, array, right in (("ids", ids_BT, shape), ("history", history, before),
                                   ("reach", reach_BT, shape)):
            if array is not None:
                require(np.shape(array) == right, f"{name}.shape", np.shape(array),
                        f"must be {right}")
                dtype = array.dtype if hasattr(array, "dtype") else np.asarray(array).dtype
                require(bool(jnp.issubdtype(dtype, jnp.integer)), f"{name}.dtype", str(dtype),
                        "must be a whole-number type")

    def _joined(self, ids_BT: np.ndarray, history: Any) -> np.ndarray:
        """Put the chunk after its history, int64 [B, N-1+T]; ids that do not exist are refused."""
        before = self.max_order - 1
        x_BS = np.full((ids_BT.shape[0], before + ids_BT.shape[1]), self.pad_id, np.int64)
        x_BS[:, before:] = ids_BT
        if history is not None:
            x_BS[:, :before] = np.asarray(history)
        for extreme in (int(x_BS.min()), int(x_BS.max())) if x_BS.size else ():
            require(0 <= extreme < self.vocab_size, "canonical id", extreme,
                    f"must be in 0..{self.vocab_size - 1}")
        return x_BS

    def _offsets_11H(self, layer: int) -> np.ndarray:
        require(layer in self.layers, "layer", layer, f"must be one of {self.layers}")
        return self.offsets[layer].astype(np.int32)[None, None, :]


def reach_from_documents(first_BT: jax.Array | np.ndarray,
                         history_first: jax.Array | np.ndarray | None = None) -> jax.Array:
    """Let each token see back to the first token of its document, and no further.

    Where positions inside documents are known, the reach is position + 1.

    Args:
      first_BT: bool, the token is the first of its document.
      history_first: bool [B, N-1], the same for the history, oldest first; None has no first, so
        tokens before the chunk's first document start see all of the history.

    Returns:
      int32 [B, T]; at least 1.
    """
    return _since_last(first_BT, history_first) + 1


def reach_from_dead(dead_BT: jax.Array | np.ndarray,
                    history_dead: jax.Array | np.ndarray | None = None) -> jax.Array:
    """Let each token see back to the last dead token, such as an image token (V4.1), without it.

    A dead token hides itself and everything older: it sees nothing at all (reach 0, all pad).

    Args:
      dead_BT: bool, the token is dead.
      history_dead: bool [B, N-1], the same for the history, oldest first; None has no dead token.

    Returns:
      int32 [B, T]; at least 0.
    """
    return _since_last(dead_BT, history_dead)


def _since_last(mark_BT: Any, history: Any) -> jax.Array:
    """Count how many tokens back the last mark is, int32 [B, T]; very far where there is none."""
    mark_BT = jnp.asarray(mark_BT, bool)
    before = 0 if history is None else np.shape(history)[1]
    if history is not None:
        mark_BT = jnp.concatenate([jnp.asarray(history, bool), mark_BT], axis=1)
    at_1S = jnp.arange(mark_BT.shape[1], dtype=jnp.int32)[None, :]
    last_BS = jax.lax.cummax(jnp.where(mark_BT, at_1S, np.int32(-_FAR)), axis=1)
    return (at_1S - last_BS)[:, before:]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _row_ids(hashing: NgramHash, layer: int, ids_BT: Any, history: Any,
             reach_BT: Any) -> jax.Array:
    """Hash as `NgramHash.row_ids` does, its arguments checked."""
    time, before = np.shape(ids_BT)[1], hashing.max_order - 1
    x_BS = jnp.asarray(ids_BT).astype(jnp.uint32)
    if history is None:
        x_BS = jnp.pad(x_BS, ((0, 0), (before, 0)), constant_values=np.uint32(hashing.pad_id))
    else:
        x_BS = jnp.concatenate([jnp.asarray(history).astype(jnp.uint32), x_BS], axis=1)
    mixes: list[tuple[jax.Array, jax.Array]] = []
    unknown: list[jax.Array] = []  # does the n-gram hold an id that there is not?
    for back, multiplier in enumerate(hashing.multipliers[layer]):
        token_BT = x_BS[:, before - back:before - back + time]
        if reach_BT is not None:
            token_BT = jnp.where(reach_BT > np.int32(back), token_BT, np.uint32(hashing.pad_id))
        high_BT, low_BT = _multiply(token_BT, multiplier)
        if back:
            high_BT, low_BT = high_BT ^ mixes[-1][0], low_BT ^ mixes[-1][1]
        mixes.append((high_BT, low_BT))
        unknown_BT = token_BT >= np.uint32(hashing.vocab_size)  # a negative id is a large one
        unknown.append(unknown[-1] | unknown_BT if back else unknown_BT)
    high_BTO1, low_BTO1 = (jnp.stack(words, axis=-1)[..., None]
                           for words in zip(*mixes[1:], strict=True))
    primes_OK = np.array(hashing.primes[layer], np.int64)
    rows_BTOK = _modulo(high_BTO1, low_BTO1, primes_OK)
    if hashing.variant == "qwen":
        rows_BTOK = _floored(rows_BTOK, high_BTO1, primes_OK)
    unknown_BTO1 = jnp.stack(unknown[1:], axis=-1)[..., None]
    rows_BTOK = jnp.where(unknown_BTO1, np.uint32(2**32 - 1), rows_BTOK)  # -1 as int32
    return rows_BTOK.reshape(*np.shape(ids_BT), hashing.total_heads).astype(jnp.int32)


def _multiply(x: jax.Array, multiplier: int) -> tuple[jax.Array, jax.Array]:
    """Multiply modulo 2**64; the words (high, low) of x * multiplier."""
    high, low = np.uint32(multiplier >> 32), np.uint32(multiplier & 0xFFFFFFFF)
    return _multiply_high(x, low) + x * high, x * low


def _multiply_high(x: Any, y: Any) -> jax.Array:
    """Take the high word of the product of two uint32, by 16-bit limbs; no sum overflows."""
    x0, x1, y0, y1 = x & _LOW16, x >> _16, y & _LOW16, y >> _16
    middle = x1 * y0 + ((x0 * y0) >> _16)
    other = x0 * y1 + (middle & _LOW16)
    return x1 * y1 + (middle >> _16) + (other >> _16)


def _modulo(high_BTO1: jax.Array, low_BTO1: jax.Array, primes_OK: np.ndarray) -> jax.Array:
    """Take (high * 2**32 + low) mod each prime, uint32 [B, T, O, K]; primes are in 2..2**31 - 1.

    High mod prime by a reciprocal of the prime, then that and low by `_divide_step` with the
    divisor shifted until its top bit is set. Nothing divides: XLA's CPU division is no vector
    operation.
    """
    shift_OK = 32 - np.frexp(primes_OK)[1].astype(np.int64)
    divisor_OK = primes_OK << shift_OK
    inverse_OK = ((2**64 - 1) // divisor_OK.astype(np.uint64)) & np.uint64(0xFFFFFFFF)
    prime, reciprocal, shift, divisor, inverse = (
        constant_OK.astype(np.uint32)[None, None]
        for constant_OK in (primes_OK, 2**32 // primes_OK, shift_OK, divisor_OK, inverse_OK))
    rest = high_BTO1 - _multiply_high(high_BTO1, reciprocal) * prime  # below 2 * prime
    rest = jnp.minimum(rest, rest - prime)  # the subtraction wraps round where rest < prime
    low_BTOK = low_BTO1 << shift
    rest = (rest << shift) | (low_BTO1 >> (np.uint32(32) - shift))
    return _divide_step(rest, low_BTOK, divisor, inverse) >> shift


def _floored(rest_BTOK: jax.Array, high_BTO1: jax.Array, primes_OK: np.ndarray) -> jax.Array:
    """Turn the remainder of words without a sign into the floored one of the same bits with a sign.

    A negative number is its bits less 2**64.
    """
    prime = primes_OK.astype(np.uint32)[None, None]
    less = np.array([2**64 % int(p) for p in primes_OK.flat], np.uint32).reshape(prime.shape)
    floored_BTOK = rest_BTOK + (prime - less)  # below 2 * prime, which is below 2**32
    floored_BTOK = jnp.minimum(floored_BTOK, floored_BTOK - prime)
    return jnp.where(high_BTO1 >> np.uint32(31) == 1, floored_BTOK, rest_BTOK)


def _divide_step(high: jax.Array, low: jax.Array, divisor: np.ndarray,
                 inverse: np.ndarray) -> jax.Array:
    """Take (high * 2**32 + low) mod divisor, for divisor >= 2**31 and high < divisor.

    Algorithm 4 of Moller and Granlund, "Improved division by invariant integers" (2011), with
    inverse = (2**64 - 1) // divisor - 2**32.
    """
    fraction = inverse * high + low
    carry = (fraction < low).astype(jnp.uint32)
    quotient = _multiply_high(inverse, high) + high + carry + np.uint32(1)
    rest = low - quotient * divisor
    rest = jnp.where(rest > fraction, rest + divisor, rest)
    return jnp.minimum(rest, rest - divisor)


def _starts(primes_OK: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """Sum up the heads' rows from 0, np.int64 [H], read-only."""
    rows_H = np.array(primes_OK, np.int64).reshape(-1)
    starts_H = np.cumsum(rows_H) - rows_H
    starts_H.setflags(write=False)
    return starts_H
