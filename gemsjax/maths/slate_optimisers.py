"""The best slate of k items where a user clicks at most one of them: top k, greedy, exact. Pure, one user; vmap it.

A slate A is worth f(A) = sum over A of v_i q_i / (v_0 + sum over A of v_i): item i is clicked with a chance that is
proportional to its appeal v_i, beside the appeal v_0 of no click, and is then worth q_i (SlateQ, Ie et al. 2019).
An infinite v_0 stands for clicks that do not compete: f is then the sum of v_i q_i, and all three rules give the same
slate. May be used by environments and agents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemsjax.maths.slates import best_item, top_items
from gemsjax.types import Array

MAX_ROUNDS = 20
"""Rounds of `exact`; more than three have never been needed."""


class Candidates(NamedTuple):
    """What one user's slate may be made of.

    Attributes:
      appeal: [I] v, at least 0.
      no_click: [] v_0, at least 0; infinite where clicks do not compete.
      available: [I] bool, or None if all items are. Others enter a slate only when there are too few. An item whose
        appeal or value is no number counts as not available in all of this module.
    """

    appeal: Array
    no_click: Array
    available: Array | None = None

    def weights(self) -> Array:
        """[I] the appeal, 0 for what is not available."""
        return self.appeal if self.available is None else jnp.where(self.available, self.appeal, 0.0)


Optimiser = Callable[[Candidates, Array, int], Array]
"""`(candidates, q [I], size) -> slate [size] int32` of distinct items, the best first."""


def slate_value(candidates: Candidates, q: Array, slate: Array) -> Array:
    """f of a slate: [K] item numbers -> []; numbers outside 0 .. I-1 and items that are not available add nothing."""
    candidates, q = _known(candidates, q)
    inside = (slate >= 0) & (slate < q.shape[0])
    place = jnp.where(inside, slate, 0)
    weight = jnp.where(inside, candidates.weights()[place], 0.0)
    alone, shared = _denominator(candidates.no_click)
    return _ratio((weight * q[place]).sum(), alone + shared * weight.sum())


def top_k(candidates: Candidates, q: Array, size: int) -> Array:
    """The items of largest v q, ties to the lowest number: best where clicks do not compete, else an approximation."""
    candidates, q = _known(candidates, q)
    return _largest(candidates, candidates.weights() * q, size)


def greedy(candidates: Candidates, q: Array, size: int) -> Array:
    """`size` times the item that makes the largest f with those already taken, ties to the lowest number."""
    candidates, q = _known(candidates, q)
    weight = candidates.weights()
    gain, items = weight * q, jnp.arange(q.shape[0], dtype=jnp.int32)
    alone, shared = _denominator(candidates.no_click)
    # What an item's key may be at most: anything, below every other (not available), below even those (taken).
    unavailable = jnp.finfo(q.dtype).min
    limit = jnp.full(q.shape, jnp.inf, q.dtype)
    if candidates.available is not None:
        limit = jnp.where(candidates.available, limit, unavailable)

    def take(carry: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], Array]:
        above, below, limit = carry
        item = best_item(jnp.minimum(_ratio(above + gain, below + shared * weight), limit))
        limit = jnp.where(items == item, -jnp.inf, limit)
        return (above + gain[item], below + shared * weight[item], limit), item

    start = (jnp.zeros((), q.dtype), alone.astype(q.dtype), limit)
    return jax.lax.scan(take, start, None, length=size)[1]


def exact(candidates: Candidates, q: Array, size: int) -> Array:
    """The slate of largest f, by Dinkelbach's method: lambda = f(A), then A = the items of largest v (q - lambda)."""
    candidates, q = _known(candidates, q)
    weight = candidates.weights()
    _, shared = _denominator(candidates.no_click)

    def better(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        slate, value, _, rounds = carry
        found = _largest(candidates, weight * (q - shared * value), size)
        found_value = slate_value(candidates, q, found)
        gained = found_value > value
        return jnp.where(gained, found, slate), jnp.maximum(found_value, value), gained, rounds + 1

    first = top_k(candidates, q, size)
    start = (first, slate_value(candidates, q, first), shared > 0.0, jnp.int32(0))
    return jax.lax.while_loop(lambda carry: carry[2] & (carry[3] < MAX_ROUNDS), better, start)[0]


OPTIMISERS: dict[str, Optimiser] = {"topk": top_k, "greedy": greedy, "exact": exact}


def _known(candidates: Candidates, q: Array) -> tuple[Candidates, Array]:
    """Candidates and values with zeros for what is not available; what is no number is not.

    A weight of 0 does not hide it: 0 times NaN is NaN, and one such sum would decide about all other items.
    """
    known = jnp.isfinite(candidates.appeal) & jnp.isfinite(q) & jnp.isfinite(candidates.appeal * q)
    if candidates.available is not None:
        known &= candidates.available
    appeal, q = (jnp.where(known, x, 0.0) for x in (candidates.appeal, q))
    return Candidates(appeal, candidates.no_click, known), q


def _largest(candidates: Candidates, keys: Array, size: int) -> Array:
    if candidates.available is not None:
        keys = jnp.where(candidates.available, keys, -jnp.inf)
    return top_items(keys, size)


def _denominator(no_click: Array) -> tuple[Array, Array]:
    """f's denominator as `alone + shared * (sum of v)`: v_0 and 1, or 1 and 0 where v_0 is infinite."""
    apart = jnp.isinf(no_click)
    return jnp.where(apart, 1.0, no_click), jnp.where(apart, 0.0, 1.0)


def _ratio(above: Array, below: Array) -> Array:
    """above / below; items without any appeal and without v_0 are worth nothing."""
    return jnp.where(below > 0.0, above / jnp.where(below > 0.0, below, 1.0), 0.0)
