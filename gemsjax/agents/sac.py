"""Soft actor-critic over a ranker's action space, with recurrent beliefs and episode replay (paper section 3.2).

`make_sac(spec, dims, ranker)` gives an `Agent`. Semantics of the published implementation: the critics are updated
first, then the actor against the updated critics; next states are the online beliefs shifted by a turn; both beliefs
start from what they were before the update. Bracketed numbers in comments: README, "Where they differ".
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct

from gemsjax.agents.base import Acting, Agent, Choice, Policy
from gemsjax.belief import Belief, make_gru
from gemsjax.errors import require, require_count
from gemsjax.maths.distributions import SquashedGaussian
from gemsjax.maths.optimise import adam_init, adam_step
from gemsjax.maths.randomness import normal
from gemsjax.nets.mlp import MLP, Critic
from gemsjax.rankers import Ranker
from gemsjax.types import Array, Dims, Episode, Key, Metrics, Observation, Params, time_major


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
      initial_alpha: temperature that learning starts from.
      first_alpha: temperature of the first update only (published: 0.2 where `initial_alpha` is 1).
      entropy_target: per action dimension; the target is this times A.
    """

    gamma: float = 0.8
    tau: float = 0.002
    critic_rate: float = 1e-3
    actor_rate: float = 3e-3
    alpha_rate: float = 1e-3
    initial_alpha: float = 1.0
    first_alpha: float = 0.2
    entropy_target: float = -1.0


def validate_spec(spec: SACSpec) -> None:
    """Raise `SettingError` for a width below 1."""
    for name, value in dataclasses.asdict(spec).items():
        require_count(name, value)


def validate_hypers(hypers: SACHypers) -> None:
    """Raise `SettingError` for a hyper-parameter outside its range (host-side numbers only)."""
    for name, value in vars(hypers).items():
        require(math.isfinite(value), name, value, "a finite number")
    require(0.0 <= hypers.gamma <= 1.0, "gamma", hypers.gamma, "a number in [0, 1]")
    require(0.0 <= hypers.tau <= 1.0, "tau", hypers.tau, "a number in [0, 1]")
    for name in ("critic_rate", "actor_rate", "alpha_rate"):
        require(0.0 <= getattr(hypers, name) < 1.0, name, getattr(hypers, name), "a number in [0, 1)")
    for name in ("initial_alpha", "first_alpha"):
        require(getattr(hypers, name) > 0.0, name, getattr(hypers, name), "a positive number")


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


def make_sac(spec: SACSpec, dims: Dims, ranker: Ranker) -> Agent:
    """SAC whose actions a `ranker` turns into slates.

    Raises:
      SettingError: a width below 1.
    """
    validate_spec(spec)
    belief = make_gru(dims, spec.belief_width, spec.item_dim)
    networks = _Networks(belief, MLP((spec.hidden, 2 * ranker.action_dim)), Critic(spec.hidden))

    def init(key: Key, hypers: SACHypers) -> SACState:
        return _init(networks, ranker.action_dim, key, hypers)

    def start() -> Array:
        return belief.start()

    def choose(acting: Acting, squashed: Array) -> Choice:
        action = _inside(ranker.box(acting.weights), squashed)
        return Choice(ranker.decode(acting.weights, action), action)

    def explore(
        acting: Acting, memory: Array, seen: Observation, _hidden: None, uniforms: Array
    ) -> tuple[Choice, Array]:
        memory = belief.step(acting.state.params.actor_belief, memory, seen)
        action = networks.gaussian(acting.state.params.policy, memory).sample(normal(uniforms))
        # At random it covers only half of the box, as published [27].
        return choose(acting, jnp.where(acting.at_random, uniforms - 0.5, action)), memory

    def greedy(
        acting: Acting, memory: Array, seen: Observation, _hidden: None, _uniforms: Array
    ) -> tuple[Choice, Array]:
        memory = belief.step(acting.state.params.actor_belief, memory, seen)
        return choose(acting, networks.gaussian(acting.state.params.policy, memory).mode()), memory

    def draw_update(key: Key, batch: int) -> SACNoise:
        noise = jax.random.normal(key, (2 * dims.horizon - 1, batch, ranker.action_dim))
        return SACNoise(noise[: dims.horizon - 1], noise[dims.horizon - 1 :])

    def update(acting: Acting, batch: Episode, noise: SACNoise) -> tuple[SACState, Metrics]:
        return _update(networks, acting.state, acting.hypers, ranker.box(acting.weights), batch, noise)

    return Agent(
        init=init,
        explore=Policy(start, explore, draws=ranker.action_dim),
        greedy=Policy(start, greedy),
        draw_update=draw_update,
        update=update,
    )


@dataclasses.dataclass(frozen=True)
class _Networks:
    """The networks' apply functions by the names that the equations use."""

    belief: Belief
    policy: MLP
    critic: Critic

    def gaussian(self, params: Params, states: Array) -> SquashedGaussian:
        return self.split(self.policy.apply({"params": params}, states))

    @staticmethod
    def split(outputs: Array) -> SquashedGaussian:
        mean, log_std = jnp.split(outputs, 2, axis=-1)
        return SquashedGaussian(mean, log_std)

    def q_values(self, critics: tuple[Params, Params], states: Array, actions: Array) -> tuple[Array, Array]:
        one, two = (self.critic.apply({"params": params}, states, actions) for params in critics)
        return one, two


def _init(networks: _Networks, action_dim: int, key: Key, hypers: SACHypers) -> SACState:
    actor_key, critic_key, policy_key, *q_keys = jax.random.split(key, 5)
    width = networks.belief.width
    one, two = (networks.critic.init(k, jnp.zeros(width), jnp.zeros(action_dim))["params"] for k in q_keys)
    params = SACParams(
        actor_belief=networks.belief.init(actor_key),
        critic_belief=networks.belief.init(critic_key),
        policy=networks.policy.init(policy_key, jnp.zeros(width))["params"],
        critics=(one, two),
        log_alpha=jnp.log(jnp.float32(hypers.initial_alpha)),
    )
    # The targets start equal to the critics but are arrays of their own: a donated state may not hold one buffer twice.
    targets = jax.tree.map(jnp.copy, params.critics)
    optimiser = SACParams(**{part: adam_init(value) for part, value in vars(params).items()})
    return SACState(params, targets, optimiser, jnp.float32(hypers.first_alpha))


def _update(
    networks: _Networks,
    state: SACState,
    hypers: SACHypers,
    box: tuple[Array, Array],
    batch: Episode,
    noise: SACNoise,
) -> tuple[SACState, Metrics]:
    params = state.params
    chex.assert_rank((batch.observation.slate, batch.action, batch.reward), (3, 3, 2))
    chex.assert_equal_shape_prefix((batch.observation.slate, batch.action, batch.reward), 2)
    observation, action, reward = time_major((batch.observation, batch.action, batch.reward))
    # One scan forward for both beliefs, one backward: the losses give gradients with respect to the states.
    (actor_states, critic_states), pull_beliefs = jax.vjp(
        lambda actor, critic: networks.belief.unroll((actor, critic), observation),
        params.actor_belief,
        params.critic_belief,
    )
    # The policy's outputs serve the next actions of the target and, unchanged, the policy loss.
    outputs, pull_policy = jax.vjp(
        lambda policy, states: networks.policy.apply({"params": policy}, states), params.policy, actor_states
    )

    target = _target(networks, state, hypers, box, outputs, critic_states, reward, noise.next_action)
    (loss_q, mean_q), (critics_grad, critic_states_grad) = jax.value_and_grad(_critic_loss, (1, 2), has_aux=True)(
        networks, params.critics, critic_states, action, target
    )
    moments = state.optimiser
    critics, critics_moments = adam_step(params.critics, critics_grad, moments.critics, hypers.critic_rate)

    (loss_pi, mean_log_prob), outputs_grad = jax.value_and_grad(_policy_loss, 1, has_aux=True)(
        networks, outputs, critics, critic_states, state.alpha, box, noise.action
    )
    policy_grad, actor_states_grad = pull_policy(outputs_grad)
    actor_belief_grad, critic_belief_grad = pull_beliefs((actor_states_grad, critic_states_grad))

    loss_alpha = -jnp.exp(params.log_alpha) * (mean_log_prob + hypers.entropy_target * action.shape[-1])
    steps = {
        "actor_belief": (actor_belief_grad, hypers.actor_rate),
        "critic_belief": (critic_belief_grad, hypers.critic_rate),
        "policy": (policy_grad, hypers.actor_rate),
        "log_alpha": (loss_alpha, hypers.alpha_rate),  # the loss is its own derivative in log alpha
    }
    stepped = {
        part: adam_step(getattr(params, part), grad, getattr(moments, part), rate)
        for part, (grad, rate) in steps.items()
    }
    new_params = SACParams(critics=critics, **{part: new for part, (new, _) in stepped.items()})
    new_moments = SACParams(critics=critics_moments, **{part: new for part, (_, new) in stepped.items()})
    targets = jax.tree.map(lambda target, new: target + hypers.tau * (new - target), state.targets, critics)
    metrics = {
        "critic_loss": loss_q,
        "policy_loss": loss_pi,
        "alpha_loss": loss_alpha,
        "alpha": state.alpha,
        "entropy": -mean_log_prob,
        "q": mean_q,
    }
    return SACState(new_params, targets, new_moments, jnp.exp(new_params.log_alpha)), metrics


def _target(
    networks: _Networks,
    state: SACState,
    hypers: SACHypers,
    box: tuple[Array, Array],
    outputs: Array,
    critic_states: Array,
    reward: Array,
    noise: Array,
) -> Array:
    """What the critics should say, [H, B]: reward, and the discounted soft value of the next turn."""
    squashed, log_prob = networks.split(outputs[1:]).sample_and_log_prob(noise)
    next_q = jnp.minimum(*networks.q_values(state.targets, critic_states[1:], _inside(box, squashed)))
    bootstrap = jnp.pad(next_q - state.alpha * log_prob, ((0, 1), (0, 0)))  # nothing follows the last turn
    return jax.lax.stop_gradient(reward + hypers.gamma * bootstrap)


def _critic_loss(
    networks: _Networks, critics: tuple[Params, Params], states: Array, action: Array, target: Array
) -> tuple[Array, Array]:
    """Half the sum of both critics' mean squared errors; and the first one's mean."""
    one, two = networks.q_values(critics, states, action)
    return 0.5 * (jnp.mean(jnp.square(one - target)) + jnp.mean(jnp.square(two - target))), jnp.mean(one)


def _policy_loss(
    networks: _Networks,
    outputs: Array,
    critics: tuple[Params, Params],
    critic_states: Array,
    alpha: Array,
    box: tuple[Array, Array],
    noise: Array,
) -> tuple[Array, Array]:
    """Mean of alpha * log-probability - Q of a fresh action; and the mean log-probability."""
    squashed, log_prob = networks.split(outputs).sample_and_log_prob(noise)
    q = jnp.minimum(*networks.q_values(critics, critic_states, _inside(box, squashed)))
    return jnp.mean(alpha * log_prob - q), jnp.mean(log_prob)


def _inside(box: tuple[Array, Array], squashed: Array) -> Array:
    """An action in the ranker's box from one in (-1, 1)."""
    centre, scale = box
    return centre + scale * squashed
