"""The critic as reward simulator: its target and gradient by hand, what it may move, a reward that it must learn."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemsjax.agents import topk_reinforce as topk
from gemsjax.agents import topk_settings
from gemsjax.agents.base import Acting
from gemsjax.agents.logged import LoggedEpisodes, actions
from gemsjax.agents.topk_critic import RewardCritic, Targets, shares
from gemsjax.agents.topk_state import gathered, new_window
from gemsjax.belief import make_cfn
from gemsjax.nets.mlp import Critic
from gemsjax.offline import OfflinePlan, make_offline_training
from gemsjax.types import Dims, Observation

DIMS, WIDTH, HIDDEN = Dims(num_items=6, slate_size=2, horizon=3), 4, 5
SMALL = topk.TopKSpec(belief_width=WIDTH, item_dim=3, critic_hidden=HIDDEN, behaviour="logged")
HYPERS = jax.tree.map(jnp.float32, topk.TopKHypers(critic_gamma=0.9, critic_clip=1.5, target_share=0.25))


def some_logs(users=4):
    """The second user stops after two turns, the third's last slot is empty."""
    rng = np.random.default_rng(0)
    slates = rng.integers(0, DIMS.num_items, (users, DIMS.horizon + 1, DIMS.slate_size), np.int32)
    clicks = rng.random(slates.shape) < 0.5
    slates[1, 3:], slates[2, 3, 1] = -1, -1
    return LoggedEpisodes(
        turns=Observation(slates, clicks & (slates >= 0)),
        reward=rng.normal(1.0, 1.0, (users, DIMS.horizon)).astype(np.float32),
        taken=slates[:, 1:] >= 0,
        propensity=rng.uniform(0.1, 1.0, slates[:, 1:].shape).astype(np.float32),
    )


def test_slates_as_shares_of_items():
    items = jnp.array([[0, 3, 3], [5, 1, 99], [2, -1, 0]])
    taken = jnp.array([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    expected = np.zeros((3, 6))
    expected[0, [0, 3]], expected[1, [5, 1]] = [1 / 3, 2 / 3], 0.5
    np.testing.assert_allclose(jax.jit(shares, static_argnums=2)(items, taken, 6), expected, atol=1e-7)


@pytest.mark.parametrize("judges", ["probabilities", "slate"])
def test_the_target_and_the_gradient_by_hand(judges):
    """y = clip(r + gamma Q'(s', pi'(s'))) without a next turn at a user's last; the gradient is that of Q alone."""
    critic = RewardCritic(Critic(HIDDEN), judges, DIMS.num_items, DIMS.slate_size)
    keys, batch = jax.random.split(jax.random.key(1), 5), actions(some_logs(), DIMS.num_items)
    params, target = (critic.init(key, WIDTH) for key in keys[:2])
    states, later = (jax.random.normal(key, (DIMS.horizon, 4, WIDTH)) for key in keys[2:4])
    logits = 3.0 * jax.random.normal(keys[4], (DIMS.horizon, 4, DIMS.num_items))
    targets = Targets((), (), target)

    def loss(params, states, later, logits, targets):
        return critic.loss(params, targets, states, (later, logits), batch, HYPERS)

    value, (by_params, *others) = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(
        params, states, later, logits, targets
    )
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(others))

    def q(params, state, judged):
        """The network, written out."""
        kernel, bias, out = np.asarray(params["kernel"], float), np.asarray(params["bias"], float), params["out"]
        hidden = np.maximum(np.r_[state, judged] @ kernel + bias, 0.0)
        return float(hidden @ np.asarray(out["kernel"], float)[:, 0] + np.asarray(out["bias"], float)[0])

    errors, weights, clipped = [], [], 0
    for user in range(4):
        turns = 2 if user == 1 else 3
        for turn in range(turns):
            y = float(batch.reward[turn, user])
            if turn + 1 < turns:
                row = np.asarray(logits[turn + 1, user], float)
                p = np.exp(row) / np.exp(row).sum()
                best = np.bincount(np.argsort(-row)[: DIMS.slate_size], minlength=DIMS.num_items) / DIMS.slate_size
                y += 0.9 * q(target, later[turn + 1, user], p if judges == "probabilities" else best)
            clipped += abs(y) > 1.5
            shown = np.asarray(batch.items[turn, user])
            shown = np.bincount(shown[shown >= 0], minlength=DIMS.num_items) / (shown >= 0).sum()
            errors.append((q(params, states[turn, user], shown) - np.clip(y, -1.5, 1.5)) ** 2)
            weights.append((turn, user, shown, np.clip(y, -1.5, 1.5)))
    np.testing.assert_allclose(value, np.mean(errors), rtol=1e-4)
    assert clipped > 0

    turns, users, shown, ys = (jnp.asarray(np.stack(column)) for column in zip(*weights, strict=True))
    plain = lambda p: jnp.mean(jnp.square(critic.values(p, states[turns, users], shown) - ys))  # noqa: E731
    for found, expected in zip(*map(jax.tree.leaves, (by_params, jax.jit(jax.grad(plain))(params))), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_a_turn_of_unknown_reward_is_not_the_end_of_its_user():
    """It is not learnt from, but the turn before still counts what follows; padding after the last turn never does."""
    critic = RewardCritic(Critic(HIDDEN), "probabilities", DIMS.num_items, DIMS.slate_size)
    keys, logs = jax.random.split(jax.random.key(6), 5), some_logs()
    params, target = (critic.init(key, WIDTH) for key in keys[:2])
    states, later = (jax.random.normal(key, (DIMS.horizon, 4, WIDTH)) for key in keys[2:4])
    logits = jax.random.normal(keys[4], (DIMS.horizon, 4, DIMS.num_items))
    hypers = dataclasses.replace(HYPERS, critic_clip=jnp.float32(100.0))
    loss = jax.jit(lambda batch: critic.loss(params, Targets((), (), target), states, (later, logits), batch, hypers))

    def by_hand(batch, ends):
        """Mean over the turns learnt from; a user's last turn is that of `ends`."""
        errors = []
        after = critic.values(target, later, critic.served(logits))
        found = critic.values(params, states, shares(batch.items, batch.taken, DIMS.num_items))
        for turn, user in np.argwhere(np.asarray(batch.taken).any(axis=-1)):
            y = batch.reward[turn, user] + (0.9 * after[turn + 1, user] if turn < ends[user] else 0.0)
            errors.append(float(found[turn, user] - y) ** 2)
        return np.mean(errors)

    for place in ((0, 1), (0, 2), (1, 1)):  # amid a user's turns, its last, the last before padding
        reward = logs.reward.copy()
        reward[place] = np.nan
        batch = actions(dataclasses.replace(logs, reward=reward), DIMS.num_items)
        np.testing.assert_array_equal(batch.there.sum(axis=0), [3.0, 2.0, 3.0, 3.0])
        assert batch.taken[place[1], place[0]].sum() == 0.0
        np.testing.assert_allclose(loss(batch), by_hand(batch, [2, 1, 2, 2]), rtol=1e-4)


@pytest.mark.parametrize("judges", ["probabilities", "slate"])
def test_its_rewards_are_what_it_says_of_the_policy(judges):
    critic = RewardCritic(Critic(HIDDEN), judges, DIMS.num_items, DIMS.slate_size)
    keys, batch = jax.random.split(jax.random.key(2), 3), actions(some_logs(), DIMS.num_items)
    params = critic.init(keys[0], WIDTH)
    states = jax.random.normal(keys[1], (DIMS.horizon, 4, WIDTH))
    logits = jax.random.normal(keys[2], (DIMS.horizon, 4, DIMS.num_items))
    items = jnp.maximum(batch.items, 0)
    judged = jax.nn.softmax(logits) if judges == "probabilities" else shares(items, batch.taken, DIMS.num_items)
    expected = critic.network.apply({"params": params}, states, judged) * batch.taken.max(axis=-1)
    found = critic.rewards(params, states, logits, items, batch.taken)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found[2, 1] == 0.0  # a turn of padding
    total = lambda *inputs: critic.rewards(*inputs, items, batch.taken).sum()  # noqa: E731
    for leaf in jax.tree.leaves(jax.grad(total, (0, 1, 2))(params, states, logits)):
        assert (leaf == 0).all()


# -- as a part of the agent --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steps():
    """`(logs, updates) -> the first state and that after each update`, and metrics: RecNN's own settings, but smaller,
    and a policy step of 2 that learns from clicks."""
    topk.validate_hypers(topk_settings.RECNN_HYPERS)
    smaller = {"set_size": 2, "belief_width": WIDTH, "item_dim": 3, "critic_hidden": HIDDEN}
    spec = dataclasses.replace(topk_settings.RECNN_SPEC, policy_step=2, actions="clicked", **smaller)
    agent = topk.make_topk_reinforce(spec, DIMS)
    start, update = jax.jit(agent.init)(jax.random.key(0), HYPERS), jax.jit(agent.update)

    def run(logs, updates):
        states, told = [start], []
        for number in range(updates):
            noise = agent.draw_update(jax.random.key(number), 4)
            state, metrics = update(Acting(states[-1], HYPERS), logs, noise)
            states.append(state)
            told.append(metrics)
        return states, told

    return run


def changed(new, old):
    return any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(*map(jax.tree.leaves, (new, old)), strict=True))


def test_policy_and_targets_wait_for_their_turn(steps):
    """Updates 2, 4 ... (from 0) are theirs; the critic and the head learn from every batch."""
    states, told = steps(some_logs(), 5)
    for number, (before, after) in enumerate(zip(states, states[1:], strict=False)):
        due = number in (2, 4)
        for part in ("belief", "policy"):
            assert changed(getattr(after.params, part), getattr(before.params, part)) == due
        assert changed(after.targets, before.targets) == due
        assert changed(after.params.critic, before.params.critic)
        assert changed(after.params.behaviour, before.params.behaviour)
        assert float(after.window.batches) == (0.0 if due else {0: 1.0, 1: 2.0, 3: 1.0}[number])
    before, after = states[2], states[3]
    for kind in ("belief", "policy", "critic"):
        moved = zip(
            *(jax.tree.leaves(x) for x in (
                getattr(before.targets, kind), getattr(after.targets, kind), getattr(after.params, kind),
            )), strict=True,
        )  # fmt: skip
        for old, new, online in moved:
            np.testing.assert_allclose(new, old + 0.25 * (online - old), rtol=1e-5, atol=1e-7)
    assert all(np.isfinite(value) for metrics in told for value in metrics.values())


def test_the_log_s_rewards_reach_the_critic_alone(steps):
    """What the policy learns from is the critic's; the critic's own loss moves neither policy nor state."""
    logs = some_logs()
    states, _ = steps(logs, 1)
    other, _ = steps(dataclasses.replace(logs, reward=logs.reward[::-1]), 1)
    assert changed(states[1].params.critic, other[1].params.critic)
    assert not changed(states[1].window.gradients, other[1].window.gradients)
    nothing = dataclasses.replace(logs, turns=logs.turns._replace(clicks=np.zeros_like(logs.turns.clicks)))
    silent, _ = steps(nothing, 1)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(silent[1].window.gradients))
    assert changed(silent[1].params.critic, silent[0].params.critic)


@pytest.mark.parametrize("judges", ["probabilities", "slate"])
def test_padding_changes_nothing_with_a_critic(judges):
    """A turn and a user more that hold nothing (and broken numbers): the same update, metrics included."""
    logs, states = some_logs(), []
    fill = lambda x, value: np.pad(x, ((0, 1), (0, 1)) + ((0, 0),) * (x.ndim - 2), constant_values=value)  # noqa: E731
    padded = LoggedEpisodes(
        turns=Observation(fill(logs.turns.slate, -1), fill(logs.turns.clicks, False)),
        reward=fill(logs.reward, np.nan),
        taken=fill(logs.taken, False),
        propensity=fill(logs.propensity, np.nan),
    )
    agent = topk.make_topk_reinforce(dataclasses.replace(SMALL, critic=judges), DIMS)
    start, update = jax.jit(agent.init)(jax.random.key(0), HYPERS), jax.jit(agent.update)
    for batch in (logs, padded):
        states.append(update(Acting(start, HYPERS), batch, agent.draw_update(jax.random.key(1), len(batch.reward))))
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=2e-5)
    assert changed(states[0][0].params.critic, start.params.critic)


@pytest.mark.parametrize("mean", [False, True])
def test_gradients_come_together_as_recnn_counts(mean):
    window, used = new_window(jnp.zeros(2)), []
    for number in range(7):
        due, found, window = gathered(window, jnp.array([1.0, number]), 3, mean)
        used.append(np.asarray(found).tolist() if due else None)
    first, second = ([4.0, 6.0], [3.0, 15.0]) if not mean else ([1.0, 1.5], [1.0, 5.0])
    assert used == [None, None, None, first, None, None, second]
    assert gathered((), [1.0], 1, mean) == (1.0, [1.0], ())


def test_a_known_reward_is_learnt_and_the_policy_follows_it():
    """Rewards are noise around each item's worth; one is beyond the clip. The best worth is rare in the log."""
    dims, worth, users = Dims(5, 1, 3), np.array([0.0, 1.0, -1.0, 30.0, 4.0]), 400
    rng = np.random.default_rng(3)
    shown = np.array([0.3, 0.3, 0.2, 0.1, 0.1])
    slates = rng.choice(5, (users, 4, 1), p=shown).astype(np.int32)
    logs = LoggedEpisodes(
        turns=Observation(slates, np.zeros(slates.shape, bool)),
        reward=(worth[slates[:, 1:, 0]] + rng.normal(0.0, 1.0, (users, 3))).astype(np.float32),
        propensity=shown[slates[:, 1:]].astype(np.float32),
    )
    spec = dataclasses.replace(SMALL, critic="slate", critic_hidden=16, actions="shown", baseline="turn")
    agent = topk.make_topk_reinforce(spec, dims)
    training = make_offline_training(agent, OfflinePlan(batch_size=40))
    hypers = jax.tree.map(jnp.float32, topk.TopKHypers(gamma=0.0, rate=1e-2, behaviour_rate=1e-2, critic_rate=1e-2))

    @jax.jit
    def train(key, logs):
        epoch = lambda state, n: training.updates(state, hypers, (), key, logs, n, jnp.arange(10))  # noqa: E731
        return jax.lax.scan(epoch, training.init(key, hypers), jnp.arange(80))[0]

    state, batch = train(jax.random.key(0), logs), actions(logs, 5)
    critic, belief = RewardCritic(Critic(16), "slate", 5, 1), make_cfn(dims, WIDTH, SMALL.item_dim)

    @jax.jit
    def values(params, seen):
        """Of every item in all the log's states, [I, states]."""
        states = belief.unroll((params.belief,), seen)[0].reshape(1, -1, WIDTH)
        judged = jnp.broadcast_to(jnp.eye(5)[:, None], (5, states.shape[1], 5))
        return critic.values(params.critic, jnp.broadcast_to(states, (5, *states.shape[1:])), judged)

    found = np.asarray(values(state.params, batch.seen))
    np.testing.assert_allclose(found.mean(axis=1), np.minimum(worth, 10.0), atol=0.4)
    assert np.sqrt(np.square(found - found.mean(axis=1, keepdims=True)).mean()) < 0.5
    choose = jax.jit(
        lambda seen: agent.greedy.act(Acting(state, hypers), agent.greedy.start(), seen, None, jnp.zeros(0))
    )
    assert choose(Observation(np.array([0]), np.array([False])))[0].slate.tolist() == [3]
