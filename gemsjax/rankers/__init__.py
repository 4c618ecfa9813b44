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
      draws: uniform numbers that a drawn slate takes, static.
      draw: `(weights, action [A], uniforms [draws]) -> slate [K] int32` while exploring; None to decode then, too.
    """

    decode: Callable[[Params, Array], Array]
    box: Callable[[Params], tuple[Array, Array]]
    action_dim: int
    draws: int = 0
    draw: Callable[[Params, Array, Array], Array] | None = None

    def explored(self, weights: Params, action: Array, uniforms: Array) -> Array:
        """The slate of an exploring policy, [K]: drawn if this ranker draws."""
        return self.decode(weights, action) if self.draw is None else self.draw(weights, action, uniforms)
