"""Train `tiny` on meshes and on one device in float64; print how far their losses part, as JSON.

A program of its own, because it makes float64 of every float32 that the library asks for. Sums then
come out the same to 1e-16 in any order, so what is left between meshes would be a real difference:
a token that went elsewhere, a row that was counted twice.

    python tests/exact_arithmetic.py STEPS
"""

import itertools
import json
import os
import sys

SHAPES = ((8, 1), (2, 4), (4, 2))


def curve(run, shape, batches):
    """The losses of the steps on a mesh."""
    import jax
    import jax.numpy as jnp

    from engram_jax.runs.reader import open_inputs
    from engram_jax.training import capacity, placement
    from engram_jax.training.state import init_state
    from engram_jax.training.step import train_step

    mesh = placement.make_mesh(*shape, devices=jax.devices()[: shape[0] * shape[1]])
    ready = capacity.with_capacity(run, open_inputs(run).addressing, batches, mesh)
    step = jax.jit(train_step(ready, open_inputs(run).addressing, mesh), donate_argnums=0)
    state = jax.jit(lambda: init_state(ready), out_shardings=placement.shardings(ready, mesh))()
    losses = []
    for batch in batches:
        state, metrics = step(state, placement.put(batch, mesh))
        losses.append(float(metrics["learning/loss"]))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float64")}
    return losses


def main(steps):
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    jnp.float32 = jnp.float64
    from engram_jax import recipes
    from engram_jax.data.batches import train_batches
    from engram_jax.runs.reader import open_inputs

    run = recipes.tiny()
    object.__setattr__(run.model, "compute_dtype", "float64")  # which no user may set
    tokens = open_inputs(run).tokens
    batches = list(itertools.islice(train_batches(tokens, run.data), steps))
    one = curve(run, (1, 1), batches)
    print(json.dumps({f"{data}x{fsdp}": max(map(abs, map(
        float.__sub__, one, curve(run, (data, fsdp), batches)))) for data, fsdp in SHAPES}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
