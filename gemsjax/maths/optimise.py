"""Adam with the learning rate as data, so that runs of one program may differ in it. For agents and pretrain/.

Moments and state are optax's. The step is written out because optax divides twice: XLA turns that into one division in
programs for one device but not in those for several, and a run of a sweep must not depend on where it runs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gemsjax.types import Array, Params

AdamState = Any  # optax.ScaleByAdamState
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def adam_init(params: Params) -> AdamState:
    """Zero moments for `params`; arrays only."""
    return optax.scale_by_adam().init(params)


def adam_step(params: Params, gradients: Params, state: AdamState, rate: Array | float) -> tuple[Params, AdamState]:
    """One step of Adam (betas 0.9 and 0.999, epsilon 1e-8): new parameters and moments."""
    mean = optax.tree.update_moment(gradients, state.mu, BETA1, 1)
    square = optax.tree.update_moment_per_elem_norm(gradients, state.nu, BETA2, 2)
    count = state.count + 1
    # The barrier keeps these scalars scalars: two products and one division for each parameter.
    step, scale = jax.lax.optimization_barrier((rate / (1.0 - BETA1**count), (1.0 - BETA2**count) ** -0.5))
    new = jax.tree.map(lambda p, m, s: p - step * m / (jnp.sqrt(s) * scale + EPSILON), params, mean, square)
    return new, optax.ScaleByAdamState(count, mean, square)


def clip_by_norm(gradients: Params, limit: Array | float) -> tuple[Params, Array]:
    """Gradients scaled down to a global norm of at most `limit`, and the norm that they had (as PyTorch clips)."""
    norm = optax.tree.norm(gradients)
    scale = jnp.minimum(1.0, limit / (norm + 1e-6))
    return jax.tree.map(lambda g: scale * g, gradients), norm
