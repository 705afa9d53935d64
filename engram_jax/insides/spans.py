"""Stretches of a text whose last tokens are compared: names found in it, or those of a file.

A span is (start, end) in characters, half-open. CKA at the last tokens of names compares layers
where a name of several tokens has just become whole (arXiv 2601.07372, section 6.1).

Shapes: N tokens of the text, S spans.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from engram_jax.config import require

Span = tuple[int, int]
SHOWN = 60  # characters of a line that an error quotes

# Dotted or single, in any script; `\w` would let a number begin one.
_IDENTIFIER = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")
_WORD = re.compile(r"[^\W\d_]+")  # letters of any script
_JOINT = re.compile(r"[ '’‐-]")  # between the words of one name
_INSIDE = re.compile(r"[\w,;]\s\Z")  # what a word inside a sentence has before it
_NUMBER = re.compile(r"\s*[+-]?[\d.]+\s*")


class Marked(NamedTuple):
    """Spans of a text.

    Attributes:
      kind: what they are, in words.
      spans: in the order of the text.
    """

    kind: str
    spans: list[Span]


# --- Names found in a text ---


def names(text: str) -> list[Span]:
    """Names of one or several words in prose, and identifiers of several parts in code.

    A name is a run of capitalised words, joined by a space, a hyphen or an apostrophe. The capital
    says so inside a sentence, that is after a letter, digit, comma or semicolon and one space or
    line break. Anywhere else, as after a full stop or an opening quote, every word may have one:
    there a run's first word belongs to the name only if the text never writes it in lower case.
    In German that takes all nouns for names.

    An identifier has an underscore between letters (`snake_case`), a capital after a small letter
    (`CamelCase`), or dots (`os.path`; `e.g` has one-letter parts and is none). In a script without
    capitals only these are found.

    Returns:
      Spans that do not overlap, in the order of the text.
    """
    names = [*_capitalised(text), *_identifiers(text)]
    chosen: list[Span] = []
    for start, end in sorted(names, key=lambda span: (span[0], -span[1])):
        if not chosen or start >= chosen[-1][1]:
            chosen.append((start, end))
    return chosen


def _capitalised(text: str) -> Iterator[Span]:
    words = list(_WORD.finditer(text))
    small = {word.group() for word in words if word.group().islower()}
    start = end = -1  # of the run so far; no character stands between a run and itself
    for word in words:
        if not word.group()[0].isupper():
            continue
        if end >= 0 and word.start() == end + 1 and _JOINT.match(text[end]):
            end = word.end()
            continue
        if end >= 0:
            yield start, end
        start = end = -1
        inside = _INSIDE.search(text[max(0, word.start() - 2) : word.start()])
        if inside or word.group().lower() not in small:
            start, end = word.span()
    if end >= 0:
        yield start, end


def _identifiers(text: str) -> Iterator[Span]:
    for match in _IDENTIFIER.finditer(text):
        parts = match.group().split(".")
        if (len(parts) > 1 and max(map(len, parts)) > 1) or any(map(_is_compound, parts)):
            yield match.span()


def _is_compound(word: str) -> bool:
    """Whether an identifier without dots is of several parts."""
    return "_" in word.strip("_") or any(
        before.islower() and after.isupper()
        for before, after in itertools.pairwise(word))


# --- Spans of a file ---


def is_few_nerd(content: str) -> bool:
    """Whether a file is in Few-NERD's format: a line with a tab that no number begins."""
    lines = (line.split("\t") for line in content.split("\n") if not line.startswith("#"))
    return any(len(columns) > 1 and not _NUMBER.fullmatch(columns[0]) for columns in lines)


def listed(content: str, length: int) -> Marked:
    """The spans of a file with `start end` on each line; `#` begins a comment.

    Args:
      content: of the file.
      length: of the text, characters.

    Raises:
      UserError: a line that is no span of the text; it names the line and the text's length.
    """
    spans = []
    for number, line in enumerate(content.split("\n"), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        right = f"must be `start end` with 0 <= start < end <= {length}, the text's length"
        whole = len(words) == 2 and all(re.fullmatch("[0-9]{1,15}", word) for word in words)
        require(whole, f"spans line {number}", line[:SHOWN], right)
        start, end = map(int, words)
        require(start < end <= length, f"spans line {number}", line[:SHOWN], right)
        spans.append((start, end))
    return Marked("spans of a file", sorted(spans))


def few_nerd(content: str) -> tuple[str, Marked]:
    """The text and the entities of a file in Few-NERD's format (arXiv 2105.07464).

    Each line is a word, a tab and its tag; a blank line ends a sentence. Words are joined by
    spaces, sentences by line breaks. Neighbours in a sentence with one tag other than "O" are one
    entity.

    Raises:
      UserError: a line of another form; it names the line.
    """
    text, before, joint = "", "O", ""
    spans: list[Span] = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            before, joint = "O", "\n" if text else ""
            continue
        columns = [column.strip() for column in line.split("\t")]
        whole = len(columns) == 2 and all(columns) and not _NUMBER.fullmatch(columns[1])
        require(whole, f"spans line {number}", line[:SHOWN],
                "must be a word, a tab and its tag, as other lines are in Few-NERD's format")
        word, tag = columns
        start = len(text) + len(joint)
        text += joint + word
        if tag != "O":
            first = spans.pop()[0] if tag == before else start
            spans.append((first, len(text)))
        before, joint = tag, " "
    return text, Marked("entities of a Few-NERD file", spans)


# --- Their tokens ---


def tokens_of(spans: Sequence[Span], offsets_N2: np.ndarray) -> np.ndarray:
    """The first and the last token of each span, int64 [S, 2]; spans without a token are left out.

    The last token is the one that holds the span's last character: of the pieces of one character,
    which have the same offsets, the last.

    Args:
      spans: of a text.
      offsets_N2: start and end of each token in the text, as a tokenizer tells them; a token may
        begin with the space before a word. Tokens that are nothing of the text have start = end.
    """
    own_M = np.flatnonzero(offsets_N2[:, 1] > offsets_N2[:, 0])
    starts_M, ends_M = offsets_N2[own_M].T
    spans_S2 = np.array(spans, np.int64).reshape(-1, 2)
    first_S = np.searchsorted(ends_M, spans_S2[:, 0], side="right")
    last_S = np.searchsorted(starts_M, spans_S2[:, 1], side="left") - 1
    kept_S = first_S <= last_S
    return np.stack([own_M[first_S[kept_S]], own_M[last_S[kept_S]]], axis=1)
