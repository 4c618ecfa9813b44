"""The squashed Gaussian: its formula and the derivatives by hand, against distrax and JAX's own."""

from __future__ import annotations

import distrax
import jax
import jax.numpy as jnp
import numpy as np

from gemsjax.maths.distributions import LOG_STD_BOUNDS, SquashedGaussian

SHAPE = (5, 4, 6)
# Not wider: where tanh is nearly 1, 32 bits leave few digits of 1 - a^2, in the formula itself too.
LOG_STD = np.broadcast_to(np.array([-19.0, -6.0, -3.0, -2.0, -1.0, -0.5], np.float32), SHAPE)


def given(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)


def ours(mean, log_std, noise):
    return SquashedGaussian(mean, log_std).sample_and_log_prob(noise)


def by_distrax(mean, log_std, noise):
    std = jnp.exp(jnp.clip(log_std, *LOG_STD_BOUNDS))
    raw = mean + std * noise
    action = jnp.tanh(raw)
    return action, (distrax.Normal(mean, std).log_prob(raw) - jnp.log(1.0 - action * action + 1e-6)).sum(axis=-1)


def total(sample):
    """A number that depends on both outputs, for its gradients."""
    by_action, by_log_prob = given(2), given(3)[..., 0]

    def weighed(*inputs):
        action, log_prob = sample(*inputs)
        return (action * by_action).sum() + (log_prob * by_log_prob).sum()

    return weighed


def test_samples_and_log_probabilities_are_those_of_the_formula():
    inputs = given(0), LOG_STD, given(1)
    action, log_prob = ours(*inputs)
    with jax.enable_x64(True):
        known, known_log_prob = by_distrax(*(x.astype(np.float64) for x in inputs))
    np.testing.assert_allclose(action, known, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(action, SquashedGaussian(*inputs[:2]).sample(inputs[2]))
    np.testing.assert_allclose(log_prob, known_log_prob, rtol=1e-4)


def test_derivatives_by_hand_are_those_of_the_formula():
    inputs = given(0), LOG_STD, given(1)
    by_hand = jax.grad(total(ours), (0, 1, 2))(*map(jnp.asarray, inputs))
    with jax.enable_x64(True):
        known = jax.grad(total(by_distrax), (0, 1, 2))(*(jnp.asarray(x, jnp.float64) for x in inputs))
    for found, exact in zip(by_hand, known, strict=True):
        assert np.abs(exact).max() > 0.5
        np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-4)


def test_a_clipped_deviation_is_that_of_the_bound_and_has_no_gradient():
    low, high = LOG_STD_BOUNDS
    beyond = np.where(np.arange(6) < 3, low - 5.0, high + 0.5) * np.ones(SHAPE, np.float32)
    at = np.clip(beyond, low, high)
    for found, known in zip(ours(given(0), beyond, given(1)), ours(given(0), at, given(1)), strict=True):
        np.testing.assert_array_equal(found, known)
    assert not np.any(jax.grad(total(ours), 1)(given(0), jnp.asarray(beyond, jnp.float32), given(1)))


def test_one_number_of_many_users_and_a_shared_mean():
    mean, log_std, noise = jnp.zeros(1), jnp.full((3, 1), -1.0), jnp.asarray(given(1)[0, :3, :1])
    action, log_prob = ours(mean, log_std, noise)
    assert action.shape == (3, 1) and log_prob.shape == (3,)
    np.testing.assert_allclose(action, by_distrax(mean, log_std, noise)[0], rtol=1e-6)
    assert jax.grad(lambda mean: ours(mean, log_std, noise)[1].sum())(mean).shape == (1,)


def test_far_from_the_middle_everything_is_finite_and_the_mean_has_no_say():
    mean, log_std, noise = jnp.array([-50.0, 50.0]), jnp.zeros(2), jnp.array([0.3, -0.3])
    action, log_prob = ours(mean, log_std, noise)
    assert action.tolist() == [-1.0, 1.0] and np.isfinite(log_prob)
    by_mean, by_log_std = jax.grad(lambda *x: ours(*x, noise)[1], (0, 1))(mean, log_std)
    assert by_mean.tolist() == [0.0, 0.0] and by_log_std.tolist() == [-1.0, -1.0]
