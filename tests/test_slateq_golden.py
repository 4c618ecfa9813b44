"""SlateQ against the published implementation's numbers (1e-4 relative), RecSim's targets, and slow loops for the rest.

The loops below say in plain NumPy what each setting means; with the published settings they agree with the recorded
numbers too, so they stand for the corrected ones.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import golden_weights as weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemsjax
from gemsjax.agents import slateq
from gemsjax.agents.base import Acting
from gemsjax.envs.knowledge import TopicMemory, make_click_model
from gemsjax.maths.optimise import adam_init
from gemsjax.maths.slate_optimisers import Candidates
from gemsjax.types import Dims, Episode, Observation

ITEMS, SLATE, TURNS, EPISODES, WIDTH = 60, 10, 100, 3, 20
PUBLISHED, CORRECTED = slateq.SlateQSpec(**slateq.PUBLISHED["spec"], hidden=16), slateq.SlateQSpec(hidden=16)


@pytest.fixture(scope="module")
def g() -> weights.Arrays:
    return weights.load("slateq.npz")


@pytest.fixture(scope="module")
def world(g):
    return gemsjax.make("focused_divpen", catalogue=g["items"])


@pytest.fixture(scope="module")
def case(g) -> tuple[slateq.SlateQState, Episode]:
    """The recorded state and batch; made up are what the recording left out: the last observation, boredom."""
    params = slateq.SlateQParams(weights.gru(g, "slateq/w/belief.", "critic"), weights.mlp(g, "slateq/w/QNet"))
    state = slateq.SlateQState(params, weights.mlp(g, "slateq/w/target_QNet"), adam_init(params))
    rng = np.random.default_rng(0)
    observation = Observation(jnp.asarray(g["slateq/batch/slate"]), jnp.asarray(g["slateq/batch/clicks"]) > 0)
    last = rng.integers(0, ITEMS, (EPISODES, SLATE)).astype(np.int32), rng.random((EPISODES, SLATE)) < 0.3
    memory = TopicMemory(
        jnp.asarray(g["slateq/batch/user_state"]), jnp.asarray(rng.random((EPISODES, TURNS, 10)) < 0.3)
    )
    reward = jnp.concatenate([observation.clicks[:, 1:], last[1][:, None]], axis=1).sum(axis=-1, dtype=jnp.float32)
    np.testing.assert_array_equal(reward[:, :-1], g["slateq/batch/reward"][:, :-1])
    final = Observation(*(jnp.asarray(x) for x in last))
    return state, Episode(observation, observation.slate, reward, final, memory)


def close(ours, recorded, rtol=1e-4):
    """Within rtol of the recorded array's scale."""
    ours, recorded = np.asarray(ours), np.asarray(recorded)
    np.testing.assert_allclose(ours, recorded, rtol=rtol, atol=rtol * max(np.abs(recorded).max(), 1e-12))


def learner(spec, world) -> slateq._Learner:
    dims = Dims(ITEMS, SLATE, TURNS)
    return slateq._Learner(spec, dims, make_click_model(world[0]), slateq.make_gru(dims, WIDTH, 20))


@pytest.fixture(scope="module")
def updated(case, world):
    """`(spec) -> (state, metrics)` after one update of the recorded case."""
    done = {}

    def run(spec):
        if spec not in done:
            agent = slateq.make_slateq(spec, Dims(ITEMS, SLATE, TURNS), make_click_model(world[0]))
            state, batch = case
            acting = Acting(state, slateq.SlateQHypers(), world[1], step=2_000)
            done[spec] = jax.jit(agent.update)(acting, batch, ())
        return done[spec]

    return run


def gradients(state: slateq.SlateQState) -> slateq.SlateQParams:
    """Those of the first update, which Adam's first moment holds a tenth of."""
    return jax.tree.map(lambda m: 10.0 * m, state.optimiser.mu)


# -- the click model ---------------------------------------------------------------------------------------------------


def test_relevances_of_the_published_acting(g, world):
    model, params = make_click_model(world[0]), world[1]
    memory = TopicMemory(jnp.asarray(g["slateq/act_user"]), jnp.asarray(g["slateq/act_bored"]))
    found = jax.jit(jax.vmap(lambda m: model.candidates(params, m, "misplaced").appeal))(memory)
    close(found, g["slateq/act_relevances"])


def test_relevances_next_to_the_simulator(g, world):
    """With `masked`, clicks on a slate are as likely as the simulator makes them; without boredom they are not."""
    (env, params), slate = world, jnp.arange(0, 20, 2, dtype=jnp.int32)
    model, bored = make_click_model(env), jnp.asarray(g["slateq/act_bored"][3] | g["slateq/act_bored"][7])

    @jax.jit
    def chances():
        start = env.initial_state(jnp.asarray(g["slateq/act_user"][0]), jnp.zeros(SLATE, bool), params)
        state = dataclasses.replace(start, bored=bored, bored_timeout=jnp.full(10, 3, jnp.int32))  # next turn too
        ours = []
        for boredom in ("masked", "none"):
            candidates = model.candidates(params, model.remember(state), boredom)
            appeal = candidates.weights()[slate] / model.penalty(params, slate)
            ours.append(model.click_probabilities(params, appeal, candidates.no_click))
        return ours, env.click_probabilities(state, slate, params)

    (masked, careless), simulated = chances()
    np.testing.assert_allclose(masked, simulated, rtol=1e-5, atol=1e-7)
    assert not np.allclose(careless, simulated)


# -- published ---------------------------------------------------------------------------------------------------------


def test_published_click_probabilities(g, case, world):
    """The next slates' appeal with the penalty that the whole batch earns, and the clicks on them."""
    state, batch = case
    model, params, who = make_click_model(world[0]), world[1], learner(PUBLISHED, world)
    acting = Acting(state, slateq.SlateQHypers(), params)
    rows = g["slateq/clicked_rows"]
    rows = rows[rows % TURNS != TURNS - 1]

    @jax.jit
    def published():
        memory = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[rows], batch.hidden)
        relevance = jax.vmap(lambda m: model.candidates(params, m, "none").appeal)(memory)
        states = _states(who, state, batch)[rows + 1]
        shown = jax.vmap(lambda s, m: who._next_slate(acting, s, m, None))(states, memory)
        appeal = shown.appeal / model.penalty(params, shown.slate.reshape(-1))
        clicks = jax.vmap(lambda v, none: model.click_probabilities(params, v, none))(appeal, shown.no_click)
        return relevance, appeal, clicks, 1.0 + 0.8 * (clicks * shown.q).sum(axis=1)

    relevance, appeal, clicks, targets = published()
    close(relevance, g["slateq/next_relevances"])
    close(appeal, g["slateq/next_attractiveness"])
    close(clicks, g["slateq/click_probs"])
    close(targets, g["slateq/target_q"][g["slateq/clicked_rows"] % TURNS < TURNS - 1])


def _states(who, state, batch):
    """[B * H, width], episodes one after the other."""
    observed = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), batch.observation)
    (states,) = who.belief.unroll((state.params.belief,), observed)
    return jnp.swapaxes(states, 0, 1).reshape(-1, WIDTH)


def test_published_loss_and_gradients(g, updated):
    state, metrics = updated(PUBLISHED)
    close(metrics["critic_loss"], g["slateq/loss"])
    close(metrics["q"], g["slateq/q_values"].mean())
    close(metrics["epsilon"], 0.01 + 0.99 * np.exp(-2.0))
    found = gradients(state)
    jax.tree.map(close, found.belief, weights.gru(g, "slateq/grad/belief.", "critic"))
    jax.tree.map(close, found.q, weights.mlp(g, "slateq/grad/QNet"))


def test_published_weights_after_the_update(g, updated):
    state, _ = updated(PUBLISHED)
    close(state.params.q["layer0"]["kernel"].T, g["slateq/after_adam/QNet.0.weight"])
    close(state.target["layer0"]["kernel"].T, g["slateq/target_after_polyak/target_QNet.0.weight"])


# -- every setting against slow loops ----------------------------------------------------------------------------------

SETTINGS = {
    "published": PUBLISHED,
    "corrected": CORRECTED,
    "the rest": dataclasses.replace(CORRECTED, clicked="first", target="sarsa", reward="one", penalty="batch"),
}


def chosen(chances, clicked):
    """Chance of each rank to be the choice, over all 2^K ways to click (K = 10)."""
    ways = np.array(list(itertools.product([0, 1], repeat=len(chances))))
    probability = np.where(ways, chances, 1.0 - chances).prod(axis=1)
    if clicked == "first":
        share = ways * (np.cumsum(ways, axis=1) == 1)
    else:
        share = ways / np.maximum(ways.sum(axis=1, keepdims=True), 1)
    return probability @ share


def slow_targets(spec, case, world, q_target):
    """Item, row of the state, target and weight of all that learns; q_target [B, H, I] by the target network."""
    _, batch = case
    env, params = world
    slates, clicks = np.asarray(batch.observation.slate), np.asarray(batch.observation.clicks)
    after = np.concatenate([slates[:, 1:], np.asarray(batch.final.slate)[:, None]], axis=1)
    after_clicks = np.concatenate([clicks[:, 1:], np.asarray(batch.final.clicks)[:, None]], axis=1)
    if spec.credit == "published":
        after_slates, after_clicks = slates, clicks
    else:
        after_slates = after
    topics, table = np.asarray(params.item_topics), np.asarray(params.examination)[:, 0]
    learning, turns = [], []
    for b in range(EPISODES):
        for t in range(TURNS):
            ranks = np.flatnonzero(after_clicks[b, t])[: 1 if spec.clicked == "first" else None]
            if len(ranks) == 0:
                continue
            learning.append((b, t, [after_slates[b, t, r] for r in ranks]))
            if t == TURNS - 1:
                turns.append(None)
                continue
            user = np.asarray(batch.hidden.user_embedding)[b, t].copy()
            for topic in np.flatnonzero(np.asarray(batch.hidden.bored)[b, t]):
                if spec.target_boredom == "masked":
                    user[2 * topic : 2 * topic + 2] = 0.0
            relevance = 1.0 / (1.0 + np.exp(-100.0 * (np.asarray(params.item_embeddings) @ user - 0.28)))
            q = q_target[b, t + 1]
            slate = slates[b, t + 1] if spec.target == "sarsa" else np.argsort(-relevance * q, kind="stable")[:SLATE]
            turns.append((slate, relevance[slate], q[slate]))
    together = np.bincount(np.concatenate([topics[turn[0]] for turn in turns if turn]))
    found = []
    for (b, t, items), turn in zip(learning, turns, strict=True):
        value = 0.0
        if turn is not None:
            counts = together if spec.penalty == "batch" else np.bincount(topics[turn[0]])
            chances = turn[1] / (3.0 if counts.max() >= 4 else 1.0) * table
            value = ((chances if spec.value == "clicks" else chosen(chances, spec.clicked)) * turn[2]).sum()
        reward = 1.0 if spec.reward == "one" else float(batch.reward[b, t])
        weight = 1.0 if spec.value == "clicks" else 1.0 / len(items)
        found += [(item, b * TURNS + t, reward + 0.8 * value, weight) for item in items]
    return [np.asarray(column) for column in zip(*found, strict=True)]


@pytest.fixture(scope="module")
def plainly(case, world):
    """Q of all items in all states by the target network, and the loss and its gradients: none of the fast ways."""
    who, (state, batch) = learner(CORRECTED, world), case
    q = lambda net, params: who._network.apply({"params": net}, _states(who, state.replace(params=params), batch))  # noqa: E731

    def loss(params, items, rows, targets, weights):
        errors = q(params.q, params)[rows, items] - targets
        return (weights * jnp.square(errors)).sum() / weights.sum()

    return jax.jit(lambda: q(state.target, state.params)), jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("spec", SETTINGS.values(), ids=SETTINGS.keys())
def test_loss_and_gradients_of_every_setting(case, world, updated, plainly, spec):
    q_target, loss = plainly
    learning = slow_targets(spec, case, world, np.asarray(q_target()).reshape(EPISODES, TURNS, ITEMS))
    padded = [np.pad(x, (0, EPISODES * TURNS * SLATE - len(x))) for x in learning]  # with weight 0; one shape for all
    expected, expected_gradients = loss(case[0].params, *padded)
    after, metrics = updated(spec)
    close(metrics["critic_loss"], expected)
    jax.tree.map(close, gradients(after), expected_gradients)


def test_the_target_network_follows_after_the_step(case, updated):
    (state, _), (after, _) = case, updated(CORRECTED)
    expected = jax.tree.map(lambda old, new: 0.998 * old + 0.002 * new, state.target, after.params.q)
    jax.tree.map(lambda ours, theirs: close(ours, theirs, 1e-6), after.target, expected)


# -- RecSim's targets --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Proportional:
    """RecSim's proportional choice: at most one click a turn, documents are data."""

    def remember(self, state):
        return state

    def candidates(self, params, memory, boredom):
        docs, shift, mass = params
        return Candidates(docs @ memory - shift, mass - shift)

    def penalty(self, params, items):
        return jnp.float32(1.0)

    def click_probabilities(self, params, appeal, no_click):
        return appeal / (no_click + appeal.sum())

    def choice_probabilities(self, params, appeal, no_click, clicked):
        return self.click_probabilities(params, appeal, no_click)


@pytest.mark.parametrize("rule", ["sarsa", "topk", "greedy", "optimal"])
def test_recorded_targets_of_recsim(rule):
    """Next states whose target Q are the recorded ones: a network that passes its input on."""
    file = json.loads((Path(__file__).parent / "golden" / "slateq_examples.json").read_text())
    scores, recorded = file["scores"], file["targets"]
    params = (jnp.asarray(scores["docs"]), jnp.float32(scores["min_normalizer"]), jnp.float32(scores["no_click_mass"]))
    dims, copy = Dims(4, 2, 2), jnp.eye(4)
    spec = slateq.SlateQSpec(hidden=8, belief_width=4, target="exact" if rule == "optimal" else rule)
    who = slateq._Learner(spec, dims, Proportional(), slateq.make_gru(dims, 4, 4))
    user = jnp.asarray(scores["user"])
    close(who.model.candidates(params, user, "none").weights(), scores["proportional"], 1e-6)
    q = {
        "layer0": {"kernel": jnp.concatenate([copy, -copy], axis=1), "bias": jnp.zeros(8)},
        "layer1": {"kernel": jnp.concatenate([copy, -copy]), "bias": jnp.zeros(4)},
    }
    acting = Acting(slateq.SlateQState(None, q, None), slateq.SlateQHypers(), params)
    states = jnp.stack([jnp.zeros((2, 4)), jnp.asarray(recorded["next_q"])])
    slates = jnp.asarray([[[0, 0], [0, 0]], [[0, 2], [3, 1]]], jnp.int32)  # as in the recording's note
    users = jnp.broadcast_to(user, (2, 2, 2))
    values = jax.jit(lambda wanted: who._values(acting, states, users, slates, wanted))
    both = values(jnp.ones((2, 2), bool))
    close(jnp.asarray(recorded["reward"]) + 0.9 * both[0], recorded["terminals_00"][rule], 1e-5)
    np.testing.assert_array_equal(both[1], 0.0)  # nothing follows the last turn
    ended = values(jnp.array([[True, False]] * 2))
    close(jnp.asarray(recorded["reward"]) + 0.9 * ended[0], recorded["terminals_01"][rule], 1e-5)
