"""Text to token shards, once, and the streams of tokens that batches are cut from.

A packed folder holds

    tokenizer.json                        the tokenizer, in the format of HF `tokenizers`
    train-00000.npy, validation-00000.npy, ...
                                          token ids, uint16 or uint32, one long stream a split
    meta.json                             the fields of `TokenData`; written last, so a folder
                                          that has it is whole

Each document's ids are followed by the end token. Folders are kept in a cache under a key of text,
tokenizer and validation share. Shards in object storage are copied to this machine's disk as they
are read. Files are moved into place one by one, and equal keys have equal
bytes, so processes that pack the same text at the same time do not disturb each other.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath
from tokenizers import Tokenizer

from engram_jax.config import DataConfig
from engram_jax.data import packing
from engram_jax.data.cache import (
    cache_folder,
    cache_key,
    download_folder,
    publish,
    working_folder,
)
from engram_jax.data.sources import HUGGING_FACE, open_source
from engram_jax.data.tokenizer import load_tokenizer, tokenizer_digest
from engram_jax.errors import UserError
from engram_jax.settings import from_dict
from engram_jax.storage import download, is_local, refusals


class _Remote:
    """A shard in object storage; copied to this disk, for good, when it is first read."""

    def __init__(self, path: epath.Path, copy: pathlib.Path, dtype: str, size: int):
        self._path, self._copy, self._dtype, self._size = path, copy, dtype, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> np.ndarray:
        return self._ids[part]

    @functools.cached_property
    def _ids(self) -> np.ndarray:
        if not self._copy.exists():
            download(self._path, self._copy)
        try:
            return _mapped(self._copy, self._dtype, self._size)
        except UserError:
            self._copy.unlink(missing_ok=True)  # so that the next start copies it again
            raise


class TokenStream:
    """A long row of token ids in memory-mapped shards."""

    def __init__(self, shards: Sequence[np.ndarray | _Remote]):
        self._shards = shards
        self._ends = np.cumsum([0] + [len(shard) for shard in shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids start..stop-1, int32 [stop - start], 0 <= start <= stop <= len."""
        parts = [shard[max(start - begin, 0):max(stop - begin, 0)]
                 for shard, begin in zip(self._shards, self._ends, strict=False)
                 if begin < stop and start < begin + len(shard)]
        return np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenData:
    """A packed text; all but `directory` is its meta.json.

    Attributes:
      fingerprint: of the text (`sources.TextSummary`).
      tokenizer_digest: hex sha256 of tokenizer.json.
      vocab_size: ids are below it.
      end_id: the token after each document; one that follows it starts a document.
      pad_id: the token that fills up what is not there.
      documents: in both splits.
      dtype: of the shards, "uint16" or "uint32".
      train_shards, validation_shards: tokens in each shard.
      train_bytes, validation_bytes: UTF-8 bytes of the text in each split.
    """

    directory: str
    fingerprint: str
    tokenizer_digest: str
    vocab_size: int
    end_id: int
    pad_id: int
    documents: int
    dtype: str
    train_shards: tuple[int, ...]
    validation_shards: tuple[int, ...]
    train_bytes: int
    validation_bytes: int

    @property
    def train_tokens(self) -> int:
        """Tokens to train on, end tokens counted."""
        return sum(self.train_shards)

    @property
    def validation_tokens(self) -> int:
        """Tokens kept for validation, end tokens counted."""
        return sum(self.validation_shards)

    @property
    def validation_bytes_per_token(self) -> float:
        """UTF-8 bytes a token: bits per byte = nats a token / ln 2 / this."""
        return self.validation_bytes / max(self.validation_tokens, 1)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that packed the text."""
        return Tokenizer.from_str((epath.Path(self.directory) / "tokenizer.json").read_text())

    @functools.cached_property
    def train(self) -> TokenStream:
        """The training stream."""
        return TokenStream(self._shards("train", self.train_shards))

    @functools.cached_property
    def validation(self) -> TokenStream:
        """The validation stream; shares no text with `train`."""
        return TokenStream(self._shards("validation", self.validation_shards))

    def _shards(self, split: str, sizes: Sequence[int]) -> list[np.ndarray | _Remote]:
        folder = epath.Path(self.directory)
        paths = [folder / packing.shard_name(split, number) for number in range(len(sizes))]
        if is_local(folder):
            return [_mapped(path, self.dtype, size)
                    for path, size in zip(paths, sizes, strict=True)]
        with refusals(folder, "read"):
            there = {entry.name for entry in folder.iterdir()}
        for path in paths:
            if path.name not in there:
                raise UserError(f"{path}: is missing")
        copies = download_folder() / cache_key(
            self.directory, self.fingerprint, self.tokenizer_digest,
            self.train_shards, self.validation_shards)
        return [_Remote(path, copies / path.name, self.dtype, size)
                for path, size in zip(paths, sizes, strict=True)]


def _mapped(path: epath.PathLike, dtype: str, size: int) -> np.ndarray:
    """A shard of this disk, checked."""
    try:
        shard: np.ndarray = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: is missing, truncated or no NumPy array of token ids "
                        f"({error})") from error
    if shard.dtype != dtype or shard.shape != (size,):
        raise UserError(f"{path}: holds {shard.dtype} {shard.shape}, but meta.json says "
                        f"{dtype} ({size},)")
    return shard


def open_tokens(config: DataConfig,
                progress: Callable[[str], None] | None = None) -> TokenData:
    """The packed text that `config` names; tokenizes and packs it if the cache does not hold it.

    A folder of token shards is used as it is; `config.tokenizer` then does not matter.

    Args:
      progress: gets one line at the start of each stage that takes time.

    Raises:
      UserError: see `sources`, `load_tokenizer` and `open_packed`.
      MachineError: the text cannot be read or the cache cannot be written.
    """
    if (ready := _ready_folder(config.path)) is not None:
        try:
            return open_packed(ready)
        except UserError as error:
            raise UserError(f"data.path = {config.path!r}: not a whole folder of token shards: "
                            f"{error}") from error
    source = open_source(config)
    tokenizer = load_tokenizer(config, source, progress)
    key = cache_key(source.fingerprint, tokenizer_digest(tokenizer), config.validation_fraction)
    place = cache_folder(config) / "tokens" / key
    with contextlib.suppress(UserError):  # not there, or damaged: pack it
        return open_packed(place)
    say = progress or (lambda line: None)
    say(f"tokenizing {source.amount}")
    with working_folder(config) as folder:
        names = packing.pack(source, tokenizer, config.validation_fraction, folder)
        publish(folder, place, names)
    data = open_packed(place)
    say(f"packed {data.train_tokens:,} tokens to train on and {data.validation_tokens:,} to "
        f"validate on into {place}")
    return data


def open_packed(folder: epath.PathLike) -> TokenData:
    """A folder of token shards, checked: every file there, of the right length and dtype.

    Raises:
      UserError: it is not whole; the line names the file.
    """
    place = epath.Path(folder)
    try:
        values = json.loads((place / "meta.json").read_text())
        digest = hashlib.sha256((place / "tokenizer.json").read_bytes()).hexdigest()
    except (OSError, ValueError) as error:
        raise UserError(f"{place}: meta.json or tokenizer.json is missing or unreadable "
                        f"({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{place / 'meta.json'}: must be an object with fields")
    where = f"{place / 'meta.json'}: "
    data: TokenData = from_dict({**values, "directory": os.fspath(place)}, TokenData, where)
    if digest != data.tokenizer_digest:
        raise UserError(f"{place / 'tokenizer.json'}: its sha256 is {digest}, but meta.json says "
                        f"{data.tokenizer_digest}")
    for field in ("end_id", "pad_id"):
        if not 0 <= getattr(data, field) < data.vocab_size:
            raise UserError(f"{where}{field} = {getattr(data, field)}: must be below vocab_size "
                            f"= {data.vocab_size}")
    if data.dtype not in ("uint16", "uint32"):
        raise UserError(f"{where}dtype = {data.dtype!r}: must be uint16 or uint32")
    opened = len(data.train), len(data.validation)
    assert opened == (data.train_tokens, data.validation_tokens)
    return data


def _ready_folder(path: str) -> epath.Path | None:
    """The folder that `path` names if it is one of token shards, whole or not."""
    if path == "stdlib" or path.startswith(HUGGING_FACE):
        return None
    place = epath.Path(path).expanduser()
    with contextlib.suppress(Exception):  # `open_source` has the words for it
        if place.is_dir() and any(entry.suffix == ".npy" or entry.name == "meta.json"
                                  for entry in place.iterdir()):
            return place
    return None
