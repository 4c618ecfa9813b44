"""REINFORCE with off-policy and top-K correction over items (Chen et al., 2019), from logs or from replayed episodes.

A recurrent state s (chaos-free cell), a policy pi(a|s) = softmax(s . v_a / T) over the catalogue, and a behaviour head
beta(a|s) that estimates who collected the data from the same state without touching it. `make_topk_reinforce` gives
the online `Agent`; its `update` also takes `LoggedEpisodes`, which is how `offline/` trains it.

Which action a logged turn is: a slate is K draws of one distribution over items, so every shown item is an action,
beta(a|s) is the mean over slots of the chance that a slot shows a, and its head learns from all shown items. The policy
learns from the clicked ones (`actions="shown"`: from all), each credited with the discounted return of its turn
(`credit="item"`: with its own reward and the discounted return of the next turn). Padding counts for nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from gemsjax.agents.base import Acting, Agent, Choice, Policy
from gemsjax.agents.logged import Actions, LoggedEpisodes, actions, from_episodes
from gemsjax.belief import Belief, make_cfn
from gemsjax.errors import require, require_choice, require_count
from gemsjax.maths import off_policy
from gemsjax.maths.off_policy import Correction, Weights, masked_mean
from gemsjax.maths.optimise import adam_init, adam_step
from gemsjax.maths.randomness import whole_number
from gemsjax.maths.returns import return_to_go
from gemsjax.types import Array, Dims, Episode, Key, Metrics, Observation, Params

_CHOICES = {
    "correction": off_policy.CORRECTIONS,
    "reduction": off_policy.REDUCTIONS,
    "actions": ("clicked", "shown"),
    "credit": ("turn", "item"),
    "behaviour": ("estimated", "logged"),
    "baseline": ("none", "turn"),
    "action_source": ("logged", "pi", "beta"),
}


@dataclasses.dataclass(frozen=True)
class TopKSpec:
    """Static choices: changing one makes another program.

    Attributes:
      correction: `none`, `first_order` or `topk`.
      set_size: K of lambda_K; 0 is the size of the slate.
      normalise: weights add up to one over a batch (normalised importance sampling).
      reduction: of the loss over a batch's actions: `mean` or `sum`.
      actions: shown items that the policy learns from: `clicked` or `shown` (all).
      credit: of an action: its `turn`'s return, or the `item`'s own reward and the return of the next turn.
      behaviour: probabilities of the logging policy are `estimated` or those `logged` with the data.
      baseline: subtracted from the credit: `none`, or the mean credit in the batch at the same `turn`.
      action_source: items whose probabilities count: the `logged` ones; `pi` and `beta` draw them from a head, as the
        published RecNN code does, and are here for comparison only.
      negatives: items that estimate the softmax's sum over a large catalogue; 0 sums over all of it.
      entropy, kl: whether the loss has a bonus for entropy, a penalty KL(old policy || policy).
      certain: K' of the explored slate: its most probable items, the others are drawn. At most the slate's size.
      top_m: explored slates hold items out of the M most probable (all, if the catalogue has fewer).
      belief_width, item_dim: widths of the recurrent state and of its item embeddings.
    """

    correction: str = "topk"
    set_size: int = 0
    normalise: bool = False
    reduction: str = "mean"
    actions: str = "clicked"
    credit: str = "turn"
    behaviour: str = "estimated"
    baseline: str = "none"
    action_source: str = "logged"
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
      old_share: share of the policy that enters the old one after every update.
    """

    gamma: float = 0.8
    cap: float = off_policy.DEFAULT_CAP
    temperature: float = 1.0
    rate: float = 3e-3
    behaviour_rate: float = 3e-3
    entropy_weight: float = 0.01
    kl_weight: float = 0.1
    old_share: float = 0.02


def validate_spec(spec: TopKSpec) -> None:
    """Raise `SettingError` for an unknown choice, a width below 1, or choices that exclude each other."""
    for name, accepted in _CHOICES.items():
        require_choice(name, getattr(spec, name), accepted)
    for name in ("belief_width", "item_dim", "top_m"):
        require_count(name, getattr(spec, name))
    for name in ("set_size", "negatives", "certain"):
        require_count(name, getattr(spec, name), 0)
    whole = spec.negatives == 0
    require(whole or not (spec.entropy or spec.kl), "negatives", spec.negatives, "0, with entropy or kl")
    require(whole or spec.action_source == "logged", "negatives", spec.negatives, "0, to draw actions from a head")
    known = spec.behaviour == "estimated" or spec.action_source == "logged"
    require(known, "action_source", spec.action_source, "'logged', with the probabilities that were logged")


def validate_hypers(hypers: TopKHypers) -> None:
    """Raise `SettingError` for a hyper-parameter outside its range (host-side numbers only)."""
    for name, value in vars(hypers).items():
        require(math.isfinite(value) and value >= 0.0, name, value, "a finite number of at least 0")
    for name in ("gamma", "old_share"):
        require(getattr(hypers, name) <= 1.0, name, getattr(hypers, name), "a number in [0, 1]")
    for name in ("rate", "behaviour_rate"):
        require(getattr(hypers, name) < 1.0, name, getattr(hypers, name), "a number in [0, 1)")
    for name in ("cap", "temperature"):
        require(getattr(hypers, name) > 0.0, name, getattr(hypers, name), "a positive number")


@struct.dataclass
class TopKParams:
    """One field for each part that is updated on its own (or Adam's moments of it).

    Attributes:
      belief: of the recurrent state.
      policy: [I, d] the v_a, apart from the embeddings u_a that the belief reads.
      behaviour: [I, d+1] the same of the behaviour head, with a bias in the last column.
    """

    belief: Any
    policy: Any
    behaviour: Any


@struct.dataclass
class TopKState:
    """Everything that an update changes; `old` holds belief and policy of the old policy, () without `spec.kl`."""

    params: TopKParams
    optimiser: TopKParams
    old: Any


@struct.dataclass
class TopKNoise:
    """Of one update: `negatives` [n] item numbers, `uniforms` [H, B, K] that choose actions; () where not needed."""

    negatives: Any
    uniforms: Any


class Inspection(NamedTuple):
    """What the correction does to a batch, time-major [H, B, K] each: for histograms and to judge the estimate.

    Attributes:
      log_pi, log_beta: log-probabilities of the shown items, `log_beta` by the head.
      weights: ratios before capping (of the head, or of what was logged) and top-K factors.
      mask: which of them the policy learns from.
      taken: which hold an item.
    """

    log_pi: Array
    log_beta: Array
    weights: Weights
    mask: Array
    taken: Array


class Learner(NamedTuple):
    """The agent, and `inspect`: `(acting, logged episodes [B]) -> Inspection`."""

    agent: Agent
    inspect: Callable[[Acting, LoggedEpisodes], Inspection]


def make_topk_reinforce(spec: TopKSpec, dims: Dims, _means: None = None) -> Agent:
    """The method `reinforce-topk`.

    Raises:
      SettingError: see `validate_spec`; a slate that `certain` or `top_m` does not fit.
    """
    return make_topk_learner(spec, dims).agent


def make_topk_learner(spec: TopKSpec, dims: Dims) -> Learner:
    """The same with `inspect`. Raises as `make_topk_reinforce`."""
    validate_spec(spec)
    require_count("certain", spec.certain, 0, dims.slate_size)
    pool = min(spec.top_m, dims.num_items)
    require(pool >= dims.slate_size, "top_m", spec.top_m, f"enough to fill a slate of {dims.slate_size}")
    learner = _Learner(spec, dims, make_cfn(dims, spec.belief_width, spec.item_dim))

    def explore(acting: Acting, memory: Array, seen: Observation, _: None, uniforms: Array) -> tuple[Choice, Array]:
        memory, logits = learner.look(acting, memory, seen)
        slate = off_policy.boltzmann_slate(logits, uniforms, dims.slate_size, spec.certain)
        anything = whole_number(uniforms[: dims.slate_size], dims.num_items)
        slate = jnp.where(acting.at_random, anything, slate)
        return Choice(slate, slate), memory

    def greedy(acting: Acting, memory: Array, seen: Observation, _: None, _uniforms: Array) -> tuple[Choice, Array]:
        memory, logits = learner.look(acting, memory, seen)
        slate = off_policy.boltzmann_slate(logits, _uniforms, dims.slate_size, dims.slate_size)
        return Choice(slate, slate), memory

    agent = Agent(
        init=learner.init,
        explore=Policy(learner.belief.start, explore, draws=pool),
        greedy=Policy(learner.belief.start, greedy),
        draw_update=learner.draw_update,
        update=learner.update,
    )
    return Learner(agent, learner.inspect)


@dataclasses.dataclass(frozen=True)
class _Learner:
    """The learner with its sizes bound."""

    spec: TopKSpec
    dims: Dims
    belief: Belief

    @property
    def correction(self) -> Correction:
        spec = self.spec
        size = spec.set_size or self.dims.slate_size
        return Correction(spec.correction, size, None, spec.normalise, spec.reduction)

    def init(self, key: Key, hypers: TopKHypers) -> TopKState:
        belief_key, policy_key, behaviour_key = jax.random.split(key, 3)
        width, items = self.belief.width, self.dims.num_items
        bound = width**-0.5
        behaviour = jax.random.uniform(behaviour_key, (items, width), minval=-bound, maxval=bound)
        params = TopKParams(
            belief=self.belief.init(belief_key),
            policy=jax.random.uniform(policy_key, (items, width), minval=-bound, maxval=bound),
            behaviour=jnp.pad(behaviour, ((0, 0), (0, 1))),
        )
        old = jax.tree.map(jnp.copy, (params.belief, params.policy)) if self.spec.kl else ()
        return TopKState(params, TopKParams(**{part: adam_init(value) for part, value in vars(params).items()}), old)

    def look(self, acting: Acting, memory: Array, seen: Observation) -> tuple[Array, Array]:
        """One user's next state [d] and the policy's logits [I]."""
        params = acting.state.params
        memory = self.belief.step(params.belief, memory, seen)
        return memory, params.policy @ memory / acting.hypers.temperature

    def draw_update(self, key: Key, batch: int) -> TopKNoise:
        spec, dims = self.spec, self.dims
        negatives = jax.random.randint(key, (spec.negatives,), 0, dims.num_items) if spec.negatives else ()
        shape = (dims.horizon, batch, dims.slate_size)
        return TopKNoise(negatives, jax.random.uniform(key, shape) if spec.action_source != "logged" else ())

    def update(self, acting: Acting, batch: Episode | LoggedEpisodes, noise: TopKNoise) -> tuple[TopKState, Metrics]:
        """One step of Adam on the joint loss of a batch of episodes [B], an agent's own or logged."""
        state, hypers, taken = acting.state, acting.hypers, _as_actions(batch)
        loss = lambda params: self.loss(params, state.old, hypers, taken, noise)  # noqa: E731
        gradients, metrics = jax.grad(loss, has_aux=True)(state.params)
        rates = {"belief": hypers.rate, "policy": hypers.rate, "behaviour": hypers.behaviour_rate}
        stepped = {
            part: adam_step(getattr(state.params, part), getattr(gradients, part), getattr(state.optimiser, part), rate)
            for part, rate in rates.items()
        }
        params, optimiser = (TopKParams(**{part: pair[i] for part, pair in stepped.items()}) for i in range(2))
        old = state.old
        if self.spec.kl:
            mix = lambda old, new: old + hypers.old_share * (new - old)  # noqa: E731
            old = jax.tree.map(mix, old, (params.belief, params.policy))
        return TopKState(params, optimiser, old), metrics

    def loss(
        self, params: TopKParams, old: Any, hypers: TopKHypers, batch: Actions, noise: TopKNoise
    ) -> tuple[Array, Metrics]:
        """Policy loss + behaviour loss (+ entropy, + KL), and what to report of them."""
        states = self.belief.unroll((params.belief,), batch.seen)[0]
        queries, frozen = states / hypers.temperature, _with_bias(jax.lax.stop_gradient(states))
        logits = None if self.spec.negatives else queries @ params.policy.T
        items = self._items(batch, logits, frozen, params.behaviour, noise)
        log_pi = self._log_probs(queries, params.policy, items, logits, noise)
        log_shown = self._log_probs(frozen, params.behaviour, jnp.maximum(batch.items, 0), None, noise)
        log_beta = self._log_beta(batch, log_shown, frozen, params.behaviour, items, noise)
        mask, correction = self._mask(batch), self.correction._replace(cap=hypers.cap)
        found = off_policy.weights(log_pi, log_beta, mask, correction)
        advantage = self._advantage(batch, mask, hypers.gamma)
        policy = off_policy.policy_loss(log_pi, advantage, mask, found, correction)
        behaviour = -masked_mean(log_shown, batch.taken)
        metrics = {"policy_loss": policy, "behaviour_loss": behaviour} | _about(log_pi, log_beta, found, mask, hypers)
        extra, more = self._penalties(logits, old, hypers, batch)
        return policy + behaviour + extra, metrics | more

    def inspect(self, acting: Acting, logged: LoggedEpisodes) -> Inspection:
        """See `Inspection`; over the whole catalogue."""
        params, hypers, batch = acting.state.params, acting.hypers, actions(logged)
        states, items = self.belief.unroll((params.belief,), batch.seen)[0], jnp.maximum(batch.items, 0)
        log_pi = self._log_probs(states / hypers.temperature, params.policy, items)
        head = self._log_probs(_with_bias(states), params.behaviour, items)
        log_beta = head if self.spec.behaviour == "estimated" else _logged_log_probs(batch)
        mask = self._mask(batch)
        found = off_policy.weights(log_pi, log_beta, mask, self.correction._replace(normalise=False))
        return Inspection(log_pi, head, found, mask, batch.taken)

    def _log_probs(
        self, queries: Array, table: Array, items: Array, logits: Array | None = None, noise: TopKNoise | None = None
    ) -> Array:
        if noise is not None and self.spec.negatives:
            return off_policy.sampled_log_probs(queries, table, items, noise.negatives)
        normaliser = jax.nn.logsumexp(queries @ table.T if logits is None else logits, axis=-1)
        return off_policy.item_log_probs(queries, table, items, normaliser)

    def _items(self, batch: Actions, logits: Array | None, frozen: Array, behaviour: Params, noise: TopKNoise) -> Array:
        """Items [H, B, K] whose probabilities count: those shown, or draws of a head."""
        if self.spec.action_source == "logged":
            return jnp.maximum(batch.items, 0)
        drawn_from = frozen @ behaviour.T if logits is None or self.spec.action_source == "beta" else logits
        drawn_from = jax.lax.stop_gradient(drawn_from)
        below = jnp.cumsum(jax.nn.softmax(drawn_from, axis=-1), axis=-1)
        return (noise.uniforms[..., None] > below[..., None, :-1]).sum(axis=-1, dtype=jnp.int32)

    def _log_beta(
        self, batch: Actions, log_shown: Array, frozen: Array, behaviour: Params, items: Array, noise: TopKNoise
    ) -> Array:
        if self.spec.behaviour == "logged":
            return _logged_log_probs(batch)
        if self.spec.action_source == "logged":
            return log_shown
        return self._log_probs(frozen, behaviour, items, None, noise)

    def _mask(self, batch: Actions) -> Array:
        return batch.taken * batch.clicks if self.spec.actions == "clicked" else batch.taken

    def _advantage(self, batch: Actions, mask: Array, gamma: Array | float) -> Array:
        """Credit less baseline of every shown item: [H, B, K]."""
        returns = return_to_go(batch.reward, gamma)[..., None]
        if self.spec.credit == "item":
            later = jnp.concatenate([returns[1:], jnp.zeros_like(returns[:1])])
            returns = batch.item_reward + gamma * later
        returns = jnp.broadcast_to(returns, mask.shape)
        if self.spec.baseline == "none":
            return returns
        counted = mask.sum(axis=(1, 2), keepdims=True)
        return returns - (returns * mask).sum(axis=(1, 2), keepdims=True) / jnp.maximum(counted, 1e-8)

    def _penalties(self, logits: Array | None, old: Any, hypers: TopKHypers, batch: Actions) -> tuple[Array, Metrics]:
        """Entropy bonus and KL penalty, means over the turns that hold an item."""
        total, metrics, turns = jnp.float32(0.0), {}, batch.taken.max(axis=-1)
        if self.spec.entropy and logits is not None:
            metrics["entropy"] = masked_mean(off_policy.entropy_and_log_normaliser(logits)[0], turns)
            total = total - hypers.entropy_weight * metrics["entropy"]
        if self.spec.kl and logits is not None:
            states = self.belief.unroll((old[0],), batch.seen)[0]
            before = jax.lax.stop_gradient(states / hypers.temperature @ old[1].T)
            metrics["kl"] = masked_mean(off_policy.kl_divergence(before, logits), turns)
            total = total + hypers.kl_weight * metrics["kl"]
        return total, metrics


def _as_actions(batch: Episode | LoggedEpisodes) -> Actions:
    return actions(from_episodes(batch) if isinstance(batch, Episode) else batch)


def _with_bias(states: Array) -> Array:
    return jnp.concatenate([states, jnp.ones_like(states[..., :1])], axis=-1)


def _logged_log_probs(batch: Actions) -> Array:
    known = not isinstance(batch.propensity, tuple)
    require(known, "behaviour", "logged", "'estimated': these episodes hold no propensities")
    return jnp.log(jnp.where(batch.taken > 0.0, batch.propensity, 1.0))


def _about(log_pi: Array, log_beta: Array, found: Weights, mask: Array, hypers: TopKHypers) -> Metrics:
    """What to watch: mean weights, the share that is cut off, and how many of the actions count in effect."""
    log_pi, log_beta = jax.lax.stop_gradient((log_pi, log_beta))
    ratio = off_policy.importance_ratio(log_pi, log_beta, hypers.cap)
    capped = (ratio >= 0.999 * hypers.cap).astype(jnp.float32)
    squares = jnp.square(masked_mean(ratio, mask)) / jnp.maximum(masked_mean(jnp.square(ratio), mask), 1e-30)
    return {
        "ratio": masked_mean(ratio, mask),
        "capped": masked_mean(capped, mask),
        "effective_share": squares,
        "lambda": masked_mean(found.top_k, mask),
        "log_pi": masked_mean(log_pi, mask),
    }
