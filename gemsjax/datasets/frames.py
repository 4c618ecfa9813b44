"""Frames: every F+1 consecutive events of a user as one transition, the way RecNN presents a table to an agent.

The state is what the user did in the F events before (embeddings, then rewards), the action is the next item. On the
host, except `transitions`, which is for compiled programs too.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from gemsjax.datasets.tables import Table
from gemsjax.errors import require_count
from gemsjax.types import Array


class Frames(NamedTuple):
    """Windows of F+1 events, users in order, a user's windows in order of time; N = sum over users of T_u - F.

    Attributes:
      items: [N, F+1] int32.
      rewards: [N, F+1] float32.
      users: [N] int32.
      done: [N] bool, the last window of its user.
      propensities: [N, F+1] float32, or None if the table has none.
    """

    items: np.ndarray
    rewards: np.ndarray
    users: np.ndarray
    done: np.ndarray
    propensities: np.ndarray | None = None


class Transitions(NamedTuple):
    """What an agent that knows no recurrence learns from.

    Attributes:
      state, next_state: [N, F*E + F] embeddings of F items, then their rewards.
      action: [N] int32, the item after the F of `state`.
      reward: [N] of that item.
      done: [N].
    """

    state: Array
    action: Array
    reward: Array
    next_state: Array
    done: Array


def make_frames(table: Table, size: int = 10) -> Frames:
    """All windows of `size` + 1 events; users with `size` events or fewer have none. Slates count event by event.

    Raises:
      SettingError: a size below 1.
    """
    require_count("size", size)
    events = np.bincount(table.users, minlength=len(table.user_ids))
    windows = np.maximum(events - size, 0)
    ends = np.cumsum(windows)
    users = np.repeat(np.arange(len(events)), windows)
    start = (
        np.repeat(np.cumsum(events) - events, windows) + np.arange(windows.sum()) - np.repeat(ends - windows, windows)
    )
    rows = start[:, None] + np.arange(size + 1)
    done = np.zeros(len(users), bool)
    done[ends[windows > 0] - 1] = True
    chances = None if table.propensities is None else table.propensities[rows]
    return Frames(table.items[rows], table.rewards[rows], users.astype(np.int32), done, chances)


def transitions(frames: Frames, embeddings: Array) -> Transitions:
    """Frames (or a batch of their rows) as transitions, with item embeddings [I, E]."""
    items, rewards = jnp.asarray(frames.items), jnp.asarray(frames.rewards)

    def state(items: Array, rewards: Array) -> Array:
        return jnp.concatenate([jnp.asarray(embeddings)[items].reshape(items.shape[0], -1), rewards], axis=1)

    return Transitions(
        state(items[:, :-1], rewards[:, :-1]),
        items[:, -1],
        rewards[:, -1],
        state(items[:, 1:], rewards[:, 1:]),
        jnp.asarray(frames.done),
    )
