"""Tokenizing a text into the token shards of a training and a validation split."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer

from engram_jax.data.sources import Source
from engram_jax.data.tokenizer import find_end_id, find_pad_id, pieces, tokenizer_digest

SHARD_TOKENS = 64 * 2**20
ENCODED_AT_ONCE = 4 * 2**20  # characters
MANY_DOCUMENTS = 40  # from here on whole documents are kept for validation
SPLITS = ("train", "validation")


def shard_name(split: str, number: int) -> str:
    """File name of a split's shard."""
    return f"{split}-{number:05d}.npy"


def pack(source: Source, tokenizer: Tokenizer, fraction: float,
         folder: pathlib.Path) -> list[str]:
    """Tokenize `source` into shards, tokenizer.json and meta.json, all in `folder`.

    Special tokens that a text spells out are taken as ordinary text.

    Args:
      fraction: share of the UTF-8 bytes that validation gets.

    Returns:
      File names in the order in which they have to appear, meta.json last.

    Raises:
      UserError: the tokenizer has no end token, or the text cannot be read.
    """
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    end_id, dtype = find_end_id(tokenizer), "uint16" if vocab_size <= 2**16 else "uint32"
    writers = {split: _Writer(folder, split, dtype) for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    for run in _runs(_assigned(source, choose_split(source.summary.sizes, fraction))):
        for part, ids in zip(run, _encoded(run, tokenizer), strict=True):
            writers[part.split].add([*ids, end_id] if part.ends else ids)
            sizes[part.split] += len(part.text.encode())
    shards = {split: writers[split].close() for split in SPLITS}
    meta = {
        "fingerprint": source.fingerprint, "tokenizer_digest": tokenizer_digest(tokenizer),
        "vocab_size": vocab_size, "end_id": end_id, "pad_id": find_pad_id(tokenizer),
        "documents": len(source.summary.sizes), "dtype": dtype,
        **{f"{split}_shards": shards[split] for split in SPLITS},
        **{f"{split}_bytes": sizes[split] for split in SPLITS}}
    (folder / "tokenizer.json").write_bytes(tokenizer.to_str().encode())
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    names = [shard_name(split, n) for split in SPLITS for n in range(len(shards[split]))]
    return [*names, "tokenizer.json", "meta.json"]


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
        for index in sorted(range(len(sizes)), key=_hash):
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


def _hash(index: int) -> bytes:
    return hashlib.sha256(str(index).encode()).digest()


@dataclasses.dataclass(frozen=True)
class _Part:
    """Text to be tokenized by itself; `ends` where it is the last of its document."""

    split: str
    text: str
    ends: bool


def _assigned(source: Source, split: Split) -> Iterator[_Part]:
    for index, text in enumerate(source.documents()):
        if split.cut is None:
            name = "validation" if index in split.documents else "train"
        elif index == split.cut[0]:
            head, text = _cut(text, split.cut[1])
            yield from _parts("train", head, ends=False)
            name = "validation"
        else:
            name = "validation" if index > split.cut[0] else "train"
        yield from _parts(name, text, ends=True)


def _cut(text: str, offset: int) -> tuple[str, str]:
    """`text` in two, at the first line that begins behind byte `offset`, or near by."""
    data = text.encode()
    line = data.find(b"\n", offset, min(offset + 4096, len(data) - 1)) + 1
    if line:
        offset = line
    while 0 < offset < len(data) and data[offset] & 0xC0 == 0x80:  # inside a character
        offset -= 1
    return data[:offset].decode(), data[offset:].decode()


def _parts(split: str, text: str, ends: bool) -> Iterator[_Part]:
    texts = [*pieces(text)] if text else []
    for number, piece in enumerate(texts, start=1):
        yield _Part(split, piece, ends and number == len(texts))


def _runs(parts: Iterator[_Part]) -> Iterator[list[_Part]]:
    """Parts in lists that are worth tokenizing at once."""
    run: list[_Part] = []
    room = ENCODED_AT_ONCE
    for part in parts:
        run.append(part)
        room -= len(part.text)
        if room <= 0:
            yield run
            run, room = [], ENCODED_AT_ONCE
    if run:
        yield run


def _encoded(run: list[_Part], tokenizer: Tokenizer) -> Iterator[list[int]]:
    spelled = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        encodings = tokenizer.encode_batch_fast([part.text for part in run],
                                                add_special_tokens=False)
    finally:
        tokenizer.encode_special_tokens = spelled
    return (encoding.ids for encoding in encodings)


class _Writer:
    """Writes a stream of ids into shards of SHARD_TOKENS, the last one shorter."""

    def __init__(self, folder: pathlib.Path, split: str, dtype: str):
        self._folder, self._split, self._dtype = folder, split, dtype
        self._waiting: list[np.ndarray] = []
        self._room = SHARD_TOKENS
        self._sizes: list[int] = []

    def add(self, ids: list[int]) -> None:
        """Append ids, writing each shard that gets full."""
        array = np.asarray(ids, self._dtype)
        while len(array) >= self._room:
            head, array = array[:self._room], array[self._room:]
            self._waiting.append(head)
            self._write()
        self._waiting.append(array)
        self._room -= len(array)

    def close(self) -> list[int]:
        """Write what waits; returns the tokens in each shard."""
        if self._room < SHARD_TOKENS:
            self._write()
        return self._sizes

    def _write(self) -> None:
        shard = np.concatenate(self._waiting)
        np.save(self._folder / shard_name(self._split, len(self._sizes)), shard)
        self._sizes.append(len(shard))
        self._waiting, self._room = [], SHARD_TOKENS
