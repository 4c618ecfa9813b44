"""The recurrent belief over slates and clicks (paper section 3.2; published: GRU of 20 units, gates ordered r|z|n).

`GRUBelief` owns the parameters and makes one step; `unroll` runs several beliefs over whole trajectories in ONE scan,
with the input projections outside it and a backward pass that leaves the weight gradients to two matrix products.
Called by `belief.py` only.
"""

from __future__ import annotations

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from gemsjax.devices import unroll_of
from gemsjax.nets.mlp import affine, uniform
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
    return affine(features(params["item_embeddings"], observation), params["input_kernel"], params["input_bias"])


def unroll(beliefs: Sequence[Params], observation: Observation) -> tuple[Array, ...]:
    """States of several beliefs of one width over trajectories, time-major, from zero states.

    Args:
      beliefs: parameter trees of `GRUBelief`, one a belief.
      observation: [H, B, K].

    Returns:
      [H, B, hidden] for each belief.
    """
    inputs = _side_by_side([project(params, observation) for params in beliefs])
    bias = _side_by_side([params["recurrent_bias"] for params in beliefs])
    states = recurrence(inputs, _block_diagonal([params["recurrent_kernel"] for params in beliefs]), bias)
    return tuple(jnp.split(states, len(beliefs), axis=-1))


def _side_by_side(gates: Sequence[Array]) -> Array:
    """N beliefs' gates [..., 3h] as one GRU's [..., 3Nh]: reset of all beliefs, then update, then new."""
    return jnp.concatenate(
        [part for parts in zip(*(jnp.split(g, 3, axis=-1) for g in gates), strict=True) for part in parts], -1
    )


def _block_diagonal(kernels: Sequence[Array]) -> Array:
    """N recurrent kernels [h, 3h] as one [Nh, 3Nh] in the order of `_side_by_side`.

    The zero blocks cost N times the arithmetic of a product that is too small to notice, and save a product a turn.
    """
    gates = zip(*(jnp.split(kernel, 3, axis=-1) for kernel in kernels), strict=True)
    return jnp.concatenate([jax.scipy.linalg.block_diag(*blocks) for blocks in gates], axis=-1)


def _gates(inputs: Array, recurrent: Array, state: Array) -> tuple[Array, Array]:
    """GRU equations on pre-activations [..., 3h]: the next state [..., h]; the gates reset, update, new [..., 3h]."""
    width = state.shape[-1]
    reset_update = jax.nn.sigmoid(inputs[..., : 2 * width] + recurrent[..., : 2 * width])
    new = jnp.tanh(inputs[..., 2 * width :] + reset_update[..., :width] * recurrent[..., 2 * width :])
    return new + reset_update[..., width:] * (state - new), jnp.concatenate([reset_update, new], axis=-1)


@jax.custom_vjp
def recurrence(inputs: Array, kernel: Array, bias: Array) -> Array:
    """States of a GRU from zero: projected inputs [H, B, 3h], kernel [h, 3h], bias [3h] -> [H, B, h]."""
    return _recurrence_forward(inputs, kernel, bias)[0]


def _recurrence_forward(inputs: Array, kernel: Array, bias: Array) -> tuple[Array, tuple]:
    chex.assert_shape(inputs, (None, None, 3 * kernel.shape[0]))
    chex.assert_shape((kernel, bias), ((None, inputs.shape[-1]), (inputs.shape[-1],)))

    def step(state: Array, inputs_t: Array) -> tuple[Array, tuple[Array, Array]]:
        next_state, gates = _gates(inputs_t, state @ kernel + bias, state)
        return next_state, (next_state, gates)

    start = jnp.zeros((inputs.shape[1], kernel.shape[0]), inputs.dtype)
    _, (states, gates) = jax.lax.scan(step, start, inputs, unroll=unroll_of(len(inputs)))
    return states, (states, gates, kernel, bias)


def _recurrence_backward(residuals: tuple, cotangent: Array) -> tuple[Array, Array, Array]:
    """Only the chain through the states is sequential; its factors and the weights' gradients are not."""
    states, gates, kernel, bias = residuals
    width = kernel.shape[0]
    reset, update, new = jnp.split(gates, 3, axis=-1)
    before = jnp.concatenate([jnp.zeros_like(states[:1]), states[:-1]])
    by_new = (1.0 - update) * (1.0 - new * new)
    by_update = (before - new) * update * (1.0 - update)
    # One product of all turns, so that the scan has less to keep.
    recurrent_new = before @ kernel[:, 2 * width :] + bias[2 * width :]
    by_reset = by_new * recurrent_new * reset * (1.0 - reset)
    factors = jnp.concatenate([by_reset, by_update, by_new * reset], axis=-1)
    turned = kernel.T  # not within the loop, where XLA would turn it every turn

    def step(later: Array, turn: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        grad, factor, update = turn
        grad = grad + later
        return grad * update + (jnp.tile(grad, 3) * factor) @ turned, grad

    turns, last = (cotangent, factors, update), jnp.zeros_like(states[0])
    _, grads = jax.lax.scan(step, last, turns, reverse=True, unroll=unroll_of(len(states)))
    d_recurrent = jnp.tile(grads, 3) * factors
    d_inputs = jnp.concatenate([d_recurrent[..., : 2 * width], grads * by_new], axis=-1)
    return d_inputs, jnp.einsum("tbi,tbj->ij", before, d_recurrent), d_recurrent.sum(axis=(0, 1))


recurrence.defvjp(_recurrence_forward, _recurrence_backward)
