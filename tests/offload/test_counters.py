"""What tiers count: sums, differences, and percentiles near the true ones."""

import numpy as np
import pytest

from engram_jax.offload.counters import TierMeter, summed


def metered(seconds):
    meter = TierMeter()
    for one in seconds:
        meter.count(6, 2, 10, one)
    return meter


@pytest.mark.parametrize("percent", [1, 50, 90, 99, 100])
def test_percentiles_are_right_to_a_ninth(percent):
    seconds = np.random.default_rng(0).lognormal(-9, 2, 1000).clip(1e-7)
    found = metered(seconds).counts().latency_us(percent)
    true = 1e6 * np.percentile(seconds, percent, method="inverted_cdf")
    assert true <= found <= true * (1 + 1 / 8) * (1 + 1e-9)


def test_any_time_has_its_kind():
    found = metered([0.0, 1e-12, 1e9]).counts()
    assert found.latency_N.sum() == found.lookups == 3
    assert metered([]).counts().latency_us(50) == 0


def test_counts_add_up_and_can_be_taken_away():
    meter = metered([1e-3] * 5)
    before = meter.counts()
    meter.count(3, 3, 10, 0.5)
    since = meter.counts() - before
    assert (since.lookups, since.asked, since.hits, since.bytes) == (1, 3, 3, 30)
    assert since.seconds == pytest.approx(0.5)
    assert 0.5e6 <= since.latency_us(50) <= 0.5e6 * 9 / 8
    assert (before.lookups, before.hit_rate) == (5, 1 / 3)
    both = summed([{"host": before, "disk": since}, {"host": since}])
    assert list(both) == ["host", "disk"]
    assert (both["host"].asked, both["disk"].asked) == (33, 3)
