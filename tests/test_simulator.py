"""The simulator's contract: compiling, batching, replaying, odd slates, and rollouts that equal stepping by hand."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import gemsjax
from gemsjax.agents.base import Acting
from gemsjax.agents.references import make_epsilon_greedy_oracle, make_random
from gemsjax.envs import clicks
from gemsjax.errors import DataError
from gemsjax.rollout import RESET, rollout, turn_key, turn_numbers
from gemsjax.types import Dims

KEY = jax.random.key(7)
NOBODY = Acting((), (), ())
SMALL = {"num_items": 60, "slate_size": 4, "horizon": 6}


@pytest.fixture(scope="module")
def small():
    return gemsjax.make("focused_divpen", **SMALL)


@pytest.fixture(scope="module")
def user(small):
    env, params = small
    return jax.jit(env.reset)(KEY, params)[1]


def step(env):
    return jax.jit(env.step)


def everything_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def nearly_equal(left, right):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), left, right)


def test_shapes_and_types(small, user):
    env, params = small
    observation, state, reward, terminated, truncated, info = step(env)(KEY, user, jnp.array([3, -1, 5, 5]), params)
    assert observation.slate.shape == observation.clicks.shape == (4,)
    assert (observation.slate.dtype, observation.clicks.dtype) == (jnp.int32, jnp.bool_)
    assert reward.shape == () and reward.dtype == jnp.float32 and reward == observation.clicks.sum()
    assert not terminated and not truncated and truncated.shape == ()
    assert {name: value.shape for name, value in info.items()} == {
        "scores": (4,), "click_probabilities": (4,), "bored": (10,), "invalid_action": ()
    }  # fmt: skip
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), user)
    assert hash(env) == hash(gemsjax.make("focused_divpen", **SMALL)[0])


def test_users_in_a_batch_are_the_users_alone(small):
    env, params = small
    keys, slates = jax.random.split(KEY, 5), jax.random.randint(KEY, (5, 4), -1, 60)
    _, states = jax.jit(jax.vmap(env.reset, in_axes=(0, None)))(keys, params)
    together = jax.jit(jax.vmap(env.step, in_axes=(0, 0, 0, None)))(keys, states, slates, params)
    for number in range(5):
        state = jax.tree.map(lambda x: x[number], states)  # noqa: B023
        alone = step(env)(keys[number], state, slates[number], params)
        nearly_equal(jax.tree.map(lambda x: x[number], together), alone)  # noqa: B023


def test_environments_of_equal_sizes_are_one_program(small):
    env, params = small
    other_env, other_params = gemsjax.make("diffuse_topdown", influence=0.3, **SMALL)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), params, other_params)

    def two_turns(env, params):
        _, state = env.reset(KEY, params)
        for _ in range(2):
            observation, state, *_, info = env.step(KEY, state, jnp.full(4, -1), params)
        return observation, state, info

    together = jax.jit(jax.vmap(partial(two_turns, env)))(both)
    nearly_equal(jax.tree.map(lambda x: x[0], together), jax.jit(partial(two_turns, env))(params))
    nearly_equal(jax.tree.map(lambda x: x[1], together), jax.jit(partial(two_turns, other_env))(other_params))


def test_a_step_is_its_public_parts(small, user):
    env, params = small
    slate = jnp.array([7, -1, 30, -1])
    observation, state, *_ = step(env)(KEY, user, slate, params)
    probability = jax.jit(env.click_probabilities)(user, slate, params)
    np.testing.assert_array_equal(observation.clicks, jax.random.uniform(KEY, (env.draws,)) < probability)
    nearly_equal(state, jax.jit(env.transition)(user, slate, observation.clicks, params))


def test_minus_one_is_the_oracles_item_of_that_rank(small, user):
    env, params = small
    bored = user.replace(bored=jnp.arange(10) < 5)
    interest = np.asarray(user.user_embedding) * (np.arange(20) >= 10)
    best = np.argsort(-np.asarray(params.item_embeddings) @ interest, kind="stable")[:4]
    for asked in ([-1, -1, -1, -1], [-1, 8, -1, 9], [8, 9, 8, 9]):
        shown = step(env)(KEY, bored, jnp.array(asked), params)[0].slate
        np.testing.assert_array_equal(shown, np.where(np.array(asked) == -1, best, asked))


def test_numbers_outside_the_catalogue_are_flagged_and_never_clicked(small, user):
    env, params = small
    slate = jnp.array([60, -2, 3, 2**31 - 1])
    shown, state, reward, *_, info = jax.jit(env.play)(jnp.zeros(4), user, slate, params)
    np.testing.assert_array_equal(shown.clicks, [False, False, True, False])
    np.testing.assert_array_equal(info["click_probabilities"] > 0, [False, False, True, False])
    assert info["invalid_action"] and reward == 1 and bool(jnp.isfinite(state.user_embedding).all())
    # Recorded clicks on such slots change nothing either.
    everything_equal(jax.jit(env.transition)(user, slate, jnp.ones(4, bool), params), state)
    assert not step(env)(KEY, user, jnp.array([0, -1, 59, 0]), params)[-1]["invalid_action"]
    shown, *_, info = step(env)(KEY, user, jnp.array([-2, -1, 60, 0]), params)
    assert info["invalid_action"] and shown.slate[jnp.array([0, 2, 3])].tolist() == [-2, 60, 0]


def test_every_copy_of_an_item_can_be_clicked(small, user):
    env, params = small
    copies = jnp.full(4, 11)
    shown, state, reward, *_ = jax.jit(env.play)(jnp.zeros(4), user, copies, params)
    assert reward == 4
    count = (user.clicked_topics == params.item_topics[11]).sum() + 4
    assert (state.clicked_topics == params.item_topics[11]).sum() == count
    # Four slots of one topic are penalised, each by itself.
    appeal = jax.jit(env.click_probabilities)(user, copies, params) / params.examination[:, -1]
    alone = jax.jit(env.click_probabilities)(user, jnp.array([11, 70, 70, 70]), params)[0] / params.examination[0, -1]
    np.testing.assert_allclose(appeal, jnp.full(4, alone / 3), rtol=1e-5)


def test_episodes_are_truncated_at_the_horizon(small, user):
    env, params = small
    ends, state = [], user
    for _ in range(env.horizon):
        _, state, _, terminated, truncated, _ = step(env)(KEY, state, jnp.arange(4), params)
        ends.append(bool(truncated))
        assert not terminated
    assert ends == [False] * 5 + [True]


def test_reset_depends_on_its_key_only(small):
    env, params = small
    reset = jax.jit(env.reset)
    everything_equal(reset(KEY, params), reset(jax.random.key(7), params))
    one, other = reset(KEY, params)[1], reset(jax.random.key(8), params)[1]
    assert not np.array_equal(one.user_embedding, other.user_embedding)
    norms = jnp.linalg.norm(one.user_embedding.reshape(10, 2), axis=1)
    np.testing.assert_allclose(norms.sum(), 1.0, rtol=1e-6)


def test_users_of_unit_norm_stay_so_and_point_where_the_others_do():
    published, params = gemsjax.make("focused_topdown", **SMALL)
    unit, same = gemsjax.make("focused_topdown", user_norm="unit", **SMALL)
    everything_equal(params, same)
    user, other = (jax.jit(env.reset)(KEY, params)[1].user_embedding for env in (published, unit))
    np.testing.assert_allclose(other, user / np.linalg.norm(user), rtol=1e-5)
    state = jax.jit(unit.reset)(KEY, params)[1]
    after = jax.jit(unit.transition)(state, jnp.array([3, 8, 3, 1]), jnp.array([True, False, True, True]), params)
    expected = np.asarray(state.user_embedding, np.float64)
    for item in (3, 3, 1):
        expected = 0.9 * expected + 0.1 * np.asarray(params.item_embeddings[item], np.float64)
        expected /= np.linalg.norm(expected)
    np.testing.assert_allclose(after.user_embedding, expected, rtol=1e-5)


@pytest.mark.parametrize(("memory", "bored"), [(3, False), (6, False), (8, True), (25, True)])
def test_the_queues_hold_as_many_clicks_as_they_are_told(memory, bored):
    env, params = gemsjax.make("steady_topdown", memory=memory, **SMALL)
    state = env.initial_state(jnp.full(20, 0.1), jnp.zeros(4, bool), params)
    topics, everything = [], jnp.ones(4, bool)
    for slate in ([7, 7, 7, 2], [7, 7, 9, 7], [1, 2, 3, 4]):
        state = jax.jit(env.transition)(state, jnp.array(slate), everything, params)
        topics += np.asarray(params.item_topics)[slate].tolist()
        held = topics[-memory:]
        assert state.clicked_topics.tolist() == held + [-1] * (memory - len(held))
        assert state.clicked_topics_length == state.click_times_length == len(held)
    # Six clicks on one topic in two turns; the last six of these turns' clicks hold four. Five are too many.
    assert [max(held.count(topic) for topic in held) for held in (topics[:8], topics[2:8])] == [6, 4]
    assert bool(state.bored.any()) is bored


def test_slates_without_a_flag_are_refused_on_the_host_and_pass_when_traced(small, user):
    env, params = small
    wrong, clicks = jnp.array([60, 1, 2, 3]), jnp.ones(4, bool)
    for refused in (
        lambda slate: env.click_probabilities(user, slate, params),
        lambda slate: env.transition(user, slate, clicks, params),
    ):
        with pytest.raises(DataError, match=r"60 at position \(0,\); item numbers go from 0 to 59"):
            refused(wrong)
        with pytest.raises(DataError, match=r"slate_size = 4"):
            refused([0, 1, 2])
        nearly_equal(refused([7, -1, 30, -1]), jax.jit(refused)(jnp.array([7, -1, 30, -1])))
        jax.jit(refused)(wrong)  # traced: nothing is known
        jax.vmap(refused)(wrong[None])
    assert env.step(KEY, user, wrong, params)[-1]["invalid_action"]  # a step has a flag, compiled or not


def test_without_influence_users_keep_their_taste():
    env, params = gemsjax.make("steady_topdown", **SMALL)
    _, state = jax.jit(env.reset)(KEY, params)
    after = jax.jit(env.transition)(state, jnp.arange(4), jnp.ones(4, bool), params)
    np.testing.assert_allclose(after.user_embedding, state.user_embedding, atol=1e-7)


@pytest.mark.parametrize(
    "settings",
    [{}, {"user_noise": 1.5, "user_focus": 1.0}, {"user_noise": 0.6, "user_clip": 0.3}],
    ids=["published", "wide", "clipped"],
)
def test_users_follow_the_published_process(settings):
    env, params = gemsjax.make("focused_topdown", **SMALL, **settings)
    _, states = jax.jit(jax.vmap(env.reset, in_axes=(0, None)))(jax.random.split(KEY, 5000), params)
    random, noise, focus = np.random.default_rng(0), settings.get("user_noise", 0.4), float(params.user_focus)
    clip = settings.get("user_clip", 1.0)
    expected = np.abs(np.clip(noise * random.normal(size=(5000, 10, 2)), -clip, clip))
    expected *= random.uniform(size=(5000, 10, 1)) ** focus  # the weights' own sum goes in the normalisation
    expected /= np.linalg.norm(expected, axis=2).sum(axis=1)[:, None, None]
    drawn = np.asarray(states.user_embedding, np.float64).reshape(5000, 10, 2)
    for users_number in (lambda users: np.linalg.norm(users, axis=2).max(axis=1), lambda users: users[:, 3, 1]):
        assert stats.ks_2samp(users_number(drawn), users_number(expected)).pvalue > 1e-4
    # Rounded: clipping piles users up at 45 degrees, where float32 and float64 differ in the last digits.
    angles = [np.arctan2(users[:, 7, 0], users[:, 7, 1]).round(5) for users in (drawn, expected)]
    assert stats.ks_2samp(*angles).pvalue > 1e-4


# -- the user browsing model -------------------------------------------------------------------------------------------


def browsing_table(K=4):
    return np.random.default_rng(3).uniform(0.1, 1.0, (K, K + 1)).astype(np.float32)


def pattern_probabilities(attractiveness, table):
    """Probability of each of the 2^K click patterns, by definition."""
    K = len(attractiveness)
    probabilities = {}
    for pattern in itertools.product((False, True), repeat=K):
        probability, latest = 1.0, K
        for rank, clicked in enumerate(pattern):
            chance = attractiveness[rank] * table[rank, latest]
            probability *= chance if clicked else 1.0 - chance
            latest = rank if clicked else latest
        probabilities[pattern] = probability
    return probabilities


def test_browsing_marginals_equal_the_sum_over_patterns():
    attractiveness, table = np.array([0.9, 0.2, 0.7, 0.5], np.float32), browsing_table()
    patterns = pattern_probabilities(attractiveness, table)
    expected = [sum(p for pattern, p in patterns.items() if pattern[rank]) for rank in range(4)]
    got = clicks.click_probabilities(jnp.asarray(attractiveness), jnp.asarray(table), independent=False)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_browsing_clicks_follow_their_joint_distribution():
    attractiveness, table = np.array([0.9, 0.2, 0.7, 0.5], np.float32), browsing_table()
    uniforms = jax.random.uniform(KEY, (40_000, 4))
    drawn = jax.jit(jax.vmap(lambda u: clicks.sample_clicks(u, jnp.asarray(attractiveness), jnp.asarray(table), False)))
    counts = np.bincount(np.asarray(drawn(uniforms)) @ [8, 4, 2, 1], minlength=16)
    expected = 40_000 * np.array(list(pattern_probabilities(attractiveness, table).values()))
    # 15 degrees of freedom: 44.3 is exceeded once in ten thousand.
    assert ((counts - expected) ** 2 / expected).sum() < 44.3


def test_a_table_with_equal_columns_is_the_same_with_and_without_the_recursion():
    table = jnp.asarray(clicks.examination_table("mix", 5))
    attractiveness, uniforms = jax.random.uniform(KEY, (5,)), jax.random.uniform(jax.random.key(1), (5,))
    for function in (clicks.click_probabilities, partial(clicks.sample_clicks, uniforms)):
        np.testing.assert_allclose(function(attractiveness, table, True), function(attractiveness, table, False))


def test_an_environment_with_a_browsing_table_replays_its_own_clicks():
    env, params = gemsjax.make("focused_topdown", examination=browsing_table(), **SMALL)
    assert not env.independent_clicks
    _, state = jax.jit(env.reset)(KEY, params)
    shown, after, *_ = step(env)(KEY, state, jnp.full(4, -1), params)
    nearly_equal(after, jax.jit(env.transition)(state, shown.slate, shown.clicks, params))


# -- rollouts ----------------------------------------------------------------------------------------------------------


def test_a_rollout_equals_stepping_by_hand(small):
    env, params = small
    policy = make_epsilon_greedy_oracle(Dims(60, 4, 6))
    users = jax.random.split(KEY, 3)
    played = jax.jit(lambda users: rollout(env, policy, users, params, NOBODY, lambda turn: (turn.shown, turn.reward)))
    (shown, rewards), final = played(users)
    for number, key in enumerate(users):
        observation, state = jax.jit(env.reset)(turn_key(key, RESET), params)
        for turn in range(env.horizon):
            its_key = turn_key(key, turn)
            choice, _ = policy.act(NOBODY, (), observation, None, turn_numbers(env, policy, its_key)[1])
            observation, state, reward, *_ = step(env)(its_key, state, choice.slate, params)
            everything_equal(observation, jax.tree.map(lambda x: x[turn, number], shown))  # noqa: B023
            assert reward == rewards[turn, number]
        everything_equal(observation, jax.tree.map(lambda x: x[number], final))  # noqa: B023


def test_no_two_draws_of_a_user_share_a_key():
    user_keys = jax.random.split(KEY, 3)
    used = [turn_key(user, turn) for user in user_keys for turn in [*range(5), RESET]]
    assert len({np.asarray(jax.random.key_data(key)).tobytes() for key in [*used, *user_keys]}) == 3 * (5 + 2)


def test_users_have_the_same_luck_whatever_the_policy_draws(small):
    env, _ = small
    for policy in (make_random(Dims(60, 4, 6)), make_epsilon_greedy_oracle(Dims(60, 4, 6))):
        luck, own = turn_numbers(env, policy, KEY)
        np.testing.assert_array_equal(luck, jax.random.uniform(KEY, (env.draws,)))
        assert own.shape == (policy.draws,)
        assert not np.isin(own, luck).any()


def primitives_outside_cond(jaxpr):
    """Names of all operations that always run: those not inside a branch."""
    names = set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        if equation.primitive.name == "cond":
            continue
        for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                names |= primitives_outside_cond(inner)
    return names


def test_the_catalogue_is_scored_only_if_some_slate_asks(small, user):
    env, params = small

    def one(user, slate, params):
        return env.resolve(user, slate, params)

    batched = jax.vmap(jax.vmap(one, in_axes=(0, None, None)), in_axes=(0, 0, 0))
    users = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, 3, *x.shape)), user)
    params_of_runs = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    names = primitives_outside_cond(jax.make_jaxpr(batched)(users, jnp.zeros((2, 4), jnp.int32), params_of_runs).jaxpr)
    assert "cond" in names and "top_k" not in names

    for make_policy, asks in ((make_epsilon_greedy_oracle, True), (make_random, False)):
        policy = make_policy(Dims(60, 4, 6))
        traced = jax.make_jaxpr(lambda keys: rollout(env, policy, keys, params, NOBODY))(jax.random.split(KEY, 2))  # noqa: B023
        assert ("cond" in primitives_outside_cond(traced.jaxpr)) is asks
        assert "top_k" not in primitives_outside_cond(traced.jaxpr)
        assert ("top_k" in str(traced)) is asks
