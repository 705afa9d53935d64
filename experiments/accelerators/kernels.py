"""Compile a training step for an H200 that is not there, and count the kernels that it starts.

    python -m experiments.accelerators.kernels small [FIELD=VALUE ...]

It wants jax with its CUDA plugin (`jax-cuda13-plugin` and `jax-cuda13-pjrt` of jax's version) and
no GPU. Each kernel counts as often as its loops run, where that is known, else once. Products are a
library's and sorts XLA's own, as nothing can be timed for choosing among kernels. Compared once
with a profile of an H200: 15,168 kernels a step where 13,456 were counted.
"""

import collections
import os
import re
import sys
from typing import Any

# What XLA has to know of the device: NVIDIA's data sheet, and CUDA's numbers of this capability.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
device_description_str: "NVIDIA H200"
"""
FLAGS = ("--xla_gpu_autotune_level=0", "--xla_gpu_enable_triton_gemm=false",
         "--xla_gpu_deterministic_ops=true")
_NO_KERNEL = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
              "conditional", "after-all", "partition-id", "replica-id")


def main(words: list[str]) -> None:
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    text, temporary = compiled(*words)
    counts = kernels(text)
    print(f"{sum(counts.values()):,} kernels a step, {temporary / 2**30:.2f} GiB of temporaries")
    for scope, count in counts.most_common():
        print(f"{count:>8,}  {scope}")


def compiled(name: str, *settings: str) -> tuple[str, int]:
    """The optimized step of one of `bench step`'s runs, and the bytes of its temporaries."""
    import jax
    from jax.experimental import topologies

    from engram_jax.benchmarks.step import WORKLOADS
    from engram_jax.costs import plan
    from engram_jax.hashing.addressing import address
    from engram_jax.settings import with_settings
    from engram_jax.training import placement
    from engram_jax.training.step import train_step

    run = with_settings(WORKLOADS[name](), settings)
    devices: Any = topologies.get_topology_desc(
        "h200", platform="cuda", target_config=H200, topology="1x1x1").devices
    mesh = placement.make_mesh(1, 1, devices)
    addressing = address(run.model, plan._vocabulary(run), 0)
    program: Any = jax.jit(train_step(run, addressing, mesh), donate_argnums=0).lower(
        *plan._arguments(run, mesh)).compile()
    return program.as_text() or "", program.memory_analysis().temp_size_in_bytes


def kernels(text: str) -> collections.Counter[str]:
    """How many kernels a program starts, by scope."""
    from engram_jax.costs.breakdown import scope_of
    from engram_jax.costs.hlo import parse

    inside = {*re.findall(r"fusion\(.*?calls=%?([\w.\-]+)", text),
              *re.findall(r"to_apply=%?([\w.\-]+)", text)}
    counts: collections.Counter[str] = collections.Counter()
    for site in parse(text).walk():
        opcode = site.instruction.opcode
        if opcode not in _NO_KERNEL and not opcode.endswith("-done") and (
                site.computation.name not in inside):
            counts[scope_of(site.instruction.attribute(r'op_name="([^"]*)"') or "")] += site.times
    return counts


if __name__ == "__main__":
    main(sys.argv[1:])
