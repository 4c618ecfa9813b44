"""Users in a simulator under a policy: a scan over turns of vmapped users. Called by datasets, training and evaluation.

The randomness of user u's turn t is `fold_in(u's key, t)` split between environment and policy, so a user is the same
under every policy (common random numbers) and a rollout equals stepping by hand with `env.step`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemsjax.agents.base import Acting, Policy
from gemsjax.types import Array, Episode, Key, Observation, time_major

ENVIRONMENT, POLICY = 0, 1
"""Streams of one user's key."""


class Turn(NamedTuple):
    """What one turn leaves to be recorded; U users.

    Attributes:
      seen: [U] the observation that the choice was made on.
      shown: [U] the slate (the oracle's items filled in) and its clicks.
      action: [U, A].
      reward: [U].
      info: the simulator's hidden information, see `TopicEnv.step`.
    """

    seen: Observation
    shown: Observation
    action: Array
    reward: Array
    info: dict[str, Array]


def turn_keys(user_key: Key, turn: Array | int) -> tuple[Key, Key]:
    """Keys of the environment and of the policy in turn `turn` = 0 .. H-1 of one user."""
    return (
        jax.random.fold_in(jax.random.fold_in(user_key, ENVIRONMENT), turn),
        jax.random.fold_in(jax.random.fold_in(user_key, POLICY), turn),
    )


def reset_key(user_key: Key) -> Key:
    """Key of a user's reset (no turn has this number)."""
    return jax.random.fold_in(user_key, 2)


def rollout(
    env: Any,
    policy: Policy,
    user_keys: Key,
    env_params: Any,
    acting: Acting,
    record: Callable[[Turn], Any] = lambda turn: turn.reward,
) -> tuple[Any, Observation]:
    """Play one episode with each of U users.

    Args:
      env: static half of an environment (`TopicEnv` or any with its contract).
      policy: chooses the slates.
      user_keys: [U] typed keys, one a user.
      env_params: of the environment, shared by the users.
      acting: what the policy acts on, shared by the users.
      record: picks what to keep of every turn; what it leaves out is never stored.

    Returns:
      `record`'s output stacked to [H, U, ...], and the last observation [U].
    """
    turns = jnp.arange(env.horizon)
    observation, state = jax.vmap(env.reset, in_axes=(0, None))(jax.vmap(reset_key)(user_keys), env_params)
    # Drawing all turns' numbers at once costs one call; inside the scan it would cost one a turn.
    env_keys, policy_keys = jax.vmap(lambda turn: jax.vmap(lambda key: turn_keys(key, turn))(user_keys))(turns)
    noise = jax.vmap(jax.vmap(env.draw))(env_keys), jax.vmap(jax.vmap(policy.draw))(policy_keys)
    memory = jax.tree.map(lambda x: jnp.broadcast_to(x, (user_keys.shape[0], *x.shape)), policy.start())

    def choose(memory: Any, observation: Observation, state: Any, noise: Any) -> tuple:
        hidden = (state, env_params) if policy.privileged else None
        choice, memory = policy.act(acting, memory, observation, hidden, noise)
        slate = env.resolve(state, choice.slate, env_params) if policy.asks_oracle else choice.slate
        return slate, choice.action, memory

    def turn(carry: tuple, noise: tuple) -> tuple[tuple, Any]:
        observation, state, memory = carry
        env_noise, policy_noise = noise
        slate, action, memory = jax.vmap(choose)(memory, observation, state, policy_noise)
        shown, state, reward, _, _, info = jax.vmap(env.play, in_axes=(0, 0, 0, None))(
            env_noise, state, slate, env_params
        )
        return (shown, state, memory), record(Turn(observation, shown, action, reward, info))

    (final, _, _), recorded = jax.lax.scan(turn, (observation, state, memory), noise)
    return recorded, final


def returns(env: Any, policy: Policy, user_keys: Key, env_params: Any, acting: Acting) -> Array:
    """Clicks of each user over one episode: [U] float32."""
    rewards, _ = rollout(env, policy, user_keys, env_params, acting)
    return rewards.sum(axis=0)


def episodes(env: Any, policy: Policy, user_keys: Key, env_params: Any, acting: Acting) -> Episode:
    """One episode of each user, user-major, as agents learn from them: `Episode` [U, H, ...]."""
    recorded, final = rollout(
        env, policy, user_keys, env_params, acting, lambda turn: (turn.seen, turn.action, turn.reward)
    )
    seen, action, reward = time_major(recorded)
    return Episode(seen, action, reward, final)
