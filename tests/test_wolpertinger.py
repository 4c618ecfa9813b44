"""SAC+WkNN: the best policy is found where it is known; slates against a plain search; the published settings."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pair_probes import PairEnv, check, train_all
from probes import HORIZON, ITEMS

from gemsjax.agents import sac, wolpertinger
from gemsjax.agents.base import Acting
from gemsjax.errors import SettingError
from gemsjax.rankers.items import item_weights, make_khead_ranker
from gemsjax.types import Dims, Episode, Observation

SMALL = {"hidden": 32, "belief_width": 8, "item_dim": 4}
DIMS, WIDTH, COUNT = Dims(30, 3, 4), 2, 5


@pytest.mark.slow
def test_wknn_probes():
    dims = Dims(ITEMS, 2, HORIZON)
    agent = wolpertinger.make_wknn(
        wolpertinger.WkNNSpec(**SMALL, neighbours=2), dims, make_khead_ranker(dims, item_dim=1)
    )
    hypers = sac.SACHypers(tau=0.02, critic_rate=3e-3, actor_rate=3e-3, initial_alpha=0.05, first_alpha=0.05)
    check(train_all(PairEnv(), agent, hypers, item_weights(jnp.linspace(-1.0, 1.0, ITEMS)[:, None])))


@pytest.fixture(scope="module")
def items():
    return item_weights(jax.random.normal(jax.random.key(5), (DIMS.num_items, WIDTH)))


def made(**settings):
    spec = wolpertinger.WkNNSpec(hidden=16, belief_width=6, item_dim=3, neighbours=COUNT, **settings)
    return spec, wolpertinger.make_wknn(spec, DIMS, make_khead_ranker(DIMS, WIDTH))


@pytest.fixture(scope="module")
def state():
    """Targets unlike each other and unlike the critics."""
    agent = made()[1]
    first, second = (jax.jit(agent.init)(jax.random.key(seed), sac.SACHypers()) for seed in (0, 1))
    return dataclasses.replace(first, targets=second.targets)


def plain_slate(critics, embeddings, belief, queries):
    """The definition in plain loops: nearest items, then slot by slot the best slate of copies."""
    slate = []
    for slot, query in enumerate(queries):
        near = np.argsort(((embeddings - query) ** 2).sum(axis=1), kind="stable")[:COUNT]
        values = []
        for item in near:
            full = [*slate, *[item] * (DIMS.slate_size - slot)]
            inputs = np.concatenate([belief, *embeddings[full]])
            values.append(
                min(
                    float(
                        np.maximum(inputs @ c["kernel"] + c["bias"], 0) @ c["out"]["kernel"][:, 0] + c["out"]["bias"][0]
                    )
                    for c in critics
                )
            )
        slate.append(near[int(np.argmax(values))])
    return slate


@pytest.mark.parametrize("judges", [1, 2])
def test_slates_are_those_of_a_plain_search(items, state, judges):
    critics = state.targets[:judges]
    beliefs = jax.random.normal(jax.random.key(1), (3, 4, 6))
    queries = jax.random.normal(jax.random.key(2), (3, 4, DIMS.slate_size, WIDTH))
    slates = jax.jit(wolpertinger.slates_of, static_argnums=4)
    together = np.asarray(slates(critics, items.embeddings, beliefs, queries, COUNT))
    alone = jax.vmap(jax.vmap(lambda b, q: wolpertinger.slate_of(critics, items.embeddings, b, q, COUNT)))
    np.testing.assert_array_equal(together, jax.jit(alone)(beliefs, queries))
    plain = jax.tree.map(np.asarray, (critics, items.embeddings))
    for index in np.ndindex(3, 4):
        expected = plain_slate(*plain, np.asarray(beliefs[index]), np.asarray(queries[index]))
        assert together[index].tolist() == expected


def test_layouts_of_the_query(items, state):
    """[slot, dim] finds the items that the action names; [dim, slot] does so for the transposed action only."""
    named = jnp.array([3, 17, 8])
    action = items.embeddings[named].reshape(-1)
    centre, scale = make_khead_ranker(DIMS, WIDTH).box(items)
    np.testing.assert_allclose(centre.reshape(3, WIDTH), jnp.tile(items.centre, (3, 1)))
    for layout, good in (("slot", action), ("dim", items.embeddings[named].T.reshape(-1))):
        spec = wolpertinger.WkNNSpec(hidden=16, belief_width=6, item_dim=3, neighbours=1, query_layout=layout)
        means = wolpertinger._means(spec, DIMS, make_khead_ranker(DIMS, WIDTH))
        beliefs = (jnp.zeros(6), jnp.zeros(6))
        shown = means.choose(Acting(state, sac.SACHypers(), items), beliefs, good)
        assert shown.slate.tolist() == named.tolist() == shown.action.tolist()


def test_what_each_setting_looks_at(items, state):
    """The judge's belief in acting, and the slates that the critics learn from."""
    slates = jax.random.randint(jax.random.key(3), (4, 2, 3), 0, DIMS.num_items)
    seen = Observation(slates, slates % 2 == 0)
    batch = Episode(seen, (slates + 1) % DIMS.num_items, jnp.zeros((4, 2)), jax.tree.map(lambda x: x[-1], seen))
    acting = Acting(state, sac.SACHypers(), items)
    beliefs = tuple(jax.random.normal(jax.random.key(seed), (4, 2, 6)) for seed in (7, 8))
    actions = jax.random.normal(jax.random.key(9), (4, 2, 6))
    queries = actions.reshape(4, 2, 3, WIDTH)
    for judge, critics, looked in (("critic", state.targets, beliefs[1]), ("actor", state.targets[:1], beliefs[0])):
        spec, _ = made(judge=judge)
        means = wolpertinger._means(spec, DIMS, make_khead_ranker(DIMS, WIDTH))
        expected = wolpertinger.slates_of(critics, items.embeddings, looked, queries, COUNT)
        np.testing.assert_array_equal(means.judged(acting, beliefs, actions), wolpertinger.embedded(items, expected))
        assert len(means.beliefs) == (2 if judge == "critic" else 1)
    for credit, taken in (("corrected", batch.action), ("published", slates)):
        spec, _ = made(credit=credit)
        means = wolpertinger._means(spec, DIMS, make_khead_ranker(DIMS, WIDTH))
        np.testing.assert_array_equal(means.taken(items, batch), wolpertinger.embedded(items, taken))


@pytest.mark.parametrize("layout", wolpertinger.LAYOUTS)
def test_episodes_of_one_turn_have_no_next_slates(items, layout):
    dims = DIMS._replace(horizon=1)
    spec, _ = made(query_layout=layout)
    agent = wolpertinger.make_wknn(spec, dims, make_khead_ranker(dims, WIDTH))
    hypers = sac.SACHypers()
    acting = Acting(agent.init(jax.random.key(0), hypers), hypers, items)
    seen = Observation(jnp.zeros((4, 1, 3), jnp.int32), jnp.zeros((4, 1, 3), bool))
    batch = Episode(seen, seen.slate, jnp.ones((4, 1)), jax.tree.map(lambda x: x[:, 0], seen))
    state, metrics = jax.jit(agent.update)(acting, batch, agent.draw_update(jax.random.key(1), 4))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((state, metrics)))


def test_the_published_variant_is_another_setting_of_the_same_names():
    changed = wolpertinger.PUBLISHED["spec"]
    published = wolpertinger.WkNNSpec(**changed)
    wolpertinger.validate_spec(published)
    assert all(getattr(wolpertinger.WkNNSpec(), name) != value for name, value in changed.items())
    assert sac.SACHypers(**wolpertinger.PUBLISHED["hypers"]).initial_alpha == 1.0
    assert (sac.SACHypers().initial_alpha, sac.SACHypers().first_alpha) == (0.2, 0.0)  # 0: as the initial one


@pytest.mark.parametrize(
    ("name", "value"), [("neighbours", 0), ("query_layout", "item"), ("judge", "both"), ("credit", "x"), ("hidden", 0)]
)
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(SettingError) as raised:
        wolpertinger.validate_spec(wolpertinger.WkNNSpec(**{name: value}))
    assert raised.value.setting == name


def test_more_neighbours_than_items_are_refused():
    with pytest.raises(SettingError) as raised:
        wolpertinger.make_wknn(wolpertinger.WkNNSpec(neighbours=31), DIMS, make_khead_ranker(DIMS, WIDTH))
    assert raised.value.setting == "neighbours"
