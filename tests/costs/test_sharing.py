"""How experts are shared on a slice: by bytes that can be counted by hand."""

import pytest
from links import chips

from engram_jax import recipes
from engram_jax.costs.sharing import chosen, reason, sharing
from engram_jax.costs.slices import CHIPS, Slice
from engram_jax.settings import changed

V5E = Slice(chip=CHIPS["v5e"], sizes=(16, 16), devices=chips(16, 16))
RUN = changed(recipes.recipe("engram-27b"),
              {"training.accumulate": 5, "model.remat": "outputs"})
OWN = 14 * 3 * 2560 * 1536  # numbers of a device's experts, of 55 among four
TIMES = 29 * 5  # blocks with experts, and parts of a step
TOKEN = 4096 * 2560 * 2  # bytes of a part's tokens


def test_matrices_and_tokens_along_four_devices():
    way = sharing(RUN, V5E, 256, 4)
    assert way.weights_bytes == pytest.approx(TIMES * OWN * (2 * 2 + 4) * 63 / 64)
    assert way.memory_s == pytest.approx(TIMES * OWN * (3 * 2 * 2 + 4 * 4) / 819e9)
    once, picked = 4 * TOKEN, 1.125 * 6 * TOKEN
    assert way.tokens_bytes == pytest.approx(TIMES * (3 * once + 2 * picked) * 3 / 4)
    # A block of 2 x 2: three tokens come in by two links, half of what is picked goes over each.
    assert way.tokens_s == pytest.approx(
        TIMES * (3 * 3 * TOKEN / 2 + 2 * picked / 2) / 50e9, rel=1e-6)


def test_tokens_travel_as_often_whatever_is_kept():
    """The backward pass computes rounds anew; `tests/model/test_sent_experts.py` sees them."""
    kept = sharing(changed(RUN, {"model.remat": "none"}), V5E, 256, 4)
    assert kept.tokens_bytes == sharing(RUN, V5E, 256, 4).tokens_bytes


def test_tokens_that_pick_few_go_with_each_choice():
    few = changed(RUN, {"model.moe.top_k": 2})
    assert sharing(few, V5E, 256, 8).tokens_bytes == pytest.approx(
        TIMES * 5 * 1.125 * 2 * TOKEN * 7 / 8)


def test_nothing_is_sent_where_experts_are_gathered():
    way = sharing(RUN, V5E, 256, 1)
    assert (way.devices, way.tokens_bytes, way.tokens_s) == (1, 0, 0)
    assert way.memory_s == pytest.approx(
        TIMES * 55 * 3 * 2560 * 1536 * (3 * 2 * 2 + 4 * 4) / 819e9)


def test_the_fastest_is_chosen():
    ways = {devices: sharing(RUN, V5E, 256, devices) for devices in (1, 2, 4, 8, 16)}
    assert chosen(RUN, V5E, 256) == min(ways.values(), key=lambda way: way.seconds) == ways[8]
    # Many tokens a part and no matrices to speak of: then tokens stay at home.
    assert chosen(changed(RUN, {"model.moe.expert_ffn": 8}), V5E, 256).devices == 1
    assert chosen(recipes.recipe("dense-4b"), V5E, 256) is None


def test_the_reason_in_a_line():
    assert reason(RUN, V5E, 256, 8).startswith("tokens sent along 8 devices: 192.6 GB a device")
    assert "; gathered, experts would be 749.7 GB" in reason(RUN, V5E, 256, 8)
    assert reason(RUN, V5E, 256, 1).startswith("gathered: 749.7 GB a device and step, 3.75 s on")
    assert "; tokens sent along 8 devices would be" in reason(RUN, V5E, 256, 1)
    assert reason(recipes.recipe("dense-4b"), V5E, 256, 1) == ""


def test_the_reason_says_what_matrices_would_take_that_travel_once_a_step():
    once = changed(RUN, {"training.accumulate": 1})
    wanted = "; with training.accumulate=1, if it fits, 95.9 GB a device and step, 1.06 s on the"
    assert RUN.training.accumulate > 1
    assert wanted in reason(RUN, V5E, 256, 8)
    assert reason(RUN, V5E, 256, 8).endswith("sent along 4")
    assert "accumulate" not in reason(once, V5E, 256, 2)


def test_where_matrices_are_whole_none_travels():
    one = Slice(chip=CHIPS["v5e"], sizes=(1, 1), devices=chips(1, 1))
    assert sharing(RUN, one, 1, 1).seconds == 0
    assert reason(RUN, one, 1, 1) == (
        "gathered: 0.0 GB a device and step, 0 s on the links and 0 s in memory")


def test_a_step_of_one_part_may_gather():
    v5p = Slice(chip=CHIPS["v5p"], sizes=(4, 4, 4), devices=chips(4, 4, 4))
    assert reason(RUN, v5p, 64, 2).endswith(
        "with training.accumulate=1, if it fits, 148.2 GB a device and step, 0.247 s on the links "
        "and 0.191 s in memory, gathered")
