"""What a run reads: its tokenizer with the addressing that it gives the memories, and its text."""

import dataclasses
from collections.abc import Callable

import numpy as np
from tokenizers import Tokenizer

from engram_jax import distributed
from engram_jax.config import RunConfig, require
from engram_jax.data.tokenizer import find_end_id, find_pad_id
from engram_jax.data.tokens import TokenData, open_tokens
from engram_jax.hashing.addressing import Addressing, address
from engram_jax.hashing.artifact import HashArtifact
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.runs.directory import RunDirectory
from engram_jax.runs.fingerprints import vocabulary_digest, whole_digest

MUCH_SMALLER = 0.75  # a tokenizer of this share of the model's vocabulary is worth a line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """All that it takes to read any text as the run does.

    Attributes:
      tokenizer: of the run.
      vocab_size: its ids are below it; the model may have room for more.
      end_id, pad_id: the token after each document, and the one that fills up.
      addressing: tokens to row ids.
    """

    tokenizer: Tokenizer
    vocab_size: int
    end_id: int
    pad_id: int
    addressing: Addressing

    def fingerprints(self) -> dict[str, str]:
        """What a checkpoint must carry: digests of the tokenizer and of each memory's hash."""
        return {"tokenizer": whole_digest(self.tokenizer),
                "vocabulary": vocabulary_digest(self.tokenizer),
                **self.addressing.fingerprints()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs(Reader):
    """A reader with the run's packed text."""

    tokens: TokenData


def open_reader(
    run: RunConfig, tokenizer: Tokenizer, artifact: HashArtifact | None = None
) -> Reader:
    """The reader of a run, for its tokenizer.

    Args:
      run: the run.
      tokenizer: of the run.
      artifact: what the run hashes with, where it is known; None derives it.

    Raises:
      UserError: the model's vocabulary is too small for the tokenizer, or the artifact is of
        another model or tokenizer.
    """
    size, pad_id = max(tokenizer.get_vocab().values()) + 1, find_pad_id(tokenizer)
    require(size <= run.model.vocab_size, "model.vocab_size", run.model.vocab_size,
            f"is too small for the tokenizer {run.data.tokenizer!r}, which has {size} tokens")
    if artifact is None:
        vocabulary = CompressedVocabulary.from_tokenizer(tokenizer)
        addressing = address(run.model, vocabulary, pad_id)
    else:
        addressing = artifact.addressing(run.model)
        for name, kept in addressing.vocabularies.items():
            require(kept.lookup.size == size, f"hash.json: token_map of {name!r}",
                    kept.lookup.size, f"tokens; the tokenizer has {size}")
    return Reader(tokenizer=tokenizer, vocab_size=size, end_id=find_end_id(tokenizer),
                  pad_id=pad_id, addressing=addressing)


def reader_of(records: RunDirectory) -> Reader:
    """The reader of a run that was trained, with the tokenizer and the hash that it keeps.

    Raises:
      UserError: no run, a file of it that is none, or as `open_reader`.
    """
    return open_reader(records.config(), records.tokenizer(), records.artifact())


def open_inputs(run: RunConfig, progress: Callable[[str], None] | None = None,
                artifact: HashArtifact | None = None) -> Inputs:
    """The run's text, packed if need be, and its reader; process 0 packs first.

    Args:
      run: the run.
      progress: told of what takes long.
      artifact: as in `open_reader`.

    Raises:
      UserError: bad data settings, or as `open_reader`.
    """
    with distributed.after_first("the packing of the text"):
        tokens = open_tokens(run.data, progress)
    reader = open_reader(run, tokens.tokenizer, artifact)
    if progress and reader.vocab_size < MUCH_SMALLER * run.model.vocab_size:
        progress(f"the tokenizer has {reader.vocab_size:,} tokens, model.vocab_size is "
                 f"{run.model.vocab_size:,}: the rest of embedding and head is never used "
                 f"(--set model.vocab_size={reader.vocab_size})")
    return Inputs(tokens=tokens, **vars(reader))


def validation_text(run: RunConfig, most: int, fingerprint: str = "") -> str:
    """The beginning of a run's validation text; a blank line between documents.

    Args:
      run: the run.
      most: tokens at most.
      fingerprint: of the text that it was trained on, if that is known.

    Raises:
      UserError: the text is another one now, or cannot be opened.
    """
    inputs = open_inputs(run)
    require(fingerprint in ("", inputs.tokens.fingerprint), "data.path", run.data.path,
            f"is not the text that {run.name} was trained on; name one with --text FILE")
    stream = inputs.tokens.validation
    tokens_N = stream.read(0, min(len(stream), most))
    documents = np.split(tokens_N, np.flatnonzero(tokens_N == inputs.end_id) + 1)
    return "\n\n".join(inputs.tokenizer.decode(ids.tolist()) for ids in documents if ids.size)
