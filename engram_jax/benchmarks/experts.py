"""What one token costs among many experts, against the picked ones alone."""

import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from engram_jax.config import MoEConfig
from engram_jax.model.moe import moe, moe_parameters
from engram_jax.model.parameters import values
from engram_jax.settings import changed

STEPS = 21
PAPER = MoEConfig(experts=55, shared=0)  # engram-27b's routed experts


def expert_benchmark(
    config: MoEConfig = PAPER, width: int = 2560, steps: int = STEPS
) -> dict[str, Any]:
    """Time the experts of one block for one token, all experts there or the picked ones alone.

    Both route, both read the matrices of `config.top_k` experts in the dtype that the device serves
    in; the second has no others.

    Returns:
      `experts`, `picked`, `all_ms` and `picked_ms` (medians of `steps` tokens that took turns),
      `ratio` of the two, and `all_temporary_bytes` and `picked_temporary_bytes`, what the compiled
      programs need beside weights and token.
    """
    few = changed(config, {"experts": config.top_k})
    arms = [_compiled(each, width) for each in (config, few)]
    times = []
    for number in range(steps + 1):  # the first warms up
        token = jax.random.normal(jax.random.key(number), (1, 1, width), arms[0][2])
        times.append([_seconds(program, params, token) for program, params, _ in arms])
    ours, picked = (1e3 * statistics.median(column) for column in zip(*times[1:], strict=True))
    spare = [program.memory_analysis().temp_size_in_bytes for program, _, _ in arms]
    return {
        "experts": config.experts, "picked": config.top_k, "width": width,
        "expert_ffn": config.expert_ffn, "all_ms": ours, "picked_ms": picked,
        "ratio": ours / picked, "all_temporary_bytes": spare[0],
        "picked_temporary_bytes": spare[1], "device": jax.devices()[0].device_kind,
        "jax": jax.__version__}


def _compiled(config: MoEConfig, width: int) -> tuple[Any, Any, Any]:
    """The program of one token, its weights, and their dtype."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16

    def weights() -> Any:
        made = values(moe_parameters(jax.random.key(0), width, config))
        return {**made, "experts": jax.tree.map(lambda leaf: leaf.astype(dtype), made["experts"])}

    params = jax.jit(weights)()
    function = functools.partial(
        moe, bias_E=jnp.zeros(config.experts, jnp.float32), config=config)
    token = jax.ShapeDtypeStruct((1, 1, width), dtype)
    return jax.jit(function).lower(params, token).compile(), params, dtype


def _seconds(program: Any, params: Any, token: jax.Array) -> float:
    token = jax.block_until_ready(token)
    start = time.perf_counter()
    jax.block_until_ready(program(params, token))
    return time.perf_counter() - start
