"""Users of the logging policy, played and packed in one compiled program, in the types that are stored.

Touches no disk; `generation` stores what it returns. Source: paper section 5.1 (epsilon-greedy oracle).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from gemsjax.agents.base import Acting
from gemsjax.agents.references import make_epsilon_greedy_oracle
from gemsjax.rollout import Turn, rollout
from gemsjax.types import Array, Dims

Columns = dict[str, Array]
"""`slates` [U, H, K] and `clicks` [U, H, ceil(K/8)] uint8, bit r % 8 of byte r // 8 the click on rank r."""

_LANES = 128
"""Users that one CPU core plays side by side: few enough for its cache, a multiple of every vector width."""
_GENERATOR = "threefry2x32"
"""Named, because data must not depend on which generator is JAX's default."""


def stored_types(env: Any) -> dict[str, tuple[str, tuple[int, int]]]:
    """Type and shape of one user's stored arrays."""
    item = "int16" if env.num_items <= 2**15 else "int32"
    packed = -(-env.slate_size // 8)
    return {"slates": (item, (env.horizon, env.slate_size)), "clicks": ("uint8", (env.horizon, packed))}


def make_player(env: Any, epsilon: float, seed: int, count: int) -> Callable[[int, Any], Columns]:
    """`(first, params) -> columns` of the users `first`, `first + 1`, ..., at least `count` of them.

    User u's key is `fold_in(key(seed), u)`. One program, compiled at the first call: it splits users over the devices,
    and on CPUs into portions that fit a core's cache. All portions are of one size, so a user's numbers do not depend
    on how many are played together.

    Args:
      env: the environment (static half); it must be able to fill in the oracle's items.
      epsilon: probability that a rank shows a random item instead of the oracle's.
      seed: 0 .. 2**32 - 1.
      count: users a call.
    """
    devices = jax.local_devices()[: -(-count // _LANES)]
    share = -(-count // len(devices))
    portion = _LANES if devices[0].platform == "cpu" else share
    padded = -(-share // portion) * portion * len(devices)
    mesh = jax.make_mesh((len(devices),), ("users",), axis_types=(AxisType.Auto,), devices=devices)
    play = _split(_in_portions(_play(env), portion), mesh)
    chosen = np.asarray(jax.random.key_data(jax.random.key(seed, impl=_GENERATOR))), np.float32(epsilon)
    return lambda first, params: play(np.arange(first, first + padded, dtype=np.uint32), *chosen, params)


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
        columns, _ = rollout(env, policy, user_keys, params, Acting((), (), ()), record)
        return jax.tree.map(lambda column: jnp.swapaxes(column, 0, 1), columns)

    return play


def _in_portions(play: Play, portion: int) -> Play:
    def play_all(users: Array, *rest: Any) -> Columns:
        portions = jax.lax.map(lambda some: play(some, *rest), users.reshape(-1, portion))
        return jax.tree.map(lambda column: column.reshape(-1, *column.shape[2:]), portions)

    return play_all


def _split(play: Play, mesh: Mesh) -> Play:
    users, whole = PartitionSpec("users"), PartitionSpec()
    # Keys travel as plain numbers: arrays of keys cannot be split over devices by every version of JAX.
    specs = (users, whole, whole, whole)
    return jax.jit(jax.shard_map(play, mesh=mesh, in_specs=specs, out_specs=users, check_vma=False))
