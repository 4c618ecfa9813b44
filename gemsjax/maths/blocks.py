"""Functions and gradients over turns, made in one piece or block by block, and what XLA is to make once.

A hidden layer of a whole batch (2000 rows of 256 numbers) is larger than a core's cache, so one core is faster block by
block, forward and backward of a block together. Called by agents; `one_core` by sweeps and `shares.py`, `once` by nets,
rankers and distributions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from gemsjax.types import Array, Params

Tree = TypeVar("Tree")
BLOCK = 200
"""Rows (turns times users) at least of a block: a hidden layer of so many stays in a core's cache."""

_in_blocks: ContextVar[bool] = ContextVar("in_blocks", default=False)


@contextmanager
def one_core() -> Iterator[None]:
    """What is traced inside is for one core of a CPU, and made block by block; elsewhere it is made in one piece.

    One core needs a seventh less time for a step of SAC+GeMS in blocks, two cores on one device's update a fifth more:
    blocks are too small to be shared. So it is for programs with a device a core, and for the only core of a machine.
    Accelerators ignore it.
    """
    token = _in_blocks.set(True)
    try:
        yield
    finally:
        _in_blocks.reset(token)


def once(values: Tree) -> Tree:
    """The same values, across which XLA on a CPU rewrites nothing until it fuses: a transpose stays one, say.

    What is fused may still be made again for each use. Accelerators ignore it.
    """
    return jax.lax.optimization_barrier(values) if jax.default_backend() == "cpu" else values


def over_turns(function: Callable[..., Any], *turns: Any) -> Any:
    """`function(*turns)` of what does not look from one turn to another; by blocks inside `one_core`.

    Args:
      function: leaves [h, B, ...] -> leaves [h, B, ...], for any h.
      turns: leaves [H, B, ...].
    """
    blocks = _count_blocks(turns)
    if blocks == 1:
        return function(*turns)
    return _joined(jax.lax.map(lambda block: function(*block), _cut(turns, blocks)))


def gradients_over_turns(
    loss: Callable[..., tuple[Array, Any]], params: Params, states: Tree, *turns: Any
) -> tuple[tuple[Array, Any], tuple[Params, Tree]]:
    """Value and gradients of a loss that is a mean over turns and users; by blocks inside `one_core`.

    Args:
      loss: `(params, states, *turns) -> (loss, what else to report)`, all of it means over [h, B], for any h.
      params: differentiated.
      states: leaves [H, B, width], differentiated.
      turns: leaves [H, B, ...], not differentiated.

    Returns:
      `(loss, what else)`, and the gradients of (params, states).
    """
    value_and_gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)
    blocks = _count_blocks(states)
    if blocks == 1:
        return value_and_gradients(params, states, *turns)

    def share(tree: Any) -> Any:
        return jax.tree.map(lambda x: x / blocks, tree)

    def add(total: Any, block: tuple) -> tuple[Any, Tree]:
        reported, (by_params, by_states) = value_and_gradients(params, *block)
        total = jax.tree.map(jnp.add, total, share((reported, by_params)))
        # The barrier keeps XLA from computing these gradients again, number by number, as it stores them.
        return total, once(share(by_states))

    cut = _cut((states, *turns), blocks)
    first = jax.tree.map(lambda x: x[0], cut)
    shapes = jax.eval_shape(lambda: (lambda out: (out[0], out[1][0]))(value_and_gradients(params, *first)))
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (reported, by_params), by_states = jax.lax.scan(add, nothing, cut)
    return reported, (by_params, _joined(by_states))


def forward_over_turns(
    function: Callable[[Params, Array], Tree], params: Params, states: Array
) -> tuple[Tree, Callable[[Tree], tuple[Params, Array]]]:
    """`jax.vjp(function, params, states)` of what does not look from one turn to another; by blocks inside `one_core`,
    where a block's hidden layers are made again on the way back.

    Args:
      function: `(params, [h, B, n]) -> leaves [h, B, m]`, for any h.
      params: differentiated.
      states: [H, B, n], differentiated.

    Returns:
      Leaves [H, B, m], and what turns a gradient with respect to it into those with respect to (params, states).
    """
    blocks = _count_blocks(states)
    if blocks == 1:
        return jax.vjp(function, params, states)

    def pull(grads: Tree) -> tuple[Params, Array]:
        def add(total: Params, block: tuple[Array, Tree]) -> tuple[Params, Array]:
            states, grad = block
            by_params, by_states = jax.vjp(function, params, states)[1](grad)
            return jax.tree.map(jnp.add, total, by_params), once(by_states)

        by_params, by_states = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), _cut((states, grads), blocks))
        return by_params, _joined(by_states)

    return over_turns(partial(function, params), states), pull


def _count_blocks(turns: Any) -> int:
    """Into how many equal blocks turns [H, B, ...] are taken apart."""
    length, users = jax.tree.leaves(turns)[0].shape[:2]
    if not _in_blocks.get() or jax.default_backend() != "cpu":
        return 1
    fair = (n for n in range(1, length + 1) if length % n == 0 and length // n * users >= BLOCK)
    return max(fair, default=1)


def _cut(turns: Any, blocks: int) -> Any:
    return jax.tree.map(lambda x: x.reshape(blocks, -1, *x.shape[1:]), turns)


def _joined(blocks: Any) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), blocks)
