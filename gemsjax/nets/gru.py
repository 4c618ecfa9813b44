"""The recurrent belief over slates and clicks (paper section 3.2; published: GRU of 20 units, gates ordered r|z|n).

`GRUBelief` owns the parameters and makes one step; `unroll` runs several beliefs over whole trajectories in ONE scan,
with the input projections outside it and a backward pass that leaves the weight gradients to two matrix products.
Called by `belief.py` only.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from gemsjax.nets.mlp import uniform
from gemsjax.types import Array, Observation, Params


class GRUBelief(nn.Module):
    """One GRU step on [item embeddings, clicks] of a slate.

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
        inputs, gates, bound = self.slate_size * (self.item_dim + 1), 3 * self.hidden, self.hidden**-0.5
        items = (self.num_items, self.item_dim)
        params = {
            "item_embeddings": self.param("item_embeddings", nn.initializers.normal(1.0), items),
            "input_kernel": self.param("input_kernel", uniform(bound), (inputs, gates)),
            "input_bias": self.param("input_bias", uniform(bound), (gates,)),
            "recurrent_kernel": self.param("recurrent_kernel", uniform(bound), (self.hidden, gates)),
            "recurrent_bias": self.param("recurrent_bias", uniform(bound), (gates,)),
        }
        recurrent = state @ params["recurrent_kernel"] + params["recurrent_bias"]
        return _gates(project(params, observation), recurrent, state)[0]


def features(item_embeddings: Array, observation: Observation) -> Array:
    """[..., K] observations -> [..., K * (item_dim + 1)]: for every slot its embedding, then its click."""
    items = item_embeddings[observation.slate]
    clicks = observation.clicks[..., None].astype(items.dtype)
    return jnp.concatenate([items, clicks], axis=-1).reshape(*observation.slate.shape[:-1], -1)


def project(params: Params, observation: Observation) -> Array:
    """The inputs' share of the gates' pre-activations: [..., K] -> [..., 3 * hidden]."""
    return features(params["item_embeddings"], observation) @ params["input_kernel"] + params["input_bias"]


def unroll(beliefs: Sequence[Params], observation: Observation) -> tuple[Array, ...]:
    """States of several beliefs of one width over trajectories, each [B, H, hidden], from zero states.

    Args:
      beliefs: parameter trees of `GRUBelief`, one a belief.
      observation: [B, H, K].
    """
    inputs = [jnp.swapaxes(project(params, observation), 0, 1) for params in beliefs]
    states = recurrence(
        jnp.stack(inputs, axis=2),
        jnp.stack([params["recurrent_kernel"] for params in beliefs]),
        jnp.stack([params["recurrent_bias"] for params in beliefs]),
    )
    return tuple(jnp.swapaxes(states[:, :, i], 0, 1) for i in range(len(beliefs)))


def _gates(inputs: Array, recurrent: Array, state: Array) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    """GRU equations on pre-activations [..., 3 * hidden]: the next state and what its gradient needs."""
    reset_in, update_in, new_in = jnp.split(inputs, 3, axis=-1)
    reset_rec, update_rec, new_rec = jnp.split(recurrent, 3, axis=-1)
    reset = jax.nn.sigmoid(reset_in + reset_rec)
    update = jax.nn.sigmoid(update_in + update_rec)
    new = jnp.tanh(new_in + reset * new_rec)
    return (1.0 - update) * new + update * state, (reset, update, new, new_rec)


def _recurrent(state: Array, kernel: Array) -> Array:
    """N beliefs' recurrent products: [B, N, hidden] x [N, hidden, m] -> [B, N, m]."""
    return jnp.stack([state[:, i] @ kernel[i] for i in range(kernel.shape[0])], axis=1)


@jax.custom_vjp
def recurrence(inputs: Array, kernel: Array, bias: Array) -> Array:
    """States of N GRUs from zero: inputs [H, B, N, 3h], kernel [N, h, 3h], bias [N, 3h] -> [H, B, N, h]."""
    return _recurrence_forward(inputs, kernel, bias)[0]


def _recurrence_forward(inputs: Array, kernel: Array, bias: Array) -> tuple[Array, tuple]:
    def step(state: Array, inputs_t: Array) -> tuple[Array, tuple]:
        next_state, saved = _gates(inputs_t, _recurrent(state, kernel) + bias, state)
        return next_state, (next_state, saved)

    _, batch, beliefs, _ = inputs.shape
    start = jnp.zeros((batch, beliefs, kernel.shape[1]), inputs.dtype)
    _, (states, saved) = jax.lax.scan(step, start, inputs)
    return states, (states, saved, kernel)


def _recurrence_backward(residuals: tuple, cotangent: Array) -> tuple[Array, Array, Array]:
    states, saved, kernel = residuals
    before = jnp.concatenate([jnp.zeros_like(states[:1]), states[:-1]])
    transposed = jnp.swapaxes(kernel, 1, 2)

    def step(later: Array, turn: tuple) -> tuple[Array, tuple[Array, Array]]:
        grad, state, (reset, update, new, new_rec) = turn
        grad = grad + later
        d_new = grad * (1.0 - update) * (1.0 - new * new)
        d_update = grad * (state - new) * update * (1.0 - update)
        d_reset = d_new * new_rec * reset * (1.0 - reset)
        d_inputs = jnp.concatenate([d_reset, d_update, d_new], axis=-1)
        d_recurrent = jnp.concatenate([d_reset, d_update, d_new * reset], axis=-1)
        return grad * update + _recurrent(d_recurrent, transposed), (d_inputs, d_recurrent)

    _, (d_inputs, d_recurrent) = jax.lax.scan(step, jnp.zeros_like(states[0]), (cotangent, before, saved), reverse=True)
    d_kernel = jnp.einsum("tbni,tbnj->nij", before, d_recurrent)
    return d_inputs, d_kernel, d_recurrent.sum(axis=(0, 1))


recurrence.defvjp(_recurrence_forward, _recurrence_backward)
