"""Off-policy training on single transitions: several users side by side, a new one whenever one leaves; one program.

`make_transition_training(env, agent, plan)` is to agents that learn from `Transition`s, in environments where users may
leave, what `train.make_training` is to those that learn from episodes; `Run` is the same. A step takes one turn with
every user, stores what came of the turn BEFORE (only now is it known which slate follows, which SARSA needs), and
updates. A user who left, or whose session was cut off, is replaced one step later; that step is no transition.
Randomness: step n draws from `fold_in(run key, n)`, so results do not depend on how training is cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from gemsjax.agents.base import Acting, Agent, AgentState
from gemsjax.errors import require_count
from gemsjax.replay import Replay, ReplayState, make_ring
from gemsjax.rollout import RESET, turn_key, turn_numbers
from gemsjax.train import INIT, Run
from gemsjax.types import Array, Key, Metrics, Transition


@dataclasses.dataclass(frozen=True)
class TransitionPlan:
    """Static counts of a training run. Changing one makes another program.

    Attributes:
      users: played side by side, so the turns of a step.
      updates_per_step: updates a step.
      batch_size: transitions of an update.
      replay_capacity: transitions kept.
      warm_up: turns with random slates, and without updates, before learning starts.
    """

    users: int = 4
    updates_per_step: int = 1
    batch_size: int = 32
    replay_capacity: int = 50_000
    warm_up: int = 20_000


class Stream(NamedTuple):
    """The users who are being played, U of them; the fields of the turn before are those of `Transition`.

    Attributes:
      seen, user: what an agent sees of them, and the simulator's states.
      before: `(seen, slate, clicks, reward, terminated)` of the turn before.
      valid: [U] bool, whether there was a turn before with this user.
      ended: [U] bool, whether its session ended with it.
      earned: [U] float32, rewards of the session so far.
    """

    seen: Any
    user: Any
    before: tuple[Any, Array, Array, Array, Array]
    valid: Array
    ended: Array
    earned: Array


@struct.dataclass
class TransitionState:
    """What training changes; arrays only.

    Attributes:
      agent: the learner.
      replay: transitions so far.
      stream: the users who are being played.
    """

    agent: AgentState
    replay: ReplayState
    stream: Stream


class TransitionTraining(NamedTuple):
    """Pure functions over one run, sizes bound; vmap them over runs.

    Attributes:
      init: `(run) -> state`.
      steps: `(run, state, numbers [n] int32) -> (state, metrics [n])`: the steps with these numbers. Metrics are those
        of the agent's updates, `updated`, and `finished` [] sessions with the sum of their returns, `finished_return`.
    """

    init: Callable[[Run], TransitionState]
    steps: Callable[[Run, TransitionState, Array], tuple[TransitionState, Metrics]]


def validate_plan(plan: TransitionPlan) -> None:
    """Raise `SettingError` for a count outside its range or counts that do not fit each other."""
    for name in ("users", "updates_per_step"):
        require_count(name, getattr(plan, name))
    require_count("warm_up", plan.warm_up, 0)
    make_ring(plan.replay_capacity, plan.batch_size, plan.users)


def make_transition_training(env: Any, agent: Agent, plan: TransitionPlan) -> TransitionTraining:
    """Bind an environment's static half, an agent whose policies have no memory, and counts.

    Raises:
      SettingError: see `validate_plan`.
    """
    validate_plan(plan)
    assert not jax.tree.leaves(agent.explore.start()), "policies that remember do not train on single transitions"
    loop = _Loop(env, agent, plan, make_ring(plan.replay_capacity, plan.batch_size, plan.users, repeats=True))
    return TransitionTraining(loop.init, loop.steps)


@dataclasses.dataclass(frozen=True)
class _Loop:
    """The loop with its sizes bound."""

    env: Any
    agent: Agent
    plan: TransitionPlan
    replay: Replay

    def init(self, run: Run) -> TransitionState:
        agent_key, users_key = jax.random.split(jax.random.fold_in(run.key, INIT))
        state = self.agent.init(agent_key, run.hypers)
        seen, user = self._new_users(jax.random.split(users_key, self.plan.users), run)
        none = jnp.zeros(self.plan.users, bool)
        slate = jnp.zeros((self.plan.users, self.env.slate_size), jnp.int32)
        before = (seen, slate, jnp.zeros(slate.shape, bool), jnp.zeros(self.plan.users), none)
        stream = Stream(seen, user, before, none, none, jnp.zeros(self.plan.users))
        acting = Acting(state, run.hypers, run.weights, True, jnp.int32(0))
        rows = jax.eval_shape(lambda: self._turn(run, acting, stream, jax.random.split(users_key, self.plan.users))[1])
        empty = self.replay.init(jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), rows))
        return TransitionState(state, empty, jax.tree.map(jnp.copy, stream))

    def steps(self, run: Run, state: TransitionState, numbers: Array) -> tuple[TransitionState, Metrics]:
        # The counter is an unbatched scan input: a counter in the vmapped state would turn the cond into a select.
        return jax.lax.scan(lambda state, number: self._step(run, state, number), state, numbers)

    def _new_users(self, keys: Key, run: Run) -> tuple[Any, Any]:
        return jax.vmap(lambda key: self.env.reset(turn_key(key, RESET), run.env_params))(keys)

    def _turn(self, run: Run, acting: Acting, stream: Stream, keys: Key) -> tuple[Stream, Transition]:
        """One turn of every user: the users after it, and the transitions that their last turns turned out to be."""
        env, explore = self.env, self.agent.explore

        def choose(seen: Any, user: Any, uniforms: Array) -> Array:
            hidden = (user, run.env_params) if explore.privileged else None
            return explore.act(acting, explore.start(), seen, hidden, uniforms)[0].slate

        luck, uniforms = jax.vmap(lambda key: turn_numbers(env, explore, key))(keys)
        slate = jax.vmap(choose)(stream.seen, stream.user, uniforms)
        hidden = () if explore.remember is None else jax.vmap(explore.remember)(stream.user)
        turned_out = Transition(*stream.before, stream.seen, slate, hidden, stream.valid)
        played = jax.vmap(env.play, in_axes=(0, 0, 0, None))(luck, stream.user, slate, run.env_params)
        seen, user, reward, terminated, truncated, _ = played
        before = (stream.seen, slate, seen.clicks, reward, terminated)
        on = Stream(seen, user, before, ~stream.ended, terminated | truncated, stream.earned + reward)
        none = jnp.zeros_like(stream.ended)
        fresh = Stream(*self._new_users(keys, run), before, none, none, jnp.zeros_like(stream.earned))
        ended = lambda new, old: jnp.where(stream.ended.reshape(-1, *[1] * (new.ndim - 1)), new, old)  # noqa: E731
        return jax.tree.map(ended, fresh, on), turned_out

    def _step(self, run: Run, state: TransitionState, number: Array) -> tuple[TransitionState, Metrics]:
        plan = self.plan
        keys = jax.random.split(jax.random.fold_in(run.key, number), plan.users + 2 * plan.updates_per_step)
        learn_keys = keys[plan.users :].reshape(-1, 2)
        at_random = number * plan.users < plan.warm_up
        acting = Acting(state.agent, run.hypers, run.weights, at_random, number)
        stream, turned_out = self._turn(run, acting, state.stream, keys[: plan.users])
        stored = self.replay.add(state.replay, turned_out)

        def learn(agent_state: AgentState, keys: Key) -> tuple[AgentState, Metrics]:
            batch = self.replay.sample(stored, keys[0])
            noise = self.agent.draw_update(keys[1], plan.batch_size)
            return self.agent.update(acting._replace(state=agent_state), batch, noise)

        def updates(agent_state: AgentState) -> tuple[AgentState, Metrics]:
            if plan.updates_per_step == 1:
                return learn(agent_state, learn_keys[0])
            agent_state, metrics = jax.lax.scan(learn, agent_state, learn_keys)
            return agent_state, jax.tree.map(lambda x: x.mean(axis=0), metrics)

        def nothing(agent_state: AgentState) -> tuple[AgentState, Metrics]:
            metrics = jax.eval_shape(updates, agent_state)[1]
            return agent_state, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)

        learns = ~at_random & (number * plan.users >= plan.batch_size)
        agent_state, metrics = jax.lax.cond(learns, updates, nothing, state.agent)
        finished = stream.ended & stream.valid
        metrics |= {
            "updated": learns,
            "finished": finished.sum(),
            "finished_return": jnp.where(finished, stream.earned, 0.0).sum(),
        }
        return TransitionState(agent_state, stored, stream), metrics
