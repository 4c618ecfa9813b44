"""Random numbers from one row of uniform numbers. Used by environments and agents.

Every call of a generator costs compile time and, in a rollout of a single user, run time of its own. So whoever needs
randomness in a turn says how many uniform numbers, and a rollout draws all of an episode's in one call.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.scipy.special import erfinv

from gemsjax.types import Array


def normal(uniforms: Array) -> Array:
    """Standard normal numbers from uniform ones in [0, 1), of the same shape, as `jax.random.normal` makes them."""
    centred = jnp.maximum(2.0 * uniforms - 1.0, jnp.nextafter(jnp.float32(-1.0), jnp.float32(0.0)))
    return jnp.sqrt(jnp.float32(2.0)) * erfinv(centred)


def whole_number(uniforms: Array, below: int | Array) -> Array:
    """Numbers 0 .. below-1 from uniform ones in [0, 1): int32 of the same shape.

    A uniform number has 23 bits: ample for catalogues, topics and replay buffers.
    """
    return jnp.minimum((uniforms * below).astype(jnp.int32), below - 1)
