"""Which part of a text is kept for validation, and the pieces in which it is tokenized.

Three rules, of which a packed text's meta.json names its own ("split"):

    documents  of a text that is known whole, the documents whose numbers hash lowest
    tail       where documents are few, or one is nearly everything: the end of the text
    pieces     of a text too large to be known before it is packed, the pieces whose numbers hash
               low; most documents are one piece, and one that the split cuts counts as several
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from engram_jax.data.read_ahead import TextAhead
from engram_jax.data.reading import Part

MANY_DOCUMENTS = 40  # from here on whole documents are kept for validation
PIECE_CHARACTERS = 2**20
SPLITS = ("train", "validation")


class Piece(NamedTuple):
    """Text to be tokenized by itself.

    Attributes:
      ends: the end token follows it.
      last: it is the last of its document.
    """

    split: str
    text: str
    ends: bool
    last: bool


@dataclasses.dataclass(frozen=True)
class Split:
    """Which text is kept for validation: `documents`, or all from byte `cut[1]` of `cut[0]` on."""

    documents: frozenset[int] = frozenset()
    cut: tuple[int, int] | None = None


def choose_split(sizes: np.ndarray, fraction: float) -> Split:
    """The validation split of documents of `sizes` bytes; depends on nothing else.

    Of many documents, those whose numbers hash lowest, until `fraction` of the bytes is reached
    (to within a twentieth; a document too large for the room that is left stays in training). Of
    few documents, or where that does not work out, the tail of the text.
    """
    target = float(sizes.sum()) * fraction
    if len(sizes) >= MANY_DOCUMENTS:
        chosen, total = set(), 0.0
        for index in _in_order_of_hash(len(sizes)):
            if total >= 0.95 * target:
                break
            if total + sizes[index] <= target:
                chosen.add(index)
                total += float(sizes[index])
        if total >= target / 2:
            return Split(documents=frozenset(chosen))
    ends = np.cumsum(sizes)
    begin = int(ends[-1] - round(target))
    document = min(int(np.searchsorted(ends, begin, side="right")), len(sizes) - 1)
    return Split(cut=(document, begin - int(ends[document] - sizes[document])))


def _in_order_of_hash(count: int) -> Iterator[int]:
    """Numbers below `count`, the lowest hash first; 16 bytes each are held."""
    # The first 8 bytes tell them apart: of 2**22 numbers no two have the same.
    heads = np.fromiter((int.from_bytes(_hash(n)[:8]) for n in range(count)), np.uint64, count)
    return (int(index) for index in np.argsort(heads, kind="stable"))


def _hash(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def split_pieces(text: TextAhead, fraction: float) -> tuple[str, Iterator[Piece]]:
    """The rule for a text, and its pieces in order."""
    if not text.whole:
        return "pieces", _by_pieces(text.all_parts(), fraction)
    split = choose_split(text.sizes, fraction)
    return "tail" if split.cut else "documents", _by_split(text, split)


def _by_split(text: TextAhead, split: Split) -> Iterator[Piece]:
    begin = 0
    for index, size in enumerate(map(int, text.sizes)):
        end = begin + size
        if split.cut is not None and index == split.cut[0]:
            cut = text.after_line(begin, end, begin + split.cut[1])
            yield from _pieces_of("train", text.blocks(begin, cut), ends=False)
            yield from _pieces_of("validation", text.blocks(cut, end))
        else:
            kept = index in split.documents if split.cut is None else index > split.cut[0]
            yield from _pieces_of(SPLITS[kept], text.blocks(begin, end))
        begin = end


def _pieces_of(split: str, blocks: Iterable[str], ends: bool = True) -> Iterator[Piece]:
    for piece in _last_marked(pieces(blocks)):
        yield Piece(split, piece.text, ends and piece.ends, ends and piece.ends)


def _by_pieces(parts: Iterator[Part], fraction: float) -> Iterator[Piece]:
    below = int(fraction * 2**64).to_bytes(8)
    number = 0
    for first in parts:
        for piece in _last_marked(pieces(_document(first, parts))):
            here, there = (SPLITS[_hash(each)[:8] < below] for each in (number, number + 1))
            yield Piece(here, piece.text, piece.ends or here != there, piece.ends)
            number += 1


def _document(first: Part, parts: Iterator[Part]) -> Iterator[str]:
    """The texts of one document's parts, taken from `parts`."""
    part = first
    yield part.text
    while not part.ends:
        part = next(parts)
        yield part.text


def _last_marked(texts: Iterator[str]) -> Iterator[Part]:
    before = next(texts, "")
    for text in texts:
        yield Part(before, ends=False)
        before = text
    if before:
        yield Part(before)


def pieces(blocks: Iterable[str]) -> Iterator[str]:
    """One document in parts of at most PIECE_CHARACTERS, cut after a line where there is one.

    Parts are tokenized by themselves: many at a time, and in bounded memory. A cut may change the
    tokens beside it, one in several hundred thousand.

    Args:
      blocks: the document; its pieces do not depend on how it comes.
    """
    text = ""
    for block in blocks:
        text, start = text + block, 0
        while len(text) - start > PIECE_CHARACTERS:
            line = text.rfind("\n", start, start + PIECE_CHARACTERS) + 1
            stop = line if line > start else start + PIECE_CHARACTERS
            yield text[start:stop]
            start = stop
        text = text[start:]
    if text:
        yield text
