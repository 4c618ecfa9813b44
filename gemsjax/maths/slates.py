"""Choosing slates out of a catalogue. Pure, unbatched; the caller vmaps.

May be used by environments, rankers and agents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, reduce

import jax
import jax.numpy as jnp

from gemsjax.maths.randomness import whole_number
from gemsjax.types import Array, Key


def top_items(scores: Array, size: int) -> Array:
    """The `size` highest-scoring items, best first, ties to the lowest number: [I] -> [size] int32.

    Exactly `jax.lax.top_k`, but four times faster on a CPU when it is vmapped over users. Not differentiable.
    """
    return _top_items(size)(jax.lax.stop_gradient(scores))


FEW = 32
"""Below so many users `top_k` is the faster one."""
_LOWEST = jnp.iinfo(jnp.int32).min


@cache
def _top_items(size: int) -> Callable[[Array], Array]:
    """`top_k` that, once vmapped, takes another way on CPUs, where it visits users one by one without vector units."""

    def one_by_one(scores: Array) -> Array:
        return jax.lax.top_k(scores, size)[1].astype(jnp.int32)

    top = jax.custom_batching.custom_vmap(one_by_one)

    @top.def_vmap
    def batch(users: int, _batched: list[bool], scores: Array) -> tuple[Array, bool]:
        plain = jax.vmap(one_by_one)
        if users < FEW or scores.dtype != jnp.float32:
            return plain(scores), True
        return jax.lax.platform_dependent(scores, cpu=lambda s: _top_columns(size)(s.T).T, default=plain), True

    return top


@cache
def _top_columns(size: int) -> Callable[[Array], Array]:
    """`top_items` of every column, [I, U] -> [size, U]; further vmaps only add columns."""
    top = jax.custom_batching.custom_vmap(lambda scores: _two_stages(scores, size))

    @top.def_vmap
    def more_columns(runs: int, _batched: list[bool], scores: Array) -> tuple[Array, bool]:
        items, users = scores.shape[1:]
        found = _top_columns(size)(jnp.swapaxes(scores, 0, 1).reshape(items, runs * users))
        return jnp.swapaxes(found.reshape(size, runs, users), 0, 1), True

    return top


def _two_stages(scores: Array, size: int) -> Array:
    """The best items lie in the blocks with the best maxima: find these blocks, then search only them."""
    items, users = scores.shape
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    keys = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the total order of the floats, as in top_k
    width = max(1, round(math.sqrt(items / size)))  # both stages then search about as many numbers
    blocks = -(-items // width)
    keys = jnp.pad(keys, ((0, blocks * width - items), (0, 0)), constant_values=_LOWEST)
    best = jnp.sort(_largest(keys.reshape(blocks, width, users).max(axis=1), size), axis=0)
    inside = best[:, None] * width + jnp.arange(width, dtype=jnp.int32)[:, None]
    candidates = inside.reshape(size * width, users)  # ascending, so that ties still go to the lowest number
    found = _largest(jnp.take_along_axis(keys, candidates, axis=0), size)
    return jnp.take_along_axis(candidates, found, axis=0)


def _largest(keys: Array, size: int) -> Array:
    """Rows of the `size` largest of every column, one pass each, ties to the first row: [n, U] -> [size, U]."""
    rows = jnp.arange(keys.shape[0], dtype=jnp.int32)[:, None]

    def take(keys: Array, _: None) -> tuple[Array, Array]:
        row = jnp.where(keys == keys.max(axis=0), rows, keys.shape[0]).min(axis=0)
        return jnp.where(rows == row, _LOWEST, keys), row

    return jax.lax.scan(take, keys, None, length=size)[1]


def best_item(scores: Array) -> Array:
    """Number of the highest score, the lowest on ties: [..., I] -> [...] int32 (I if a score is NaN).

    Equal to `argmax`, whose reduction over (value, index) pairs compilers for CPUs do not vectorise: this is ten times
    faster there, and that was three quarters of a rollout under a GeMS policy.
    """
    size = scores.shape[-1]
    best = _folded(jnp.maximum, jnp.max, scores)
    numbers = jnp.arange(size, dtype=jnp.int32)
    return _folded(jnp.minimum, jnp.min, jnp.where(scores == best[..., None], numbers, size))


def _folded(extreme: Callable[[Array, Array], Array], reduction: Callable[..., Array], values: Array) -> Array:
    """The largest or smallest of the last axis, by a `reduction` or by its `extreme` of two.

    On a CPU quarters are laid upon each other, where XLA's reduction takes twice the time. They may overlap, since a
    number counts no more if it is there twice.
    """
    if jax.default_backend() != "cpu":
        return reduction(values, axis=-1)
    while (size := values.shape[-1]) > 1:
        quarter = -(-size // 4)
        starts = [min(start, size - quarter) for start in range(0, size, quarter)]
        values = reduce(extreme, [values[..., start : start + quarter] for start in starts])
    return values[..., 0]


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
    partner = position + whole_number(uniforms, left)
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
