"""Sampling: greedy where it should be, and draws that follow the softmax of what is left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.inference.sampling import Sampling, sample

CHANCES = np.array([0.05, 0.4, 0.1, 0.3, 0.15], np.float32)
DRAWS = 4000
_sample = jax.jit(sample)


def settings(count, temperature=1.0, top_k=0, top_p=1.0, seed=0):
    """For `count` sequences; each value for all of them, or one for each."""
    return Sampling(*(jnp.broadcast_to(jnp.asarray(value, dtype), (count,)) for value, dtype in (
        (temperature, jnp.float32), (top_k, jnp.int32), (top_p, jnp.float32), (seed, jnp.uint32))))


def counts(chances=CHANCES, by_seed=False, **fields):
    """How often each token is drawn."""
    logits = np.broadcast_to(np.log(chances) + 3, (DRAWS, len(chances)))
    many, one = np.arange(DRAWS), np.zeros(DRAWS, np.int32)
    if by_seed:
        fields["seed"] = many
    drawn = _sample(logits, settings(DRAWS, **fields), one if by_seed else many.astype(np.int32))
    return np.bincount(drawn, minlength=len(chances))


def assert_follows(found, chances):
    """Pearson's statistic is below what one fair draw in 10,000 exceeds."""
    expected = DRAWS * chances / chances.sum()
    assert not found[expected == 0].any()
    kept = expected > 0
    statistic = ((found - expected)[kept] ** 2 / expected[kept]).sum()
    assert statistic < {1: 0.1, 2: 15.1, 3: 18.4, 4: 21.1, 5: 23.5}[int(kept.sum())]


@pytest.mark.parametrize("fields", [
    {"temperature": 0.0}, {"temperature": 0.0, "top_k": 3, "top_p": 0.5}, {"top_k": 1},
    {"top_p": 1e-6}, {"top_p": 1e-45}, {"temperature": 1e-9}, {"temperature": 5.0, "top_k": 1}])
def test_greedy(fields):
    logits = np.random.default_rng(0).standard_normal((64, 50)).astype(np.float32)
    numbers = np.arange(64, dtype=np.int32)
    found = _sample(logits, settings(64, seed=numbers, **fields), numbers)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, logits.argmax(axis=-1))


@pytest.mark.parametrize("by_seed", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_draws_follow_the_softmax(temperature, by_seed):
    found = counts(temperature=temperature, by_seed=by_seed)
    assert_follows(found, CHANCES ** (1 / temperature))


@pytest.mark.parametrize(("top_k", "left"), [
    (2, [1, 3]), (3, [1, 3, 4]), (5, [0, 1, 2, 3, 4]), (99, [0, 1, 2, 3, 4])])
def test_only_the_likeliest_are_drawn(top_k, left):
    assert_follows(counts(top_k=top_k), np.where(np.isin(np.arange(5), left), CHANCES, 0))


@pytest.mark.parametrize(("top_p", "left"), [
    (0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 3, 4]), (0.96, [0, 1, 2, 3, 4])])
def test_the_fewest_that_together_have_the_probability(top_p, left):
    assert_follows(counts(top_p=top_p), np.where(np.isin(np.arange(5), left), CHANCES, 0))


def test_the_probability_is_that_of_the_tempered_softmax():
    """At temperature 0.5 the two likeliest have 0.25 / 0.285, not 0.7."""
    assert_follows(counts(top_p=0.8, temperature=0.5), np.array([0, 0.16, 0, 0.09, 0]))


def test_both_limits_hold():
    assert_follows(counts(top_p=0.71, top_k=2), np.array([0, 0.4, 0, 0.3, 0]))
    assert_follows(counts(top_p=0.45, top_k=4), np.array([0, 0.4, 0, 0.3, 0]))


@pytest.mark.parametrize(("top_p", "left"), [(0.45, [1]), (0.75, [1, 3]), (0.9, [1, 3, 4])])
def test_the_probability_is_a_share_of_what_the_likeliest_leave(top_p, left):
    """Of the three likeliest the first has 0.4 / 0.85, the first two have 0.7 / 0.85."""
    expected = np.where(np.isin(np.arange(5), left), CHANCES, 0)
    assert_follows(counts(top_p=top_p, top_k=3), expected)


def test_alike_tokens_are_not_all_kept():
    assert_follows(counts(np.full(5, 0.2, np.float32), top_k=2), np.array([0.5, 0.5, 0, 0, 0]))


def test_settings_side_by_side():
    """Each sequence's draw is the one that it has among its like."""
    random = np.random.default_rng(1)
    logits = random.standard_normal((64, 50)).astype(np.float32)
    fields = {"temperature": np.tile([0.0, 1.0, 2.0, 0.7], 16),
              "top_k": np.repeat([0, 5, 0, 1], 16), "top_p": np.resize([1.0, 0.5, 0.9], 64),
              "seed": random.integers(0, 2**32, 64)}
    number = random.integers(0, 1000, 64).astype(np.int32)
    together = np.asarray(_sample(logits, settings(64, **fields), number))
    for row in range(64):
        alike = settings(64, **{name: values[row] for name, values in fields.items()})
        found = _sample(logits[[row] * 64], alike, number[[row] * 64])
        np.testing.assert_array_equal(found, together[row])
    greedy = fields["temperature"] == 0
    np.testing.assert_array_equal(together[greedy], logits[greedy].argmax(axis=-1))


def test_a_draw_has_its_seed_and_its_place():
    """Of 64 among 50 alike tokens, far from all are the same."""
    logits, some = np.zeros((64, 50), np.float32), np.arange(64, dtype=np.int32)
    for seed, number in ((some, 0 * some), (0 * some, some)):
        found = np.asarray(_sample(logits, settings(64, seed=seed), number))
        assert len(set(found.tolist())) > 25
