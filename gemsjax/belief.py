"""Belief: what an agent makes of the observations so far. Called by agents.

Pure functions over one user (`step`) or whole trajectories (`unroll`). Another encoder is one more `make_*` here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from gemsjax.nets import cfn, gru
from gemsjax.types import Array, Dims, Key, Observation, Params


class Belief(NamedTuple):
    """A recurrent state over observations.

    Attributes:
      init: `(key) -> params`.
      start: `() -> state` [width], before the first observation.
      step: `(params, state, observation of one turn) -> state`, one user.
      unroll: `(several params, observations [H, B]) -> states [H, B, width] of each`, time-major, in one scan.
      width: static size of the state.
    """

    init: Callable[[Key], Params]
    start: Callable[[], Array]
    step: Callable[[Params, Array, Observation], Array]
    unroll: Callable[[Sequence[Params], Observation], tuple[Array, ...]]
    width: int


def make_gru(dims: Dims, width: int = 20, item_dim: int = 20) -> Belief:
    """The paper's belief: a GRU over [item embedding, click] of every slot, with its own item embeddings."""
    return _bind(gru.GRUBelief(dims.num_items, dims.slate_size, item_dim, width), gru.unroll, dims, width)


def make_cfn(dims: Dims, width: int = 20, item_dim: int = 20) -> Belief:
    """The same with the chaos-free cell of Chen et al. (2019); a slot that holds -1 is empty."""
    return _bind(cfn.CFNBelief(dims.num_items, dims.slate_size, item_dim, width), cfn.unroll, dims, width)


def _bind(module: Any, unroll: Callable[..., tuple[Array, ...]], dims: Dims, width: int) -> Belief:
    """A cell `(state, observation) -> state` and its unroll as a belief."""

    def start() -> Array:
        return jnp.zeros(width)

    def init(key: Key) -> Params:
        blank = Observation(jnp.zeros(dims.slate_size, jnp.int32), jnp.zeros(dims.slate_size, bool))
        return module.init(key, start(), blank)["params"]

    def step(params: Params, state: Array, observation: Observation) -> Array:
        return module.apply({"params": params}, state, observation)

    return Belief(init, start, step, unroll, width)
