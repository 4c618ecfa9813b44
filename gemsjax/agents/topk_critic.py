"""A critic as reward simulator for policies over items, as RecNN has one: Q(state, distribution over items).

What it judges next to the state is one number an item that add up to one: the policy's probabilities, or the shares of
the items of a slate. It learns the log's slates by temporal differences,

    y_t = clip(r_t + gamma Q'(s'_{t+1}, pi'(s'_{t+1})), -c, c),

with targets Q', pi' and s' that follow slowly, nothing after the last turn that a user was shown something in; and its
values stand in for the rewards that the policy learns from. No gradient of it reaches states or policy. Called by
`topk_reinforce`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemsjax.agents.logged import Actions
from gemsjax.maths.off_policy import masked_mean
from gemsjax.maths.slates import top_items
from gemsjax.nets.mlp import Critic
from gemsjax.types import Array, Key, Params


class Targets(NamedTuple):
    """What follows slowly; its own copies, since a donated state may not hold one buffer twice."""

    belief: Params
    policy: Params
    critic: Params


class RewardCritic(NamedTuple):
    """The critic with its sizes bound.

    Attributes:
      network: Q of a state [..., d] and a distribution over items [..., I].
      judges: `probabilities` or `slate`: what of the policy it is asked about.
      num_items, slate_size: I, K.
    """

    network: Critic
    judges: str
    num_items: int
    slate_size: int

    def init(self, key: Key, width: int) -> Params:
        """Fresh parameters for states of `width` numbers."""
        return self.network.init(key, jnp.zeros(width), jnp.zeros(self.num_items))["params"]

    def values(self, params: Params, states: Array, judged: Array) -> Array:
        """Q: [H, B, d] and [H, B, I] -> [H, B]; a constant for the gradient of everything but `params`."""
        states, judged = jax.lax.stop_gradient((states, judged))
        return self.network.apply({"params": params}, states, judged)

    def served(self, logits: Array) -> Array:
        """What a policy of logits [H, B, I] does, as the critic judges it: [H, B, I]."""
        if self.judges == "probabilities":
            return jax.nn.softmax(logits, axis=-1)
        best = jax.vmap(jax.vmap(lambda row: top_items(row, self.slate_size)))(logits)
        return shares(best, jnp.ones(best.shape), self.num_items)

    def rewards(self, params: Params, states: Array, logits: Array, items: Array, taken: Array) -> Array:
        """Simulated rewards [H, B]: of the policy's probabilities, or of the slates `items` [H, B, K]; constants.

        0 in turns that take nothing.
        """
        slate = self.judges == "slate"
        judged = shares(items, taken, self.num_items) if slate else self.served(logits)
        values = jax.lax.stop_gradient(self.values(params, states, judged))
        return jnp.where(taken.any(axis=-1), values, 0.0)

    def loss(
        self, params: Params, targets: Targets, states: Array, later: tuple[Array, Array], batch: Actions, hypers: Any
    ) -> Array:
        """Mean squared distance of the logged slates' values from their targets y, [].

        Args:
          params: of the critic.
          targets: see `Targets`.
          states: [H, B, d] that the slates were chosen in.
          later: states [H, B, d] and logits [H, B, I] of the target policy.
          batch: what was shown and what came of it.
          hypers: `critic_gamma` and `critic_clip`.
        """
        turns = batch.taken.max(axis=-1)
        # A turn whose reward is unknown is not learnt from, but the user went on: it still has a value to others.
        next_value = self.values(targets.critic, later[0][1:], self.served(later[1][1:])) * batch.there[1:]
        y = batch.reward + hypers.critic_gamma * jnp.pad(next_value, ((0, 1), (0, 0)))
        y = jax.lax.stop_gradient(jnp.clip(y, -hypers.critic_clip, hypers.critic_clip))
        found = self.values(params, states, shares(batch.items, batch.taken, self.num_items))
        return masked_mean(jnp.square(found - y), turns)


def shares(items: Array, taken: Array, num_items: int) -> Array:
    """A slate as a distribution: the share of each item among its taken slots, [..., K] -> [..., I]; 0 if there are
    none. Items of slots that are not taken may be any number."""
    weights = (taken / jnp.maximum(taken.sum(axis=-1, keepdims=True), 1.0)).reshape(-1, items.shape[-1])
    rows = jnp.arange(weights.shape[0])[:, None]
    places = jnp.where(weights > 0.0, items.reshape(weights.shape), num_items)
    found = jnp.zeros((weights.shape[0], num_items)).at[rows, places].add(weights, mode="drop")
    return found.reshape(*items.shape[:-1], num_items)
