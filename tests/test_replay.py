"""The replay: order of the ring, storage types, sampling without repeats and evenly, nothing lost on the way."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gemsjax.errors import SettingError
from gemsjax.replay import make_replay
from gemsjax.types import Dims, Episode, Observation

DIMS = Dims(num_items=40, slate_size=2, horizon=3)
CAPACITY, USERS, BATCH = 6, 2, 4
REPLAY = make_replay(DIMS, CAPACITY, BATCH, USERS)
ADD, SAMPLE = jax.jit(REPLAY.add), jax.jit(REPLAY.sample)
KEYS = jax.random.split(jax.random.key(5), 4_000)
SAMPLES = jax.jit(jax.vmap(REPLAY.sample, in_axes=(None, 0)))


def episode(number: int, dims: Dims = DIMS) -> Episode:
    """Episode `number`, recognisable by its rewards; its other numbers are drawn."""
    rng = np.random.default_rng(number)
    H, K = dims.horizon, dims.slate_size
    slates, clicks = rng.integers(0, dims.num_items, (H + 1, K)), rng.random((H + 1, K)) < 0.5
    whole = Observation(jnp.asarray(slates, jnp.int32), jnp.asarray(clicks))
    seen, final = (jax.tree.map(lambda x, part=part: x[part], whole) for part in (slice(H), H))
    action = jnp.asarray(rng.standard_normal((H, 3)), jnp.float32)
    return Episode(seen, action, jnp.full(H, number, jnp.float32), final)


def together(numbers) -> Episode:
    return jax.tree.map(lambda *x: jnp.stack(x), *(episode(number) for number in numbers))


def filled(batches: int):
    """A replay to which episodes 1, 2, ... were added, `USERS` at a time."""
    state = REPLAY.init(episode(0))
    for batch in range(batches):
        state = ADD(state, together(range(1 + USERS * batch, 1 + USERS * (batch + 1))))
    return state


def numbers_in(episodes: Episode) -> np.ndarray:
    return np.asarray(episodes.reward[..., 0]).astype(int)


@pytest.mark.parametrize("batches", [0, 1, 3, 4, 8])
def test_the_ring_holds_the_latest_episodes_in_order(batches):
    state = filled(batches)
    added = batches * USERS
    expected = np.zeros(CAPACITY, int)
    for number in range(1, added + 1):
        expected[(number - 1) % CAPACITY] = number
    assert int(state.added) == added
    np.testing.assert_array_equal(numbers_in(state.episodes), expected)


def test_storage_is_compact_and_samples_are_wide():
    state = filled(3)
    kept, given_back = state.episodes, SAMPLE(state, jax.random.key(0))
    assert kept.observation.slate.dtype == kept.final.slate.dtype == jnp.int16
    assert kept.observation.clicks.dtype == kept.final.clicks.dtype == bool
    assert kept.action.dtype == kept.reward.dtype == jnp.float32
    assert jax.tree.map(lambda x: x.dtype, given_back) == jax.tree.map(lambda x: x.dtype, episode(0))


@pytest.mark.parametrize(("items", "dtype"), [(32_767, jnp.int16), (100_000, jnp.int32)])
def test_item_numbers_fit_their_type(items, dtype):
    """Slates as actions (and the -1 that asks the oracle) are stored like slates."""
    dims = DIMS._replace(num_items=items)
    replay = make_replay(dims, 1, 1)
    largest = episode(1).replace(action=jnp.array([[items - 1, -1]] * DIMS.horizon, jnp.int32))
    state = replay.add(replay.init(largest), jax.tree.map(lambda x: x[None], largest))
    assert state.episodes.action.dtype == state.episodes.observation.slate.dtype == dtype
    np.testing.assert_array_equal(replay.sample(state, jax.random.key(0)).action[0], largest.action)


def test_what_is_sampled_is_what_was_added_bit_for_bit():
    state = filled(5)  # the ring has gone round, so that rows are not where they would be in order
    sampled = SAMPLE(state, jax.random.key(1))
    added = together(numbers_in(sampled))
    for one, other in zip(jax.tree.leaves(sampled), jax.tree.leaves(added), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("batches", "present"), [(2, range(1, 5)), (3, range(1, 7)), (5, range(5, 11))])
def test_samples_hold_no_episode_twice_and_none_that_is_not_there(batches, present):
    numbers = numbers_in(SAMPLES(filled(batches), KEYS))
    assert all(len(set(row)) == BATCH for row in numbers)
    assert set(numbers.ravel()) == set(present)


def test_every_episode_is_as_likely_in_every_place():
    numbers = numbers_in(SAMPLES(filled(3), KEYS))
    for place in range(BATCH):
        assert stats.chisquare(np.bincount(numbers[:, place], minlength=CAPACITY + 1)[1:]).pvalue > 1e-3
    pairs = np.bincount(numbers[:, 0] * 10 + numbers[:, 1])
    assert stats.chisquare(pairs[pairs > 0]).pvalue > 1e-3 and (pairs > 0).sum() == CAPACITY * (CAPACITY - 1)


@pytest.mark.parametrize(
    ("capacity", "batch", "users", "setting"),
    [
        (0, 1, 1, "replay_capacity"),
        (5, 6, 1, "batch_size"),
        (5, 0, 1, "batch_size"),
        (5, 2, 6, "users_per_step"),
        (5, 2, 2, "replay_capacity"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(capacity, batch, users, setting):
    with pytest.raises(SettingError, match=f"^{setting} = "):
        make_replay(DIMS, capacity, batch, users)
