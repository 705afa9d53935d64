"""Strict settings for every test: eight CPU devices, float32, rank promotion raises."""

import gc
import os

import jaxlib.version

os.environ["XLA_FLAGS"] = " ".join([
    os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8",
    # The older way to emit kernels compiles in half the time; jaxlib 0.12 has only the newer one.
    *["--xla_cpu_use_fusion_emitters=false"] * jaxlib.version.__version__.startswith("0.10.")])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["ENGRAM_MESH"] = "1x1"  # where a test does not name another mesh
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a network

import jax
import micro
import object_store
import pytest

from engram_jax.runs.train import train

jax.config.update("jax_numpy_rank_promotion", "raise")
gc.set_threshold(100_000, 50, 1000)  # what jax keeps alive is looked through less often: a tenth


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Token shards and tokenizers of a test session stay in its temporary folder."""
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path_factory.getbasetemp() / "engram_cache"))


def compiled_folder(tmp_path_factory):
    """The folder of compiled programs; processes that share the tests share it, too."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"


@pytest.fixture(scope="module")
def compilations(tmp_path_factory):
    """Programs are compiled quickly, and once for all modules that use this; the cache's folder."""
    folder = compiled_folder(tmp_path_factory)
    undo = micro.keep_compilations(folder)
    yield folder
    undo()


@pytest.fixture(scope="session", name="trained")
def a_trained_run(tmp_path_factory):
    """The folder of a run of `micro.plain`; for reading, or for a copy."""
    folder = tmp_path_factory.mktemp("trained")
    undo = micro.keep_compilations(compiled_folder(tmp_path_factory))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENGRAM_CACHE", str(tmp_path_factory.getbasetemp() / "engram_cache"))
        run = micro.plain(micro.micro(micro.write_text(folder / "text.txt")))
        train(run, folder / "run", lambda line: None)
    undo()
    return folder / "run"


@pytest.fixture(scope="module")
def store():
    """A store in memory that gs:// means; each test has its own bucket."""
    with object_store.ObjectStore() as served, pytest.MonkeyPatch.context() as patch:
        for name, value in served.environment().items():
            patch.setenv(name, value)
        object_store.use(patch)
        yield served
