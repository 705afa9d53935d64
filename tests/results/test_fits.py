"""Curves: against least squares by hand, and intervals that hold what they promise."""

import numpy as np
import pytest

from engram_jax.results.fits import line, parabola

SLOTS = (1000, 4000, 16_000, 64_000)


def test_the_line_is_least_squares_and_its_interval_student_t():
    y = np.array([4.57, 4.541, 4.513, 4.445])
    found, x = line(SLOTS, y), np.log10(SLOTS)
    slope, intercept = np.polyfit(x, y, 1)
    assert (found.slope, found.intercept) == pytest.approx((slope, intercept))
    residual = y - intercept - slope * x
    error = np.sqrt(np.sum(residual**2) / 2 / np.sum((x - x.mean())**2))
    margin = 4.302653 * error  # the 97.5 % point of Student's t with two degrees of freedom
    assert (found.low, found.high) == pytest.approx((slope - margin, slope + margin), rel=1e-5)
    assert found.points == 4
    np.testing.assert_allclose(found(np.array([1e4])), intercept + slope * 4)


def test_what_a_seed_shares_is_neither_slope_nor_doubt():
    """Three seeds on levels of their own: the slope within them, and two degrees of freedom less
    than the points without levels would have."""
    x, seeds = np.tile(SLOTS, 3), np.repeat([4, 7, 9], 4)
    levels = np.repeat([4.0, 5.5, 4.7], 4)
    noise = 1e-3 * np.random.default_rng(3).standard_normal(x.size)
    y = levels - 0.03 * np.log10(x) + noise
    found = line(x, y, seeds)
    logs = np.log10(x) - np.log10(SLOTS).mean()
    within = y - np.repeat([y[seeds == seed].mean() for seed in (4, 7, 9)], 4)
    slope = (logs @ within) / (logs @ logs)
    error = np.sqrt(np.sum((within - slope * logs)**2) / (12 - 3 - 1) / (logs @ logs))
    margin = 2.306004 * error  # the 97.5 % point of Student's t with eight degrees of freedom
    assert found.slope == pytest.approx(slope)
    assert (found.low, found.high) == pytest.approx((slope - margin, slope + margin), rel=1e-5)
    assert found.intercept == pytest.approx(y.mean() - slope * np.log10(SLOTS).mean())
    alone = line(x, y)
    assert alone.high - alone.low > 50 * (found.high - found.low)
    curve = parabola(x / 64_000, y, seeds)
    bare = parabola(x / 64_000, y - levels)
    assert curve.coefficients[1:] == pytest.approx(bare.coefficients[1:], abs=0.02)
    assert curve.curvature_high - curve.curvature_low < 2 * (
        bare.curvature_high - bare.curvature_low)


def test_a_line_needs_three_sizes():
    assert line((10, 20), (4.5, 4.4)) is None
    assert line((10, 20, 20), (4.5, 4.4, 4.4)) is None


def test_a_parabola_is_found_again():
    x = np.repeat(np.linspace(0.4, 1.0, 7), 3)
    noise = 1e-3 * np.random.default_rng(1).standard_normal(x.size)
    found = parabola(x, 2.0 + 0.5 * (x - 0.74)**2 + noise)
    assert found.points == 21
    assert found.vertex == pytest.approx(0.74, abs=0.01)
    assert found.low < 0.74 < found.high
    assert found.high - found.low < 0.05
    assert found.curvature_low < 0.5 < found.curvature_high
    np.testing.assert_allclose(found(x), np.polyval(np.polyfit(x, 2 + 0.5 * (x - 0.74)**2 + noise,
                                                              2), x), atol=1e-9)


def test_the_vertex_interval_holds_in_about_95_of_100_trials():
    x, held = np.repeat(np.linspace(0.4, 1.0, 7), 3), 0
    for trial in range(100):
        noise = 0.01 * np.random.default_rng(trial).standard_normal(x.size)
        found = parabola(x, 2.0 + 0.5 * (x - 0.74)**2 + noise)
        held += found.low <= 0.74 <= found.high
    assert 88 <= held <= 100


def test_noise_alone_has_no_optimum():
    x = np.repeat(np.linspace(0.4, 1.0, 7), 3)
    trials = [parabola(x, 2.0 + 0.01 * np.random.default_rng(seed).standard_normal(x.size))
              for seed in range(40)]
    assert sum(found.curvature_low < 0 < found.curvature_high for found in trials) >= 34
    assert sum(not np.isfinite([found.low, found.high]).all() for found in trials) >= 34
    falling = parabola(x, 2.0 - (x - 0.2)**2 + 1e-4 * np.random.default_rng(0).random(x.size))
    assert falling.vertex is None
    assert falling.low == falling.high == np.inf, "lowest at large rho"
    assert str(falling).startswith("no lowest point")


def test_a_parabola_needs_four_places():
    assert parabola((0.4, 0.6, 1.0, 1.0), (3, 2, 2, 2)) is None


def test_a_level_a_seed_needs_points_of_its_own():
    assert line((1, 2, 3), (3, 2, 1), (0, 1, 1)) is None
    assert line((1, 2, 3, 4), (3, 2, 1, 1), (0, 1, 1, 0)) is not None
    assert parabola((1, 2, 3, 4), (3, 2, 1, 2), (0, 0, 1, 1)) is None
    assert parabola((1, 2, 3, 4), (3, 2, 1, 2)) is not None
