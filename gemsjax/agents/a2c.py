"""Advantage actor-critic on a ranker's continuous actions, learning from whole episodes of its own.

`make_a2c(spec, dims, ranker)` gives an `Agent`: PPO's networks and advantages, one step of the plain policy gradient on
the whole batch. Source: Mnih et al. 2016, without its asynchrony; the paper of the simulator has no such learner.
"""

from __future__ import annotations

import dataclasses

from flax import struct

from gemsjax.agents.base import Acting, Agent
from gemsjax.agents.checks import check_hypers, check_widths
from gemsjax.agents.latent_actor_critic import Batch, LatentState, make_latent_actor_critic
from gemsjax.errors import require, require_choice
from gemsjax.maths import policy_gradient
from gemsjax.rankers import Ranker
from gemsjax.types import Array, Dims, Episode, Key, Metrics

ADVANTAGES = ("gae", "nstep")
"""Those of `maths.returns.ESTIMATORS` that are no slips."""


@dataclasses.dataclass(frozen=True)
class A2CSpec:
    """Static choices: changing one makes another program.

    Attributes:
      hidden: width of the hidden layer of policy and critic.
      belief_width: width of the recurrent states.
      item_dim: width of the beliefs' item embeddings.
      returns: `gae`, or `nstep`: an advantage is the discounted return to the episode's end less the value.
      normalise: advantages of a batch with mean 0 and deviation 1, so that one learning rate fits every reward.
    """

    hidden: int = 256
    belief_width: int = 20
    item_dim: int = 20
    returns: str = "gae"
    normalise: bool = True


@struct.dataclass
class A2CHypers:
    """Numbers that may differ between runs of one program.

    Attributes:
      gamma: discount per turn.
      lam: weight of longer sums in the advantages (of `gae`).
      rate: Adam's learning rate.
      entropy: weight of the Gaussian's entropy (in nats, all dimensions).
      value_weight: weight of the critic's mean squared error.
      max_grad_norm: norm that the gradients of actor and critic are scaled down to, each.
    """

    gamma: float = 0.8
    lam: float = 0.95
    rate: float = 3e-3
    entropy: float = 0.001
    value_weight: float = 0.5
    max_grad_norm: float = 0.5


def validate_spec(spec: A2CSpec) -> None:
    """Raise `SettingError` for a width below 1 or an unknown choice."""
    check_widths(spec)
    require_choice("returns", spec.returns, ADVANTAGES)


def validate_hypers(hypers: A2CHypers) -> None:
    """Raise `SettingError` for a hyper-parameter outside its range (host-side numbers only)."""
    check_hypers(hypers, rates=("rate",), shares=("gamma", "lam"), positive=("max_grad_norm",))
    for name in ("entropy", "value_weight"):
        require(getattr(hypers, name) >= 0.0, name, getattr(hypers, name), "a number of at least 0")


def make_a2c(spec: A2CSpec, dims: Dims, ranker: Ranker) -> Agent:
    """A2C whose actions a `ranker` turns into slates.

    Raises:
      SettingError: see `validate_spec`.
    """
    validate_spec(spec)
    networks = make_latent_actor_critic(dims, spec.hidden, spec.belief_width, spec.item_dim, ranker)
    explore, greedy = networks.policies()

    def init(key: Key, _hypers: A2CHypers) -> LatentState:
        return networks.init(key)

    def draw_update(_key: Key, _batch: int) -> tuple[()]:
        return ()

    def loss(log_prob: Array, batch: Batch) -> tuple[Array, Metrics]:
        return policy_gradient.policy_gradient(log_prob, batch.advantage, batch.valid), {}

    def update(acting: Acting, episodes: Episode, _noise: tuple[()]) -> tuple[LatentState, Metrics]:
        hypers = acting.hypers
        batch = networks.batch(acting.state.params, episodes, hypers.gamma, hypers.lam, spec.returns)
        if spec.normalise:
            normalised = policy_gradient.normalised(batch.advantage, batch.valid)
            batch = dataclasses.replace(batch, advantage=normalised)
        return networks.improve(acting.state, batch, hypers, loss)

    return Agent(init, explore, greedy, draw_update, update)
