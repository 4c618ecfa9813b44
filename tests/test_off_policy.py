"""Off-policy REINFORCE: recorded numbers, what the equations promise, bandits whose limits are known."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemsjax.belief import make_cfn
from gemsjax.maths import off_policy
from gemsjax.maths.off_policy import Correction
from gemsjax.maths.returns import return_to_go
from gemsjax.offline import bandits
from gemsjax.types import Dims, Observation

GOLDEN = json.loads((Path(__file__).parent / "golden" / "recnn_examples.json").read_text())
LOSSES = GOLDEN["losses"]
PI, BETA = (np.array(LOSSES[name], np.float32) for name in ("pi", "beta"))


@partial(jax.jit, static_argnums=4)
def loss_and_gradient(log_pi, log_beta, advantage, mask, correction):
    """The loss as a function of the log-probabilities, and its gradient."""

    def loss(log_pi):
        found = off_policy.weights(log_pi, log_beta, mask, correction)
        return off_policy.policy_loss(log_pi, advantage, mask, found, correction)

    return jax.value_and_grad(loss)(log_pi)


# -- recorded numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("set_size", [2, 10, 16])
def test_lambda(set_size):
    found = off_policy.lambda_k(jnp.log(jnp.array(GOLDEN["lambda_K"]["pi"])), set_size)
    np.testing.assert_allclose(found, GOLDEN["lambda_K"][f"K{set_size}"], atol=2e-6, rtol=1e-5)


def test_lambda_at_its_limits():
    log_pi = jnp.array([-np.inf, -1e-9, 0.0])
    np.testing.assert_allclose(off_policy.lambda_k(log_pi, 10), [10.0, 0.0, 0.0], atol=1e-6)
    np.testing.assert_array_equal(off_policy.lambda_k(log_pi, 1), np.ones(3))


def test_returns():
    about = GOLDEN["returns"]
    found = return_to_go(jnp.array(about["rewards"], jnp.float32), about["gamma"])
    np.testing.assert_allclose(found, about["returns"], rtol=1e-6)
    np.testing.assert_allclose(off_policy.standardised(found), about["normalised_ddof1_eps1e4"], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "correction"),
    [
        ("basic", Correction("none")),
        ("corrected", Correction("first_order")),
        ("topk", Correction("topk", 10)),
        ("topk_cap3", Correction("topk", 10, cap=3.0)),
    ],
)
def test_losses(name, correction):
    advantage = jnp.array(GOLDEN["returns"]["normalised_ddof1_eps1e4"], jnp.float32)[:, None] * jnp.ones((1, 2))
    correction = correction._replace(reduction="sum")
    loss, _ = loss_and_gradient(jnp.log(PI), jnp.log(BETA), advantage, jnp.ones((3, 2)), correction)
    np.testing.assert_allclose(loss, LOSSES[name], atol=1e-4)


def test_weights():
    ones = jnp.ones((3, 2))
    found = off_policy.weights(jnp.log(PI), jnp.log(BETA), ones, Correction("topk", 10))
    np.testing.assert_allclose(found.ratio, LOSSES["ratio"], rtol=1e-5)
    np.testing.assert_allclose(found.top_k, LOSSES["lambda_k"], rtol=1e-4)
    found = off_policy.weights(jnp.log(PI), jnp.log(BETA), ones, Correction("first_order", normalise=True))
    np.testing.assert_allclose(found.ratio, LOSSES["nis_weights"], atol=1e-6)


@pytest.mark.parametrize("kind", ["first_order", "topk"])
def test_nothing_flows_through_the_weights(kind):
    """Where it does, the coefficient has the recorded, wrong factor; ours is the one of the equation."""
    about = GOLDEN["missing_stop_gradient"]
    log_pi, set_size = jnp.log(jnp.array(about["pi"])), 1 if kind == "first_order" else 10
    log_beta = jnp.log(jnp.full(4, 0.1))

    def without(log_pi):
        return -(off_policy.lambda_k(log_pi, set_size) * jnp.exp(log_pi - log_beta) * log_pi).sum()

    right = -off_policy.lambda_k(log_pi, set_size) * jnp.exp(log_pi - log_beta)
    wrong = about["corrected_ratio" if kind == "first_order" else "topk10_ratio"]
    np.testing.assert_allclose(jax.grad(without)(log_pi) / right, wrong, rtol=1e-3)
    correction = Correction(kind, set_size, reduction="sum")
    _, gradient = loss_and_gradient(log_pi, log_beta, jnp.ones(4), jnp.ones(4), correction)
    np.testing.assert_allclose(gradient, right, rtol=1e-5)


# -- what the equations promise ----------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.booleans())
def test_one_draw_is_the_first_order_correction(seed, normalise):
    log_pi, log_beta, advantage = np.random.default_rng(seed).normal(size=(3, 7)).astype(np.float32)
    log_pi, log_beta = (x - np.log(np.exp(x).sum()) for x in (log_pi, log_beta))
    one, first = (
        loss_and_gradient(log_pi, log_beta, advantage, jnp.ones(7), Correction(kind, 1, 5.0, normalise))
        for kind in ("topk", "first_order")
    )
    np.testing.assert_array_equal(one[0], first[0])
    np.testing.assert_array_equal(one[1], first[1])


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("reduction", off_policy.REDUCTIONS)
def test_padding_changes_nothing_whatever_it_holds(normalise, reduction):
    correction = Correction("topk", 4, 3.0, normalise, reduction)
    log_pi, log_beta = jnp.log(PI).ravel(), jnp.log(BETA).ravel()
    advantage = jnp.arange(6.0)
    loss, gradient = loss_and_gradient(log_pi, log_beta, advantage, jnp.ones(6), correction)
    junk = jnp.array([-np.inf, np.nan, 3.0])
    padded = loss_and_gradient(
        *(jnp.concatenate([x, junk]) for x in (log_pi, log_beta, advantage)),
        jnp.r_[jnp.ones(6), jnp.zeros(3)],
        correction,
    )
    np.testing.assert_allclose(padded[0], loss, rtol=1e-6)
    np.testing.assert_allclose(padded[1], jnp.r_[gradient, jnp.zeros(3)], rtol=1e-6)
    nothing, flat = loss_and_gradient(junk, junk, junk, jnp.zeros(3), correction)
    assert nothing == 0.0 and not flat.any()


def test_weights_do_not_overflow():
    found = off_policy.importance_ratio(jnp.zeros(2), jnp.array([-1e4, -np.inf]), 20.0)
    np.testing.assert_allclose(found, 20.0, rtol=1e-6)


INFINITE = {"log_pi": [0.0, -0.5, -2.0, -np.inf], "log_beta": [-np.inf, -1e4, -1.0, -np.inf]}


@pytest.mark.parametrize("kind", ["first_order", "topk", "set_ratio"])
@pytest.mark.parametrize("normalise", [False, True])
def test_weights_without_a_cap_stay_finite(kind, normalise):
    """Ratios that overflow, infinite ones, and 0 / 0: no NaN in weights, loss or gradient."""
    log_pi, log_beta = (jnp.array(INFINITE[name]) for name in ("log_pi", "log_beta"))
    correction = Correction(kind, 4, None, normalise)
    found = off_policy.weights(log_pi, log_beta, jnp.ones(4), correction)
    assert np.isfinite(found.ratio).all() and found.ratio[3] <= off_policy.LEAST_SET_RATIO
    if normalise:
        np.testing.assert_allclose(found.ratio.sum(), 1.0, rtol=1e-6)
        np.testing.assert_allclose(found.ratio, [1.0, 0.0, 0.0, 0.0], atol=1e-6)  # infinitely more than the others
    loss, gradient = loss_and_gradient(log_pi[:3], log_beta[:3], jnp.ones(3), jnp.ones(3), correction)
    assert np.isfinite(loss) and np.isfinite(gradient).all()


def test_normalised_weights_of_ratios_that_vanish_or_are_infinite_together():
    log_pi, mask = jnp.array([-1.0, -2.0, 5.0]), jnp.array([1.0, 1.0, 0.0])
    correction = Correction("first_order", normalise=True)
    small = off_policy.weights(log_pi - 500.0, jnp.zeros(3), mask, correction).ratio
    np.testing.assert_allclose(small, [*np.exp([0.0, -1.0]) / (1 + np.exp(-1.0)), 0.0], rtol=1e-5)
    both = off_policy.weights(log_pi, jnp.full(3, -np.inf), mask, correction).ratio
    np.testing.assert_allclose(both, [0.5, 0.5, 0.0])
    assert not off_policy.weights(jnp.full(3, -np.inf), jnp.zeros(3), mask, correction).ratio.any()
    capped = Correction("first_order", cap=2.0, normalise=True)
    np.testing.assert_allclose(off_policy.weights(log_pi + 9.0, jnp.zeros(3), mask, capped).ratio, [0.5, 0.5, 0.0])


def test_the_share_that_counts_in_effect():
    share, mask = jax.jit(off_policy.effective_share), jnp.array([1.0, 1.0, 1.0, 0.0])
    np.testing.assert_allclose(share(jnp.array([1.0, 2.0, 3.0, 9.0]), mask), 36 / 3 / 14, rtol=1e-6)
    np.testing.assert_allclose(share(jnp.array([1e30, 2e30, 3e30, np.inf]), mask), 36 / 3 / 14, rtol=1e-6)
    np.testing.assert_allclose(share(jnp.array([1e30, 0.0, 1.0, 1.0]), mask), 1 / 3, rtol=1e-6)
    assert share(jnp.zeros(4), mask) == 0.0 == share(jnp.ones(4), mask * 0.0)


def test_set_ratios():
    """alpha / beta of K draws, between the floor and the cap, without overflow at either end."""
    log_pi, log_beta = jnp.log(PI), jnp.log(BETA)
    ratio = jax.jit(off_policy.set_ratio, static_argnums=2)
    expected = (1 - (1 - PI.astype(float)) ** 10) / BETA
    np.testing.assert_allclose(ratio(log_pi, log_beta, 10, 1e9), expected, rtol=1e-5)
    np.testing.assert_allclose(ratio(log_pi, log_beta, 10, 10.0), np.minimum(expected, 10.0), rtol=1e-5)
    np.testing.assert_allclose(ratio(log_pi, log_beta, 1, 1e9), PI / BETA, rtol=1e-5)
    ends = ratio(jnp.array([-np.inf, -1e4, 0.0, 0.0, -30.0]), jnp.array([-1.0, -1.0, 0.0, -1e4, -27.0]), 10, 10.0)
    np.testing.assert_allclose(ends, [1e-3, 1e-3, 1.0, 10.0, 10 * np.exp(-3.0)], rtol=1e-4)
    correction = Correction("set_ratio", 10, 10.0, reduction="sum")
    loss, gradient = loss_and_gradient(log_pi, log_beta, jnp.ones((3, 2)), jnp.ones((3, 2)), correction)
    np.testing.assert_allclose(gradient, -np.minimum(expected, 10.0), rtol=1e-5)  # constants, and lambda left out
    np.testing.assert_allclose(loss, -(np.minimum(expected, 10.0) * np.log(PI)).sum(), rtol=1e-5)


def test_the_running_sum_of_weights():
    """Starts at the first batch, moves by a hundredth, and a batch without weights leaves it as it is."""
    told, sums = [], jnp.float32(0.0)
    for total in (0.0, 8.0, 0.0, 4.0):
        sums = off_policy.running_sum(sums, jnp.float32(total))
        told.append(float(sums))
    np.testing.assert_allclose(told, [0.0, 8.0, 8.0, 8.0 - 0.04], rtol=1e-6)
    found = off_policy.Weights(jnp.ones(2), jnp.ones(2))
    arguments = jnp.log(jnp.array([0.5, 0.25])), jnp.ones(2), jnp.ones(2), found, Correction("none")
    np.testing.assert_allclose(off_policy.policy_loss(*arguments, jnp.float32(4.0)), np.log(8.0) / 4, rtol=1e-6)
    np.testing.assert_allclose(off_policy.policy_loss(*arguments, jnp.float32(0.0)), np.log(8.0), rtol=1e-6)


def test_standardised_returns_of_some():
    about = GOLDEN["returns"]
    values = jnp.array([[*about["returns"][:2], np.nan], [np.inf, about["returns"][2], 5.0]], jnp.float32)
    mask = jnp.array([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    found = jax.jit(off_policy.masked_standardised)(values, mask)
    np.testing.assert_allclose(found[mask > 0], about["normalised_ddof1_eps1e4"], atol=1e-5)
    assert (found[mask == 0] == 0.0).all()
    for few in (mask * 0.0, mask.at[0].set(0.0)):  # none, and a single one
        assert (off_policy.masked_standardised(values, few) == 0.0).all()


@pytest.mark.parametrize("name", bandits.known())
def test_bandits_converge_to_their_limits(name):
    bandit = bandits.known()[name]
    assert np.abs(bandits.learn(bandit) - bandit.limit).max() < 2e-3
    recorded = GOLDEN["bandit_fixed_points"]["naive_pi"]
    np.testing.assert_allclose(bandits.known()["none"].limit, recorded, atol=1e-6)


def test_no_correction_of_a_log_is_not_the_best_arm():
    """What the corrections are for: the same rewards and log, with and without."""
    known = bandits.known()
    naive = bandits.learn(known["none"]._replace(reward=known["topk"].reward, behaviour=known["none"].behaviour))
    assert naive.max() < 0.5


# -- softmax over items, serving ---------------------------------------------------------------------------------------


def test_a_sampled_softmax_is_the_full_one_if_the_sample_is_the_catalogue():
    keys = jax.random.split(jax.random.key(0), 3)
    queries, items = jax.random.normal(keys[0], (5, 4)), jax.random.normal(keys[1], (9, 4))
    chosen = jax.random.randint(keys[2], (5, 3), 0, 9)

    @jax.jit
    def both(queries, items, chosen):
        logits = queries @ items.T
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        direct = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen, axis=1)
        return off_policy.item_log_probs(queries, items, chosen, normaliser), direct

    full, direct = both(queries, items, chosen)
    np.testing.assert_allclose(full, direct, atol=1e-5)
    sampled = jax.jit(off_policy.sampled_log_probs)(queries, items, chosen, jnp.arange(9))
    np.testing.assert_allclose(sampled, full, atol=1e-5)


def test_a_sampled_softmax_has_no_bias_and_stands_a_sample_without_others():
    keys = jax.random.split(jax.random.key(1), 3)
    query, items, chosen = jax.random.normal(keys[0], (1, 4)), jax.random.normal(keys[1], (50, 4)), jnp.array([[7]])
    negatives = jax.random.randint(keys[2], (4000, 20), 0, 50)
    sampled = jax.jit(jax.vmap(lambda some: off_policy.sampled_log_probs(query, items, chosen, some)))(negatives)
    inverse = np.exp(-np.asarray(sampled, np.float64)).ravel()  # Z / e^l, whose estimate has no bias
    logits = query @ items.T
    exact = float(jnp.exp(jax.nn.logsumexp(logits) - logits[0, 7]))
    assert abs(inverse.mean() - exact) < 4 * inverse.std() / np.sqrt(inverse.size)
    alone = jax.jit(jax.grad(lambda q: off_policy.sampled_log_probs(q, items, chosen, jnp.array([7])).sum()))(query)
    assert np.isfinite(alone).all()


def test_entropy_and_divergence():
    old, new = np.random.default_rng(2).normal(size=(2, 3, 6)).astype(np.float32)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (old, new))
    entropy, log_normaliser = jax.jit(off_policy.entropy_and_log_normaliser)(old)
    divergence = jax.jit(off_policy.kl_divergence)
    np.testing.assert_allclose(entropy, -(p * np.log(p)).sum(-1), atol=1e-5)
    np.testing.assert_allclose(log_normaliser, np.log(np.exp(old).sum(-1)), atol=1e-5)
    np.testing.assert_allclose(divergence(old, new), (p * np.log(p / q)).sum(-1), atol=1e-5)
    np.testing.assert_allclose(divergence(old, old), 0.0, atol=1e-6)


def test_boltzmann_slates():
    """K' certain items first; the next is drawn from the softmax over the rest of the top M; all differ."""
    logits = jnp.array([0.0, 2.0, 1.0, -1.0, 0.5, 3.0, -5.0])
    uniforms = jax.random.uniform(jax.random.key(3), (4000, 5))
    slates = np.asarray(jax.jit(jax.vmap(lambda u: off_policy.boltzmann_slate(logits, u, 3, 1)))(uniforms))
    assert (slates[:, 0] == 5).all()
    assert all(len(set(slate)) == 3 for slate in slates)
    assert set(np.unique(slates)) == {5, 1, 2, 4, 0}  # the five best
    rest = [1, 2, 4, 0]
    expected = np.asarray(jax.nn.softmax(logits[jnp.array(rest)]))
    share = np.array([(slates[:, 1] == item).mean() for item in rest])
    assert np.abs(share - expected).max() < 4 * 0.5 / np.sqrt(4000)
    np.testing.assert_array_equal(off_policy.boltzmann_slate(logits, uniforms[0], 3, 3), [5, 1, 2])
    edges = off_policy.boltzmann_slate(logits, jnp.array([0.0, 0.0, 1.0, 0.0, 1.0]), 3, 0)
    assert len(set(np.asarray(edges).tolist())) == 3


# -- the recurrent state -----------------------------------------------------------------------------------------------


def test_the_chaos_free_cell():
    """One step by hand from its equation, unrolling equal to stepping, empty slots without input."""
    belief = make_cfn(Dims(6, 2, 3), width=4, item_dim=3)
    params = jax.jit(belief.init)(jax.random.key(4))
    slates = jnp.array([[[1, 5]], [[0, -1]], [[3, 3]]])
    seen = Observation(slates, jnp.array([[[True, False]], [[True, False]], [[False, False]]]))
    (states,) = jax.jit(belief.unroll)((params,), seen)
    step = jax.jit(belief.step)
    state = belief.start()
    for turn in range(3):
        state = step(params, state, jax.tree.map(lambda x, turn=turn: np.asarray(x)[turn, 0], seen))
        np.testing.assert_allclose(states[turn, 0], state, atol=1e-6)
    params, before = jax.tree.map(np.asarray, params), np.asarray(states)[0, 0]
    a = np.r_[params["item_embeddings"][0], 1.0, np.zeros(4)]  # the click of slot 0; slot 1 is empty
    inputs = a @ params["input_kernel"]
    gates = 1.0 / (1.0 + np.exp(-(inputs[:8] + params["gate_bias"] + before @ params["recurrent_kernel"])))
    expected = gates[:4] * np.tanh(before) + gates[4:] * np.tanh(inputs[8:])
    np.testing.assert_allclose(states[1, 0], expected, atol=1e-6)
