"""Users of the logging policy, played and packed in one compiled program, in the types that are stored.

Touches no disk; `generation` stores what it returns. Source: paper section 5.1 (epsilon-greedy oracle).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemsjax.agents.base import Acting
from gemsjax.agents.references import make_epsilon_greedy_oracle
from gemsjax.devices import spread
from gemsjax.rollout import Turn, rollout
from gemsjax.types import Array, Dims

Columns = dict[str, Array]
"""`slates` [U, H, K] and `clicks` [U, H, ceil(K/8)] uint8, bit r % 8 of byte r // 8 the click on rank r."""

_GENERATOR = "threefry2x32"
"""Named, because data must not depend on which generator is JAX's default."""


def stored_types(env: Any) -> dict[str, tuple[str, tuple[int, int]]]:
    """Type and shape of one user's stored arrays."""
    item = "int16" if env.num_items <= 2**15 else "int32"
    packed = -(-env.slate_size // 8)
    return {"slates": (item, (env.horizon, env.slate_size)), "clicks": ("uint8", (env.horizon, packed))}


def make_player(env: Any, epsilon: float, seed: int, count: int) -> Callable[[int, Any], Columns]:
    """`(first, params) -> columns` of the users `first`, `first + 1`, ..., at least `count` of them.

    User u's key is `fold_in(key(seed), u)`. One program, compiled at the first call, see `devices.spread`.

    Args:
      env: the environment (static half); it must be able to fill in the oracle's items.
      epsilon: probability that a rank shows a random item instead of the oracle's.
      seed: 0 .. 2**32 - 1.
      count: users a call.
    """
    played = spread(_play(env), count)
    chosen = np.asarray(jax.random.key_data(jax.random.key(seed, impl=_GENERATOR))), np.float32(epsilon)
    return lambda first, params: played.program(
        np.arange(first, first + played.users, dtype=np.uint32), *chosen, params
    )


Play = Callable[..., Columns]
"""`(user numbers [U], key data, epsilon, params) -> columns`: seeds and epsilons share one program."""


def _play(env: Any) -> Play:
    item = jnp.dtype(stored_types(env)["slates"][0])

    def record(turn: Turn) -> Columns:
        clicks = jnp.packbits(turn.shown.clicks, axis=-1, bitorder="little")
        return {"slates": turn.shown.slate.astype(item), "clicks": clicks}

    def play(users: Array, key_data: Array, epsilon: Array, params: Any) -> Columns:
        dims = Dims(env.num_items, env.slate_size, env.horizon)
        policy = make_epsilon_greedy_oracle(dims, epsilon)  # type: ignore[arg-type]  # traced
        key = jax.random.wrap_key_data(key_data, impl=_GENERATOR)
        user_keys = jax.vmap(lambda user: jax.random.fold_in(key, user))(users)
        columns, _ = rollout(env, policy, user_keys, params, Acting(), record)
        return jax.tree.map(lambda column: jnp.swapaxes(column, 0, 1), columns)

    return play
