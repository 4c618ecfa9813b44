"""The dot-product environment: a user is a vector, showing an item pays their product and pulls the user towards it.

`r_t = decay^t (u_t . e)`, `u_{t+1} = u_t + drift e`, for `max_episode_steps` turns. Observations hold the user itself
and the item shown last, so nothing is hidden but the items. Source: the environment of the public RecSys_RL project;
there every instance draws an item table of its own and without a seed, so that no two of them (nor training and
evaluation) agree on what a number means. Here `make_params` draws ONE table from a seed, which is data
(`DotProductParams`): shared by all environments and stored with what was learnt on it.

Pure functions of one user: `jit` and `vmap` them. Used by `on_policy/` and experiments.
Letters: I items, D numbers of an item or user, O = 2 D of an observation.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from gemsjax.errors import DataError, is_number, require, require_choice, require_count
from gemsjax.maths.randomness import normal, whole_number
from gemsjax.types import Array, Key

HORIZONS = ("terminal", "truncated")
_UNIT = 1e-8


@dataclasses.dataclass(frozen=True)
class EnvConfig:
    """What the environment is.

    Attributes:
      num_items: items that may be shown.
      num_users: user ids that episodes draw from.
      state_dim: numbers of an observation; user and item features together.
      max_episode_steps: turns of an episode.
      reward_decay: factor of the reward a turn (learners discount on top of it).
      user_feature_dim, item_feature_dim: numbers of a user and of an item; equal, since they are multiplied.
      drift: how far a user moves along the item shown.
      fixed_users: a user id always has the same vector; otherwise every episode draws a new one, and the id means
        nothing.
      horizon_end: `terminal`, nothing follows the last turn, as documented; `truncated`, a learner bootstraps from the
        value of the last observation.
    """

    num_items: int = 1_000
    num_users: int = 100
    state_dim: int = 64
    max_episode_steps: int = 20
    reward_decay: float = 0.99
    user_feature_dim: int = 32
    item_feature_dim: int = 32
    drift: float = 0.05
    fixed_users: bool = False
    horizon_end: str = "terminal"


@struct.dataclass
class DotProductParams:
    """The data of an environment.

    Attributes:
      items: [I, D], rows of length one.
      users: [num_users, D] vectors by user id; [0, D] where every episode draws its own.
      reward_decay, drift: see `EnvConfig`.
    """

    items: Array
    users: Array
    reward_decay: Array
    drift: Array


@struct.dataclass
class DotProductState:
    """One user between turns.

    Attributes:
      user: [D].
      user_id: [] int32.
      time: [] int32, turns played.
    """

    user: Array
    user_id: Array
    time: Array


def check_env(config: EnvConfig) -> None:
    """Refuse sizes that do not fit each other and numbers out of range.

    Raises:
      SettingError: naming the number.
    """
    for name in ("num_items", "num_users", "state_dim", "max_episode_steps", "user_feature_dim", "item_feature_dim"):
        require_count(name, getattr(config, name))
    width, both = config.user_feature_dim, config.user_feature_dim + config.item_feature_dim
    same = f"user_feature_dim = {width}: users and items are multiplied"
    require(config.item_feature_dim == width, "item_feature_dim", config.item_feature_dim, same)
    together = f"user_feature_dim + item_feature_dim = {both}: an observation is a user and an item"
    require(config.state_dim == both, "state_dim", config.state_dim, together)
    decay = is_number(config.reward_decay) and 0.0 < config.reward_decay <= 1.0
    require(decay, "reward_decay", config.reward_decay, "a number in (0, 1]")
    drift = is_number(config.drift) and 0.0 <= config.drift < 1e6
    require(drift, "drift", config.drift, "a finite number of at least 0")
    require_choice("horizon_end", config.horizon_end, HORIZONS)


def make_params(
    config: EnvConfig, key: Key, items: Array | None = None, users: Array | None = None
) -> DotProductParams:
    """The tables of a seed, or given ones (features of one's own), and the numbers.

    Args:
      config: see `EnvConfig`.
      key: of the tables.
      items: [num_items, D] instead of drawn ones; taken as they are, not scaled to length one.
      users: [num_users, D] instead of drawn ones, where `fixed_users`.

    Returns:
      The tables and numbers, float32; drawn rows have length one.

    Raises:
      SettingError: see `check_env`; users for a configuration without fixed ones.
      DataError: given tables of another shape or with numbers that are not finite.
    """
    check_env(config)
    require(users is None or config.fixed_users, "users", "a table", "nothing unless fixed_users is set")
    item_key, user_key = jax.random.split(key)
    width = config.item_feature_dim
    for name, table, rows in (("items", items, config.num_items), ("users", users, config.num_users)):
        if table is not None:
            _check_table(name, table, (rows, width))
    if items is None:
        items = _unit(jax.random.normal(item_key, (config.num_items, width)))
    if users is None:
        users = _unit(jax.random.normal(user_key, (config.num_users if config.fixed_users else 0, width)))
    numbers = jnp.float32(config.reward_decay), jnp.float32(config.drift)
    return DotProductParams(jnp.asarray(items, jnp.float32), jnp.asarray(users, jnp.float32), *numbers)


@dataclasses.dataclass(frozen=True)
class DotProductEnv:
    """The static half; hashable, so it may be a static argument of `jit`.

    Attributes:
      config: see `EnvConfig`; its numbers that are data are read from `DotProductParams` instead.
    """

    config: EnvConfig = EnvConfig()

    def __post_init__(self) -> None:
        check_env(self.config)

    @property
    def num_items(self) -> int:
        return self.config.num_items

    @property
    def horizon(self) -> int:
        return self.config.max_episode_steps

    @property
    def observation_dim(self) -> int:
        return self.config.state_dim

    def reset(self, key: Key, params: DotProductParams) -> tuple[Array, DotProductState]:
        """Draw a user, N(0, I) of length one, or one of the fixed ones by its id.

        Args:
          key: for the user.
          params: of this environment.

        Returns:
          `(obs, state)`: [O] = the user and zeros, and the user before its first turn.
        """
        return self.begin(jax.random.uniform(key, (self.draws,)), params)

    def step(
        self, key: Key, state: DotProductState, action: Array, params: DotProductParams
    ) -> tuple[Array, DotProductState, Array, Array, Array, dict[str, Array]]:
        """One turn.

        Args:
          key: not needed: users answer without luck.
          state: the user before the turn.
          action: [] integer, the item. A number outside the table shows nothing: no reward, no drift, zeros where the
            observation has the item, and the flag `info["invalid_action"]`.
          params: of this environment.

        Returns:
          `(obs, state, reward, terminated, truncated, info)`: [O] the new user and the item; the reward (of the user
          before the turn); one of the two flags is True once `horizon` turns are played, by `horizon_end`; `user_id`
          and `invalid_action`.
        """
        del key
        return self.play(state, action, params)

    # -- the parts of the contract that rollouts call one by one -----------------------------------------------------

    @property
    def draws(self) -> int:
        """Uniform numbers that a user is made of."""
        return 1 + self.config.user_feature_dim

    def begin(self, uniforms: Array, params: DotProductParams) -> tuple[Array, DotProductState]:
        """`reset` from given uniform numbers [draws] in [0, 1)."""
        user_id = whole_number(uniforms[0], self.config.num_users)
        user = params.users[user_id] if self.config.fixed_users else _unit(normal(uniforms[1:]))
        return jnp.concatenate([user, jnp.zeros_like(user)]), DotProductState(user, user_id, jnp.int32(0))

    def play(
        self, state: DotProductState, action: Array, params: DotProductParams
    ) -> tuple[Array, DotProductState, Array, Array, Array, dict[str, Array]]:
        """`step`, which needs no key."""
        valid = (action >= 0) & (action < self.num_items)
        item = jnp.where(valid, params.items[jnp.clip(action, 0, self.num_items - 1)], 0.0)
        match = jnp.dot(state.user, item, precision=jax.lax.Precision.HIGHEST)
        reward = match * params.reward_decay ** state.time.astype(jnp.float32)
        user, time = state.user + params.drift * item, state.time + 1
        ended, terminal = time >= self.horizon, self.config.horizon_end == "terminal"
        info = {"user_id": state.user_id, "invalid_action": ~valid}
        state = DotProductState(user, state.user_id, time)
        return jnp.concatenate([user, item]), state, reward, ended & terminal, ended & (not terminal), info


def best_item(params: DotProductParams, user: Array) -> Array:
    """The item with the largest product with a user [..., D]: [...] int32, the lowest number of several.

    For items of length one, showing it in every turn is the best that there is: whatever is shown, turn t pays at most
    decay^t (max over items of u_0 . e + t drift), and the same item again and again reaches just that.
    """
    products = jnp.matmul(user, params.items.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmax(products, axis=-1).astype(jnp.int32)


def _unit(vectors: Array) -> Array:
    return vectors / (jnp.linalg.norm(vectors, axis=-1, keepdims=True) + _UNIT)


def _check_table(name: str, table: Array, shape: tuple[int, int]) -> None:
    if jnp.shape(table) != shape:
        raise DataError(f"{name} of shape {jnp.shape(table)}: the configuration says {shape}")
    if not bool(jnp.isfinite(jnp.asarray(table)).all()):
        raise DataError(f"{name} hold a number that is not finite")
