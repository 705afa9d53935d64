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

Every file is checked: shards against their checksums in meta.json and the tokenizer's size when
they are opened for the first time after they have been written, ids whenever they are read.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from etils import epath
from tokenizers import Tokenizer

from engram_jax.config import DataConfig, require
from engram_jax.data import packing, remembered
from engram_jax.data.cache import (
    cache_folder,
    cache_key,
    download_folder,
    publish,
    working_folder,
)
from engram_jax.data.encoding import cores
from engram_jax.data.hugging_face import PREFIX
from engram_jax.data.read_ahead import TextAhead
from engram_jax.data.reading import Unreadable, json_value
from engram_jax.data.shards import Shard, ShardInfo, TokenStream, shard_name
from engram_jax.data.sources import Source, open_source
from engram_jax.data.tokenizer import (
    load_tokenizer,
    parse_tokenizer,
    ready_tokenizer,
    tokenizer_digest,
)
from engram_jax.errors import UserError
from engram_jax.settings import from_dict
from engram_jax.storage import is_local, refusals


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenData:
    """A packed text; all but `directory` and `revision` is its meta.json.

    Attributes:
      fingerprint: of the text (`read_ahead`, `packing`).
      tokenizer_digest: hex sha256 of tokenizer.json.
      vocab_size: ids are below it.
      end_id: the token after each document; one that follows it starts a document.
      pad_id: the token that fills up what is not there.
      documents: in both splits.
      dtype: of the shards, "uint16" or "uint32".
      split: the rule that chose the validation text (`splitting`).
      train_shards, validation_shards: tokens in each shard.
      train_sha256, validation_sha256: hex sha256 of each shard's ids.
      train_bytes, validation_bytes: UTF-8 bytes of the text in each split.
      sha256: of the other fields (`packing.meta_digest`).
      revision: the commit of a dataset of the Hugging Face hub; "" for other text.
    """

    directory: str
    fingerprint: str
    tokenizer_digest: str
    vocab_size: int
    end_id: int
    pad_id: int
    documents: int
    dtype: str
    split: str
    train_shards: tuple[int, ...]
    validation_shards: tuple[int, ...]
    train_sha256: tuple[str, ...]
    validation_sha256: tuple[str, ...]
    train_bytes: int
    validation_bytes: int
    sha256: str
    revision: str = ""

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
        path = epath.Path(self.directory) / "tokenizer.json"
        try:
            return parse_tokenizer(path.read_bytes().decode())
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error

    @functools.cached_property
    def train(self) -> TokenStream:
        """The training stream."""
        return TokenStream(self.shards("train"))

    @functools.cached_property
    def validation(self) -> TokenStream:
        """The validation stream; shares no text with `train`."""
        return TokenStream(self.shards("validation"))

    def shards(self, split: str) -> list[Shard]:
        """The files of a split in their order."""
        folder = epath.Path(self.directory)
        infos = map(ShardInfo, getattr(self, f"{split}_shards"), getattr(self, f"{split}_sha256"))
        copies = download_folder() / cache_key(self.directory, self.sha256)
        return [Shard(folder / name, self.dtype, info, self.vocab_size, copies / name)
                for number, info in enumerate(infos) for name in [shard_name(split, number)]]


def open_tokens(config: DataConfig, progress: Callable[[str], None] | None = None,
                processes: int = 0) -> TokenData:
    """The packed text that `config` names; tokenizes and packs it if the cache does not hold it.

    A folder of token shards is used as it is; `config.tokenizer` then does not matter.

    Args:
      progress: gets one line at the start of each stage that takes time.
      processes: to tokenize in, which does not change a bit; 0 is one for each core.

    Raises:
      UserError: see `sources`, `load_tokenizer` and `open_packed`.
      MachineError: the text cannot be read or the cache cannot be written.
    """
    if (ready := _ready_folder(config)) is not None:
        try:
            return open_packed(ready)
        except UserError as error:
            raise UserError(f"data.path = {config.path!r}: not a whole folder of token shards: "
                            f"{error}") from error
    say = progress or (lambda line: None)
    source = open_source(config)
    stamp = remembered.stamp(source)
    data = None
    if (before := remembered.recall(config, stamp)) is not None:
        tokenizer = ready_tokenizer(config, before.trained_on)
        data = tokenizer and _kept(config, before.fingerprint, tokenizer, say)
    if data is None:
        data = _packed(config, source, stamp, say, processes)
    return dataclasses.replace(data, revision=source.revision)


def _packed(config: DataConfig, source: Source, stamp: object, say: Callable[[str], None],
            processes: int) -> TokenData:
    """The text, read and packed unless the cache holds it from another place."""
    with working_folder(config) as folder, contextlib.closing(TextAhead(source, folder)) as text:
        tokenizer = load_tokenizer(config, text, say)
        data = _kept(config, text.fingerprint, tokenizer, say) if text.whole else None
        if data is None:
            say(f"tokenizing {text.amount}")
            fingerprint, names = packing.pack(
                text, tokenizer, config.validation_fraction, folder, processes)
            target = _target(config, fingerprint, tokenizer)
            publish(folder, target, names)
            data = open_packed(target)
            say(f"packed {data.train_tokens:,} tokens to train on and {data.validation_tokens:,} "
                f"to validate on into {target}")
        remembered.remember(config, source, stamp, remembered.Known(
            data.fingerprint, text.fingerprint))
    return data


def _target(config: DataConfig, fingerprint: str, tokenizer: Tokenizer) -> epath.Path:
    key = cache_key(fingerprint, tokenizer_digest(tokenizer), config.validation_fraction)
    return cache_folder(config) / "tokens" / key


def _kept(config: DataConfig, fingerprint: str, tokenizer: Tokenizer,
          say: Callable[[str], None]) -> TokenData | None:
    """What the cache holds, whole; None where it has to be packed."""
    target = _target(config, fingerprint, tokenizer)
    try:
        return open_packed(target)
    except UserError as error:
        if (target / "meta.json").exists():
            say(f"packing again what is damaged: {error}")
        return None


def open_packed(folder: epath.PathLike) -> TokenData:
    """A folder of token shards, checked: every file there, and what meta.json says.

    Shards in object storage are checked when they are copied to this disk.

    Raises:
      UserError: it is not whole; the line names the file.
    """
    path = epath.Path(folder)
    data = _read_meta(path)
    shards = [*data.shards("train"), *data.shards("validation")]
    if is_local(path):
        with ThreadPoolExecutor(cores()) as threads:
            for _ in threads.map(Shard.check, shards):
                pass
        return data
    with refusals(path, "read"):
        there = {entry.name for entry in path.iterdir()}
    for shard in shards:
        if shard.path.name not in there:
            raise UserError(f"{shard.path}: is missing")
    return data


def _read_meta(path: epath.Path) -> TokenData:
    try:
        values = json_value((path / "meta.json").read_bytes().decode())
        digest = hashlib.sha256((path / "tokenizer.json").read_bytes()).hexdigest()
    except (OSError, UnicodeDecodeError, Unreadable) as error:
        raise UserError(f"{path}: meta.json or tokenizer.json is missing or unreadable "
                        f"({error})") from error
    where = f"{path / 'meta.json'}: "
    if not isinstance(values, dict):
        raise UserError(f"{where}must be an object with fields")
    for field in ("directory", "revision"):
        require(field not in values, f"{where}{field}", values.get(field), "is no field of it")
    data: TokenData = from_dict({**values, "directory": os.fspath(path)}, TokenData, where)
    if digest != data.tokenizer_digest:
        raise UserError(f"{path / 'tokenizer.json'}: its sha256 is {digest}, but meta.json says "
                        f"{data.tokenizer_digest}")
    _check_meta(data, where)
    require(data.sha256 == packing.meta_digest(values), f"{where}sha256", data.sha256,
            "is not that of its other fields; they have been changed")
    return data


def _check_meta(data: TokenData, where: str) -> None:
    for field in ("end_id", "pad_id"):
        require(0 <= getattr(data, field) < data.vocab_size, f"{where}{field}",
                getattr(data, field), f"must be below vocab_size = {data.vocab_size}")
    require(data.dtype in ("uint16", "uint32"), f"{where}dtype", data.dtype,
            "must be uint16 or uint32")
    for split in packing.SPLITS:
        sizes: Sequence[int] = getattr(data, f"{split}_shards")
        require(len(sizes) == len(getattr(data, f"{split}_sha256")), f"{where}{split}_shards",
                list(sizes[:8]), f"must be as many as {split}_sha256")
        require(all(size > 0 for size in sizes), f"{where}{split}_shards", list(sizes[:8]),
                "must be positive")


def _ready_folder(config: DataConfig) -> epath.Path | None:
    """The folder that `data.path` names if it is one of token shards, whole or not."""
    if config.mixture or config.path == "stdlib" or config.path.startswith(PREFIX):
        return None
    path = epath.Path(config.path).expanduser()
    with contextlib.suppress(Exception):  # `open_source` has the words for it
        if path.is_dir() and any(entry.suffix == ".npy" or entry.name == "meta.json"
                                 for entry in path.iterdir()):
            return path
    return None
