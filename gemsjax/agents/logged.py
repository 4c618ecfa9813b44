"""Episodes that someone else's policy collected, with what a log knows besides: `LoggedEpisodes`.

Agents that correct for the logging policy learn from these; `to_episodes` gives any other agent its `Episode`. Made by
`datasets.episodes` from logs and tables, and by `from_episodes` from what an agent collected itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from gemsjax.errors import DataError
from gemsjax.types import Array, Episode, Observation

Column = Any
"""An array of any storage type, of JAX or NumPy, or () for what a log does not hold."""


@struct.dataclass
class LoggedEpisodes:
    """Users' turns 0 .. H: turn 0 is only observed, turns 1 .. H are also learnt from.

    A user with fewer turns is padded at the end; slots and turns of padding hold the item -1 and are not `taken`.

    Attributes:
      turns: [..., H+1, K] what was shown and clicked.
      reward: [..., H] float32 reward of turns 1 .. H.
      item_reward: [..., H, K] float32 reward of each shown item; () shares a turn's reward among its clicked items.
      taken: [..., H, K] whether a slot holds an item that somebody was shown; () if all do.
      propensity: [..., H, K] probability with which the logging policy shows the item in a slot; () if unknown.
    """

    turns: Observation
    reward: Column
    item_reward: Column = ()
    taken: Column = ()
    propensity: Column = ()


class Actions(NamedTuple):
    """A batch of logged turns as a learner sees them, time-major.

    Attributes:
      seen: [H, B, K] observations that the turns' slates were chosen on.
      items: [H, B, K] int32, the items shown.
      clicks: [H, B, K] bool.
      reward: [H, B].
      item_reward, taken: [H, B, K] float32.
      there: [H, B] float32, 1 from a user's first turn to its last in which something was shown, whatever came of it:
        beyond is padding.
      propensity: [H, B, K] or ().
    """

    seen: Observation
    items: Array
    clicks: Array
    reward: Array
    item_reward: Array
    taken: Array
    there: Array
    propensity: Column


def from_episodes(episodes: Episode) -> LoggedEpisodes:
    """Episodes [B, H] of an agent's own; the slate that action t made is the one in observation t + 1."""
    last = jax.tree.map(lambda x: x[:, None], episodes.final)
    turns = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), episodes.observation, last)
    return LoggedEpisodes(turns, episodes.reward)


def to_episodes(logged: LoggedEpisodes) -> Episode:
    """The same as `Episode` [B, H], whose actions are the slates.

    It has no place for padding: give other agents logs without any (`partial="drop"` in `datasets.episodes`).

    Raises:
      DataError: a slot is empty or not taken, or a reward is not finite: other agents would learn from it.
    """
    _refuse(np.asarray(logged.turns.slate) < 0, "is empty", "an agent's `Episode` holds full slates")
    if _known(logged.taken):
        # Counted as the observations are, whose turn 0 nothing is learnt from.
        taken = np.asarray(logged.taken, bool)
        _refuse(np.pad(~taken, ((0, 0), (1, 0), (0, 0))), "is not taken", "an agent's `Episode` learns from every slot")
    broken = ~np.isfinite(np.asarray(logged.reward, np.float64))
    _refuse(np.pad(broken, ((0, 0), (1, 0))), "has a reward that is no finite number", "an agent would learn from it")
    before, final = (jax.tree.map(lambda x, cut=cut: x[:, cut], logged.turns) for cut in (slice(None, -1), -1))
    action = jnp.asarray(logged.turns.slate[:, 1:], jnp.int32)
    return Episode(observation=before, action=action, reward=logged.reward, final=final)


def _refuse(wrong: np.ndarray, what: str, why: str) -> None:
    """Raise for the first turn (or slot) that is wrong: [U, H+1] or [U, H+1, K]."""
    places = np.argwhere(wrong)
    if places.size:
        where = ", ".join(f"{name} {at}" for name, at in zip(("episode", "turn", "slot"), places[0], strict=False))
        raise DataError(f"{where} {what} ({len(places)} such): {why}")


def actions(logged: LoggedEpisodes, num_items: int | None = None) -> Actions:
    """Logged episodes [B] as actions, time-major, storage types widened, and what cannot be learnt from taken out.

    Nothing can be refused in a compiled program, so it is taken out instead: an item outside 0 .. num_items-1 is an
    empty slot, in the observations too; a slot whose own reward is not finite is not taken, nor is a whole turn whose
    reward is not; a turn that takes nothing has reward 0; a propensity outside (0, 1] becomes 0, which is none.

    Args:
      logged: episodes, user-major.
      num_items: I; None if every number from 0 is an item.
    """

    def swap(x: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.swapaxes(jnp.asarray(leaf), 0, 1), x)

    slates, clicks = (swap(x) for x in (logged.turns.slate, logged.turns.clicks))
    slates, reward = slates.astype(jnp.int32), swap(logged.reward)
    there = slates >= 0 if num_items is None else (slates >= 0) & (slates < num_items)
    slates, clicks = jnp.where(there, slates, -1), clicks.astype(bool) & there
    shown = there[1:] & swap(logged.taken).astype(bool) if _known(logged.taken) else there[1:]
    goes_on = jax.lax.cummax(shown.any(axis=-1).astype(jnp.float32), axis=0, reverse=True)
    taken = shown & jnp.isfinite(reward)[..., None]
    clicked = (clicks[1:] & taken).astype(jnp.float32)
    if _known(logged.item_reward):
        item_reward = swap(logged.item_reward)
        taken &= jnp.isfinite(item_reward)
    reward = jnp.where(taken.any(axis=-1), reward, 0.0)
    if not _known(logged.item_reward):
        item_reward = clicked / jnp.maximum(clicked.sum(axis=-1, keepdims=True), 1.0) * reward[..., None]
    return Actions(
        seen=Observation(slates[:-1], clicks[:-1]),
        items=slates[1:],
        clicks=clicks[1:],
        reward=reward,
        item_reward=jnp.where(taken, item_reward, 0.0),
        taken=taken.astype(jnp.float32),
        there=goes_on,
        propensity=_usable(swap(logged.propensity)) if _known(logged.propensity) else (),
    )


def _usable(propensity: Array) -> Array:
    """0 where it is no probability (rounding may lift one a little above 1)."""
    return jnp.where((propensity > 0.0) & (propensity <= 1.0 + 1e-6), propensity, 0.0)


def _known(column: Column) -> bool:
    return not isinstance(column, tuple)
