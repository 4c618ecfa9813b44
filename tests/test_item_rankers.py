"""Rankers over item embeddings: boxes, top items, heads, neighbours; against plain numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemsjax.errors import DataError, SettingError
from gemsjax.rankers.items import item_weights, make_khead_ranker, make_topk_ranker, nearest_items
from gemsjax.types import Dims

DIMS, WIDTH = Dims(200, 4, 6), 5


@pytest.fixture(scope="module")
def items():
    return item_weights(jax.random.normal(jax.random.key(0), (DIMS.num_items, WIDTH)))


def test_the_box_holds_every_item_and_is_as_small_as_can_be(items):
    low, high = items.centre - items.scale, items.centre + items.scale
    embeddings = np.asarray(items.embeddings)
    np.testing.assert_allclose(low, embeddings.min(axis=0), atol=1e-6)
    np.testing.assert_allclose(high, embeddings.max(axis=0), atol=1e-6)


def test_topk_is_the_order_of_dot_products(items):
    ranker = make_topk_ranker(DIMS, WIDTH)
    actions = jax.random.normal(jax.random.key(1), (50, WIDTH))
    slates = jax.vmap(lambda action: ranker.decode(items, action))(actions)
    expected = np.argsort(-(np.asarray(actions) @ np.asarray(items.embeddings).T), axis=1, kind="stable")[:, :4]
    np.testing.assert_array_equal(slates, expected)
    assert ranker.action_dim == WIDTH
    assert [part.shape for part in ranker.box(items)] == [(WIDTH,)] * 2


@pytest.mark.parametrize("users", [1, 40])
def test_ties_go_to_the_lowest_number(users):
    ranker = make_topk_ranker(DIMS, 1)
    equal = item_weights(jnp.ones((DIMS.num_items, 1)).at[7].set(2.0))
    slates = jax.vmap(lambda action: ranker.decode(equal, action))(jnp.ones((users, 1)))
    np.testing.assert_array_equal(slates, np.tile([7, 0, 1, 2], (users, 1)))


def test_khead_is_the_best_item_of_each_slot(items):
    ranker = make_khead_ranker(DIMS, WIDTH)
    action = jax.random.normal(jax.random.key(2), (ranker.action_dim,))
    expected = [int(np.argmax(np.asarray(items.embeddings) @ np.asarray(query))) for query in action.reshape(4, WIDTH)]
    assert ranker.decode(items, action).tolist() == expected
    repeated = jnp.tile(items.embeddings[0] * 3, 4)
    assert len(set(ranker.decode(items, repeated).tolist())) == 1
    for part, one in zip(ranker.box(items), (items.centre, items.scale), strict=True):
        np.testing.assert_array_equal(part.reshape(4, WIDTH), np.tile(one, (4, 1)))


@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("number", [3, 60, 300])  # each is searched in a way of its own
def test_nearest_items_are_the_order_of_distances(items, count, number):
    queries = jax.random.normal(jax.random.key(3), (number, WIDTH))
    distances = np.linalg.norm(np.asarray(queries)[:, None] - np.asarray(items.embeddings), axis=-1)
    near = nearest_items(items.embeddings, queries, count)
    np.testing.assert_array_equal(near, np.argsort(distances, axis=1)[:, :count])
    # An item's own embedding names it, whatever lengths the others have.
    np.testing.assert_array_equal(nearest_items(items.embeddings, items.embeddings, 1)[:, 0], np.arange(200))


def test_what_is_refused():
    with pytest.raises(DataError):
        item_weights(jnp.zeros(5))
    with pytest.raises(SettingError):
        make_topk_ranker(Dims(3, 4, 6), WIDTH)
    for make in (make_topk_ranker, make_khead_ranker):
        with pytest.raises(SettingError):
            make(DIMS, 0)
