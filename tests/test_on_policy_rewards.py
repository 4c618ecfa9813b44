"""Rewards of other kinds of feed: by hand, over whole batches, and of signals that are no numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemsjax.on_policy import rewards

CASES = [
    ("short-video", (0.9, 0.1, 1, 1, 1), -0.5),  # skipped, whatever else
    ("short-video", (1.0, 0.5, 0, 0, 0), 0.2),
    ("short-video", (9.0, 0.5, 1, 0, 1), 0.6),
    ("short-video", (9.0, 1.0, 1, 1, 1), 1.0),
    ("long-video", (30.0, 120.0, 1, 0, 0.0), 0.35),
    ("long-video", (0.5, 0.0, 0, 1, 0.0), 0.5),  # as if it were one second long
    ("social-feed", (0, 0.5, 0.0), 0.15),
    ("social-feed", (1, 0.5, 2.0), 1.1),
    ("social-feed", (2, 0.0, 0.0), 0.09),
    ("social-feed", (3, 0.0, 0.0), 0.3),
    ("social-feed", (4, 1.0, 0.0), 0.54),
    ("social-feed", (5, 1.0, 0.0), 0.3),  # no such reaction
    ("social-feed", (-1, 1.0, 0.0), 0.3),
    ("video-commerce", (0.5, 1, 0, 1), 0.5),
    ("video-commerce", (0.0, 0, 1, 0), 0.3),
    ("learning", (1.0, 0.25, 0.5), 0.75),
]


@pytest.mark.parametrize(("name", "values", "expected"), CASES)
def test_by_hand(name, values, expected):
    kind, reward = rewards.REWARDS[name]
    assert float(reward(kind(*values))) == pytest.approx(expected, abs=1e-6)


def test_likeness_costs_what_is_asked():
    signals = rewards.LongVideo(*map(jnp.float32, (30.0, 120.0, 1, 0, 0.5)))
    assert float(rewards.long_video(signals, 0.2)) == pytest.approx(0.35 - 0.1, abs=1e-6)
    previous = jnp.array([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [0.0, 0.0]])
    cosine = jax.jit(rewards.mean_cosine)
    # Cosines with [3, 4]: 0.6, 0.8, -0.6 and 0 of the row of zeros.
    assert float(cosine(previous, jnp.array([3.0, 4.0]))) == pytest.approx(0.2, abs=1e-6)
    counted = jnp.array([True, True, False, False])
    broken = previous.at[2].set(jnp.nan)
    assert float(cosine(broken, jnp.array([3.0, 4.0]), counted)) == pytest.approx(0.7, abs=1e-6)
    assert float(cosine(broken, jnp.array([3.0, 4.0]))) == pytest.approx(1.4 / 3, abs=1e-6)
    assert float(cosine(previous, jnp.array([3.0, 4.0]), jnp.zeros(4, bool))) == 0.0
    assert float(cosine(previous, jnp.array([jnp.nan, 4.0]))) == float(cosine(previous, jnp.zeros(2))) == 0.0


@pytest.mark.parametrize("name", rewards.REWARDS)
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_turn_with_a_signal_that_is_no_number_is_worth_nothing(name, broken):
    """Row n has signal n broken; the last row is whole, and counts as it would alone."""
    kind, reward = rewards.REWARDS[name]
    width = len(kind._fields)
    rows = np.ones((width + 1, width), np.float32)
    rows[np.arange(width), np.arange(width)] = broken
    signals = kind(*jnp.asarray(rows.T))
    found = np.asarray(jax.jit(reward)(signals))
    np.testing.assert_array_equal(rewards.known(signals), np.arange(width + 1) == width)
    assert not found[:-1].any() and found[-1] == pytest.approx(float(reward(kind(*rows[-1]))), abs=1e-6) != 0.0
    np.testing.assert_array_equal(jax.vmap(reward)(signals), found)


def test_what_overflows_is_worth_nothing():
    largest = float(np.finfo(np.float32).max)
    assert float(rewards.learning(rewards.Learning(largest, largest, 0.0))) == 0.0
