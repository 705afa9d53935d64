"""Digests of a tokenizer, by which a run knows it again."""

import hashlib
import json
from typing import Any

from tokenizers import Tokenizer


def whole_digest(tokenizer: Tokenizer) -> str:
    """Hex sha256 of all that a tokenizer does: its merges and rules, not its words alone.

    What is off or empty is left out: a newer version of the library may write it, an older may not.
    """
    return _digest(_set(json.loads(tokenizer.to_str())))


def vocabulary_digest(tokenizer: Tokenizer) -> str:
    """Hex sha256 of a tokenizer's words with their ids, all that version 0.1.0 digested."""
    return _digest(sorted(tokenizer.get_vocab().items()))


def _set(values: Any) -> Any:
    """The plain values without the fields that are off or empty."""
    if isinstance(values, dict):
        return {name: _set(value) for name, value in values.items()
                if not (value is None or value is False or value == [] or value == {})
                and name != "version"}
    return [_set(value) for value in values] if isinstance(values, list) else values


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
