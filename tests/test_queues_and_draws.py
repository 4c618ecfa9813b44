"""Properties of the simulator's click queues and of drawing without repeats, against plain Python."""

from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemsjax.envs.queues import append, drop
from gemsjax.maths.randomness import normal_row
from gemsjax.maths.slates import draw_distinct

MEMORY = 10
append, drop = jax.jit(append), jax.jit(drop)
draw = {size: jax.jit(lambda key, population, size=size: draw_distinct(key, population, size)) for size in (1, 4, 10)}

turns = st.lists(
    st.tuples(
        st.lists(st.integers(0, 9), min_size=10, max_size=10),
        st.lists(st.booleans(), min_size=10, max_size=10),
        st.integers(0, MEMORY),
    ),
    max_size=6,
)


@given(turns)
@settings(max_examples=60, deadline=None)
def test_queues_are_deques_of_limited_length(turns):
    queue, length, model = jnp.full(MEMORY, -1, jnp.int32), jnp.int32(0), deque(maxlen=MEMORY)
    for values, chosen, dropped in turns:
        queue, length = append(queue, length, jnp.array(values, jnp.int32), jnp.array(chosen))
        model.extend(value for value, choice in zip(values, chosen, strict=True) if choice)
        assert length == len(model)
        assert queue.tolist() == [*model, *[-1] * (MEMORY - len(model))]
        dropped = min(dropped, len(model))
        queue, length = drop(queue, dropped), length - dropped
        for _ in range(dropped):
            model.popleft()
        assert queue.tolist() == [*model, *[-1] * (MEMORY - len(model))]


@given(st.integers(0, 2**31), st.sampled_from(sorted(draw)), st.integers(0, 100_000))
@settings(max_examples=60, deadline=None)
def test_draws_are_in_range_and_do_not_repeat(seed, size, extra):
    drawn = draw[size](jax.random.key(seed), size + extra).tolist()
    assert len(set(drawn)) == size and min(drawn) >= 0 and max(drawn) < size + extra


def test_drawing_everything_is_a_permutation():
    assert sorted(draw[10](jax.random.key(0), 10).tolist()) == list(range(10))


# Thresholds: chi-square exceeded once in ten thousand, at 6, 209 and 23 degrees of freedom.
@pytest.mark.parametrize(("population", "size", "bound"), [(7, 1, 27.9), (7, 3, 292.3), (4, 4, 54.8)])
def test_every_ordered_draw_is_equally_likely(population, size, bound):
    draws = 42_000
    drawn = jax.vmap(lambda key: draw_distinct(key, population, size))(jax.random.split(jax.random.key(5), draws))
    _, counts = np.unique(np.asarray(drawn) @ population ** np.arange(size), return_counts=True)
    kinds = np.prod(np.arange(population, population - size, -1))
    expected = draws / kinds
    assert len(counts) == kinds
    assert ((counts - expected) ** 2 / expected).sum() < bound


def the_numbers_of_jax(kind, size):
    key, start = jax.random.key(5, impl=kind), size // 3
    whole = jax.random.normal(key, (size,))
    np.testing.assert_array_equal(jax.jit(lambda key: normal_row(key, size))(key), whole)
    part = jax.jit(lambda key, start: normal_row(key, size, start, size - size // 3))(key, start)
    np.testing.assert_array_equal(part, whole[start:])


@pytest.mark.parametrize("size", [1, 7, 5000])
@pytest.mark.parametrize("kind", ["threefry2x32", "rbg"])
def test_normal_numbers_are_those_of_jax_bit_for_bit(kind, size):
    the_numbers_of_jax(kind, size)


@pytest.mark.optimised
def test_normal_numbers_are_those_of_jax_as_users_compile_them():
    the_numbers_of_jax("threefry2x32", 5000)


def test_normal_numbers_of_another_numbering():
    with jax.threefry_partitionable(False):
        the_numbers_of_jax("threefry2x32", 50)


def test_normal_numbers_of_several_keys_at_once():
    keys, starts = jax.random.split(jax.random.key(6), 3), jnp.arange(3)
    drawn = jax.vmap(lambda key, start: normal_row(key, 40, start, 30))(keys, starts)
    whole = jax.vmap(lambda key: jax.random.normal(key, (40,)))(keys)
    np.testing.assert_array_equal(drawn, [row[start : start + 30] for start, row in enumerate(whole)])
    with pytest.raises(ValueError, match="41 numbers of a row of 40"):
        normal_row(keys[0], 40, 0, 41)
