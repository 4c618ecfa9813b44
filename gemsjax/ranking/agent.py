"""How a ranking policy's scorer learns from clicks: targets, weights and losses of slates, and one step of Adam.

`make_ranking_agent(spec, policy)` gives pure functions over a batch of B slates. What was shown where and to whom is
all that is learnt from: the features of the S slotted items in slot order, and the feedback. Follows TF-Agents' ranking
agent; one of its slips is behind `compat`. Called by `ranking.training` and whoever has slates of their own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from gemsjax.errors import require, require_choice
from gemsjax.maths.optimise import AdamState, adam_init, adam_step
from gemsjax.ranking.policy import RankingHypers, RankingObservation, RankingPolicy
from gemsjax.ranking.policy import check_hypers as check_policy_hypers
from gemsjax.types import Array, Key, Metrics, Params

FEEDBACKS = ("cascading", "score_vector", "unknown")
"""`unknown` is `cascading`, as in TF-Agents."""
BIASES = ("unset", "base", "exponent", "fixed")
LOSSES = ("squared", "sigmoid", "softmax")
NON_CLICK_SCORE = -1.0
LARGEST_MULTIPLIER = 1e18
"""Of the position bias, as it enters sums: products with errors and sums over batches stay far from overflowing."""


class Cascade(NamedTuple):
    """Cascading feedback: a user looks from the first slot on and stops at the one that it chooses.

    Attributes:
      chosen_index: [...] int32 slot; S for none.
      chosen_value: [...] what the chosen item is worth.
    """

    chosen_index: Array
    chosen_value: Array


Feedback = Cascade | Array
"""A `Cascade`, or a score for every slot: [..., S]."""


class Slates(NamedTuple):
    """A batch to learn from. A user, item or weight that is not finite teaches nothing.

    Attributes:
      user: [B, G] features of the users.
      items: [B, S, D] features of the slotted items, in slot order.
      feedback: of the spec's kind.
      present: [B, S] bool, which slots hold an item (the others are padding and may hold anything); None if all do.
      weight: [B] or [] how much a slate counts; None for 1.
    """

    user: Array
    items: Array
    feedback: Feedback
    present: Array | None = None
    weight: Array | float | None = None


@dataclasses.dataclass(frozen=True)
class RankingAgentSpec:
    """Static choices.

    Attributes:
      feedback: one of `FEEDBACKS`.
      non_click_score: target of a slot that was looked at and not chosen; None for -1. Cascading feedback only.
      bias: how the weight of slot j (from 0) makes up for users who look there less: `unset` 1, `base` (j + 1)^s,
        `exponent` s^j, `fixed` the numbers of `bias_weights`; s is `hypers.bias_severity`.
      bias_weights: S numbers, for `fixed` only.
      positive_only: only slots with a positive target get that weight, others keep 1.
      compat: as TF-Agents does it, `positive_only` replaces the whole weight of other slots by 1: what the user did not
        look at, padding and the slates' own weights included, and with `bias` unset, too.
      loss: `squared`, `sigmoid` (cross-entropy of every slot) or `softmax` (cross-entropy of the slate, which the
        weight of its first slot multiplies).
    """

    feedback: str = "cascading"
    non_click_score: float | None = None
    bias: str = "unset"
    bias_weights: tuple[float, ...] | None = None
    positive_only: bool = False
    compat: bool = False
    loss: str = "squared"


@struct.dataclass
class RankingAgentHypers(RankingHypers):
    """Numbers that may differ between runs of one program: those of the policy, and

    Attributes:
      rate: Adam's learning rate.
      bias_severity: s of the position bias; 0 is no bias under `base`, 1 under `exponent`.
    """

    rate: Array | float = 1e-3
    bias_severity: Array | float = 1.0


@struct.dataclass
class RankingState:
    """Everything that an update changes: the scorer's variables, and Adam's moments of its parameters."""

    variables: Params
    optimiser: AdamState


class RankingAgent(NamedTuple):
    """Pure functions, sizes bound.

    Attributes:
      spec: what it was made from.
      policy: whose scorer learns.
      init: `(key, one observation) -> state`.
      loss: `(variables, hypers, slates) -> []`.
      update: `(state, hypers, slates) -> (state, metrics)`.
    """

    spec: RankingAgentSpec
    policy: RankingPolicy
    init: Callable[[Key, RankingObservation], RankingState]
    loss: Callable[[Params, RankingAgentHypers, Slates], Array]
    update: Callable[[RankingState, RankingAgentHypers, Slates], tuple[RankingState, Metrics]]


def check_agent_spec(spec: RankingAgentSpec, num_slots: int) -> None:
    """Raise `SettingError` for an unknown name, or numbers that do not belong to the other choices."""
    require_choice("feedback", spec.feedback, FEEDBACKS)
    require_choice("bias", spec.bias, BIASES)
    require_choice("loss", spec.loss, LOSSES)
    allowed = spec.non_click_score is None or (spec.feedback != "score_vector" and math.isfinite(spec.non_click_score))
    require(allowed, "non_click_score", spec.non_click_score, "a finite number with cascading feedback, else None")
    if spec.bias == "fixed":
        given = spec.bias_weights
        fits = given is not None and len(given) == num_slots and all(map(math.isfinite, given))
        require(fits, "bias_weights", given, f"{num_slots} finite numbers, one a slot")
    else:
        require(spec.bias_weights is None, "bias_weights", spec.bias_weights, "None unless the bias is fixed")
    fits = spec.positive_only or not spec.compat
    require(fits, "compat", spec.compat, "False unless positive_only is set, which is all that it changes")


def check_agent_hypers(hypers: RankingAgentHypers) -> None:
    """Raise `SettingError` for a number out of range (host-side numbers only)."""
    check_policy_hypers(hypers)
    for name in ("rate", "bias_severity"):
        value = getattr(hypers, name)
        require(0.0 <= value < math.inf, name, value, "a finite number of at least 0")


# -- targets and weights of one slate ----------------------------------------------------------------------------------


def target_scores(spec: RankingAgentSpec, feedback: Feedback, num_slots: int) -> Array:
    """What the slots of one slate should score: [S].

    A cascade gives `non_click_score` before the chosen slot, the value at it, and 0 after.
    """
    if not isinstance(feedback, Cascade):
        return jnp.asarray(feedback, jnp.float32)
    missed = NON_CLICK_SCORE if spec.non_click_score is None else spec.non_click_score
    slots, chosen = jnp.arange(num_slots), feedback.chosen_index
    return jnp.where(slots < chosen, missed, jnp.where(slots == chosen, feedback.chosen_value, 0.0))


def bias_multipliers(spec: RankingAgentSpec, severity: Array | float, num_slots: int) -> Array:
    """[S] by which the position bias multiplies the weights of slots."""
    slots = jnp.arange(num_slots, dtype=jnp.float32)
    if spec.bias == "base":
        return (slots + 1.0) ** severity
    if spec.bias == "exponent":
        return jnp.asarray(severity, jnp.float32) ** slots
    return jnp.asarray(spec.bias_weights, jnp.float32) if spec.bias == "fixed" else jnp.ones(num_slots)


def _bounded_multipliers(spec: RankingAgentSpec, severity: Array | float, num_slots: int) -> tuple[Array, Array]:
    """`bias_multipliers` [S] and 1 [], both over what keeps the largest multiplier at `LARGEST_MULTIPLIER`.

    Losses are weighted means, so a factor of all weights changes nothing; sums of weights that are too large would be
    infinite. Ordinary severities are not touched, to the last bit.
    """
    plain, slots = bias_multipliers(spec, severity, num_slots), jnp.arange(num_slots, dtype=jnp.float32)
    most = jnp.log(jnp.float32(LARGEST_MULTIPLIER))
    if spec.bias == "base":
        logs = severity * jnp.log(slots + 1.0)
    elif spec.bias == "exponent":
        logs = slots * jnp.log(jnp.maximum(severity, jnp.finfo(jnp.float32).tiny))
    else:
        excess = jnp.maximum(jnp.abs(plain).max() / LARGEST_MULTIPLIER, 1.0)
        return plain / excess, 1.0 / excess
    excess = jnp.maximum(logs.max() - most, 0.0)
    return jnp.where(excess > 0.0, jnp.exp(logs - excess), plain), jnp.exp(-excess)


def slot_weights(
    spec: RankingAgentSpec, severity: Array | float, feedback: Feedback, present: Array, weight: Array | float
) -> Array:
    """How much the slots of one slate count: [S]; only their ratios, within a slate and between slates, matter.

    Nothing is learnt from a slate whose chosen slot is not one of 0 .. S, nor from a slot whose target is not finite.

    Args:
      spec: static choices.
      severity: [] s of the position bias.
      feedback: of one slate.
      present: [S] bool.
      weight: [] of the slate.
    """
    size = present.shape[0]
    targets = target_scores(spec, feedback, size)
    known = jnp.isfinite(targets)
    counted = jnp.where(present, weight, 0.0)
    if isinstance(feedback, Cascade):
        chosen = feedback.chosen_index
        known &= (chosen >= 0) & (chosen <= size)
        counted = jnp.where(jnp.arange(size) <= chosen, counted, 0.0)
    bias, one = _bounded_multipliers(spec, severity, size)
    if spec.compat:
        weights = jnp.where(targets > 0.0, counted * bias, one)
    elif spec.positive_only:
        weights = counted * jnp.where(targets > 0.0, bias, one)
    else:
        weights = counted * bias
    return jnp.where(known, weights, 0.0)


def weighted_mean(errors: Array, weights: Array) -> Array:
    """sum(w e) / sum(w), 0 if the weights add up to nothing; errors of weight 0 may be anything."""
    total = weights.sum()
    return jnp.where(weights != 0.0, weights * errors, 0.0).sum() / jnp.where(total != 0.0, total, 1.0)


# -- the agent ---------------------------------------------------------------------------------------------------------


def make_ranking_agent(spec: RankingAgentSpec, policy: RankingPolicy) -> RankingAgent:
    """Bind a policy and how its scorer learns.

    Raises:
      SettingError: see `check_agent_spec`.
    """
    size = policy.spec.num_slots
    check_agent_spec(spec, size)

    def init(key: Key, observation: RankingObservation) -> RankingState:
        variables = policy.init(key, observation)
        return RankingState(variables, adam_init(variables.get("params", {})))

    def loss(variables: Params, hypers: RankingAgentHypers, slates: Slates) -> Array:
        _check_slates(spec, slates, size)
        batch = slates.user.shape[0]
        present = jnp.ones((batch, size), bool) if slates.present is None else slates.present
        weight = jnp.broadcast_to(1.0 if slates.weight is None else slates.weight, (batch,))
        slates, whole, weight = _finite(slates, weight)
        present &= whole
        targets = jax.vmap(lambda feedback: target_scores(spec, feedback, size))(slates.feedback)
        weights = jax.vmap(lambda *row: slot_weights(spec, hypers.bias_severity, *row))(
            slates.feedback, present, weight
        )
        if spec.compat:
            # There, padding is learnt from, but for what is not a number.
            present, weights = whole, jnp.where(whole, weights, 0.0)
        items = jnp.where(present[..., None], slates.items, 0.0)
        scores = policy.scores(variables, RankingObservation(slates.user, items))
        return _loss(spec, scores, targets, weights, present)

    def update(state: RankingState, hypers: RankingAgentHypers, slates: Slates) -> tuple[RankingState, Metrics]:
        def of_params(params: Params) -> Array:
            return loss({**state.variables, "params": params}, hypers, slates)

        params = state.variables.get("params", {})
        value, gradients = jax.value_and_grad(of_params)(params)
        params, moments = adam_step(params, gradients, state.optimiser, hypers.rate)
        learnt = {"params": params} if "params" in state.variables else {}  # a scorer without layers has none
        return RankingState({**state.variables, **learnt}, moments), {"loss": value}

    return RankingAgent(spec, policy, init, loss, update)


def _finite(slates: Slates, weight: Array) -> tuple[Slates, Array, Array]:
    """Slates and weights [B] with zeros for users, items and weights that are not finite, and what teaches, [B, S].

    They must not reach the network, not even with weight 0: its derivative would multiply a NaN by zero, which is NaN.
    """
    known = jnp.isfinite(slates.user).all(axis=-1) & jnp.isfinite(weight)
    whole = jnp.isfinite(slates.items).all(axis=-1)
    user, items = jnp.where(known[:, None], slates.user, 0.0), jnp.where(whole[..., None], slates.items, 0.0)
    return slates._replace(user=user, items=items), whole & known[:, None], jnp.where(known, weight, 0.0)


def _check_slates(spec: RankingAgentSpec, slates: Slates, size: int) -> None:
    require(slates.items.shape[-2] == size, "items", slates.items.shape, f"the features of the {size} slotted items")
    cascade = isinstance(slates.feedback, Cascade)
    accepted = f"as the spec says: {spec.feedback}"
    require(cascade == (spec.feedback != "score_vector"), "feedback", type(slates.feedback).__name__, accepted)


def _loss(spec: RankingAgentSpec, scores: Array, targets: Array, weights: Array, present: Array) -> Array:
    finite = jnp.where(jnp.isfinite(targets), targets, 0.0)
    if spec.loss == "squared":
        return weighted_mean(jnp.square(scores - finite), weights)
    if spec.loss == "sigmoid":
        return weighted_mean(optax.sigmoid_binary_cross_entropy(scores, finite), weights)
    # Padding takes no part in the softmax, and a slate with a target that is not finite none in the loss.
    known = (jnp.isfinite(targets) | ~present).all(axis=-1)
    errors = optax.softmax_cross_entropy(jnp.where(present, scores, -1e30), jnp.where(present, finite, 0.0))
    return weighted_mean(errors, jnp.where(known, weights[:, 0], 0.0))
