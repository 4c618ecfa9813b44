"""A belief with a network on top, and what on-policy methods do with it: act turn by turn, unroll, improve.

Shared by the REINFORCE family. `make_softmax_policies` makes the exploring and the greedy policy of an actor whose
outputs are logits of the items.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gemsjax.agents.base import Acting, Choice, Policy
from gemsjax.belief import Belief, make_gru
from gemsjax.maths.categorical import draw_items
from gemsjax.maths.optimise import adam_init, adam_step
from gemsjax.maths.randomness import whole_number
from gemsjax.maths.slates import top_items
from gemsjax.nets.mlp import MLP
from gemsjax.types import Array, Dims, Episode, Key, Observation, Params, time_major


@struct.dataclass
class ActorParams:
    """Parameters (or Adam's moments) of the belief and of the policy network on its states."""

    belief: Any
    policy: Any


@struct.dataclass
class ActorState:
    """Everything that an update changes.

    Attributes:
      params: see `ActorParams`.
      optimiser: Adam's moments of `params`.
    """

    params: ActorParams
    optimiser: Any


@dataclasses.dataclass(frozen=True)
class Actor:
    """Networks with their sizes bound; `outputs` numbers a turn come out."""

    belief: Belief
    network: MLP

    def init(self, key: Key) -> ActorState:
        """Fresh parameters with zero moments."""
        belief_key, policy_key = jax.random.split(key)
        policy = self.network.init(policy_key, jnp.zeros(self.belief.width))["params"]
        params = ActorParams(self.belief.init(belief_key), policy)
        return ActorState(params, adam_init(params))

    def step(self, params: ActorParams, memory: Array, seen: Observation) -> tuple[Array, Array]:
        """One user's turn: the outputs [n] after an observation [K], and the belief to remember."""
        memory = self.belief.step(params.belief, memory, seen)
        return self.outputs(params.policy, memory), memory

    def outputs(self, policy: Params, states: Array) -> Array:
        """The policy network on belief states: [..., width] -> [..., n]."""
        return self.network.apply({"params": policy}, states)

    def unroll(self, params: ActorParams, observation: Observation) -> Array:
        """The outputs of all turns, time-major: [H, B, K] -> [H, B, n]."""
        (states,) = self.belief.unroll((params.belief,), observation)
        return self.outputs(params.policy, states)


def make_actor(dims: Dims, hidden: int, belief_width: int, item_dim: int, outputs: int) -> Actor:
    """A GRU belief and a perceptron with one hidden layer."""
    return Actor(make_gru(dims, belief_width, item_dim), MLP((hidden, outputs)))


def improve(state: ActorState, gradients: ActorParams, rate: Array | float) -> ActorState:
    """One step of Adam."""
    return ActorState(*adam_step(state.params, gradients, state.optimiser, rate))


def outcomes(episode: Episode) -> Observation:
    """What each action led to, o_1 .. o_H, time-major: episodes [B, H] -> observation [H, B, K]."""
    seen = time_major(episode.observation)
    return jax.tree.map(lambda x, last: jnp.concatenate([x[1:], last[None]]), seen, episode.final)


def make_softmax_policies(dims: Dims, actor: Actor) -> tuple[Policy, Policy]:
    """Explore: K independent draws from the softmax over items (uniform ones at random). Greedy: the K likeliest."""

    def explore(
        acting: Acting, memory: Array, seen: Observation, _hidden: None, uniforms: Array
    ) -> tuple[Choice, Array]:
        logits, memory = actor.step(acting.state.params, memory, seen)
        drawn = draw_items(logits, uniforms)
        slate = jnp.where(acting.at_random, whole_number(uniforms, dims.num_items), drawn)
        return Choice(slate, slate), memory

    def greedy(
        acting: Acting, memory: Array, seen: Observation, _hidden: None, _uniforms: Array
    ) -> tuple[Choice, Array]:
        logits, memory = actor.step(acting.state.params, memory, seen)
        slate = top_items(logits, dims.slate_size)
        return Choice(slate, slate), memory

    start = actor.belief.start
    return Policy(start, explore, draws=dims.slate_size), Policy(start, greedy)
