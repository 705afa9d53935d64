"""A Flax NNX transformer with an Engram memory before its second block.

    python examples/flax_nnx.py

The network is a small GPT as Flax's NNX tutorials write it (`nnx.Embed`, `nnx.MultiHeadAttention`,
`nnx.Linear`), learning the bytes of a Python file; `EngramFusion` is the one module that is added
to it. The table lies over all devices there are, and so does the batch; rows are an input of the
network. `nnx.Optimizer` moves the parameters and row-wise RMSProp the rows that were read, clipped
by one norm. Orbax saves it all and reads it again.

The mesh's axes are Auto: `nnx.Embed` does not work on the Explicit axes that `jax.make_mesh` makes
unless it is told otherwise.

Shapes: B batch, T time, D width.
"""

import argparse
import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from engram_jax import EngramConfig, Memory, row_rmsprop
from engram_jax.model.nnx import EngramFusion

BYTES, T, D = 256, 32, 32
ENGRAM = EngramConfig(rows_per_head=(4000, 4000), heads=4, head_dim=8, vocab_size=BYTES,
                      signed_root=False)  # whose slope makes runs of other meshes drift apart


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norms = nnx.List([nnx.LayerNorm(D, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(2, D, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(D, 4 * D, rngs=rngs), nnx.Linear(4 * D, D, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.norms[0](x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Transformer(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.norm = nnx.Embed(BYTES, D, rngs=rngs), nnx.LayerNorm(D, rngs=rngs)
        self.position = nnx.Param(0.02 * rngs.params.normal((1, T, D)))
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.fusion = EngramFusion(D, ENGRAM, rngs=rngs)

    def __call__(self, tokens, rows):
        x = self.embed(tokens) + self.position[...]
        for number, block in enumerate(self.blocks):
            if number in rows:
                x = self.fusion(x, rows[number])
            x = block(x, nnx.make_causal_mask(tokens))
        return self.embed.attend(self.norm(x))


def loss_fn(model, rows, text):
    logits = model(text[:, :-1], rows)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]))


@functools.partial(nnx.jit, static_argnums=0, donate_argnums=3)
def step(memory, model, optimizer, tables, text):
    lookup = memory.lookup(tables, text[:, :-1])
    loss_and_grads = nnx.value_and_grad(loss_fn, argnums=(0, 1))
    loss, (grads, row_grads) = loss_and_grads(model, lookup.rows, text)
    combined = memory.combine(lookup, row_grads)
    square = optax.tree.norm(grads, squared=True) + combined.square
    scale = jnp.minimum(1, jax.lax.rsqrt(square))
    optimizer.update(model, optax.tree.scale(scale, grads))
    return memory.update(tables, combined, learning_rate=1e-2, scale=scale), loss


def train(devices, steps, folder):
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    split = NamedSharding(mesh, PartitionSpec("data"))
    memory = Memory(ENGRAM, mesh=mesh, axes=("data",), optimizer=row_rmsprop())
    tables, model = memory.init(jax.random.key(1)), Transformer(nnx.Rngs(0))
    optimizer, losses = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param), []
    text = np.frombuffer(Path(argparse.__file__).read_bytes(), np.uint8).astype(np.int32)
    for number in range(steps):
        starts = np.random.default_rng(number).integers(0, text.size - T, 16)
        batch = jax.device_put(text[starts[:, None] + np.arange(T + 1)], split)
        tables, loss = step(memory, model, optimizer, tables, batch)
        losses.append(float(loss))
    state = *(nnx.to_pure_dict(nnx.state(each)) for each in (model, optimizer)), tables
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "checkpoint", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(folder / "checkpoint", jax.eval_shape(lambda: state))
    return losses, state, restored


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        losses = train(jax.devices(), 100, Path(made))[0]
    print("loss", *(f"{loss:.3f}" for loss in losses[::10]))
