"""What PPO and A2C on a ranker's actions share: recurrent actor and critic, acting, advantages, one step of learning.

An action is a Gaussian number for each dimension; tanh takes it into the ranker's box. What is learnt from
(`Choice.action`) is the number before tanh: so its probability is the Gaussian's, exact at the edge of the box too, and
the tanh belongs to the ranker. Actor and critic share nothing: beliefs, trunks, the clipping of gradients (a critic of
clicks has gradients a hundred times as large, and would leave nothing of the actor's under one global norm).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gemsjax.agents.base import Acting, Choice, Policy
from gemsjax.belief import Belief, make_gru
from gemsjax.maths import policy_gradient
from gemsjax.maths.distributions import DiagonalGaussian
from gemsjax.maths.optimise import adam_init, adam_step, clip_by_norm
from gemsjax.maths.randomness import normal
from gemsjax.maths.returns import advantages, following
from gemsjax.nets.actor_critic import GaussianActor, ValueCritic
from gemsjax.rankers import Ranker
from gemsjax.types import Array, Dims, Episode, Key, Metrics, Observation, Params, time_major


@struct.dataclass
class Parts:
    """Parameters (or Adam's moments) of the actor and of the critic, a belief and a network each."""

    actor: dict[str, Params]
    critic: dict[str, Params]


@struct.dataclass
class LatentState:
    """Everything that an update changes: parameters, and Adam's moments by part."""

    params: Parts
    optimiser: Parts


@struct.dataclass
class Batch:
    """Whole episodes, time-major: observations [H, B, K], actions [H, B, A], the rest [H, B].

    `log_prob` is of the policy that acted.
    """

    observation: Observation
    action: Array
    log_prob: Array
    advantage: Array
    target: Array
    valid: Array


PolicyLoss = Callable[[Array, Batch], tuple[Array, Metrics]]
"""`(log-probabilities [H, B], batch) -> (loss, metrics)`."""


@dataclasses.dataclass(frozen=True)
class LatentActorCritic:
    """Networks with their sizes bound, and the ranker that they act through."""

    belief: Belief
    actor: GaussianActor
    critic: ValueCritic
    ranker: Ranker

    def init(self, key: Key) -> LatentState:
        """Fresh parameters with zero moments."""
        keys, state = jax.random.split(key, 4), self.belief.start()
        params = Parts(
            actor={"belief": self.belief.init(keys[0]), "network": self.actor.init(keys[1], state)["params"]},
            critic={"belief": self.belief.init(keys[2]), "network": self.critic.init(keys[3], state)["params"]},
        )
        return LatentState(params, Parts(adam_init(params.actor), adam_init(params.critic)))

    def policies(self) -> tuple[Policy, Policy]:
        """Explore: draws of the Gaussian (half of the box at random, as everywhere [27]) and of the ranker.

        Greedy: its mean, decoded.
        """

        def look(acting: Acting, memory: Array, seen: Observation) -> tuple[DiagonalGaussian, Array]:
            params = acting.state.params.actor
            memory = self.belief.step(params["belief"], memory, seen)
            return self._gaussian(params["network"], memory), memory

        def placed(acting: Acting, raw: Array) -> Array:
            centre, scale = self.ranker.box(acting.weights)
            return centre + scale * jnp.tanh(raw)

        def explore(
            acting: Acting, memory: Array, seen: Observation, _hidden: None, uniforms: Array
        ) -> tuple[Choice, Array]:
            gaussian, memory = look(acting, memory, seen)
            own, luck = uniforms[: self.ranker.action_dim], uniforms[self.ranker.action_dim :]
            raw = jnp.where(acting.at_random, jnp.arctanh(own - 0.5), gaussian.sample(normal(own)))
            return Choice(self.ranker.explored(acting.weights, placed(acting, raw), luck), raw), memory

        def greedy(
            acting: Acting, memory: Array, seen: Observation, _hidden: None, _uniforms: Array
        ) -> tuple[Choice, Array]:
            gaussian, memory = look(acting, memory, seen)
            raw = gaussian.mode()
            return Choice(self.ranker.decode(acting.weights, placed(acting, raw)), raw), memory

        start = self.belief.start
        return Policy(start, explore, draws=self.ranker.action_dim + self.ranker.draws), Policy(start, greedy)

    def batch(self, params: Parts, episodes: Episode, gamma: Array, lam: Array, how: str) -> Batch:
        """Episodes [B, H] as learning needs them; nothing is worth anything after the last turn."""
        seen, action, reward = time_major((episodes.observation, episodes.action, episodes.reward))
        states = self.belief.unroll((params.actor["belief"], params.critic["belief"]), seen)
        value = self.critic.apply({"params": params.critic["network"]}, states[1])
        last = jnp.zeros_like(reward, bool).at[-1].set(True)
        found = advantages(reward, value, following(value, value[-1]), last, last, gamma, lam, how)
        return Batch(seen, action, self._gaussian(params.actor["network"], states[0]).log_prob(action), *found)

    def improve(
        self, state: LatentState, batch: Batch, hypers: Any, policy_loss: PolicyLoss
    ) -> tuple[LatentState, Metrics]:
        """One step of Adam on both parts, each with its gradients clipped."""
        losses = jax.value_and_grad(self._losses, has_aux=True)
        (_, metrics), gradients = losses(state.params, batch, hypers, policy_loss)
        params, moments = {}, {}
        for part in ("actor", "critic"):
            clipped, metrics[f"{part}_norm"] = clip_by_norm(getattr(gradients, part), hypers.max_grad_norm)
            before = getattr(state.params, part), clipped, getattr(state.optimiser, part)
            params[part], moments[part] = adam_step(*before, hypers.rate)
        return LatentState(Parts(**params), Parts(**moments)), metrics

    def _losses(self, params: Parts, batch: Batch, hypers: Any, policy_loss: PolicyLoss) -> tuple[Array, Metrics]:
        """The policy's loss less its weighted entropy, plus the critic's weighted error."""
        actor, critic = self.belief.unroll((params.actor["belief"], params.critic["belief"]), batch.observation)
        gaussian = self._gaussian(params.actor["network"], actor)
        value = self.critic.apply({"params": params.critic["network"]}, critic)
        loss_pi, metrics = policy_loss(gaussian.log_prob(batch.action), batch)
        loss_v = policy_gradient.value_error(value, batch.target, batch.valid)
        entropy = policy_gradient.masked_mean(gaussian.entropy(), batch.valid)
        loss = loss_pi + hypers.value_weight * loss_v - hypers.entropy * entropy
        told = {"policy_loss": loss_pi, "value_loss": loss_v, "entropy": entropy, "value": value.mean()}
        return loss, metrics | told

    def _gaussian(self, network: Params, states: Array) -> DiagonalGaussian:
        return DiagonalGaussian(*self.actor.apply({"params": network}, states))


def make_latent_actor_critic(
    dims: Dims, hidden: int, belief_width: int, item_dim: int, ranker: Ranker
) -> LatentActorCritic:
    """GRU beliefs, and tanh networks with one hidden layer on them."""
    belief = make_gru(dims, belief_width, item_dim)
    return LatentActorCritic(belief, GaussianActor((hidden,), ranker.action_dim), ValueCritic((hidden,)), ranker)
