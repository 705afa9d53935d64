"""Tokens to row ids: vocabularies, the hash of n-grams, and which tables a model has.

What is named here has its section in docs/parts.md, and stays.
"""

from typing import TYPE_CHECKING

from engram_jax.faces import face

if TYPE_CHECKING:
    from engram_jax.hashing.addressing import Addressing, address
    from engram_jax.hashing.artifact import HashArtifact, read_artifact
    from engram_jax.hashing.compression import CompressedVocabulary
    from engram_jax.hashing.host import HostHash
    from engram_jax.hashing.ngrams import NgramHash, reach_from_dead, reach_from_documents
    from engram_jax.hashing.token_hash import BEFORE, TokenHash

_MODULES = {
    "BEFORE": "token_hash",
    "Addressing": "addressing",
    "CompressedVocabulary": "compression",
    "HashArtifact": "artifact",
    "HostHash": "host",
    "NgramHash": "ngrams",
    "TokenHash": "token_hash",
    "address": "addressing",
    "read_artifact": "artifact",
    "reach_from_dead": "ngrams",
    "reach_from_documents": "ngrams",
}

__all__ = [
    "BEFORE",
    "Addressing",
    "CompressedVocabulary",
    "HashArtifact",
    "HostHash",
    "NgramHash",
    "TokenHash",
    "address",
    "reach_from_dead",
    "reach_from_documents",
    "read_artifact",
]

__getattr__, __dir__ = face(__name__, _MODULES)
