"""Made-up environments whose best policy is known: does a learner find it? One class, so that they share one program.

A user sees one item a turn and tosses a coin, which the observation shows as its click. What is rewarded is data
(`Rules`), so an agent is compiled once for all of them. Probes of other agents may use the same environment.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemsjax.rankers import Ranker
from gemsjax.types import Array, Key, Observation

ITEMS, HORIZON = 5, 8
LEFT, MIDDLE, RIGHT = 1, 2, 3
"""Items that matter. A policy that has learnt nothing shows the middle one, which is never rewarded."""


class Rules(NamedTuple):
    """How much each kind of success is worth; all zero by default.

    Attributes:
      left: the left item is shown.
      latest_coin: the item is the one that the coin in the latest observation asks for (heads: right, tails: left).
      earlier_coin: the item is the one that the coin in the observation before that asked for.
      left_before: the left item was shown one turn ago.
      bait: the right item is shown.
    """

    left: float = 0.0
    latest_coin: float = 0.0
    earlier_coin: float = 0.0
    left_before: float = 0.0
    bait: float = 0.0


class User(NamedTuple):
    """The coins of the two latest observations, and the item in the latest one."""

    latest: Array
    earlier: Array
    shown: Array


@dataclasses.dataclass(frozen=True)
class ProbeEnv:
    """Static half of the probes, with the contract of `TopicEnv`; its parameters are `Rules`."""

    num_items: int = ITEMS
    slate_size: int = 1
    horizon: int = HORIZON
    draws: int = 1

    def reset(self, key: Key, rules: Rules) -> tuple[Observation, User]:
        coin, shown = jax.random.bernoulli(key), jnp.int32(MIDDLE)
        return Observation(shown[None], coin[None]), User(coin, coin, shown)

    def play(self, uniforms: Array, user: User, slate: Array, rules: Rules) -> tuple:
        item, coin = slate[0], uniforms[0] < 0.5
        reward = (
            rules.left * (item == LEFT)
            + rules.latest_coin * (item == jnp.where(user.latest, RIGHT, LEFT))
            + rules.earlier_coin * (item == jnp.where(user.earlier, RIGHT, LEFT))
            + rules.left_before * (user.shown == LEFT)
            + rules.bait * (item == RIGHT)
        )
        never = jnp.bool_(False)
        return Observation(slate, coin[None]), User(coin, user.latest, item), reward, never, never, {}


def make_grid_ranker() -> Ranker:
    """One action in [-1, 1], which has the items on a grid: the nearest is shown."""

    def decode(_weights: tuple, action: Array) -> Array:
        return jnp.round((action + 1) / 2 * (ITEMS - 1)).astype(jnp.int32)

    return Ranker(decode, lambda _weights: (jnp.zeros(1), jnp.ones(1)), 1)
