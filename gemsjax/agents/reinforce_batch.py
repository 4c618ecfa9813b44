"""REINFORCE over many users at once, each drawn item with a credit of its own: no critic, no replay, no ranker.

`make_reinforce_batch(spec, dims)` gives an `Agent`. Slates are K independent draws from a softmax over items. The item
of slot k of turn t is credited with its own click and with the discounted return that follows the turn, which all slots
share; the batch's mean credit of the same slot of the same turn is the baseline; an entropy bonus keeps the softmax
from closing on one item before the others were tried.

Source: this project's own, in no paper; REINFORCE (Williams 1992) with the batch's mean as baseline. `experiments.train
--method reinforce-batch` runs it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from gemsjax.agents.actor import Actor, ActorParams, ActorState, improve, make_actor, make_softmax_policies, outcomes
from gemsjax.agents.base import Acting, Agent
from gemsjax.agents.checks import check_hypers, check_widths
from gemsjax.errors import require
from gemsjax.maths.returns import return_to_go
from gemsjax.types import Array, Dims, Episode, Key, Metrics, Params, time_major


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """Static choices: changing one makes another program.

    Attributes:
      hidden: width of the policy's hidden layer.
      belief_width: width of the recurrent state.
      item_dim: width of the belief's item embeddings.
    """

    hidden: int = 256
    belief_width: int = 20
    item_dim: int = 20


@struct.dataclass
class BatchHypers:
    """Numbers that may differ between runs of one program.

    Attributes:
      gamma: discount per turn.
      rate: Adam's learning rate of the policy and its belief.
      entropy: weight of the softmax's entropy (in nats a turn) beside the credits (in clicks).
    """

    gamma: float = 0.8
    rate: float = 3e-3
    entropy: float = 0.1


def validate_spec(spec: BatchSpec) -> None:
    """Refuse widths that are no whole numbers of at least 1.

    Raises:
      SettingError: naming the width.
    """
    check_widths(spec)


def validate_hypers(hypers: BatchHypers) -> None:
    """Refuse hyper-parameters outside their range: finite, gamma in [0, 1], rate in [0, 1), entropy at least 0.

    Host-side numbers only, not traced ones.

    Raises:
      SettingError: naming the hyper-parameter.
    """
    check_hypers(hypers, rates=("rate",))
    require(hypers.entropy >= 0.0, "entropy", hypers.entropy, "a number of at least 0")


def make_reinforce_batch(spec: BatchSpec, dims: Dims, _means: None = None) -> Agent:
    """The batched learner; it shows items itself and needs no ranker.

    Args:
      spec: static choices.
      dims: I, K and H of the environment.

    Returns:
      An agent whose actions are the slates [K] themselves. Exploring draws each slot's item, the greedy policy shows
      the K likeliest. An update takes episodes of B users, 2 or more (of one alone the baseline leaves nothing); its
      metrics are `loss` [] (in clicks) and `entropy` [] (nats), means over users and turns.

    Raises:
      SettingError: a width below 1.
    """
    validate_spec(spec)
    actor = make_actor(dims, spec.hidden, spec.belief_width, spec.item_dim, dims.num_items)
    explore, greedy = make_softmax_policies(dims, actor)

    def init(key: Key, _hypers: BatchHypers) -> ActorState:
        return actor.init(key)

    def draw_update(_key: Key, _batch: int) -> tuple[()]:
        return ()

    def update(acting: Acting, batch: Episode, _noise: tuple[()]) -> tuple[ActorState, Metrics]:
        gradients, metrics = _gradients(actor, acting.state.params, acting.hypers, batch)
        return improve(acting.state, gradients, acting.hypers.rate), metrics

    return Agent(init, explore, greedy, draw_update, update)


def advantages(batch: Episode, gamma: Array | float) -> Array:
    """Each drawn item's credit less the batch's mean of that slot and turn.

    The credit is the return from the turn on without the clicks that the slate's other items got in it. Where rewards
    are clicks, that is the item's own click plus gamma * G_{t+1}, the slate's later return.

    Args:
      batch: episodes [B, H] of K slots.
      gamma: discount per turn, in [0, 1].

    Returns:
      [H, B, K] float32, time-major, in clicks; of mean 0 over B.
    """
    clicks = outcomes(batch).clicks.astype(jnp.float32)
    others = clicks.sum(axis=-1, keepdims=True) - clicks
    credit = return_to_go(time_major(batch.reward), gamma)[..., None] - others
    return credit - credit.mean(axis=1, keepdims=True)


def _gradients(actor: Actor, params: ActorParams, hypers: BatchHypers, batch: Episode) -> tuple[ActorParams, Metrics]:
    """Gradients of the mean loss of a turn.

    The logits of all turns are a large array (50 MB for 128 users and 1000 items), and passes over it took most of the
    update's time. So loss and gradients go turn by turn, in what a cache holds.
    """
    observation, action = time_major((batch.observation, batch.action))
    (states,), pull_belief = jax.vjp(lambda belief: actor.belief.unroll((belief,), observation), params.belief)
    share = 1.0 / states.shape[0]

    def turn(total: ActorParams, inputs: tuple[Array, Array, Array]) -> tuple[ActorParams, tuple]:
        (loss, entropy), (policy_grad, states_grad) = jax.value_and_grad(_turn_loss, (1, 2), has_aux=True)(
            actor, params.policy, inputs[0], *inputs[1:], hypers.entropy
        )
        total = jax.tree.map(lambda total, new: total + share * new, total, policy_grad)
        return total, (share * states_grad, loss, entropy)

    nothing = jax.tree.map(jnp.zeros_like, params.policy)
    turns = (states, action, advantages(batch, hypers.gamma))
    policy_grad, (states_grad, loss, entropy) = jax.lax.scan(turn, nothing, turns)
    (belief_grad,) = pull_belief((states_grad,))
    return ActorParams(belief_grad, policy_grad), {"loss": loss.mean(), "entropy": entropy.mean()}


def _turn_loss(
    actor: Actor, policy: Params, states: Array, drawn: Array, advantage: Array, weight: Array
) -> tuple[Array, Array]:
    """One turn of B users: minus (advantages times log pi of the drawn items, and weighted entropy); the entropy."""
    log_policy = jax.nn.log_softmax(actor.outputs(policy, states))
    gain = (advantage * jnp.take_along_axis(log_policy, drawn, axis=-1)).sum(axis=-1).mean()
    entropy = -(jnp.exp(log_policy) * log_policy).sum(axis=-1).mean()
    return -gain - weight * entropy, entropy
