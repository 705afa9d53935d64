"""A made-up language in which looking up pays: stock phrases, and names with values.

    python -m experiments.long_context.language FOLDER

A text is a mixture of phrases, each four words of a fixed list (what a memory can hold), and of
names with their values, "k7 v31". A name keeps its value through one text and gets another in the
next, so a value that is told again can only be copied. FOLDER gets the tokenizer (a word is a
token) and two files of texts, each as long as the sequences that a run reads: 64 tokens and 512.
The same seed gives the same bytes.
"""

import dataclasses
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from engram_jax.data.tokenizer import END_TOKEN, PAD_TOKEN

WORDS = tuple(f"w{number}" for number in range(48))
NAMES = tuple(f"k{number}" for number in range(16))
VALUES = tuple(f"v{number}" for number in range(16))
PHRASES, PHRASE = 128, 4  # how many there are, and words of each
VOCABULARY = (END_TOKEN, PAD_TOKEN, *WORDS, *NAMES, *VALUES)
TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts of one length.

    Attributes:
      file: of the folder.
      length: tokens of each, its end token included, so that texts and sequences begin together.
      names: the most that a text tells and tells again; it has from one to so many.
      told: the share of its units that are a name and its value; the others are phrases.
      count: of texts.
    """

    file: str
    length: int
    names: int
    told: float
    count: int


SHORT = Texts(file="short.jsonl", length=64, names=6, told=0.7, count=24_000)
LONG = Texts(file="long.jsonl", length=512, names=12, told=0.5, count=1_200)


def phrases() -> list[str]:
    """The phrases of the language, the frequent ones first."""
    draw = random.Random("phrases")
    return [" ".join(draw.choices(WORDS, k=PHRASE)) for _ in range(PHRASES)]


def phrase_shares() -> list[float]:
    """How often each comes: a Zipf law of exponent 1/2."""
    return [rank**-0.5 for rank in range(1, PHRASES + 1)]


def documents(texts: Texts, seed: int = 0) -> Iterator[str]:
    """Texts of `texts.length - 1` words each, to which packing adds the end token."""
    draw, known, shares = random.Random(f"{texts.file}/{seed}"), phrases(), phrase_shares()
    for _ in range(texts.count):
        chosen = draw.sample(NAMES, draw.randint(1, texts.names))
        values = {name: draw.choice(VALUES) for name in chosen}
        names, words = list(values), list[str]()
        while len(words) < texts.length - 1:
            if draw.random() < texts.told:
                words += [name := draw.choice(names), values[name]]
            else:
                words += draw.choices(known, shares)[0].split()
        yield " ".join(words[:texts.length - 1])


def tokenizer() -> Tokenizer:
    """Splits at spaces; every word of the language is a token."""
    made = Tokenizer(models.WordLevel({word: id_ for id_, word in enumerate(VOCABULARY)}))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([AddedToken(word, special=True) for word in (END_TOKEN, PAD_TOKEN)])
    return made


def write(folder: Path) -> None:
    """Write the tokenizer and both files of texts."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(folder / TOKENIZER))
    for texts in (SHORT, LONG):
        with (folder / texts.file).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in documents(texts))


# --- Needles ---


@dataclasses.dataclass(frozen=True)
class Needles:
    """A kind of needles: `told` names with their values, once each, and `asked` of them at the end.

    RULER's single needle, several keys and several queries, in this language.
    """

    told: int
    asked: int


KINDS = {"single": Needles(1, 1), "multi-key": Needles(8, 1), "multi-query": Needles(8, 4)}


def needles(kind: Needles, length: int, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Questions in a haystack of phrases: token ids int32 [count, length], and which of them are
    answers, bool of the same shape."""
    ids = {word: id_ for id_, word in enumerate(VOCABULARY)}
    draw = random.Random(f"needles/{kind.told}/{kind.asked}/{length}/{seed}")
    made = [_question(kind, length, draw) for _ in range(count)]
    tokens_NT = np.array([[ids[word] for word in words] for words, _ in made], np.int32)
    answers_NT = np.zeros(tokens_NT.shape, bool)
    for row, (_, answers) in enumerate(made):
        answers_NT[row, answers] = True
    return tokens_NT, answers_NT


def _question(kind: Needles, length: int, draw: random.Random) -> tuple[list[str], list[int]]:
    """The words, exactly `length`, and the places of the answers."""
    known, shares = phrases(), phrase_shares()
    values = {name: draw.choice(VALUES) for name in draw.sample(NAMES, kind.told)}
    asked = draw.sample(list(values), kind.asked)
    room = length - 2 * (kind.told + kind.asked)
    whole, rest = divmod(room, PHRASE)
    units = [phrase.split() for phrase in draw.choices(known, shares, k=whole)]
    for name, value in values.items():
        units.insert(draw.randrange(len(units) + 1), [name, value])
    first = draw.choices(known, shares)[0].split()[PHRASE - rest:]  # the end of a phrase fills up
    words = first + [word for unit in units for word in unit]
    for name in asked:
        words += [name, values[name]]
    return words, [length - 1 - 2 * number for number in range(kind.asked)]


def main(words: Sequence[str]) -> int:
    """Write the texts into the folder that the command line names."""
    if len(words) != 1:
        print("python -m experiments.long_context.language FOLDER", file=sys.stderr)
        return 2
    write(Path(words[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
