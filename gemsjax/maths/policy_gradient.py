"""Losses of on-policy learning: the clipped surrogate, the plain policy gradient, the critic's error, normalisation.

Every mean is over the turns that `valid` marks, and 0 where there are none: padding, or rewards that were no numbers,
never change a loss or its gradient. Used by `on_policy/` and agents.
Sources: Schulman et al. 2017 (PPO); Mnih et al. 2016 (A2C).
"""

from __future__ import annotations

import jax.numpy as jnp

from gemsjax.types import Array

LARGEST_LOG_RATIO = 20.0
"""From here on the ratio goes on along the tangent of exp, which does not overflow; far outside of any clipping."""


def masked_mean(x: Array, valid: Array) -> Array:
    """Mean over the marked entries, 0 without any: [...], [...] bool -> []."""
    return jnp.where(valid, x, 0.0).sum() / jnp.maximum(valid.sum(), 1)


def normalised(advantage: Array, valid: Array) -> Array:
    """Marked advantages with mean 0 and standard deviation 1 (n - 1, plus 1e-8), 0 elsewhere: [...] -> [...]."""
    centred = jnp.where(valid, advantage - masked_mean(advantage, valid), 0.0)
    variance = jnp.square(centred).sum() / jnp.maximum(valid.sum() - 1, 1)
    return centred / (jnp.sqrt(variance) + 1e-8)


def clipped_surrogate(
    log_prob: Array, old_log_prob: Array, advantage: Array, valid: Array, clip: Array | float
) -> tuple[Array, Array]:
    """PPO's loss: minus the mean of min(rho A, clip(rho, 1 - clip, 1 + clip) A), rho = pi / old pi; [...] each.

    Beyond `LARGEST_LOG_RATIO` rho grows along a line: a bad action that has become far more probable (A < 0) keeps a
    gradient that pulls it back, which a ratio that is cut off would not have.

    Returns:
      The loss [], and the share of turns whose ratio is outside the clipping range [].
    """
    difference = jnp.where(valid, log_prob - old_log_prob, 0.0)
    beyond = jnp.maximum(difference - LARGEST_LOG_RATIO, 0.0)
    ratio = jnp.exp(jnp.minimum(difference, LARGEST_LOG_RATIO)) * (1.0 + beyond)
    within = jnp.clip(ratio, 1.0 - clip, 1.0 + clip)
    loss = -masked_mean(jnp.minimum(ratio * advantage, within * advantage), valid)
    return loss, masked_mean((jnp.abs(ratio - 1.0) > clip).astype(jnp.float32), valid)


def policy_gradient(log_prob: Array, advantage: Array, valid: Array) -> Array:
    """A2C's loss: minus the mean of log pi A; [...] each -> []."""
    return -masked_mean(jnp.where(valid, log_prob, 0.0) * advantage, valid)


def value_error(value: Array, target: Array, valid: Array) -> Array:
    """Mean squared error of the critic: [...] each -> []."""
    return masked_mean(jnp.square(jnp.where(valid, value - target, 0.0)), valid)
