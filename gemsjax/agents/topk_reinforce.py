"""REINFORCE with off-policy and top-K correction over items (Chen et al., 2019), from logs or from replayed episodes.

A recurrent state s (chaos-free cell), a policy pi(a|s) = softmax(s . v_a / T) over the catalogue, and a behaviour head
beta(a|s) that estimates who collected the data from the same state without touching it. `make_topk_reinforce` gives
the online `Agent`; its `update` also takes `LoggedEpisodes`, which is how `offline/` trains it.

Which action a logged turn is: a slate is K draws of one distribution over items, so every shown item is an action,
beta(a|s) is the mean over slots of the chance that a slot shows a, and its head learns from all shown items. The policy
learns from the clicked ones (`actions="shown"`: from all), each credited with the discounted return of its turn
(`credit="item"`: with its own reward and the discounted return of the next turn). Padding counts for nothing, nor does
what `agents.logged.actions` takes out: items that there are not, rewards and propensities that are no numbers.
Settings: `topk_settings`; rewards from a critic instead of the log: `topk_critic`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemsjax.agents.actor_critic import follow
from gemsjax.agents.base import Acting, Agent, Choice, Policy
from gemsjax.agents.logged import Actions, LoggedEpisodes, actions, from_episodes
from gemsjax.agents.topk_critic import RewardCritic, Targets
from gemsjax.agents.topk_settings import TopKHypers, TopKSpec, validate_hypers, validate_spec
from gemsjax.agents.topk_state import TopKNoise, TopKParams, TopKState, gathered, new_window, parts
from gemsjax.belief import Belief, make_cfn
from gemsjax.errors import require, require_count
from gemsjax.maths import off_policy
from gemsjax.maths.off_policy import Correction, Weights, masked_mean
from gemsjax.maths.optimise import adam_init, adam_step
from gemsjax.maths.randomness import whole_number
from gemsjax.maths.returns import return_to_go
from gemsjax.nets.mlp import Critic
from gemsjax.types import Array, Dims, Episode, Key, Metrics, Observation, Params

__all__ = [
    "Inspection",
    "Learner",
    "TopKHypers",
    "TopKSpec",
    "make_topk_learner",
    "make_topk_reinforce",
    "validate_hypers",
    "validate_spec",
]


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
    critic = RewardCritic(Critic(spec.critic_hidden), spec.critic, dims.num_items, dims.slate_size)
    learner = _Learner(spec, dims, make_cfn(dims, spec.belief_width, spec.item_dim), critic)

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
    critic: RewardCritic

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
        judges = self.spec.critic != "none"
        params = TopKParams(
            belief=self.belief.init(belief_key),
            policy=jax.random.uniform(policy_key, (items, width), minval=-bound, maxval=bound),
            behaviour=jnp.pad(behaviour, ((0, 0), (0, 1))),
            critic=self.critic.init(jax.random.fold_in(key, 0), width) if judges else (),
        )
        moments = {
            part: adam_init(value) if judges or part != "critic" else () for part, value in parts(params).items()
        }
        actor = params.belief, params.policy
        copy = lambda tree: jax.tree.map(jnp.copy, tree)  # noqa: E731
        return TopKState(
            params,
            TopKParams(**moments),
            old=copy(actor) if self.spec.kl else (),
            targets=Targets(*copy((*actor, params.critic))) if judges else (),
            window=new_window(actor) if self.spec.policy_step > 1 else (),
            weight_sum=jnp.float32(0.0) if self.spec.running else (),
        )

    def look(self, acting: Acting, memory: Array, seen: Observation) -> tuple[Array, Array]:
        """One user's next state [d] and the policy's logits [I]."""
        params = acting.state.params
        memory = self.belief.step(params.belief, memory, seen)
        return memory, params.policy @ memory / acting.hypers.temperature

    def draw_update(self, key: Key, batch: int) -> TopKNoise:
        spec, dims = self.spec, self.dims
        negatives = jax.random.randint(key, (spec.negatives,), 0, dims.num_items) if spec.negatives else ()
        shape = (2, dims.horizon, batch, dims.slate_size)
        return TopKNoise(negatives, jax.random.uniform(key, shape) if spec.action_source != "logged" else ())

    def update(self, acting: Acting, batch: Episode | LoggedEpisodes, noise: TopKNoise) -> tuple[TopKState, Metrics]:
        """One step of Adam on the joint loss of a batch of episodes [B], an agent's own or logged."""
        state, hypers, taken = acting.state, acting.hypers, self._actions(batch)
        loss = lambda params: self.loss(params, state, hypers, taken, noise)  # noqa: E731
        gradients, (metrics, weight_sum) = jax.grad(loss, has_aux=True)(state.params)
        step, mean = self.spec.policy_step, self.spec.reduction == "mean"
        due, actor, window = gathered(state.window, (gradients.belief, gradients.policy), step, mean)
        gradients = dataclasses.replace(gradients, belief=actor[0], policy=actor[1])
        rates = {"belief": hypers.rate, "policy": hypers.rate, "behaviour": hypers.behaviour_rate}
        rates |= {} if self.spec.critic == "none" else {"critic": hypers.critic_rate}
        params, moments = dict(parts(state.params)), dict(parts(state.optimiser))
        for part, rate in rates.items():
            before = params[part], moments[part]
            after = adam_step(before[0], getattr(gradients, part), before[1], rate)
            if step > 1 and part in ("belief", "policy"):
                after = jax.tree.map(lambda new, old: jnp.where(due, new, old), after, before)
            params[part], moments[part] = after
        actor, (old, targets) = (params["belief"], params["policy"]), (state.old, state.targets)
        if self.spec.kl:
            old = follow(old, actor, hypers.old_share * due)
        if self.spec.critic != "none":
            targets = follow(targets, Targets(*actor, params["critic"]), hypers.target_share * due)
        return TopKState(TopKParams(**params), TopKParams(**moments), old, targets, window, weight_sum), metrics

    def loss(
        self, params: TopKParams, state: TopKState, hypers: TopKHypers, batch: Actions, noise: TopKNoise
    ) -> tuple[Array, tuple[Metrics, Any]]:
        """Policy loss + behaviour loss (+ critic, entropy, KL); what to report, and the running sum of weights.

        Of `state` only what an update does not differentiate is used.
        """
        states = self.belief.unroll((params.belief,), batch.seen)[0]
        queries, frozen = states / hypers.temperature, _with_bias(jax.lax.stop_gradient(states))
        logits = None if self.spec.negatives else queries @ params.policy.T
        items, heads = self._items(batch, logits, frozen, params.behaviour, noise)
        log_pi = self._log_probs(queries, params.policy, items, logits, noise)
        log_shown = self._log_probs(frozen, params.behaviour, jnp.maximum(batch.items, 0), None, noise)
        log_beta = self._log_beta(batch, log_shown, frozen, params.behaviour, heads, noise)
        mask, correction = self._mask(batch), self.correction._replace(cap=hypers.cap)
        found = off_policy.weights(log_pi, log_beta, mask, correction)
        judged, critic, more = self._judged(params, state, hypers, batch, (states, logits, items))
        advantage = self._advantage(judged, mask, hypers.gamma)
        divisor, weight_sum = None, state.weight_sum
        if self.spec.running:
            weight_sum = divisor = off_policy.running_sum(weight_sum, (found.ratio * found.top_k * mask).sum())
        policy = off_policy.policy_loss(log_pi, advantage, mask, found, correction, divisor)
        behaviour = -masked_mean(log_shown, batch.taken)
        metrics = {"policy_loss": policy, "behaviour_loss": behaviour} | _about(log_pi, log_beta, found, mask, hypers)
        extra, terms = self._penalties(logits, state.old, hypers, batch)
        return policy + behaviour + critic + extra, (metrics | more | terms, weight_sum)

    def _judged(
        self, params: TopKParams, state: TopKState, hypers: TopKHypers, batch: Actions, policy: tuple
    ) -> tuple[Actions, Array | float, Metrics]:
        """The batch with the critic's rewards instead of the log's, and the critic's loss; as it is without one.

        `policy`: states [H, B, d], logits [H, B, I] and the items [H, B, K] whose probabilities count.
        """
        if self.spec.critic == "none":
            return batch, 0.0, {}
        states, logits, items = policy
        queries = self.belief.unroll((state.targets.belief,), batch.seen)[0]
        later = queries, queries / hypers.temperature @ state.targets.policy.T
        loss = self.critic.loss(params.critic, state.targets, states, later, batch, hypers)
        reward = self.critic.rewards(params.critic, states, logits, items, batch.taken)
        told = {"critic_loss": loss, "critic_reward": masked_mean(reward, batch.taken.max(axis=-1))}
        return batch._replace(reward=reward), loss, told

    def inspect(self, acting: Acting, logged: LoggedEpisodes) -> Inspection:
        """See `Inspection`; over the whole catalogue."""
        params, hypers, batch = acting.state.params, acting.hypers, self._actions(logged)
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

    def _actions(self, batch: Episode | LoggedEpisodes) -> Actions:
        logged = from_episodes(batch) if isinstance(batch, Episode) else batch
        return actions(logged, self.dims.num_items)

    def _items(
        self, batch: Actions, logits: Array | None, frozen: Array, behaviour: Params, noise: TopKNoise
    ) -> tuple[Array, Array]:
        """Items [H, B, K] whose probabilities count, of the policy and of the head: those shown, or draws."""
        source = self.spec.action_source
        if source == "logged" or logits is None:
            return (jnp.maximum(batch.items, 0),) * 2
        policy, head = (
            _drawn(of, uniforms) for of, uniforms in zip((logits, frozen @ behaviour.T), noise.uniforms, strict=True)
        )
        return {"pi": (policy, policy), "beta": (head, head), "each": (policy, head)}[source]

    def _log_beta(
        self, batch: Actions, log_shown: Array, frozen: Array, behaviour: Params, items: Array, noise: TopKNoise
    ) -> Array:
        if self.spec.behaviour == "logged":
            return _logged_log_probs(batch)
        if self.spec.action_source == "logged":
            return log_shown
        return self._log_probs(frozen, behaviour, items, None, noise)

    def _mask(self, batch: Actions) -> Array:
        mask = batch.taken * batch.clicks if self.spec.actions == "clicked" else batch.taken
        return mask * (batch.propensity > 0.0) if self.spec.behaviour == "logged" and _known(batch) else mask

    def _advantage(self, batch: Actions, mask: Array, gamma: Array | float) -> Array:
        """Credit less baseline of every shown item: [H, B, K]."""
        returns = return_to_go(batch.reward, gamma)[..., None]
        if self.spec.credit == "item":
            later = jnp.concatenate([returns[1:], jnp.zeros_like(returns[:1])])
            returns = batch.item_reward + gamma * later
        returns = jnp.broadcast_to(returns, mask.shape)
        if self.spec.baseline == "none":
            return returns
        if self.spec.baseline == "standardised":
            return off_policy.masked_standardised(returns, mask)
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


def _drawn(logits: Array, uniforms: Array) -> Array:
    """Items drawn from the softmax of logits [H, B, I] by uniform numbers [H, B, K]; constants."""
    below = jnp.cumsum(jax.nn.softmax(jax.lax.stop_gradient(logits), axis=-1), axis=-1)
    return (uniforms[..., None] > below[..., None, :-1]).sum(axis=-1, dtype=jnp.int32)


def _with_bias(states: Array) -> Array:
    return jnp.concatenate([states, jnp.ones_like(states[..., :1])], axis=-1)


def _known(batch: Actions) -> bool:
    return not isinstance(batch.propensity, tuple)


def _logged_log_probs(batch: Actions) -> Array:
    require(_known(batch), "behaviour", "logged", "'estimated': these episodes hold no propensities")
    return jnp.log(jnp.where(batch.propensity > 0.0, batch.propensity, 1.0))


def _about(log_pi: Array, log_beta: Array, found: Weights, mask: Array, hypers: TopKHypers) -> Metrics:
    """What to watch: mean weights, the share that is cut off, and how many of the actions count in effect."""
    log_pi, log_beta = jax.lax.stop_gradient((log_pi, log_beta))
    ratio = off_policy.importance_ratio(log_pi, log_beta, hypers.cap)
    capped = (ratio >= 0.999 * hypers.cap).astype(jnp.float32)
    return {
        "ratio": masked_mean(ratio, mask),
        "capped": masked_mean(capped, mask),
        "effective_share": off_policy.effective_share(ratio, mask),
        "lambda": masked_mean(found.top_k, mask),
        "log_pi": masked_mean(log_pi, mask),
    }
