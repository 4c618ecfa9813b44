"""How probable the epsilon-greedy oracle was to show what it showed: exact, by playing the logged users again.

A log holds slates and clicks only. Its users are functions of (seed, number), so playing them again gives the oracle's
slate of each turn; what is shown in the second playing must be what was logged. Judges estimates of the behaviour.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemsjax.agents.base import Acting, Choice, Policy
from gemsjax.agents.references import make_epsilon_greedy_oracle
from gemsjax.datasets.loading import LoggedSlates
from gemsjax.datasets.logging_policy import stored_types
from gemsjax.devices import Spread, spread
from gemsjax.errors import DataError, require_choice
from gemsjax.rollout import Turn, rollout
from gemsjax.types import Array, Dims

RANKS = ("any", "own")
_GENERATOR = "threefry2x32"  # of the logged users' keys


def oracle_slates(env: Any, params: Any, data: LoggedSlates, first_user: int = 0) -> np.ndarray:
    """What the oracle would have shown the logged users in each turn: [U, H, K], in the type of the logged slates.

    Args:
      env, params: the environment that was logged.
      data: its log, or part of it.
      first_user: number of the first user in `data` (not 0 for a later part of a log).

    Raises:
      DataError: another logging policy, or playing again does not give what was logged (another environment, or
        another version of JAX that rounds differently).
    """
    config = data.schema["config"]
    if config.get("policy") != "epsilon_greedy_oracle":
        raise DataError(f"the log's policy is {config.get('policy')!r}: only the epsilon-greedy oracle's is known")
    player = _player(env, data.users)
    numbers = np.arange(first_user, first_user + player.users, dtype=np.uint32)
    key_data = np.asarray(jax.random.key_data(jax.random.key(config["seed"], impl=_GENERATOR)))
    played, oracle = player.program(numbers, key_data, np.float32(config["epsilon"]), params)
    if not np.array_equal(np.asarray(played)[: data.users], data.slates):
        raise DataError("playing the logged users again does not give their slates: was this environment logged?")
    return np.asarray(oracle)[: data.users]


def propensities(
    slates: np.ndarray, oracle: np.ndarray, epsilon: float, num_items: int, ranks: str = "any"
) -> np.ndarray:
    """Probability with which the epsilon-greedy oracle shows each logged item: [U, H, K] float32.

    A rank shows the oracle's item of that rank with probability 1 - epsilon, else any item alike. `any`: the mean over
    ranks, (1 - epsilon) / K * [the oracle's slate holds the item] + epsilon / I, which is what a behaviour head over
    items estimates. `own`: of the rank that it was shown at.

    Raises:
      SettingError: an unknown way.
    """
    require_choice("ranks", ranks, RANKS)
    if ranks == "own":
        chosen = (slates == oracle).astype(np.float32)
    else:
        size = slates.shape[-1]
        chosen = sum((slates == oracle[..., rank, None]) for rank in range(size)).astype(np.float32) / size
    return (1.0 - epsilon) * chosen + np.float32(epsilon / num_items)


@lru_cache(maxsize=4)
def _player(env: Any, users: int) -> Spread:
    item = jnp.dtype(stored_types(env)["slates"][0])

    def record(turn: Turn) -> tuple[Array, Array]:
        return turn.shown.slate.astype(item), turn.action.astype(item)

    def play(users: Array, key_data: Array, epsilon: Array, params: Any) -> tuple[Array, Array]:
        key = jax.random.wrap_key_data(key_data, impl=_GENERATOR)
        keys = jax.vmap(lambda user: jax.random.fold_in(key, user))(users)
        recorded, _ = rollout(env, _telling(env, epsilon), keys, params, Acting(), record)
        return jax.tree.map(lambda column: jnp.swapaxes(column, 0, 1), recorded)

    return spread(play, users)


def _telling(env: Any, epsilon: Array) -> Policy:
    """The logging policy, whose actions are the oracle's slates."""
    logging = make_epsilon_greedy_oracle(Dims(env.num_items, env.slate_size, env.horizon), epsilon)  # type: ignore[arg-type]

    def act(acting: Acting, memory: Any, seen: Any, hidden: Any, uniforms: Array) -> tuple[Choice, Any]:
        choice, memory = logging.act(acting, memory, seen, hidden, uniforms)
        oracle = env.oracle_slate(*hidden)
        return Choice(jnp.where(choice.slate == -1, oracle, choice.slate), oracle), memory

    return Policy(logging.start, act, draws=logging.draws, privileged=True)
