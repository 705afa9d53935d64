"""Golden files of released modules, and what their `meta` says, in our words."""

import json
import math
import os
import pathlib

import numpy as np
import pytest

from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.hashing.ngrams import NgramHash
from engram_jax.hashing.token_hash import TokenHash
from engram_jax.interop import safetensors

CLOSE = 2e-5  # of the largest output
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


def qwen_checkpoint(folder, meta, weights, parts=0, scale=None):
    """A checkpoint with golden weights, as the released model has it: its folder.

    `parts` cuts the table; `scale` keeps it in fp8, divided by that number.
    """
    folder.mkdir()
    fields = ("vocab_size", "hidden_size", "hc_count", "ple_embed_dim", "ngram_size", "seed",
              "heads_per_ngram", "ngram_vocab_size_base", "ple_layer_ids", "eos_token_id",
              "rms_norm_eps")
    text = {**{name: meta[name] for name in fields}, "ple_conv_kernel_size": meta["conv_kernel"]}
    if parts:
        text["split_ngram_parts"] = parts
    (folder / "config.json").write_text(json.dumps({"text_config": text}))
    layer = sorted(meta["ple_layer_ids"])[meta["layer_index"]] - 1
    prefix, tensors = f"model.language_model.layers.{layer}.ple.", dict(weights)
    table = tensors.pop("ple_embedding.ngram_embedding.weight")
    name = "ple_embedding.ngram_embedding"
    if scale is not None:
        table = (table / np.float32(scale)).astype(safetensors.DTYPES["F8_E4M3"])
        tensors[f"{name}.weight_scale"] = np.array(scale, np.float32)
    if parts:
        rows = math.ceil(len(table) / parts)
        for part in range(parts):
            tensors[f"{name}.shard_{part}.weight"] = table[part * rows:(part + 1) * rows]
    else:
        tensors[f"{name}.weight"] = table
    safetensors.save(folder / "model.safetensors",
                     {prefix + name: tensor for name, tensor in tensors.items()})
    return folder
