"""Facts that nothing but memory can tell, mixed into source code at known frequencies.

    python -m experiments.capacity.facts FOLDER

A fact is a line of three words that are one token each: two are its key, the third its answer,
drawn by chance. FOLDER gets text.jsonl (source code of the standard library, and documents of
facts), the tokenizer, and facts.json, the list. The same Python gives the same bytes.
"""

import dataclasses
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from engram_jax.config import DataConfig
from engram_jax.data.sources import open_source
from engram_jax.errors import MachineError, UserError
from engram_jax.recipes import tiny
from engram_jax.runs.reader import open_inputs

TIMES = (1, 2, 4, 8, 16, 32)  # that a fact is told
PLAIN, TWINS = 200, 80  # facts for each of `TIMES`; twins are two by two
ANSWERS = 256
LINES = 30  # facts in a document
TEXT_BYTES = 680_000  # of source code: with the facts about as many tokens as a run reads
TOKENIZER, TEXT, LIST = "tokenizer.json", "text.jsonl", "facts.json"


@dataclasses.dataclass(frozen=True)
class Fact:
    """A key of two words, each with the space before it, and its answer.

    Attributes:
      kind: "plain"; or "twin", whose key differs from another fact's in a capital alone, so that
        the compressed vocabulary takes the two for one.
      times: that it is told.
    """

    first: str
    second: str
    answer: str
    kind: str
    times: int

    @property
    def line(self) -> str:
        return f"{self.first}{self.second}{self.answer}\n"


def words(tokenizer: Tokenizer) -> list[str]:
    """Lower-case words that are one token with the space before them."""
    texts = [tokenizer.decode([token]) for token in range(tokenizer.get_vocab_size())]
    chosen = sorted({text for text in texts if re.fullmatch(" [a-z]{3,}", text)})
    return [word for word in chosen if len(tokenizer.encode(f"\n{word}").ids) == 2]


def facts(tokenizer: Tokenizer, seed: int = 0) -> list[Fact]:
    """All facts, each key once; twins stand side by side."""
    draw, known = random.Random(seed), words(tokenizer)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    capitals = {word: word.title() for word in known
                if f"\u0120{word[1:].title()}" in vocabulary}
    answers, met = draw.sample(known, min(ANSWERS, len(known))), set[tuple[str, str]]()

    def key(firsts: Sequence[str]) -> tuple[str, str]:
        while (pair := (draw.choice(firsts), draw.choice(known))) in met:
            pass
        met.add(pair)
        return pair

    made = []
    for times in TIMES:
        for _ in range(PLAIN):
            first, second = key(known)
            made.append(Fact(first, second, draw.choice(answers), "plain", times))
        for _ in range(TWINS // 2):
            first, second = key(sorted(capitals))
            for spelling, answer in zip((first, capitals[first]), draw.sample(answers, 2),
                                        strict=True):
                made.append(Fact(spelling, second, answer, "twin", times))
    return made


def documents(told: Sequence[Fact], seed: int = 0) -> Iterator[str]:
    """Source code, and the facts in documents of some lines, each as often as it is told."""
    size = 0
    for text in open_source(DataConfig(path="stdlib")).documents():
        if size < TEXT_BYTES:
            yield text
        size += len(text.encode())
    lines = [fact.line for fact in told for _ in range(fact.times)]
    random.Random(seed).shuffle(lines)
    for start in range(0, len(lines), LINES):
        yield "".join(lines[start : start + LINES])


def write(folder: Path) -> list[Fact]:
    """Write the text, the tokenizer (that of `stdlib`) and the list."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = open_inputs(tiny()).tokenizer
    told = facts(tokenizer)
    tokenizer.save(str(folder / TOKENIZER))
    with (folder / TEXT).open("w", encoding="utf-8") as file:
        for text in documents(told):
            file.write(json.dumps({"text": text}) + "\n")
    (folder / LIST).write_text(json.dumps([dataclasses.astuple(fact) for fact in told]) + "\n")
    return told


def read(folder: Path) -> list[Fact]:
    """The list that `write` wrote."""
    return [Fact(*values) for values in json.loads((folder / LIST).read_text())]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("python -m experiments.capacity.facts FOLDER")
    try:
        print(f"{len(write(Path(sys.argv[1]))):,} facts in {sys.argv[1]}")
    except (UserError, MachineError, OSError) as error:
        sys.exit(f"experiments.capacity.facts: {error}")
