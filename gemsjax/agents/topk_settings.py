"""Settings of top-K off-policy REINFORCE: what is static, what is data, what is refused. For `topk_reinforce`."""

from __future__ import annotations

import dataclasses
import math

from flax import struct

from gemsjax.errors import require, require_choice, require_count
from gemsjax.maths import off_policy

_CHOICES = {
    "correction": off_policy.CORRECTIONS,
    "reduction": off_policy.REDUCTIONS,
    "actions": ("clicked", "shown"),
    "credit": ("turn", "item"),
    "behaviour": ("estimated", "logged"),
    "baseline": ("none", "turn", "standardised"),
    "action_source": ("logged", "pi", "beta", "each"),
    "critic": ("none", "probabilities", "slate"),
}


@dataclasses.dataclass(frozen=True)
class TopKSpec:
    """Static choices: changing one makes another program.

    Attributes:
      correction: `none`, `first_order`, `topk`, or `set_ratio` (see `maths.off_policy.Correction`).
      set_size: K of lambda_K; 0 is the size of the slate.
      normalise: weights add up to one over a batch (normalised importance sampling).
      running: instead, the loss is the batch's weighted sum over a running mean of such sums of weights.
      reduction: of the loss over a batch's actions: `mean` or `sum`.
      actions: shown items that the policy learns from: `clicked` or `shown` (all). `clicked` drops every logged action
        without a click, in tables those with a reward of at most `clicked_above` (0): read with `ratings=True`, that
        are ratings of 2.5 stars and less, whose negative rewards then teach nothing by themselves (they stay in the
        returns of clicked items). The paper's objective, sum over all logged actions of w lambda_K R grad log pi, is
        `shown` with `credit="item"`.
      credit: of an action: its `turn`'s return, or the `item`'s own reward and the return of the next turn.
      behaviour: probabilities of the logging policy are `estimated` or those `logged` with the data.
      baseline: subtracted from the credit: `none`, or the mean credit in the batch at the same `turn`; `standardised`
        also divides by the deviation, both over all the batch's actions, as RecNN does. Without correction and with
        the first-order one a baseline only lowers the variance, as far as it does not depend on the action. With
        lambda_K it also biases: E[w lambda_K b grad log pi] = b sum of lambda_K grad pi is not 0, since lambda_K is
        larger for improbable items; so what the top-K correction converges to then depends on b, and `none` is the
        one that maximises its objective.
      action_source: items whose probabilities count: the `logged` ones; `pi` and `beta` draw them from a head, as the
        published RecNN code does, and are here for comparison only. `each` is its default: the policy's probability of
        an item that the policy drew over the head's of one that the head drew.
      critic: `none`, or where the policy's rewards come from a critic that learns from the log: its value of the
        policy's `probabilities`, or of the `slate` of the items whose probabilities count.
      critic_hidden: width of the critic's hidden layer.
      policy_step: policy and state are updated every so many updates, with the gradients since; as RecNN counts, the
        first time after one more. 1 updates them always.
      negatives: items that estimate the softmax's sum over a large catalogue; 0 sums over all of it.
      entropy, kl: whether the loss has a bonus for entropy, a penalty KL(old policy || policy).
      certain: K' of the explored slate: its most probable items, the others are drawn. At most the slate's size.
      top_m: explored slates hold items out of the M most probable (all, if the catalogue has fewer).
      belief_width, item_dim: widths of the recurrent state and of its item embeddings.
    """

    correction: str = "topk"
    set_size: int = 0
    normalise: bool = False
    running: bool = False
    reduction: str = "mean"
    actions: str = "clicked"
    credit: str = "turn"
    behaviour: str = "estimated"
    baseline: str = "none"
    action_source: str = "logged"
    critic: str = "none"
    critic_hidden: int = 64
    policy_step: int = 1
    negatives: int = 0
    entropy: bool = False
    kl: bool = False
    certain: int = 0
    top_m: int = 100
    belief_width: int = 32
    item_dim: int = 20


@struct.dataclass
class TopKHypers:
    """Numbers that may differ between runs of one program (float32 scalars once inside a program).

    Attributes:
      gamma: discount per turn.
      cap: importance weights are cut off here (the paper's live setting is e^3); 1e30 cuts nothing.
      temperature: T of the policy's softmax.
      rate: Adam's learning rate of state and policy.
      behaviour_rate: Adam's learning rate of the behaviour head.
      entropy_weight, kl_weight: of the terms that `TopKSpec` switches on.
      old_share: share of the policy that enters the old one after every update of it.
      critic_rate: Adam's learning rate of the critic.
      critic_gamma: discount in the critic's target. 0 makes it a model of the turn's reward, over which `gamma` then
        sums; RecNN has 0.99 in both, which counts what follows twice.
      critic_clip: largest absolute target of the critic.
      target_share: share of policy and critic that enters the targets' after every update of the policy.
    """

    gamma: float = 0.8
    cap: float = off_policy.DEFAULT_CAP
    temperature: float = 1.0
    rate: float = 3e-3
    behaviour_rate: float = 3e-3
    entropy_weight: float = 0.01
    kl_weight: float = 0.1
    old_share: float = 0.02
    critic_rate: float = 1e-3
    critic_gamma: float = 0.0
    critic_clip: float = 10.0
    target_share: float = 1e-3


def validate_spec(spec: TopKSpec) -> None:
    """Raise `SettingError` for an unknown choice, a width below 1, or choices that exclude each other."""
    for name, accepted in _CHOICES.items():
        require_choice(name, getattr(spec, name), accepted)
    for name in ("belief_width", "item_dim", "top_m", "critic_hidden", "policy_step"):
        require_count(name, getattr(spec, name))
    for name in ("set_size", "negatives", "certain"):
        require_count(name, getattr(spec, name), 0)
    whole = spec.negatives == 0
    require(whole or not (spec.entropy or spec.kl), "negatives", spec.negatives, "0, with entropy or kl")
    require(whole or spec.action_source == "logged", "negatives", spec.negatives, "0, to draw actions from a head")
    require(whole or spec.critic == "none", "negatives", spec.negatives, "0, with a critic")
    require(not (spec.normalise and spec.running), "running", True, "False, where weights are normalised by batch")
    judged = spec.critic == "none" or spec.credit == "turn"
    require(judged, "credit", spec.credit, "'turn', where a critic gives the rewards of turns")
    known = spec.behaviour == "estimated" or spec.action_source == "logged"
    require(known, "action_source", spec.action_source, "'logged', with the probabilities that were logged")


def validate_hypers(hypers: TopKHypers) -> None:
    """Raise `SettingError` for a hyper-parameter outside its range (host-side numbers only)."""
    for name, value in vars(hypers).items():
        require(math.isfinite(value) and value >= 0.0, name, value, "a finite number of at least 0")
    for name in ("gamma", "old_share", "critic_gamma", "target_share"):
        require(getattr(hypers, name) <= 1.0, name, getattr(hypers, name), "a number in [0, 1]")
    for name in ("rate", "behaviour_rate", "critic_rate"):
        require(getattr(hypers, name) < 1.0, name, getattr(hypers, name), "a number in [0, 1)")
    for name in ("cap", "temperature", "critic_clip"):
        require(getattr(hypers, name) > 0.0, name, getattr(hypers, name), "a positive number")


RECNN_SPEC = TopKSpec(
    correction="topk",
    set_size=10,
    reduction="sum",
    actions="shown",
    baseline="standardised",
    action_source="each",
    critic="probabilities",
    critic_hidden=256,
    policy_step=10,
)
RECNN_HYPERS = TopKHypers(gamma=0.99, cap=1e30, rate=1e-5, behaviour_rate=1e-5, critic_rate=1e-5, critic_gamma=0.99)
"""What of RecNN's settings can be set here, for comparison. Not its defects: weights stay constants, returns are those
of a trajectory, the head is a softmax of logits. Nor its optimiser and its two hidden layers with dropout."""
