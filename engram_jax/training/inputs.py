"""What a run reads: its packed text, and the addressing that its tokenizer gives its memories."""

import dataclasses
import hashlib
import json
from collections.abc import Callable

from engram_jax.config import RunConfig, require
from engram_jax.data.tokens import TokenData, open_tokens
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.memory.sites import Addressing, address


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Tokens, and tokens to row ids."""

    tokens: TokenData
    addressing: Addressing

    def fingerprints(self) -> dict[str, str]:
        """What a checkpoint must carry: digests of the tokenizer and of each memory's hash."""
        words = sorted(self.tokens.tokenizer.get_vocab().items())
        digest = hashlib.sha256(json.dumps(words).encode()).hexdigest()
        return {"tokenizer": digest, **self.addressing.fingerprints()}


def open_inputs(run: RunConfig, progress: Callable[[str], None] | None = None) -> Inputs:
    """Pack the run's text if need be, and build its addressing.

    Raises:
      UserError: bad data settings, or a vocabulary that the model is too small for.
    """
    tokens = open_tokens(run.data, progress)
    require(tokens.vocab_size <= run.model.vocab_size, "model.vocab_size", run.model.vocab_size,
            f"is too small for the tokenizer {run.data.tokenizer!r}, which has "
            f"{tokens.vocab_size} tokens")
    vocabulary = CompressedVocabulary.from_tokenizer(tokens.tokenizer)
    return Inputs(tokens, address(run.model, vocabulary, tokens.pad_id))
