"""Replay of whole episodes: a ring buffer in compact types, carried through scans and donated. For training loops.

Slates take two bytes an item where the catalogue allows it, clicks one, rewards are clicks. Frozen tuple of pure
functions in the manner of flashbax; sampling is uniform without replacement. `make_ring` is the buffer alone, for
whatever else a method learns from (single transitions).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from gemsjax.errors import require, require_count
from gemsjax.maths.slates import draw_distinct
from gemsjax.types import Array, Dims, Episode, Key


@struct.dataclass
class ReplayState:
    """Episodes in the order of the ring.

    Attributes:
      episodes: `Episode` [capacity, H, ...] in storage types, or what else a ring was made for.
      added: [] int32, episodes ever added; the next lands at `added % capacity`.
    """

    episodes: Episode
    added: Array


class Replay(NamedTuple):
    """Sizes bound at construction.

    Attributes:
      init: `(one episode, for shapes) -> state`.
      add: `(state, episodes [U]) -> state`.
      sample: `(state, key) -> episodes [batch]`, without repeats, from the latest `capacity`. Holds at least `batch`
        episodes by the caller's care: training checks its warm-up against the batch.
    """

    init: Callable[[Any], ReplayState]
    add: Callable[[ReplayState, Any], ReplayState]
    sample: Callable[[ReplayState, Key], Any]


def make_ring(capacity: int, batch: int, users: int = 1, repeats: bool = False) -> Replay:
    """A replay of `capacity` rows, any pytree of arrays, that gets `users` at a time and gives batches of `batch`.

    Args:
      repeats: a batch may hold a row twice, which costs less than keeping rows apart and matters to nobody where rows
        are many.

    Raises:
      SettingError: a batch larger than the capacity, or a capacity that is not a multiple of `users`.
    """
    require_count("replay_capacity", capacity)
    require_count("batch_size", batch, 1, capacity)
    require_count("users_per_step", users, 1, capacity)
    require(capacity % users == 0, "replay_capacity", capacity, f"a multiple of users_per_step = {users}")

    def init(row: Any) -> ReplayState:
        return ReplayState(jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), row), jnp.int32(0))

    def add(state: ReplayState, rows: Any) -> ReplayState:
        start = state.added % capacity
        put = lambda ring, new: jax.lax.dynamic_update_slice_in_dim(ring, new, start, axis=0)  # noqa: E731
        return ReplayState(jax.tree.map(put, state.episodes, rows), state.added + users)

    def sample(state: ReplayState, key: Key) -> Any:
        filled = jnp.minimum(state.added, capacity)
        rows = jax.random.randint(key, (batch,), 0, filled) if repeats else _rows(key, filled, batch, capacity)
        return jax.tree.map(lambda x: x[rows], state.episodes)

    return Replay(init, add, sample)


def make_replay(dims: Dims, capacity: int, batch: int, users: int = 1) -> Replay:
    """A replay of `capacity` episodes that gets `users` at a time and gives batches of `batch`.

    Raises:
      SettingError: a batch larger than the capacity, or a capacity that is not a multiple of `users`.
    """
    ring = make_ring(capacity, batch, users)
    item = jnp.int16 if dims.num_items <= jnp.iinfo(jnp.int16).max else jnp.int32

    def init(episode: Episode) -> ReplayState:
        return ring.init(_with_items_as(item, episode))

    def add(state: ReplayState, episodes: Episode) -> ReplayState:
        return ring.add(state, _with_items_as(item, episodes))

    def sample(state: ReplayState, key: Key) -> Episode:
        return _with_items_as(jnp.int32, ring.sample(state, key))

    return Replay(init, add, sample)


def _with_items_as(kind: Any, episode: Episode) -> Episode:
    """Item numbers in another type; numbers of the simulator's (`hidden`) stay what they are."""

    def convert(x: Array) -> Array:
        return x.astype(kind) if jnp.issubdtype(x.dtype, jnp.integer) else x

    fields = {name: jax.tree.map(convert, getattr(episode, name)) for name in ("observation", "action", "final")}
    return dataclasses.replace(episode, **fields)


_SWAPS = 64
"""Batches up to here are drawn swap by swap, whose program grows with the square of their number."""


def _rows(key: Key, filled: Array, batch: int, capacity: int) -> Array:
    """`batch` distinct rows of the first `filled` ones: [batch] int32."""
    if batch == capacity:  # on policy: all there is, in any order
        return jnp.arange(capacity, dtype=jnp.int32)
    if batch <= _SWAPS:
        return draw_distinct(key, filled, batch)
    luck = jnp.where(jnp.arange(capacity) < filled, jax.random.uniform(key, (capacity,)), -1.0)
    return jax.lax.top_k(luck, batch)[1].astype(jnp.int32)
