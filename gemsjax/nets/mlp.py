"""Linear layers and perceptrons with the initialisation of the published implementation. Used by nets/ and agents/."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gemsjax.maths.blocks import once
from gemsjax.types import Array, Key


def uniform(bound: float) -> nn.initializers.Initializer:
    """U(-bound, bound)."""

    def init(key: Key, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


@jax.custom_vjp
def affine(x: Array, kernel: Array, bias: Array) -> Array:
    """`x @ kernel + bias`: [..., n], [n, m], [m] -> [..., m], with the kernel's gradient by `outer_sum`.

    For reverse-mode differentiation only, like whatever has a derivative of its own (`joint` too).
    """
    return _product(x, kernel) + bias


_LANES = 16
"""Numbers in a vector of the widest CPUs."""


def _product(x: Array, kernel: Array) -> Array:
    """`x @ kernel`. On CPUs columns are filled up to whole vectors: those left over would cost a third of the time."""
    rows, columns = x.size // x.shape[-1], kernel.shape[1]
    if jax.default_backend() != "cpu" or rows < 100 or columns < _LANES or columns % _LANES == 0:
        return x @ kernel
    return (x @ jnp.pad(kernel, ((0, 0), (0, -columns % _LANES))))[..., :columns]


def _affine_backward(residuals: tuple[Array, Array], grad: Array) -> tuple[Array, Array, Array]:
    x, kernel = residuals
    grad = once(grad)
    return grad @ kernel.T, outer_sum(x, grad), grad.reshape(-1, grad.shape[-1]).sum(axis=0)


affine.defvjp(lambda x, kernel, bias: (_product(x, kernel) + bias, (x, kernel)), _affine_backward)


def outer_sum(x: Array, grad: Array) -> Array:
    """Sum over rows of the outer products of `x` [..., n] and `grad` [..., m]: [n, m], a kernel's gradient.

    On CPUs the product reads one operand column by column. Columns of rows as long as a power of two share a few places
    of the cache, which halves the speed, so the other operand is taken for it where it is much narrower (measured on
    CPUs only).
    """
    x, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    if jax.default_backend() == "cpu" and 2 * grad.shape[1] < x.shape[1]:
        # The barriers keep XLA from turning the product round again, and from passing on its columns as rows.
        return once(once(grad.T @ x).T)
    return x.T @ grad


class Linear(nn.Module):
    """`x @ kernel + bias`: [..., n] -> [..., features]; kernel and bias start as U(+-1/sqrt(n))."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        bound = x.shape[-1] ** -0.5
        kernel = self.param("kernel", uniform(bound), (x.shape[-1], self.features))
        bias = self.param("bias", uniform(bound), (self.features,))
        return affine(x, kernel, bias)


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


@jax.custom_vjp
def joint(state: Array, action: Array, kernel: Array, bias: Array) -> Array:
    """`[state, action] @ kernel + bias`: [..., s], [..., a], [s + a, m], [m] -> [..., m]. Nothing is broadcast."""
    return jnp.concatenate([state, action], axis=-1) @ kernel + bias


def _joint_backward(residuals: tuple[Array, Array, Array], grad: Array) -> tuple[Array, Array, Array, Array]:
    state, action, kernel = residuals
    width = state.shape[-1]
    # A column of ones sums the bias's gradient within the kernel's product.
    ones = jnp.ones((*state.shape[:-1], 1), state.dtype)
    by_kernel = outer_sum(jnp.concatenate([state, action, ones], axis=-1), grad)
    return grad @ kernel[:width].T, grad @ kernel[width:].T, by_kernel[:-1], by_kernel[-1]


joint.defvjp(lambda *inputs: (joint(*inputs), inputs[:3]), _joint_backward)


class Critic(nn.Module):
    """Q of a state and an action with one hidden layer: [..., s], [..., a] -> [...], the same [...] of both.

    The parameters are those of an MLP on [state, action]. `joint` makes one product of the two, and gradients with
    respect to each on its own, so a loss that needs one of them does not pay for the other.
    """

    hidden: int

    @nn.compact
    def __call__(self, state: Array, action: Array) -> Array:
        inputs = state.shape[-1] + action.shape[-1]
        bound = inputs**-0.5
        kernel = self.param("kernel", uniform(bound), (inputs, self.hidden))
        bias = self.param("bias", uniform(bound), (self.hidden,))
        hidden = nn.relu(joint(state, action, kernel, bias))
        return Linear(1, name="out")(hidden)[..., 0]
