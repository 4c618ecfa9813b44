"""Soft actor-critic over a ranker's action space, with recurrent beliefs and episode replay (paper section 3.2).

`make_sac(spec, dims, ranker)` gives an `Agent`. Semantics of the published implementation: the critics are updated
first, then the actor against the updated critics; next states are the online beliefs shifted by a turn; both beliefs
start from what they were before the update. Bracketed numbers in comments: README, "Where they differ".
`make_soft` is the same learner where slates come about in another way (Wolpertinger).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import struct

from gemsjax.agents import actor_critic
from gemsjax.agents.actor_critic import Box, Networks, Unrolled
from gemsjax.agents.actor_critic import inside as _inside
from gemsjax.agents.base import Acting, Agent, Choice, Policy
from gemsjax.belief import make_gru
from gemsjax.errors import require_count
from gemsjax.maths.blocks import forward_over_turns, gradients_over_turns, over_turns
from gemsjax.maths.distributions import SquashedGaussian
from gemsjax.maths.optimise import adam_init, adam_step
from gemsjax.maths.randomness import normal
from gemsjax.nets.mlp import MLP, Critic
from gemsjax.rankers import Ranker
from gemsjax.shares import averaged, normal_of_episodes
from gemsjax.types import Array, Dims, Episode, Key, Metrics, Observation, Params


@dataclasses.dataclass(frozen=True)
class SACSpec:
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
class SACHypers:
    """Numbers that may differ between runs of one program (float32 scalars once inside a program).

    Attributes:
      gamma: discount per turn.
      tau: share of the online critics that enters the targets after every update.
      critic_rate: Adam's learning rate of the critics and their belief.
      actor_rate: Adam's learning rate of the policy and its belief.
      alpha_rate: Adam's learning rate of the temperature.
      initial_alpha: temperature that learning starts from (published: 1).
      first_alpha: temperature of the first update only (published: 0.2, before 1); 0: as `initial_alpha`.
      entropy_target: per action dimension; the target is this times A.
    """

    gamma: float = 0.8
    tau: float = 0.002
    critic_rate: float = 1e-3
    actor_rate: float = 3e-3
    alpha_rate: float = 1e-3
    initial_alpha: float = 0.2
    first_alpha: float = 0.0
    entropy_target: float = -1.0


PUBLISHED = {"hypers": {"first_alpha": 0.2, "initial_alpha": 1.0}}
"""What the published variant sets otherwise [25]."""


def validate_spec(spec: SACSpec) -> None:
    """Raise `SettingError` for a width below 1."""
    for name in ("hidden", "belief_width", "item_dim"):
        require_count(name, getattr(spec, name))


def validate_hypers(hypers: SACHypers) -> None:
    """Raise `SettingError` for a hyper-parameter outside its range (host-side numbers only)."""
    actor_critic.check_hypers(hypers, rates=("critic_rate", "actor_rate", "alpha_rate"), positive=("initial_alpha",))


@struct.dataclass
class SACParams:
    """One field for each part that is updated on its own (or Adam's moments of it); `critics` is a pair."""

    actor_belief: Any
    critic_belief: Any
    policy: Any
    critics: Any
    log_alpha: Any


@struct.dataclass
class SACState:
    """Everything that an update changes.

    Attributes:
      params: see `SACParams`.
      targets: the two target critics.
      optimiser: `SACParams` whose fields are Adam's moments of that part.
      alpha: [] the temperature in use.
    """

    params: SACParams
    targets: tuple[Params, Params]
    optimiser: SACParams
    alpha: Array


@struct.dataclass
class SACNoise:
    """Standard normal noise of one update: time-major, `next_action` [H-1, B, A], `action` [H, B, A]."""

    next_action: Array
    action: Array


class Means(NamedTuple):
    """How a continuous action becomes a slate, and what the critics judge of it.

    Attributes:
      action_dim: A, numbers of the policy's action; also of what the critics judge.
      box: `(weights) -> (centre [A], half range [A])`.
      beliefs: parts of `SACParams` whose states acting carries along; the actor's is the first.
      choose: `(acting, states of these beliefs, action [A]) -> choice`.
      taken: `(weights, time-major episodes [H, B]) -> [H, B, A]`, what the critics learn the value of.
      judged: `(acting, states of both beliefs [N, B, width] each, actions [N, B, A]) -> [N, B, A]`, what the targets
        judge of the policy's next actions.
      draws: uniform numbers that an exploring choice takes.
      explore: `(acting, states of these beliefs, action [A], uniforms [draws]) -> choice`; None to `choose` then, too.
    """

    action_dim: int
    box: Callable[[Any], Box]
    beliefs: tuple[str, ...]
    choose: Callable[[Acting, tuple[Array, ...], Array], Choice]
    taken: Callable[[Any, Episode], Array]
    judged: Callable[[Acting, tuple[Array, Array], Array], Array]
    draws: int = 0
    explore: Callable[[Acting, tuple[Array, ...], Array, Array], Choice] | None = None


def make_sac(spec: SACSpec, dims: Dims, ranker: Ranker) -> Agent:
    """SAC whose actions a `ranker` turns into slates.

    Raises:
      SettingError: a width below 1.
    """
    validate_spec(spec)
    means = Means(
        action_dim=ranker.action_dim,
        box=ranker.box,
        beliefs=("actor_belief",),
        choose=lambda acting, _states, action: Choice(ranker.decode(acting.weights, action), action),
        taken=lambda _weights, batch: batch.action,
        judged=lambda _acting, _states, action: action,
        draws=ranker.draws,
        explore=lambda acting, _states, action, uniforms: Choice(
            ranker.explored(acting.weights, action, uniforms), action
        ),
    )
    return make_soft(spec, dims, means)


def make_soft(spec: SACSpec, dims: Dims, means: Means) -> Agent:
    """SAC whose actions become slates by `means`; `spec` is already checked."""
    belief = make_gru(dims, spec.belief_width, spec.item_dim)
    networks = _Networks(belief, MLP((spec.hidden, 2 * means.action_dim)), Critic(spec.hidden))

    def start() -> tuple[Array, ...]:
        return tuple(belief.start() for _ in means.beliefs)

    def look(acting: Acting, memory: tuple[Array, ...], seen: Observation) -> tuple[SquashedGaussian, tuple]:
        params = [getattr(acting.state.params, part) for part in means.beliefs]
        memory = tuple(belief.step(p, state, seen) for p, state in zip(params, memory, strict=True))
        return networks.gaussian(acting.state.params.policy, memory[0]), memory

    def explore(acting: Acting, memory: tuple, seen: Observation, _hidden: None, uniforms: Array) -> tuple:
        gaussian, memory = look(acting, memory, seen)
        own, luck = uniforms[: means.action_dim], uniforms[means.action_dim :]
        # At random it covers only half of the box, as published [27].
        squashed = jnp.where(acting.at_random, own - 0.5, gaussian.sample(normal(own)))
        action = _inside(means.box(acting.weights), squashed)
        if means.explore is None:
            return means.choose(acting, memory, action), memory
        return means.explore(acting, memory, action, luck), memory

    def greedy(acting: Acting, memory: tuple, seen: Observation, _hidden: None, _uniforms: Array) -> tuple:
        gaussian, memory = look(acting, memory, seen)
        return means.choose(acting, memory, _inside(means.box(acting.weights), gaussian.mode())), memory

    def draw_update(key: Key, batch: int) -> SACNoise:
        noise = normal_of_episodes(key, batch, (2 * dims.horizon - 1, means.action_dim))
        return SACNoise(noise[: dims.horizon - 1], noise[dims.horizon - 1 :])

    return Agent(
        init=lambda key, hypers: _init(networks, means.action_dim, key, hypers),
        explore=Policy(start, explore, draws=means.action_dim + means.draws),
        greedy=Policy(start, greedy),
        draw_update=draw_update,
        update=lambda acting, batch, noise: _update(networks, means, acting, batch, noise),
        shares=True,
    )


Heads = tuple[Array, Array]
"""Mean and log standard deviation before tanh, [..., A] each."""


@dataclasses.dataclass(frozen=True)
class _Networks(Networks):
    """SAC's policy network gives the means and log standard deviations of a squashed Gaussian."""

    def gaussian(self, params: Params, states: Array) -> SquashedGaussian:
        return SquashedGaussian(*self.heads(params, states))

    def heads(self, params: Params, states: Array) -> Heads:
        """[..., belief width] -> mean and log standard deviation, [..., A] each.

        Apart, so that a loop over blocks leaves each as one row of numbers, not to be cut out of rows of 2A.
        """
        mean, log_std = jnp.split(self.outputs(params, states), 2, axis=-1)
        return mean, log_std


def _first_alpha(hypers: SACHypers) -> Array:
    return jnp.where(hypers.first_alpha > 0.0, hypers.first_alpha, hypers.initial_alpha).astype(jnp.float32)


def _init(networks: _Networks, action_dim: int, key: Key, hypers: SACHypers) -> SACState:
    parts, targets = networks.init(key, action_dim, critics=2)
    params = SACParams(**parts, log_alpha=jnp.log(jnp.float32(hypers.initial_alpha)))
    optimiser = SACParams(**{part: adam_init(value) for part, value in vars(params).items()})
    return SACState(params, targets, optimiser, _first_alpha(hypers))


def _update(
    networks: _Networks, means: Means, acting: Acting, batch: Episode, noise: SACNoise
) -> tuple[SACState, Metrics]:
    state, hypers, box = acting.state, acting.hypers, means.box(acting.weights)
    params, moments = state.params, state.optimiser
    batch = actor_critic.turns(batch)
    unrolled = actor_critic.unroll(networks, params, batch.observation)

    heads, pull_policy = forward_over_turns(networks.heads, params.policy, unrolled.actor)
    next_heads = (heads[0][1:], heads[1][1:])
    target = _target(networks, means, acting, box, unrolled, next_heads, batch.reward, noise.next_action)
    (loss_q, mean_q), (critics_grad, critic_states_grad) = gradients_over_turns(
        partial(actor_critic.critic_loss, networks),
        params.critics,
        unrolled.critic,
        means.taken(acting.weights, batch),
        target,
    )
    loss_q, mean_q, critics_grad = averaged((loss_q, mean_q, critics_grad))
    critics, critics_moments = adam_step(params.critics, critics_grad, moments.critics, hypers.critic_rate)

    (loss_pi, mean_log_prob), (_, heads_grad) = gradients_over_turns(
        partial(_policy_loss, networks, state.alpha, box, critics), (), heads, unrolled.critic, noise.action
    )
    policy_grad, actor_states_grad = pull_policy(heads_grad)
    gradients = unrolled.pull(actor_states_grad, critic_states_grad) | {"policy": policy_grad}
    loss_pi, mean_log_prob, gradients = averaged((loss_pi, mean_log_prob, gradients))
    loss_alpha = -jnp.exp(params.log_alpha) * (mean_log_prob + hypers.entropy_target * means.action_dim)
    gradients["log_alpha"] = loss_alpha  # the loss is its own derivative in log alpha
    rates = {
        "actor_belief": hypers.actor_rate,
        "critic_belief": hypers.critic_rate,
        "policy": hypers.actor_rate,
        "log_alpha": hypers.alpha_rate,
    }
    new, new_moments = actor_critic.step_parts(params, moments, gradients, rates)
    targets = actor_critic.follow(state.targets, critics, hypers.tau)
    metrics = {
        "critic_loss": loss_q,
        "policy_loss": loss_pi,
        "alpha_loss": loss_alpha,
        "alpha": state.alpha,
        "entropy": -mean_log_prob,
        "q": mean_q,
    }
    return SACState(
        SACParams(critics=critics, **new),
        targets,
        SACParams(critics=critics_moments, **new_moments),
        jnp.exp(new["log_alpha"]),
    ), metrics


def _target(
    networks: _Networks,
    means: Means,
    acting: Acting,
    box: Box,
    unrolled: Unrolled,
    heads: Heads,
    reward: Array,
    noise: Array,
) -> Array:
    """What the critics should say, [H, B]: reward, and the discounted soft value of the next turn.

    `heads` of the policy and `noise`, [H-1, B, A], are those of the next turns.
    """
    state, actor, critic = acting.state, unrolled.actor[1:], unrolled.critic[1:]

    def least(states: Array, judged: Array) -> Array:
        return jnp.minimum(*networks.q_values(state.targets, states, judged))

    squashed, log_prob = SquashedGaussian(*heads).sample_and_log_prob(noise)
    next_q = over_turns(least, critic, means.judged(acting, (actor, critic), _inside(box, squashed)))
    return actor_critic.discounted(reward, acting.hypers.gamma, next_q - state.alpha * log_prob)


def _policy_loss(
    networks: _Networks,
    alpha: Array,
    box: Box,
    critics: tuple[Params, Params],
    _params: tuple[()],
    heads: Heads,
    states: Array,
    noise: Array,
) -> tuple[Array, Array]:
    """Mean of alpha * log-probability - Q of a fresh action; and the mean log-probability.

    `heads` are the policy's, `states` the critics'.
    """
    squashed, log_prob = SquashedGaussian(*heads).sample_and_log_prob(noise)
    q = jnp.minimum(*networks.q_values(critics, states, _inside(box, squashed)))
    return jnp.mean(alpha * log_prob - q), jnp.mean(log_prob)
