"""Eight steps with tokens that travel to experts equal eight with experts that travel to tokens."""

import itertools

import jax
import numpy as np
import pytest
from micro import micro, with_data, write_text

from engram_jax.data.batches import train_batches
from engram_jax.errors import UserError
from engram_jax.runs.reader import open_inputs
from engram_jax.settings import changed
from engram_jax.training import placement
from engram_jax.training.state import init_state
from engram_jax.training.step import train_step

pytestmark = pytest.mark.usefixtures("compilations")

STEPS = 8


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two of five experts, which four devices cannot share evenly; two parts a step."""
    text = write_text(tmp_path_factory.mktemp("experts") / "text.txt")
    return changed(with_data(micro(text, steps=STEPS, accumulate=2), batch_size=16), {
        "model.moe.experts": 5, "model.moe.top_k": 2, "model.engram.shards": 8,
        "model.engram.signed_root": False, "model.streams": 1})


def trained(run, mesh):
    """The losses, the loads and the parameters at the end, and the program."""
    inputs = open_inputs(run)
    state = jax.jit(lambda: init_state(run), out_shardings=placement.shardings(run, mesh))()
    step = jax.jit(train_step(run, inputs.addressing, mesh), donate_argnums=0)
    losses, loads = [], []
    for batch in itertools.islice(train_batches(inputs.tokens, run.data), STEPS):
        batch = placement.put(batch, mesh)
        state, metrics = step(state, batch)
        losses.append(float(metrics["learning/loss"]))
        loads.append(float(metrics["moe/max_load_over_mean"]))
    program = step.lower(placement.placed_state(run, mesh), batch).compile()
    return losses, loads, jax.tree.map(np.asarray, state.params), program


@pytest.fixture(scope="module")
def gathered(run):
    return trained(run, placement.make_mesh(1, 8))


@pytest.mark.slow
@pytest.mark.parametrize(("sharing", "to_all"), [(4, False), (2, True)])
def test_sent_equals_gathered(run, gathered, sharing, to_all):
    mesh = placement.make_mesh(1, 8 // sharing, expert=sharing)
    assert placement.routed(run, mesh).to_all is to_all
    sent = trained(run, mesh)
    np.testing.assert_allclose(sent[0], gathered[0], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(sent[1], gathered[1])
    assert gathered[0][-1] < gathered[0][0] - 0.1
    for path, leaf in jax.tree_util.tree_leaves_with_path(sent[2]):
        theirs = dict(jax.tree_util.tree_leaves_with_path(gathered[2]))[path]
        np.testing.assert_allclose(leaf, theirs, rtol=0, atol=1e-3,
                                   err_msg=jax.tree_util.keystr(path))
    # No device ever holds all experts whole.
    assert "f32[5,32,16]" in gathered[3].as_text()
    assert "f32[5,32,16]" not in sent[3].as_text()


def test_experts_that_cannot_be_shared_are_refused(run):
    with pytest.raises(UserError, match="shares 5 experts among 8 devices"):
        placement.check(run, placement.make_mesh(1, 1, expert=8))
    with pytest.raises(UserError, match="shares no experts among 2 devices"):
        placement.check(changed(run, {"model.moe": None}), placement.make_mesh(1, 4, expert=2))


def test_the_mesh_says_how_experts_are_shared():
    assert placement.shape_of(placement.chosen_mesh("1x2x4")) == "1x2x4"
    assert placement.shape_of(placement.chosen_mesh("2x4")) == "2x4"
    flat, shared = placement.make_mesh(2, 4), placement.make_mesh(2, 2, expert=2)
    assert list(flat.devices.flat) == list(shared.devices.flat)
