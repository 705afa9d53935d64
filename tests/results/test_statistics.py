"""Means over seeds: against numbers worked out by hand and tables of Student's t."""

import itertools

import numpy as np
import pytest

from engram_jax.results.statistics import RESAMPLES, Interval, bootstrap, interval, paired


def test_the_interval_is_student_t():
    found = interval([4.0, 5.0, 9.0])
    error = (7 / 3) ** 0.5  # the variance is (4 + 1 + 9) / 2 = 7
    margin = 4.302653 * error  # the 97.5 % point with two degrees of freedom
    assert (found.mean, found.count) == (6.0, 3)
    assert (found.low, found.high) == pytest.approx((6 - margin, 6 + margin), rel=1e-6)


def test_more_values_make_it_narrower():
    few, many = interval([1.0, 2.0]), interval([1.0, 2.0] * 8)
    assert few.high == pytest.approx(1.5 + 12.706205 * 0.5, rel=1e-6)
    assert many.high == pytest.approx(1.5 + 2.131450 * (4 / 15) ** 0.5 / 4, rel=1e-6)


def test_one_value_has_no_ends():
    found = interval([3.25])
    assert found == Interval(3.25, None, None, 1)
    assert str(found) == "3.2500"
    assert found.signed() == "+3.2500"


def test_no_values_have_no_mean():
    with pytest.raises(ValueError, match="0 values"):
        interval([])


def test_equal_values_have_an_interval_of_no_width():
    assert interval([2.0, 2.0]) == Interval(2.0, 2.0, 2.0, 2)


def test_pairs_are_of_equal_seeds():
    arm, baseline = {0: 4.5, 1: 4.75, 7: 1.0}, {1: 4.5, 0: 4.0, 2: 9.0}
    assert paired(arm, baseline) == interval([0.5, 0.25])
    assert paired(baseline, arm) == interval([-0.5, -0.25])
    assert paired({0: 1.0}, {1: 1.0}) is None
    assert paired({3: 1.5}, {3: 1.0}) == Interval(0.5, None, None, 1)


def test_as_text():
    found = Interval(4.5, 4.25, 4.75, 3)
    assert str(found) == "4.5000 (4.2500 to 4.7500)"
    assert Interval(-0.5, -1.25, 0.25, 3).signed() == "-0.5000 (-1.2500 to +0.2500)"


def test_the_bootstrap_of_few_values_takes_every_sample():
    values = (1.0, 2.0, 4.0, 8.0)
    means = sorted(sum(sample) / 4 for sample in itertools.product(values, repeat=4))
    assert len(means) == 256
    # 2.5 % of 256 is 6.4: below the low end lie 6 samples, above the high one 6.
    assert bootstrap(values) == Interval(3.75, means[6], means[249], 4)
    assert bootstrap([3.0, 1.0, 2.0]) == Interval(2.0, 1.0, 3.0, 3), "1 in 27 is above 2.5 %"
    assert bootstrap([3.25]) == Interval(3.25, None, None, 1)
    with pytest.raises(ValueError, match="0 values"):
        bootstrap([])


def test_the_bootstrap_of_many_values_nears_the_normal_interval():
    values = np.random.default_rng(1).normal(size=400)
    assert len(values) ** len(values) > RESAMPLES
    drawn, exact = bootstrap(values), interval(values)
    assert (drawn.low, drawn.high) == pytest.approx((exact.low, exact.high), abs=0.005)
    assert bootstrap(values) == drawn, "the same samples each time"
