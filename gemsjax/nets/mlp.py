"""Linear layers and perceptrons with the initialisation of the published implementation. Used by nets/ and agents/."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gemsjax.types import Array, Key


def uniform(bound: float) -> nn.initializers.Initializer:
    """U(-bound, bound)."""

    def init(key: Key, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Linear(nn.Module):
    """`x @ kernel + bias`: [..., n] -> [..., features]; kernel and bias start as U(+-1/sqrt(n))."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        bound = x.shape[-1] ** -0.5
        kernel = self.param("kernel", uniform(bound), (x.shape[-1], self.features))
        bias = self.param("bias", uniform(bound), (self.features,))
        return x @ kernel + bias


ACTIVATIONS = {"relu": nn.relu, "tanh": nn.tanh, "elu": nn.elu}


class MLP(nn.Module):
    """Linear layers with an activation (one of `ACTIVATIONS`) between them: [..., n] -> [..., features[-1]]."""

    features: Sequence[int]
    activation: str = "relu"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i, width in enumerate(self.features):
            x = Linear(width, name=f"layer{i}")(x if i == 0 else ACTIVATIONS[self.activation](x))
        return x


class Critic(nn.Module):
    """Q of a state and an action with one hidden layer: [..., s], [..., a] -> [...].

    The parameters are those of an MLP on [state, action]. The first product is taken in two, so that a loss that needs
    the gradient with respect to one input does not pay for the other's (a quarter of the critics' work in SAC).
    """

    hidden: int

    @nn.compact
    def __call__(self, state: Array, action: Array) -> Array:
        width, inputs = state.shape[-1], state.shape[-1] + action.shape[-1]
        bound = inputs**-0.5
        kernel = self.param("kernel", uniform(bound), (inputs, self.hidden))
        bias = self.param("bias", uniform(bound), (self.hidden,))
        hidden = nn.relu(state @ kernel[:width] + action @ kernel[width:] + bias)
        return Linear(1, name="out")(hidden)[..., 0]
