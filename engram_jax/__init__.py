"""Engram: conditional memory for language models, on JAX meshes.

The names below are what other people's models reach for first; they are imported when asked for,
so that `import engram_jax` alone does not start jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engram_jax.config import EngramConfig
    from engram_jax.hashing.compression import CompressedVocabulary
    from engram_jax.hashing.ngrams import NgramHash
    from engram_jax.model.engram import Engram

__version__ = "0.1.0"

__all__ = ["CompressedVocabulary", "Engram", "EngramConfig", "NgramHash"]

_HOMES = {
    "CompressedVocabulary": "engram_jax.hashing.compression",
    "Engram": "engram_jax.model.engram",
    "EngramConfig": "engram_jax.config",
    "NgramHash": "engram_jax.hashing.ngrams",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
