"""Proximal policy optimisation on a ranker's continuous actions, learning from whole episodes of its own.

`make_ppo(spec, dims, ranker)` gives an `Agent`. An update estimates advantages over the batch once (GAE along each
episode), then passes over it several times in minibatches of episodes, with the clipped surrogate, an entropy bonus and
a critic of its own. Source: Schulman et al. 2017; the paper of the simulator has no such learner.
"""

from __future__ import annotations

import dataclasses

import jax
from flax import struct

from gemsjax.agents.base import Acting, Agent
from gemsjax.agents.checks import check_hypers, check_widths
from gemsjax.agents.latent_actor_critic import Batch, LatentState, make_latent_actor_critic
from gemsjax.errors import require, require_count
from gemsjax.maths import policy_gradient
from gemsjax.rankers import Ranker
from gemsjax.types import Array, Dims, Episode, Key, Metrics


@dataclasses.dataclass(frozen=True)
class PPOSpec:
    """Static choices: changing one makes another program.

    Attributes:
      hidden: width of the hidden layer of policy and critic.
      belief_width: width of the recurrent states.
      item_dim: width of the beliefs' item embeddings.
      epochs: passes over the episodes of an update.
      minibatch: episodes of a step; those of a pass that fill no minibatch wait for the next order.
    """

    hidden: int = 256
    belief_width: int = 20
    item_dim: int = 20
    epochs: int = 4
    minibatch: int = 32


@struct.dataclass
class PPOHypers:
    """Numbers that may differ between runs of one program.

    Attributes:
      gamma: discount per turn.
      lam: weight of longer sums in the advantages.
      rate: Adam's learning rate.
      clip: how far the ratio of probabilities may leave 1.
      entropy: weight of the Gaussian's entropy (in nats, all dimensions).
      value_weight: weight of the critic's mean squared error.
      max_grad_norm: norm that the gradients of actor and critic are scaled down to, each.
    """

    gamma: float = 0.8
    lam: float = 0.95
    rate: float = 1e-3
    clip: float = 0.2
    entropy: float = 0.001
    value_weight: float = 0.5
    max_grad_norm: float = 0.5


def validate_spec(spec: PPOSpec) -> None:
    """Raise `SettingError` for a width or count below 1."""
    check_widths(spec)
    for name in ("epochs", "minibatch"):
        require_count(name, getattr(spec, name))


def validate_hypers(hypers: PPOHypers) -> None:
    """Raise `SettingError` for a hyper-parameter outside its range (host-side numbers only)."""
    check_hypers(hypers, rates=("rate",), shares=("gamma", "lam"), positive=("clip", "max_grad_norm"))
    for name in ("entropy", "value_weight"):
        require(getattr(hypers, name) >= 0.0, name, getattr(hypers, name), "a number of at least 0")


def make_ppo(spec: PPOSpec, dims: Dims, ranker: Ranker) -> Agent:
    """PPO whose actions a `ranker` turns into slates.

    Raises:
      SettingError: see `validate_spec`.
    """
    validate_spec(spec)
    networks = make_latent_actor_critic(dims, spec.hidden, spec.belief_width, spec.item_dim, ranker)
    explore, greedy = networks.policies()

    def init(key: Key, _hypers: PPOHypers) -> LatentState:
        return networks.init(key)

    def draw_update(key: Key, batch: int) -> Array:
        """Which episodes make up each minibatch: [epochs * minibatches, episodes of one] int32."""
        size = min(spec.minibatch, batch)
        orders = jax.vmap(lambda key: jax.random.permutation(key, batch))(jax.random.split(key, spec.epochs))
        return orders[:, : batch // size * size].reshape(-1, size)

    def update(acting: Acting, episodes: Episode, orders: Array) -> tuple[LatentState, Metrics]:
        hypers = acting.hypers
        batch = networks.batch(acting.state.params, episodes, hypers.gamma, hypers.lam, "gae")
        normalised = policy_gradient.normalised(batch.advantage, batch.valid)
        batch = dataclasses.replace(batch, advantage=normalised)

        def loss(log_prob: Array, part: Batch) -> tuple[Array, Metrics]:
            surrogate, outside = policy_gradient.clipped_surrogate(
                log_prob, part.log_prob, part.advantage, part.valid, hypers.clip
            )
            return surrogate, {"clipped_share": outside}

        def minibatch(state: LatentState, rows: Array) -> tuple[LatentState, Metrics]:
            return networks.improve(state, jax.tree.map(lambda x: x[:, rows], batch), hypers, loss)

        state, metrics = jax.lax.scan(minibatch, acting.state, orders)
        return state, jax.tree.map(lambda x: x.mean(axis=0), metrics)

    return Agent(init, explore, greedy, draw_update, update)
