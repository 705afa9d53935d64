"""Sequences split over devices give what whole ones give: ids, outputs and every gradient.

A wrong gradient at a border hardly moves a loss, so gradients are compared one by one.
"""

import dataclasses
import functools

import jax
import micro
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from engram_jax.errors import UserError
from engram_jax.hashing.addressing import address
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.model import transformer
from engram_jax.settings import changed
from engram_jax.training import placement
from engram_jax.training.fsdp import SEQUENCE
from engram_jax.training.sequence import stretch_of
from engram_jax.training.state import init_state, to_be_read
from engram_jax.training.step import evaluation_step, mean_loss, row_ids, train_step

pytestmark = pytest.mark.usefixtures("compilations")

BATCH, TIME = 2, 72
OVER_TIME = PartitionSpec(None, SEQUENCE)


@functools.cache
def mesh_of(devices):
    return Mesh(np.array(jax.devices()[:devices]), (SEQUENCE,))


def run_of(isolated):
    """The convolution reaches nine positions back, as far as one of eight stretches is long, and
    its gradient goes on through the block before it."""
    return changed(micro.micro("text.txt"), {
        "model.isolate_documents": isolated, "model.attention.heads": 8, "model.moe": None,
        "model.streams": 2, "model.engram.signed_root": False, "model.engram.layers": (1,),
        "model.engram.shards": 8,
        "data.sequence_length": TIME})


@functools.cache
def batch_of():
    draw = np.random.default_rng(0)
    tokens_BT = draw.integers(0, 300, (BATCH, TIME + 1)).astype(np.int32)
    starts_BT = draw.random((BATCH, TIME)) > 0.93  # and documents lie across borders
    starts_BT[0, 30:] = False
    return {"tokens_BT": tokens_BT[:, :-1], "targets_BT": tokens_BT[:, 1:], "starts_BT": starts_BT}


@functools.cache
def params_of(run):
    """Whose convolutions, which start as zeros, do something."""
    draw = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: np.asarray(leaf + 0.1 * draw.standard_normal(leaf.shape), np.float32),
        transformer.init(run.model, jax.random.key(0)))


def rows_of(run):
    config = run.model.engram
    draw = np.random.default_rng(2).standard_normal
    return {f"layer_{layer}": draw((BATCH, TIME, config.total_heads, config.head_dim)).astype(
        np.float32) for layer in config.layers}


@functools.cache
def learned(isolated, devices):
    """The loss, and its gradients by parameters and rows."""
    run, mesh = run_of(isolated), mesh_of(devices)
    bias = transformer.init_router_bias(run.model)

    def local(params, rows, batch):
        def loss(params, rows):
            value, _ = mean_loss(params, rows, bias, batch, run, stretch=stretch_of(mesh))
            return value / devices

        value, (grads, row_grads) = jax.value_and_grad(loss, argnums=(0, 1))(params, rows)
        return jax.lax.psum((value, grads), SEQUENCE), row_grads

    split = jax.shard_map(
        local, mesh=mesh, in_specs=(PartitionSpec(), OVER_TIME, OVER_TIME),
        out_specs=(PartitionSpec(), OVER_TIME), check_vma=False)
    (value, grads), row_grads = jax.jit(split)(params_of(run), rows_of(run), batch_of())
    return np.asarray(value), jax.tree.map(np.asarray, (grads, row_grads))


@pytest.mark.parametrize(
    ("isolated", "devices"), [pytest.param(False, 2, marks=pytest.mark.slow), (True, 8)])
def test_the_loss_and_every_gradient(isolated, devices):
    (ours, our_grads), (loss, grads) = learned(isolated, devices), learned(isolated, 1)
    np.testing.assert_allclose(ours, loss, rtol=1e-6)
    pairs = zip(jax.tree_util.tree_leaves_with_path(our_grads), jax.tree.leaves(grads), strict=True)
    for (path, our), right in pairs:
        np.testing.assert_allclose(our, right, rtol=0, atol=1e-4 * max(np.abs(right).max(), 1e-3),
                                   err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("isolated", [False, True])
def test_every_row_id(isolated):
    """N-grams look back into the stretch before, and documents go on there."""
    run = run_of(isolated)
    addressing = address(run.model, CompressedVocabulary.identity(300), 0)
    whole, split = (jax.jit(jax.shard_map(
        lambda batch, mesh=mesh: row_ids(run, addressing, batch, stretch_of(mesh)), mesh=mesh,
        in_specs=OVER_TIME, out_specs=OVER_TIME, check_vma=False))(batch_of())
        for mesh in (mesh_of(1), mesh_of(8)))
    jax.tree.map(np.testing.assert_array_equal, whole, split)
    assert set(whole) == {"layer_1"}


# --- The step ---


def stepping():
    """A run of documents and experts that two devices each have a half of, all of them picked."""
    few = micro.micro("text.txt", check_exchange=True)
    experts = dataclasses.replace(few.model.moe, top_k=few.model.moe.experts)
    return changed(dataclasses.replace(run_of(True), training=few.training), {
        "model.moe": experts, "model.streams": 1, "data.batch_size": 4})


@functools.cache
def stepped(shape):
    """Losses and norms of three steps and the state after them, then an evaluation."""
    run, mesh = stepping(), placement.make_mesh(shape[0], shape[1], None, *shape[2:])
    addressing = address(run.model, CompressedVocabulary.identity(300), 0)
    state = jax.device_put(init_state(run), placement.shardings(run, mesh))
    twice = {name: np.concatenate([part, part[::-1, ::-1]]) for name, part in batch_of().items()}
    batch = placement.put(twice, mesh)
    step, rows = jax.jit(train_step(run, addressing, mesh)), []
    for _ in range(3):
        state, metrics = step(state, batch)
        rows.append([float(metrics[f"learning/{name}"]) for name in ("loss", "grad_norm")])
        assert metrics["exchange/disagreements"] == metrics["learning/skipped"] == 0
    weights = placement.put({"weights_BT": np.ones(twice["tokens_BT"].shape, np.float32)}, mesh)
    total, _ = jax.jit(evaluation_step(run, addressing, mesh))(
        to_be_read(state), {**batch, **weights})
    return np.array(rows), jax.tree.map(np.asarray, state), float(total)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 2, 1, 4), (1, 1, 2, 2)])
def test_the_step(shape):
    (ours, our_state, our_total), (rows, state, total) = stepped(shape), stepped((1, 1, 1, 1))
    np.testing.assert_allclose(ours, rows, rtol=2e-5)
    assert our_total == pytest.approx(total, rel=1e-5)
    pairs = zip(jax.tree_util.tree_leaves_with_path((our_state.params, our_state.tables)),
                jax.tree.leaves((state.params, state.tables)), strict=True)
    for (path, our), right in pairs:
        np.testing.assert_allclose(our, right, rtol=0, atol=2e-3 * np.abs(right).max(),
                                   err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(("field", "value", "words"), [
    ("data.sequence_length", 71, "data.sequence_length = 71: must be a multiple of the 8 devices"),
    ("data.sequence_length", 64, "leave each 9 tokens"),
    ("model.attention.heads", 4, "mesh = '1x1x1x8': splits sequences over 8 devices"),
    ("model.engram.keys", "shuffled", "layer_1.keys = 'shuffled' needs whole ones"),
])
def test_what_cannot_be_split(field, value, words):
    with pytest.raises(UserError) as refused:
        placement.check(changed(run_of(False), {field: value}),
                        placement.chosen_mesh("1x1x1x8"))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_meshes_that_split_sequences():
    assert placement.shape_of(placement.chosen_mesh("1x2x1x4")) == "1x2x1x4"
    assert placement.shape_of(placement.chosen_mesh("1x2x2")) == "1x2x2"
    placement.check(run_of(False), placement.chosen_mesh("1x1x1x8"))
