"""Strict settings for every test: eight CPU devices, float32, rank promotion raises."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["ENGRAM_MESH"] = "1x1"  # where a test does not name another mesh

import jax
import pytest
from micro import keep_compilations

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Token shards and tokenizers of a test session stay in its temporary folder."""
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path_factory.getbasetemp() / "engram_cache"))


@pytest.fixture(scope="module")
def compilations(tmp_path_factory):
    """Programs are compiled quickly, and once for all modules that use this; the cache's folder."""
    folder = tmp_path_factory.getbasetemp() / "compiled"
    undo = keep_compilations(folder)
    yield folder
    undo()
