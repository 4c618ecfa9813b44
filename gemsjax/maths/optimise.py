"""Adam, centred RMSProp and plain gradients with the learning rate as data, so that runs of one program may differ.

Moments and state of Adam are optax's. Its step is written out because optax divides twice: XLA turns that into one
division in programs for one device but not in those for several, and a run of a sweep must not depend on where it runs.
For agents and pretrain/.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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


class Optimiser(NamedTuple):
    """A rule for steps.

    Attributes:
      init: `(params) -> state`, arrays only.
      step: `(params, gradients, state, rate) -> (params, state)`.
    """

    init: Callable[[Params], Any]
    step: Callable[[Params, Params, Any, Array | float], tuple[Params, Any]]


def scale_by_centred_rms(decay: float = 0.95, eps: float = 1e-5) -> optax.GradientTransformation:
    """Gradients over their running standard deviation, as `optax.scale_by_stddev(decay, eps, initial_scale=1)`.

    The variance there is a difference of two running means. Where gradients are large and alike, rounding takes it
    below -eps and the square root is not a number; here it is at least 0.
    """

    def init(params: Params) -> tuple[Params, Params]:
        return jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.ones_like, params)

    def update(gradients: Params, state: tuple[Params, Params], params: Any = None) -> tuple[Params, Any]:
        mean, square = state
        mean = optax.tree.update_moment(gradients, mean, decay, 1)
        square = optax.tree.update_moment(gradients, square, decay, 2)
        scaled = lambda g, m, s: g * jax.lax.rsqrt(jnp.maximum(s - jnp.square(m), 0.0) + eps)  # noqa: E731
        return jax.tree.map(scaled, gradients, mean, square), (mean, square)

    return optax.GradientTransformation(init, update)


def _optimiser(transformation: optax.GradientTransformation) -> Optimiser:
    def step(params: Params, gradients: Params, state: Any, rate: Array | float) -> tuple[Params, Any]:
        directions, state = transformation.update(gradients, state)
        return jax.tree.map(lambda p, d: p - rate * d, params, directions), state

    return Optimiser(transformation.init, step)


OPTIMISERS = {
    "adam": Optimiser(adam_init, adam_step),
    "rmsprop": _optimiser(scale_by_centred_rms()),
    "sgd": _optimiser(optax.identity()),
}
"""By name; RMSProp is centred, with decay 0.95 and epsilon 1e-5, as in RecSim's agents."""
