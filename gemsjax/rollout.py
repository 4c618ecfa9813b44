"""Users in a simulator under a policy: a scan over turns of vmapped users. Called by datasets, training and evaluation.

The randomness of user u's turn t comes from `turn_key(u's key, t)`, so a user is the same under every policy (common
random numbers) and a rollout equals stepping by hand with `env.step`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemsjax.agents.base import Acting, Policy
from gemsjax.errors import require
from gemsjax.types import Array, Episode, Key, Observation, time_major


class Turn(NamedTuple):
    """What one turn leaves to be recorded; U users.

    Attributes:
      seen: [U] the observation that the choice was made on.
      shown: [U] the slate (the oracle's items filled in) and its clicks.
      action: [U, A].
      reward: [U].
      info: the simulator's hidden information, see `TopicEnv.step`.
      user: [U] the simulator's hidden state of the users after the turn.
    """

    seen: Observation
    shown: Observation
    action: Array
    reward: Array
    info: dict[str, Array]
    user: Any


RESET = 2**32 - 1
"""Where other turns of a user have their number, the reset has this."""


def turn_key(user_key: Key, turn: Array | int) -> Key:
    """Key of turn 0 .. H-1 of one user, or of its `RESET`: for `env.step` and `env.reset` when stepping by hand."""
    return jax.random.fold_in(user_key, turn)


def turn_numbers(env: Any, policy: Policy, key: Key) -> tuple[Array, Array]:
    """Uniform numbers of one turn: [env.draws] for the environment, which are those of `env.step(key, ...)`, and
    [policy.draws] for the policy.

    The environment's come first and do not depend on how many follow (JAX's generator numbers its output), so users
    have the same luck under every policy.
    """
    numbers = jax.random.uniform(key, (env.draws + policy.draws,))
    return numbers[: env.draws], numbers[env.draws :]


def rollout(
    env: Any,
    policy: Policy,
    user_keys: Key,
    env_params: Any,
    acting: Acting,
    record: Callable[[Turn], Any] = lambda turn: turn.reward,
    policy_keys: Key | None = None,
) -> tuple[Any, Observation]:
    """Play one episode with each of U users.

    Args:
      env: static half of an environment (`TopicEnv` or any with its contract).
      policy: chooses the slates.
      user_keys: [U] typed keys, one a user.
      env_params: of the environment, shared by the users.
      acting: what the policy acts on, shared by the users.
      record: picks what to keep of every turn; what it leaves out is never stored.
      policy_keys: [U] keys of the policy's own draws; by default they come from the users' keys too.

    Returns:
      `record`'s output stacked to [H, U, ...], and the last observation [U].
    """
    turns = jnp.arange(env.horizon)
    reset_keys = jax.vmap(lambda key: turn_key(key, RESET))(user_keys)
    observation, state = jax.vmap(env.reset, in_axes=(0, None))(reset_keys, env_params)
    # Drawing all turns' numbers at once costs one call; inside the scan it would cost one a turn.
    keys_of = lambda users: jax.vmap(lambda turn: jax.vmap(lambda key: turn_key(key, turn))(users))(turns)  # noqa: E731
    numbers = jax.vmap(jax.vmap(lambda key: turn_numbers(env, policy, key)))(keys_of(user_keys))
    if policy_keys is not None:
        own = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (policy.draws,))))(keys_of(policy_keys))
        numbers = (numbers[0], own)
    memory = jax.tree.map(lambda x: jnp.broadcast_to(x, (user_keys.shape[0], *x.shape)), policy.start())

    def choose(memory: Any, observation: Observation, state: Any, uniforms: Array) -> tuple:
        hidden = (state, env_params) if policy.privileged else None
        choice, memory = policy.act(acting, memory, observation, hidden, uniforms)
        slate = env.resolve(state, choice.slate, env_params) if policy.asks_oracle else choice.slate
        return slate, choice.action, memory

    def turn(carry: tuple, numbers: tuple[Array, Array]) -> tuple[tuple, Any]:
        observation, state, memory = carry
        luck, uniforms = numbers
        slate, action, memory = jax.vmap(choose)(memory, observation, state, uniforms)
        shown, state, reward, _, _, info = jax.vmap(env.play, in_axes=(0, 0, 0, None))(luck, state, slate, env_params)
        return (shown, state, memory), record(Turn(observation, shown, action, reward, info, state))

    (final, _, _), recorded = jax.lax.scan(turn, (observation, state, memory), numbers)
    return recorded, final


def returns(env: Any, policy: Policy, user_keys: Key, env_params: Any, acting: Acting) -> Array:
    """Clicks of each user over one episode: [U] float32."""
    rewards, _ = rollout(env, policy, user_keys, env_params, acting)
    return rewards.sum(axis=0)


def episodes(
    env: Any, policy: Policy, user_keys: Key, env_params: Any, acting: Acting, policy_keys: Key | None = None
) -> Episode:
    """One episode of each user, user-major, as agents learn from them: `Episode` [U, H, ...].

    Raises:
      SettingError: a policy that is not privileged asks to remember the simulator's user.
    """

    def record(turn: Turn) -> tuple:
        hidden = () if policy.remember is None else jax.vmap(policy.remember)(turn.user)
        return turn.seen, turn.action, turn.reward, hidden

    allowed = policy.remember is None or policy.privileged
    require(allowed, "policy.remember", "set", "None: only a privileged policy may remember the simulator's user")
    recorded, final = rollout(env, policy, user_keys, env_params, acting, record, policy_keys)
    seen, action, reward, hidden = time_major(recorded)
    return Episode(seen, action, reward, final, hidden)
