"""REINFORCE+SoftMax against numbers recorded from the published implementation (1e-4 relative)."""

from __future__ import annotations

import golden_weights as weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemsjax.agents import reinforce_softmax
from gemsjax.agents.actor import ActorParams, ActorState, make_actor, make_softmax_policies
from gemsjax.agents.base import Acting
from gemsjax.maths.categorical import log_hit
from gemsjax.maths.optimise import adam_init
from gemsjax.maths.returns import return_to_go
from gemsjax.types import Dims, Episode, Observation, time_major

DIMS, HIDDEN, GAMMA, RATE = Dims(60, 10, 100), 16, 0.8, 3e-3


def close(ours, recorded, rtol=1e-4):
    """Within rtol of the recorded array's scale."""
    ours, recorded = np.asarray(ours), np.asarray(recorded)
    np.testing.assert_allclose(ours, recorded, rtol=rtol, atol=rtol * max(np.abs(recorded).max(), 1e-12))


@pytest.fixture(scope="module")
def g() -> weights.Arrays:
    return weights.load("reinforce.npz")


@pytest.fixture(scope="module")
def episode(g) -> Episode:
    seen = Observation(jnp.asarray(g["batch/slate"]), jnp.asarray(g["batch/clicks"]) > 0)
    final = jax.tree.map(lambda x: jnp.zeros_like(x[:, -1]), seen)  # not recorded; published credit does not read it
    action = jnp.zeros_like(seen.slate)
    return Episode(seen, action, jnp.asarray(g["batch/reward"]), final)


def params_of(g, prefix: str) -> ActorParams:
    return ActorParams(weights.gru(g, f"{prefix}belief.", "actor"), weights.mlp(g, f"{prefix}PolicyNet"))


@pytest.fixture(scope="module")
def one_update(g, episode):
    """State and metrics after one update with published credit. The recorded gradients follow from Adam's moments."""
    spec = reinforce_softmax.SoftmaxSpec(hidden=HIDDEN, credit="published", return_to_go="divided")
    agent = reinforce_softmax.make_reinforce_softmax(spec, DIMS)
    params = params_of(g, "reinforce/w/")
    before = ActorState(params, adam_init(params))
    hypers = reinforce_softmax.SoftmaxHypers(gamma=GAMMA, rate=RATE)
    return jax.jit(agent.update)(Acting(before, hypers), episode, ())


@pytest.mark.parametrize("how", ["recursive", "divided"])
def test_returns_to_go(g, how):
    ours = return_to_go(jnp.asarray(g["batch/reward"][0]), GAMMA, how)
    close(ours, g["reinforce/returns_to_go_exact"], 1e-5)
    close(ours, g["reinforce/returns_to_go_ref"], 1e-5)


def test_probabilities_of_the_clicked_items(g, episode):
    actor = make_actor(DIMS, HIDDEN, 20, 20, DIMS.num_items)
    logits = actor.unroll(params_of(g, "reinforce/w/"), time_major(episode.observation))[:, 0]
    turns, items = g["reinforce/clicked_turns"], g["reinforce/clicked_items"]
    log_policy = jax.nn.log_softmax(logits)[turns, items]
    close(jnp.exp(log_policy), g["reinforce/pi_clicked"])
    close(log_hit(log_policy, DIMS.slate_size), g["reinforce/log_alphas"])


def test_loss(g, one_update):
    _, metrics = one_update
    close(metrics["loss"], g["reinforce/loss"])
    close(metrics["clicked_turns"], len(g["reinforce/clicked_turns"]) / DIMS.horizon)


def test_gradients(g, one_update):
    """After the first step, Adam's first moment is a tenth of the gradient."""
    state, _ = one_update
    ours = jax.tree.map(lambda moment: 10.0 * moment, state.optimiser.mu)
    jax.tree.map(close, ours, params_of(g, "reinforce/grad/"))


def test_weights_after_the_update(g, one_update):
    params = one_update[0].params
    recorded = {
        "PolicyNet.0.weight": params.policy["layer0"]["kernel"].T,
        "PolicyNet.2.bias": params.policy["layer1"]["bias"],
        "belief.gru.actor.weight_hh_l0": params.belief["recurrent_kernel"].T,
    }
    for name, ours in recorded.items():
        close(ours, g[f"reinforce/after_adam/{name}"])
        moved = np.abs(g[f"reinforce/after_adam/{name}"] - g[f"reinforce/w/{name}"])
        assert moved.max() > 0.5 * RATE


def test_greedy_slate(g, episode, one_update):
    """The greedy policy on the recorded turns with the stepped network but the belief from before the step."""
    stepped = ActorParams(params_of(g, "reinforce/w/").belief, one_update[0].params.policy)
    _, greedy = make_softmax_policies(DIMS, make_actor(DIMS, HIDDEN, 20, 20, DIMS.num_items))
    acting = Acting(ActorState(stepped, ()))

    def turn(memory, seen):
        choice, memory = greedy.act(acting, memory, seen, None, jnp.zeros(0))
        return memory, (choice.slate, memory)

    seen = jax.tree.map(lambda x: x[0, :51], episode.observation)
    slates, states = jax.jit(lambda: jax.lax.scan(turn, greedy.start(), seen))()[1]
    close(states[50], g["reinforce/state_t50"])
    np.testing.assert_array_equal(slates[50], g["reinforce/greedy_slate_t50"])
