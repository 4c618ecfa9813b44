"""How often learners over items show a slate at random. Called by agents."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from gemsjax.agents.base import Acting
from gemsjax.types import Array


def epsilon(acting: Acting) -> Array:
    """Chance of a random slate at this training step, [] float32.

    It falls from `hypers.first_epsilon` to `hypers.last_epsilon`; what is left of the way shrinks to 1/e in
    `hypers.epsilon_steps`.
    """
    hypers: Any = acting.hypers
    left = jnp.exp(-jnp.asarray(acting.step, jnp.float32) / hypers.epsilon_steps)
    return hypers.last_epsilon + (hypers.first_epsilon - hypers.last_epsilon) * left


def linear_epsilon(acting: Acting) -> Array:
    """The same, but falling along a line that reaches `hypers.last_epsilon` after `hypers.epsilon_steps`."""
    hypers: Any = acting.hypers
    left = 1.0 - jnp.asarray(acting.step, jnp.float32) / hypers.epsilon_steps
    return hypers.last_epsilon + (hypers.first_epsilon - hypers.last_epsilon) * jnp.maximum(left, 0.0)
