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

DIMS, SIZES, BAIT, SEEDS = Dims(ITEMS, 1, HORIZON), {"hidden": 32, "belief_width": 8, "item_dim": 4}, 0.2, 2
AGENTS = {
    "ppo": (ppo.make_ppo(ppo.PPOSpec(epochs=4, minibatch=16, **SIZES), DIMS, make_grid_ranker()), ppo.PPOHypers),
    "a2c": (a2c.make_a2c(a2c.A2CSpec(**SIZES), DIMS, make_grid_ranker()), a2c.A2CHypers),
    "a2c-nstep": (a2c.make_a2c(a2c.A2CSpec(returns="nstep", **SIZES), DIMS, make_grid_ranker()), a2c.A2CHypers),
}
STEPS, RATE = {"ppo": 60, "a2c": 300, "a2c-nstep": 300}, {"ppo": 1e-2, "a2c": 1e-2, "a2c-nstep": 1e-2}
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
    plan = Plan(users_per_step=64, batch_size=64, replay_capacity=64, warm_up=0, validation_users=50)
    training = make_training(ProbeEnv(), agent, plan)

    def train(rules, gamma, seed):
        run = Run(jax.random.key(seed), hypers(gamma=gamma, rate=RATE[name]), (), rules)
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
