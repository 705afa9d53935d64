"""The tokenizer of a run: a byte-level BPE trained on the text, or anybody's tokenizer.json."""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence

from etils import epath
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engram_jax.config import DataConfig
from engram_jax.data.cache import cache_folder, cache_key, publish, working_folder
from engram_jax.data.read_ahead import TextAhead
from engram_jax.data.splitting import pieces
from engram_jax.errors import UserError
from engram_jax.storage import check_readable, first_line

END_TOKEN, PAD_TOKEN = "<|end|>", "<|pad|>"
SMALLEST_BPE = 256 + len((END_TOKEN, PAD_TOKEN))
# In order of preference: some tokenizers have several, the later ones for other uses.
END_TOKENS = ("<｜end▁of▁sentence｜>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>",
              "<|eos|>", "<EOS>", "[EOS]", "[SEP]", END_TOKEN)
PAD_TOKENS = (PAD_TOKEN, "<｜▁pad▁｜>", "<pad>", "[PAD]", "<PAD>", "<|padding|>",
              "<|finetune_right_pad_id|>")


def load_tokenizer(config: DataConfig, text: TextAhead,
                   progress: Callable[[str], None] | None = None) -> Tokenizer:
    """The tokenizer that `config.tokenizer` names, as `parse_tokenizer` gives it.

    Args:
      text: what "bpe:SIZE" is trained on, once for each text and size.
      progress: gets a line before a training.

    Raises:
      UserError: a size that is too small, a file that is no tokenizer, an unknown hub name.
      MachineError: the cache cannot be written.
    """
    if (ready := ready_tokenizer(config, text.fingerprint)) is not None:
        return ready
    size = _bpe_size(config)
    if progress is not None:
        progress(f"training a tokenizer of {size} tokens on {text.amount}")
    tokenizer = train_bpe(text.documents(), size)
    name = cache_key(text.fingerprint, size)
    with working_folder(config) as folder:
        (folder / f"{name}.json").write_text(tokenizer.to_str(), encoding="utf-8")
        (folder / f"{name}.sha256").write_text(tokenizer_digest(tokenizer))
        publish(folder, cache_folder(config) / "tokenizers", [f"{name}.json", f"{name}.sha256"])
    return tokenizer


def ready_tokenizer(config: DataConfig, fingerprint: str) -> Tokenizer | None:
    """The tokenizer that `config.tokenizer` names, if it need not be trained.

    Args:
      fingerprint: of the text that it would be trained on.

    Raises:
      UserError: as `load_tokenizer`.
    """
    name = config.tokenizer
    check_readable(name, "data.tokenizer")
    if name.startswith("bpe:"):
        folder, key = cache_folder(config) / "tokenizers", cache_key(fingerprint, _bpe_size(config))
        with contextlib.suppress(Exception):  # not there, or not whole: train it
            tokenizer = parse_tokenizer((folder / f"{key}.json").read_bytes().decode())
            if tokenizer_digest(tokenizer) == (folder / f"{key}.sha256").read_text():
                return tokenizer
        return None
    try:
        return _named(name)
    except Exception as error:  # the library raises nothing narrower
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"data.tokenizer = {name!r}: must be bpe:SIZE, a tokenizer.json, a "
                        f"folder that holds one or a hub name: {reason}") from error


def parse_tokenizer(text: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json: the one reading of text, in training and everywhere.

    It neither truncates nor pads, and takes special tokens that a text spells out as ordinary text.

    Raises:
      ValueError: it is none, or has no tokens.
    """
    try:
        tokenizer = Tokenizer.from_str(text)
    except BaseException as error:  # a panic of the library is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise ValueError(f"is no tokenizer.json ({first_line(error)})") from error
    if not tokenizer.get_vocab():
        raise ValueError("has no tokens")
    return _plain(tokenizer)


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    """`tokenizer`, told to read text as `parse_tokenizer` says."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # not a part of its JSON
    return tokenizer


def _named(name: str) -> Tokenizer:
    path = epath.Path(name).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    elif not path.exists() and not re.search(r"^[.~/]|\.json$|://", name):
        return parse_tokenizer(Tokenizer.from_pretrained(name).to_str())
    return parse_tokenizer(path.read_bytes().decode())


def _bpe_size(config: DataConfig) -> int:
    text = config.tokenizer.removeprefix("bpe:")
    size = int(text) if text.isdecimal() and len(text) < 10 else 0
    if size < SMALLEST_BPE:
        raise UserError(f"data.tokenizer = {config.tokenizer!r}: must be bpe:SIZE with a size of "
                        f"at least {SMALLEST_BPE} (all bytes, the end and the pad token)")
    return size


def train_bpe(texts: Iterable[Iterable[str]], size: int) -> Tokenizer:
    """A byte-level BPE of at most `size` tokens; ids 0 and 1 are its end and pad tokens.

    The same texts give the same tokenizer. It encodes any text and loses nothing.

    Args:
      texts: each whole, or in blocks.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END_TOKEN, PAD_TOKEN], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(
        (piece for text in texts
         for piece in pieces([text] if isinstance(text, str) else text)), trainer)
    return _plain(tokenizer)


def find_end_id(tokenizer: Tokenizer) -> int:
    """Id of the token that ends a document, found by the names that are in use.

    Raises:
      UserError: the tokenizer has none of them.
    """
    end_id = _first_token(tokenizer, END_TOKENS)
    if end_id is None:
        raise UserError("data.tokenizer: has no token to end a document with; it needs one of "
                        f"{' '.join(END_TOKENS)}")
    return end_id


def find_pad_id(tokenizer: Tokenizer) -> int:
    """Id of the padding token; the end token's where there is none."""
    pad_id = _first_token(tokenizer, PAD_TOKENS)
    return find_end_id(tokenizer) if pad_id is None else pad_id


def _first_token(tokenizer: Tokenizer, names: Sequence[str]) -> int | None:
    """Id of the first name that is a special token, or else of the first that is a token."""
    special = {token.content: id_ for id_, token in tokenizer.get_added_tokens_decoder().items()
               if token.special}
    for name in names:
        if name in special:
            return int(special[name])
    ids = (tokenizer.token_to_id(name) for name in names)
    return next((int(id_) for id_ in ids if id_ is not None), None)


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Hex sha256 of the tokenizer's JSON."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
