"""Choosing slates out of a catalogue. Pure, unbatched; the caller vmaps.

May be used by environments, rankers and agents.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gemsjax.types import Array, Key


def top_items(scores: Array, size: int) -> Array:
    """The `size` highest-scoring items, best first, ties to the lowest number: [I] -> [size] int32."""
    return jax.lax.top_k(scores, size)[1].astype(jnp.int32)


def best_item(scores: Array) -> Array:
    """Number of the highest score, the lowest on ties: [..., I] -> [...] int32 (I if a score is NaN).

    Equal to `argmax`, whose reduction over (value, index) pairs compilers for CPUs do not vectorise: this is ten times
    faster there, and that was three quarters of a rollout under a GeMS policy.
    """
    size = scores.shape[-1]
    # Reducing over the middle of [..., rows, lanes] first keeps the inner loop on contiguous lanes.
    lanes = max(width for width in range(1, 65) if size % width == 0)
    tiled = scores.reshape(*scores.shape[:-1], size // lanes, lanes)
    best = tiled.max(axis=-2).max(axis=-1)
    numbers = jnp.arange(size, dtype=jnp.int32).reshape(size // lanes, lanes)
    return jnp.where(tiled == best[..., None, None], numbers, size).min(axis=-2).min(axis=-1)


def draw_distinct(key: Key, population: int | Array, size: int) -> Array:
    """`size` numbers below `population` without repeats: the first entries of a random permutation, [size] int32.

    A Fisher-Yates shuffle of which only `size` swaps are carried out and remembered, so the cost does not depend on
    the population. (Permuting a catalogue of 1000 to keep ten costs thirty times the rest of a simulated turn.)
    `population` may be traced; it must be at least `size`.
    """
    return distinct_from_uniforms(jax.random.uniform(key, (size,)), population)


def distinct_from_uniforms(uniforms: Array, population: int | Array) -> Array:
    """`draw_distinct` from given uniform numbers in [0, 1): [n] -> [n] int32."""
    size = uniforms.shape[0]
    position = jnp.arange(size, dtype=jnp.int32)
    left = jnp.asarray(population, jnp.int32) - position
    # A uniform number has 24 bits, ample for catalogues and replay buffers; the minimum guards against rounding up.
    partner = position + jnp.minimum((uniforms * left).astype(jnp.int32), left - 1)
    chosen: list[Array] = []
    displaced: list[Array] = []  # displaced[i]: what swap i put at place partner[i]

    def value_at(place: Array, swaps: int) -> Array:
        value = place
        for i in range(swaps):  # the latest swap of a place counts
            value = jnp.where(partner[i] == place, displaced[i], value)
        return value

    for k in range(size):
        chosen.append(value_at(partner[k], k))
        displaced.append(value_at(position[k], k))
    return jnp.stack(chosen)
