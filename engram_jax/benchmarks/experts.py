"""What one token costs among many experts, against the picked ones alone; and what a batch costs
whose loads are even, and one whose loads are lopsided."""

import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import MoEConfig
from engram_jax.model.layers import Params
from engram_jax.model.moe import experts_here, moe, moe_parameters
from engram_jax.model.parameters import values
from engram_jax.settings import changed

STEPS = 21
PRODUCTS = 9  # with three matrices, forward and for both gradients
PAPER = MoEConfig(experts=55, shared=0)  # engram-27b's routed experts


def expert_benchmark(
    config: MoEConfig = PAPER, width: int = 2560, steps: int = STEPS, tokens: int = 0
) -> dict[str, Any]:
    """Time the experts of one block: for one token, all experts there or the picked ones alone; and
    for a batch, forward and back.

    For one token both route, both read the matrices of `config.top_k` experts in the dtype that the
    device serves in; the second has no others.

    Args:
      config: of the experts.
      width: of the tokens.
      steps: how often each is timed.
      tokens: of the batch, which is timed a quarter as often; by default 4096, and none on a CPU.

    Returns:
      `experts`, `picked`, `all_ms` and `picked_ms` (medians of `steps` tokens that took turns),
      `ratio` of the two, and `all_temporary_bytes` and `picked_temporary_bytes`, what the compiled
      programs need beside weights and token. Of a batch of `tokens`, if there is one, whose choices
      are drawn evenly or as 1 / rank of the expert, each for itself, so that a token may pick an
      expert twice, `even_ms` and `lopsided_ms`, medians, and `even_teraflops` and
      `lopsided_teraflops`, what its products are a second, without padding.
    """
    few = changed(config, {"experts": config.top_k})
    arms = [_compiled(each, width) for each in (config, few)]
    times = []
    for number in range(steps + 1):  # the first warms up
        token = jax.random.normal(jax.random.key(number), (1, 1, width), arms[0][2])
        times.append([_seconds(program, params, token) for program, params, _ in arms])
    ours, picked = (1e3 * statistics.median(column) for column in zip(*times[1:], strict=True))
    spare = [program.memory_analysis().temp_size_in_bytes for program, _, _ in arms]
    tokens = tokens or (0 if jax.default_backend() == "cpu" else 4096)
    return {
        "experts": config.experts, "picked": config.top_k, "width": width,
        "expert_ffn": config.expert_ffn, "all_ms": ours, "picked_ms": picked,
        "ratio": ours / picked, "all_temporary_bytes": spare[0],
        "picked_temporary_bytes": spare[1], "tokens": tokens,
        **(_batches(config, arms[0][1]["experts"], tokens, max(1, steps // 4)) if tokens else {}),
        "device": jax.devices()[0].device_kind, "jax": jax.__version__}


def _batches(config: MoEConfig, params: Params, tokens: int, steps: int) -> dict[str, float]:
    """The times of a batch's products with the experts `params`, by how its loads are spread."""
    width, dtype, told = params["gate"].shape[1], params["gate"].dtype, {}
    x_ND, weight_NK = (jax.random.normal(jax.random.key(0), (tokens, size), dtype)
                       for size in (width, config.top_k))
    both_ways = jax.jit(functools.partial(_both_ways, config.experts))
    flops = PRODUCTS * 2 * tokens * config.top_k * width * config.expert_ffn
    for name, shares in (("even", np.ones(config.experts)),
                         ("lopsided", 1 / np.arange(1, config.experts + 1))):
        choice_NK = jnp.asarray(np.random.default_rng(0).choice(
            config.experts, (tokens, config.top_k), p=shares / shares.sum()), jnp.int32)
        times = [_seconds(both_ways, params, x_ND, choice_NK, weight_NK) for _ in range(steps + 1)]
        told[f"{name}_ms"] = 1e3 * statistics.median(times[1:])
        told[f"{name}_teraflops"] = flops / statistics.median(times[1:]) / 1e12
    return told


def _both_ways(
    experts: int, params: Params, x_ND: jax.Array, choice_NK: jax.Array, weight_NK: jax.Array
) -> Any:
    """The sum of what tokens get, and its gradients.

    For the gradients alone a compiler would leave out the last product of the forward pass.
    """
    def total(params: Params, x_ND: jax.Array, weight_NK: jax.Array) -> jax.Array:
        out_ND, _ = experts_here(params, x_ND, choice_NK, weight_NK, experts)
        return jnp.sum(out_ND.astype(jnp.float32))

    return jax.value_and_grad(total, argnums=(0, 1, 2))(params, x_ND, weight_NK)


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


def _seconds(program: Any, *given: Any) -> float:
    given = jax.block_until_ready(given)
    start = time.perf_counter()
    jax.block_until_ready(program(*given))
    return time.perf_counter() - start
