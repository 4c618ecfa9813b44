"""Advantages and losses of on-policy learning: recorded numbers, one recursion a user, what is no number, masks."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemsjax.errors import SettingError
from gemsjax.maths import policy_gradient as pg
from gemsjax.maths.categorical import log_probability_and_entropy
from gemsjax.maths.optimise import clip_by_norm
from gemsjax.maths.returns import ESTIMATORS, advantages, following, return_to_go

GOLDEN = json.loads((Path(__file__).parent / "golden" / "recsys_rl_examples.json").read_text())
GAE = GOLDEN["gae"]
NOT_DONE, DONE = np.zeros(3, bool), np.array([False, True, False])
TRUE = np.ones(3, bool)


def recorded(done, how="gae"):
    reward, value = (np.array(GAE[name], np.float32) for name in ("rewards", "values"))
    then = following(jnp.array(value), jnp.float32(GAE["last_value"]))
    return advantages(jnp.array(reward), jnp.array(value), then, done, done, GAE["gamma"], GAE["lam"], how)


@pytest.mark.parametrize(
    ("case", "done", "how"),
    [
        ("ppo_no_done", NOT_DONE, "gae"),
        ("ppo_done_t1", DONE, "gae"),
        ("a2c_as_coded_no_done", NOT_DONE, "last_value"),
        ("a2c_as_coded_done_t1", DONE, "last_value"),
    ],
)
def test_recorded_advantages(case, done, how):
    found = recorded(done, how)
    np.testing.assert_allclose(found.advantage, GAE[case]["adv"], atol=1e-6)
    np.testing.assert_allclose(found.target, GAE[case]["ret"], atol=1e-6)


def test_recorded_nstep_returns():
    np.testing.assert_allclose(recorded(NOT_DONE, "nstep").target, GAE["nstep_return"], atol=1e-6)


def random_rollout(turns=12, envs=3):
    rng = np.random.default_rng(0)
    reward, value, after = (jnp.array(rng.normal(size=(turns, envs)), jnp.float32) for _ in range(3))
    ends = jnp.array(rng.random((turns, envs)) < 0.2)
    return reward, value, after, ends & jnp.array(rng.random((turns, envs)) < 0.5), ends


@pytest.mark.parametrize("how", [how for how in ESTIMATORS if how != "interleaved"])
def test_every_environment_has_its_own_recursion(how):
    """Alone or beside others, the same; and what comes after an episode's end enters nothing before it."""
    rollout = random_rollout()
    together = advantages(*rollout, 0.99, 0.95, how)
    for env in range(3):
        alone = advantages(*(x[:, env] for x in rollout), 0.99, 0.95, how)
        np.testing.assert_allclose(alone.advantage, together.advantage[:, env], atol=1e-6)
    if how != "last_value":
        reward, value, after, terminal, ends = rollout
        end = int(np.flatnonzero(ends[:, 0])[0])
        other = advantages(reward.at[end + 1 :, 0].add(5.0), value, after, terminal, ends, 0.99, 0.95, how)
        np.testing.assert_array_equal(other.advantage[: end + 1], together.advantage[: end + 1])


def test_an_end_that_is_not_terminal_bootstraps():
    reward, value, after = jnp.ones(2), jnp.zeros(2), jnp.array([0.0, 3.0])
    ends = jnp.array([False, True])
    cut = advantages(reward, value, after, jnp.zeros(2, bool), ends, 0.5, 1.0)
    terminal = advantages(reward, value, after, ends, ends, 0.5, 1.0)
    np.testing.assert_allclose(cut.target, [1 + 0.5 * 2.5, 2.5])
    np.testing.assert_allclose(terminal.target, [1.5, 1.0])


def test_whole_episodes_at_lambda_one_are_returns_to_go():
    reward, value, *_ = random_rollout()
    last = jnp.zeros_like(reward, bool).at[-1].set(True)
    found = advantages(reward, value, following(value, value[-1]), last, last, 0.9, how="nstep")
    np.testing.assert_allclose(found.target, return_to_go(reward, 0.9), atol=1e-5)


def test_interleaved_is_one_course_through_all_environments():
    """The published slip: the recursion goes from environment to environment and ends with the mean last value."""
    reward, value, after, terminal, ends = random_rollout()
    found = advantages(reward, value, after, terminal, ends, 0.99, 0.95, "interleaved").advantage.reshape(-1)
    r, v, done = (np.asarray(x).reshape(-1) for x in (reward, value, terminal))
    cut, then, later = np.asarray(ends).reshape(-1), float(after[-1].mean()), 0.0
    expected = np.zeros(r.size)
    for t in reversed(range(r.size)):
        later = r[t] + 0.99 * (0.0 if done[t] else then) - v[t] + 0.99 * 0.95 * (0.0 if cut[t] else later)
        expected[t], then = later, v[t]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(SettingError, match="environments"):
        advantages(reward[:, 0], value[:, 0], after[:, 0], terminal[:, 0], ends[:, 0], 0.99, 0.95, "interleaved")


@pytest.mark.parametrize("how", ESTIMATORS)
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_reward_that_is_no_number_is_not_learnt_from(how, broken):
    reward, value, after, terminal, ends = random_rollout()
    terminal, ends = terminal.at[:, 1].set(False), ends.at[:, 1].set(False)
    after = following(value, after[-1])
    run = jax.jit(lambda reward: advantages(reward, value, after, terminal, ends, 0.99, 0.95, how))
    found, other = run(reward.at[5, 1].set(broken)), run(reward.at[5, 1].set(np.nan).at[6:, 1].add(2.0))
    assert np.isfinite(found.advantage).all() and np.isfinite(found.target).all()
    assert found.advantage[5, 1] == 0.0 and not found.valid[5, 1] and found.valid.sum() == found.valid.size - 1
    if how in ("gae", "nstep"):  # the turn before bootstraps from the value, whatever came later
        expected = reward[4, 1] + 0.99 * value[5, 1] - value[4, 1]
        assert float(found.advantage[4, 1]) == pytest.approx(float(expected), abs=1e-5)
        np.testing.assert_array_equal(found.advantage[:6, 1], other.advantage[:6, 1])
        np.testing.assert_array_equal(found.advantage[:, 0], run(reward).advantage[:, 0])


def test_an_unknown_estimator_is_refused():
    with pytest.raises(SettingError, match="did you mean 'nstep'"):
        recorded(NOT_DONE, "nsteps")


# -- losses ------------------------------------------------------------------------------------------------------------


def test_recorded_clipped_surrogate():
    golden = GOLDEN["ppo_policy_loss"]
    new, old, advantage = (jnp.array(golden[name], jnp.float32) for name in ("new_probs", "old_probs", "adv"))
    loss, _ = pg.clipped_surrogate(jnp.log(new), jnp.log(old), advantage, TRUE, golden["clip"])
    assert float(loss) == pytest.approx(golden["expected"], abs=1e-6)
    _, outside = pg.clipped_surrogate(jnp.log(new), jnp.log(old), advantage, TRUE, 0.3)
    assert float(outside) == pytest.approx(2 / 3)  # 1.2 is within


def test_nothing_pulls_beyond_the_clip():
    slope = jax.grad(lambda x, a: pg.clipped_surrogate(x[None], jnp.zeros(1), a[None], np.ones(1, bool), 0.2)[0])
    for ratio, advantage, moves in ((1.3, 1.0, False), (1.3, -1.0, True), (0.7, 1.0, True), (0.7, -1.0, False)):
        assert (float(slope(jnp.log(ratio), jnp.float32(advantage))) != 0.0) == moves


def test_normalisation_uses_n_minus_one():
    x = np.array([1.0, 2.0, 4.0, 9.0], np.float32)
    np.testing.assert_allclose(pg.normalised(jnp.array(x), np.ones(4, bool)), (x - x.mean()) / x.std(ddof=1), rtol=1e-6)
    assert float(pg.normalised(jnp.ones(1), np.ones(1, bool))[0]) == 0.0


def losses(log_prob, old, advantage, value, target, valid):
    normal = pg.normalised(advantage, valid)
    surrogate, _ = pg.clipped_surrogate(log_prob, old, normal, valid, 0.2)
    return surrogate + pg.policy_gradient(log_prob, normal, valid) + pg.value_error(value, target, valid)


def test_padding_changes_no_loss_and_no_gradient():
    rng = np.random.default_rng(1)
    columns = [jnp.array(rng.normal(size=6), jnp.float32) for _ in range(5)]
    both = jax.jit(jax.value_and_grad(losses, argnums=(0, 3)))
    loss, gradients = both(*columns, np.ones(6, bool))
    for fill in (0.0, np.nan, np.inf):
        padded = [jnp.concatenate([x, jnp.full(3, fill)]) for x in columns]
        other, padded_gradients = both(*padded, np.arange(9) < 6)
        assert float(other) == pytest.approx(float(loss), rel=1e-5)
        for one, two in zip(gradients, padded_gradients, strict=True):
            np.testing.assert_allclose(two, np.concatenate([one, np.zeros(3)]), atol=1e-6)


def test_nothing_valid_is_no_loss():
    columns = [jnp.full(4, x) for x in (np.nan, -np.inf, np.nan, 1.0, np.inf)]
    loss, gradients = jax.value_and_grad(losses, argnums=(0, 3))(*columns, np.zeros(4, bool))
    assert float(loss) == 0.0 and all(not g.any() for g in gradients)


def test_a_bad_action_that_has_become_likely_is_pulled_back_however_likely_it_is():
    slope = jax.jit(
        jax.grad(lambda x, a: pg.clipped_surrogate(x[None], jnp.zeros(1), a[None], np.ones(1, bool), 0.2)[0])
    )
    for difference in (5.0, 20.0, 25.0, 1e6):
        assert float(slope(jnp.float32(difference), jnp.float32(-1.0))) >= np.exp(5.0) - 1.0
        assert float(slope(jnp.float32(difference), jnp.float32(1.0))) == 0.0
    assert all(np.isfinite(slope(jnp.float32(-x), a)) for x in (25.0, 1e6) for a in (jnp.float32(1.0), jnp.float32(-1)))


def test_ratios_do_not_overflow():
    far = jnp.array([500.0, -500.0])
    loss, gradient = jax.value_and_grad(lambda x: pg.clipped_surrogate(x, -x, -jnp.ones(2), np.ones(2, bool), 0.2)[0])(
        far
    )
    assert np.isfinite(loss) and np.isfinite(gradient).all()


def test_entropy_of_a_softmax_with_items_that_are_not_there():
    logits = jnp.array([0.0, 0.0, -jnp.inf])
    (log_prob, entropy), gradient = (
        log_probability_and_entropy(logits, jnp.int32(1)),
        jax.grad(lambda x: log_probability_and_entropy(x, jnp.int32(1))[1])(jnp.array([0.5, 0.0, -1e9])),
    )
    assert float(log_prob) == pytest.approx(-np.log(2)) and float(entropy) == pytest.approx(np.log(2))
    assert np.isfinite(gradient).all()


def test_gradients_are_scaled_to_a_global_norm():
    tree = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    clipped, norm = clip_by_norm(tree, 0.5)
    assert float(norm) == 5.0
    np.testing.assert_allclose([clipped["a"][0], clipped["b"][0]], [0.3, 0.4], rtol=1e-5)
    same, _ = clip_by_norm(tree, 100.0)
    np.testing.assert_array_equal(same["a"], tree["a"])
