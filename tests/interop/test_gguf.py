"""The hash as GGUF metadata, read back by the format's own package where it is installed."""

import sys

import numpy as np
import pytest
import v41

from engram_jax.errors import UserError
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.hashing.ngrams import NgramHash
from engram_jax.hashing.token_hash import TokenHash
from engram_jax.interop.gguf import write_gguf_metadata

MEMORY = TokenHash(hashing=v41.hashing(),
                   vocabulary=CompressedVocabulary.from_tokenizer(v41.tokenizer()))


def test_the_five_constants_are_read_back(tmp_path):
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    write_gguf_metadata(MEMORY, tmp_path / "hash.gguf")
    fields = gguf.GGUFReader(tmp_path / "hash.gguf").fields
    read = {name: fields[f"deepseek41.engram.{name}"].contents() for name in (
        "multipliers", "primes", "offsets", "token_map", "pad_id")}
    hashing = MEMORY.hashing
    assert read["pad_id"] == hashing.pad_id
    assert read["token_map"] == MEMORY.vocabulary.lookup.tolist()
    for name, values in (("multipliers", hashing.multipliers), ("primes", hashing.primes),
                         ("offsets", hashing.offsets)):
        flat = np.concatenate([np.ravel(values[layer]) for layer in hashing.layers])
        assert read[name] == flat.tolist(), name
        kinds = fields[f"deepseek41.engram.{name}"].types
        assert kinds == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT64]


def test_what_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    qwen = NgramHash(rows_per_head=(50,), heads=1, layers=(1,), vocab_size=9, pad_id=0,
                     variant="qwen")
    with pytest.raises(UserError, match="variant = 'qwen': must be deepseek"):
        write_gguf_metadata(TokenHash(hashing=qwen, vocabulary=CompressedVocabulary.identity(9)),
                            tmp_path / "x.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="gguf: is not installed; `pip install gguf`"):
        write_gguf_metadata(MEMORY, tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []
