"""Rankers turn a continuous action into a slate."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from gemsjax.types import Array, Params


class Ranker(NamedTuple):
    """A map from actions to slates with the box that the actions live in. One user; weights are data.

    Attributes:
      decode: `(weights, action [A]) -> slate [K] int32`.
      box: `(weights) -> (centre [A], half range [A])`.
      action_dim: A, static.
    """

    decode: Callable[[Params, Array], Array]
    box: Callable[[Params], tuple[Array, Array]]
    action_dim: int
