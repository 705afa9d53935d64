"""The tokenizer of a run: a byte-level BPE trained on the text, or anybody's tokenizer.json."""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from etils import epath
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engram_jax.config import DataConfig
from engram_jax.data.cache import cache_folder, cache_key, publish, working_folder
from engram_jax.data.sources import Source
from engram_jax.errors import UserError
from engram_jax.storage import check_readable

PIECE_CHARACTERS = 2**20
TRAINED_ON_CHARACTERS = 2**30  # the first of the text

END_TOKEN, PAD_TOKEN = "<|end|>", "<|pad|>"
SMALLEST_BPE = 256 + len((END_TOKEN, PAD_TOKEN))
# In order of preference: some tokenizers have several, the later ones for other uses.
END_TOKENS = ("<｜end▁of▁sentence｜>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>",
              "<|eos|>", "<EOS>", "[EOS]", "[SEP]", END_TOKEN)
PAD_TOKENS = (PAD_TOKEN, "<｜▁pad▁｜>", "<pad>", "[PAD]", "<PAD>", "<|padding|>",
              "<|finetune_right_pad_id|>")


def load_tokenizer(config: DataConfig, source: Source,
                   progress: Callable[[str], None] | None = None) -> Tokenizer:
    """The tokenizer that `config.tokenizer` names, without truncation and padding.

    Args:
      source: the text that "bpe:SIZE" is trained on, once for each text and size.
      progress: gets a line before a training.

    Raises:
      UserError: a size that is too small, a file that is no tokenizer, an unknown hub name.
      MachineError: the cache cannot be written.
    """
    name = config.tokenizer
    check_readable(name, "data.tokenizer")
    if name.startswith("bpe:"):
        tokenizer = _own_bpe(config, source, progress)
    else:
        try:
            tokenizer = _named(name)
        except Exception as error:  # the library raises nothing narrower
            reason = (str(error).splitlines() or [""])[0]
            raise UserError(f"data.tokenizer = {name!r}: must be bpe:SIZE, a tokenizer.json, a "
                            f"folder that holds one or a hub name: {reason}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _named(name: str) -> Tokenizer:
    place = epath.Path(name).expanduser()
    if place.is_dir():
        place = place / "tokenizer.json"
    elif not place.exists() and not re.search(r"^[.~/]|\.json$|://", name):
        return Tokenizer.from_pretrained(name)
    return Tokenizer.from_str(place.read_text())


def _own_bpe(config: DataConfig, source: Source,
             progress: Callable[[str], None] | None) -> Tokenizer:
    text = config.tokenizer.removeprefix("bpe:")
    size = int(text) if text.isdecimal() else 0
    if size < SMALLEST_BPE:
        raise UserError(f"data.tokenizer = {config.tokenizer!r}: must be bpe:SIZE with a size of "
                        f"at least {SMALLEST_BPE} (all bytes, the end and the pad token)")
    name = cache_key(source.fingerprint, size) + ".json"
    place = cache_folder(config) / "tokenizers"
    with contextlib.suppress(Exception):  # not there, or not whole: train it
        return Tokenizer.from_str((place / name).read_text())
    if progress is not None:
        progress(f"training a tokenizer of {size} tokens on {source.amount}")
    tokenizer = train_bpe(source.documents(), size)
    with working_folder(config) as folder:
        (folder / name).write_text(tokenizer.to_str(), encoding="utf-8")
        publish(folder, place, [name])
    return tokenizer


def train_bpe(texts: Iterable[str], size: int) -> Tokenizer:
    """A byte-level BPE of at most `size` tokens; ids 0 and 1 are its end and pad tokens.

    The same texts give the same tokenizer. It encodes any text and loses nothing.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END_TOKEN, PAD_TOKEN], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(_first_pieces(texts), trainer)
    return tokenizer


def _first_pieces(texts: Iterable[str]) -> Iterator[str]:
    room = TRAINED_ON_CHARACTERS
    for text in texts:
        for piece in pieces(text):
            if room <= 0:
                return
            yield piece
            room -= len(piece)


def pieces(text: str) -> Iterator[str]:
    """`text` in parts of at most PIECE_CHARACTERS, cut after a line where there is one.

    Parts are tokenized by themselves: many at a time, and in bounded memory. A cut may change the
    tokens beside it, one in several hundred thousand.
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        line = text.rfind("\n", start, start + PIECE_CHARACTERS) + 1
        stop = line if line > start else start + PIECE_CHARACTERS
        yield text[start:stop]
        start = stop
    yield text[start:]


def find_end_id(tokenizer: Tokenizer) -> int:
    """Id of the token that ends a document, found by the names that are in use.

    Raises:
      UserError: the tokenizer has none of them.
    """
    found = _first_token(tokenizer, END_TOKENS)
    if found is None:
        raise UserError("data.tokenizer: has no token to end a document with; it needs one of "
                        f"{' '.join(END_TOKENS)}")
    return found


def find_pad_id(tokenizer: Tokenizer) -> int:
    """Id of the padding token; the end token's where there is none."""
    found = _first_token(tokenizer, PAD_TOKENS)
    return find_end_id(tokenizer) if found is None else found


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
