"""Turns taken block by block, as one core of a CPU prefers: the same values and gradients as in one piece."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemsjax.agents.base import Acting
from gemsjax.agents.sac import SACHypers, SACSpec, make_sac
from gemsjax.agents.td3 import TD3Hypers, TD3Spec, make_td3
from gemsjax.maths.blocks import forward_over_turns, gradients_over_turns, one_core, over_turns
from gemsjax.rankers.items import item_weights, make_topk_ranker
from gemsjax.types import Dims, Episode, Observation

# Of 28 turns four blocks, of the 27 that follow another one three; of the 23 and 4 of a test none.
TURNS, USERS = 28, 40


def numbers(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


def loops(function, *inputs) -> int:
    """Scans in a function's program."""
    return str(jax.make_jaxpr(function)(*inputs)).count("scan[")


def test_only_one_core_works_in_blocks():
    double = lambda x: over_turns(lambda x: 2 * x, x)  # noqa: E731
    x = numbers(TURNS, USERS, 3)
    assert loops(double, x) == 0
    with one_core():
        assert loops(lambda x: double(x), x) == 1
        # Fewer rows than a block, or a number of turns without divisors, stay in one piece.
        assert loops(lambda x: double(x), x[:4]) == loops(lambda x: double(x), x[:23]) == 0
        np.testing.assert_array_equal(double(x), 2 * x)
    assert loops(lambda x: double(x), x) == 0


def test_gradients_are_those_of_one_piece():
    weights, aims = numbers(4, 3), numbers(TURNS, USERS, 3)
    states = numbers(TURNS, USERS, 4), numbers(TURNS, USERS, 3)  # any number of arrays

    def loss(weights, states, aims):
        error = jnp.square(jnp.tanh(states[0] @ weights) * states[1] - aims)
        return error.mean(), {"largest row": error.sum(axis=-1).mean()}

    whole = gradients_over_turns(loss, weights, states, aims)
    with one_core():
        parts = jax.jit(lambda *given: gradients_over_turns(loss, *given))(weights, states, aims)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), parts, whole)


def test_a_forward_pass_and_its_way_back_are_those_of_one_piece():
    weights, states = numbers(4, 3), numbers(TURNS, USERS, 4)
    grads = numbers(TURNS, USERS, 2), numbers(TURNS, USERS, 1)

    def heads(weights, states):  # two arrays
        return tuple(jnp.split(jnp.tanh(states @ weights), [2], axis=-1))

    def both(weights, states, grads):
        outputs, pull = forward_over_turns(heads, weights, states)
        return outputs, pull(grads)

    whole = both(weights, states, grads)
    with one_core():
        parts = jax.jit(lambda *given: both(*given))(weights, states, grads)
        assert loops(lambda *given: both(*given), weights, states, grads) == 2
    assert loops(both, weights, states, grads) == 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), parts, whole)


@pytest.mark.parametrize(("name", "turns"), [("sac", TURNS), ("td3", TURNS), ("sac", 1), ("td3", 1)])
def test_an_update_of_one_core_is_that_of_all(name, turns):
    dims = Dims(30, 4, turns)
    ranker = make_topk_ranker(dims, 5)
    if name == "sac":
        agent, hypers = make_sac(SACSpec(hidden=16), dims, ranker), SACHypers()
    else:  # the actor moves at once, so that its gradients are compared too
        agent, hypers = make_td3(TD3Spec(hidden=16, delay=1), dims, ranker), TD3Hypers()
    hypers = jax.tree.map(jnp.float32, hypers)
    state = agent.init(jax.random.key(0), hypers)
    acting = Acting(state, hypers, item_weights(numbers(30, 5)), False, jnp.int32(5))
    rng = np.random.default_rng(0)
    slates, clicks = rng.integers(0, 30, (USERS, turns, 4), np.int32), rng.random((USERS, turns, 4)) < 0.3
    seen = Observation(jnp.asarray(slates), jnp.asarray(clicks))
    final = jax.tree.map(lambda x: x[:, 0], seen)
    batch = Episode(seen, numbers(USERS, turns, 5), jnp.asarray(clicks.sum(-1), jnp.float32), final)
    noise = agent.draw_update(jax.random.key(1), USERS)
    whole, metrics = jax.jit(agent.update)(acting, batch, noise)
    with one_core():
        update = lambda *given: agent.update(*given)  # noqa: E731
        in_blocks = loops(update, acting, batch, noise)
        parts, metrics_of_parts = jax.jit(update)(acting, batch, noise)
    whole_loops = loops(lambda *given: agent.update(*given), acting, batch, noise)
    # SAC: the policy's outputs and their way back, the next turns' values, two losses.
    assert in_blocks - whole_loops == (0 if turns == 1 else {"sac": 5, "td3": 3}[name])
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(close, metrics_of_parts, metrics)
    # Adam's moments are the gradients up to a factor; parameters would hide a wrong scale of them.
    jax.tree.map(close, parts.optimiser, whole.optimiser)
