"""Golden files of released modules, and what their `meta` says, in our words."""

import json
import os
import pathlib

import numpy as np
import pytest

from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.hashing.ngrams import NgramHash
from engram_jax.hashing.token_hash import TokenHash

GOLDEN = pathlib.Path(os.environ.get("ENGRAM_GOLDEN") or pathlib.Path(__file__).parent / "golden")


def golden_files(pattern):
    """The golden files of one kind, as parameters of a test."""
    return [pytest.param(path, id=path.name) for path in sorted(GOLDEN.glob(pattern))]


def arrays(path):
    """(meta, arrays, weights): weights without their "w."."""
    with np.load(path) as file:
        contents = {name: file[name] for name in file.files}
    meta = json.loads(str(contents.pop("meta")))
    weights = {name.removeprefix("w."): contents.pop(name) for name in list(contents)
               if name.startswith("w.")}
    return meta, contents, weights


def qwen_hash(meta):
    """The hash of Qwen's layer, and its number in the network."""
    layers = tuple(layer - 1 for layer in meta["ple_layer_ids"])
    orders = meta["ngram_size"] - 1
    hashing = NgramHash(
        rows_per_head=(meta["ngram_vocab_size_base"],) * orders, heads=meta["heads_per_ngram"],
        layers=layers, vocab_size=meta["vocab_size"], pad_id=meta["eos_token_id"],
        seed=meta["seed"], variant="qwen")
    memory = TokenHash(hashing=hashing, end_id=meta["eos_token_id"],
                       vocabulary=CompressedVocabulary.identity(meta["vocab_size"]))
    return memory, layers[meta["layer_index"]]
