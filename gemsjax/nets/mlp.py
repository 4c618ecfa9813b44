"""Linear layers and perceptrons with the initialisation of the published implementation. Used by nets/ and agents/."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from gemsjax.types import Array, Key


def uniform(bound: float) -> nn.initializers.Initializer:
    """U(-bound, bound)."""

    def init(key: Key, shape: Sequence[int], dtype: jnp.dtype = jnp.float32) -> Array:
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


class MLP(nn.Module):
    """Linear layers with ReLU between them: [..., n] -> [..., features[-1]]."""

    features: Sequence[int]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i, width in enumerate(self.features):
            x = Linear(width, name=f"layer{i}")(x if i == 0 else nn.relu(x))
        return x
