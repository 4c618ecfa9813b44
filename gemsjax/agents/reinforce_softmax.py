"""REINFORCE with a softmax over items (baseline of the GeMS paper; there after Chen et al., WSDM 2019).

`make_reinforce_softmax(spec, dims)` gives an `Agent`. A training slate is K independent draws; each turn with a click
reinforces that its topmost clicked item is among them. Which turn's click that is, is the setting `credit`. Bracketed
numbers in comments: README, "Where they differ".
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from gemsjax.agents.actor import Actor, ActorParams, ActorState, improve, make_actor, make_softmax_policies, outcomes
from gemsjax.agents.base import Acting, Agent
from gemsjax.agents.checks import check_hypers, check_widths
from gemsjax.errors import require_choice
from gemsjax.maths.categorical import log_hit
from gemsjax.maths.returns import RETURNS, return_to_go
from gemsjax.types import Array, Dims, Episode, Key, Metrics, time_major

CREDITS = ("corrected", "published")


@dataclasses.dataclass(frozen=True)
class SoftmaxSpec:
    """Static choices: changing one makes another program.

    Attributes:
      hidden: width of the policy's hidden layer.
      belief_width: width of the recurrent state.
      item_dim: width of the belief's item embeddings.
      credit: the return from turn t on goes to the item clicked in o_{t+1}, which action t showed (`corrected`), or to
        the one clicked in o_t, which the state has already seen (`published`).
      return_to_go: `recursive`, or `divided` as published; see `maths.returns`.
    """

    hidden: int = 256
    belief_width: int = 20
    item_dim: int = 20
    credit: str = "corrected"
    return_to_go: str = "recursive"


@struct.dataclass
class SoftmaxHypers:
    """Numbers that may differ between runs of one program.

    Attributes:
      gamma: discount per turn.
      rate: Adam's learning rate of the policy and its belief.
    """

    gamma: float = 0.8
    rate: float = 3e-3


def validate_spec(spec: SoftmaxSpec) -> None:
    """Raise `SettingError` for a width below 1 or an unknown choice."""
    check_widths(spec)
    require_choice("credit", spec.credit, CREDITS)
    require_choice("return_to_go", spec.return_to_go, RETURNS)


def validate_hypers(hypers: SoftmaxHypers) -> None:
    """Raise `SettingError` for a hyper-parameter outside its range (host-side numbers only)."""
    check_hypers(hypers, rates=("rate",))


def make_reinforce_softmax(spec: SoftmaxSpec, dims: Dims, _means: None = None) -> Agent:
    """REINFORCE+SoftMax; it shows items itself and needs no ranker.

    Raises:
      SettingError: see `validate_spec`.
    """
    validate_spec(spec)
    actor = make_actor(dims, spec.hidden, spec.belief_width, spec.item_dim, dims.num_items)
    explore, greedy = make_softmax_policies(dims, actor)

    def init(key: Key, _hypers: SoftmaxHypers) -> ActorState:
        return actor.init(key)

    def draw_update(_key: Key, _batch: int) -> tuple[()]:
        return ()

    def update(acting: Acting, batch: Episode, _noise: tuple[()]) -> tuple[ActorState, Metrics]:
        loss = jax.value_and_grad(_loss, argnums=2, has_aux=True)
        (_, metrics), gradients = loss(actor, spec, acting.state.params, acting.hypers.gamma, batch)
        return improve(acting.state, gradients, acting.hypers.rate), metrics

    return Agent(init, explore, greedy, draw_update, update)


def _loss(actor: Actor, spec: SoftmaxSpec, params: ActorParams, gamma: Array, batch: Episode) -> tuple[Array, Metrics]:
    """Minus the sum over turns with a click of G_t * log P(the slate holds the clicked item), mean over episodes."""
    seen = time_major(batch.observation)
    credited = outcomes(batch) if spec.credit == "corrected" else seen  # [21]
    returns = return_to_go(time_major(batch.reward), gamma, spec.return_to_go)
    first = credited.clicks.argmax(axis=-1)  # the topmost clicked rank; others go without [24]
    item = jnp.take_along_axis(credited.slate, first[..., None], axis=-1)
    log_policy = jax.nn.log_softmax(actor.unroll(params, seen))
    log_chosen = jnp.take_along_axis(log_policy, item, axis=-1)[..., 0]
    any_click = credited.clicks.any(axis=-1)
    hit = jnp.where(any_click, log_hit(log_chosen, credited.slate.shape[-1]), 0.0)
    loss = -(returns * hit).sum(axis=0).mean()
    metrics = {
        "loss": loss,
        "entropy": -(jnp.exp(log_policy) * log_policy).sum(axis=-1).mean(),
        "clicked_turns": any_click.mean(dtype=jnp.float32),
    }
    return loss, metrics
