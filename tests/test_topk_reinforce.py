"""Top-K off-policy REINFORCE as an agent: what its losses may move, padding, logs, probes of a known best policy."""

from __future__ import annotations

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import HORIZON, ITEMS, ProbeEnv, Rules

from gemsjax.agents import topk_reinforce as topk
from gemsjax.agents.base import Acting
from gemsjax.agents.logged import LoggedEpisodes, from_episodes
from gemsjax.errors import SettingError
from gemsjax.offline import OfflinePlan, make_offline_training
from gemsjax.rollout import episodes, returns
from gemsjax.train import Plan, Run, make_training
from gemsjax.types import Dims, Observation

DIMS = Dims(num_items=6, slate_size=3, horizon=4)
SMALL = topk.TopKSpec(belief_width=5, item_dim=3, top_m=5)
HYPERS = jax.tree.map(jnp.float32, topk.TopKHypers())


def some_logs(users=3, turns=DIMS.horizon + 1):
    rng = np.random.default_rng(0)
    shape = (users, turns, DIMS.slate_size)
    clicks = rng.random(shape) < 0.4
    return LoggedEpisodes(
        turns=Observation(rng.integers(0, DIMS.num_items, shape, np.int32), clicks),
        reward=clicks[:, 1:].sum(axis=-1).astype(np.float32),
        propensity=rng.uniform(0.1, 1.0, (users, turns - 1, DIMS.slate_size)).astype(np.float32),
    )


@cache
def compiled(spec):
    agent = topk.make_topk_reinforce(spec, DIMS, None)
    return agent, jax.jit(agent.update)


@cache
def initial():
    return jax.jit(compiled(SMALL)[0].init)(jax.random.key(0), HYPERS)


def update(spec, logs, hypers=HYPERS):
    """The state after one update, its metrics, the state before."""
    agent, step = compiled(spec)
    noise = agent.draw_update(jax.random.key(1), logs.reward.shape[0])
    state = initial()
    if spec.kl:
        state = dataclasses.replace(state, old=(state.params.belief, state.params.policy))
    if spec.running:
        state = dataclasses.replace(state, weight_sum=jnp.float32(0.0))
    return (*step(Acting(state, hypers), logs, noise), state)


def largest_change(new, old):
    pairs = zip(*map(jax.tree.leaves, jax.tree.map(np.asarray, (new, old))), strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs)


def test_the_behaviour_head_never_moves_the_state_or_the_policy():
    """Without a click there is no policy loss: only the head may learn."""
    logs = some_logs()
    turns = logs.turns._replace(clicks=np.zeros_like(logs.turns.clicks))
    new, metrics, old = update(SMALL, dataclasses.replace(logs, turns=turns, reward=np.zeros_like(logs.reward)))
    assert largest_change(new.params.belief, old.params.belief) == 0.0
    assert largest_change(new.params.policy, old.params.policy) == 0.0
    assert largest_change(new.params.behaviour, old.params.behaviour) > 1e-4 and metrics["behaviour_loss"] > 0.0


def test_the_policy_loss_never_moves_the_behaviour_head():
    """What the clicks were worth matters to the policy and its state alone."""
    logs = some_logs()
    new, _, _ = update(SMALL, logs)
    other, _, _ = update(SMALL, dataclasses.replace(logs, reward=logs.reward[::-1]))
    assert largest_change(new.params.behaviour, other.params.behaviour) == 0.0
    assert largest_change(new.params.belief, other.params.belief) > 1e-4


_TERMS = {"entropy": True, "kl": True, "baseline": "turn", "behaviour": "logged", "credit": "item"}
EVERYTHING = dataclasses.replace(SMALL, normalise=True, **_TERMS)


def full_logs(**sizes):
    """With all that a log may hold."""
    logs = some_logs(**sizes)
    clicks = logs.turns.clicks[:, 1:].astype(np.float32)
    return dataclasses.replace(logs, item_reward=clicks, taken=np.ones_like(clicks, bool))


@pytest.mark.parametrize("junk", [0.0, np.nan])
def test_padding_changes_nothing(junk):
    spec, logs = EVERYTHING, full_logs(turns=4)
    fill = lambda x, value: np.pad(x, ((0, 1), (0, 1)) + ((0, 0),) * (x.ndim - 2), constant_values=value)  # noqa: E731
    padded = LoggedEpisodes(
        turns=Observation(fill(logs.turns.slate, -1), fill(logs.turns.clicks, False)),
        reward=fill(logs.reward, junk),
        item_reward=fill(logs.item_reward, junk),
        taken=fill(logs.taken, False),
        propensity=fill(logs.propensity, np.nan),
    )
    new, metrics, _ = update(spec, logs)
    other, same, _ = update(spec, padded)
    assert largest_change(new.params, other.params) < 2e-5
    for name, value in metrics.items():
        np.testing.assert_allclose(same[name], value, rtol=1e-4, atol=1e-7, err_msg=name)


def broken_logs():
    """`{what: (logs with something that cannot be, the same logs with nothing in its place)}`."""
    logs = full_logs(users=4)
    slate, clicks = logs.turns

    def put(column, where, value):
        column = np.array(column)
        column[where] = value
        return column

    def without(slots, turns=logs.turns):
        """Turns to learn from, without some slots."""
        taken = put(logs.taken, slots, False)
        return {"turns": turns, "taken": taken, "item_reward": np.where(taken, logs.item_reward, 0.0)}

    cases, place, slot = {}, (1, 2), (1, 2, 0)  # turn 2 of those that are learnt from is turn 3 of the observations
    for name, value in (("nan", np.nan), ("infinite", -np.inf)):
        put_reward, no_reward = put(logs.reward, place, value), put(logs.reward, place, 0.0)
        cases[f"{name} reward"] = {"reward": put_reward}, {"reward": no_reward, **without(place)}
        cases[f"{name} item reward"] = {"item_reward": put(logs.item_reward, slot, value)}, without(slot)
    gone = Observation(put(slate, (1, 3, 0), -1), put(clicks, (1, 3, 0), False))
    for item in (DIMS.num_items, 2**31 - 1, -(2**31)):
        turns = logs.turns._replace(slate=put(slate, (1, 3, 0), item), clicks=put(clicks, (1, 3, 0), True))
        cases[f"item {item}"] = {"turns": turns}, without(slot, gone)
    for chance in (np.nan, 0.0, -0.5, 1.5, np.inf):
        both = ({"propensity": put(logs.propensity, slot, value)} for value in (chance, 0.0))
        cases[f"propensity {chance}"] = tuple(both)
    nothing = {"taken": np.zeros_like(logs.taken)}
    cases["only broken rewards"] = {"reward": np.full_like(logs.reward, np.nan)}, nothing
    return {name: tuple(dataclasses.replace(logs, **change) for change in pair) for name, pair in cases.items()}


def test_what_cannot_be_is_as_if_it_were_not_there_under_jit_and_vmap():
    cases = broken_logs()
    agent, step = compiled(EVERYTHING)
    _, _, before = update(EVERYTHING, full_logs(users=4))
    acting, noise = Acting(before, HYPERS), agent.draw_update(jax.random.key(1), 4)
    stacked = jax.tree.map(lambda *x: np.stack(x), *(broken for broken, _ in cases.values()))
    side_by_side = jax.jit(jax.vmap(agent.update, in_axes=(None, 0, None)))(acting, stacked, noise)
    for number, (name, pair) in enumerate(cases.items()):
        found, expected = (step(acting, logs, noise) for logs in pair)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found)), name
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(one, other, err_msg=name)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(side_by_side), strict=True):
            np.testing.assert_allclose(other[number], one, rtol=1e-4, atol=2e-5, err_msg=name)
    nothing, _ = step(acting, cases["only broken rewards"][0], noise)
    assert largest_change(nothing.params, before.params) == 0.0


def test_what_cannot_be_is_not_inspected_either():
    cases = broken_logs()
    learner = topk.make_topk_learner(dataclasses.replace(SMALL, behaviour="logged"), DIMS)
    stacked = jax.tree.map(lambda *x: np.stack(x), *(broken for broken, _ in cases.values()))
    seen = jax.jit(jax.vmap(learner.inspect, in_axes=(None, 0)))(Acting(initial(), HYPERS), stacked)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(seen))
    for number, name in enumerate(cases):
        assert seen.mask[number, 2, 1, 0] == 0.0, name


def test_a_broken_observation_is_an_empty_slot_when_slates_are_chosen():
    agent = compiled(SMALL)[0]
    start, acting = agent.greedy.start(), Acting(initial(), HYPERS)
    act = jax.jit(lambda slate, clicks: agent.greedy.act(acting, start, Observation(slate, clicks), None, jnp.zeros(0)))
    expected, memory = act(np.array([2, -1, 4]), np.array([True, False, False]))
    for item in (-1, -9, DIMS.num_items, 2**31 - 1):
        found, other = act(np.array([2, item, 4]), np.array([True, True, False]))
        np.testing.assert_array_equal(found.slate, expected.slate)
        np.testing.assert_array_equal(other, memory)


@pytest.mark.parametrize(
    "change",
    [
        {"negatives": 4},
        {"action_source": "each", "actions": "shown", "reduction": "sum", "baseline": "standardised"},
        {"correction": "set_ratio", "running": True, "action_source": "beta"},
    ],
    ids=str,
)
def test_every_way_learns_and_stays_finite(change):
    new, metrics, old = update(dataclasses.replace(SMALL, **change), some_logs())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((new, metrics)))
    assert largest_change(new.params.policy, old.params.policy) > 1e-4


def test_weights_that_nothing_cuts_off_are_told_without_nan():
    """Most shown items had next to no probability: with RecNN's cap of 1e30 their squares overflow."""
    logs = some_logs()
    rare = np.where(np.arange(logs.propensity.size).reshape(logs.propensity.shape) % 2, 1e-32, 0.5)
    spec = dataclasses.replace(SMALL, behaviour="logged")
    hypers = dataclasses.replace(HYPERS, cap=jnp.float32(1e30))
    _, metrics, _ = update(spec, dataclasses.replace(logs, propensity=rare.astype(np.float32)), hypers)
    assert all(np.isfinite(value) for value in metrics.values()) and 0.2 < metrics["effective_share"] < 1.0


def test_the_gradient_of_the_top_k_correction_by_hand():
    """K = 2 of slates of three: of the log-probabilities of the policy's items, whatever the agent does around them."""
    spec = dataclasses.replace(SMALL, set_size=2, behaviour="logged")
    learner, logs = topk.make_topk_learner(spec, DIMS), some_logs()
    state = initial()
    seen = jax.jit(learner.inspect)(Acting(state, HYPERS), logs)
    mask, pi = np.asarray(seen.mask, float), np.exp(np.asarray(seen.log_pi, float))
    weight = np.minimum(pi / np.swapaxes(logs.propensity, 0, 1), float(HYPERS.cap)) * 2.0 * (1.0 - pi)
    returns = np.zeros((DIMS.horizon + 1, len(logs.reward)))
    for turn in reversed(range(DIMS.horizon)):
        returns[turn] = logs.reward[:, turn] + float(HYPERS.gamma) * returns[turn + 1]
    coefficient = mask * weight * returns[:-1, :, None] / mask.sum()

    belief, items = topk.make_cfn(DIMS, spec.belief_width, spec.item_dim), jnp.asarray(logs.turns.slate).swapaxes(0, 1)
    before = jax.tree.map(lambda x: jnp.swapaxes(jnp.asarray(x), 0, 1)[:-1], logs.turns)

    def by_hand(params):
        logits = belief.unroll((params.belief,), before)[0] @ params.policy.T
        log_pi = jnp.take_along_axis(jax.nn.log_softmax(logits), items[1:], axis=-1)
        return -(coefficient * log_pi).sum()

    expected = jax.jit(jax.grad(by_hand))(state.params)
    new, _, _ = update(spec, logs)
    for part in ("belief", "policy"):
        # Adam's first moment after one update is a tenth of the gradient.
        moments = getattr(new.optimiser, part).mu
        for found, exact in zip(*map(jax.tree.leaves, (moments, getattr(expected, part))), strict=True):
            np.testing.assert_allclose(found, 0.1 * exact, rtol=2e-3, atol=1e-6)


def test_probabilities_that_were_logged_are_those_that_count():
    logs = some_logs()
    learner = topk.make_topk_learner(dataclasses.replace(SMALL, behaviour="logged"), DIMS)
    seen = jax.jit(learner.inspect)(Acting(initial(), HYPERS), logs)
    expected = np.exp(seen.log_pi) / np.swapaxes(logs.propensity, 0, 1)
    np.testing.assert_allclose(seen.weights.ratio[seen.mask > 0], expected[seen.mask > 0], rtol=1e-4)
    np.testing.assert_array_equal(seen.mask, np.swapaxes(logs.turns.clicks[:, 1:], 0, 1))
    with pytest.raises(SettingError, match="hold no propensities"):
        update(dataclasses.replace(SMALL, behaviour="logged"), dataclasses.replace(logs, propensity=()))


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"correction": "second_order"}, "correction"),
        ({"credit": "slate"}, "credit"),
        ({"set_size": -1}, "set_size"),
        ({"certain": 4}, "certain"),
        ({"top_m": 2}, "top_m"),
        ({"negatives": 5, "kl": True}, "negatives"),
        ({"negatives": 5, "action_source": "pi"}, "negatives"),
        ({"behaviour": "logged", "action_source": "pi"}, "action_source"),
        ({"normalise": True, "running": True}, "running"),
        ({"critic": "items"}, "critic"),
        ({"critic": "slate", "negatives": 5}, "negatives"),
        ({"critic": "slate", "credit": "item"}, "credit"),
        ({"policy_step": 0}, "policy_step"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change, setting):
    with pytest.raises(SettingError) as refusal:
        topk.make_topk_reinforce(dataclasses.replace(SMALL, **change), DIMS, None)
    assert refusal.value.setting == setting


@pytest.mark.parametrize(
    "change",
    [{"gamma": 1.1}, {"cap": 0.0}, {"temperature": 0.0}, {"rate": float("nan")}, {"critic_clip": 0.0}],
    ids=str,
)
def test_hypers_out_of_range_are_refused(change):
    with pytest.raises(SettingError):
        topk.validate_hypers(dataclasses.replace(topk.TopKHypers(), **change))


# -- probes ------------------------------------------------------------------------------------------------------------

PROBE = topk.TopKSpec(belief_width=12, item_dim=4, actions="shown", baseline="turn")
PROBE_DIMS = Dims(ITEMS, 1, HORIZON)
PROBE_HYPERS = topk.TopKHypers(gamma=0.8, rate=1e-2, behaviour_rate=1e-2)


@pytest.fixture(scope="module")
def online():
    """`(rules, gamma) -> mean greedy return` after training on its own replayed episodes."""
    agent = topk.make_topk_reinforce(PROBE, PROBE_DIMS, None)
    plan = Plan(users_per_step=20, batch_size=20, replay_capacity=100, warm_up=100, validation_users=50)
    training = make_training(ProbeEnv(), agent, plan)

    @jax.jit
    def train(run):
        return training.epoch(run, training.init(run), jnp.arange(250))[1].validation.mean()

    def trained(rules, gamma=0.8):
        hypers = dataclasses.replace(PROBE_HYPERS, gamma=gamma)
        floats = jax.tree.map(jnp.float32, (hypers, rules))
        return float(train(Run(jax.random.key(0), floats[0], (), floats[1])))

    return trained


@pytest.mark.parametrize(
    "rules", [Rules(left=1.0), Rules(latest_coin=1.0), Rules(earlier_coin=1.0)], ids=["left", "latest", "earlier"]
)
def test_the_best_item_is_found_online(online, rules):
    assert online(rules) >= 0.95 * HORIZON


def test_a_reward_is_credited_to_the_action_before(online):
    bait = 0.2
    rules = Rules(left_before=1.0, bait=bait)
    assert online(rules, gamma=0.0) <= 1.05 * bait * HORIZON
    assert online(rules, gamma=0.8) >= 0.9 * (HORIZON - 1)


@pytest.fixture(scope="module")
def offline():
    """`(rules, skew) -> mean greedy return` after learning from a log alone, in which the left item is rare."""
    agent = topk.make_topk_reinforce(dataclasses.replace(PROBE, behaviour="logged"), PROBE_DIMS, None)
    training = make_offline_training(agent, OfflinePlan(batch_size=50))
    users, env = 500, ProbeEnv()
    shown = jnp.array([0.05, 0.05, 0.3, 0.3, 0.3])  # of each item

    @jax.jit
    def train(rules, hypers, key):
        keys = jax.random.split(key, users)

        def act(_acting, memory, _seen, _hidden, uniforms):
            item = (uniforms > jnp.cumsum(shown)[:-1, None]).sum(axis=0, dtype=jnp.int32)
            return topk.Choice(item, item), memory

        log = from_episodes(episodes(env, topk.Policy(lambda: (), act, draws=1), keys, rules, Acting()))
        log = dataclasses.replace(log, propensity=shown[log.turns.slate[:, 1:]])
        epochs = jnp.arange(40)
        numbers = jnp.arange(training.batches(users))
        learn = lambda state, epoch: training.updates(state, hypers, (), key, log, epoch, numbers)  # noqa: E731
        state, metrics = jax.lax.scan(learn, training.init(key, hypers), epochs)
        played = returns(env, agent.greedy, jax.random.split(jax.random.key(9), 100), rules, Acting(state, hypers))
        return played.mean(), metrics["behaviour_loss"][-1].mean()

    def trained(rules):
        floats = jax.tree.map(jnp.float32, (rules, PROBE_HYPERS))
        reached, behaviour = train(*floats, jax.random.key(4))
        entropy = -float((shown * jnp.log(shown)).sum())
        assert abs(float(behaviour) - entropy) < 0.03 * entropy  # the head knows who logged
        return float(reached)

    return trained


@pytest.mark.parametrize("rules", [Rules(left=1.0), Rules(latest_coin=1.0)], ids=["rare", "coin"])
def test_the_best_item_is_found_from_a_log(offline, rules):
    assert offline(rules) >= 0.95 * HORIZON


@pytest.fixture(scope="module")
def two_of_five():
    """`worth [5] -> (policy's probabilities [5], head's)` after learning from slates of two, drawn from a skewed log,
    with lambda of K = 2 and the head's estimate of the log."""
    dims, shown, users = Dims(5, 2, 2), np.array([0.15, 0.15, 0.3, 0.2, 0.2]), 600
    rng = np.random.default_rng(11)
    slates = rng.choice(5, (users, 3, 2), p=shown).astype(np.int32)
    spec = topk.TopKSpec(belief_width=4, item_dim=3, actions="shown", credit="item")
    learner = topk.make_topk_learner(spec, dims)
    training = make_offline_training(learner.agent, OfflinePlan(batch_size=100))
    hypers = jax.tree.map(jnp.float32, topk.TopKHypers(gamma=0.0, rate=2e-2, behaviour_rate=1e-2))

    @jax.jit
    def train(logs):
        epoch = lambda state, n: training.updates(state, hypers, (), jax.random.key(0), logs, n, jnp.arange(6))  # noqa: E731
        return jax.lax.scan(epoch, training.init(jax.random.key(0), hypers), jnp.arange(150))[0]

    def learnt(worth):
        turns = Observation(slates, np.zeros(slates.shape, bool))
        reward = worth[slates[:, 1:]].astype(np.float32)
        logs = LoggedEpisodes(turns, reward.sum(axis=-1), item_reward=reward)
        seen = jax.jit(learner.inspect)(Acting(train(logs), hypers), logs)
        items = np.swapaxes(slates[:, 1:], 0, 1)
        return tuple(np.array([np.exp(x)[items == n].mean() for n in range(5)]) for x in (seen.log_pi, seen.log_beta))

    return learnt, shown


def test_two_good_items_share_the_policy_that_learns_from_a_log_with_an_estimated_head(two_of_five):
    """First-order learning would show the better one alone; of two draws the second should be the other."""
    learnt, shown = two_of_five
    policy, head = learnt(np.array([10.0, 9.0, 0.0, 0.0, 0.0]))
    np.testing.assert_allclose(head, shown, atol=0.03)
    np.testing.assert_allclose(policy, [10 / 19, 9 / 19, 0.0, 0.0, 0.0], atol=0.06)


def test_explored_slates():
    """At random in the warm-up, else the certain items first and none twice."""
    agent = topk.make_topk_reinforce(dataclasses.replace(SMALL, certain=1, top_m=6), DIMS, None)
    state, start = initial(), agent.explore.start()
    seen = Observation(np.array([0, 1, 2]), np.array([True, False, True]))

    @jax.jit
    def slates(uniforms, at_random):
        acting = Acting(state, HYPERS, (), at_random)
        explored = jax.vmap(lambda u: agent.explore.act(acting, start, seen, None, u)[0].slate)(uniforms)
        return explored, agent.greedy.act(acting, start, seen, None, uniforms[0, :0])[0].slate

    uniforms = np.random.default_rng(5).random((500, agent.explore.draws), np.float32)
    explored, best = (np.asarray(x) for x in slates(uniforms, False))
    assert (explored[:, 0] == best[0]).all() and len({tuple(slate) for slate in explored}) > 10
    assert all(len(set(slate)) == DIMS.slate_size for slate in explored.tolist())
    counts = np.bincount(np.asarray(slates(uniforms, True)[0]).ravel(), minlength=DIMS.num_items)
    assert np.abs(counts / counts.sum() - 1 / 6).max() < 4 * np.sqrt(1 / 6 / counts.sum())
