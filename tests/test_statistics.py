"""Statistics over seeds against values worked out by hand, and their coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gemsjax.maths.statistics import interquartile_mean, paired, prediction_interval, t_interval, welch


def test_t_interval_by_hand():
    """Three values: mean 2, standard deviation 1, t(2, 0.975) = 4.302653."""
    found = t_interval([1.0, 2.0, 3.0])
    assert found.value == 2.0
    assert found.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_prediction_interval_by_hand():
    """The same three values and one more: sqrt(1 + 1/3) standard deviations instead of sqrt(1/3)."""
    found = prediction_interval([1.0, 2.0, 3.0])
    assert found.value == 2.0
    assert found.half == pytest.approx(4.302653 * math.sqrt(4 / 3), rel=1e-6)
    assert math.isnan(prediction_interval([5.0]).low)


def test_one_seed_has_no_interval():
    assert t_interval([5.0]).value == 5.0 and math.isnan(t_interval([5.0]).low)
    assert math.isnan(interquartile_mean([5.0]).high) and math.isnan(welch([1.0], [2.0, 3.0]))


def test_welch_by_hand():
    """Means 2 and 6, variances 1 and 4, three seeds each: t = -4 / sqrt(5/3) with 2.941 degrees of freedom."""
    assert welch([1, 2, 3], [4, 6, 8]) == pytest.approx(0.05494, abs=2e-4)
    assert welch([2, 2], [2, 2]) == 1.0 and welch([2, 2], [3, 3]) == 0.0


def test_paired_by_hand():
    """Differences 1, 2, 3: t = 2 sqrt(3) = 3.4641 with 2 degrees of freedom, where p = 1 - t / sqrt(2 + t^2)."""
    assert paired([2, 4, 6], [1, 2, 3]) == pytest.approx(1 - math.sqrt(12 / 14), abs=1e-9)
    assert paired([1, 2, 3], [2, 4, 6]) == pytest.approx(1 - math.sqrt(12 / 14), abs=1e-9)
    assert paired([2, 3], [2, 3]) == 1.0 and paired([2, 3], [1, 2]) == 0.0 and math.isnan(paired([1], [2]))


def test_interquartile_mean_ignores_the_tails():
    values = [0.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 1000.0]
    found = interquartile_mean(values)
    assert found.value == 12.5 and found.low <= 12.5 <= found.high
    assert found == interquartile_mean(values)


def test_intervals_cover_the_mean():
    """400 samples of six seeds: the t-interval covers 95 % (standard error 1.1 %)."""
    samples = np.random.default_rng(0).normal(3.0, 2.0, (400, 6))
    covered = [found.low <= 3.0 <= found.high for found in map(t_interval, samples)]
    assert np.mean(covered) == pytest.approx(0.95, abs=4 * 0.011)


def test_prediction_intervals_cover_one_more():
    """400 samples of six seeds and a seventh: 95 % (standard error 1.1 %)."""
    samples = np.random.default_rng(1).normal(3.0, 2.0, (400, 7))
    covered = [found.low <= one <= found.high for *known, one in samples for found in [prediction_interval(known)]]
    assert np.mean(covered) == pytest.approx(0.95, abs=4 * 0.011)


def test_nothing_to_summarise():
    with pytest.raises(ValueError, match="no values"):
        t_interval([])
