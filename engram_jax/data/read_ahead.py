"""A text is read once: its beginning, which for most texts is all of it, waits on this disk.

Of a text that is known whole, size and fingerprint are known before anything is tokenized; of a
larger one, only its beginning. What lies behind is read on while it is tokenized, and never held.
"""

import array
import codecs
import contextlib
import hashlib
import itertools
import pathlib
import tempfile
from collections.abc import Iterator

import numpy as np

from engram_jax.data.reading import BLOCK, Part
from engram_jax.data.sources import Source, in_words
from engram_jax.errors import UserError

MOST_BYTES = 2**30  # of a text that is known whole
MOST_DOCUMENTS = 2**22


class TextAhead:
    """The beginning of a text, on this disk.

    Attributes:
      sizes: UTF-8 bytes of each document that has ended in the beginning, int64 [documents].
      whole: whether the beginning is all of the text.
      fingerprint: hex sha256 over the UTF-8 texts of `sizes` in order, each after its length in
        bytes; of a whole text its own: equal texts have equal fingerprints anywhere.
    """

    def __init__(self, source: Source, folder: pathlib.Path):
        """Read ahead; leaves files only in `folder`.

        Raises:
          UserError: there is no text, or it is none (`Source.parts`).
          MachineError: the source cannot be read.
        """
        self._rest = source.parts()
        self._held = 0  # bytes of the file
        self.whole = False
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(tempfile.TemporaryFile(dir=folder))
            self.sizes, self.fingerprint = self._read()
            if not self._held:
                raise UserError(f"{source.setting}: holds no text; name a file, a folder or "
                                "a data set with at least one document")
            self._open = stack.pop_all()

    def close(self) -> None:
        """Give the disk back."""
        self._open.close()

    def _read(self) -> tuple[np.ndarray, str]:
        sizes, digest, begin = array.array("q"), hashlib.sha256(), 0
        while self._held < MOST_BYTES and len(sizes) < MOST_DOCUMENTS:
            part = next(self._rest, None)
            if part is None:
                self.whole = True
                break
            data = part.text.encode()
            self._file.write(data)
            self._held += len(data)
            if not part.ends:
                continue
            size = self._held - begin
            digest.update(size.to_bytes(8, "little"))
            for block in [data] if size == len(data) else self._bytes(begin, self._held):
                digest.update(block)
            sizes.append(size)
            begin = self._held
        return np.array(sizes, np.int64), digest.hexdigest()

    @property
    def amount(self) -> str:
        """How much text there is, in words."""
        return ("" if self.whole else "more than ") + in_words(len(self.sizes), self._held)

    def documents(self) -> Iterator[Iterator[str]]:
        """Every document of the beginning as its blocks, one that does not end there at last."""
        ends = itertools.accumulate(map(int, self.sizes))
        begin = 0
        for end in itertools.chain(ends, [self._held]):
            if end > begin:
                yield self.blocks(begin, end)
            begin = end

    def all_parts(self) -> Iterator[Part]:
        """The text from its beginning to its end; once, because what lies behind is not kept."""
        begin = 0
        for size in map(int, self.sizes):  # a list would be five times as large
            yield from _marked(self.blocks(begin, begin + size))
            begin += size
        if begin < self._held:
            yield from (Part(block, ends=False) for block in self.blocks(begin, self._held))
        yield from self._rest

    def blocks(self, begin: int, end: int) -> Iterator[str]:
        """The text from byte `begin` to byte `end`, both between characters."""
        if end - begin <= BLOCK:
            yield b"".join(self._bytes(begin, end)).decode()
            return
        decoder = codecs.getincrementaldecoder("utf-8")()
        yield from map(decoder.decode, self._bytes(begin, end))

    def after_line(self, begin: int, end: int, offset: int) -> int:
        """The byte where the first line begins behind byte `offset` of those from `begin` to
        `end`, or one near by that is between characters."""
        data = b"".join(self._bytes(offset, min(offset + 4096, end - 1)))
        if line := data.find(b"\n") + 1:
            offset += line
        while begin < offset < end and b"".join(self._bytes(offset, offset + 1))[0] & 0xC0 == 0x80:
            offset -= 1
        return offset

    def _bytes(self, begin: int, end: int) -> Iterator[bytes]:
        while begin < end:
            self._file.seek(begin)
            block = self._file.read(min(BLOCK, end - begin))
            begin += len(block)
            if begin == end:
                self._file.seek(0, 2)  # what is written next goes to the end
            yield block


def _marked(blocks: Iterator[str]) -> Iterator[Part]:
    before = next(blocks)
    for block in blocks:
        yield Part(before, ends=False)
        before = block
    yield Part(before)
