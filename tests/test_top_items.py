"""`top_items` is `top_k` in every number, however it is vmapped, and `best_item` is `argmax`; only the way differs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemsjax.maths.slates import best_item, top_items


def reference(scores: np.ndarray, size: int) -> np.ndarray:
    """A stable descending sort: ties to the lowest number."""
    return np.argsort(-scores, axis=-1, kind="stable")[..., :size]


@pytest.mark.parametrize(("items", "size"), [(1000, 10), (60, 10), (23, 10), (10, 10), (11, 1), (997, 3)])
@pytest.mark.parametrize("users", [1, 31, 32, 100])
def test_equals_a_stable_sort_with_ties_and_infinities(items, size, users):
    rng = np.random.default_rng(items + users)
    scores = np.round(rng.normal(size=(users, items)), 1).astype(np.float32)
    scores[rng.random(scores.shape) < 0.2] = -np.inf
    scores[0] = -np.inf
    found = jax.jit(jax.vmap(lambda s: top_items(s, size)))(scores + np.float32(0.0))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, reference(scores + np.float32(0.0), size))


def test_signed_zeros_and_nan_are_ordered_as_top_k_orders_them():
    scores = np.random.default_rng(0).choice(np.array([-1, -0.0, 0.0, np.nan], np.float32), size=(64, 40))
    found = jax.vmap(lambda s: top_items(s, 10))(jnp.asarray(scores))
    np.testing.assert_array_equal(found, jax.lax.top_k(scores, 10)[1])


def test_one_user_and_vmap_in_vmap_are_the_same_numbers():
    scores = jnp.asarray(np.random.default_rng(1).normal(size=(3, 40, 200)).astype(np.float32))
    nested = jax.vmap(jax.vmap(lambda s: top_items(s, 7)))(scores)
    np.testing.assert_array_equal(nested, reference(np.asarray(scores), 7))
    np.testing.assert_array_equal(top_items(scores[1, 2], 7), nested[1, 2])


def test_a_gradient_passes_by():
    def best_scores(weights):
        scores = weights[:, None] * jnp.arange(50.0)
        return jnp.take_along_axis(scores, jax.vmap(lambda s: top_items(s, 2))(scores), axis=1).sum()

    np.testing.assert_allclose(jax.grad(best_scores)(jnp.ones(40)), np.full(40, 97.0))


@pytest.mark.parametrize("items", [1, 2, 3, 5, 7, 16, 17, 1000, 1007])
def test_the_best_item_is_the_first_of_the_highest(items):
    scores = np.random.default_rng(items).integers(-3, 3, (4, 50, items)).astype(np.float32)  # with ties
    scores[0, 0], scores[0, 1, -1] = -np.inf, np.inf
    best = jax.jit(best_item)(scores)
    assert best.dtype == jnp.int32
    np.testing.assert_array_equal(best, scores.argmax(axis=-1))
    np.testing.assert_array_equal(jax.vmap(best_item)(jnp.asarray(scores)), best)
    assert int(best_item(jnp.asarray(scores[0, 0]).at[items // 2].set(jnp.nan))) == items
