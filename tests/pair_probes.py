"""The probes' environment with slates of two: a slate counts as the left or right item if it has one without the other.

With several runs of one learner trained side by side, so that all probes of a file are one program.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from probes import HORIZON, LEFT, MIDDLE, RIGHT, ProbeEnv, Rules, User

from gemsjax.agents.base import Agent
from gemsjax.train import Plan, Run, make_training
from gemsjax.types import Array, Key, Observation

BAIT = 0.2


@dataclasses.dataclass(frozen=True)
class PairEnv(ProbeEnv):
    """`ProbeEnv` with K = 2; both clicks show the coin."""

    slate_size: int = 2

    def reset(self, key: Key, rules: Rules) -> tuple[Observation, User]:
        seen, user = super().reset(key, rules)
        return jax.tree.map(lambda x: jnp.tile(x, 2), seen), user

    def play(self, uniforms: Array, user: User, slate: Array, rules: Rules) -> tuple:
        left, right = (slate == LEFT).any(), (slate == RIGHT).any()
        item = jnp.where(left & ~right, LEFT, jnp.where(right & ~left, RIGHT, MIDDLE))
        seen, *rest = super().play(uniforms, user, item[None], rules)
        return Observation(slate, jnp.tile(seen.clicks, 2)), *rest


class Case(NamedTuple):
    """What one run is rewarded for, and how far it looks ahead."""

    rules: Rules
    gamma: float = 0.8
    seed: int = 0


DELAYED = Rules(left_before=1.0, bait=BAIT)
CASES = {
    "left": Case(Rules(left=1.0)),
    "left, another seed": Case(Rules(left=1.0), seed=1),
    "latest coin": Case(Rules(latest_coin=1.0)),
    "earlier coin": Case(Rules(earlier_coin=1.0)),
    "delayed": Case(DELAYED),
    "delayed, not looking ahead": Case(DELAYED, gamma=0.0),
}


def train_all(env: ProbeEnv, agent: Agent, hypers: Any, weights: Any, epochs: int = 7) -> dict[str, float]:
    """Mean greedy return of each case after training: one program, the cases side by side."""
    plan = Plan(users_per_step=10, batch_size=20, replay_capacity=1_000, warm_up=100, validation_users=30)
    training = make_training(env, agent, plan)

    def train(rules: Rules, gamma: Array, seed: Array) -> Array:
        run = Run(jax.random.key(seed), hypers.replace(gamma=gamma), weights, rules)

        def epoch(state: Any, number: Array) -> tuple[Any, Array]:
            state, metrics = training.epoch(run, state, number * 100 + jnp.arange(100))
            return state, metrics.validation.mean()

        return jax.lax.scan(epoch, training.init(run), jnp.arange(epochs))[1][-1]

    cases = jax.tree.map(lambda *x: np.asarray(x), *CASES.values())
    rules, gamma, hypers = jax.tree.map(np.float32, (cases.rules, cases.gamma, hypers))
    # Compiling is most of the time; at this level it takes half as long.
    together = jax.jit(jax.vmap(train), compiler_options={"xla_backend_optimization_level": 1})
    returns = together(rules, gamma, cases.seed)
    return dict(zip(CASES, np.asarray(returns).tolist(), strict=True))


def check(returns: dict[str, float], share: float = 0.95) -> None:
    """Every case reaches `share` of its best return, and without looking ahead only the bait is taken."""
    best = {name: float(HORIZON) for name in CASES} | {"delayed": HORIZON - 1 + BAIT}
    del best["delayed, not looking ahead"]
    short = {name: value for name, value in returns.items() if name in best and value < share * best[name]}
    assert not short, f"below {share} of {best}"
    assert returns["delayed, not looking ahead"] <= 1.05 * BAIT * HORIZON
