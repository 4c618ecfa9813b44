"""Playing whole episodes with a policy: trained ones and the references that they are judged by. Pure but for names.

Called by the driver and experiments. A policy here is `(observation [O], uniform number []) -> item []`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from gemsjax.envs.dot_product import DotProductEnv, DotProductParams, best_item
from gemsjax.errors import require
from gemsjax.maths.randomness import whole_number
from gemsjax.types import Array, Key

Act = Callable[[Array, Array], Array]
METRICS = ("total_reward", "mean_reward", "max_reward", "min_reward", "std_reward")


def compute_metrics(rewards: Array) -> dict[str, Array]:
    """Sum, mean, largest, smallest and standard deviation (over n) of an episode's rewards: [..., n] -> [...] each.

    Raises:
      SettingError: no reward at all.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    require(rewards.ndim > 0 and rewards.shape[-1] > 0, "rewards", rewards.shape, "at least one reward")
    found = rewards.sum(-1), rewards.mean(-1), rewards.max(-1), rewards.min(-1), rewards.std(-1)
    return dict(zip(METRICS, found, strict=True))


def play(env: DotProductEnv, act: Act, params: DotProductParams, key: Key, episodes: int) -> Array:
    """Rewards of whole episodes: [episodes, horizon].

    Episode e's user and the policy's draws come from `fold_in(key, e)`: every policy meets the same users.
    """

    def episode(key: Key) -> Array:
        numbers = jax.random.uniform(key, (env.draws + env.horizon,))
        start, uniforms = env.begin(numbers[: env.draws], params), numbers[env.draws :]

        def turn(carry: tuple, uniform: Array) -> tuple[tuple, Array]:
            observation, state = carry
            observation, state, reward, _, _, _ = env.play(state, act(observation, uniform), params)
            return (observation, state), reward

        return jax.lax.scan(turn, start, uniforms)[1]

    return jax.vmap(episode)(jax.vmap(lambda number: jax.random.fold_in(key, number))(jnp.arange(episodes)))


def random_items(params: DotProductParams) -> Act:
    """Any item, as likely as any other."""
    return lambda _observation, uniform: whole_number(uniform, params.items.shape[0])


def same_item(params: DotProductParams, item: int = 0) -> Act:
    """One item for everybody: what is paid for the drift alone, without looking at the user."""
    return lambda _observation, _uniform: jnp.int32(item % params.items.shape[0])


def best_items(params: DotProductParams) -> Act:
    """The item that suits the user best, which only who knows the item table can tell (privileged): the optimum."""
    width = params.items.shape[1]
    return lambda observation, _uniform: best_item(params, observation[:width])


REFERENCES = {"random": random_items, "same-item": same_item, "best-item": best_items}


@partial(jax.jit, static_argnums=(0, 3))
def reference_returns(env: DotProductEnv, params: DotProductParams, key: Key, episodes: int) -> dict[str, Array]:
    """Returns of the references by name, [episodes] each, on the same users."""
    played = {name: play(env, make(params), params, key, episodes) for name, make in REFERENCES.items()}
    return {name: rewards.sum(axis=1) for name, rewards in played.items()}
