"""Tokenizing a text into the token shards of a training and a validation split."""

import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from engram_jax.data.encoding import cores, encoded
from engram_jax.data.read_ahead import TextAhead
from engram_jax.data.shards import ShardInfo, ShardWriter, shard_name
from engram_jax.data.splitting import SPLITS, Piece, split_pieces
from engram_jax.data.tokenizer import find_end_id, find_pad_id, tokenizer_digest

ENCODED_AT_ONCE = 2**20  # characters
SMALL = 2**23  # bytes of a text for which no processes are started


def pack(text: TextAhead, tokenizer: Tokenizer, fraction: float, folder: pathlib.Path,
         processes: int = 0) -> tuple[str, list[str]]:
    """Tokenize `text` into shards, tokenizer.json and meta.json, all in `folder`.

    Args:
      fraction: share of the UTF-8 bytes that validation gets.
      processes: to tokenize in, which does not change a bit; 0 is one for each core.

    Returns:
      The text's fingerprint, and file names in the order in which they have to appear, meta.json
      last.

    Raises:
      UserError: the tokenizer has no end token, or the text cannot be read.
    """
    end_id, vocab_size = find_end_id(tokenizer), max(tokenizer.get_vocab().values()) + 1
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    writers = {split: ShardWriter(folder, split, dtype) for split in SPLITS}
    rule, pieces = split_pieces(text, fraction)
    count = _Count(text.whole)
    small = text.whole and text.sizes.sum() < SMALL
    for run, ids in encoded(_runs(count.all_of(pieces)), _texts, tokenizer,
                            processes or (0 if small else cores())):
        for piece, ids_T in zip(run, ids, strict=True):
            writers[piece.split].add(np.append(ids_T, np.uint32(end_id)) if piece.ends else ids_T)
    shards = {split: writers[split].close() for split in SPLITS}
    fingerprint = text.fingerprint if text.whole else count.digest.hexdigest()
    _write_meta(folder, shards, {
        "fingerprint": fingerprint, "tokenizer_digest": tokenizer_digest(tokenizer),
        "vocab_size": vocab_size, "end_id": end_id, "pad_id": find_pad_id(tokenizer),
        "documents": count.documents, "dtype": dtype, "split": rule,
        **{f"{split}_bytes": count.sizes[split] for split in SPLITS}})
    (folder / "tokenizer.json").write_bytes(tokenizer.to_str().encode())
    names = [shard_name(split, n) for split in SPLITS for n in range(len(shards[split]))]
    return fingerprint, [*names, "tokenizer.json", "meta.json"]


def _write_meta(folder: pathlib.Path, shards: dict[str, list[ShardInfo]],
                values: dict[str, Any]) -> None:
    for split in SPLITS:
        values[f"{split}_shards"] = [shard.tokens for shard in shards[split]]
        values[f"{split}_sha256"] = [shard.sha256 for shard in shards[split]]
    values["sha256"] = meta_digest(values)
    (folder / "meta.json").write_text(json.dumps(values, indent=1), encoding="utf-8")


def meta_digest(values: dict[str, Any]) -> str:
    """Hex sha256 over all fields of a meta.json but its own."""
    rest = {name: value for name, value in values.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


class _Count:
    """What goes by: documents, bytes of each split, and the fingerprint of a large text.

    The fingerprint is a sha256 over the pieces, each after its length in bytes and whether it is
    the last of its document: other than of a text that is known whole, it can be told in one
    reading that does not know how long a document will be.
    """

    def __init__(self, whole: bool):
        self.documents, self.sizes = 0, dict.fromkeys(SPLITS, 0)
        self.digest = hashlib.sha256()
        self._whole = whole

    def all_of(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            data = piece.text.encode()
            self.documents += piece.last
            self.sizes[piece.split] += len(data)
            if not self._whole:
                self.digest.update(len(data).to_bytes(8, "little") + bytes([piece.last]))
                self.digest.update(data)
            yield piece


def _runs(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Pieces in lists that are worth tokenizing at once."""
    run: list[Piece] = []
    room = ENCODED_AT_ONCE
    for piece in pieces:
        run.append(piece)
        room -= len(piece.text)
        if room <= 0:
            yield run
            run, room = [], ENCODED_AT_ONCE
    if run:
        yield run


def _texts(run: list[Piece]) -> list[str]:
    return [piece.text for piece in run]
