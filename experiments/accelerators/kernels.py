"""Compile for an H200 that is not there, and count the kernels that are started.

    python -m experiments.accelerators.kernels small [FIELD=VALUE ...]    # a training step
    python -m experiments.accelerators.kernels decode                     # a token of 32 sequences

It wants jax with its CUDA plugin (`jax-cuda13-plugin` and `jax-cuda13-pjrt` of jax's version) and
no GPU. Each kernel counts as often as its loops run, where that is known, else once. Products are a
library's and sorts XLA's own, as nothing can be timed for choosing among kernels. Compared once
with a profile of an H200, which was not kept: 15,168 kernels a step where 12,298 were counted.
Decoding is that of `bench offload --size 4b` with 32 slots; "moved" is what kernels read and write,
arrays that they slice or write in place counted by their slices, a library's scratch memory not at
all.
"""

import collections
import os
import sys
from collections.abc import Iterator
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
# What these run are kernels; what others call is part of their own.
_AROUND = ("while", "call", "conditional", "async-start")
_NO_KERNEL = (*_AROUND, "parameter", "constant", "tuple", "get-tuple-element", "bitcast",
              "after-all", "partition-id", "replica-id")
_SCRATCH = 2**22  # int8 arrays of a library's, from so many bytes on; the models have none


def main(words: list[str]) -> None:
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if words == ["decode"]:
        for name, program in decoding():
            text = program.as_text() or ""
            print(f"{name:>8}: {sum(kernels(text).values()):>5,} kernels, "
                  f"{moved(text) / 1e9:6.2f} GB moved")
        return
    text, temporary = compiled(*words)
    counts = kernels(text)
    print(f"{sum(counts.values()):,} kernels a step, {temporary / 2**30:.2f} GiB of temporaries")
    for scope, count in counts.most_common():
        print(f"{count:>8,}  {scope}")


def device() -> Any:
    from jax.experimental import topologies

    return topologies.get_topology_desc(
        "h200", platform="cuda", target_config=H200, topology="1x1x1").devices[0]


def compiled(name: str, *settings: str) -> tuple[str, int]:
    """The optimized step of one of `bench step`'s runs, and the bytes of its temporaries."""
    import jax

    from engram_jax.benchmarks.step import WORKLOADS
    from engram_jax.costs import plan
    from engram_jax.hashing.addressing import address
    from engram_jax.settings import with_settings
    from engram_jax.training import placement
    from engram_jax.training.step import train_step

    run = with_settings(WORKLOADS[name](), settings)
    mesh = placement.make_mesh(1, 1, [device()])
    addressing = address(run.model, plan._vocabulary(run), 0)
    program: Any = jax.jit(train_step(run, addressing, mesh), donate_argnums=0).lower(
        *plan._arguments(run, mesh)).compile()
    return program.as_text() or "", program.memory_analysis().temp_size_in_bytes


def decoding(slots: int = 32, length: int = 1144) -> Iterator[tuple[str, Any]]:
    """The stages of `bench offload --size 4b` that draw a token of every slot, compiled."""
    import jax
    import jax.numpy as jnp

    from engram_jax.benchmarks.offload import dense_4b
    from engram_jax.inference import caches, stages
    from engram_jax.inference.sampling import Sampling
    from engram_jax.model import transformer

    model = dense_4b().model
    assert model.engram is not None
    heads, columns = model.engram.total_heads, model.engram.head_dim
    here = jax.sharding.SingleDeviceSharding(device())

    def made() -> tuple[Any, ...]:
        params = stages.serving_params(transformer.init(model, jax.random.key(0)), model)
        number, number_1 = jnp.zeros(slots, jnp.int32), jnp.zeros((slots, 1), jnp.int32)
        real = jnp.zeros(slots)
        return (params, caches.init_cache(model, slots, length, 0),
                stages.Context(number_1, number_1, number),
                Sampling(real, number, real, jnp.zeros(slots, jnp.uint32)),
                jnp.zeros((slots, 1, model.streams, model.width), model.compute_dtype),
                jnp.zeros((slots, 1, heads, columns)))

    params, cache, context, sampling, x, rows = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        jax.eval_shape(made))
    first, second = stages.stages(model)
    bias, part = transformer.init_router_bias(model), slice(second.start, second.stop)
    yield "begin", stages.begin.lower(
        stages.stage_params(params, first), bias[:first.stop], cache.keys[:first.stop],
        cache.state, context.first_BT, context.count_B, None, None, model=model,
        end_id=None).compile()
    yield "proceed", stages.proceed.lower(
        params["segments"][part], bias[part], cache.keys[part], cache.conv.get(second.layer), x,
        rows, context, None, model=model, start=second.start).compile()
    yield "finish", stages.finish.lower(
        {name: params[name] for name in ("final_gain", "head", "embedding") if name in params}, x,
        context, sampling, context.count_B, None, model=model, known=model.vocab_size,
        greedy=True).compile()


def kernels(text: str) -> collections.Counter[str]:
    """How many kernels a program starts, by scope."""
    from engram_jax.costs.breakdown import scope_of

    counts: collections.Counter[str] = collections.Counter()
    for site in _started(text):
        counts[scope_of(site.instruction.attribute(r'op_name="([^"]*)"') or "")] += site.times
    return counts


def moved(text: str) -> int:
    """The bytes that a program's kernels read and write."""
    from engram_jax.costs.hlo import parse

    program = parse(text)
    return sum(site.times * _moved(program, site.instruction, site.computation)
               for site in _started(text))


def _started(text: str) -> Iterator[Any]:
    """The instructions of a program that start a kernel."""
    from engram_jax.costs.hlo import parse

    sites = list(parse(text).walk())
    inside = {name for site in sites if site.instruction.opcode not in _AROUND
              for name in site.instruction.called}
    for site in sites:
        opcode = site.instruction.opcode
        if opcode not in _NO_KERNEL and not opcode.endswith("-done") and (
                site.computation.name not in inside):
            yield site


def _moved(program: Any, instruction: Any, computation: Any) -> int:
    if instruction.opcode.startswith("fusion") and instruction.called:
        body = program.computations[instruction.called[0]]
        inner = body.instructions.values()
        read = sum(_read(body, each) for each in inner if each.opcode == "parameter")
        return read + sum(_written(body, each) for each in inner if each.root)
    return _bytes(instruction) + sum(
        _bytes(computation.instructions[name]) for name in instruction.operands
        if name in computation.instructions)


def _read(body: Any, of: Any) -> int:
    """What a fusion reads of one array: its slices, where it reads nothing else."""
    total = 0
    for user in body.instructions.values():
        if of.name not in user.operands:
            continue
        first = user.operands[0] == of.name
        if user.opcode == "bitcast":
            total += _read(body, user)
        elif first and user.opcode in ("dynamic-slice", "slice", "gather"):
            total += _bytes(user)
        elif not (first and user.opcode in ("dynamic-update-slice", "scatter")):
            return _bytes(of)
    return min(total, _bytes(of))


def _written(body: Any, root: Any) -> int:
    """What a fusion writes: of an array that it changes in place, what is put there."""
    operands = [body.instructions[name] for name in root.operands]
    if root.opcode in ("tuple", "bitcast"):
        return sum(_written(body, each) for each in operands)
    new = {"dynamic-update-slice": 1, "scatter": 2}.get(root.opcode)
    return _bytes(root) if new is None else _bytes(operands[new])


def _bytes(instruction: Any) -> int:
    from engram_jax.costs.hlo import bytes_of

    return sum(bytes_of(shape) for shape in instruction.shapes
               if not (shape[0] == "s8" and bytes_of(shape) >= _SCRATCH))


if __name__ == "__main__":
    main(sys.argv[1:])
