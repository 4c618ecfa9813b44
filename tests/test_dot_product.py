"""The dot-product environment: recorded numbers, one table for all, what is refused, and what is the best."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemsjax.envs.dot_product import DotProductEnv, DotProductState, EnvConfig, best_item, make_params
from gemsjax.errors import DataError, SettingError
from gemsjax.on_policy.evaluation import compute_metrics, reference_returns

GOLDEN = json.loads((Path(__file__).parent / "golden" / "recsys_rl_examples.json").read_text())
PLANE = EnvConfig(num_items=2, num_users=3, state_dim=4, user_feature_dim=2, item_feature_dim=2)
KEY = jax.random.key(0)


def walk(config, items, user, actions):
    """Observations, rewards, flags of one user."""
    env, params = DotProductEnv(config), make_params(config, KEY, items=np.asarray(items, np.float32))
    start = DotProductState(jnp.asarray(user, jnp.float32), jnp.int32(0), jnp.int32(0))

    def turn(state, action):
        seen, state, *rest = env.step(KEY, state, action, params)
        return state, (seen, *rest)

    return jax.jit(lambda actions: jax.lax.scan(turn, start, actions)[1])(jnp.asarray(actions))


def test_recorded_rewards_and_users():
    golden = GOLDEN["env"]
    seen, reward, *_ = walk(PLANE, golden["items"], golden["user"], golden["actions"])
    np.testing.assert_allclose(reward, golden["rewards"], atol=1e-6)
    np.testing.assert_allclose(seen[:, :2], golden["user_states"], atol=1e-6)
    np.testing.assert_array_equal(seen[:, 2:], np.asarray(golden["items"])[golden["actions"]])


def test_recorded_return_of_an_aligned_item_and_the_end_of_an_episode():
    golden = GOLDEN["env"]
    _, reward, terminated, truncated, _ = walk(PLANE, [[1, 0], [0, 1]], [1.0, 0.0], [0] * 20)
    np.testing.assert_allclose(reward[:3], golden["first_three"], atol=1e-6)
    assert float(reward.sum()) == pytest.approx(golden["aligned_unit_item_20_step_return"], abs=1e-4)
    np.testing.assert_array_equal(terminated, [False] * 19 + [True])
    assert not truncated.any()
    cut = dataclasses.replace(PLANE, horizon_end="truncated")
    _, _, terminated, truncated, _ = walk(cut, [[1, 0], [0, 1]], [1.0, 0.0], [0] * 20)
    assert truncated[-1] and not truncated[:-1].any() and not terminated.any()


@pytest.mark.parametrize("action", [-1, 2, 2**31 - 1])
def test_a_number_outside_the_table_shows_nothing(action):
    seen, reward, _, _, info = walk(PLANE, [[1, 0], [0, 1]], [0.6, 0.8], [action, 0])
    np.testing.assert_allclose(seen[0], [0.6, 0.8, 0.0, 0.0], atol=1e-7)
    assert reward[0] == 0.0 and reward[1] == pytest.approx(0.6 * 0.99)
    np.testing.assert_array_equal(info["invalid_action"], [True, False])


def test_users_are_new_each_time_or_one_for_each_id():
    keys = jax.random.split(jax.random.key(3), 200)
    for fixed in (False, True):
        config = dataclasses.replace(PLANE, fixed_users=fixed)
        params = make_params(config, KEY)
        seen, state = jax.jit(jax.vmap(DotProductEnv(config).reset, in_axes=(0, None)))(keys, params)
        np.testing.assert_array_equal(seen, np.concatenate([state.user, np.zeros((200, 2))], axis=1))
        np.testing.assert_allclose(np.linalg.norm(state.user, axis=1), 1.0, atol=1e-6)
        assert set(np.asarray(state.user_id).tolist()) == {0, 1, 2}
        different = len(np.unique(np.asarray(state.user), axis=0))
        assert different == (3 if fixed else 200)
        if fixed:
            np.testing.assert_array_equal(state.user, params.users[state.user_id])
        else:
            assert params.users.shape == (0, 2)


def test_one_table_comes_from_the_key():
    config = EnvConfig()
    one, same, other = (make_params(config, jax.random.key(seed)).items for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert one.shape == (1_000, 32) and float(jnp.abs(one - other).max()) > 0.1
    np.testing.assert_allclose(np.linalg.norm(one, axis=1), 1.0, atol=1e-6)


def test_the_best_item_is_the_optimum():
    """Against all sequences of items of a short episode."""
    config = dataclasses.replace(PLANE, num_items=3, max_episode_steps=4, drift=0.4)
    params, env = make_params(config, jax.random.key(5)), DotProductEnv(config)
    sequences = jnp.array(list(itertools.product(range(3), repeat=4)))

    def total(user, actions):
        state = DotProductState(user, jnp.int32(0), jnp.int32(0))
        return jax.lax.scan(lambda s, a: env.step(KEY, s, a, params)[1:3], state, actions)[1].sum()

    users = jax.vmap(lambda key: env.reset(key, params)[1].user)(jax.random.split(KEY, 20))
    totals = jax.jit(jax.vmap(jax.vmap(total, (None, 0)), (0, None)))(users, sequences)
    best = best_item(params, users)
    reached = jax.jit(jax.vmap(total))(users, jnp.repeat(best[:, None], 4, axis=1))
    np.testing.assert_allclose(reached, totals.max(axis=1), atol=1e-6)
    played = reference_returns(env, params, KEY, 200)
    assert (played["best-item"] >= jnp.maximum(played["random"], played["same-item"]) - 1e-6).all()


def test_metrics_are_the_recorded_ones():
    golden = GOLDEN["metrics"]
    found = compute_metrics(jnp.array(golden["rewards"], jnp.float32))
    for name in ("total", "mean", "max", "min", "std"):
        assert float(found[f"{name}_reward"]) == pytest.approx(golden[name], abs=1e-5)
    with pytest.raises(SettingError, match="at least one reward"):
        compute_metrics(jnp.zeros((3, 0)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"state_dim": 60}, "state_dim = 60 .* user_feature_dim . item_feature_dim = 64"),
        ({"item_feature_dim": 16}, "item_feature_dim = 16 .* user_feature_dim = 32"),
        ({"num_items": 0}, "num_items = 0 .* at least 1"),
        ({"reward_decay": 1.5}, "reward_decay = 1.5"),
        ({"drift": float("nan")}, "drift = nan"),
        ({"horizon_end": "terminl"}, "did you mean 'terminal'"),
    ],
)
def test_what_does_not_fit_is_refused(change, says):
    with pytest.raises(SettingError, match=says):
        DotProductEnv(EnvConfig(**change))


def test_given_tables_are_checked():
    with pytest.raises(DataError, match=r"items of shape \(2, 3\)"):
        make_params(PLANE, KEY, items=np.zeros((2, 3)))
    with pytest.raises(DataError, match="items hold a number that is not finite"):
        make_params(PLANE, KEY, items=np.full((2, 2), np.nan))
    with pytest.raises(SettingError, match="unless fixed_users"):
        make_params(PLANE, KEY, users=np.zeros((3, 2)))
