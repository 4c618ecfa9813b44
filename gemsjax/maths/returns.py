"""Discounted returns of the rewards still to come, and advantages over a critic. Time-major; used by learners."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemsjax.errors import require, require_choice
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


class Advantages(NamedTuple):
    """What a critic's values say of each turn.

    Attributes:
      advantage: [T, ...] how much better than expected; 0 where the reward is not finite.
      target: [T, ...] what the critic should have said, advantage + value.
      valid: [T, ...] bool, whether there is anything to learn from the turn (its reward is finite).
    """

    advantage: Array
    target: Array
    valid: Array


def advantages(
    reward: Array,
    value: Array,
    next_value: Array,
    terminal: Array,
    ends: Array,
    gamma: Array | float,
    lam: Array | float = 0.95,
    how: str = "gae",
) -> Advantages:
    """A_t = d_t + gamma lam (1 - ends_t) A_{t+1} with d_t = r_t + gamma (1 - terminal_t) V_{t+1} - V_t, turn by turn.

    Turns are the first axis; every other is users (environments), each with its own recursion. A reward that is not
    finite is not learnt from: nothing of it enters earlier turns, which bootstrap from the value before it instead.

    Args:
      reward: [T, ...].
      value: [T, ...] the critic's value of what was seen before the turn.
      next_value: [T, ...] of what was seen after it (before any reset): `following(value, last value)` where nothing
        but terminal turns ends an episode.
      terminal: [T, ...] bool, nothing is worth anything after the turn.
      ends: [T, ...] bool, the episode ends with the turn, terminal or cut short.
      gamma: discount per turn.
      lam: weight of longer sums; see `how`.
      how: one of `ESTIMATORS`. `gae`: as above (Schulman et al. 2016). `nstep`: its case lam = 1, that is the
        discounted rewards up to the end and then the last value, less V_t. `last_value`, as coded in a public A2C:
        every turn bootstraps from the value after the LAST turn in place of V_{t+1}. `interleaved`, as coded in a
        public PPO: [T, E] is read as one course of T * E turns, so that V_{t+1} and A_{t+1} are another environment's,
        and the mean of the last values ends it.

    Raises:
      SettingError: another `how`; `interleaved` with other than two axes.
    """
    require_choice("returns", how, ESTIMATORS)
    if how == "interleaved":
        require(reward.ndim == 2, "shape of the rewards", reward.shape, "[turns, environments] for 'interleaved'")
        rewards, values, last, cut = (x.reshape(-1) for x in (reward, value, terminal, ends))
        then = following(values, next_value[-1].mean())
        found = _recursion(rewards, values, then, last, cut, gamma, lam)
        return Advantages(*(x.reshape(reward.shape) for x in found))
    if how == "last_value":
        next_value = jnp.broadcast_to(next_value[-1], next_value.shape)
    return _recursion(reward, value, next_value, terminal, ends, gamma, 1.0 if how == "nstep" else lam)


ESTIMATORS = ("gae", "nstep", "last_value", "interleaved")


def following(value: Array, last: Array) -> Array:
    """V_{t+1} of every turn: values [T, ...] moved by one, `last` [...] at the end."""
    return jnp.concatenate([value[1:], last[None]])


def _recursion(
    reward: Array,
    value: Array,
    next_value: Array,
    terminal: Array,
    ends: Array,
    gamma: Array | float,
    lam: Array | float,
) -> Advantages:
    valid = jnp.isfinite(reward)
    surprise = jnp.where(valid, reward, 0.0) + gamma * jnp.where(terminal, 0.0, next_value) - value
    carried = jnp.where(ends, 0.0, gamma * lam)

    def turn(later: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        surprise, carried, valid = inputs
        advantage = jnp.where(valid, surprise + carried * later, 0.0)
        return advantage, advantage

    advantage = jax.lax.scan(turn, jnp.zeros_like(value[0]), (surprise, carried, valid), reverse=True)[1]
    return Advantages(advantage, advantage + value, valid)
