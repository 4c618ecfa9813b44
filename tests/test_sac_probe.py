"""SAC finds the best policy where it is known: the right item, the right item of a coin, credit for a later reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import HORIZON, ITEMS, ProbeEnv, Rules, make_grid_ranker

from gemsjax.agents import sac
from gemsjax.rankers import Ranker
from gemsjax.rankers.items import item_weights, make_khead_ranker, make_topk_ranker
from gemsjax.rankers.plackett_luce import make_plackett_luce_ranker, plackett_luce_weights
from gemsjax.train import Plan, Run, make_training
from gemsjax.types import Dims

EPOCHS, EPOCH_STEPS = 7, 100
BAIT = 0.2


def trainer(ranker: Ranker, weights: Any = ()) -> Callable[..., float]:
    """`(rules, gamma, seed) -> mean greedy return after training`: one program for all probes of a ranker."""
    agent = sac.make_sac(sac.SACSpec(hidden=32, belief_width=8, item_dim=4), Dims(ITEMS, 1, HORIZON), ranker)
    plan = Plan(users_per_step=10, batch_size=20, replay_capacity=1_000, warm_up=100, validation_users=50)
    training = make_training(ProbeEnv(), agent, plan)

    @jax.jit
    def train(run):
        def epoch(state, number):
            state, metrics = training.epoch(run, state, number * EPOCH_STEPS + jnp.arange(EPOCH_STEPS))
            return state, metrics.validation.mean()

        return jax.lax.scan(epoch, training.init(run), jnp.arange(EPOCHS))[1]

    def trained(rules: Rules, gamma: float = 0.8, seed: int = 0) -> float:
        hypers = sac.SACHypers(gamma=gamma, tau=0.02, critic_rate=3e-3, actor_rate=3e-3, initial_alpha=0.05)
        floats = jax.tree.map(jnp.float32, (hypers, rules))
        return float(np.asarray(train(Run(jax.random.key(seed), floats[0], weights, floats[1])))[-1])

    return trained


@pytest.fixture(scope="module")
def greedy_return() -> Callable[..., float]:
    return trainer(make_grid_ranker())


CORNERS = ((-0.5, -0.5), (-1.0, 0.5), (0.0, 0.5), (1.0, 0.5), (0.5, -0.5))
"""Embeddings of the items, each the nearest to some query."""
DIMS = Dims(ITEMS, 1, HORIZON)


@pytest.fixture(scope="module")
def greedy_return_drawn() -> Callable[..., float]:
    """The same where the action is a query, and exploring slates are drawn by it (`sac-pl`)."""
    weights = plackett_luce_weights(item_weights(jnp.array(CORNERS)), temperature=0.3, penalty=1.0)
    return trainer(make_plackett_luce_ranker(DIMS, 2), weights)


@pytest.mark.slow
@pytest.mark.parametrize("make_ranker", [make_topk_ranker, make_khead_ranker])
def test_queries_find_the_best_item(make_ranker):
    """The action is a query for the largest dot product (`sac-topk-ideal`, `sac-topk-mf`, `sac-khead`)."""
    trained = trainer(make_ranker(DIMS, 2), item_weights(jnp.array(CORNERS)))
    assert trained(Rules(latest_coin=1.0)) >= 0.95 * HORIZON


@pytest.mark.parametrize(
    "rules", [Rules(left=1.0), Rules(latest_coin=1.0), Rules(earlier_coin=1.0)], ids=["left", "latest", "earlier"]
)
def test_drawn_slates_find_the_best_too(greedy_return_drawn, rules):
    assert greedy_return_drawn(rules) >= 0.95 * HORIZON


def test_drawn_slates_credit_the_action_before(greedy_return_drawn):
    rules = Rules(left_before=1.0, bait=BAIT)
    assert greedy_return_drawn(rules, gamma=0.0) <= 1.05 * BAIT * HORIZON
    assert greedy_return_drawn(rules, gamma=0.8) >= 0.95 * (HORIZON - 1 + BAIT)


def test_learning_starts_at_the_configured_temperature_unless_told_otherwise():
    agent = sac.make_sac(sac.SACSpec(hidden=4, belief_width=2, item_dim=2), Dims(ITEMS, 1, HORIZON), make_grid_ranker())
    start = lambda **alphas: agent.init(jax.random.key(0), sac.SACHypers(**alphas))  # noqa: E731
    assert float(start(initial_alpha=0.05).alpha) == np.float32(0.05)
    published = start(**sac.PUBLISHED["hypers"])
    assert float(published.alpha) == np.float32(0.2) and float(published.params.log_alpha) == 0.0


@pytest.mark.parametrize("seed", [0, 1])
def test_the_best_slate_is_found(greedy_return, seed):
    assert greedy_return(Rules(left=1.0), seed=seed) >= 0.95 * HORIZON


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("rules", [Rules(latest_coin=1.0), Rules(earlier_coin=1.0)], ids=["latest", "earlier"])
def test_the_belief_tells_what_was_observed(greedy_return, rules, seed):
    """Half of the best return is all that there is without looking (and, for the earlier coin, remembering)."""
    assert greedy_return(rules, seed=seed) >= 0.95 * HORIZON


@pytest.mark.parametrize("seed", [0, 1])
def test_a_reward_is_credited_to_the_action_before(greedy_return, seed):
    """The left item pays one turn later: an agent that does not look ahead takes the bait instead."""
    rules = Rules(left_before=1.0, bait=BAIT)
    best = HORIZON - 1 + BAIT  # nothing follows the last turn, so its action may take the bait
    assert greedy_return(rules, gamma=0.0, seed=seed) <= 1.05 * BAIT * HORIZON
    assert greedy_return(rules, gamma=0.8, seed=seed) >= 0.95 * best
