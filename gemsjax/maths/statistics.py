"""Statistics over seeds: Student-t interval, t-tests, interquartile mean with bootstrap intervals. NumPy, host.

Called by experiments that make tables and pictures. Means and Welch's test follow the paper's section 5; interquartile
mean and bootstrap follow Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Estimate(NamedTuple):
    """A value with its 95 % interval (NaN bounds where there is only one observation)."""

    value: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


def t_interval(values: Sequence[float] | np.ndarray) -> Estimate:
    """Mean of [n] values with the Student-t interval that assumes nothing but independent, roughly normal seeds."""
    return _around_mean(values, lambda n: 1.0 / n)


def prediction_interval(values: Sequence[float] | np.ndarray) -> Estimate:
    """Mean of [n] values, and where one more of their kind lies 19 times of 20: for a single run of somebody else's."""
    return _around_mean(values, lambda n: 1.0 + 1.0 / n)


def _around_mean(values: Sequence[float] | np.ndarray, variances: Callable[[int], float]) -> Estimate:
    """Mean of [n] values with a Student-t interval; `variances(n)` is what the interval is of, in variances of one."""
    array = _numbers(values)
    mean = float(array.mean())
    if array.size < 2:
        return Estimate(mean, math.nan, math.nan)
    spread = float(array.std(ddof=1)) * math.sqrt(variances(array.size))
    half = float(stats.t.ppf(0.975, array.size - 1)) * spread
    return Estimate(mean, mean - half, mean + half)


def welch(ours: Sequence[float] | np.ndarray, theirs: Sequence[float] | np.ndarray) -> float:
    """Two-sided p-value of Welch's t-test that two groups of seeds have one mean; NaN with fewer than two in a group.

    Two groups without any spread differ for certain or not at all: 0.0 or 1.0.
    """
    one, two = _numbers(ours), _numbers(theirs)
    if min(one.size, two.size) < 2:
        return math.nan
    if one.std() == 0.0 and two.std() == 0.0:
        return 1.0 if one[0] == two[0] else 0.0
    return float(stats.ttest_ind(one, two, equal_var=False).pvalue)


def paired(ours: Sequence[float] | np.ndarray, theirs: Sequence[float] | np.ndarray) -> float:
    """Two-sided p-value of the paired t-test, seed by seed, that the mean difference is 0; NaN with fewer than two.

    It goes with `t_interval` of the differences. Differences without any spread: 0.0, or 1.0 if they are 0.
    """
    differences = _numbers(ours) - _numbers(theirs)
    if differences.size < 2:
        return math.nan
    if differences.std() == 0.0:
        return float(differences[0] == 0.0)
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def interquartile_mean(values: Sequence[float] | np.ndarray, resamples: int = 2_000, seed: int = 0) -> Estimate:
    """Mean of the middle half of [n] values with its percentile bootstrap interval.

    Args:
      values: one a seed.
      resamples: of the bootstrap.
      seed: of the bootstrap, so that a table made twice is the same table.
    """
    array = _numbers(values)
    middle = float(stats.trim_mean(array, 0.25))
    if array.size < 2:
        return Estimate(middle, math.nan, math.nan)
    drawn = np.random.default_rng(seed).integers(0, array.size, (resamples, array.size))
    low, high = np.quantile(stats.trim_mean(array[drawn], 0.25, axis=1), (0.025, 0.975))
    return Estimate(middle, float(low), float(high))


def _numbers(values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, np.float64).reshape(-1)
    if array.size == 0:
        raise ValueError("no values")
    return array
