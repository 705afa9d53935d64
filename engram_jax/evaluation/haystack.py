"""Texts of an exact length in tokens, made of a user's own text, with things hidden in them.

Everything is drawn from `random.Random` seeded with a text, so the same seed gives the same texts
on any machine and with any version of Python's libraries.
"""

import dataclasses
import functools
import random
import re
from collections.abc import Callable, Sequence

from tokenizers import Tokenizer

from engram_jax.config import require
from engram_jax.errors import UserError

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_SENTENCE = re.compile(r"[^.!?]+[.!?]+[\"')\]]*|[^.!?]+$")
_WORD = re.compile(r"[A-Za-z]{4,12}")


@dataclasses.dataclass(frozen=True)
class Source:
    """A user's text, and what its tokenizer makes of texts.

    Attributes:
      text: what haystacks, words and questions are taken from.
      tokenizer: of the model that will read them; lengths are counted in its tokens.
    """

    text: str
    tokenizer: Tokenizer

    def count(self, text: str) -> int:
        """How many tokens a text has, without special ones."""
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)

    @functools.cached_property
    def sentences(self) -> tuple[str, ...]:
        """The sentences of the text, white space made single.

        Raises:
          UserError: it has none.
        """
        flat = " ".join(self.text.split())
        made = tuple(match[0].strip() for match in _SENTENCE.finditer(flat) if match[0].strip())
        require(bool(made), "text", flat[:40], "has no sentence to hide a needle between")
        return made

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        """Different words of 4 to 12 Latin letters in lower case, sorted.

        Raises:
          UserError: there are too few to tell needles apart.
        """
        made = tuple(sorted({word.lower() for word in _WORD.findall(self.text)}))
        require(len(made) >= 100, "text", f"{len(made)} different words",
                "must have at least 100 different words of 4 to 12 letters")
        return made

    def check_spells(self, text: str) -> None:
        """Refuse a tokenizer that cannot write `text` (UserError)."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        spelled = self.tokenizer.decode(ids, skip_special_tokens=False)
        if spelled.strip().lower() != text.strip().lower():
            raise UserError(f"tokenizer: cannot spell {text!r} (it reads {spelled!r}); choose "
                            "another tokenizer or other needles")


def generator(*parts: object) -> random.Random:
    """A generator of its own for these parts of a name."""
    return random.Random("/".join(map(str, parts)))


def fitted(
    make: Callable[[int], str], count: Callable[[str], int], budget: int, what: str
) -> str:
    """The longest `make(size)` of at most `budget` tokens.

    Args:
      make: a text that grows, on the whole, with its size, which is 0 or more.
      count: tokens of a text.
      budget: tokens that the text may have.
      what: of whom an error speaks.

    Raises:
      UserError: not even size 0 fits.
    """
    least = count(make(0))
    if least > budget:
        raise UserError(f"length: {what} needs at least {least} tokens beside what is generated, "
                        f"and has {budget}")
    low, high = 0, 1
    while count(make(high)) <= budget:
        low, high = high, 2 * high
        if high > 4 * budget + 64:  # it does not grow any more
            break
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(make(middle)) <= budget else (low, middle)
    # Sizes draw anew where needles go, so a few larger ones may fit, too.
    return next((text for size in range(low + 8, low, -1)
                 if count(text := make(size)) <= budget), make(low))


def repeated(size: int, units: Sequence[str]) -> list[str]:
    """`size` words of the units' words, from the first unit on and round again."""
    words: list[str] = []
    while len(words) < size:
        words += [word for unit in units for word in unit.split()]
    return words[:size]


def hidden(words: Sequence[str], needles: Sequence[str], draw: random.Random) -> str:
    """Words with the needles between their sentences, in the needles' order.

    A needle stands where a sentence ends, or at the beginning or the end; where there are fewer of
    those than needles, needles stand together.
    """
    ends = [0] + [at + 1 for at, word in enumerate(words) if word[-1] in ".!?"]
    ends += [len(words)] if ends[-1] != len(words) else []
    chosen = sorted(draw.choices(ends, k=len(needles)) if len(ends) < len(needles)
                    else draw.sample(ends, len(needles)))
    parts: list[str] = []
    before = 0
    for at, needle in zip(chosen, needles, strict=True):
        parts += [*words[before:at], needle]
        before = at
    return " ".join([*parts, *words[before:]])
