"""Policies that do not learn: random, short-term oracle, epsilon-greedy oracle (paper section 5.1, logging policy)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gemsjax.agents.base import Acting, Choice, Policy
from gemsjax.maths.slates import distinct_from_uniforms
from gemsjax.types import Array, Dims, Key, Observation


def _nothing() -> tuple[()]:
    return ()


def make_random(dims: Dims) -> Policy:
    """Uniform items with replacement."""

    def draw(key: Key) -> Array:
        return jax.random.uniform(key, (dims.slate_size,))

    def act(_acting: Acting, memory: Any, _seen: Observation, _hidden: None, noise: Array) -> tuple[Choice, Any]:
        slate = jnp.minimum((noise * dims.num_items).astype(jnp.int32), dims.num_items - 1)
        return Choice(slate, slate), memory

    return Policy(_nothing, draw, act)


def make_short_term_oracle(dims: Dims) -> Policy:
    """The items that suit the true user best this turn, bored topics left out. Privileged and myopic."""
    slate = jnp.full(dims.slate_size, -1, jnp.int32)

    def draw(_key: Key) -> tuple[()]:
        return ()

    def act(_acting: Acting, memory: Any, _seen: Observation, _hidden: Any, _noise: Any) -> tuple[Choice, Any]:
        return Choice(slate, slate), memory

    return Policy(_nothing, draw, act, privileged=True, asks_oracle=True)


def make_epsilon_greedy_oracle(dims: Dims, epsilon: float = 0.5) -> Policy:
    """The logging policy: each rank is random with probability epsilon, else the oracle's item of that rank.

    The random ranks of one slate do not repeat each other; they may repeat an oracle's item (published implementation).
    """

    def draw(key: Key) -> Array:
        return jax.random.uniform(key, (2, dims.slate_size))

    def act(_acting: Acting, memory: Any, _seen: Observation, _hidden: Any, noise: Array) -> tuple[Choice, Any]:
        items = distinct_from_uniforms(noise[0], dims.num_items)
        slate = jnp.where(noise[1] < epsilon, items, -1)
        return Choice(slate, slate), memory

    return Policy(_nothing, draw, act, privileged=True, asks_oracle=True)
