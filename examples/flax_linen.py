"""A Flax Linen transformer with an Engram memory before its second block.

    python examples/flax_linen.py

The network is the decoder of Flax's own language-model tutorials (`nn.Embed`, `LayerNorm`,
`MultiHeadDotProductAttention`, `Dense`), learning the bytes of a Python file; `EngramFusion` is the
one module that is added to it. The table lies over all devices there are, and so does the batch;
rows are an input of the network. AdamW moves the parameters and row-wise RMSProp the rows that were
read, clipped by one norm. Orbax saves it all and reads it again.

The mesh's axes are Auto: `nn.Embed` and Linen's partitioning metadata do not work on the Explicit
axes that `jax.make_mesh` makes unless it is told otherwise.

Shapes: B batch, T time, D width.
"""

import argparse
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from engram_jax import EngramConfig, EngramFusion, Memory, row_rmsprop

BYTES, T, D = 256, 32, 32
ENGRAM = EngramConfig(rows_per_head=(4000, 4000), heads=4, head_dim=8, vocab_size=BYTES,
                      signed_root=False)  # whose slope makes runs of other meshes drift apart
OPTIMIZER = optax.adamw(3e-3)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(D)(nn.gelu(nn.Dense(4 * D)(nn.LayerNorm()(x))))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens, rows):
        embed, start = nn.Embed(BYTES, D), nn.initializers.normal(0.02)
        x = embed(tokens) + self.param("position", start, (1, T, D))
        for number in range(2):
            if number in rows:
                x = EngramFusion(ENGRAM)(x, rows[number])
            x = Block()(x, nn.make_causal_mask(tokens))
        return embed.attend(nn.LayerNorm()(x))


def loss_fn(params, rows, text):
    logits = Transformer().apply(params, text[:, :-1], rows)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]))


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
    tables, tokens = memory.init(jax.random.key(1)), jnp.zeros((len(devices), T), jnp.int32)
    params = jax.jit(Transformer().init, out_shardings=whole)(
        jax.random.key(0), tokens, memory.lookup(tables, tokens).rows)
    state = params, jax.device_put(OPTIMIZER.init(params), whole), tables
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
