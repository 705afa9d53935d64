"""CKA: against a direct computation, its invariances, and the estimator's lack of bias."""

import itertools

import numpy as np
import pytest

from engram_jax.errors import UserError
from engram_jax.insides.cka import Similarity, gram, hsic, soft_alignment


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def direct(k, other):
    """The U-statistic itself: the mean over all ordered quadruples of different examples."""
    total, count = 0.0, 0
    for i, j, q, r in itertools.permutations(range(len(k)), 4):
        total += k[i, j] * (other[i, j] + other[q, r] - 2 * other[i, q])
        count += 1
    return total / count


def test_hsic_is_the_mean_over_quadruples():
    k, other = gram(random(7, 5)), gram(random(7, 3, seed=1))
    assert hsic(k, other) == pytest.approx(direct(k, other), rel=1e-10)
    assert hsic(k, k) == pytest.approx(direct(k, k), rel=1e-10)


def cka(x, y, batch=None):
    found = Similarity.between(1, 1)
    for start in range(0, len(x), batch or len(x)):
        part = slice(start, start + (batch or len(x)))
        found.add(x[None, part], y[None, part])
    return float(found.cka()[0, 0])


def test_cka_knows_no_rotation_scale_or_shift():
    x = random(40, 8)
    rotation, _ = np.linalg.qr(random(8, 8, seed=1))
    assert cka(x, x) == pytest.approx(1)
    assert cka(x, 3 * x @ rotation + 5) == pytest.approx(1)
    stretched = x * np.geomspace(1, 30, 8)[None]
    assert cka(x, stretched) < 0.8, "an affine map is not nothing"
    y = x @ random(8, 6, seed=2) + random(40, 6, seed=3)
    assert cka(x, y) == pytest.approx(cka(y, x))


def test_strangers_have_none_on_average_also_in_small_batches():
    """The biased estimate of batches of 8 with 50 columns would be near 0.9."""
    found = [cka(random(400, 50, seed=2 * s), random(400, 50, seed=2 * s + 1), batch=8)
             for s in range(10)]
    assert abs(np.mean(found)) < 0.03


def test_batches_agree_with_the_whole():
    x = random(2000, 6)
    y = x @ random(6, 6, seed=1) + 0.5 * random(2000, 6, seed=2)
    assert cka(x, y, batch=50) == pytest.approx(cka(x, y), abs=0.02)


def test_all_pairs_of_layers():
    ours, theirs = random(3, 20, 4), random(2, 20, 5, seed=1)
    found = Similarity.between(3, 2)
    found.add(ours, theirs)
    for i, j in np.ndindex(3, 2):
        assert found.cka()[i, j] == pytest.approx(cka(ours[i], theirs[j]))


def test_too_few_examples():
    with pytest.raises(UserError, match="examples = 3: must be at least 4"):
        hsic(np.eye(3), np.eye(3))


def test_soft_alignment_finds_the_diagonal_and_shifts():
    layers = np.arange(12)
    alike = np.exp(-((layers[:, None] - layers[None]) ** 2))
    np.testing.assert_allclose(soft_alignment(alike)[2:-2], layers[2:-2], atol=1e-9)
    early = np.exp(-((layers[:, None] - layers[None] - 3.0) ** 2))
    np.testing.assert_allclose(soft_alignment(early)[:7], layers[:7] + 3, atol=0.01)
    assert soft_alignment(np.array([[0.2, 0.5], [0.8, 0.5]]), top=1).tolist() == [1, 0]
    assert soft_alignment(np.array([[0.25], [0.75]]), top=5).tolist() == [0.75]
