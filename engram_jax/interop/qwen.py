"""Qwen3.8-Flash-Next's n-gram memory (transformers' `qwen4_exp`), from its checkpoint.

    PREFIX.ple.ple_embedding.ngram_embedding.shard_I.weight   parts of the table, or one `.weight`
    PREFIX.ple.ple_embedding.ngram_embedding.weight_scale     of an fp8 table: one number
    PREFIX.ple.{key_proj,value_proj,conv1d}.weight
    PREFIX.ple.norm_{key,query,conv}.weight                   gains, stored minus one
    PREFIX.ple.ple_embedding.layer_multipliers                of the hash, and
    PREFIX.ple.ple_embedding.ngram_heads_vocab_sizes          its primes, where they are kept

Shapes: M streams, D width, E width of what a token retrieves, L taps of the convolution.
"""

import contextlib
import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from engram_jax.config import EngramConfig, require
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.hashing.ngrams import NgramHash
from engram_jax.hashing.token_hash import TokenHash
from engram_jax.hashing.variants import HashNumbers
from engram_jax.interop.deepseek import LONGEST_NGRAM
from engram_jax.interop.released import Released, Weights, read_json
from engram_jax.interop.safetensors import Tensor, Tensors, open_tensors
from engram_jax.interop.shards import Part, ShardTable
from engram_jax.offload.home import Home

_TABLE = "ple.ple_embedding.ngram_embedding"
_SCALES = ("weight_scale", "weight_scale_inv", "scale")  # all are factors of the values
_WHOLE = ("vocab_size", "hidden_size", "hc_count", "ple_embed_dim", "ngram_size",
          "heads_per_ngram", "ngram_vocab_size_base", "make_ngram_vocab_size_divisible_by",
          "ple_conv_kernel_size", "seed")
_DEFAULTS = {"hc_count": 4, "ple_conv_kernel_size": 4, "ngram_size": 3, "heads_per_ngram": 8,
             "ngram_vocab_size_base": 20_000_000, "seed": 1234, "rms_norm_eps": 1e-6,
             "make_ngram_vocab_size_divisible_by": 128}


def open_qwen(folder: str | os.PathLike[str]) -> Released:
    """The memory of a Qwen checkpoint; reads its small weights, and of its tables the headers.

    Args:
      folder: with config.json and safetensors, as `save_pretrained` writes them.

    Raises:
      UserError: a config without such a memory, or tensors that are missing or of other shapes.
      MachineError: something cannot be read.
    """
    path = Path(folder).expanduser()
    values = _values(path / "config.json")
    tensors = open_tensors(path)
    config, hashing = _settings(values)
    hashing = _with_numbers(hashing, tensors)
    memory = TokenHash(hashing=hashing, end_id=values["eos_token_id"],
                       vocabulary=CompressedVocabulary.identity(values["vocab_size"]))
    params: dict[int, Weights] = {}
    tables: dict[int, Home] = {}
    with contextlib.ExitStack() as opened:
        for layer in config.layers:
            prefix = _prefix(tensors, layer)
            parts, scale = _parts(tensors, prefix, values.get("split_ngram_parts"))
            params[layer] = _weights(tensors, prefix, values, config, scale)
            columns = parts[0].weight.shape[1]
            require(columns == config.head_dim, f"columns of {parts[0].weight.name}", columns,
                    f"must be {config.head_dim}")
            tables[layer] = _table(parts, hashing.table_rows[layer],
                                   values["make_ngram_vocab_size_divisible_by"],
                                   memory.fingerprint)
            opened.callback(tables[layer].close)
        opened.pop_all()
    return Released(source="qwen3.8", config=config, width=values["hidden_size"],
                    streams=values["hc_count"], memory=memory, params=params, tables=tables)


def _values(path: Path) -> dict[str, Any]:
    """The config's fields of the text model, checked."""
    whole = read_json(path)
    given = whole.get("text_config", whole)
    require(isinstance(given, dict), f"{path}: text_config", given, "must be a JSON object")
    values = {**_DEFAULTS, **{name: value for name, value in given.items() if value is not None}}
    values.setdefault("ple_embed_dim", values.get("hidden_size"))
    for name in _WHOLE:
        require(type(values.get(name)) is int and values[name] >= (name != "seed"),
                f"{path}: {name}", values.get(name), "must be a whole number")
    require(type(values["rms_norm_eps"]) in (int, float), f"{path}: rms_norm_eps",
            values["rms_norm_eps"], "must be a number")
    ends = values.get("eos_token_id")
    values["eos_token_id"] = ends[0] if isinstance(ends, list) and ends else ends
    require(type(values["eos_token_id"]) is int, f"{path}: eos_token_id", ends,
            "must be a token id, or a list of them")
    layers = values.get("ple_layer_ids")
    require(isinstance(layers, list) and bool(layers) and all(
        type(layer) is int and layer >= 1 for layer in layers), f"{path}: ple_layer_ids", layers,
        "must name the layers with a memory, from 1 on")
    return values


def _settings(values: dict[str, Any]) -> tuple[EngramConfig, NgramHash]:
    orders, heads = values["ngram_size"] - 1, values["heads_per_ngram"]
    require(1 <= orders < LONGEST_NGRAM, "ngram_size", values["ngram_size"],
            f"must be at least 2, and at most {LONGEST_NGRAM}")
    require(values["ple_embed_dim"] % (orders * heads) == 0, "ple_embed_dim",
            values["ple_embed_dim"], f"must be a multiple of the {orders * heads} heads")
    layers = tuple(sorted({layer - 1 for layer in values["ple_layer_ids"]}))
    rows, end_id = (values["ngram_vocab_size_base"],) * orders, values["eos_token_id"]
    config = EngramConfig(
        layers=layers, rows_per_head=rows, max_order=orders + 1, heads=heads,
        head_dim=values["ple_embed_dim"] // (orders * heads), compress=False,
        hash_seed=values["seed"], kernel=values["ple_conv_kernel_size"],
        norm_eps=values["rms_norm_eps"], conv_norm_eps=values["rms_norm_eps"],
        vocab_size=values["vocab_size"], pad_id=end_id)
    hashing = NgramHash(rows_per_head=rows, heads=heads, layers=layers,
                        vocab_size=values["vocab_size"], pad_id=end_id, seed=values["seed"],
                        variant="qwen")
    return config, hashing


def _with_numbers(hashing: NgramHash, tensors: Tensors) -> NgramHash:
    """The hash with the numbers that a checkpoint keeps; as it is where it keeps none."""
    kinds = (".ple_embedding.layer_multipliers", ".ple_embedding.ngram_heads_vocab_sizes")
    if not any(name.endswith(kinds) for name in tensors):
        return hashing
    multipliers, primes = [], []
    for layer in hashing.layers:
        names = f"{_prefix(tensors, layer)}ple.ple_embedding."
        kept, sizes = (tensors[names + end] for end in (
            "layer_multipliers", "ngram_heads_vocab_sizes"))
        for tensor in (kept, sizes):
            require(tensor.dtype in ("I64", "I32"), f"{tensor.name}: dtype", tensor.dtype,
                    "must be I64 or I32")
        kept.require_shape(hashing.max_order)
        sizes.require_shape(hashing.total_heads)
        multipliers.append(tuple(kept.read().tolist()))
        sizes_OK = sizes.read().reshape(hashing.max_order - 1, hashing.heads)
        primes.append(tuple(map(tuple, sizes_OK.tolist())))
    return dataclasses.replace(hashing, numbers=HashNumbers(
        multipliers=tuple(multipliers), primes=tuple(primes)))


def _table(parts: list[Part], rows: int, multiple: int, fingerprint: str) -> ShardTable:
    """A layer's table, whose rows are padded to a multiple."""
    there, padded = sum(part.weight.shape[0] for part in parts), -(-rows // multiple) * multiple
    require(there == padded, f"{parts[0].weight.path}: rows of {parts[0].weight.name} and its "
            "other parts", there, f"the primes sum to {rows}, which is {padded} with padding")
    return ShardTable(parts, rows, fingerprint)


def _prefix(tensors: Tensors, layer: int) -> str:
    """What the names of a layer's tensors begin with, up to "ple."."""
    pattern = re.compile(rf"((?:.*\.)?layers\.{layer}\.){re.escape(_TABLE)}\..*weight")
    prefixes = sorted({match[1] for name in tensors if (match := pattern.fullmatch(name))})
    require(len(prefixes) == 1, f"tensors of layer {layer}'s n-gram table", prefixes,
            f"must be of one layer, named ...layers.{layer}.{_TABLE}")
    return prefixes[0]


def _parts(tensors: Tensors, prefix: str, count: Any) -> tuple[list[Part], float]:
    """The table's parts in order, and the scale of all its values."""
    table = f"{prefix}{_TABLE}"
    pattern = re.compile(rf"{re.escape(table)}\.shard_(\d+)\.weight")
    numbers = sorted(int(match[1]) for name in tensors if (match := pattern.fullmatch(name)))
    if numbers:
        require(f"{table}.weight" not in tensors, f"parts of {table}", len(numbers),
                "are there, and the table as one weight, too")
        require(numbers == list(range(len(numbers))), f"parts of {table}", len(numbers),
                f"part {next(i for i, n in enumerate([*numbers, -1]) if i != n)} is missing")
        weights = [tensors[f"{table}.shard_{number}.weight"] for number in numbers]
        require(count is None or count == len(weights), f"parts of {table}", len(weights),
                f"split_ngram_parts is {count}")
    else:
        weights = [tensors[f"{table}.weight"]]
    scales = [tensors[name] for name in (f"{table}.{end}" for end in _SCALES) if name in tensors]
    return [Part(weight) for weight in weights], _scale(weights[0], scales)


def _scale(weight: Tensor, scales: list[Tensor]) -> float:
    if weight.dtype != "F8_E4M3":
        require(not scales, f"scale of {weight.name}", weight.dtype, "has none")
        return 1.0
    require(len(scales) == 1, f"scales of {weight.name}", len(scales), "must be one for fp8")
    values = scales[0].floats()
    require(values.size == 1 and bool(np.isfinite(values).all()), scales[0].name, values.shape,
            "must be one finite number")
    return float(values.reshape(()))


def _weights(tensors: Tensors, prefix: str, values: dict[str, Any], config: EngramConfig,
             scale: float) -> Weights:
    """The fusion's weights; the table's scale goes to the projections, which are linear."""
    streams, width = values["hc_count"], values["hidden_size"]
    shapes = {"key_proj": (streams * width, config.memory_dim),
              "value_proj": (width, config.memory_dim),
              "conv1d": (streams * width, 1, config.kernel),
              "norm_key": (streams * width,), "norm_query": (streams * width,),
              "norm_conv": (streams * width,)}
    arrays = {}
    for name, shape in shapes.items():
        tensor = tensors[f"{prefix}ple.{name}.weight"]
        tensor.require_shape(*shape)
        arrays[name] = tensor.floats()
    keys_MDE = arrays["key_proj"].reshape(streams, width, config.memory_dim)
    project_KDE = np.concatenate([keys_MDE, arrays["value_proj"][None]])

    def gains(name: str) -> np.ndarray:
        return arrays[name].reshape(streams, width) + np.float32(1)

    return {"project": np.ascontiguousarray(project_KDE.swapaxes(1, 2)) * np.float32(scale),
            "key_gain": gains("norm_key"), "query_gain": gains("norm_query"),
            "conv_gain": gains("norm_conv"),
            "conv": np.ascontiguousarray(
                arrays["conv1d"][:, 0].T.reshape(config.kernel, streams, width))}
