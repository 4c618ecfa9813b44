"""PPO and A2C through a ranker: worlds whose best policy is known, rewards that are no numbers, settings."""

from __future__ import annotations

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import HORIZON, ITEMS, ProbeEnv, Rules, make_grid_ranker

from gemsjax.agents import a2c, ppo
from gemsjax.agents.base import Acting
from gemsjax.errors import SettingError
from gemsjax.rollout import episodes
from gemsjax.settings import TrainSettings
from gemsjax.train import Plan, Run, make_training
from gemsjax.types import Dims

DIMS, SIZES, BAIT, SEEDS = Dims(ITEMS, 1, HORIZON), {"hidden": 32, "belief_width": 8, "item_dim": 4}, 0.2, 1
AGENTS = {
    "ppo": (ppo.make_ppo(ppo.PPOSpec(epochs=4, minibatch=8, **SIZES), DIMS, make_grid_ranker()), ppo.PPOHypers),
    "a2c": (a2c.make_a2c(a2c.A2CSpec(**SIZES), DIMS, make_grid_ranker()), a2c.A2CHypers),
}
STEPS = {"ppo": 40, "a2c": 300}
CASES = {
    "left": (Rules(left=1.0), 0.8),
    "latest coin": (Rules(latest_coin=1.0), 0.0),
    "earlier coin": (Rules(earlier_coin=1.0), 0.0),
    "delayed": (Rules(left_before=1.0, bait=BAIT), 0.8),
    "bait": (Rules(left_before=1.0, bait=BAIT), 0.0),
}


@cache
def greedy_returns(name):
    """{case: [SEEDS] mean greedy returns after training}, all runs of a learner in one program."""
    agent, hypers = AGENTS[name]
    plan = Plan(users_per_step=32, batch_size=32, replay_capacity=32, warm_up=0, validation_users=50)
    training = make_training(ProbeEnv(), agent, plan)

    def train(rules, gamma, seed):
        run = Run(jax.random.key(seed), hypers(gamma=gamma, rate=1e-2), (), rules)
        return training.epoch(run, training.init(run), jnp.arange(STEPS[name]))[1].validation.mean()

    cases = [(rules, gamma, seed) for rules, gamma in CASES.values() for seed in range(SEEDS)]
    rules, gamma, seeds = jax.tree.map(lambda *x: jnp.array(x), *cases)
    found = jax.jit(jax.vmap(train), compiler_options={"xla_backend_optimization_level": 1})(rules, gamma, seeds)
    return dict(zip(CASES, np.asarray(found).reshape(-1, SEEDS).tolist(), strict=True))


@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize("case", ["left", "latest coin", "earlier coin"])
def test_the_best_item_is_found_and_the_belief_tells_what_was_observed(name, case):
    assert min(greedy_returns(name)[case]) >= 0.95 * HORIZON


@pytest.mark.parametrize("name", AGENTS)
def test_a_reward_is_credited_to_the_action_before(name):
    assert max(greedy_returns(name)["bait"]) <= 1.05 * BAIT * HORIZON
    assert min(greedy_returns(name)["delayed"]) >= 0.95 * (HORIZON - 1 + BAIT)


# -- what else must hold -----------------------------------------------------------------------------------------------


@cache
def an_update(name, reward_of):
    """Metrics and parameters of one update on the same episodes with other rewards."""
    agent, hypers = AGENTS[name]
    acting = Acting(agent.init(jax.random.key(0), hypers()), jax.tree.map(jnp.float32, hypers()))
    batch = episodes(ProbeEnv(), agent.explore, jax.random.split(jax.random.key(1), 6), Rules(left=1.0), acting)
    noise = agent.draw_update(jax.random.key(2), 6)

    def one(reward):
        return agent.update(acting, dataclasses.replace(batch, reward=reward), noise)

    updates = jax.jit(jax.vmap(one), compiler_options={"xla_backend_optimization_level": 0})
    broken = batch.reward.at[2, 3].set(reward_of)
    # The same number in place of the broken one, and no number anywhere.
    return jax.tree.map(np.asarray, updates(jnp.stack([broken, jnp.full_like(broken, reward_of), batch.reward])))


@pytest.mark.parametrize("name", ["ppo", "a2c"])
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_reward_that_is_no_number_is_not_learnt_from(name, broken):
    state, metrics = an_update(name, broken)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state, metrics)))
    weights = np.concatenate([leaf.reshape(3, -1) for leaf in jax.tree.leaves(state.params)], axis=1)
    start = AGENTS[name][0].init(jax.random.key(0), None).params
    before = np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(start)])
    np.testing.assert_array_equal(weights[1], before)  # nothing to learn from at all
    assert np.abs(weights[0] - before).max() > 1e-4 and np.abs(weights[0] - weights[2]).max() > 0.0


def test_ppo_visits_every_episode_once_an_epoch():
    agent = ppo.make_ppo(ppo.PPOSpec(epochs=3, minibatch=4, **SIZES), DIMS, make_grid_ranker())
    orders = np.asarray(agent.draw_update(jax.random.key(0), 8)).reshape(3, 8)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(8), (3, 1)))
    assert len({tuple(order) for order in orders}) == 3
    assert agent.draw_update(jax.random.key(0), 10).shape == (6, 4)  # two of ten wait
    assert agent.draw_update(jax.random.key(0), 3).shape == (3, 3)


MANY = Plan(users_per_step=8, batch_size=8, replay_capacity=8, warm_up=0)


@pytest.mark.parametrize(
    ("method", "part", "says"),
    [
        ("ppo-gems", {"spec": ppo.PPOSpec(minibatch=0)}, "minibatch = 0 .* at least 1"),
        ("ppo-topk-mf", {"hypers": ppo.PPOHypers(clip=0.0)}, "clip = 0.0 .* positive"),
        ("ppo-gems", {"hypers": ppo.PPOHypers(lam=1.5)}, "lam = 1.5"),
        ("a2c-gems", {"spec": a2c.A2CSpec(returns="gea")}, "did you mean 'gae'"),
        ("a2c-topk-mf", {"hypers": a2c.A2CHypers(entropy=-1.0)}, "entropy = -1.0"),
        ("a2c-gems", {"plan": Plan(batch_size=20, replay_capacity=100)}, "episodes of its own step"),
        ("ppo-gems", {"plan": dataclasses.replace(MANY, stale=True)}, "stale = True .* only False, since PPO"),
        (
            "a2c-topk-mf",
            {"plan": dataclasses.replace(MANY, updates_per_step=4)},
            "updates_per_step = 4 .* only 1",
        ),
        (
            "ppo-topk-mf",
            {"plan": dataclasses.replace(MANY, update_in_warm_up=True)},
            "update_in_warm_up = True",
        ),
    ],
)
def test_settings_out_of_range_are_refused(method, part, says):
    with pytest.raises(SettingError, match=says):
        TrainSettings(method=method, **part).resolved()


@pytest.mark.parametrize("method", ["ppo-gems", "a2c-topk-mf"])
def test_a_warm_up_without_updates_is_no_other_policy_to_learn_from(method):
    """Its random episodes are gone before the first update: the replay holds those of one step."""
    plan = dataclasses.replace(MANY, warm_up=500)
    assert TrainSettings(method=method, plan=plan).resolved().plan == plan


def test_the_published_reinforce_may_still_be_stale():
    plan = TrainSettings(method="reinforce-gems", variant="published").resolved().plan
    assert plan.stale and plan.update_in_warm_up
