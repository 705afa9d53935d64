"""What attention of one sequence takes, by each implementation that can be had on a device.

The device is the one that is there, and then it is timed; or a TPU that is not, and then programs
are compiled for it and nothing runs.

Shapes: B batch, T time, H heads, X width of queries and keys, V of values.
"""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from engram_jax.config import AttentionConfig, require
from engram_jax.costs.hlo import parse
from engram_jax.costs.plan import squares
from engram_jax.costs.slices import slice_of
from engram_jax.model.attention_kernels import available, causal_attention, splash_by_head

PAPER = AttentionConfig()  # engram-27b's
LENGTHS = {"cpu": 2048}  # and 32768 elsewhere
STEPS = 11


def attention_benchmark(
    length: int = 0, topology: str = "", config: AttentionConfig = PAPER, steps: int = STEPS
) -> dict[str, Any]:
    """Compile, and where there is a device time, attention of a sequence and its gradients.

    Args:
      length: tokens, in documents; 0 is 2,048 on a CPU and 32,768 elsewhere.
      topology: a slice of one chip or more, such as "v5p:1x1x1", to compile for; "" is the device
        that is there.
      config: heads and their widths; in bfloat16, but float32 on a CPU.
      steps: how often each is timed.

    Returns:
      For each implementation NAME that can be had `NAME_temporary_bytes`, what the program needs
      beside its inputs and outputs; `NAME_squares`, how many arrays of T x T it has; and
      `NAME_ms`, the median, where there is a device.
    """
    require(length >= 0, "length", length, "must be at least 1")
    device = slice_of(topology).devices[0] if topology else jax.devices()[0]
    length = length or LENGTHS.get(device.platform, 32768)
    dtype = "float32" if device.platform == "cpu" else "bfloat16"
    result: dict[str, Any] = {
        "length": length, "heads": config.heads, "query_width": config.nope_dim + config.rope_dim,
        "value_width": config.value_dim, "dtype": dtype}
    for name in available(config, dtype, True, device):
        program, shapes = _compiled(name, config, length, dtype, device)
        result[f"{name}_temporary_bytes"] = program.memory_analysis().temp_size_in_bytes
        result[f"{name}_squares"] = squares(parse(program.as_text() or ""), length)
        if not topology:
            result[f"{name}_ms"] = 1e3 * _seconds(program, shapes, steps)
    return {**result, "device": device.device_kind, "jax": jax.__version__}


def _compiled(
    name: str, config: AttentionConfig, length: int, dtype: str, device: jax.Device
) -> tuple[Any, Any]:
    """The gradients of attention's sum of squares, and the shapes of its inputs.

    As in the network, splash gets [1, H, T, X] and the others [1, T, H, X].
    """
    lies, wide = SingleDeviceSharding(device), config.nope_dim + config.rope_dim
    lead = (config.heads, length) if name == "splash" else (length, config.heads)
    parts = [jax.ShapeDtypeStruct((1, *lead, size), dtype, sharding=lies)
             for size in (wide, wide, config.value_dim)]
    documents_BT = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=lies)

    def total(
        query: jax.Array, key: jax.Array, value: jax.Array, documents_BT: jax.Array
    ) -> jax.Array:
        inputs = (query, key, value, documents_BT, config.score_scale)
        out = splash_by_head(*inputs) if name == "splash" else causal_attention(*inputs, name)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    return gradients.lower(*parts, documents_BT).compile(), (*parts, documents_BT)


def _seconds(program: Any, shapes: Any, steps: int) -> float:
    """The median of so many runs over noise in eight documents, after one that warms up."""
    *parts, documents = shapes
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = [jax.random.normal(key, part.shape, part.dtype)
              for key, part in zip(keys, parts, strict=True)]
    length = documents.shape[1]
    inputs.append(jnp.arange(length, dtype=jnp.int32)[None] * 8 // length)
    jax.block_until_ready(program(*inputs))
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        jax.block_until_ready(program(*inputs))
        times.append(time.perf_counter() - start)
    return statistics.median(times)
