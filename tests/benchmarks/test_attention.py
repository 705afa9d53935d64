"""`bench attention`, short; on a CPU there is the plain implementation alone."""

import json

import pytest

from engram_jax.benchmarks import attention
from engram_jax.cli import main
from engram_jax.config import AttentionConfig

FEW = AttentionConfig(heads=2, nope_dim=8, rope_dim=4, value_dim=8)


def test_attention():
    measured = attention.attention_benchmark(96, config=FEW, steps=1)
    assert measured["device"] == "cpu"
    assert measured["xla_squares"] > 0  # so short a sequence is one chunk
    assert measured["xla_temporary_bytes"] >= 96 * 96 * 4
    assert measured["xla_ms"] > 0
    assert not [name for name in measured if name.startswith(("splash", "cudnn"))]


def test_splash_gets_heads_first_as_in_the_network(monkeypatch):
    met = []

    def kernel(query, key, value, documents_BT, scale):
        met.append((query.shape, key.shape, value.shape))
        return value * query[..., :1] * key[..., :1]

    monkeypatch.setattr(attention, "available", lambda *inputs: ("splash",))
    monkeypatch.setattr(attention, "splash_by_head", kernel)
    attention.attention_benchmark(96, config=FEW, steps=1)
    assert met == [((1, 2, 96, 12), (1, 2, 96, 12), (1, 2, 96, 8))]


def test_attention_for_a_tpu(capsys):
    pytest.importorskip("libtpu", reason="libtpu is not installed (extra aot)")
    words = ["bench", "attention", "--topology", "v5p:1x1x1", "--length", "2048", "--json"]
    assert main.main(words) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["splash_squares"] == measured["xla_squares"] == 0
    assert measured["splash_temporary_bytes"] < measured["xla_temporary_bytes"]


def test_what_is_not_its_own(capsys):
    assert main.main(["bench", "hash", "--length", "5"]) == 2
    assert "--length is of bench attention" in capsys.readouterr().err
