"""The environments follow gymnax's contract without depending on gymnax (skipped where it is not installed)."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemsjax

environment = pytest.importorskip("gymnax.environments.environment")

ENV, PARAMS = gemsjax.make("focused_mix", num_items=40, slate_size=3, horizon=2)
KEY = jax.random.key(1)


class Wrapped(environment.Environment):
    """What it takes to hand an environment to a library that expects a gymnax one."""

    def reset_env(self, key, params):
        return ENV.reset(key, params)

    def step_env(self, key, state, action, params):
        observation, state, reward, terminated, _, info = ENV.step(key, state, action, params)
        return observation, state, reward, terminated, info

    def is_truncated(self, state, params):
        return state.time >= params.horizon


def test_signatures_agree_up_to_the_name_of_the_action():
    for method, names in (("reset", ["key", "params"]), ("step", ["key", "state", "action", "params"])):
        theirs = list(inspect.signature(getattr(environment.Environment, method)).parameters)[1:]
        ours = list(inspect.signature(getattr(ENV, method)).parameters)
        assert theirs == names
        assert [name.replace("slate", "action") for name in ours] == names


def test_a_step_through_gymnax_is_our_step():
    wrapped, slate = Wrapped(), jnp.array([-1, 4, 5])
    observation, state = wrapped.reset(KEY, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, (observation, state), jax.jit(ENV.reset)(KEY, PARAMS))
    step_key, _ = jax.random.split(KEY)
    theirs = wrapped.step(KEY, state, slate, PARAMS)
    ours = jax.jit(ENV.step)(step_key, state, slate, PARAMS)
    assert len(theirs) == len(ours) == 6
    for left, right in zip(theirs[:5], ours[:5], strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), left, right)
        assert jax.tree.structure(left) == jax.tree.structure(right)
    assert set(ours[5]) <= set(theirs[5])


def test_gymnax_resets_at_the_horizon():
    wrapped, slate = Wrapped(), jnp.array([1, 2, 3])
    _, state = wrapped.reset(KEY, PARAMS)
    for turn in (1, 2):
        _, state, _, terminated, truncated, _ = wrapped.step(KEY, state, slate, PARAMS)
        assert not terminated and bool(truncated) == (turn == 2)
    assert state.time == 0
