"""How the numbers of a hash are made: one rule for each released family of models.

    deepseek  multipliers from NumPy's generator; products stay below 2**63
    qwen      multipliers from splitmix64; products wrap round as signed 64-bit numbers, and the
              remainder is the floor's

Both give heads ascending primes, none of them twice (docs/spec.md section 1.2). What is made here
is kept in a file (`artifact.py`), and whoever has the file derives nothing.

Shape suffixes: N longest n-gram, O = N - 1 orders, K heads.
"""

import dataclasses

import numpy as np

VARIANTS = ("deepseek", "qwen")
LAYER_STRIDE = 10007  # a layer draws its multipliers from the seed + 10007 * its number
_WORD = 2**64 - 1
_GAMMA, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@dataclasses.dataclass(frozen=True, kw_only=True)
class HashNumbers:
    """The numbers that a hash multiplies with and divides by, for each of its layers in turn.

    Attributes:
      multipliers: [layer][N], odd, of the newest token first.
      primes: [layer][O][K], the rows of each head's table.
    """

    multipliers: tuple[tuple[int, ...], ...]
    primes: tuple[tuple[tuple[int, ...], ...], ...]


def multipliers(variant: str, seed: int, layer: int, nth: int, vocab_size: int,
                count: int) -> tuple[int, ...]:
    """`count` odd multipliers of a layer, each below 2**63 / `vocab_size`.

    Args:
      variant: one of `VARIANTS`.
      seed: of the hash.
      layer: its number in the network, which seeds those of deepseek.
      nth: its number among the layers that have a memory, from 0, which seeds those of qwen.
      vocab_size: ids are below it.
      count: N.
    """
    bound = max(1, (2**63 - 1) // vocab_size // 2)
    if variant == "qwen":
        start = seed + LAYER_STRIDE * nth
        return tuple(2 * (_splitmix64((start + _GAMMA * (j + 1)) & _WORD) % bound) + 1
                     for j in range(count))
    random = np.random.default_rng(seed + LAYER_STRIDE * layer)
    return tuple(2 * int(r) + 1 for r in random.integers(0, bound, count))


def _splitmix64(word: int) -> int:
    """The generator's output after the state `word` (Steele, Lea and Flood, 2014)."""
    word = (word + _GAMMA) & _WORD
    word = ((word ^ (word >> 30)) * _MIX1) & _WORD
    word = ((word ^ (word >> 27)) * _MIX2) & _WORD
    return word ^ (word >> 31)


def unused_primes(at_least: int, count: int, used: set[int]) -> tuple[int, ...]:
    """The next `count` primes from `at_least` up that are not in `used`, which takes them up."""
    primes: list[int] = []
    candidate = at_least
    while len(primes) < count:
        if candidate not in used and is_prime(candidate):
            primes.append(candidate)
        candidate += 1
    used.update(primes)
    return tuple(primes)


def is_prime(number: int) -> bool:
    """Whether `number` is prime, by Miller-Rabin; exact below 3,215,031,751 with these bases."""
    if number < 11 or number % 2 == 0:
        return number in (2, 3, 5, 7)
    even = number - 1
    twos = (even & -even).bit_length() - 1
    for base in (2, 3, 5, 7):
        power = pow(base, even >> twos, number)
        passes = power in (1, even)
        for _ in range(twos - 1):
            power = power * power % number
            passes = passes or power == even
        if not passes:
            return False
    return True
