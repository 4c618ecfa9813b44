"""Work on those rows of a batch that need it, in blocks, as many as there are. Pure; for agents.

Shapes are static, so masking alone would cost as much as working on every row. On a CPU these loops run only as many
blocks as hold selected rows; on other devices, where loops cost more than rows, everything is done at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp

from gemsjax.types import Array

BLOCK = 128
"""Rows of a block: with a thousand numbers a row it fits a processor's cache."""


def map_selected(function: Callable[[Any], Any], selected: Array, inputs: Any) -> Any:
    """`function` of the selected rows, zero in the others. Not differentiable.

    Args:
      function: of one row of `inputs`; it is vmapped.
      selected: [n] bool.
      inputs: pytree of [n, ...].

    Returns:
      Pytree of [n, ...].
    """
    return jax.lax.platform_dependent(
        selected, inputs, cpu=partial(_map_in_blocks, function), default=partial(_map_at_once, function)
    )


def _map_at_once(function: Callable[[Any], Any], selected: Array, inputs: Any) -> Any:
    keep = jax.vmap(lambda yes, value: jax.tree.map(lambda x: jnp.where(yes, x, jnp.zeros_like(x)), value))
    return keep(selected, jax.vmap(function)(inputs))


def _map_in_blocks(function: Callable[[Any], Any], selected: Array, inputs: Any) -> Any:
    rows = selected.shape[0]
    shapes = jax.eval_shape(jax.vmap(function), inputs)
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def block(number: Array, done: Any) -> Any:
        chosen = jax.lax.dynamic_slice_in_dim(order, number * BLOCK, BLOCK)
        values = jax.vmap(function)(jax.tree.map(lambda x: x[jnp.minimum(chosen, rows - 1)], inputs))
        return jax.tree.map(lambda old, new: old.at[chosen].set(new, mode="drop"), done, values)

    order, blocks = _in_order(selected)
    return jax.lax.fori_loop(0, blocks, block, empty)


def _in_order(selected: Array) -> tuple[Array, Array]:
    """Numbers of the selected rows, then n as often as needed to fill blocks; and how many blocks hold any."""
    rows = selected.shape[0]
    size = -(-rows // BLOCK) * BLOCK
    position = jnp.cumsum(selected, dtype=jnp.int32)
    numbers = jnp.arange(rows, dtype=jnp.int32)
    order = jnp.full(size, rows, jnp.int32).at[jnp.where(selected, position - 1, size)].set(numbers, mode="drop")
    return order, -(-position[-1] // BLOCK)


def picked_outputs(x: Array, kernel: Array, bias: Array, items: Array, picked: Array) -> Array:
    """Some outputs of a wide linear layer: (x @ kernel + bias) at `items`, zero where not picked.

    A row that needs a few of a thousand outputs reads only their columns of the kernel; the gradient writes only these.

    Args:
      x: [n, F].
      kernel, bias: [F, I], [I].
      items: [n, K] int32, the outputs that row n may need; they may repeat.
      picked: [n, K] bool, whether it needs them.

    Returns:
      [n, K]; differentiable in x, kernel and bias.
    """
    chex.assert_shape((items, picked), (x.shape[0], None))
    chex.assert_shape((kernel, bias), ((x.shape[1], bias.shape[0]), (None,)))
    return _picked_outputs(x, kernel, bias, items, picked)


# The choice of a way is made inside the derivative's rules: taking derivatives of the choice would store what either
# way needs for its backward pass.
@jax.custom_vjp
def _picked_outputs(*inputs: Array) -> Array:
    return jax.lax.platform_dependent(*inputs, cpu=_columns_in_blocks, default=_columns_at_once)


def _picked_outputs_forward(*inputs: Array) -> tuple[Array, tuple]:
    return _picked_outputs(*inputs), inputs


def _picked_outputs_backward(inputs: tuple, cotangent: Array) -> tuple:
    ways = {"cpu": _gradients_in_blocks, "default": _gradients_at_once}
    return *jax.lax.platform_dependent(*inputs, cotangent, **ways), None, None


_picked_outputs.defvjp(_picked_outputs_forward, _picked_outputs_backward)


def _columns_at_once(x: Array, kernel: Array, bias: Array, items: Array, picked: Array) -> Array:
    return jnp.where(picked, jnp.take_along_axis(x @ kernel + bias, items, axis=1), 0.0)


def _gradients_at_once(
    x: Array, kernel: Array, bias: Array, items: Array, picked: Array, cotangent: Array
) -> tuple[Array, ...]:
    columns = lambda x, kernel, bias: _columns_at_once(x, kernel, bias, items, picked)  # noqa: E731
    return jax.vjp(columns, x, kernel, bias)[1](cotangent)


def _columns_in_blocks(x: Array, kernel: Array, bias: Array, items: Array, picked: Array) -> Array:
    columns = kernel.T  # so that rows are gathered

    def block(done: Array, pair: Array, row: Array, item: Array) -> Array:
        return done.at[pair].set((x[row] * columns[item]).sum(axis=1) + bias[item], mode="drop")

    return _over_pairs(block, jnp.zeros(picked.size, x.dtype), items, picked).reshape(picked.shape)


def _gradients_in_blocks(
    x: Array, kernel: Array, bias: Array, items: Array, picked: Array, cotangent: Array
) -> tuple[Array, ...]:
    columns, by_pair = kernel.T, cotangent.reshape(-1)

    def block(done: tuple[Array, Array, Array], pair: Array, row: Array, item: Array) -> tuple[Array, Array, Array]:
        by_x, by_columns, by_bias = done
        by = jnp.where(pair < picked.size, by_pair[jnp.minimum(pair, picked.size - 1)], 0.0)
        return (
            by_x.at[row].add(by[:, None] * columns[item]),
            by_columns.at[item].add(by[:, None] * x[row]),
            by_bias.at[item].add(by),
        )

    zeros = jnp.zeros_like(x), jnp.zeros_like(columns), jnp.zeros_like(bias)
    by_x, by_columns, by_bias = _over_pairs(block, zeros, items, picked)
    return by_x, by_columns.T, by_bias


def _over_pairs(block: Callable[..., Any], start: Any, items: Array, picked: Array) -> Any:
    """Fold `block(done, pairs, their rows, their items)` over the picked (row, slot) pairs.

    The last block is filled up with a pair number that is out of range; its row and item are some that exist.
    """
    order, blocks = _in_order(picked.reshape(-1))

    def step(number: Array, done: Any) -> Any:
        pair = jax.lax.dynamic_slice_in_dim(order, number * BLOCK, BLOCK)
        inside = jnp.minimum(pair, picked.size - 1)
        return block(done, pair, inside // picked.shape[1], items.reshape(-1)[inside])

    return jax.lax.fori_loop(0, blocks, step, start)
