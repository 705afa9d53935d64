"""What XLA is asked for before it starts, so that runs can be repeated."""

import importlib.util
import os

GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")


def settle_sums() -> None:
    """Ask GPUs for the same bits in every run; to be done before jax starts.

    Sums of gradients whose indices repeat are atomic additions there, in whatever order they come,
    unless XLA is told otherwise. What the order costs was never measured; with
    XLA_FLAGS=--xla_gpu_deterministic_ops=false nobody asks for it.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    with_gpus = any(importlib.util.find_spec(name) for name in GPU_PLUGINS)
    if with_gpus and "xla_gpu_deterministic_ops" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
