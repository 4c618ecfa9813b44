"""REINFORCE on a ranker's continuous actions: a Gaussian of fixed width, squashed into the ranker's box.

`make_reinforce(spec, dims, ranker)` gives an `Agent`. The loss is minus the sum over turns of G_t * log p(action), the
log-probability taken in the unit box with the tanh correction. The published implementation has this learner without
results; the paper's table has none for it.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import struct

from gemsjax.agents.actor import Actor, ActorParams, ActorState, improve, make_actor
from gemsjax.agents.base import Acting, Agent, Choice, Policy
from gemsjax.agents.checks import check_hypers, check_widths
from gemsjax.errors import require, require_choice
from gemsjax.maths.distributions import SquashedGaussian
from gemsjax.maths.randomness import normal
from gemsjax.maths.returns import RETURNS, return_to_go
from gemsjax.rankers import Ranker
from gemsjax.types import Array, Dims, Episode, Key, Metrics, Observation, time_major

EDGE = 1.0 - 1e-6
"""Actions are pulled this far inside the unit box before atanh; in float32 tanh reaches 1 itself at about 9."""


@dataclasses.dataclass(frozen=True)
class ReinforceSpec:
    """Static choices: changing one makes another program.

    Attributes:
      hidden: width of the policy's hidden layer.
      belief_width: width of the recurrent state.
      item_dim: width of the belief's item embeddings.
      return_to_go: `recursive`, or `divided` as published; see `maths.returns`.
    """

    hidden: int = 256
    belief_width: int = 20
    item_dim: int = 20
    return_to_go: str = "recursive"


@struct.dataclass
class ReinforceHypers:
    """Numbers that may differ between runs of one program.

    Attributes:
      gamma: discount per turn.
      rate: Adam's learning rate of the policy and its belief.
      sigma: standard deviation of the actions before tanh.
    """

    gamma: float = 0.8
    rate: float = 3e-3
    sigma: float = 0.29


def validate_spec(spec: ReinforceSpec) -> None:
    """Raise `SettingError` for a width below 1 or an unknown choice."""
    check_widths(spec)
    require_choice("return_to_go", spec.return_to_go, RETURNS)


def validate_hypers(hypers: ReinforceHypers) -> None:
    """Raise `SettingError` for a hyper-parameter outside its range (host-side numbers only)."""
    check_hypers(hypers, rates=("rate",))
    require(0.0 < hypers.sigma <= math.exp(2.0), "sigma", hypers.sigma, "a positive number up to e^2")


def make_reinforce(spec: ReinforceSpec, dims: Dims, ranker: Ranker) -> Agent:
    """REINFORCE whose actions a `ranker` turns into slates.

    Raises:
      SettingError: see `validate_spec`.
    """
    validate_spec(spec)
    actor = make_actor(dims, spec.hidden, spec.belief_width, spec.item_dim, ranker.action_dim)

    def init(key: Key, _hypers: ReinforceHypers) -> ActorState:
        return actor.init(key)

    def placed(acting: Acting, squashed: Array) -> Array:
        centre, scale = ranker.box(acting.weights)
        return centre + scale * squashed

    def explore(
        acting: Acting, memory: Array, seen: Observation, _hidden: None, uniforms: Array
    ) -> tuple[Choice, Array]:
        mean, memory = actor.step(acting.state.params, memory, seen)
        own, luck = uniforms[: ranker.action_dim], uniforms[ranker.action_dim :]
        squashed = gaussian(mean, acting.hypers.sigma).sample(normal(own))
        # At random it covers only half of the box, as published [27].
        action = placed(acting, jnp.where(acting.at_random, own - 0.5, squashed))
        return Choice(ranker.explored(acting.weights, action, luck), action), memory

    def greedy(
        acting: Acting, memory: Array, seen: Observation, _hidden: None, _uniforms: Array
    ) -> tuple[Choice, Array]:
        mean, memory = actor.step(acting.state.params, memory, seen)
        action = placed(acting, gaussian(mean, acting.hypers.sigma).mode())
        return Choice(ranker.decode(acting.weights, action), action), memory

    def draw_update(_key: Key, _batch: int) -> tuple[()]:
        return ()

    def update(acting: Acting, batch: Episode, _noise: tuple[()]) -> tuple[ActorState, Metrics]:
        loss = jax.value_and_grad(_loss, argnums=2, has_aux=True)
        box = ranker.box(acting.weights)
        (_, metrics), gradients = loss(actor, spec, acting.state.params, acting.hypers, box, batch)
        return improve(acting.state, gradients, acting.hypers.rate), metrics

    return Agent(
        init,
        Policy(actor.belief.start, explore, draws=ranker.action_dim + ranker.draws),
        Policy(actor.belief.start, greedy),
        draw_update,
        update,
    )


def gaussian(mean: Array, sigma: Array | float) -> SquashedGaussian:
    """The policy at its network's outputs [..., A]."""
    return SquashedGaussian(mean, jnp.broadcast_to(jnp.log(sigma), mean.shape))


def log_probability(mean: Array, sigma: Array | float, squashed: Array) -> Array:
    """Log-probability [...] of an action [..., A] in the unit box, differentiable with respect to the mean.

    Finite for every action, those on the edge of the box included (see `EDGE`).
    """
    raw = jnp.arctanh(jnp.clip(squashed, -EDGE, EDGE))
    noise = (raw - mean) / sigma  # the noise that leads to this action, whatever the mean
    return gaussian(mean, sigma).sample_and_log_prob(noise)[1]


def _loss(
    actor: Actor,
    spec: ReinforceSpec,
    params: ActorParams,
    hypers: ReinforceHypers,
    box: tuple[Array, Array],
    batch: Episode,
) -> tuple[Array, Metrics]:
    """Minus the sum over turns of G_t * log p(a_t), mean over episodes."""
    observation, action, reward = time_major((batch.observation, batch.action, batch.reward))
    centre, scale = box
    means = actor.unroll(params, observation)
    log_prob = log_probability(means, hypers.sigma, (action - centre) / scale)
    loss = -(return_to_go(reward, hypers.gamma, spec.return_to_go) * log_prob).sum(axis=0).mean()
    return loss, {"loss": loss, "log_probability": log_prob.mean(), "mean_square": jnp.square(means).mean()}
