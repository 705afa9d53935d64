"""The wire's time is that of the busiest link, counted by hand."""

import numpy as np
import pytest
from links import chips, slice_of_links

from engram_jax.costs.collectives import Collective
from engram_jax.costs.slices import CHIPS, Slice
from engram_jax.tables import collectives

TORUS = slice_of_links((16, 16))
IDS = np.arange(256)
ROWS = IDS.reshape(16, 16)  # 16 whole rings along the last axis
BLOCKS = ROWS.reshape(8, 2, 4, 4).transpose(0, 2, 1, 3).reshape(-1, 8)  # of 2 x 4


def seconds(kind, size, groups=(), torus=TORUS):
    groups = tuple(map(tuple, np.asarray(groups).tolist())) if len(groups) else ()
    return torus.seconds(Collective(
        kind=kind, shapes=(), bytes=size, times=1, exact=True, groups=groups, source=""))


def test_rings_of_sixteen_and_the_whole_slice():
    """Links of 1 byte a second, two ways: 2 bytes a second on one axis, 4 on both."""
    assert seconds("all-gather", 10, ROWS) == pytest.approx(10 * 15 / 2)
    assert seconds("reduce-scatter", 160, ROWS) == pytest.approx(160 * 15 / 16 / 2)
    assert seconds("all-reduce", 160, ROWS) == pytest.approx(160 * 15 / 16)
    assert seconds("all-gather", 10) == pytest.approx(10 * 255 / 4)
    assert seconds("all-to-all", 160, ROWS) == pytest.approx(160 * 4 / 2)
    assert seconds("all-to-all", 256) == pytest.approx(256 * 4 / 2)
    assert seconds("all-gather", 10, IDS[:, None]) == 0


def test_half_a_ring_is_a_line():
    """Its ends have one link each; four give to four through the middle, each an eighth."""
    halves = IDS.reshape(-1, 8)
    assert seconds("all-gather", 10, halves) == pytest.approx(10 * 7)
    assert seconds("reduce-scatter", 80, halves) == pytest.approx(10 * 7)
    assert seconds("all-to-all", 80, halves) == pytest.approx(4 * 4 * 10)
    alone = slice_of_links((8,), [False])
    assert seconds("all-to-all", 80, torus=alone) == pytest.approx(4 * 4 * 10)


def test_those_that_lie_apart_share_links():
    """Pairs eight apart: all sixteen of a ring send eight links far, over 32 links."""
    pairs = np.stack([IDS.reshape(-1, 2, 8)[:, 0].ravel(), IDS.reshape(-1, 2, 8)[:, 1].ravel()], 1)
    assert seconds("all-gather", 10, pairs) == pytest.approx(10 * 16 * 8 / 32)
    assert seconds("all-to-all", 20, pairs) == pytest.approx(10 * 16 * 8 / 32)


def test_a_block_takes_less_than_a_line():
    assert seconds("all-to-all", 80, BLOCKS) == pytest.approx(2 * 2 * 20)
    assert seconds("all-gather", 10, BLOCKS) == pytest.approx(10 * 7 / 2)


def test_a_message_goes_along_one_axis_and_then_the_other():
    assert seconds("collective-permute", 7, [(0, 1)]) == 7
    assert seconds("collective-permute", 7, [(0, 15), (15, 0)]) == 7
    assert seconds("collective-permute", 7, [(0, 33)]) == 7
    assert seconds("collective-permute", 7, [(0, 2), (1, 3)]) == 14  # both from 1 to 2
    assert seconds("collective-permute", 7) == 7


@pytest.mark.parametrize(("chip", "sizes", "rings"), [
    ("v5e", (16, 16), (True, True)), ("v5e", (8, 16), (False, True)), ("v5e", (4, 4), (False,) * 2),
    ("v5p", (4, 4, 4), (True,) * 3), ("v5p", (4, 4, 8), (True,) * 3),
    ("v5p", (2, 4, 4), (False,) * 3),
])
def test_which_axes_close(chip, sizes, rings):
    there = Slice(chip=CHIPS[chip], sizes=sizes, devices=chips(*sizes))
    assert there.torus(there.devices).rings == rings
    assert there.torus(there.devices).link == CHIPS[chip].link_gbytes * 1e9


def test_the_programs_devices_count_and_not_their_numbers():
    there = Slice(chip=CHIPS["v5e"], sizes=(16, 16), devices=chips(16, 16))
    blocks = there.torus(collectives.in_blocks(there.devices, 8))
    wanted = seconds("all-to-all", 80, BLOCKS)
    assert seconds("all-to-all", 80, IDS.reshape(-1, 8), blocks) * 50e9 == pytest.approx(wanted)


def test_two_devices_on_a_chip():
    """Between them nothing is sent; to another chip's two each sends half of what it puts in."""
    line = slice_of_links((2,), [False])
    both = type(line)(line.sizes, line.rings, line.link, ((0,), (0,), (1,), (1,)))
    for kind in ("all-to-all", "all-gather", "all-reduce"):
        assert seconds(kind, 8, [(0, 1), (2, 3)], both) == 0
    assert seconds("all-to-all", 8, torus=both) == 8


def test_a_broadcast_comes_in_by_all_links():
    assert seconds("collective-broadcast", 8, ROWS) == 4


def test_members_that_share_no_line_take_time():
    """On a diagonal each reaches the next, a step along both axes, by links of its own."""
    torus = slice_of_links((4, 4))
    diagonals = [[4 * i + (i + start) % 4 for i in range(4)] for start in range(4)]
    along = [[4 * i + start for i in range(4)] for start in range(4)]
    for kind in ("all-gather", "reduce-scatter", "all-reduce", "all-to-all"):
        assert seconds(kind, 8, diagonals, torus) == seconds(kind, 8, along, torus) > 0
