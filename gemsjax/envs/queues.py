"""Queues of a fixed number of places inside arrays: the topic simulator's histories of clicks. Pure, one user.

A queue is [M] int32, oldest entry first from the left, -1 beyond its length, which travels beside it.
"""

from __future__ import annotations

import jax.numpy as jnp

from gemsjax.types import Array


def append(queue: Array, length: Array, values: Array, chosen: Array) -> tuple[Array, Array]:
    """Append the chosen values in order; the oldest entries fall out.

    Args:
      queue: [M] int32.
      length: [] int32, its entries.
      values: [n] int32, at least 0.
      chosen: [n] bool.

    Returns:
      The queue [M] and its length [] int32.
    """
    memory = queue.shape[0]
    total = length + chosen.sum(dtype=jnp.int32)
    overflow = jnp.maximum(total - memory, 0)
    # place[i]: where value i lands; the queue's own entries move left by the overflow.
    place = length + jnp.cumsum(chosen, dtype=jnp.int32) - 1 - overflow
    slots = jnp.arange(memory, dtype=jnp.int32)
    lands = chosen & (place == slots[:, None])
    appended = jnp.where(lands, values, 0).sum(axis=1, dtype=jnp.int32)
    return jnp.where(lands.any(axis=1), appended, drop(queue, overflow)), total - overflow


def drop(queue: Array, count: Array) -> Array:
    """Remove the `count` ([] int32) oldest entries of a queue [M]: [M] int32."""
    slots = jnp.arange(queue.shape[0], dtype=jnp.int32)
    kept = slots[:, None] + count == slots
    return jnp.where(kept, queue + 1, 0).sum(axis=1, dtype=jnp.int32) - 1
