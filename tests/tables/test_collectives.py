"""Collectives in two steps do what those in one do."""

import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from engram_jax.tables import collectives
from engram_jax.training.fsdp import AXES
from engram_jax.training.placement import make_mesh

# [sender, receiver, ...]: whole numbers, so that the order of a sum does not matter.
SENT = np.random.default_rng(0).integers(-8, 8, (8, 8, 3, 5)).astype(np.float32)


def on_mesh(shape, collective):
    """What each device gets of a collective of what it has of SENT, stacked."""
    everywhere = PartitionSpec(AXES)
    return np.asarray(jax.jit(jax.shard_map(
        lambda sent: collective(sent[0])[None], mesh=make_mesh(*shape), in_specs=everywhere,
        out_specs=everywhere, check_vma=False))(SENT))


@pytest.mark.parametrize("near", [0, 2, 4])
@pytest.mark.parametrize("shape", [(1, 8), (2, 4)], ids=str)
def test_one_step_or_two(shape, near):
    got = on_mesh(shape, lambda parts: collectives.all_to_all(parts, AXES, near))
    assert (got == np.swapaxes(SENT, 0, 1)).all()
    got = on_mesh(shape, lambda parts: collectives.all_gather(parts, AXES, near))
    assert (got == SENT[None]).all()
    got = on_mesh(shape, lambda parts: collectives.reduce_scatter(parts, AXES, near))
    assert (got == SENT.sum(axis=0)).all()


def chips(*sizes, cores=1):
    """Devices of a slice, its last axis the fastest."""
    return [types.SimpleNamespace(platform="tpu", coords=place)
            for place in np.ndindex(*sizes) for _ in range(cores)]


@pytest.mark.parametrize(("devices", "near"), [
    (chips(4, 4, 4), 16), (chips(16, 16, 1), 16), (chips(4, 4, 8), 32), (chips(1, 4, 4), 4),
    (chips(4, 4, 4, cores=2), 32), (chips(1, 1, 8), 0), (chips(1, 1, 1), 0)])
def test_neighbours_are_those_before_the_first_step_along_the_slowest_axis(devices, near):
    assert collectives.neighbours(devices) == near


@pytest.mark.parametrize(("devices", "axes"), [
    (chips(4, 4, 4), 3), (chips(1, 4, 4), 2), (chips(1, 16, 1), 1), (chips(1, 1, 1, cores=2), 1)])
def test_axes_that_devices_span(devices, axes):
    assert collectives.spanned(devices) == axes


def test_without_a_slice_there_is_one_step():
    assert collectives.neighbours(jax.devices()) == collectives.spanned(jax.devices()) == 0
