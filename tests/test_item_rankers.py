"""Rankers over item embeddings: boxes, top items, heads, neighbours; against plain numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemsjax import prepare, runs
from gemsjax.errors import DataError, SettingError
from gemsjax.nets.gems import SlateVAE
from gemsjax.rankers.gems import GeMSWeights, make_gems_ranker
from gemsjax.rankers.items import item_weights, make_khead_ranker, make_topk_ranker, nearest_items
from gemsjax.settings import GeMSSettings, TrainSettings
from gemsjax.types import Dims, Observation

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


def test_gems_slots_are_drawn_from_the_decoders_softmax():
    """Only where it is asked for and a policy explores; frequencies of 20,000 slates within four standard errors."""
    vae, count = SlateVAE(6, 3, 4, 5, (8, 8)), 20_000
    blank = Observation(jnp.zeros(3, jnp.int32), jnp.zeros(3, bool))
    weights = GeMSWeights(vae.init(jax.random.key(0), blank)["params"], jnp.zeros(4), jnp.ones(4))
    action = 5.0 * jax.random.normal(jax.random.key(1), (4,))
    plain, drawing = make_gems_ranker(vae), make_gems_ranker(vae, drawn=True)
    assert (plain.draws, drawing.draws) == (0, 3)
    best = plain.decode(weights, action)
    np.testing.assert_array_equal(best, drawing.decode(weights, action))
    np.testing.assert_array_equal(best, plain.explored(weights, action, jnp.zeros(0)))
    uniforms = jax.random.uniform(jax.random.key(2), (count, 3))
    slates = jax.jit(jax.vmap(lambda luck: drawing.explored(weights, action, luck)))(uniforms)
    queries = vae.apply({"params": weights.params}, action, method=SlateVAE.decode)[0]
    expected = jax.nn.softmax(queries @ weights.params["item_embeddings"].T)
    found = np.stack([np.bincount(slot, minlength=6) for slot in np.asarray(slates).T]) / count
    assert (np.abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / count) + 1e-6).all()
    assert (np.asarray(expected).max(axis=1) < 0.9).all()  # there is something to draw


def test_drawing_slots_changes_the_run_but_not_what_is_pre_trained():
    usual, drawn = (TrainSettings(gems=GeMSSettings(drawn=one)).resolved() for one in (False, True))
    assert usual.gems.pretraining() == drawn.gems.pretraining()
    assert "drawn" not in usual.identity()["gems"] and drawn.identity()["gems"]["drawn"]
    world = prepare.world_of(usual)
    draws = [runs.make_agent(one, world).explore.draws for one in (usual, drawn)]
    assert draws[1] == draws[0] + world.dims.slate_size


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
