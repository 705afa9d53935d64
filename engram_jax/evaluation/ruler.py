"""RULER's thirteen long-context tasks (arXiv 2404.06654) for any tokenizer, without a download.

The tasks are RULER's: what is hidden, how much of it, what is asked and how answers are scored. The
haystacks, the words and the questions come from a text of the user's, and the prompts are our own
words, so scores compare runs of one text with each other and not with published tables. A sample is
never longer than asked, answer included, and at most 2 % shorter.
"""

import collections
import dataclasses
import functools
import itertools
import random
import string
import uuid
from collections.abc import Callable, Iterator
from typing import NamedTuple

from engram_jax.config import require
from engram_jax.evaluation.haystack import NOISE, Source, fitted, generator, hidden, repeated

SLACK = 0.02  # how much shorter than asked a sample may be
_PADDING = 48  # words of noise that fill what whole needles leave
_DOCUMENT = 100  # words of a document that questions are asked about


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
      task, length, index: which one.
      prompt: what the model reads.
      prefix: how its answer begins; read behind the prompt.
      references: what the answer must hold.
      answer_tokens: how many tokens the model may write.
    """

    task: str
    length: int
    index: int
    prompt: str
    prefix: str
    references: tuple[str, ...]
    answer_tokens: int


class Made(NamedTuple):
    """A prompt that grows with a size, and what is asked at its end."""

    text: Callable[[int], str]
    prefix: str
    references: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """One of the thirteen.

    Attributes:
      make: (source, generator, length) -> `Made`.
      answer_tokens: how many tokens an answer may have.
      any_reference: one of the references is enough (QA); otherwise the score is their share.
    """

    make: Callable[[Source, random.Random, int], Made]
    answer_tokens: int = 128
    any_reference: bool = False


def samples(
    source: Source, task: str, length: int, count: int, seed: int = 0
) -> Iterator[Sample]:
    """Questions of a task; the same for the same seed, text and tokenizer, wherever it runs.

    Args:
      source: text and tokenizer.
      task: a name of `TASKS`.
      length: tokens of prompt, prefix and answer together.
      count: how many.
      seed: of all that is drawn.

    Raises:
      UserError: no such task, a length in which it does not fit, a text that is too short for it,
        or a tokenizer that cannot spell its needles.
    """
    require(task in TASKS, "task", task, f"must be one of {', '.join(TASKS)}")
    chosen = TASKS[task]
    budget = length - chosen.answer_tokens
    for index in range(count):
        made = chosen.make(source, generator(seed, task, length, index), length)
        for reference in made.references:
            source.check_spells(reference)
        read = functools.partial(_read_tokens, source, made.prefix)
        prompt = fitted(made.text, read, budget, f"task {task}")
        used = read(prompt) + chosen.answer_tokens
        require(used >= (1 - SLACK) * length, "length", length,
                f"cannot be filled by task {task}: it ends at {used} tokens; use a longer text or "
                "a shorter length")
        yield Sample(task, length, index, prompt, made.prefix, made.references,
                     chosen.answer_tokens)


def _read_tokens(source: Source, prefix: str, prompt: str) -> int:
    return source.count(prompt + prefix)


def score(sample: Sample, answer: str) -> float:
    """The share of the references that the answer holds, or for QA whether it holds any; 0 to 1."""
    present = [reference.lower() in answer.lower() for reference in sample.references]
    if TASKS[sample.task].any_reference:
        return float(any(present))
    return sum(present) / len(present)


# --- Needles ---


@dataclasses.dataclass(frozen=True)
class Needles:
    """Needles in a haystack: facts `key -> value` hidden in a text, some of them asked for.

    Attributes:
      haystack: "noise" repeats five sentences, "text" is the user's, "needles" is made of other
        needles.
      key, value: "word", "number" or "uuid".
      keys, values: how many keys are hidden, and how many values each has.
      asked: how many of the keys are asked for.
    """

    haystack: str
    key: str = "word"
    value: str = "number"
    keys: int = 1
    values: int = 1
    asked: int = 1

    def __call__(self, source: Source, draw: random.Random, length: int) -> Made:
        keys = _different(lambda: _thing(self.key, source, draw), self.keys)
        facts = {key: tuple(_different(lambda: _thing(self.value, source, draw), self.values))
                 for key in keys}
        needles = [self._needle(key, value) for key, values in facts.items() for value in values]
        draw.shuffle(needles)
        asked = draw.sample(keys, self.asked)
        noun, depths = f"{self.value}s", draw.getrandbits(64)
        filler = self._filler(source, generator(depths, "filler"), set(keys))
        units: list[str] = []  # sentences of needles, which are few and long; words of the others
        of_needles = self.haystack == "needles"

        def words(size: int) -> list[str]:
            whole, padding = divmod(size, _PADDING) if of_needles else (size, 0)
            while len(units) < whole:
                units.extend([next(filler)] if of_needles else next(filler).split())
            return repeated(padding, [NOISE]) + " ".join(units[:whole]).split()

        def text(size: int) -> str:
            context = hidden(words(size), needles, generator(depths, size))
            return (f"Some special {noun} are hidden in the following text. Remember them; you "
                    f"will be asked for them afterwards.\n{context}\nWhich special {noun} does "
                    f"the text give for {_listed(asked)}?")

        references = tuple(value for key in asked for value in facts[key])
        return Made(text, f" The special {noun} for {_listed(asked)} in the text are", references)

    def _filler(
        self, source: Source, draw: random.Random, keys: set[str]
    ) -> Iterator[str]:
        """Sentences of the haystack, without end."""
        if self.haystack == "noise":
            yield from itertools.repeat(NOISE)
        if self.haystack == "text":
            start = draw.randrange(len(source.sentences))
            yield from itertools.islice(itertools.cycle(source.sentences), start, None)
        while True:
            key = _thing(self.key, source, draw)
            if key not in keys:
                yield self._needle(key, _thing(self.value, source, draw))

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special {self.value}s for {key} is: {value}."


def _thing(kind: str, source: Source, draw: random.Random) -> str:
    if kind == "number":
        return str(draw.randint(10**6, 10**7 - 1))
    if kind == "uuid":
        return str(uuid.UUID(int=draw.getrandbits(128), version=4))
    return f"{draw.choice(source.words)}-{draw.choice(source.words)}"


def _different(draw: Callable[[], str], count: int) -> list[str]:
    """`count` different ones, in the order in which they are drawn."""
    made: dict[str, None] = {}
    while len(made) < count:
        made[draw()] = None
    return list(made)


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# --- Variables, words ---


def _variables(source: Source, draw: random.Random, length: int) -> Made:
    """A variable is given a value, others are given the variable before: which have the value?"""
    hops = 4
    names = _different(lambda: "".join(draw.choices(string.ascii_uppercase, k=5)), hops + 1)
    value, depths = str(draw.randint(10_000, 99_999)), draw.getrandbits(64)
    chain = [f"VAR {names[0]} = {value}."] + [
        f"VAR {after} = VAR {before}." for before, after in itertools.pairwise(names)]

    def text(size: int) -> str:
        context = hidden(repeated(size, [NOISE]), chain, generator(depths, size))
        return ("Variables are assigned in the following text, one from another. Follow them.\n"
                f"{context}\nWhich variables have the value {value} in the end?")

    return Made(text, f" The {hops + 1} variables that have the value {value} are", tuple(names))


def _common_words(source: Source, draw: random.Random, length: int) -> Made:
    """Ten words stand in a numbered list more often than all others: which?"""
    often, seldom = (30, 3) if length >= 4096 else (6, 1)
    words = draw.sample(source.words, len(source.words))
    common, others, order = words[:10], words[10:], draw.getrandbits(64)

    def text(size: int) -> str:
        chosen = [other for other in others[:size // seldom] for _ in range(seldom)]
        listed = common * often + chosen + others[size // seldom:][:1] * (size % seldom)
        generator(order, size).shuffle(listed)
        context = " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
        return ("Some words of the following numbered list stand in it more often than others. "
                f"Remember those.\n{context}\nWhich 10 words stand most often in the list?")

    return Made(text, " The 10 words that stand most often in the list are", tuple(common))


def _frequent_words(source: Source, draw: random.Random, length: int) -> Made:
    """Made-up words follow a Zipf law of exponent 2: which three come most often, dots aside?"""
    vocabulary = _different(lambda: "".join(draw.choices(string.ascii_lowercase, k=6)),
                            max(length // 50, 8))
    order = draw.getrandbits(64)
    names = ["...", *vocabulary]
    weights = [rank**-2.0 for rank in range(1, len(names) + 1)]
    total = sum(weights)

    def text(size: int) -> str:
        size = max(size, 32)  # so that the first four ranks stand in it at all, and in their order
        counts = [int(size * weight / total) for weight in weights]
        counts[0] += size - sum(counts)
        coded = [name for name, times in zip(names, counts, strict=True) for _ in range(times)]
        generator(order, size).shuffle(coded)
        return ("Read the following coded text and count how often each coded word comes. Leave "
                f"the dots '...' out.\n{' '.join(coded)}\nWhich three coded words come most often?")

    return Made(text, " The three coded words that come most often are", tuple(vocabulary[:3]))


# --- Questions ---


def _gap(sentence: str, word: str) -> str:
    return " ".join(part.replace(word, "____") if part.strip(string.punctuation) == word else part
                    for part in sentence.split())


def _asked_sentence(source: Source, draw: random.Random) -> tuple[int, str]:
    """A sentence by its number, and the longest word in it.

    Nothing else in the text begins with the same four words, and no other word in it is as long.
    """
    openings = collections.Counter(map(_opening, source.sentences))
    fitting = [number for number, sentence in enumerate(source.sentences)
               if 6 <= len(sentence.split()) <= 40 and _longest(sentence)
               and openings[_opening(sentence)] == 1]
    require(bool(fitting), "text", f"{len(source.sentences)} sentences",
            "has no sentence of 6 to 40 words to ask about")
    number = draw.choice(fitting)
    return number, _longest(source.sentences[number])


def _opening(sentence: str) -> str:
    return " ".join(sentence.split()[:4])


def _longest(sentence: str) -> str:
    """The one longest word of at least 4 letters, or "" where there is none."""
    words = {word.strip(string.punctuation) for word in sentence.split()}
    words = {word for word in words if word.isalpha() and len(word) >= 4}
    most = max(map(len, words), default=0)
    longest = [word for word in words if len(word) == most]
    return longest[0] if len(longest) == 1 else ""


def _context(source: Source, kept: int, draw: random.Random) -> Callable[[int], str]:
    """Numbered documents by the words in them: one is a sentence, the others are of other ones."""
    start, depth = draw.randrange(len(source.sentences)), draw.random()
    others = [sentence for number, sentence in enumerate(source.sentences) if number != kept]
    turned = [*others[start:], *others[:start]] or [NOISE]

    def text(size: int) -> str:
        filler = repeated(size, turned)
        documents = [" ".join(filler[at:at + _DOCUMENT]) for at in range(0, size, _DOCUMENT)]
        documents.insert(int(depth * (len(documents) + 1)), source.sentences[kept])
        return "\n\n".join(f"Document {n}:\n{document}" for n, document in enumerate(documents, 1))

    return text


def _single_hop(source: Source, draw: random.Random, length: int) -> Made:
    """A sentence of one document with a word left out: which word?"""
    number, word = _asked_sentence(source, draw)
    context = _context(source, number, draw)

    def text(size: int) -> str:
        return ("Answer the question by the following documents, with the answer alone.\n\n"
                f"{context(size)}\n\nQuestion: Which word stands in the gap of this sentence? "
                f"{_gap(source.sentences[number], word)}")

    return Made(text, " Answer:", (word,))


def _two_hops(source: Source, draw: random.Random, length: int) -> Made:
    """One document gives a sentence a name, another has the sentence: which is its longest word?"""
    number, word = _asked_sentence(source, draw)
    name = "".join(draw.choices(string.ascii_uppercase, k=4))
    context, opening = _context(source, number, draw), _opening(source.sentences[number])
    naming = f"The sentence that begins with '{opening}' is called {name}."

    def text(size: int) -> str:
        return ("Answer the question by the following documents, with the answer alone.\n\n"
                f"Document 0:\n{naming}\n\n{context(size)}\n\nQuestion: Which is the longest word "
                f"of the sentence that is called {name}?")

    return Made(text, " Answer:", (word,))


TASKS = {
    "niah_single_1": Task(Needles("noise")),
    "niah_single_2": Task(Needles("text")),
    "niah_single_3": Task(Needles("text", value="uuid")),
    "niah_multikey_1": Task(Needles("text", keys=4)),
    "niah_multikey_2": Task(Needles("needles")),
    "niah_multikey_3": Task(Needles("needles", key="uuid", value="uuid")),
    "niah_multivalue": Task(Needles("text", values=4)),
    "niah_multiquery": Task(Needles("text", keys=4, asked=4)),
    "vt": Task(_variables, 30),
    "cwe": Task(_common_words, 120),
    "fwe": Task(_frequent_words, 50),
    "qa_single": Task(_single_hop, 32, any_reference=True),
    "qa_hops": Task(_two_hops, 32, any_reference=True),
}
# The paper's columns (arXiv 2601.07372, long-context table): means of these.
COLUMNS = {
    "single": ("niah_single_1", "niah_single_2", "niah_single_3"),
    "multi-key": ("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    "multi-value": ("niah_multivalue",),
    "multi-query": ("niah_multiquery",),
    "variable tracking": ("vt",),
    "common words": ("cwe",),
    "frequent words": ("fwe",),
    "QA": ("qa_single", "qa_hops"),
}
