"""What the actor-critic learners share: networks, beliefs unrolled with their gradients, critic loss, target updates.

Called by the agents that act through a continuous action (SAC, Wolpertinger, DDPG, TD3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from gemsjax.agents import checks
from gemsjax.belief import Belief
from gemsjax.maths.optimise import adam_step
from gemsjax.nets.mlp import MLP, Critic
from gemsjax.types import Array, Episode, Key, Observation, Params, time_major

Box = tuple[Array, Array]
"""Centre and half range of an action."""


def check_hypers(hypers: Any, rates: Sequence[str], positive: Sequence[str] = ()) -> None:
    """`checks.check_hypers` with the shares of an actor-critic, `gamma` and `tau`."""
    checks.check_hypers(hypers, rates, shares=("gamma", "tau"), positive=positive)


def inside(box: Box, squashed: Array) -> Array:
    """An action in the ranker's box from one in (-1, 1)."""
    centre, scale = box
    return centre + scale * squashed


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks' apply functions by the names that the equations use."""

    belief: Belief
    policy: MLP
    critic: Critic

    def outputs(self, policy: Params, states: Array) -> Array:
        """The policy network's raw outputs: [..., belief width] -> [..., n]."""
        return self.policy.apply({"params": policy}, states)

    def q_values(self, critics: Sequence[Params], states: Array, actions: Array) -> tuple[Array, ...]:
        """Q of each critic: [..., belief width], [..., A] -> [...]."""
        return tuple(self.critic.apply({"params": params}, states, actions) for params in critics)

    def init(self, key: Key, action_dim: int, critics: int) -> tuple[dict[str, Params], tuple[Params, ...]]:
        """Fresh parameters by part (beliefs, policy, a tuple of critics), and target critics equal to the critics."""
        actor_key, critic_key, policy_key, *q_keys = jax.random.split(key, 3 + critics)
        width = self.belief.width
        parts = {
            "actor_belief": self.belief.init(actor_key),
            "critic_belief": self.belief.init(critic_key),
            "policy": self.policy.init(policy_key, jnp.zeros(width))["params"],
            "critics": tuple(self.critic.init(k, jnp.zeros(width), jnp.zeros(action_dim))["params"] for k in q_keys),
        }
        # The targets are arrays of their own: a donated state may not hold one buffer twice.
        return parts, jax.tree.map(jnp.copy, parts["critics"])


def turns(batch: Episode) -> Episode:
    """A batch of episodes [B, H, ...] turned time-major, [H, B, ...]; `final` stays [B]."""
    chex.assert_rank((batch.observation.slate, batch.action, batch.reward), (3, 3, 2))
    chex.assert_equal_shape_prefix((batch.observation.slate, batch.action, batch.reward), 2)
    observation, action, reward = time_major((batch.observation, batch.action, batch.reward))
    return dataclasses.replace(batch, observation=observation, action=action, reward=reward)


class Unrolled(NamedTuple):
    """Both beliefs over a batch, with the way back of their gradients.

    Attributes:
      actor, critic: [H, B, belief width] states.
      pull: `(gradient of the actor's states, of the critic's) -> gradients by part` of both beliefs.
    """

    actor: Array
    critic: Array
    pull: Callable[[Array, Array], dict[str, Params]]


def unroll(networks: Networks, params: Any, observation: Observation) -> Unrolled:
    """Both beliefs over time-major observations [H, B].

    One scan forward for both, one backward: the losses give gradients with respect to the states.
    """
    (actor, critic), pull_beliefs = jax.vjp(
        lambda actor, critic: networks.belief.unroll((actor, critic), observation),
        params.actor_belief,
        params.critic_belief,
    )

    def pull(by_actor: Array, by_critic: Array) -> dict[str, Params]:
        actor_belief, critic_belief = pull_beliefs((by_actor, by_critic))
        return {"actor_belief": actor_belief, "critic_belief": critic_belief}

    return Unrolled(actor, critic, pull)


def discounted(reward: Array, gamma: Array, next_value: Array) -> Array:
    """Targets [H, B] from rewards [H, B] and values of the next turns [H-1, B]; nothing follows the last turn."""
    return jax.lax.stop_gradient(reward + gamma * jnp.pad(next_value, ((0, 1), (0, 0))))


def critic_loss(
    networks: Networks, critics: Sequence[Params], states: Array, action: Array, target: Array
) -> tuple[Array, Array]:
    """Half the sum of the critics' mean squared errors; and the first one's mean."""
    values = networks.q_values(critics, states, action)
    losses = jnp.stack([jnp.mean(jnp.square(q - target)) for q in values])
    return 0.5 * losses.sum(), jnp.mean(values[0])


def step_parts(
    params: Any, moments: Any, gradients: Mapping[str, Any], rates: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """An Adam step of every part that has a gradient: new parameters and moments by part."""
    stepped = {
        part: adam_step(getattr(params, part), gradient, getattr(moments, part), rates[part])
        for part, gradient in gradients.items()
    }
    return {part: new for part, (new, _) in stepped.items()}, {part: new for part, (_, new) in stepped.items()}


def follow(targets: Params, online: Params, tau: Array) -> Params:
    """Targets moved by the share `tau` towards the online parameters (Polyak averaging)."""
    return jax.tree.map(lambda target, new: target + tau * (new - target), targets, online)
