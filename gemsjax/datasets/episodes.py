"""Logs and tables as the episodes that agents learn from: `LoggedEpisodes`. On the host, in storage types.

A log begins with a turn that nothing is known before, so the first turn is only observed and learning starts with the
second. `agents.logged.to_episodes` turns what has no padding into `Episode`, for any agent.
"""

from __future__ import annotations

import numpy as np

from gemsjax.agents.logged import LoggedEpisodes
from gemsjax.datasets.frames import Frames
from gemsjax.datasets.loading import LoggedSlates
from gemsjax.datasets.tables import Table
from gemsjax.errors import DataError, require, require_choice, require_count
from gemsjax.types import Array, Dims, Observation

PARTIAL = ("pad", "drop")


def from_logs(data: LoggedSlates, propensity: np.ndarray | None = None) -> LoggedEpisodes:
    """Logged users [U] of H+1 turns of the simulator; with what `propensities` found of all their turns, if anything.

    Args:
      data: slates and clicks.
      propensity: [U, H+1, K] or None.

    Raises:
      SettingError: propensities of another shape.
    """
    clicks = data.clicks
    if clicks.dtype != bool:
        clicks = (clicks[..., None] >> np.arange(data.slates.shape[-1], dtype=clicks.dtype) & 1).astype(bool)
    reward = clicks[:, 1:].sum(axis=-1, dtype=np.float32)
    if propensity is None:
        return LoggedEpisodes(_observation(data.slates, clicks), reward)
    shape = np.shape(propensity)
    require(shape == data.slates.shape, "propensity", shape, f"shape {data.slates.shape}, that of the slates")
    return LoggedEpisodes(_observation(data.slates, clicks), reward, propensity=propensity[:, 1:])


def from_table(
    table: Table, horizon: int | None = None, partial: str = "pad", clicked_above: float = 0.0, burn_in: int = 0
) -> LoggedEpisodes:
    """Users of a table, cut into episodes of `horizon` turns to learn from.

    Each episode's first turn is the last of the episode before, so that all of a user's turns but the first are
    learnt from once. Users with a single turn are left out.

    What a cut changes. Learners know nothing of the episode before and after: (a) a return ends where its episode
    ends, so the last turns before a cut miss rewards that still came: of a return with discount gamma, j turns before
    the cut, everything from gamma^(j+1) on; a critic takes the last turn before a cut for the user's last. (b) The
    recurrent state starts anew and has seen a single turn when the second one is learnt from; `burn_in` lets it see
    more. `horizon=None` cuts nothing, and pads every user to the longest; else choose H well above 1 / (1 - gamma).

    Args:
      table: its slates may differ in size; empty slots hold the item -1.
      horizon: H; None for the longest history less one.
      burn_in: b, 0 .. H-1: episodes after a user's first begin b turns earlier, with turns that are observed but not
        `taken`, so that nothing is learnt from them twice. `to_episodes` refuses those.
      partial: episodes that a history does not fill are padded at the end (`pad`) or left out (`drop`).
      clicked_above: a reward above this is a click.

    Raises:
      SettingError: a horizon below 1, a burn-in out of range, or an unknown way.
      DataError: no episode is left.
    """
    require_choice("partial", partial, PARTIAL)
    begins = np.r_[True, table.turns[1:] != table.turns[:-1]]
    first, turns = np.flatnonzero(begins), np.cumsum(begins) - 1  # each turn's first event; parts of tables skip turns
    counts = np.bincount(table.users[first], minlength=len(table.user_ids))
    horizon = max(int(counts.max()) - 1, 1) if horizon is None else horizon
    require_count("horizon", horizon)
    require_count("burn_in", burn_in, 0, horizon - 1)
    places, first_piece = _places(counts, horizon, burn_in)
    whole = places >= 0
    kept = whole.all(axis=1) if partial == "drop" else whole[:, :2].all(axis=1)
    if not kept.any():
        raise DataError(f"the longest history has {counts.max()} turns: too few for episodes of {horizon + 1}")
    places, whole = places[kept], whole[kept][..., None]
    fresh = first_piece[kept, None] | (np.arange(horizon) >= burn_in)

    def cut(column: np.ndarray, empty: float) -> np.ndarray:
        """Events [N] as [episodes, H+1, K]."""
        slots = np.full((len(first), int(table.positions.max()) + 1), empty, column.dtype)
        slots[turns, table.positions] = column
        return np.where(whole, slots[np.maximum(places, 0)], np.asarray(empty, column.dtype))

    slates, rewards = cut(table.items, -1), cut(table.rewards, 0.0)
    clicks = cut((table.rewards > clicked_above), False)
    return LoggedEpisodes(
        turns=_observation(slates, clicks),
        reward=rewards[:, 1:].sum(axis=-1),
        item_reward=rewards[:, 1:],
        taken=(slates[:, 1:] >= 0) & fresh[..., None],
        propensity=() if table.propensities is None else cut(table.propensities, 1.0)[:, 1:],
    )


def from_frames(frames: Frames, clicked_above: float = 0.0) -> LoggedEpisodes:
    """Frames as episodes of F turns, one item each: [N] windows, which overlap. For agents that know no padding.

    Propensities come along. Each window is an episode of its own: its returns end with it.
    """
    items, rewards = frames.items[..., None], frames.rewards[..., None]
    observed, chances = _observation(items, rewards > clicked_above), frames.propensities
    propensity = () if chances is None else chances[:, 1:, None]
    return LoggedEpisodes(observed, frames.rewards[:, 1:], item_reward=rewards[:, 1:], propensity=propensity)


def dims_of(episodes: LoggedEpisodes, table: Table) -> Dims:
    """Sizes that an agent for these episodes is built with."""
    _, turns, slots = episodes.turns.slate.shape
    return Dims(len(table.item_ids), slots, turns - 1)


def _places(counts: np.ndarray, horizon: int, burn_in: int) -> tuple[np.ndarray, np.ndarray]:
    """From turns per user: numbers of the turns of each episode, [episodes, H+1], -1 where a history has ended; and
    whether it is its user's first, [episodes]."""
    step = horizon - burn_in
    pieces = 1 + np.maximum(-(-(counts - 1 - horizon) // step), 0)
    piece = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = np.repeat(np.cumsum(counts) - counts, pieces) + piece * step
    places = start[:, None] + np.arange(horizon + 1)
    return np.where(places < np.repeat(np.cumsum(counts), pieces)[:, None], places, -1), piece == 0


def _observation(slates: np.ndarray | Array, clicks: np.ndarray | Array) -> Observation:
    small = slates.max(initial=0) < 2**15
    return Observation(slates.astype(np.int16) if small else slates, clicks)  # type: ignore[arg-type]
