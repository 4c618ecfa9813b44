"""Policies that do not learn: random, short-term oracle, epsilon-greedy oracle (paper section 5.1, logging policy)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from gemsjax.agents.base import Acting, Choice, Policy
from gemsjax.maths.randomness import whole_number
from gemsjax.maths.slates import distinct_from_uniforms
from gemsjax.types import Array, Dims, Observation


def _nothing() -> tuple[()]:
    return ()


def make_random(dims: Dims) -> Policy:
    """Uniform items with replacement."""

    def act(_acting: Acting, memory: Any, _seen: Observation, _hidden: None, uniforms: Array) -> tuple[Choice, Any]:
        slate = whole_number(uniforms, dims.num_items)
        return Choice(slate, slate), memory

    return Policy(_nothing, act, draws=dims.slate_size)


def make_short_term_oracle(dims: Dims) -> Policy:
    """The items that suit the true user best this turn, bored topics left out. Privileged and myopic."""
    slate = jnp.full(dims.slate_size, -1, jnp.int32)

    def act(_acting: Acting, memory: Any, _seen: Observation, _hidden: Any, _uniforms: Array) -> tuple[Choice, Any]:
        return Choice(slate, slate), memory

    return Policy(_nothing, act, privileged=True, asks_oracle=True)


def make_epsilon_greedy_oracle(dims: Dims, epsilon: float = 0.5) -> Policy:
    """The logging policy: each rank is random with probability epsilon, else the oracle's item of that rank.

    The random ranks of one slate do not repeat each other; they may repeat an oracle's item (published implementation).
    """

    def act(_acting: Acting, memory: Any, _seen: Observation, _hidden: Any, uniforms: Array) -> tuple[Choice, Any]:
        which, whether = jnp.split(uniforms, 2)
        slate = jnp.where(whether < epsilon, distinct_from_uniforms(which, dims.num_items), -1)
        return Choice(slate, slate), memory

    return Policy(_nothing, act, draws=2 * dims.slate_size, privileged=True, asks_oracle=True)
