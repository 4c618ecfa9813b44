"""A chaos-free recurrent belief over slates and clicks: s' = z * tanh(s) + i * tanh(W a), gates z and i of s and a.

The state encoder of Chen et al. (2019) after Laurent and von Brecht, "A recurrent neural network without chaos"
(2016): without input the state shrinks to zero. a holds the item embeddings and clicks of a slate, as in `gru.py`.
Called by `belief.py` only.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from gemsjax.devices import unroll_of
from gemsjax.nets.mlp import uniform
from gemsjax.types import Array, Observation, Params


class CFNBelief(nn.Module):
    """One step on [item embeddings, clicks] of a slate; -1 (or no item at all) is an empty slot, whose inputs are zero.

    Attributes:
      num_items, slate_size: I, K.
      item_dim: width of its own item embeddings, drawn from N(0, 1) and trained.
      hidden: width of the state.
    """

    num_items: int
    slate_size: int
    item_dim: int = 20
    hidden: int = 20

    @nn.compact
    def __call__(self, state: Array, observation: Observation) -> Array:
        """The next state: [hidden], one observation [K] -> [hidden]."""
        inputs, bound = self.slate_size * (self.item_dim + 1), self.hidden**-0.5
        params = {
            "item_embeddings": self.param(
                "item_embeddings", nn.initializers.normal(1.0), (self.num_items, self.item_dim)
            ),
            "input_kernel": self.param("input_kernel", uniform(inputs**-0.5), (inputs, 3 * self.hidden)),
            "gate_bias": self.param("gate_bias", uniform(bound), (2 * self.hidden,)),
            "recurrent_kernel": self.param("recurrent_kernel", uniform(bound), (self.hidden, 2 * self.hidden)),
        }
        return _next(project(params, observation), state, params["recurrent_kernel"])


def project(params: Params, observation: Observation) -> Array:
    """The inputs' share of both gates and of the new content: [..., K] -> [..., 3 * hidden]."""
    table = params["item_embeddings"]
    there = ((observation.slate >= 0) & (observation.slate < table.shape[0]))[..., None]
    items = jnp.where(there, table[observation.slate], 0.0)
    clicks = jnp.where(there, observation.clicks[..., None], False).astype(items.dtype)
    flat = jnp.concatenate([items, clicks], axis=-1).reshape(*observation.slate.shape[:-1], -1)
    gates = params["gate_bias"].shape[0]
    return flat @ params["input_kernel"] + jnp.pad(params["gate_bias"], (0, gates // 2))


def unroll(beliefs: Sequence[Params], observation: Observation) -> tuple[Array, ...]:
    """States of each belief over trajectories, time-major, from zero states: [H, B, K] -> [H, B, hidden] of each."""

    def one(params: Params) -> Array:
        inputs, kernel = project(params, observation), params["recurrent_kernel"]

        def step(state: Array, inputs_t: Array) -> tuple[Array, Array]:
            state = _next(inputs_t, state, kernel)
            return state, state

        start = jnp.zeros((inputs.shape[1], kernel.shape[0]))
        return jax.lax.scan(step, start, inputs, unroll=unroll_of(len(inputs)))[1]

    return tuple(one(params) for params in beliefs)


def _next(inputs: Array, state: Array, kernel: Array) -> Array:
    """The cell on projected inputs [..., 3h], a state [..., h] and a kernel [h, 2h]."""
    width = kernel.shape[0]
    keep, let_in = jnp.split(jax.nn.sigmoid(inputs[..., : 2 * width] + state @ kernel), 2, axis=-1)
    return keep * jnp.tanh(state) + let_in * jnp.tanh(inputs[..., 2 * width :])
