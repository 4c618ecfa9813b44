"""Deterministic actor-critics over a ranker's action space: what DDPG and TD3 share. Called by ddpg.py and td3.py.

Beliefs, replay of whole episodes, the ranker's box and the random warm-up are SAC's; so is the order of an update
(critics, then the actor against the updated critics, on beliefs from before). Next states are the online beliefs
shifted by a turn; targets are kept of the critics and of the policy network.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from gemsjax.agents import actor_critic
from gemsjax.agents.actor_critic import Networks, inside
from gemsjax.agents.base import Acting, Agent, Choice, Policy
from gemsjax.belief import make_gru
from gemsjax.errors import require, require_count
from gemsjax.maths.blocks import gradients_over_turns, over_turns
from gemsjax.maths.optimise import adam_init
from gemsjax.maths.randomness import normal
from gemsjax.nets.mlp import MLP, Critic
from gemsjax.rankers import Ranker
from gemsjax.shares import averaged, normal_of_episodes
from gemsjax.types import Array, Dims, Episode, Key, Metrics, Observation, Params


@dataclasses.dataclass(frozen=True)
class DeterministicSpec:
    """Static choices: changing one makes another program.

    Attributes:
      hidden: width of the hidden layer of policy and critics.
      belief_width: width of the recurrent states.
      item_dim: width of the beliefs' item embeddings.
    """

    hidden: int = 256
    belief_width: int = 20
    item_dim: int = 20


@struct.dataclass
class DeterministicHypers:
    """Numbers that may differ between runs of one program (float32 scalars once inside a program).

    Attributes:
      gamma: discount per turn.
      tau: share of the online networks that enters the targets.
      critic_rate: Adam's learning rate of the critics and their belief.
      actor_rate: Adam's learning rate of the policy and its belief.
      exploration: standard deviation of the noise on explored actions, in half ranges of the box.
      saturation_cost: weight of the mean squared output of the policy network, before its tanh, in its loss. Without,
        a policy that once reached a corner of the box stays there, for its gradient vanishes.
    """

    gamma: float = 0.8
    tau: float = 0.002
    critic_rate: float = 1e-3
    actor_rate: float = 1e-3
    exploration: float = 0.1
    saturation_cost: float = 0.01


class Rule(NamedTuple):
    """What tells DDPG and TD3 apart, static.

    Attributes:
      critics: how many; the target is their smallest value.
      smooth: whether the target policy's action is disturbed, by `hypers.smoothing` and up to `hypers.smoothing_clip`.
      delay: updates of the critics for one of the actor and of all targets.
    """

    critics: int
    smooth: bool
    delay: int


@struct.dataclass
class DeterministicParams:
    """One field for each part that is updated on its own (or Adam's moments of it); `critics` is a tuple."""

    actor_belief: Any
    critic_belief: Any
    policy: Any
    critics: Any


@struct.dataclass
class DeterministicState:
    """Everything that an update changes.

    Attributes:
      params: see `DeterministicParams`.
      target_policy, target_critics: what targets are made with.
      optimiser: `DeterministicParams` whose fields are Adam's moments of that part.
      updates: [] int32, how many there were.
    """

    params: DeterministicParams
    target_policy: Params
    target_critics: tuple[Params, ...]
    optimiser: DeterministicParams
    updates: Array


def validate_spec(spec: DeterministicSpec) -> None:
    """Raise `SettingError` for a count below 1."""
    for name, value in dataclasses.asdict(spec).items():
        require_count(name, value)


def validate_hypers(hypers: Any, positive: tuple[str, ...] = ()) -> None:
    """Raise `SettingError` for a hyper-parameter outside its range (host-side numbers only)."""
    actor_critic.check_hypers(hypers, rates=("critic_rate", "actor_rate"), positive=("exploration", *positive))
    require(hypers.saturation_cost >= 0.0, "saturation_cost", hypers.saturation_cost, "a number of at least 0")


def make_deterministic(spec: DeterministicSpec, dims: Dims, ranker: Ranker, rule: Rule) -> Agent:
    """A deterministic actor-critic by `rule`; `spec` is already checked."""
    belief = make_gru(dims, spec.belief_width, spec.item_dim)
    networks = Networks(belief, MLP((spec.hidden, ranker.action_dim)), Critic(spec.hidden))

    def init(key: Key, _hypers: Any) -> DeterministicState:
        parts, target_critics = networks.init(key, ranker.action_dim, rule.critics)
        params = DeterministicParams(**parts)
        optimiser = DeterministicParams(**{part: adam_init(value) for part, value in parts.items()})
        target_policy = jax.tree.map(jnp.copy, params.policy)
        return DeterministicState(params, target_policy, target_critics, optimiser, jnp.int32(0))

    def look(acting: Acting, memory: Array, seen: Observation) -> tuple[Array, Array]:
        memory = belief.step(acting.state.params.actor_belief, memory, seen)
        return jnp.tanh(networks.outputs(acting.state.params.policy, memory)), memory

    def explore(acting: Acting, memory: Array, seen: Observation, _hidden: None, uniforms: Array) -> tuple:
        squashed, memory = look(acting, memory, seen)
        own, luck = uniforms[: ranker.action_dim], uniforms[ranker.action_dim :]
        disturbed = jnp.clip(squashed + acting.hypers.exploration * normal(own), -1.0, 1.0)
        action = inside(ranker.box(acting.weights), jnp.where(acting.at_random, own - 0.5, disturbed))
        return Choice(ranker.explored(acting.weights, action, luck), action), memory

    def greedy(acting: Acting, memory: Array, seen: Observation, _hidden: None, _uniforms: Array) -> tuple:
        squashed, memory = look(acting, memory, seen)
        action = inside(ranker.box(acting.weights), squashed)
        return Choice(ranker.decode(acting.weights, action), action), memory

    def draw_update(key: Key, batch: int) -> Array | tuple[()]:
        return normal_of_episodes(key, batch, (dims.horizon - 1, ranker.action_dim)) if rule.smooth else ()

    return Agent(
        init=init,
        explore=Policy(belief.start, explore, draws=ranker.action_dim + ranker.draws),
        greedy=Policy(belief.start, greedy),
        draw_update=draw_update,
        update=lambda acting, batch, noise: _update(networks, ranker, rule, acting, batch, noise),
        shares=True,
    )


def _update(
    networks: Networks, ranker: Ranker, rule: Rule, acting: Acting, batch: Episode, noise: Any
) -> tuple[DeterministicState, Metrics]:
    state, hypers, box = acting.state, acting.hypers, ranker.box(acting.weights)
    params, moments = state.params, state.optimiser
    batch = actor_critic.turns(batch)
    unrolled = actor_critic.unroll(networks, params, batch.observation)

    def next_value(actor: Array, critic: Array, noise: Any) -> Array:
        squashed = jnp.tanh(networks.outputs(state.target_policy, actor))
        if rule.smooth:
            disturbance = jnp.clip(hypers.smoothing * noise, -hypers.smoothing_clip, hypers.smoothing_clip)
            squashed = jnp.clip(squashed + disturbance, -1.0, 1.0)
        return jnp.stack(networks.q_values(state.target_critics, critic, inside(box, squashed))).min(axis=0)

    next_q = over_turns(next_value, unrolled.actor[1:], unrolled.critic[1:], noise)
    target = actor_critic.discounted(batch.reward, hypers.gamma, next_q)
    (loss_q, mean_q), (critics_grad, critic_states_grad) = gradients_over_turns(
        partial(actor_critic.critic_loss, networks), params.critics, unrolled.critic, batch.action, target
    )
    loss_q, mean_q, critics_grad = averaged((loss_q, mean_q, critics_grad))
    rates = {"critics": hypers.critic_rate, "critic_belief": hypers.critic_rate}
    rates |= {"policy": hypers.actor_rate, "actor_belief": hypers.actor_rate}
    of_critics, of_critics_moments = actor_critic.step_parts(params, moments, {"critics": critics_grad}, rates)

    def policy_loss(policy: Params, states: Array, critic_states: Array) -> tuple[Array, tuple[()]]:
        """The actor raises the first critic, already updated."""
        outputs = networks.outputs(policy, states)
        action = inside(box, jnp.tanh(outputs))
        gain = jnp.mean(networks.q_values(of_critics["critics"][:1], critic_states, action)[0])
        return hypers.saturation_cost * jnp.mean(jnp.square(outputs)) - gain, ()

    (loss_pi, _), (policy_grad, actor_states_grad) = gradients_over_turns(
        policy_loss, params.policy, unrolled.actor, unrolled.critic
    )
    gradients = unrolled.pull(actor_states_grad, critic_states_grad) | {"policy": policy_grad}
    loss_pi, gradients = averaged((loss_pi, gradients))
    others, others_moments = actor_critic.step_parts(params, moments, gradients, rates)
    new = DeterministicParams(**of_critics, **others)
    updates, metrics = state.updates + 1, {"critic_loss": loss_q, "policy_loss": loss_pi, "q": mean_q}
    after = DeterministicState(
        new,
        actor_critic.follow(state.target_policy, new.policy, hypers.tau),
        actor_critic.follow(state.target_critics, new.critics, hypers.tau),
        DeterministicParams(**of_critics_moments, **others_moments),
        updates,
    )
    return (after if rule.delay == 1 else _delayed(state, after, updates % rule.delay == 0)), metrics


def _delayed(before: DeterministicState, after: DeterministicState, due: Array) -> DeterministicState:
    """`after`, but with the actor and all targets of `before` unless they are `due`."""

    def if_due(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda new, old: jnp.where(due, new, old), new, old)

    def parts(new: DeterministicParams, old: DeterministicParams) -> DeterministicParams:
        return dataclasses.replace(
            new, policy=if_due(new.policy, old.policy), actor_belief=if_due(new.actor_belief, old.actor_belief)
        )

    return dataclasses.replace(
        after,
        params=parts(after.params, before.params),
        optimiser=parts(after.optimiser, before.optimiser),
        target_policy=if_due(after.target_policy, before.target_policy),
        target_critics=if_due(after.target_critics, before.target_critics),
    )
