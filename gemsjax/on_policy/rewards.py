"""Rewards of other kinds of feed, as the public RecSys_RL project's guide to imitation agents weighs them. Pure.

For environments and simulators of one's own: no environment here has such signals. Each preset is a tuple of signals of
a turn, of any one shape [...], and a function from it to the reward [...]. A turn of which any signal is not finite is
worth 0 (`known` tells which), and nothing returns NaN. Weights are the guide's; shares and ratios are taken as given,
not clipped.

Left out, since they are parts of an environment: what the guide's agents see (a short video's engagement so far, time
of day and run of one creator; a long video's progress and the mean of the last 50), candidate sets, the choice of a
kind (post, ad or follow; lesson, review or practice) before the item, at most one ad in five items, and the end of an
episode after five recommendations without a click.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemsjax.maths.plackett_luce import unit_rows
from gemsjax.types import Array

SKIPPED, SKIP_SECONDS = -0.5, 1.0
"""What a short video is worth that was left before so many seconds."""
ENGAGEMENT = {"none": 0.0, "click": 0.5, "like": 0.3, "share": 1.0, "reply": 0.8}
"""What the one reaction to an item of a social feed is worth; `SocialFeed.reaction` counts along it."""


class ShortVideo(NamedTuple):
    """A feed of short videos (TikTok).

    Attributes:
      seconds: how long it was watched.
      watched: share of it that was watched.
      liked, shared, followed: bool (or 0 and 1).
    """

    seconds: Array
    watched: Array
    liked: Array
    shared: Array
    followed: Array


class LongVideo(NamedTuple):
    """Recommended videos (YouTube).

    Attributes:
      seconds: how long it was watched.
      length: its length in seconds; below 1 it counts as 1.
      clicked, subscribed: bool (or 0 and 1).
      similarity: mean cosine with what was shown before, see `mean_cosine`.
    """

    seconds: Array
    length: Array
    clicked: Array
    subscribed: Array
    similarity: Array


class SocialFeed(NamedTuple):
    """Posts, advertisements and people to follow.

    Attributes:
      reaction: int, place in `ENGAGEMENT`; any other number is no reaction.
      dwell: time spent on it, in [0, 1].
      revenue: of an advertisement, 0 for other items.
    """

    reaction: Array
    dwell: Array
    revenue: Array


class VideoCommerce(NamedTuple):
    """Videos that sell: share watched, and bool (or 0 and 1) whether it was liked, bought from, saved."""

    watched: Array
    liked: Array
    purchased: Array
    saved: Array


class Learning(NamedTuple):
    """Guidance of a learner: completion of a lesson, correctness of answers, frustration; in [0, 1] each."""

    completion: Array
    correctness: Array
    frustration: Array


def known(signals: NamedTuple) -> Array:
    """Whether every signal of a turn is finite: bool [...]."""
    return jnp.stack([jnp.isfinite(x) for x in _numbers(signals).values()]).all(axis=0)


def short_video(signals: ShortVideo) -> Array:
    """-0.5 if it was skipped (watched for less than a second), else 0.4 watched + 0.3 like + 0.2 share + 0.1 follow."""
    found = _numbers(signals)
    seen = 0.4 * found["watched"] + 0.3 * found["liked"] + 0.2 * found["shared"] + 0.1 * found["followed"]
    return _finite(signals, jnp.where(found["seconds"] < SKIP_SECONDS, SKIPPED, seen))


def long_video(signals: LongVideo, penalty: Array | float = 0.0) -> Array:
    """0.6 completion + 0.2 click + 0.2 subscription - penalty * similarity; completion is seconds / max(length, 1)."""
    found = _numbers(signals)
    completion = found["seconds"] / jnp.maximum(found["length"], 1.0)
    gained = 0.6 * completion + 0.2 * found["clicked"] + 0.2 * found["subscribed"]
    return _finite(signals, gained - penalty * found["similarity"])


def social_feed(signals: SocialFeed) -> Array:
    """0.3 engagement + 0.3 dwell + 0.4 revenue, the engagement from `ENGAGEMENT`."""
    found, worth = _numbers(signals), jnp.array(list(ENGAGEMENT.values()), jnp.float32)
    engagement = jnp.where(found["reaction"][..., None] == jnp.arange(len(ENGAGEMENT)), worth, 0.0).sum(axis=-1)
    return _finite(signals, 0.3 * engagement + 0.3 * found["dwell"] + 0.4 * found["revenue"])


def video_commerce(signals: VideoCommerce) -> Array:
    """0.4 watched + 0.2 like + 0.3 purchase + 0.1 saved."""
    found = _numbers(signals)
    gained = 0.4 * found["watched"] + 0.2 * found["liked"] + 0.3 * found["purchased"] + 0.1 * found["saved"]
    return _finite(signals, gained)


def learning(signals: Learning) -> Array:
    """Completion + correctness - frustration."""
    found = _numbers(signals)
    return _finite(signals, found["completion"] + found["correctness"] - found["frustration"])


REWARDS: dict[str, tuple[type, Callable[..., Array]]] = {
    "short-video": (ShortVideo, short_video),
    "long-video": (LongVideo, long_video),
    "social-feed": (SocialFeed, social_feed),
    "video-commerce": (VideoCommerce, video_commerce),
    "learning": (Learning, learning),
}
"""Every preset: its signals and its reward."""


def mean_cosine(previous: Array, candidate: Array, counted: Array | None = None) -> Array:
    """Mean cosine of a candidate [D] with the items shown before, previous [N, D]: [].

    Args:
      previous: a row of zeros has cosine 0.
      candidate: of zeros or not finite, it has cosine 0 with everything.
      counted: [N] bool, which rows there are (all by default); 0 without any. Rows that are not finite do not count.
    """
    counted = jnp.isfinite(previous).all(axis=-1) & (True if counted is None else counted)
    rows = jnp.concatenate([jnp.where(counted[:, None], previous, 0.0), candidate[None]])
    directions = unit_rows(jnp.where(jnp.isfinite(rows).all(axis=-1, keepdims=True), rows, 0.0))
    return (directions[:-1] @ directions[-1]).sum() / jnp.maximum(counted.sum(), 1)


def _numbers(signals: Any) -> dict[str, Array]:
    """Signals by name, as float32 of one shape."""
    arrays = jnp.broadcast_arrays(*(jnp.asarray(x, jnp.float32) for x in jax.tree.leaves(tuple(signals))))
    return dict(zip(signals._fields, arrays, strict=True))


def _finite(signals: NamedTuple, reward: Array) -> Array:
    """The reward, and 0 where a signal (or, by overflow, the reward itself) is not finite."""
    return jnp.where(known(signals) & jnp.isfinite(reward), reward, 0.0)
