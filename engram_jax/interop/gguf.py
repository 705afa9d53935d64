"""The hash of a V4.1 as GGUF metadata: the five keys that its loaders want and converters forgot.

    deepseek41.engram.multipliers   int64 [layers * N], layer after layer, newest token first
    deepseek41.engram.primes        int64 [layers * H], layer after layer, by order, then head
    deepseek41.engram.offsets       int64 [layers * H], where each head's rows start
    deepseek41.engram.token_map     int32 [V], the canonical id of each raw id
    deepseek41.engram.pad_id        uint32, canonical

Key names are those that llama.cpp's loader asks for; the file was never loaded by it here.
"""

import os
from typing import Any

from engram_jax.config import require
from engram_jax.errors import UserError
from engram_jax.hashing.token_hash import TokenHash

ARCHITECTURE = "deepseek41"


def write_gguf_metadata(memory: TokenHash, path: str | os.PathLike[str]) -> None:
    """Write a GGUF file that holds these keys and no tensor, to be merged into a converted model.

    Raises:
      UserError: the package `gguf` is not installed, or a hash of another variant.
    """
    require(memory.hashing.variant == "deepseek", "variant", memory.hashing.variant,
            "must be deepseek: the keys are of DeepSeek-V4.1")
    try:
        import gguf
    except ImportError as error:
        raise UserError("gguf: is not installed; `pip install gguf`") from error
    hashing, kind = memory.hashing, gguf.GGUFValueType
    flat: dict[str, tuple[list[int], Any]] = {
        "multipliers": ([m for layer in hashing.layers for m in hashing.multipliers[layer]],
                        kind.INT64),
        "primes": ([p for layer in hashing.layers for heads in hashing.primes[layer]
                    for p in heads], kind.INT64),
        "offsets": ([o for layer in hashing.layers for o in hashing.offsets[layer].tolist()],
                    kind.INT64),
        "token_map": (memory.vocabulary.lookup.tolist(), kind.INT32)}
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    for name, (values, each) in flat.items():
        writer.add_key_value(f"{ARCHITECTURE}.engram.{name}", values, kind.ARRAY, each)
    writer.add_uint32(f"{ARCHITECTURE}.engram.pad_id", hashing.pad_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
