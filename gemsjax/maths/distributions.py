"""Distributions over actions and slates: the only module that imports distrax. Used by agents and pre-training.

The samplers of agents take their randomness as an argument, so that a rollout can draw a whole episode's at once and
tests can replay recorded noise; `PlackettLuce` is a `distrax.Distribution` and takes keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import distrax
import jax
import jax.numpy as jnp
import numpy as np

from gemsjax.errors import require, require_count
from gemsjax.maths.blocks import once
from gemsjax.maths.plackett_luce import (
    COSINE,
    Choices,
    Penalty,
    choices,
    draw_slate,
    greedy_slate,
    log_prob,
    valid_slots,
)
from gemsjax.types import Array, Key

LOG_STD_BOUNDS = (-20.0, 2.0)


class SquashedGaussian:
    """tanh of a diagonal Gaussian, inside (-1, 1)^A (SAC's policy).

    The log-probability has the tanh correction of the published implementation, log(1 - a^2 + 1e-6), and leaves out
    the constant of any later rescaling: entropy is measured in the unit box.
    """

    def __init__(self, mean: Array, log_std: Array) -> None:
        """mean, log_std: [..., A]; the log standard deviation is clipped to [-20, 2]."""
        self.mean, self._log_std = mean, log_std

    def sample_and_log_prob(self, noise: Array) -> tuple[Array, Array]:
        """Reparameterised sample [..., A] from standard normal noise [..., A], and its log-probability [...].

        For reverse-mode differentiation only.
        """
        given = self.mean, self._log_std, noise
        shape, dtype = jnp.broadcast_shapes(*(x.shape for x in given)), jnp.result_type(*given)
        action, log_prob = _squashed(*(jnp.broadcast_to(x, shape).astype(dtype).reshape(-1) for x in given))
        return action.reshape(shape), log_prob.reshape(shape).sum(axis=-1)

    def sample(self, noise: Array) -> Array:
        """Sample [..., A] from standard normal noise [..., A]."""
        return jnp.tanh(self.mean + _std(self._log_std) * noise)

    def mode(self) -> Array:
        """The greedy action, tanh of the mean: [..., A]."""
        return jnp.tanh(self.mean)


_MARGIN = 1e-6
"""Keeps the logarithm finite where tanh is 1."""
_HALF_LOG_TAU = 0.5 * math.log(2.0 * math.pi)


@jax.custom_vjp
def _squashed(mean: Array, log_std: Array, noise: Array) -> tuple[Array, Array]:
    """Samples and their log-probabilities, number by number: all [n].

    The derivative is by hand, so that no exponential is taken again. One row of numbers fills a CPU's vectors, which
    rows of A = 20 do not.
    """
    return _squashed_forward(mean, log_std, noise)[0]


def _squashed_forward(mean: Array, log_std: Array, noise: Array) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    mean, log_std, noise = once((mean, log_std, noise))
    std = _std(log_std)
    action = jnp.tanh(mean + std * noise)
    density = -0.5 * jnp.square(noise) - jnp.clip(log_std, *LOG_STD_BOUNDS) - _HALF_LOG_TAU
    log_prob = density - jnp.log(1.0 - action * action + _MARGIN)
    return once((action, log_prob)), (action, log_std, noise)


def _squashed_backward(residuals: tuple[Array, ...], grads: tuple[Array, Array]) -> tuple[Array, ...]:
    action, log_std, noise = residuals
    by_action, by_log_prob = once(grads)
    std = _std(log_std)
    slope = (1.0 + action) * (1.0 - action)  # keeps more digits near 1 than 1 - a^2
    by_raw = slope * (by_action + by_log_prob * 2.0 * action / (slope + _MARGIN))
    low, high = LOG_STD_BOUNDS
    by_log_std = jnp.where((log_std < low) | (log_std > high), 0.0, by_raw * std * noise - by_log_prob)
    return once((by_raw, by_log_std, by_raw * std - by_log_prob * noise))


def _std(log_std: Array) -> Array:
    return jnp.exp(jnp.clip(log_std, *LOG_STD_BOUNDS))


_squashed.defvjp(_squashed_forward, _squashed_backward)


class DiagonalGaussian:
    """Independent normal numbers, [..., A]; the log standard deviation (clipped to [-20, 2]) may be shared."""

    def __init__(self, mean: Array, log_std: Array) -> None:
        """mean: [..., A]; log_std: [A] or [..., A]."""
        std = _std(log_std)
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


class PlackettLuce(distrax.Distribution):
    """Ordered slates without repeats from a softmax over items, with a penalty for items like those already taken.

    Batch shape [...], event shape [S] int32. The mathematics, and what is done about scores that are not finite, are in
    `maths.plackett_luce`. `valid` tells which slots hold an item that is available; the others are padding, which
    counts nothing in a log-probability.
    """

    def __init__(
        self,
        scores: Array,
        num_slots: int,
        *,
        temperature: Array | float = 1.0,
        available: Array | None = None,
        features: Array | None = None,
        mixture: Array | float = 1.0,
        penaliser: Penalty | None = COSINE,
    ) -> None:
        """One user's slate, or a batch of them.

        Args:
          scores: [..., N].
          num_slots: S, from 1 to N.
          temperature: [...] or a number, above 0; scores, but not penalties, are divided by it.
          available: [..., N] bool, or None if all items are.
          features: [..., N, D] what the penaliser compares; None for no penalty.
          mixture: [...] or a number, factor of the penalty.
          penaliser: see `Penaliser` and `LogitHook`; None for no penalty.

        Raises:
          SettingError: fewer items than slots, or a known temperature that is not above 0.
        """
        scores = jnp.asarray(scores, jnp.float32)
        require_count("num_slots", num_slots, 1, scores.shape[-1])
        require_temperature(temperature)
        shape = scores.shape[:-1]
        self._size, self._penaliser = num_slots, penaliser
        fit = lambda x, *own: None if x is None else jnp.broadcast_to(x, (*shape, *own))  # noqa: E731
        features = None if penaliser is None or features is None else jnp.broadcast_to(
            features, (*scores.shape, features.shape[-1])
        )  # fmt: skip
        given = (scores, fit(available, scores.shape[-1]), fit(temperature), features, fit(mixture))
        self._given: Choices = _over_batch(choices, len(shape))(*given)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """(S,)."""
        return (self._size,)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """[...] of the scores."""
        return self._given.logits.shape[:-1]

    @property
    def valid(self) -> Array:
        """[..., S] bool, whether a slot holds an item that is available."""
        return _over_batch(lambda given: valid_slots(given.logits, self._size), len(self.batch_shape))(self._given)

    def slates(self, uniforms: Array) -> Array:
        """A slate of each from uniform numbers in [0, 1): [..., S] -> [..., S] int32."""
        draw = lambda given, luck: draw_slate(given, self._penaliser, luck)  # noqa: E731
        return _over_batch(draw, len(self.batch_shape))(self._given, uniforms)

    def _sample_n(self, key: Key, n: int) -> Array:
        return jax.vmap(self.slates)(jax.random.uniform(key, (n, *self.batch_shape, self._size)))

    def log_prob(self, value: Array) -> Array:
        """Log-probability of ordered slates: [sample shape, ..., S] -> [sample shape, ...]."""
        value = jnp.asarray(value)
        extra = value.ndim - 1 - len(self.batch_shape)
        one = _over_batch(lambda given, slate: log_prob(given, self._penaliser, slate), len(self.batch_shape))
        of_batch = lambda slates: one(self._given, slates)  # noqa: E731
        return _over_batch(of_batch, extra)(value)

    def mode(self) -> Array:
        """The most probable item of every slot, given those before, ties to the lowest number: [..., S] int32.

        Without penalties this is the most probable slate.
        """
        greedy = lambda given: greedy_slate(given, self._penaliser, self._size)  # noqa: E731
        return _over_batch(greedy, len(self.batch_shape))(self._given)


class CertainSlate(distrax.Distribution):
    """Always one slate. Batch shape [...], event shape [S]; what is in slots that are not valid counts nothing."""

    def __init__(self, slate: Array, valid: Array) -> None:
        """slate: [..., S] int32; valid: [..., S] bool, which slots hold an item that is available."""
        self._slate, self.valid = slate, valid

    @property
    def event_shape(self) -> tuple[int, ...]:
        """(S,)."""
        return self._slate.shape[-1:]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """[...] of the slate."""
        return self._slate.shape[:-1]

    def _sample_n(self, key: Key, n: int) -> Array:
        return jnp.broadcast_to(self._slate, (n, *self._slate.shape))

    def log_prob(self, value: Array) -> Array:
        """[sample shape, ..., S] -> [sample shape, ...]: 0 for the slate, -inf for others."""
        return jnp.where(((value == self._slate) | ~self.valid).all(axis=-1), 0.0, -jnp.inf)

    def mode(self) -> Array:
        """The slate: [..., S] int32."""
        return self._slate


def require_temperature(temperature: Array | float) -> None:
    """Raise `SettingError` unless a temperature is a finite number above 0; a traced one cannot be looked at."""
    if not isinstance(temperature, jax.core.Tracer):
        known = np.asarray(temperature)
        fine = bool(((known > 0.0) & np.isfinite(known)).all())
        require(fine, "temperature", temperature, "a finite number above 0")


def _over_batch(function: Callable, axes: int) -> Callable:
    for _ in range(axes):
        function = jax.vmap(function)
    return function
