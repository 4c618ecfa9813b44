"""The loop over logged episodes: an epoch visits every user once, in a new order, and is one compiled program.

`make_offline_training(agent, plan)` works with any `Agent` whose `update` takes the episodes that it is given:
`LoggedEpisodes` for agents that correct for the logging policy, `Episode` for all. Randomness: epoch n draws from
`fold_in(key, n)`, its batch b from a further `fold_in(., b)`, so results do not depend on how an epoch is cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemsjax.agents.base import Acting, Agent, AgentState, Hypers
from gemsjax.errors import require, require_count
from gemsjax.maths.shuffle import shuffled
from gemsjax.types import Array, Key, Metrics


@dataclasses.dataclass(frozen=True)
class OfflinePlan:
    """Static counts.

    Attributes:
      batch_size: users of an update; the rest of an epoch that fills no batch waits for the next order.
      shuffle: a new random order of the users each epoch.
    """

    batch_size: int = 32
    shuffle: bool = True


class OfflineTraining(NamedTuple):
    """Pure functions, sizes bound; `logs` is any pytree of arrays [U, ...].

    Attributes:
      init: `(key, hypers) -> agent state`.
      updates: `(agent state, hypers, weights, key, logs, epoch, numbers [n]) -> (agent state, metrics [n])`: the
        updates that have these numbers in epoch `epoch`.
      batches: `(users) -> n`, updates of a whole epoch.
    """

    init: Callable[[Key, Hypers], AgentState]
    updates: Callable[..., tuple[AgentState, Metrics]]
    batches: Callable[[int], int]


INIT = 2**32 - 1
"""Where epochs have their number, initialisation has this."""


def make_offline_training(agent: Agent, plan: OfflinePlan) -> OfflineTraining:
    """Bind an agent and counts.

    Raises:
      SettingError: a batch size below 1, or (from `batches` and `updates`) above the number of users.
    """
    require_count("batch_size", plan.batch_size)

    def init(key: Key, hypers: Hypers) -> AgentState:
        return agent.init(jax.random.fold_in(key, INIT), hypers)

    def batches(users: int) -> int:
        require(plan.batch_size <= users, "batch_size", plan.batch_size, f"at most the {users} logged users")
        return users // plan.batch_size

    def updates(
        state: AgentState, hypers: Hypers, weights: Any, key: Key, logs: Any, epoch: Array, numbers: Array
    ) -> tuple[AgentState, Metrics]:
        users = jax.tree.leaves(logs)[0].shape[0]
        batches(users)
        order_key, noise_key = jax.random.split(jax.random.fold_in(key, epoch))

        def one(state: AgentState, number: Array) -> tuple[AgentState, Metrics]:
            rows = number * plan.batch_size + jnp.arange(plan.batch_size)
            rows = shuffled(rows, users, order_key) if plan.shuffle else rows
            batch = jax.tree.map(lambda column: column[rows], logs)
            noise = agent.draw_update(jax.random.fold_in(noise_key, number), plan.batch_size)
            return agent.update(Acting(state, hypers, weights), batch, noise)

        return jax.lax.scan(one, state, numbers)

    return OfflineTraining(init, updates, batches)
