"""Interest evolution and exploration: recorded numbers, contract, distributions, sessions that end, empty places."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemsjax
from gemsjax.agents.references import make_random
from gemsjax.clock import compile_clock
from gemsjax.envs.interest_evolution import interest_step, remaining_budget
from gemsjax.envs.knowledge import make_choice_model, make_click_model
from gemsjax.envs.registry import require_catalogue
from gemsjax.errors import SettingError
from gemsjax.evaluate import user_keys
from gemsjax.maths import choice
from gemsjax.rollout import rollout
from gemsjax.types import Dims

RECORDED = json.loads((Path(__file__).parent / "golden" / "slateq_examples.json").read_text())["interest_evolution"]
NAMES = ("interest_evolution", "interest_exploration")
USERS = 4_000


@lru_cache
def step_of(env):
    return jax.jit(jax.vmap(env.step, in_axes=(0, 0, 0, None)))


@lru_cache
def reset_of(env):
    return jax.jit(jax.vmap(env.reset, in_axes=(0, None)))


@pytest.fixture(scope="module")
def evolution():
    """The environment, its parameters, many new users and what they do with the first two candidates."""
    env, params = gemsjax.make("interest_evolution")
    seen, users = reset_of(env)(jax.random.split(jax.random.key(3), USERS), params)
    slates = jnp.broadcast_to(jnp.arange(2), (USERS, 2))
    turned_out = step_of(env)(jax.random.split(jax.random.key(30), USERS), users, slates, params)
    return env, params, seen, users, turned_out


@pytest.fixture(scope="module")
def exploration():
    env, params = gemsjax.make("interest_exploration")
    seen, users = reset_of(env)(jax.random.split(jax.random.key(4), USERS), params)
    slates = jnp.broadcast_to(jnp.arange(2), (USERS, 2))
    turned_out = step_of(env)(jax.random.split(jax.random.key(40), USERS), users, slates, params)
    return env, params, seen, users, turned_out


# -- recorded ----------------------------------------------------------------------------------------------------------


def test_recorded_budgets():
    _, params = gemsjax.make("interest_evolution")
    case = RECORDED["default_click_budget"]
    for quality, expected in zip(case["quality"], case["expected"], strict=True):
        left = remaining_budget(*(jnp.float32(x) for x in (case["budget"], case["video_length"], 0.5, quality)), params)
        assert float(left) == pytest.approx(expected, abs=2e-5)
    case = RECORDED["test_budget"]
    _, params = gemsjax.make(
        "interest_evolution",
        bonus=case["alpha"],
        user_q_factor=case["user_q_factor"],
        doc_q_factor=case["doc_q_factor"],
    )
    numbers = (jnp.float32(case[name]) for name in ("budget", "watch", "expected_utility", "quality"))
    assert float(remaining_budget(*numbers, params)) == pytest.approx(case["expected"], abs=1e-6)


def test_recorded_interests():
    case = RECORDED["interest_update"]
    delta, upwards = interest_step(jnp.asarray(case["interests"]), jnp.asarray(case["doc"]), 0.3)
    np.testing.assert_allclose(delta, case["delta_plus"], atol=1e-7)
    assert float(upwards) == pytest.approx(case["prob_plus"])


def test_a_click_through_the_whole_step(evolution):
    """Budget and interests after a turn are those of the rules, for users who click and for those who do not."""
    env, params, seen, users, (shown, after, reward, terminated, truncated, info) = evolution
    clicks = np.asarray(shown.clicks)
    clicked, place = clicks.any(axis=1), clicks.argmax(axis=1)
    rows = np.arange(USERS)
    quality, topic = np.asarray(users.qualities)[rows, place], np.asarray(users.topics)[rows, place]
    expected = np.where(clicked, 200.0 - 4.0 + 0.9 / 3.4 * 4.0 * quality, 199.5)
    np.testing.assert_allclose(after.budget, expected, rtol=1e-6)
    np.testing.assert_array_equal(reward, 4.0 * clicked)
    moved = np.asarray(after.interests - users.interests)
    others = moved.copy()
    others[rows, topic] = 0.0
    assert not others.any() and not moved[~clicked].any()
    old = np.asarray(users.interests)[rows, topic]
    np.testing.assert_allclose(
        np.abs(moved[rows, topic])[clicked], (0.3 * (1 - np.abs(old)) * (1 - old))[clicked], atol=1e-6
    )
    up = (moved[rows, topic] > 0)[clicked]
    chance = ((old + 1) / 2)[clicked]
    assert abs((up - chance).sum()) < 4 * np.sqrt((chance * (1 - chance)).sum())
    assert not np.asarray(terminated | truncated | info["invalid_action"]).any()
    np.testing.assert_array_equal(info["budget"], after.budget)


# -- distributions -----------------------------------------------------------------------------------------------------


def close_in_mean(values, expected, deviation):
    values = np.asarray(values)
    assert abs(values.mean() - expected) < 4 * deviation / np.sqrt(values.size)


def test_new_users_and_videos(evolution):
    env, params, seen, users, _ = evolution
    interests = np.asarray(users.interests)
    assert interests.min() >= -1 and interests.max() <= 1
    close_in_mean(interests, 0.0, 3**-0.5)
    close_in_mean(interests**2, 1 / 3, np.sqrt(1 / 5 - 1 / 9))
    topics = np.asarray(users.topics)
    counts = np.bincount(topics.ravel(), minlength=20)
    expected = topics.size / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # chi-squared with 19 degrees of freedom, p = 0.001
    means = np.concatenate([np.linspace(-3, 0, 14), np.linspace(0, 3, 6)])
    np.testing.assert_allclose(params.quality_means, means, atol=1e-6)
    noise = np.asarray(users.qualities) - means[topics]
    close_in_mean(noise, 0.0, 0.1)
    close_in_mean(noise**2, 0.01, 0.01 * np.sqrt(2))
    np.testing.assert_array_equal(seen.docs.argmax(axis=2), topics)
    np.testing.assert_array_equal(seen.user, users.interests)
    assert np.asarray(seen.slate == -1).all() and not np.asarray(seen.clicks).any() and float(users.budget[0]) == 200.0


def test_videos_are_chosen_in_proportion(evolution):
    _, _, _, users, (shown, *_, info) = evolution
    scores = np.take_along_axis(np.asarray(users.interests), np.asarray(users.topics)[:, :2], axis=1) + 1.0
    expected = scores / (2.0 + scores.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(info["click_probabilities"], expected, atol=1e-6)
    error = np.sqrt((expected * (1 - expected)).sum(axis=0))
    assert (np.abs((np.asarray(shown.clicks) - expected).sum(axis=0)) < 4 * error).all()


def test_users_and_documents_of_exploration(exploration):
    env, params, seen, users, (shown, after, reward, terminated, truncated, info) = exploration
    kind, topics = np.asarray(users.kind), np.asarray(users.topics)
    close_in_mean(kind, 0.7, np.sqrt(0.21))
    close_in_mean(topics, 0.8, 0.4)
    means = np.array([[0.1, 0.7], [0.7, 0.1]])
    noise = np.log(np.asarray(users.affinity)) - means[kind]
    close_in_mean(noise, 0.0, 0.1)
    close_in_mean(noise**2, 0.01, 0.01 * np.sqrt(2))
    quality = np.log(np.asarray(users.qualities)) - np.array([0.8, 0.2])[topics]
    close_in_mean(quality, 0.0, 0.1)
    close_in_mean(quality**2, 0.01, 0.01 * np.sqrt(2))
    assert seen.user.shape == (USERS, 0)
    np.testing.assert_array_equal(seen.docs[..., :2].argmax(axis=2), topics)
    np.testing.assert_array_equal(seen.docs[..., 2], users.qualities)
    logits = np.take_along_axis(np.asarray(users.affinity), topics, axis=1) + np.asarray(users.qualities)
    weight = np.exp(logits[:, :2])
    expected = weight / (np.exp(5.0) + weight.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(info["click_probabilities"], expected, rtol=2e-5)
    error = np.sqrt((expected * (1 - expected)).sum(axis=0))
    assert (np.abs((np.asarray(shown.clicks) - expected).sum(axis=0)) < 4 * error).all()
    np.testing.assert_array_equal(reward, np.asarray(shown.clicks).sum(axis=1))
    np.testing.assert_array_equal(after.affinity, users.affinity)  # nothing moves
    assert not np.asarray(terminated | truncated).any()


@pytest.fixture(scope="module")
def played():
    """`(budget) -> what random slates bring to 400 users`, one program for all budgets."""
    env, _ = gemsjax.make("interest_evolution", horizon=150)
    random = make_random(Dims(env.num_items, env.slate_size, env.horizon))
    record = lambda turn: (turn.reward, turn.info["budget"], turn.shown.clicks, turn.user.interests)  # noqa: E731
    play = jax.jit(lambda params: rollout(env, random, user_keys("test", 400), params, (), record)[0])
    return lambda budget: [np.asarray(x) for x in play(gemsjax.make("interest_evolution", budget=budget)[1])]


def test_random_slates_are_watched_for_as_long_as_expected(played):
    """A turn is clicked about every other time, and a click costs 4 + 0.64 on average: 150 to 160 units of 200."""
    watched = played(200.0)[0].sum(axis=0)
    assert 150.0 < watched.mean() < 160.0 and watched.std() < 20.0


# -- the contract ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_step_is_play_and_many_users_are_one_user_each(name):
    env, params = gemsjax.make(name, num_candidates=4)
    keys = jax.random.split(jax.random.key(0), 6)
    seen, users = reset_of(env)(keys, params)
    slates = jnp.array([[0, 1], [3, 2], [-1, 0], [4, 99], [1, 1], [2, 0]])
    together = step_of(env)(keys, users, slates, params)
    one = jax.jit(lambda key, *rest: env.play(jax.random.uniform(key, (env.draws,)), *rest))
    for number in range(6):
        alone = one(keys[number], jax.tree.map(lambda x, n=number: x[n], users), slates[number], params)
        jax.tree.map(lambda a, b, n=number: np.testing.assert_allclose(a, b[n], rtol=1e-6, atol=1e-6), alone, together)
    invalid = np.asarray(together[5]["invalid_action"])
    np.testing.assert_array_equal(invalid, [False, False, True, True, False, False])
    chances = np.asarray(together[5]["click_probabilities"])
    np.testing.assert_array_equal(chances[2:4] > 0, [[False, True], [False, False]])
    assert hash(env) == hash(gemsjax.make(name, num_candidates=4)[0])


def test_places_that_hold_no_candidate_have_no_quality():
    """Neither that of a candidate next to them, nor one from the end."""
    env, params = gemsjax.make("interest_evolution", num_candidates=4, available=3)
    keys = jax.random.split(jax.random.key(0), 6)
    users = reset_of(env)(keys, params)[1]
    slates = jnp.array([[0, 1], [2, 3], [-1, 0], [4, 99], [3, 1], [2, 0]])
    told = np.asarray(step_of(env)(keys, users, slates, params)[5]["qualities"])
    holds = (np.asarray(slates) >= 0) & (np.asarray(slates) < 3)
    own = np.take_along_axis(np.asarray(users.qualities), np.clip(slates, 0, 3), axis=1)
    np.testing.assert_array_equal(told, np.where(holds, own, 0.0))
    assert (told[holds] != 0.0).all()


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_a_batch_axis_and_empty_places_stay_empty(name):
    """One program for two numbers of candidates, one of them none at all: then nothing is ever clicked."""
    made = [gemsjax.make(name, num_candidates=5, available=n) for n in (3, 0)]
    env = made[0][0]
    params = jax.tree.map(lambda *x: jnp.stack(x), *(params for _, params in made))
    random = make_random(Dims(env.num_items, env.slate_size, env.horizon))
    record = lambda turn: (turn.shown, turn.reward, turn.info, turn.user)  # noqa: E731
    play = jax.jit(jax.vmap(lambda p: rollout(env, random, user_keys("test", 20), p, (), record)[0]))
    shown, reward, info, _user = play(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((shown, reward, info)))
    assert not np.asarray(shown.docs[:, :, :, 3:]).any() and not np.asarray(shown.available[1]).any()
    assert (
        float(reward[0].sum()) > 0 and not np.asarray(reward[1]).any() and np.asarray(info["invalid_action"][1]).all()
    )
    assert not np.asarray(shown.clicks & (shown.slate >= 3)).any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("resample", [True, False])
def test_candidates_are_resampled_or_kept(name, resample):
    env, params = gemsjax.make(name, resample_documents=resample)
    seen, user = env.reset(jax.random.key(0), params)
    shown, after, *_ = jax.jit(env.step)(jax.random.key(1), user, jnp.array([0, 1]), params)
    assert bool((shown.docs == seen.docs).all()) == bool((after.qualities == user.qualities).all()) == (not resample)


def test_sessions_end_when_the_budget_is_used_up_and_stay_ended(played):
    """After its end a session brings nothing, whatever is shown."""
    reward, budget, clicks, interests = played(10.0)
    before = np.concatenate([np.full((1, 400), 10.0, np.float32), budget[:-1]])
    left = before > 0
    assert not left[-1].any() and left[1].all()
    assert not reward[~left].any() and not clicks[~left].any()
    np.testing.assert_array_equal(budget[~left], before[~left])
    np.testing.assert_array_equal(interests[1:][~left[1:]], interests[:-1][~left[1:]])
    np.testing.assert_allclose(reward, np.where(clicks.any(axis=2), np.minimum(np.maximum(before, 0), 4.0), 0.0))
    assert (reward[left] < 4.0).any() and (
        reward[(reward > 0)] == 4.0
    ).any()  # a video is watched as long as time lasts


def test_terminated_and_truncated_are_told_apart():
    env, params = gemsjax.make("interest_evolution", horizon=2)
    step = jax.jit(env.step)
    _, user = env.reset(jax.random.key(0), params)
    flags = []
    for budget in (200.0, 200.0, 0.4, np.nan):
        user = user.replace(budget=jnp.float32(budget))
        _, user, reward, terminated, truncated, _ = step(jax.random.key(1), user, jnp.array([-1, -1]), params)
        flags.append((bool(terminated), bool(truncated), float(reward)))
    assert flags == [(False, False, 0.0), (False, True, 0.0), (True, False, 0.0), (True, False, 0.0)]


@pytest.mark.parametrize("model", choice.MODELS)
@pytest.mark.parametrize("name", NAMES)
def test_other_choice_models(name, model, request):
    """Users are drawn alike under all of them; what learners are told is what happens."""
    _, _, seen, users, _ = request.getfixturevalue(name.removeprefix("interest_"))
    env, params = gemsjax.make(name, choice_model=model)
    told = make_choice_model(env, privileged=True)

    @jax.jit
    def both(seen, user):
        slate = jnp.array([1, 0])
        candidates = told.candidates(params, seen, told.remember(user))
        return env.click_probabilities(user, slate, params), told.chances(params, candidates, slate)

    chances, expected = (np.asarray(x) for x in jax.vmap(both)(seen, users))
    assert np.isfinite(chances).all() and (chances >= 0).all() and (chances.sum(axis=1) <= 1 + 1e-6).all()
    assert (chances[:, 0] > 0).all()
    np.testing.assert_allclose(chances, expected, rtol=1e-5)


def test_what_learners_are_told():
    env, params = gemsjax.make("interest_exploration")
    seen, user = env.reset(jax.random.key(0), params)
    blind, told = make_choice_model(env), make_choice_model(env, privileged=True)
    assert not blind.privileged and told.privileged and blind.remember(user) == ()
    mean_affinity = np.array([0.3, 0.7]) @ np.exp(np.array([[0.1, 0.7], [0.7, 0.1]]) + 0.005)
    logits = np.asarray(seen.docs[:, :2]) @ mean_affinity + np.asarray(seen.docs[:, 2])
    found = blind.candidates(params, seen, ())
    np.testing.assert_allclose(found.appeal / found.no_click, np.exp(logits - 5.0), rtol=1e-5)
    topic_env = gemsjax.make("focused_topdown", num_items=20)[0]
    assert not make_choice_model(gemsjax.make("interest_evolution")[0], privileged=True).privileged
    for function, wrong in ((make_choice_model, topic_env), (make_click_model, env), (require_catalogue, env)):
        with pytest.raises(SettingError):
            function(wrong)
    require_catalogue(topic_env)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_candidates": 0}, "num_candidates = 0"),
        ({"slate_size": 11}, "slate_size = 11 .* 10"),
        ({"available": 11}, "available = 11"),
        ({"horizon": 0}, "horizon = 0"),
        ({"budgt": 3.0}, "did you mean 'budget'"),
        ({"slate_sise": 3}, "did you mean 'slate_size'"),
        ({"budget": -1.0}, "budget = -1.0"),
        ({"video_length": "long"}, "video_length = 'long'"),
        ({"resample_documents": 1}, "resample_documents = 1"),
        ({"choice_model": "logits"}, "did you mean 'logit'"),
        ({"min_normalizer": -0.5}, "min_normalizer = .* at most -1"),
        ({"no_click_mass": -2.0}, "no_click_mass"),
        ({"choice_model": "exponential_cascade", "attention": 1.5}, "attention = 1.5"),
        ({"choice_model": "exponential_cascade", "score_scaling": 0.5}, "score_scaling = .* 1.35"),
    ],
)
def test_evolution_refuses_before_compiling(settings, says):
    gemsjax.make("interest_evolution")
    with compile_clock() as clock, pytest.raises(SettingError, match=says):
        gemsjax.make("interest_evolution", **settings)
    assert clock.programs == 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"type_shares": (0.5, 0.6)}, "type_shares"),
        ({"topic_shares": (0.2, 0.3, 0.5)}, "affinities"),
        ({"affinities": ((0.1, np.nan), (0.7, 0.1))}, "affinities"),
        ({"qualities": (1.0,)}, "qualities"),
        ({"quality_deviation": -0.1}, "quality_deviation = -0.1"),
        ({"choice_model": "proportional", "min_normalizer": 0.5}, "min_normalizer"),
        ({"catalogue": "focused"}, "keyword = 'catalogue'"),
    ],
)
def test_exploration_refuses(settings, says):
    with pytest.raises(SettingError, match=says):
        gemsjax.make("interest_exploration", **settings)
