"""DeepSeek-V4.1's memory from its checkpoint (docs/spec.md section 5).

    layers.L.engram.embed.weight  F8_E4M3 [rows, columns]
    layers.L.engram.embed.scale   F8_E8M0 [rows, columns / 32]
    layers.L.engram.wkv.weight    F8_E4M3 [(M + 1) D, E]: M keys, then the value
    layers.L.engram.wkv.scale     F8_E8M0, one for each block of it
    layers.L.engram.q_weight, k_weight [M, D]: gains

Shapes: M streams, D width, E width of what a token retrieves.
"""

import contextlib
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from engram_jax.config import EngramConfig, require
from engram_jax.errors import UserError
from engram_jax.hashing import artifact
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.hashing.ngrams import NgramHash
from engram_jax.hashing.token_hash import TokenHash
from engram_jax.interop.float8 import decode_blocks
from engram_jax.interop.released import Released, Weights, read_json
from engram_jax.interop.safetensors import Tensors, open_tensors
from engram_jax.interop.shards import Part, ShardTable
from engram_jax.offload.home import Home
from engram_jax.storage import refusals

NORM_EPS = 1e-20
LONGEST_NGRAM = 64  # tokens: a config that says more is a slip, and would cost its primes
# Each field, and what the config of DeepSeek's own inference code calls it.
_SPELLINGS = {
    "engram_layer_ids": (), "engram_num_embeddings": (), "engram_max_ngram_size": (),
    "engram_vocab_size": (), "engram_n_heads": (), "engram_head_dim": (),
    "engram_compressed_vocab_size": (), "engram_pad_token_id": ("engram_pad_id",),
    "hidden_size": ("dim",), "hc_mult": (), "vocab_size": ()}
_LISTS = ("engram_layer_ids", "engram_num_embeddings")


def open_deepseek(folder: str | os.PathLike[str],
                  hash_file: str | os.PathLike[str] | None = None) -> Released:
    """The memory of a V4.1 checkpoint; reads its small weights, and of its tables the headers.

    Args:
      folder: with config.json, safetensors and tokenizer.json.
      hash_file: what it hashes with, where it is known (`hashing/artifact.py`); None derives the
        token map from tokenizer.json.

    Raises:
      UserError: a config without such a memory, a tokenizer of another vocabulary, primes that do
        not sum to the rows, or tensors that are missing or of other shapes and dtypes.
      MachineError: something cannot be read.
    """
    path = Path(folder).expanduser()
    values = read_values(path / "config.json")
    config = _settings(values)
    memory = _memory(path, values, config, hash_file)
    tensors = open_tensors(path)
    params: dict[int, Weights] = {}
    tables: dict[int, Home] = {}
    with contextlib.ExitStack() as opened:
        for layer in config.layers:
            names, rows = f"{_prefix(tensors, layer)}engram.", memory.hashing.table_rows[layer]
            weight = tensors[f"{names}embed.weight"]
            require(weight.dtype == "F8_E4M3", f"{weight.name}: dtype", weight.dtype,
                    "must be F8_E4M3")
            weight.require_shape(rows, config.head_dim)
            part = Part(weight, tensors[f"{names}embed.scale"])
            tables[layer] = ShardTable([part], rows, memory.fingerprint)
            opened.callback(tables[layer].close)
            params[layer] = _weights(tensors, names, values, config)
        opened.pop_all()
    return Released(source="deepseek-v4.1", config=config, width=values["hidden_size"],
                    streams=values["hc_mult"], memory=memory, params=params, tables=tables)


def read_values(path: Path) -> dict[str, Any]:
    """The fields of a config that a memory needs, under the names that `_SPELLINGS` has first.

    Raises:
      UserError: a field that is missing, of another type, or given twice and differently.
    """
    whole = read_json(path)
    given = whole.get("text_config", whole)
    require(isinstance(given, dict), f"{path}: text_config", given, "must be a JSON object")
    values: dict[str, Any] = {}
    for name, others in _SPELLINGS.items():
        said = {other: given[other] for other in (name, *others) if other in given}
        require(bool(said), f"{path}: {name}", None,
                f"is missing{' (or ' + others[0] + ')' if others else ''}")
        require(len({repr(value) for value in said.values()}) == 1, f"{path}: {name}", said,
                "is given twice and differently")
        values[name] = next(iter(said.values()))
        numbers = values[name] if name in _LISTS else [values[name]]
        require(isinstance(numbers, list) and bool(numbers)
                and all(type(number) is int and number >= 0 for number in numbers),
                f"{path}: {name}", values[name],
                "must be a list of whole numbers" if name in _LISTS else "must be a whole number")
    dead = given.get("image_token_id", whole.get("image_token_id"))
    require(dead is None or type(dead) is int, f"{path}: image_token_id", dead,
            "must be a token id")
    values["image_token_id"] = dead
    return values


def _settings(values: dict[str, Any]) -> EngramConfig:
    orders = values["engram_max_ngram_size"] - 1
    require(1 <= orders < LONGEST_NGRAM, "engram_max_ngram_size", orders + 1,
            f"must be in 2..{LONGEST_NGRAM}")
    return EngramConfig(
        layers=tuple(values["engram_layer_ids"]),
        rows_per_head=(values["engram_vocab_size"],) * orders, max_order=orders + 1,
        heads=values["engram_n_heads"], head_dim=values["engram_head_dim"], kernel=0,
        norm_eps=NORM_EPS, vocab_size=values["vocab_size"], pad_id=values["engram_pad_token_id"])


def _memory(path: Path, values: dict[str, Any], config: EngramConfig,
            hash_file: str | os.PathLike[str] | None) -> TokenHash:
    """Tokens to rows, read or derived; refused where the config says otherwise."""
    if hash_file is not None:
        require(Path(hash_file).is_file(), "hash", os.fspath(hash_file), "there is no such file")
        kept = artifact.read_artifact(hash_file)
        require(set(kept.layers.values()) == set(config.layers), f"{hash_file}: layers",
                sorted(kept.layers.values()), f"must be {list(config.layers)}")
        memory = next(iter(kept.memories.values()))
        _require_alike(hash_file, memory, values, config)
    else:
        vocabulary = _token_map(path / "tokenizer.json")
        require(vocabulary.size == values["engram_compressed_vocab_size"],
                f"{path / 'tokenizer.json'}: canonical ids", vocabulary.size,
                f"engram_compressed_vocab_size is {values['engram_compressed_vocab_size']}: "
                "another tokenizer, or a library that normalises otherwise")
        require(config.pad_id < vocabulary.lookup.size, "engram_pad_token_id", config.pad_id,
                f"must be a token id, in 0..{vocabulary.lookup.size - 1}")
        dead = values["image_token_id"]
        memory = TokenHash(
            hashing=NgramHash(
                rows_per_head=config.rows_per_head, heads=config.heads, layers=config.layers,
                vocab_size=vocabulary.size, pad_id=int(vocabulary.lookup[config.pad_id])),
            vocabulary=vocabulary, dead_ids=() if dead is None else (dead,))
    require(memory.vocabulary.lookup.size == values["vocab_size"], "token map",
            memory.vocabulary.lookup.size, f"tokens; vocab_size is {values['vocab_size']}")
    rows = [memory.hashing.table_rows[layer] for layer in config.layers]
    require(values["engram_num_embeddings"] == rows, "engram_num_embeddings",
            values["engram_num_embeddings"], f"the primes sum to {rows}")
    return memory


def _require_alike(hash_file: str | os.PathLike[str], memory: TokenHash, values: dict[str, Any],
                   config: EngramConfig) -> None:
    """Refuse a known hash that is of another memory than the config's."""
    hashing, image = memory.hashing, values["image_token_id"]
    for name, own, right in (
            ("variant", hashing.variant, "deepseek"), ("layers", hashing.layers, config.layers),
            ("orders", hashing.max_order, config.max_order), ("heads", hashing.heads, config.heads),
            ("dead_ids", memory.dead_ids, () if image is None else (image,))):
        require(own == right, f"{hash_file}: {name}", own, f"must be {right}, the config's")


def _token_map(path: Path) -> CompressedVocabulary:
    require(path.is_file(), "tokenizer", str(path), "there is no such file; the token map comes "
            "from it, or from a hash file")
    with refusals(path, "read"):
        text = path.read_bytes()
    try:
        tokenizer = Tokenizer.from_str(text.decode())
    except Exception as error:  # of `tokenizers`: a bare Exception
        raise UserError(f"{path}: is no tokenizer ({error})") from error
    return CompressedVocabulary.from_tokenizer(tokenizer)


def _prefix(tensors: Tensors, layer: int) -> str:
    """What the names of a layer's tensors begin with, up to "engram."."""
    pattern = re.compile(rf"((?:.*\.)?layers\.{layer}\.)engram\.embed\.weight")
    prefixes = [match[1] for name in tensors if (match := pattern.fullmatch(name))]
    require(len(prefixes) == 1, f"tensors named ...layers.{layer}.engram.embed.weight", prefixes,
            "must be one")
    return prefixes[0]


def _weights(tensors: Tensors, names: str, values: dict[str, Any], config: EngramConfig
             ) -> Weights:
    streams, width = values["hc_mult"], values["hidden_size"]
    weight, scale = tensors[f"{names}wkv.weight"], tensors[f"{names}wkv.scale"]
    weight.require_shape((streams + 1) * width, config.memory_dim)
    for tensor, dtype in ((weight, "F8_E4M3"), (scale, "F8_E8M0")):
        require(tensor.dtype == dtype, f"{tensor.name}: dtype", tensor.dtype, f"must be {dtype}")
    whole_RE = decode_blocks(weight.read(), scale.read())
    project_KED = whole_RE.reshape(streams + 1, width, -1).swapaxes(1, 2)
    gains = {}
    for ours, theirs in (("query_gain", "q_weight"), ("key_gain", "k_weight")):
        tensor = tensors[f"{names}{theirs}"]
        tensor.require_shape(streams, width)
        gains[ours] = tensor.floats()
    return {"project": np.ascontiguousarray(project_KED), **gains}
