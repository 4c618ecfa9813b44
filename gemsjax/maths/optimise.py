"""Adam with the learning rate as data, so that runs of one program may differ in it. For agents and pretrain/."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gemsjax.types import Array, Params

AdamState = Any  # optax.ScaleByAdamState
_ADAM = optax.scale_by_adam()


def adam_init(params: Params) -> AdamState:
    """Zero moments for `params`; arrays only."""
    return _ADAM.init(params)


def adam_step(params: Params, gradients: Params, state: AdamState, rate: Array | float) -> tuple[Params, AdamState]:
    """One step of Adam (betas 0.9 and 0.999, epsilon 1e-8): new parameters and moments."""
    directions, state = _ADAM.update(gradients, state)
    return jax.tree.map(lambda p, d: p - rate * d, params, directions), state


def clip_by_norm(gradients: Params, limit: Array | float) -> tuple[Params, Array]:
    """Gradients scaled down to a global norm of at most `limit`, and the norm that they had (as PyTorch clips)."""
    norm = optax.tree.norm(gradients)
    scale = jnp.minimum(1.0, limit / (norm + 1e-6))
    return jax.tree.map(lambda g: scale * g, gradients), norm
