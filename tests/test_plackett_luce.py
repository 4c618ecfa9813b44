"""Plackett-Luce slates: recorded probabilities, edge cases under jit and vmap, the ranker of the slate simulator."""

from __future__ import annotations

import itertools
import json
from functools import partial
from pathlib import Path

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemsjax.agents import a2c, ddpg, ppo, reinforce, sac, td3
from gemsjax.agents.base import Acting
from gemsjax.errors import SettingError
from gemsjax.maths import plackett_luce as pl
from gemsjax.maths.distributions import PlackettLuce
from gemsjax.rankers.items import item_weights, make_topk_ranker
from gemsjax.rankers.plackett_luce import make_plackett_luce_ranker, plackett_luce_weights
from gemsjax.settings import PLSettings, TrainSettings
from gemsjax.types import Dims, Observation

CASES = json.loads((Path(__file__).parent / "golden" / "ranking_examples.json").read_text())["cases"]
GOLDEN = {case["id"]: case for case in CASES}
FEATURES = jnp.array(GOLDEN["cosine_penalty_matrix"]["features"])
SCORES = jnp.array(GOLDEN["first_slot_probs_T1.0"]["scores"])
PAIRS = [name for name in GOLDEN if name.startswith("ordered_pair_probs")]


DRAWS = 100_000


@jax.jit
def of_pairs(scores, features, temperature, mixture, pairs, key):
    """Log-probabilities of ordered pairs, and slates that are drawn with theirs. No mixture: no penalty."""
    given = PlackettLuce(scores, 2, temperature=temperature, features=features, mixture=mixture)
    slates, own = given.sample_and_log_prob(seed=key, sample_shape=(DRAWS,))
    return given.log_prob(pairs), slates, own


@jax.jit
def of_first_slot(scores, temperature):
    return PlackettLuce(scores, 1, temperature=temperature).prob(jnp.arange(5)[:, None])


# -- recorded numbers --------------------------------------------------------------------------------------------------


def test_the_penalty_is_that_of_the_reference():
    rows = jax.vmap(lambda item: pl.COSINE.penalty(pl.COSINE.start(FEATURES), item)[0])(jnp.arange(5))
    np.testing.assert_allclose(-rows, GOLDEN["cosine_penalty_matrix"]["expected"], atol=1e-6)


def cosine_hook(logits, slots, number, given):
    """The cosine penalty in its stateless form: from all the slots so far."""
    directions = pl.unit_rows(given.features)
    alike = jnp.where(jnp.arange(slots.size) < number, directions @ directions[slots].T, -1.0)
    return logits - given.mixture * (1.0 + alike.max(axis=1))


def test_a_hook_is_the_general_form_of_a_penalty():
    """Recorded logits, draws and probabilities are those of the penaliser, with items that are missing, under vmap."""
    hook = pl.LogitHook(cosine_hook)
    case = GOLDEN["penalized_logits_c1.0"]
    given = pl.Choices(jnp.array(case["logits"]), FEATURES, case["penalty_mixture_coefficient"])
    slate = jnp.array([0, 2])
    ours, theirs = (pl.logits_after(given, one, slate) for one in (hook, pl.COSINE))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)

    @partial(jax.jit, static_argnums=0)
    def draw(penaliser, available):
        scores = jnp.broadcast_to(SCORES, available.shape)
        of = PlackettLuce(scores, 4, available=available, features=FEATURES, mixture=0.7, penaliser=penaliser)
        slates = of.slates(jnp.linspace(0.0, 0.99, available.shape[0] * 4).reshape(-1, 4))
        return slates, of.log_prob(slates), of.mode(), of.valid

    available = jnp.array([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]], bool)
    for ours, theirs in zip(draw(hook, available), draw(pl.COSINE, available), strict=True):
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("told", [np.nan, -np.inf, np.inf])
def test_a_hook_cannot_take_items_away_or_bring_them_back(told):
    """Items 1 and 3 get a logit that is no number, or a huge one; so would what was taken, and what is not there."""
    hook = pl.LogitHook(lambda logits, slots, number, given: jnp.where(jnp.arange(5) % 2 == 1, told, logits + 1e20))
    available = jnp.array([True, True, True, True, False])

    @jax.jit
    @jax.vmap
    def draw(uniforms):
        given = pl.choices(jnp.zeros(5), available)
        slate = pl.draw_slate(given, hook, uniforms)
        return slate, pl.log_prob(given, hook, slate)

    slates, log_probs = draw(jax.random.uniform(jax.random.key(0), (50, 5)))
    assert (np.sort(slates[:, :4], axis=1) == np.arange(4)).all() and (slates[:, 4] == 4).all()
    assert np.isfinite(log_probs).all()


@pytest.mark.parametrize("mixture", ["1.0", "0.3"])
def test_penalties_accumulate(mixture):
    case = GOLDEN[f"penalized_logits_c{mixture}"]
    given = pl.Choices(jnp.array(case["logits"]), FEATURES, case["penalty_mixture_coefficient"])
    after = pl.logits_after(given, pl.COSINE, jnp.array(case["picks"]))
    expected = [[float(number) for number in case[f"expected_after_pick_{pick}"]] for pick in (1, 2)]
    np.testing.assert_allclose(after, expected, atol=2e-6)


@pytest.mark.parametrize("name", PAIRS)
def test_probabilities_of_ordered_pairs(name):
    case = GOLDEN[name]
    pairs = np.array([[int(item) for item in pair.split(",")] for pair in case["expected"]])
    scores = jnp.array(case.get("logits", case.get("scores")))
    mixture, temperature = case.get("penalty_mixture_coefficient"), case.get("logits_temperature", 1.0)
    features = FEATURES if mixture is not None else None
    given = of_pairs(scores, features, temperature, mixture or 0.0, pairs, jax.random.key(3))
    log_probs, slates, own = map(np.asarray, given)
    np.testing.assert_allclose(np.exp(log_probs), list(case["expected"].values()), atol=1e-6)
    assert np.exp(log_probs).sum() == pytest.approx(1.0, abs=1e-5)
    if "log_prob_of_0_1" in case:
        assert log_probs[0] == pytest.approx(case["log_prob_of_0_1"], abs=1e-5)
    named = (slates[:, None] == pairs).all(axis=-1)
    counts, chance = named.sum(axis=0), np.exp(log_probs)
    assert counts.sum() == DRAWS  # every slate is one of the pairs of different items
    assert (np.abs(counts / DRAWS - chance) < 4.5 * np.sqrt(chance * (1 - chance) / DRAWS)).all()
    np.testing.assert_allclose(own, log_probs[named.argmax(axis=1)], atol=1e-6)


@pytest.mark.parametrize("temperature", ["0.1", "1.0", "10.0"])
def test_probabilities_of_the_first_slot(temperature):
    case = GOLDEN[f"first_slot_probs_T{temperature}"]
    given = of_first_slot(SCORES, case["logits_temperature"])
    np.testing.assert_allclose(given, case["expected"], atol=1e-6)


def test_without_mixture_the_penalty_is_none():
    pairs, key = jnp.array(list(itertools.permutations(range(5), 2))), jax.random.key(3)
    with_none, without = of_pairs(SCORES, FEATURES, 1.0, 0.0, pairs, key), of_pairs(SCORES, None, 1.0, 0.0, pairs, key)
    for ours, theirs in zip(with_none, without, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_log_prob_and_its_gradient_by_hand():
    """Against a plain loop, in float64 numbers, with differences for derivatives."""
    features, slate, mixture = np.asarray(FEATURES), [3, 1, 4], 0.7
    lengths = np.sqrt(np.maximum((features**2).sum(axis=1), 1e-12))
    cosine = (features / lengths[:, None]) @ (features / lengths[:, None]).T

    def by_hand(scores: np.ndarray) -> float:
        logits, left, total, near = scores / 0.6, [0, 1, 2, 3, 4], 0.0, np.full(5, -1.0)
        for item in slate:
            total += logits[item] - np.log(np.exp(logits[left]).sum())
            left.remove(item)
            near = np.maximum(near, cosine[item])
            logits = logits - mixture * (1.0 + near)
        return total

    def ours(scores: jax.Array) -> jax.Array:
        return PlackettLuce(scores, 3, temperature=0.6, features=FEATURES, mixture=mixture).log_prob(jnp.array(slate))

    plain = np.asarray(SCORES, np.float64)
    value, gradient = jax.jit(jax.value_and_grad(ours))(SCORES)
    assert value == pytest.approx(by_hand(plain), abs=1e-5)
    slopes = [(by_hand(plain + step) - by_hand(plain - step)) / 2e-4 for step in np.eye(5) * 1e-4]
    np.testing.assert_allclose(gradient, slopes, atol=1e-4)


def test_it_is_a_distribution_of_distrax():
    make = lambda scores, mixture: PlackettLuce(scores, 2, features=FEATURES, mixture=mixture)  # noqa: E731

    @jax.jit
    def numbers(key):
        batch, alone = make(jnp.tile(SCORES, (4, 3, 1)), jnp.arange(3.0)), make(SCORES, 2.0)
        assert (batch.batch_shape, batch.event_shape, batch.dtype) == ((4, 3), (2,), jnp.int32)
        slates, log_probs = batch.sample_and_log_prob(seed=key, sample_shape=6)
        return slates, log_probs, batch.log_prob(slates), alone.log_prob(slates[:, 1, 2]), batch.mode(), batch

    slates, log_probs, again, alone, mode, batch = numbers(jax.random.key(0))
    assert isinstance(batch, distrax.Distribution)  # it leaves a compiled program whole
    assert slates.shape == (6, 4, 3, 2) and log_probs.shape == (6, 4, 3)
    np.testing.assert_allclose(log_probs, again, atol=1e-6)
    np.testing.assert_allclose(again[:, 1, 2], alone, atol=1e-6)
    assert mode.shape == (4, 3, 2) and mode[0, 0].tolist() == [0, 1]


def test_what_is_refused():
    for temperature in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(SettingError, match="temperature"):
            PlackettLuce(SCORES, 2, temperature=temperature)
    with pytest.raises(SettingError, match="num_slots = 6"):
        PlackettLuce(SCORES, 6)


# -- whatever comes ----------------------------------------------------------------------------------------------------

N, S = 7, 5


@jax.jit
@partial(jax.vmap, in_axes=(0, 0, 0, 0, 0, 0))
def drawn(scores, available, features, temperature, mixture, uniforms):
    """Slate, valid, greedy slate, log-probability and its gradient."""
    given = pl.choices(scores, available, temperature, features, mixture)
    slate = pl.draw_slate(given, pl.COSINE, uniforms)

    def log_prob(scores, features, mixture):
        return pl.log_prob(pl.choices(scores, available, temperature, features, mixture), pl.COSINE, slate)

    value, gradients = jax.value_and_grad(log_prob, (0, 1, 2))(scores, features, mixture)
    return slate, pl.valid_slots(given.logits, S), pl.greedy_slate(given, pl.COSINE, S), value, gradients


def worlds(count: int, seed: int = 0) -> list[np.ndarray]:
    """Random arguments of `drawn`, with everything in them that can go wrong."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(count, N)) * 10.0 ** rng.integers(-2, 30, (count, 1))
    scores[rng.random((count, N)) < 0.15] = np.nan
    scores[rng.random((count, N)) < 0.05] = np.inf
    scores[rng.random((count, N)) < 0.05] = -np.inf
    features = rng.normal(size=(count, N, 3)) * (rng.random((count, N, 1)) < 0.8)
    features[rng.random((count, N)) < 0.1] = np.nan
    available = rng.random((count, N)) < rng.random((count, 1))
    temperature = rng.choice([1.0, 1e-30, 1e30, 0.1], count)
    mixture = rng.choice([0.0, 1.0, 1e6], count)
    return [scores.astype(np.float32), available, features.astype(np.float32), np.float32(temperature),
            np.float32(mixture), rng.random((count, S), np.float32)]  # fmt: skip


def test_items_are_different_available_and_never_nan():
    given = worlds(400)
    *told, gradients = drawn(*given)
    slates, valid, greedy, log_probs = map(np.asarray, told)
    there = given[1] & np.isfinite(given[0]) & np.isfinite(given[2]).all(axis=-1)
    np.testing.assert_array_equal(valid, np.arange(S) < there.sum(axis=1, keepdims=True))
    assert there.sum(axis=1).min() == 0 and (there.sum(axis=1) == 2).any() and valid.all(axis=1).any()
    for slate in (slates, greedy):
        assert all(len(set(row)) == S for row in slate.tolist())
        np.testing.assert_array_equal(np.take_along_axis(there, slate, axis=1), valid)
        rest = [[i for i in range(N) if not row[i]] for row in there]  # padding: what is not available, in its order
        for row, ok, absent in zip(slate, valid, rest, strict=True):
            assert row[~ok].tolist() == absent[: (~ok).sum()]
    assert np.isfinite(log_probs).all() and (log_probs <= 1e-5).all()
    assert all(np.isfinite(part).all() for part in gradients)
    assert (log_probs[~valid.any(axis=1)] == 0.0).all()


@pytest.mark.parametrize(("place", "bad"), [(3, 0.0), (3, -1.0), (3, np.nan), (3, np.inf), (4, np.nan), (4, np.inf)])
def test_a_traced_number_out_of_range_serves_nobody(place, bad):
    given = worlds(400)
    given[place] = np.full(400, bad, np.float32)
    slates, valid, greedy, log_probs, gradients = drawn(*given)
    assert not valid.any() and (np.asarray(log_probs) == 0.0).all()
    np.testing.assert_array_equal(slates, np.tile(np.arange(S), (400, 1)))
    np.testing.assert_array_equal(greedy, slates)
    assert all(np.isfinite(part).all() for part in gradients)


def test_padding_changes_nothing():
    scores, available, features, *rest = worlds(400)
    extra = 6
    wide = (
        np.concatenate([scores, np.full((400, extra), np.nan, np.float32)], axis=1),
        np.concatenate([available, np.zeros((400, extra), bool)], axis=1),
        np.concatenate([features, np.full((400, extra, 3), 1e30, np.float32)], axis=1),
    )
    narrow, padded = drawn(scores, available, features, *rest), drawn(*wide, *rest)
    valid = np.asarray(narrow[1])
    np.testing.assert_array_equal(padded[1], valid)
    for slate in (0, 2):
        np.testing.assert_array_equal(np.where(valid, padded[slate], 0), np.where(valid, narrow[slate], 0))
    np.testing.assert_allclose(padded[3], narrow[3], rtol=1e-5, atol=1e-5)


def test_slates_that_cannot_be():
    @jax.jit
    def told(number, slates):
        given = PlackettLuce(SCORES, 3, available=jnp.arange(5) < number)
        return given.valid, given.log_prob(slates)

    valid, log_probs = told(3, jnp.array([[0, 0, 1], [0, 3, 1], [-1, 0, 1], [0, 5, 1]]))
    assert valid.all() and (np.asarray(log_probs) == -np.inf).all()
    valid, log_probs = told(2, jnp.array([[1, 0, 99], [1, 0, -7], [1, 0, 0], [1, 2, 0]]))
    assert valid.tolist() == [True, True, False]
    assert len(set(log_probs.tolist()[:3])) == 1 and log_probs[3] == -np.inf


def test_mean_pairwise_cosine():
    features = np.asarray(jax.random.normal(jax.random.key(0), (4, 3)))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    of_pairs = lambda rows: np.mean([unit[i] @ unit[j] for i, j in itertools.combinations(rows, 2)])  # noqa: E731
    assert float(pl.mean_pairwise_cosine(jnp.asarray(features))) == pytest.approx(of_pairs(range(4)), abs=1e-6)
    broken = jnp.asarray(features).at[2].set(jnp.nan)
    counted = jnp.array([True, True, False, True])
    assert float(pl.mean_pairwise_cosine(broken, counted)) == pytest.approx(of_pairs([0, 1, 3]), abs=1e-6)
    assert float(pl.mean_pairwise_cosine(broken, jnp.arange(4) < 1)) == 0.0


# -- the ranker --------------------------------------------------------------------------------------------------------

DIMS, WIDTH = Dims(60, 4, 3), 5


@pytest.fixture(scope="module")
def items():
    return item_weights(jax.random.normal(jax.random.key(0), (DIMS.num_items, WIDTH)))


def test_without_penalty_the_greedy_slate_is_that_of_the_topk_ranker(items):
    weights, ranker = plackett_luce_weights(items, 0.1, 0.0), make_plackett_luce_ranker(DIMS, WIDTH)
    topk = make_topk_ranker(DIMS, WIDTH)
    both = jax.jit(jax.vmap(lambda action: (ranker.decode(weights, action), topk.decode(items, action))))
    np.testing.assert_array_equal(*both(jax.random.normal(jax.random.key(1), (50, WIDTH))))
    for ours, theirs in zip(ranker.box(weights), (items.centre, items.scale), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (ranker.action_dim, ranker.draws) == (WIDTH, DIMS.slate_size)


def test_a_larger_penalty_makes_slates_less_alike(items):
    ranker, actions = make_plackett_luce_ranker(DIMS, WIDTH), jax.random.normal(jax.random.key(1), (200, WIDTH))

    @jax.jit
    @partial(jax.vmap, in_axes=(0, None))
    def similarity(penalty, uniforms):
        weights = plackett_luce_weights(items, 0.2, 0.0).replace(penalty=penalty)
        slates = (
            jax.vmap(partial(ranker.decode, weights))(actions),
            jax.vmap(partial(ranker.draw, weights))(actions, uniforms),
        )
        return [jax.vmap(lambda slate: pl.mean_pairwise_cosine(items.embeddings[slate]))(s).mean() for s in slates]

    uniforms = jax.random.uniform(jax.random.key(2), (200, DIMS.slate_size))
    for alike in similarity(jnp.array([0.0, 1.0, 4.0, 16.0]), uniforms):
        assert (np.diff(alike) < -0.02).all(), alike


def test_every_agent_on_a_ranker_explores_with_drawn_slates(items):
    weights, ranker = plackett_luce_weights(items, 1.0, 0.5), make_plackett_luce_ranker(DIMS, WIDTH)
    seen = Observation(jnp.arange(4), jnp.zeros(4, bool))
    uniforms = jax.random.uniform(jax.random.key(5), (WIDTH + DIMS.slate_size,))
    learners = [
        (sac.make_sac(sac.SACSpec(8, 4, 3), DIMS, ranker), sac.SACHypers()),
        (ddpg.make_ddpg(ddpg.DDPGSpec(8, 4, 3), DIMS, ranker), ddpg.DDPGHypers()),
        (td3.make_td3(td3.TD3Spec(8, 4, 3), DIMS, ranker), td3.TD3Hypers()),
        (reinforce.make_reinforce(reinforce.ReinforceSpec(8, 4, 3), DIMS, ranker), reinforce.ReinforceHypers()),
        (ppo.make_ppo(ppo.PPOSpec(8, 4, 3), DIMS, ranker), ppo.PPOHypers()),
        (a2c.make_a2c(a2c.A2CSpec(8, 4, 3), DIMS, ranker), a2c.A2CHypers()),
    ]
    unplaced = jnp.array([False] * 4 + [True] * 2)  # what PPO and A2C learn from is the action before tanh and the box
    centre, scale = ranker.box(weights)

    @jax.jit
    def slates(key):
        """[agents, 4]: explored, drawn again from its action, greedy, decoded again."""
        told = []
        for agent, hypers in learners:
            assert agent.explore.draws == WIDTH + DIMS.slate_size
            acting = Acting(agent.init(key, hypers), hypers, weights)
            explored, _ = agent.explore.act(acting, agent.explore.start(), seen, None, uniforms)
            greedy, _ = agent.greedy.act(acting, agent.greedy.start(), seen, None, uniforms[:0])
            told.append((explored.slate, explored.action, greedy.slate, greedy.action))
        explored, actions, greedy, best = map(jnp.stack, zip(*told, strict=True))
        actions, best = (jnp.where(unplaced[:, None], centre + scale * jnp.tanh(x), x) for x in (actions, best))
        again = jax.vmap(lambda action: ranker.draw(weights, action, uniforms[WIDTH:]))(actions)
        return explored, again, greedy, jax.vmap(partial(ranker.decode, weights))(best)

    explored, again, greedy, decoded = slates(jax.random.key(0))
    np.testing.assert_array_equal(explored, again)
    np.testing.assert_array_equal(greedy, decoded)


def test_settings_of_the_method():
    assert TrainSettings(method="sac-pl").resolved().pl == PLSettings()
    assert TrainSettings(method="sac-pl", embeddings="ideal").resolved().privileged
    assert "pl" not in TrainSettings(method="sac-topk-mf").resolved().identity()
    for wrong in (PLSettings(temperature=0.0), PLSettings(penalty=-1.0), PLSettings(penalty=float("nan"))):
        with pytest.raises(SettingError, match="pl\\."):
            TrainSettings(method="sac-pl", pl=wrong).resolved()
    with pytest.raises(SettingError, match="has none"):
        TrainSettings(method="sac-topk-mf", pl=PLSettings()).resolved()
    with pytest.raises(SettingError, match="slate_size"):
        make_plackett_luce_ranker(Dims(3, 4, 6), WIDTH)


# -- numbers that a penalty or features may bring ----------------------------------------------------------------------


@pytest.mark.parametrize("told", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_penaliser_cannot_take_items_away_either(told):
    """Its NaN put every later slot on item N. Values and gradients stay numbers."""
    broken = pl.Penaliser(lambda features: features, lambda state, item: (jnp.full(4, told).at[1].set(0.0), state))

    @jax.jit
    def slate_of(scores, mixture):
        given = pl.choices(scores, None, 1.0, jnp.eye(4), mixture)
        slate = pl.greedy_slate(given, broken, 3)
        return slate, pl.draw_slate(given, broken, jnp.array([0.1, 0.5, 0.9])), pl.log_prob(given, broken, slate)

    scores = jnp.array([3.0, 0.0, 2.0, 1.0])
    greedy, drawn, log_prob = slate_of(scores, 1.0)
    for slate in (greedy, drawn):
        assert len(set(slate.tolist())) == 3 and set(slate.tolist()) <= set(range(4))
    assert np.isfinite(log_prob) and (told == -jnp.inf or greedy[:2].tolist() == [0, 1])
    assert all(np.isfinite(x).all() for x in jax.grad(lambda *x: slate_of(*x)[2], argnums=(0, 1))(scores, 1.0))


@pytest.mark.parametrize("mixture", [-3e38, 3e38])
def test_a_mixture_of_any_size_leaves_probabilities(mixture):
    of = jax.jit(lambda scores: PlackettLuce(scores, 3, features=FEATURES, mixture=mixture).log_prob(jnp.arange(3)))
    assert not np.isnan(of(SCORES)) and np.isfinite(jax.grad(of)(SCORES)).all()


def test_long_rows_have_a_direction_and_short_ones_keep_their_length():
    rows = jnp.array([[3.0, 4.0], [3e-9, 4e-9], [0.0, 0.0]])
    np.testing.assert_allclose(pl.unit_rows(rows), [[0.6, 0.8], [3e-3, 4e-3], [0.0, 0.0]], rtol=1e-6)  # the 1e-12
    for size in (1e10, 7e16, 1e17, 1e19, 6e37):  # on both sides of where they are made smaller
        np.testing.assert_allclose(pl.unit_rows(rows[:1] * size), [[0.6, 0.8]], rtol=1e-6)
        slope = jax.grad(lambda x: pl.unit_rows(x)[0, 0])(rows[:1] * size)
        expected = np.array([[0.64 / 5, -0.48 / 5]]) if size < 1e37 else 0.0  # below the least float32
        np.testing.assert_allclose(slope * size, np.broadcast_to(expected, (1, 2)), rtol=1e-5)
    assert pl.unit_rows(jnp.zeros((2, 0))).shape == (2, 0)
