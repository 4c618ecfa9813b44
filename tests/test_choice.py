"""Choice models: recorded numbers, one user after the other by hand, draws, and what is refused or cut off."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemsjax.errors import SettingError
from gemsjax.maths import choice
from gemsjax.maths.choice import ChoiceParams

FILE = json.loads((Path(__file__).parent / "golden" / "slateq_examples.json").read_text())
TESTS, SCORES = FILE["choice_model_tests"], FILE["scores"]


def scores_of(example):
    return jnp.asarray(np.array(example["docs"]) @ np.array(example["user"]), jnp.float32)


def chosen(model, scores, **numbers) -> np.ndarray:
    """Chances of all candidates, shown in their order, and of no click."""
    params = ChoiceParams(**numbers)
    found = choice.chances(model, choice.weigh(model, scores, params), jnp.arange(len(scores)), params)
    return np.append(found, 1.0 - found.sum())


def test_recorded_scores_and_probabilities():
    scores = scores_of(SCORES)
    found = choice.weigh("proportional", scores, ChoiceParams(SCORES["no_click_mass"], SCORES["min_normalizer"]))
    np.testing.assert_allclose(found.appeal, SCORES["proportional"], atol=1e-6)
    assert float(found.no_click) == pytest.approx(SCORES["proportional_no_click"])
    expected = [*SCORES["mnl_softmax"], SCORES["mnl_no_click"]]
    np.testing.assert_allclose(chosen("logit", scores, no_click_mass=SCORES["no_click_mass"]), expected, atol=2e-6)


@pytest.mark.parametrize(("mass", "case"), [(-np.inf, "mnl_default"), (1.0, "mnl_no_click_mass_1")])
def test_recorded_logit_choices(mass, case):
    np.testing.assert_allclose(chosen("logit", scores_of(TESTS), no_click_mass=mass), TESTS[case], atol=TESTS["tol"])


@pytest.mark.parametrize(
    ("mass", "least", "case"), [(0.0, 0.0, "mnp_min_normalizer_0"), (0.5, 0.5, "mnp_min_normalizer_0p5_mass_0p5")]
)
def test_recorded_proportional_scores(mass, least, case):
    found = choice.weigh("proportional", scores_of(TESTS), ChoiceParams(mass, least))
    np.testing.assert_allclose([*found.appeal, found.no_click], TESTS[case], atol=TESTS["tol"])


@pytest.mark.parametrize(("sign", "case"), [(1, "softmax_log_1_4"), (-1, "softmax_neglog_1_4")])
def test_recorded_softmax(sign, case):
    logits = sign * jnp.log(jnp.arange(1.0, 5.0))
    np.testing.assert_allclose(chosen("logit", logits, no_click_mass=-np.inf)[:4], TESTS[case], atol=TESTS["tol"])


@pytest.mark.parametrize("model", ["exponential_cascade", "proportional_cascade"])
def test_a_cascade_is_looked_at_from_the_top(model):
    """Against all ways to look and to be attracted."""
    scores, attention, scaling = np.array([0.3, -0.5, 0.9]), 0.7, 0.35
    attraction = scaling * (np.exp(scores) if model.startswith("exp") else scores + 1.0)
    expected = np.zeros(4)
    for looks, likes in itertools.product(itertools.product([0, 1], repeat=3), repeat=2):
        p = np.prod(np.where(looks, attention, 1 - attention)) * np.prod(np.where(likes, attraction, 1 - attraction))
        clicks = np.array(looks) & np.array(likes)
        expected[np.argmax(clicks) if clicks.any() else 3] += p
    found = chosen(model, jnp.asarray(scores), attention=attention, score_scaling=scaling, min_normalizer=-1.0)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("model", choice.MODELS)
def test_absent_candidates_and_numbers_out_of_range_are_never_chosen(model):
    """Rows: some absent, all absent, one score not a number; with and without padding, under jit and vmap."""
    params = ChoiceParams(score_scaling=0.1)
    scores = jnp.array([[0.4, -0.2, 0.9], [0.4, -0.2, 0.9], [0.4, np.nan, 0.9]])
    there = jnp.array([[True, False, True], [False] * 3, [True] * 3])
    slates = jnp.array([[0, 1, 7], [0, 1, 2], [2, 1, -1]])

    @jax.jit
    def chances(scores, there, slates):
        one = lambda s, a, slate: choice.chances(model, choice.weigh(model, s, params, a), slate, params)  # noqa: E731
        return jax.vmap(one)(scores, there, slates)

    found = np.asarray(chances(scores, there, slates))
    assert np.isfinite(found).all() and (found >= 0).all() and (found.sum(axis=1) <= 1).all()
    np.testing.assert_array_equal(found > 0, [[True, False, False], [False] * 3, [True, False, False]])
    more = jnp.concatenate([scores, jnp.full((3, 4), jnp.inf)], axis=1), jnp.pad(there, ((0, 0), (0, 4)))
    padded = np.asarray(chances(*more, jnp.where(slates == 7, 99, slates)))
    np.testing.assert_array_equal(found, padded)


def test_nothing_to_choose_from_and_no_way_out():
    params = ChoiceParams(no_click_mass=-np.inf)
    found = choice.weigh("logit", jnp.zeros(3), params, jnp.zeros(3, bool))
    np.testing.assert_array_equal(choice.chances("logit", found, jnp.arange(3), params), 0.0)


def test_draws_have_the_chances():
    chance = jnp.array([0.2, 0.0, 0.5])
    n = 20_000
    clicks = jax.vmap(choice.pick, (0, None))(jax.random.uniform(jax.random.key(0), (n,)), chance)
    assert int(clicks.sum(axis=1).max()) == 1
    share = np.asarray(clicks).mean(axis=0)
    np.testing.assert_allclose(share, chance, atol=4 * np.sqrt(0.25 / n))
    assert share[1] == 0


@pytest.mark.parametrize(
    ("model", "scores", "numbers", "says"),
    [
        ("proportionl", [0.0], {}, "did you mean 'proportional'"),
        ("proportional", [-1.5, 0.0], {}, "min_normalizer = .*at most -1.5"),
        ("proportional", [0.0], {"no_click_mass": -2.0}, "no_click_mass = .*at least min_normalizer"),
        ("proportional", [0.0], {"no_click_mass": np.nan}, "no_click_mass"),
        ("logit", [0.0], {"no_click_mass": np.inf}, "no_click_mass"),
        ("exponential_cascade", [0.0], {"attention": 1.2}, "attention = .*from 0 to 1"),
        ("exponential_cascade", [0.0], {"attention": np.nan}, "attention"),
        ("exponential_cascade", [0.0], {"score_scaling": -0.1}, "score_scaling = .*at least 0"),
        ("exponential_cascade", [0.5], {"score_scaling": 0.7}, "score_scaling = .*not 1.15"),
        ("proportional_cascade", [0.5], {"score_scaling": 0.7}, "score_scaling = .*not 1.05"),
    ],
)
def test_what_is_refused(model, scores, numbers, says):
    with pytest.raises(SettingError, match=says):
        choice.weigh(model, jnp.asarray(scores), ChoiceParams(**numbers))


def test_unknown_numbers_are_cut_off_where_nothing_can_be_refused():
    params = ChoiceParams(score_scaling=0.7)

    def chances(model):
        weigh = lambda scores: choice.weigh(model, scores, params)  # noqa: E731
        return choice.chances(model, jax.jit(weigh)(jnp.array([-3.0, 2.0])), jnp.arange(2), params)

    np.testing.assert_allclose(chances("proportional_cascade"), [0.0, 1.0])
    assert float(chances("exponential_cascade").sum()) == pytest.approx(1.0)
    np.testing.assert_allclose(chances("proportional"), [0.0, 3.0 / 5.0])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_score_that_is_no_number_is_not_available(bad):
    scores, there = jnp.array([0.1, bad, 0.5]), jnp.array([True, True, False])
    for available, expected in ((None, [True, False, True]), (there, [True, False, False])):
        found = choice.weigh("proportional", scores, ChoiceParams(), available)
        assert found.available.tolist() == expected and np.isfinite(found.appeal).all()
