"""Collectives in two steps do what those in one do."""

import math
import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from links import chips

from engram_jax.recipes import recipe
from engram_jax.tables import collectives
from engram_jax.training import placement
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


@pytest.mark.parametrize(("devices", "near"), [
    (chips(4, 4, 4), 4), (chips(16, 16, 1), 16), (chips(4, 4, 8), 8), (chips(1, 4, 4), 4),
    (chips(4, 4, 4, cores=2), 8), (chips(1, 1, 8), 0), (chips(1, 1, 1), 0)])
def test_neighbours_are_those_along_the_fastest_axis(devices, near):
    assert collectives.neighbours(devices) == near


@pytest.mark.parametrize(("devices", "extent"), [
    (chips(4, 4, 4), (4, 4, 4)), (chips(1, 2, 4), (2, 4)), (chips(1, 16, 1), (16,)),
    (chips(1, 1, 1, cores=2), (1,))])
def test_axes_that_devices_lie_along(devices, extent):
    assert collectives.extent(devices) == extent


@pytest.mark.parametrize(("devices", "size", "first", "then"), [
    (chips(16, 16, 1), 8, [(0, 0, 0), (0, 3, 0), (1, 0, 0), (1, 3, 0)], (0, 4, 0)),
    (chips(16, 16, 1), 16, [(0, 0, 0), (1, 1, 0), (2, 2, 0), (3, 3, 0)], (0, 4, 0)),
    (chips(4, 4, 4), 8, [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 1)], (0, 0, 2)),
    (chips(4, 4, 4), 4, [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)], (0, 0, 2)),
    (chips(1, 8, 1), 4, [(0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 3, 0)], (0, 4, 0)),
])
def test_blocks_are_as_nearly_cubes_as_can_be(devices, size, first, then):
    """Their first devices, and the first of the second; whatever order they were given in."""
    for given in (devices, devices[::-1]):
        blocked = [device.coords for device in collectives.in_blocks(given, size)]
        assert sorted(blocked) == sorted(device.coords for device in devices)
        assert set(first) <= set(blocked[:size])
        assert blocked[0] == first[0]
        assert blocked[size] == then
        for start in range(0, len(devices), size):
            spans = [len(set(along))
                     for along in zip(*blocked[start:start + size], strict=True)]
            assert math.prod(spans) == size


@pytest.mark.parametrize(("devices", "size"), [
    (chips(4, 4, 4, cores=2), 8), (chips(16, 16, 1)[:-1], 5), (chips(4, 4, 4), 3)])
def test_what_has_no_blocks_stays_as_it_is(devices, size):
    assert collectives.in_blocks(devices, size) == devices


def test_those_that_share_experts_are_a_block(monkeypatch):
    given = np.array(chips(4, 4, 4)).reshape(2, 32)
    flat = types.SimpleNamespace(devices=given)
    monkeypatch.setattr(jax, "make_mesh", lambda *shape, **how: flat)
    monkeypatch.setattr(placement, "_mesh", lambda devices, *shape: devices.reshape(shape))
    mesh = placement.make_mesh(2, 4, list(given.flat), 8)
    assert mesh.shape == (2, 4, 8, 1)
    for half, row in zip(mesh, given, strict=True):
        assert set(half.flat) == set(row)
    for block in mesh.reshape(8, 8):
        assert collectives.extent(list(block)) == (2, 2, 2)
    assert (placement.make_mesh(2, 32, list(given.flat)).reshape(2, 32) == given).all()


def test_of_few_chips_devices_lie_in_rows(monkeypatch):
    """`jax.make_mesh` makes a ring of them: there, back, and so on."""
    rows = np.array(chips(4, 4)).reshape(4, 4)
    ring = np.concatenate([row[::(-1) ** i] for i, row in enumerate(rows)])
    monkeypatch.setattr(jax, "make_mesh", lambda *shape, **how: types.SimpleNamespace(
        devices=ring[None]))
    monkeypatch.setattr(placement, "_mesh", lambda devices, *shape: devices)
    assert (placement.make_mesh(1, 16, list(ring)) == rows.reshape(1, 16)).all()


@pytest.mark.parametrize(("sharing", "near", "near_fsdp"), [(1, 16, 16), (8, 4, 0)])
def test_what_is_of_a_part_of_a_slice_goes_in_one_step(sharing, near, near_fsdp):
    blocks = collectives.in_blocks(chips(16, 16), sharing)
    mesh = types.SimpleNamespace(
        devices=np.array(blocks).reshape(1, -1, sharing, 1),
        shape={"fsdp": 256 // sharing, "expert": sharing})
    how = placement.param_split(recipe("engram-27b"), mesh)
    assert (how.near, how.near_fsdp) == (near, near_fsdp)


def test_without_a_slice_there_is_one_step():
    assert collectives.neighbours(jax.devices()) == 0
    assert collectives.extent(jax.devices()) == ()
