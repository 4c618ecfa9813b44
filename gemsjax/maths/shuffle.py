"""A random order of n rows that is computed row by row: no stored permutation, any part of it on its own.

Pre-training walks millions of slates in an order that differs by epoch; a stored permutation would cost a sort and its
memory for every run of a sweep. Used by pretrain/.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gemsjax.types import Array, Key

ROUNDS = 4


def shuffled(positions: Array, size: int, key: Key) -> Array:
    """Rows at `positions` of a random order of `0 .. size-1`: [...] int32 -> [...] int32, a bijection for each key.

    A Feistel network over the next power of four, walked until it lands below `size` (at most four steps on average).
    Source: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = jnp.uint32((1 << half_bits) - 1)
    round_keys = jax.random.bits(key, (ROUNDS,), jnp.uint32)

    def permute(x: Array) -> Array:
        left, right = x >> half_bits, x & mask
        for i in range(ROUNDS):
            left, right = right, left ^ (_mix(right, round_keys[i]) & mask)
        return (left << half_bits) | right

    outside = lambda x: (x >= size).any()  # noqa: E731
    walk = lambda x: jnp.where(x >= size, permute(x), x)  # noqa: E731
    return jax.lax.while_loop(outside, walk, permute(positions.astype(jnp.uint32))).astype(jnp.int32)


def _mix(x: Array, key: Array) -> Array:
    """A 32-bit finaliser (the constants of MurmurHash3, in the public domain) of x and a key."""
    x = (x ^ key) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
