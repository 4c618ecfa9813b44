"""Adam on tables of rows of which a batch touches few: the steps of all other rows are made up for when they matter.

A row without a gradient still moves in Adam: its moments decay and its momentum carries it on. What it missed in k
steps has a closed form, so a row is brought up to date when it is next read, and a batch costs the same whatever the
table's size. Up to rounding (and up to how Adam's epsilon of 1e-8 weighs in the steps made up for) the numbers are
those of `maths/optimise.py`. Used by pretrain/.

Equations: let m, v be a row's moments after step s. Steps s+1 .. s+k without a gradient move it by
rate * m / sqrt(v) * sum_j r^j c(s+j), where r = b1 / sqrt(b2) and c(t) = sqrt(1 - b2^t) / (1 - b1^t); and that sum is
B(s) - r^k B(s+k) with B(s) = sum over all j >= 1 of r^j c(s+j), which is tabulated.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
import numpy as np

from gemsjax.types import Array

FIRST_DECAY, SECOND_DECAY, EPSILON = 0.9, 0.999, 1e-8
"""Adam's constants as in `maths/optimise.py`."""
_RATIO = FIRST_DECAY / math.sqrt(SECOND_DECAY)
_TABULATED = 20_000
"""Steps after which the bias corrections are 1 in float32."""
_LANES = 16
"""Rows fill whole cache lines of 64 bytes."""


def lazy_init(values: Array) -> Array:
    """A table for values [N, D]: [N, W], a row's value, its two moments, its latest step and a place, side by side.

    One gather and one scatter then move all that belongs to a row.
    """
    rows, dim = values.shape
    width = -(-(3 * dim + 2) // _LANES) * _LANES
    return jnp.zeros((rows, width), jnp.float32).at[:, :dim].set(values)


def lazy_read(table: Array, ids: Array, dim: int, done: Array, rate: Array | float) -> tuple[Array, Array]:
    """Rows `ids` [n] as they are after `done` steps: [n, W], values first; and the table, marked for `lazy_step`.

    Marks are written before anything is read, so that write, read and write form a chain: XLA would otherwise copy the
    table in every batch to keep what is read apart from what is written.
    """
    marks = jnp.arange(ids.size, dtype=jnp.float32)
    table = table.at[ids, 3 * dim + 1].set(marks)
    return table, _caught_up(table[ids], dim, done, rate)


def lazy_values(table: Array, dim: int, done: Array, rate: Array | float) -> Array:
    """All values after `done` steps: [N, dim]."""
    return _caught_up(table, dim, done, rate)[:, :dim]


def lazy_step(table: Array, ids: Array, rows: Array, gradients: Array, done: Array, rate: Array | float) -> Array:
    """Step number `done + 1` of rows `ids`; a row that is there several times takes one step on its summed gradient.

    Args:
      table, rows: [N, W] and [n, W], what `lazy_read` gave for `ids` and `done`.
      ids: [n].
      gradients: [n, D], of the loss with respect to each of the n values read.
      done, rate: as for `lazy_read`.

    Returns:
      The table after the step.
    """
    count, dim = gradients.shape
    # The mark that stayed says where the gradients of a row are summed: neither a sort nor n x n comparisons.
    chosen = rows[:, 3 * dim + 1].astype(jnp.int32)
    total = jnp.zeros_like(gradients).at[chosen].add(gradients)[chosen]
    value, first, second = rows[:, :dim], rows[:, dim : 2 * dim], rows[:, 2 * dim : 3 * dim]
    now = (done + 1).astype(jnp.float32)
    first = FIRST_DECAY * first + (1 - FIRST_DECAY) * total
    second = SECOND_DECAY * second + (1 - SECOND_DECAY) * total * total
    scale = jnp.sqrt(_rest(now, SECOND_DECAY)) / _rest(now, FIRST_DECAY)
    value = value - rate * scale * first / (jnp.sqrt(second) + EPSILON * jnp.sqrt(_rest(now, SECOND_DECAY)))
    tail = jnp.zeros((count, table.shape[1] - 3 * dim), jnp.float32).at[:, 0].set(now)
    return table.at[ids].set(jnp.concatenate([value, first, second, tail], axis=1))  # equal ids write equal rows


def _caught_up(rows: Array, dim: int, done: Array, rate: Array | float) -> Array:
    value, first, second = rows[:, :dim], rows[:, dim : 2 * dim], rows[:, 2 * dim : 3 * dim]
    latest = rows[:, 3 * dim : 3 * dim + 1]
    now = done.astype(jnp.float32)
    missed, tails = now - latest, jnp.asarray(_tails())
    at = lambda step: tails[jnp.minimum(step.astype(jnp.int32), _TABULATED)]  # noqa: E731
    travel = at(latest) - jnp.exp(missed * math.log(_RATIO)) * at(now)
    epsilon = EPSILON * jnp.sqrt(_rest(latest + 1.0, SECOND_DECAY))
    value = value - rate * travel * first / (jnp.sqrt(second) + epsilon)
    first = jnp.exp(missed * math.log(FIRST_DECAY)) * first
    second = jnp.exp(missed * math.log(SECOND_DECAY)) * second
    return jnp.concatenate([value, first, second, rows[:, 3 * dim :]], axis=1)


def _rest(step: Array, decay: float) -> Array:
    """1 - decay^step without cancellation."""
    return -jnp.expm1(step * math.log(decay))


@functools.cache
def _tails() -> np.ndarray:
    """B(s) for s = 0 .. _TABULATED; beyond, the bias corrections are 1 and it stays what it is."""
    steps = np.arange(1, _TABULATED + 1)
    corrections = np.sqrt(1 - SECOND_DECAY**steps) / (1 - FIRST_DECAY**steps)
    tails = np.empty(_TABULATED + 1)
    tails[-1] = _RATIO / (1 - _RATIO)
    for step in range(_TABULATED - 1, -1, -1):  # B(s) = r (c(s+1) + B(s+1))
        tails[step] = _RATIO * (corrections[step] + tails[step + 1])
    return tails.astype(np.float32)
