"""Off-policy training: one epoch (collect, store, sample, update, validate) is one compiled program.

`make_training(env, agent, plan)` gives pure functions over one run; `runs.py` drives them from the host, sweeps vmap
them. What may differ between runs of one program is in `Run`; what training changes in `TrainState`.
Randomness: step n draws from `fold_in(run key, n)`, so results depend neither on how epochs are cut nor on resuming.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from gemsjax.agents.base import Acting, Agent, AgentState, Hypers, Weights
from gemsjax.errors import require, require_count
from gemsjax.evaluate import numbered_users, user_keys
from gemsjax.replay import Replay, ReplayState, make_replay
from gemsjax.rollout import episodes, returns
from gemsjax.shares import count, gathered, own
from gemsjax.types import Array, Dims, Episode, Key, Metrics


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static counts of a training run (paper section 5.1). Changing one makes another program.

    Attributes:
      users_per_step: episodes collected a step.
      updates_per_step: updates a step.
      batch_size: episodes of an update.
      replay_capacity: episodes kept.
      warm_up: episodes collected at random, and without updates, before learning starts (which also needs a batch).
      validation_users: users of the greedy validation after each epoch.
      stale: an update does not yet see the episodes of its own step (published slip [22] of REINFORCE).
      update_in_warm_up: it learns from the random episodes too (published slip [23]).
      common_users: every run meets the same training users (as published, see [19]), not its own.
    """

    users_per_step: int = 1
    updates_per_step: int = 1
    batch_size: int = 20
    replay_capacity: int = 10_000
    warm_up: int = 2_000
    validation_users: int = 200
    stale: bool = False
    update_in_warm_up: bool = False
    common_users: bool = False


@struct.dataclass
class Run:
    """The data of one run; may carry a run axis.

    Attributes:
      key: the run's key, from its seed.
      hypers: the agent's hyper-parameters.
      weights: what is frozen while the agent learns, see `Acting`.
      env_params: of the environment.
    """

    key: Key
    hypers: Hypers
    weights: Weights
    env_params: Any


@struct.dataclass
class TrainState:
    """What training changes; arrays only, so it is checkpointed and donated as it is.

    Attributes:
      agent: the learner.
      replay: episodes so far.
      best_agent, best_return: the agent with the highest mean validation return so far, and that return.
    """

    agent: AgentState
    replay: ReplayState
    best_agent: AgentState
    best_return: Array


class EpochMetrics(NamedTuple):
    """What an epoch reports.

    Attributes:
      steps: of every step [n]: `return` of its episodes, whether it `updated`, and what the agent's update reports.
      validation: [V] return of each validation user.
      finite: [] whether every number of the agent's state still is; losses show it one update late.
    """

    steps: Metrics
    validation: Array
    finite: Array


class Training(NamedTuple):
    """Pure functions, sizes bound.

    Attributes:
      init: `(run) -> state`.
      epoch: `(run, state, steps [n] int32) -> (state, metrics)`: the steps numbered `steps`, then validation.
      steps: the same without validation: `(run, state, steps) -> (state, metrics [n] of every step)`.
    """

    init: Callable[[Run], TrainState]
    epoch: Callable[[Run, TrainState, Array], tuple[TrainState, EpochMetrics]]
    steps: Callable[[Run, TrainState, Array], tuple[TrainState, Metrics]]


INIT = 2**32 - 1
"""Where steps have their number, initialisation has this."""


def validate_plan(plan: Plan) -> None:
    """Raise `SettingError` for a count outside its range or counts that do not fit each other."""
    for field in dataclasses.fields(plan):
        if not isinstance(field.default, bool):
            require_count(field.name, getattr(plan, field.name), 0 if field.name == "warm_up" else 1)
    require_count("batch_size", plan.batch_size, 1, plan.replay_capacity)
    fits = plan.replay_capacity % plan.users_per_step == 0
    require(fits, "replay_capacity", plan.replay_capacity, f"a multiple of users_per_step = {plan.users_per_step}")


def make_training(env: Any, agent: Agent, plan: Plan) -> Training:
    """Bind an environment's static half, an agent and counts.

    Raises:
      SettingError: see `validate_plan` and `make_replay`.
    """
    validate_plan(plan)
    dims = Dims(env.num_items, env.slate_size, env.horizon)
    replay = make_replay(dims, plan.replay_capacity, plan.batch_size, plan.users_per_step)
    loop = _Loop(env, agent, plan, replay)
    return Training(loop.init, loop.epoch, loop.steps)


@dataclasses.dataclass(frozen=True)
class _Loop:
    """The off-policy loop with its sizes bound."""

    env: Any
    agent: Agent
    plan: Plan
    replay: Replay

    def init(self, run: Run) -> TrainState:
        state = self.agent.init(jax.random.fold_in(run.key, INIT), run.hypers)
        acting = Acting(state, run.hypers, run.weights, True, jnp.int32(0))
        shapes = jax.eval_shape(lambda: self._collect(run, acting, run.key[None], None))
        empty = self.replay.init(jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), shapes))
        return TrainState(state, empty, jax.tree.map(jnp.copy, state), jnp.float32(-jnp.inf))

    def steps(self, run: Run, state: TrainState, numbers: Array) -> tuple[TrainState, Metrics]:
        # The counter is an unbatched scan input: a counter in the vmapped state would turn the cond into a select.
        return jax.lax.scan(lambda state, number: self._step(run, state, number), state, numbers)

    def epoch(self, run: Run, state: TrainState, numbers: Array) -> tuple[TrainState, EpochMetrics]:
        state, metrics = self.steps(run, state, numbers)
        acting = Acting(state.agent, run.hypers, run.weights)
        users = user_keys("validation", self.plan.validation_users)
        if self.plan.validation_users % count() == 0:
            validation = gathered(returns(self.env, self.agent.greedy, own(users), run.env_params, acting))
        else:
            validation = returns(self.env, self.agent.greedy, users, run.env_params, acting)
        better = validation.mean() > state.best_return
        best_agent = jax.tree.map(lambda new, old: jnp.where(better, new, old), state.agent, state.best_agent)
        best_return = jnp.maximum(validation.mean(), state.best_return)
        state = dataclasses.replace(state, best_agent=best_agent, best_return=best_return)
        finite = jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.agent)]).all()
        return state, EpochMetrics(metrics, validation, finite)

    def _collect(self, run: Run, acting: Acting, users: Key, policy_keys: Key | None) -> Episode:
        return episodes(self.env, self.agent.explore, users, run.env_params, acting, policy_keys)

    def _learn(self, acting: Acting, stored: ReplayState, keys: Key) -> tuple[AgentState, Metrics]:
        """One update; `keys` [2] are those of the sample and of the noise."""
        batch = own(self.replay.sample(stored, keys[0]))
        noise = self.agent.draw_update(keys[1], self.plan.batch_size)
        return self.agent.update(acting, batch, noise)

    def _step(self, run: Run, state: TrainState, number: Array) -> tuple[TrainState, Metrics]:
        """Collect, store and, after the warm-up, update."""
        plan = self.plan
        keys = jax.random.split(jax.random.fold_in(run.key, number), plan.users_per_step + 2 * plan.updates_per_step)
        own_keys, learn_keys = keys[: plan.users_per_step], keys[plan.users_per_step :].reshape(-1, 2)
        at_random = number * plan.users_per_step < plan.warm_up
        acting = Acting(state.agent, run.hypers, run.weights, at_random, number)
        if plan.common_users:
            first = number * plan.users_per_step
            users = numbered_users("training", first + jnp.arange(plan.users_per_step))
            collected = self._collect(run, acting, users, own_keys)
        else:
            collected = self._collect(run, acting, own_keys, None)
        stored = self.replay.add(state.replay, collected)
        seen = state.replay if plan.stale else stored

        def updates(agent_state: AgentState) -> tuple[AgentState, Metrics]:
            learn = lambda agent_state, keys: self._learn(acting._replace(state=agent_state), seen, keys)  # noqa: E731
            if plan.updates_per_step == 1:
                return learn(agent_state, learn_keys[0])
            agent_state, metrics = jax.lax.scan(learn, agent_state, learn_keys)
            return agent_state, jax.tree.map(lambda x: x.mean(axis=0), metrics)

        def nothing(agent_state: AgentState) -> tuple[AgentState, Metrics]:
            metrics = jax.eval_shape(updates, agent_state)[1]
            return agent_state, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)

        learns = jnp.bool_(True) if plan.update_in_warm_up else ~at_random
        # No update before there is a batch. Known from the step's number, like the warm-up: a predicate from the state
        # would be batched where runs are vmapped.
        learns &= (number + (0 if plan.stale else 1)) * plan.users_per_step >= plan.batch_size
        agent_state, metrics = jax.lax.cond(learns, updates, nothing, state.agent)
        metrics = metrics | {"return": collected.reward.sum(axis=1).mean(), "updated": learns}
        return dataclasses.replace(state, agent=agent_state, replay=stored), metrics
