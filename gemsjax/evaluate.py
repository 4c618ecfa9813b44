"""Evaluation on fixed users: the same users, and the same luck, for every method. For training and experiments."""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from gemsjax.agents.base import Acting, Policy
from gemsjax.devices import Spread, spread
from gemsjax.errors import require_choice, require_count
from gemsjax.rollout import Turn, returns, rollout
from gemsjax.types import Array, Key

USER_STREAMS = {"validation": 7_345_601, "test": 7_345_602, "training": 7_345_603}
"""Seeds of the populations that do not depend on a run's seed. Training users come from the run's own key, unless it
asks for `common_users`: then they are those of `training`, and the published test [19] on the first of them can be had.
"""


class Evaluation(NamedTuple):
    """Returns of one method on U users.

    Attributes:
      returns: [U] clicks of each user over its episode.
      mean, standard_error: of the returns.
      interval: 95 % Student-t interval of the mean.
    """

    returns: np.ndarray
    mean: float
    standard_error: float
    interval: tuple[float, float]


def user_keys(stream: str, users: int) -> Key:
    """[users] keys of the first users of a population; more users extend it, none changes.

    Raises:
      SettingError: an unknown stream or a count below 1.
    """
    require_choice("stream", stream, USER_STREAMS)
    require_count("users", users)
    return numbered_users(stream, jnp.arange(users))


def numbered_users(stream: str, numbers: Array) -> Key:
    """Keys of the users with these numbers ([n], may be traced) in a population."""
    return _numbered(jax.random.key(USER_STREAMS[stream]), numbers)


def summarise(returns: np.ndarray) -> Evaluation:
    """Mean, standard error and interval of [U] returns (a single user has no interval: it is NaN)."""
    returns = np.asarray(returns, np.float64)
    users = returns.size
    error = float(returns.std(ddof=1) / math.sqrt(users)) if users > 1 else math.nan
    half = float(stats.t.ppf(0.975, users - 1)) * error if users > 1 else math.nan
    mean = float(returns.mean())
    return Evaluation(returns, mean, error, (mean - half, mean + half))


def evaluate(
    env: Any, policy: Policy, env_params: Any, acting: Acting | None = None, users: int = 500, stream: str = "test"
) -> Evaluation:
    """Play one episode with each of the first `users` of a stream.

    Args:
      env, env_params: from `gemsjax.make`.
      policy: greedy policy of an agent, or a reference.
      acting: what the policy acts on; nothing for references.
      users: how many; they are spread over the local devices.
      stream: `test`, `validation` or `training`.

    Raises:
      SettingError: an unknown stream or a count below 1.
    """
    require_choice("stream", stream, USER_STREAMS)
    require_count("users", users)
    acting = Acting() if acting is None else acting
    return summarise(np.asarray(play_users(env, policy, USER_STREAMS[stream], users, env_params, acting)))


def play_users(env: Any, policy: Policy, seed: int, users: int, env_params: Any, acting: Acting) -> Array:
    """Returns of the first `users` users of a population on all local devices: [users]."""
    played = _player(env, policy, users)
    numbers = np.arange(played.users, dtype=np.uint32)
    return played.program(numbers, jax.random.key_data(jax.random.key(seed)), env_params, acting)[:users]


@lru_cache(maxsize=32)
def _player(env: Any, policy: Policy, users: int) -> Spread:
    def play(numbers: Array, key_data: Array, env_params: Any, acting: Acting) -> Array:
        return returns(env, policy, _numbered(jax.random.wrap_key_data(key_data), numbers), env_params, acting)

    return spread(play, users)


def _numbered(key: Key, users: Array) -> Key:
    return jax.vmap(lambda user: jax.random.fold_in(key, user))(users)


class Scores(NamedTuple):
    """What a policy recommends and to whom: data of the paper's Figure 2.

    Attributes:
      scores: [H, U, K] how well each shown item suits the user (relevance is one half at `relevance_offset`).
      bored_topics: [H, U] how many topics the user is bored of.
    """

    scores: np.ndarray
    bored_topics: np.ndarray


def recommended_scores(
    env: Any,
    policy: Policy,
    env_params: Any,
    acting: Acting | None = None,
    users: int = 200,
    stream: str = "test",
) -> Scores:
    """Scores of the items that a policy shows to the first `users` users of a stream, with their boredom."""
    acting = Acting() if acting is None else acting
    scores, bored = _scores(env, policy, user_keys(stream, users), env_params, acting)
    return Scores(np.asarray(scores), np.asarray(bored))


@partial(jax.jit, static_argnums=(0, 1))
def _scores(env: Any, policy: Policy, keys: Key, env_params: Any, acting: Acting) -> tuple[Array, Array]:
    def record(turn: Turn) -> tuple[Array, Array]:
        return turn.info["scores"], turn.info["bored"].sum(axis=-1)

    return rollout(env, policy, keys, env_params, acting, record)[0]
