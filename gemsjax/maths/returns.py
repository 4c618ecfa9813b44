"""Discounted returns of the rewards still to come. Time-major; used by methods that learn from whole episodes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gemsjax.errors import require_choice
from gemsjax.types import Array


def return_to_go(reward: Array, gamma: Array | float, how: str = "recursive") -> Array:
    """G_t = r_t + gamma * r_{t+1} + gamma^2 * r_{t+2} + ... of every turn: [H, ...] -> [H, ...].

    Args:
      reward: [H, ...], turns first.
      gamma: discount per turn, in [0, 1]; 0 gives the reward itself.
      how: one of `RETURNS`. `recursive` goes backwards, G_t = r_t + gamma * G_{t+1}. `divided`, as published, divides
        sums of gamma^t * r_t by gamma^t, which float32 cannot hold after enough turns: where gamma^t has become zero,
        only r_t is left of the return.

    Raises:
      SettingError: another `how`.
    """
    require_choice("return_to_go", how, RETURNS)
    return RETURNS[how](reward, jnp.asarray(gamma, reward.dtype))


def _recursive(reward: Array, gamma: Array) -> Array:
    def turn(later: Array, reward: Array) -> tuple[Array, Array]:
        total = reward + gamma * later
        return total, total

    return jax.lax.scan(turn, jnp.zeros_like(reward[0]), reward, reverse=True)[1]


def _divided(reward: Array, gamma: Array) -> Array:
    turns = jnp.arange(reward.shape[0], dtype=reward.dtype)
    weight = (gamma**turns).reshape(-1, *(1,) * (reward.ndim - 1))
    sums = jnp.cumsum((weight * reward)[::-1], axis=0)[::-1]
    held = weight > 0.0
    return jnp.where(held, sums / jnp.where(held, weight, 1.0), reward)


RETURNS = {"recursive": _recursive, "divided": _divided}
