"""Random numbers from one row of uniform numbers; long rows of normal ones. For environments, agents and pretrain/.

Every call of a generator costs compile time and, in a rollout of a single user, run time of its own. So whoever needs
randomness in a turn says how many uniform numbers, and a rollout draws all of an episode's in one call.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erfinv

from gemsjax.types import Array, Key


def normal(uniforms: Array) -> Array:
    """Standard normal numbers from uniform ones in [0, 1), of the same shape, as `jax.random.normal` makes them."""
    centred = jnp.maximum(2.0 * uniforms - 1.0, jnp.nextafter(jnp.float32(-1.0), jnp.float32(0.0)))
    return jnp.sqrt(jnp.float32(2.0)) * erfinv(centred)


def whole_number(uniforms: Array, below: int | Array) -> Array:
    """Numbers 0 .. below-1 from uniform ones in [0, 1): int32 of the same shape.

    A uniform number has 23 bits: ample for catalogues, topics and replay buffers.
    """
    return jnp.minimum((uniforms * below).astype(jnp.int32), below - 1)


def normal_row(key: Key, size: int, start: Array | int = 0, size_of_part: int | None = None) -> Array:
    """`jax.random.normal(key, (size,), float32)`, or a part of it, the same bits: [size_of_part] from `start` on.

    On a CPU in half to four fifths of the time: JAX's generator takes all numbers through memory once every four
    rounds there, here a number is made in one go, and only if it is asked for. `start` is at least 0 and at most
    `size - size_of_part`; `size` is below 2^32.
    """
    part = size if size_of_part is None else size_of_part
    if not 0 <= part <= size:
        raise ValueError(f"a part of {part} numbers of a row of {size}")
    if not in_registers(key):
        return jax.lax.dynamic_slice_in_dim(jax.random.normal(key, (size,), jnp.float32), start, part)
    counters = jnp.asarray(start, jnp.uint32) + jax.lax.iota(jnp.uint32, part)
    words = _threefry(jax.random.key_data(key), (jnp.zeros_like(counters), counters))
    mantissas = (words[0] ^ words[1]) >> np.uint32(9) | np.uint32(0x3F800000)
    uniforms = jax.lax.bitcast_convert_type(mantissas, jnp.float32) - 1.0  # in [0, 1)
    least = jnp.nextafter(jnp.float32(-1.0), jnp.float32(0.0))
    return jnp.sqrt(jnp.float32(2.0)) * erfinv(jnp.maximum(least, uniforms * (1.0 - least) + least))


def in_registers(key: Key) -> bool:
    """Whether `normal_row` has a generator of its own for this key: for threefry, as JAX numbers it, on a CPU."""
    numbered = getattr(jax.config, _NUMBERED)
    return jax.default_backend() == "cpu" and numbered and str(jax.random.key_impl(key)) == "threefry2x32"


_NUMBERED = "jax_threefry_partitionable"
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def _threefry(key: Array, counters: tuple[Array, Array]) -> tuple[Array, Array]:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011): a key of two words, and counters of two words each."""
    keys = (key[0], key[1], key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
    first, second = counters[0] + keys[0], counters[1] + keys[1]
    for group in range(5):
        for bits in _ROTATIONS[group % 2]:
            first = first + second
            second = first ^ (second << np.uint32(bits) | second >> np.uint32(32 - bits))
        first = first + keys[(group + 1) % 3]
        second = second + keys[(group + 2) % 3] + np.uint32(group + 1)
    return first, second
