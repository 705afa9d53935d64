"""Curves: against least squares by hand, and intervals that hold what they promise."""

import numpy as np
import pytest

from engram_jax.results.fits import line, parabola
from engram_jax.results.statistics import interval

SLOTS = (1000, 4000, 16_000, 64_000)
RHOS = np.linspace(0.4, 1.0, 7)
TRIALS = 1500
SURE = 3 * np.sqrt(0.95 * 0.05 / TRIALS)  # three standard deviations of a share of TRIALS


def test_the_line_is_least_squares_and_its_interval_student_t():
    y = np.array([4.57, 4.541, 4.513, 4.445])
    fit, x = line(SLOTS, y), np.log10(SLOTS)
    slope, intercept = np.polyfit(x, y, 1)
    assert (fit.slope, fit.intercept) == pytest.approx((slope, intercept))
    residual = y - intercept - slope * x
    error = np.sqrt(np.sum(residual**2) / 2 / np.sum((x - x.mean())**2))
    margin = 4.302653 * error  # the 97.5 % point of Student's t with two degrees of freedom
    assert (fit.low, fit.high) == pytest.approx((slope - margin, slope + margin), rel=1e-5)
    assert (fit.points, fit.seeds) == (4, 0)
    np.testing.assert_allclose(fit(np.array([1e4])), intercept + slope * 4)


def test_each_seed_has_a_line_of_its_own():
    x, seeds = np.tile(SLOTS, 3), np.repeat([4, 7, 9], 4)
    noise = 1e-3 * np.random.default_rng(3).standard_normal(x.size)
    y = np.repeat([4.0, 5.5, 4.7], 4) - np.repeat([0.02, 0.03, 0.05], 4) * np.log10(x) + noise
    fit = line(x, y, seeds)
    own = [np.polyfit(np.log10(SLOTS), y[seeds == seed], 1) for seed in (4, 7, 9)]
    slopes = interval(slope for slope, _ in own)
    assert (fit.slope, fit.low, fit.high) == pytest.approx((slopes.mean, slopes.low, slopes.high))
    assert fit.intercept == pytest.approx(np.mean([level for _, level in own]))
    assert str(fit).endswith("(95 %, 12 runs of 3 seeds)")
    curve = parabola(x / 64_000, y, seeds)
    curvatures = interval(np.polyfit(np.array(SLOTS) / 64_000, y[seeds == seed], 2)[0]
                          for seed in (4, 7, 9))
    assert (curve.coefficients[2], curve.curvature_low, curve.curvature_high) == pytest.approx(
        (curvatures.mean, curvatures.low, curvatures.high))


def test_one_seed_says_nothing_about_the_others():
    fit = line(SLOTS, (4.5, 4.4, 4.3, 4.2), (0, 0, 0, 0))
    assert (fit.low, fit.high) == (None, None)
    assert "of one seed" in str(fit)
    curve = parabola((0.4, 0.6, 0.8, 1.0), (3, 2, 2, 3.1), (1, 1, 1, 1))
    assert curve.vertex == pytest.approx(0.69, abs=0.02)
    assert (curve.low, curve.high) == (curve.curvature_low, curve.curvature_high) == (
        -np.inf, np.inf)


def seeds_of_their_own(trial, x, count, slopes, noise):
    """y of `count` seeds, which differ in level and in slope, at each x; and the seeds."""
    draw = np.random.default_rng(trial)
    own = draw.normal(size=(count, 2)) * (0.05, slopes)
    y = own[:, :1] + own[:, 1:] * x + noise * draw.normal(size=(count, len(x)))
    return y.ravel(), np.repeat(np.arange(count), len(x))


@pytest.mark.parametrize(("count", "slopes"), [(3, 0.004), (3, 0.0), (5, 0.004)])
def test_the_slope_lies_in_95_of_100_intervals(count, slopes):
    """Whether seeds have slopes of their own or not; a fit that pools the residuals of all seeds
    holds it in 0.85, 0.95 and 0.84 of these trials."""
    x, held = np.tile(SLOTS, count), 0
    for trial in range(TRIALS):
        y, seeds = seeds_of_their_own(trial, np.log10(SLOTS), count, slopes, 0.004)
        fit = line(x, y - 0.03 * np.log10(x), seeds)
        held += fit.low <= -0.03 <= fit.high
    assert held / TRIALS == pytest.approx(0.95, abs=SURE)


@pytest.mark.parametrize("slopes", [0.03, 0.0])
def test_the_vertex_and_the_curvature_lie_in_95_of_100_intervals(slopes):
    """Of curves that turn enough for most intervals to be finite."""
    x, vertices, curvatures, finite = np.tile(RHOS, 3), 0, 0, 0
    for trial in range(TRIALS):
        y, seeds = seeds_of_their_own(trial, RHOS, 3, slopes, 0.01)
        curve = parabola(x, y + (x - 0.74)**2, seeds)
        vertices += curve.low <= 0.74 <= curve.high
        curvatures += curve.curvature_low <= 1 <= curve.curvature_high
        finite += np.isfinite([curve.low, curve.high]).all()
    assert finite / TRIALS > 0.9
    assert vertices / TRIALS == pytest.approx(0.95, abs=SURE)
    assert curvatures / TRIALS == pytest.approx(0.95, abs=SURE)


def test_points_that_share_nothing_hold_their_vertex_as_often():
    x, held = np.repeat(RHOS, 3), 0
    for trial in range(TRIALS):
        noise = 0.01 * np.random.default_rng(trial).standard_normal(x.size)
        curve = parabola(x, 2.0 + 0.5 * (x - 0.74)**2 + noise)
        held += curve.low <= 0.74 <= curve.high
    assert held / TRIALS == pytest.approx(0.95, abs=SURE)


def test_a_run_that_diverged_has_no_curve():
    bad = (4.9, 4.87, float("nan"), 4.8)
    assert line(SLOTS, bad) is None
    assert line((*SLOTS, *SLOTS), (*bad, 4.9, 4.8, 4.7, 4.6), (0,) * 4 + (1,) * 4) is None
    assert parabola((0.4, 0.6, 0.8, 1.0), (3, float("inf"), 2, 2)) is None


def test_a_line_needs_three_sizes():
    assert line((), ()) is None
    assert line((10, 20), (4.5, 4.4)) is None
    assert line((10, 20, 20), (4.5, 4.4, 4.4)) is None


def test_a_parabola_is_the_least_squares_and_finds_its_vertex():
    x = np.repeat(RHOS, 3)
    y = 2.0 + 0.5 * (x - 0.74)**2 + 1e-3 * np.random.default_rng(1).standard_normal(x.size)
    curve = parabola(x, y)
    assert (curve.points, curve.seeds) == (21, 0)
    assert curve.vertex == pytest.approx(0.74, abs=0.01)
    assert curve.low < 0.74 < curve.high
    assert curve.high - curve.low < 0.05
    assert curve.curvature_low < 0.5 < curve.curvature_high
    np.testing.assert_allclose(curve(x), np.polyval(np.polyfit(x, y, 2), x), atol=1e-9)


def test_the_vertex_lies_where_the_slope_may_be_nothing():
    """At the ends of the interval Student's t of the seeds' slopes just reaches 0."""
    y, seeds = seeds_of_their_own(5, RHOS, 4, 0.03, 0.01)
    x = np.tile(RHOS, 4)
    curve = parabola(x, y + (x - 0.7)**2, seeds)
    own = [np.polyfit(RHOS, (y + (x - 0.7)**2)[seeds == seed], 2) for seed in range(4)]
    at_low = interval(b + 2 * c * curve.low for c, b, _ in own)
    at_high = interval(b + 2 * c * curve.high for c, b, _ in own)
    assert at_low.high == pytest.approx(0, abs=1e-9)
    assert at_high.low == pytest.approx(0, abs=1e-9)


def test_noise_alone_has_no_optimum():
    x = np.repeat(RHOS, 3)
    trials = [parabola(x, 2.0 + 0.01 * np.random.default_rng(seed).standard_normal(x.size))
              for seed in range(40)]
    assert sum(curve.curvature_low < 0 < curve.curvature_high for curve in trials) >= 34
    assert sum(not np.isfinite([curve.low, curve.high]).any() for curve in trials) >= 34
    falling = parabola(x, 2.0 - (x - 0.2)**2 + 1e-4 * np.random.default_rng(0).random(x.size))
    assert falling.vertex is None
    assert str(falling).startswith("no lowest point")


def test_every_seed_needs_points_enough_for_its_own_curve():
    assert parabola((0.4, 0.6, 1.0, 1.0), (3, 2, 2, 2)) is None
    assert line((1, 2, 3), (3, 2, 1), (0, 1, 1)) is None
    assert line((1, 2, 3, 1, 2), (3, 2, 1, 3, 2), (0, 0, 0, 1, 1)) is None
    assert line((1, 2, 3, 1, 2, 3), (3, 2, 1, 3, 2, 2), (0, 0, 0, 1, 1, 1)) is not None
