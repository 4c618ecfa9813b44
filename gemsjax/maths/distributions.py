"""Distributions over actions and slates: the only module that imports distrax. Used by agents and pre-training.

Every sampler here takes its randomness as an argument, so that a rollout can draw a whole episode's at once and tests
can replay recorded noise.
"""

from __future__ import annotations

import distrax
import jax.numpy as jnp

from gemsjax.types import Array

LOG_STD_BOUNDS = (-20.0, 2.0)


class SquashedGaussian:
    """tanh of a diagonal Gaussian, inside (-1, 1)^A (SAC's policy).

    The log-probability has the tanh correction of the published implementation, log(1 - a^2 + 1e-6), and leaves out
    the constant of any later rescaling: entropy is measured in the unit box.
    """

    def __init__(self, mean: Array, log_std: Array) -> None:
        """mean, log_std: [..., A]; the log standard deviation is clipped to [-20, 2]."""
        self.mean = mean
        self._std = jnp.exp(jnp.clip(log_std, *LOG_STD_BOUNDS))
        self._gaussian = distrax.Normal(mean, self._std)

    def sample_and_log_prob(self, noise: Array) -> tuple[Array, Array]:
        """Reparameterised sample [..., A] from standard normal noise [..., A], and its log-probability [...]."""
        raw = self.mean + self._std * noise
        action = jnp.tanh(raw)
        log_prob = self._gaussian.log_prob(raw) - jnp.log(1.0 - action * action + 1e-6)
        return action, log_prob.sum(axis=-1)

    def sample(self, noise: Array) -> Array:
        """Sample [..., A] from standard normal noise [..., A]."""
        return jnp.tanh(self.mean + self._std * noise)

    def mode(self) -> Array:
        """The greedy action, tanh of the mean: [..., A]."""
        return jnp.tanh(self.mean)


class DiagonalGaussian:
    """Independent normal numbers, [..., A]; the log standard deviation (clipped to [-20, 2]) may be shared."""

    def __init__(self, mean: Array, log_std: Array) -> None:
        """mean: [..., A]; log_std: [A] or [..., A]."""
        std = jnp.exp(jnp.clip(log_std, *LOG_STD_BOUNDS))
        self._gaussian = distrax.MultivariateNormalDiag(mean, jnp.broadcast_to(std, mean.shape))

    def sample(self, noise: Array) -> Array:
        """Sample [..., A] from standard normal noise [..., A]."""
        return self._gaussian.loc + self._gaussian.scale_diag * noise

    def log_prob(self, action: Array) -> Array:
        """[..., A] -> [...]."""
        return self._gaussian.log_prob(action)

    def entropy(self) -> Array:
        """In nats, over all dimensions: [...]."""
        return self._gaussian.entropy()

    def mode(self) -> Array:
        """The mean: [..., A]."""
        return self._gaussian.loc


def kl_to_standard_normal(mean: Array, log_variance: Array) -> Array:
    """KL(N(mean, exp(log_variance)) || N(0, 1)) per dimension: [..., d]."""
    return 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)
