"""Engram: conditional memory for language models, on JAX meshes.

The names below are what other people's models reach for, each with its section in docs/parts.md;
they stay. What is not among them is free to change. They are imported when asked for, so that
`import engram_jax` alone does not start jax.
"""

from typing import TYPE_CHECKING

from engram_jax.faces import face

if TYPE_CHECKING:
    from engram_jax.config import EngramConfig
    from engram_jax.errors import UserError
    from engram_jax.hashing.addressing import Addressing, address
    from engram_jax.hashing.compression import CompressedVocabulary
    from engram_jax.hashing.ngrams import NgramHash
    from engram_jax.model.engram import fuse, init_engram
    from engram_jax.model.linen import Engram, EngramFusion
    from engram_jax.offload.prefetch import HostRows
    from engram_jax.tables.memory import Memory
    from engram_jax.tables.row_optimizers import (
        balanced_momentum,
        dense_adam,
        row_adagrad,
        row_adam,
        row_rmsprop,
    )

__version__ = "0.1.0"

_MODULES = {
    "Addressing": "hashing.addressing",
    "CompressedVocabulary": "hashing.compression",
    "Engram": "model.linen",
    "EngramConfig": "config",
    "EngramFusion": "model.linen",
    "HostRows": "offload.prefetch",
    "Memory": "tables.memory",
    "NgramHash": "hashing.ngrams",
    "UserError": "errors",
    "address": "hashing.addressing",
    "balanced_momentum": "tables.row_optimizers",
    "dense_adam": "tables.row_optimizers",
    "fuse": "model.engram",
    "init_engram": "model.engram",
    "row_adagrad": "tables.row_optimizers",
    "row_adam": "tables.row_optimizers",
    "row_rmsprop": "tables.row_optimizers",
}

__all__ = [
    "Addressing",
    "CompressedVocabulary",
    "Engram",
    "EngramConfig",
    "EngramFusion",
    "HostRows",
    "Memory",
    "NgramHash",
    "UserError",
    "address",
    "balanced_momentum",
    "dense_adam",
    "fuse",
    "init_engram",
    "row_adagrad",
    "row_adam",
    "row_rmsprop",
]

__getattr__, __dir__ = face(__name__, _MODULES)
