"""A dense transformer in plain JAX, with an Engram memory before its second block.

    python examples/plain_jax.py

Attention, an MLP and norms as anybody writes them, learning the bytes of a Python file. The table
of the memory lies over all devices there are, and so does the batch; rows are an input of the
network. AdamW moves the parameters and row-wise RMSProp the rows that were read, clipped by one
norm. Orbax saves it all and reads it again.

Shapes: B batch, T time, D width, H heads, K columns of a head.
"""

import argparse
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from engram_jax import EngramConfig
from engram_jax.model.engram import fuse, init_engram
from engram_jax.tables import Memory, row_rmsprop

BYTES, T, D, HEADS, BLOCKS = 256, 32, 32, 2, 2
ENGRAM = EngramConfig(layers=(1,), rows_per_head=(4000, 4000), heads=4, head_dim=8,
                      vocab_size=BYTES, pad_id=0, signed_root=False)
OPTIMIZER = optax.adamw(3e-3)


def init(key):
    keys = iter(jax.random.split(key, 3 + 4 * BLOCKS))

    def matrix(*shape):
        return 0.02 * jax.random.normal(next(keys), shape)

    return {"embed": matrix(BYTES, D), "position": matrix(T, D),
            "engram": init_engram(next(keys), D, 1, ENGRAM),
            "blocks": [{"qkv": matrix(D, 3, HEADS, D // HEADS), "out": matrix(HEADS, D // HEADS, D),
                        "up": matrix(D, 4 * D), "down": matrix(4 * D, D)} for _ in range(BLOCKS)]}


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def loss_fn(params, rows, text):
    tokens, targets = text[:, :-1], text[:, 1:]
    x = params["embed"][tokens] + params["position"][None]
    for number, block in enumerate(params["blocks"]):
        if number in rows:
            x += fuse(params["engram"], x[:, :, None], rows[number], ENGRAM).delta_BTMD[:, :, 0]
        q, k, v = jnp.einsum("btd,dshk->sbthk", norm(x), block["qkv"])
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x += jnp.einsum("bthk,hkd->btd", mixed, block["out"])
        x += jax.nn.gelu(norm(x) @ block["up"]) @ block["down"]
    logits = norm(x) @ params["embed"].T
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def make_step(memory):
    def step(params, moments, tables, text):
        lookup = memory.lookup(tables, text[:, :-1])
        loss, (grads, row_grads) = jax.value_and_grad(loss_fn, (0, 1))(params, lookup.rows, text)
        combined = memory.combine(lookup, row_grads)
        square = optax.tree.norm(grads, squared=True) + combined.square
        scale = jnp.minimum(1, 1 / jnp.sqrt(square))
        updates, moments = OPTIMIZER.update(optax.tree.scale(scale, grads), moments, params)
        tables = memory.update(tables, combined, learning_rate=1e-2, scale=scale)
        return optax.apply_updates(params, updates), moments, tables, loss

    return jax.jit(step, donate_argnums=(0, 1, 2))


def train(devices, steps, folder):
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))
    memory = Memory(ENGRAM, mesh=mesh, axes=("data",), optimizer=row_rmsprop())
    params = jax.device_put(init(jax.random.key(0)), whole)
    state = params, jax.device_put(OPTIMIZER.init(params), whole), memory.init(jax.random.key(1))
    text = np.frombuffer(Path(argparse.__file__).read_bytes(), np.uint8).astype(np.int32)
    step, losses = make_step(memory), []
    for number in range(steps):
        starts = np.random.default_rng(number).integers(0, text.size - T, 16)
        batch = jax.device_put(text[starts[:, None] + np.arange(T + 1)], split)
        *state, loss = step(*state, batch)
        losses.append(float(loss))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "checkpoint", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(folder / "checkpoint", jax.eval_shape(lambda: state))
    return losses, state, restored


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        losses, _, _ = train(jax.devices(), 100, Path(made))
    print("loss", *(f"{loss:.3f}" for loss in losses[::10]))
