"""SlateQ where each turn brings candidates of its own (Ie et al. 2019): one Q network for all, transition replay.

`make_candidate_slateq(spec, dims, model)` gives an `Agent` that learns from `Transition`s. A user chooses at most one
item, so Q(s, A) = sum over A of P(i | s, A) Q(s, i), and clicking nothing is worth nothing. Only turns with exactly one
click teach, and they teach the Q of what was clicked: reward + gamma V(s'), with no future after a session's end. V is
the value, by the target network at the NEXT state, of the slate that was shown next (`sarsa`) or of the best one by
`topk`, `greedy` or `exact` (`maths.slate_optimisers`). `full_slateq` learns a Q for every slate instead; `recsim` names
the variants. How users choose is known (`model`); `acting.weights` are the simulator's parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gemsjax.agents.base import Acting, Agent, Choice, Policy
from gemsjax.agents.checks import check_hypers
from gemsjax.agents.click_model import ChoiceModel
from gemsjax.agents.exploration import linear_epsilon
from gemsjax.errors import require, require_choice, require_count
from gemsjax.maths.optimise import OPTIMISERS as RULES
from gemsjax.maths.slate_optimisers import OPTIMISERS
from gemsjax.maths.slates import top_items
from gemsjax.nets.mlp import MLP
from gemsjax.types import Array, CandidateDims, CandidateObservation, Key, Metrics, Params, Transition

TARGETS = (*OPTIMISERS, "sarsa")


@dataclasses.dataclass(frozen=True)
class CandidateSpec:
    """Static choices: changing one makes another program.

    Attributes:
      hidden: widths of the network's hidden layers.
      serving: how a slate is put together for acting: `topk`, `greedy` or `exact`.
      target: the same for the next slate of a target, or `sarsa`: the slate that was shown next.
      optimiser: `rmsprop` (centred), `adam` or `sgd`.
    """

    hidden: tuple[int, ...] = (256, 32)
    serving: str = "topk"
    target: str = "sarsa"
    optimiser: str = "rmsprop"


@struct.dataclass
class CandidateHypers:
    """Numbers that may differ between runs of one program. The defaults are RecSim's, for four users a step.

    Attributes:
      gamma: discount per turn; 0 makes a myopic agent.
      rate: learning rate.
      first_epsilon, last_epsilon: chance of a random slate at step 0 and from step `epsilon_steps` on.
      test_epsilon: chance of a random slate of the policy that is evaluated.
      epsilon_steps: training steps in which it falls, along a line.
      target_period: updates between two copies of the network into the target network.
    """

    gamma: float = 0.99
    rate: float = 2.5e-4
    first_epsilon: float = 1.0
    last_epsilon: float = 0.01
    test_epsilon: float = 0.001
    epsilon_steps: float = 62_500.0
    target_period: float = 2_000.0


@struct.dataclass
class QState:
    """Everything that an update changes: the network, its target, the optimiser's moments, [] int32 updates so far."""

    params: Params
    target: Params
    optimiser: Any
    updates: Array


def validate_spec(spec: CandidateSpec) -> None:
    """Raise `SettingError` for a width below 1 or an unknown choice."""
    for width in spec.hidden:
        require_count("hidden", width)
    require_choice("serving", spec.serving, OPTIMISERS)
    require_choice("target", spec.target, TARGETS)
    require_choice("optimiser", spec.optimiser, RULES)


def validate_hypers(hypers: CandidateHypers) -> None:
    """Raise `SettingError` for a hyper-parameter outside its range (host-side numbers only)."""
    shares = ("gamma", "first_epsilon", "last_epsilon", "test_epsilon")
    check_hypers(hypers, rates=("rate",), shares=shares, positive=("epsilon_steps",))
    require(hypers.target_period >= 1.0, "target_period", hypers.target_period, "a number of at least 1")


def make_candidate_slateq(spec: CandidateSpec, dims: CandidateDims, model: ChoiceModel) -> Agent:
    """SlateQ over candidates, which knows how users choose.

    Raises:
      SettingError: see `validate_spec`; a slate larger than the candidates.
    """
    validate_spec(spec)
    require_count("slate_size", dims.slate_size, 1, dims.candidates)
    who = _Learner(spec, dims, model)
    remember = model.remember if model.privileged else None
    return q_agent(spec, dims, remember, who.network, dims.user + dims.doc, who.best, who.loss)


def q_agent(
    spec: CandidateSpec,
    dims: CandidateDims,
    remember: Callable[[Any], Any] | None,
    network: MLP,
    inputs: int,
    best: Callable[[Acting, CandidateObservation, Any], Array],
    loss: Callable[[Params, Acting, Transition], tuple[Array, Metrics]],
) -> Agent:
    """An agent with a Q network and its target, epsilon-greedy around `best`, that descends `loss`.

    Args:
      remember: what it needs to know of the simulator's user, which makes it privileged; None: nothing.
      network, inputs: of [inputs] numbers.
      best: `(acting, observation, remembered) -> slate [K]` of the largest value.
      loss: `(parameters, acting, transitions [B]) -> (loss, metrics)`.
    """
    rule = RULES[spec.optimiser]

    def init(key: Key, _hypers: CandidateHypers) -> QState:
        params = network.init(key, jnp.zeros(inputs))["params"]
        # An array of its own: a donated state may not hold one buffer twice.
        return QState(params, jax.tree.map(jnp.copy, params), rule.init(params), jnp.int32(0))

    def act(acting: Acting, seen: CandidateObservation, hidden: Any, uniforms: Array, epsilon: Array) -> Choice:
        memory = () if remember is None else remember(hidden[0])
        anything = top_items(jnp.where(seen.available, uniforms[:-1], -1.0), dims.slate_size)
        slate = jnp.where(uniforms[-1] < epsilon, anything, best(acting, seen, memory))
        return Choice(slate, slate)

    def explore(acting: Acting, memory: Any, seen: Any, hidden: Any, uniforms: Array) -> tuple[Choice, Any]:
        epsilon = jnp.where(acting.at_random, 1.0, linear_epsilon(acting))
        return act(acting, seen, hidden, uniforms, epsilon), memory

    def greedy(acting: Acting, memory: Any, seen: Any, hidden: Any, uniforms: Array) -> tuple[Choice, Any]:
        hypers: Any = acting.hypers
        return act(acting, seen, hidden, uniforms, hypers.test_epsilon), memory

    def update(acting: Acting, batch: Transition, _noise: tuple) -> tuple[QState, Metrics]:
        state, hypers = acting.state, acting.hypers
        (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, acting, batch)
        params, moments = rule.step(state.params, gradients, state.optimiser, hypers.rate)
        updates = state.updates + 1
        copies = updates % jnp.asarray(hypers.target_period, jnp.int32) == 0
        target = jax.tree.map(lambda old, new: jnp.where(copies, new, old), state.target, params)
        return QState(params, target, moments, updates), {"loss": value, **metrics, "epsilon": linear_epsilon(acting)}

    draws, privileged = dims.candidates + 1, remember is not None
    return Agent(
        init=init,
        explore=Policy(lambda: (), explore, draws, privileged, remember=remember),
        greedy=Policy(lambda: (), greedy, draws, privileged),
        draw_update=lambda _key, _batch: (),
        update=update,
    )


def decomposed_value(q: Array, slate: Array, chances: Array) -> Array:
    """Sum over a slate of P(i | s, A) Q(s, i): q [C], slate [K], chances [K] -> []; places without a chance count 0."""
    inside = jnp.clip(slate, 0, q.shape[0] - 1)
    return jnp.where(chances > 0.0, chances * q[inside], 0.0).sum()


def mean_square(error: Array, counts: Array) -> Array:
    """Mean of the squares that count, 0 if none does: [B], [B] bool -> []."""
    return jnp.where(counts, jnp.square(jnp.where(counts, error, 0.0)), 0.0).sum() / jnp.maximum(counts.sum(), 1)


@dataclasses.dataclass(frozen=True)
class _Learner:
    """The functions of SlateQ with their sizes bound."""

    spec: CandidateSpec
    dims: CandidateDims
    model: ChoiceModel

    @property
    def network(self) -> MLP:
        return MLP((*self.spec.hidden, 1))

    def q(self, params: Params, user: Array, docs: Array) -> Array:
        """Q of candidates: [F], [n, G] -> [n]."""
        users = jnp.broadcast_to(user, (docs.shape[0], user.shape[0]))
        return self.network.apply({"params": params}, jnp.concatenate([users, docs], axis=1))[:, 0]

    def best(self, acting: Acting, seen: CandidateObservation, memory: Any) -> Array:
        candidates = self.model.candidates(acting.weights, seen, memory)
        q = self.q(acting.state.params, seen.user, seen.docs)
        return OPTIMISERS[self.spec.serving](candidates, q, self.dims.slate_size)

    def value(self, acting: Acting, seen: CandidateObservation, memory: Any, shown: Array) -> Array:
        """V of one state by the target network; `shown` [K] is what was shown there."""
        q = self.q(acting.state.target, seen.user, seen.docs)
        return self.value_of(acting.weights, seen, memory, q, shown)

    def value_of(self, weights: Any, seen: CandidateObservation, memory: Any, q: Array, shown: Array) -> Array:
        """The same for given Q [C]."""
        candidates = self.model.candidates(weights, seen, memory)
        slate = shown
        if self.spec.target != "sarsa":
            slate = OPTIMISERS[self.spec.target](candidates, q, self.dims.slate_size)
        return decomposed_value(q, slate, self.model.chances(weights, candidates, slate))

    def loss(self, params: Params, acting: Acting, batch: Transition) -> tuple[Array, Metrics]:
        """Mean squared error of the Q of clicked items, over turns with exactly one click."""
        hypers: Any = acting.hypers
        values = jax.vmap(lambda *turn: self.value(acting, *turn))(batch.next_seen, batch.next_hidden, batch.next_slate)
        target = batch.reward + hypers.gamma * jnp.where(batch.terminated, 0.0, values)
        clicked = jnp.take_along_axis(batch.slate, jnp.argmax(batch.clicks, axis=1)[:, None], axis=1)[:, 0]
        inside = (clicked >= 0) & (clicked < self.dims.candidates)
        teaches = batch.valid & (batch.clicks.sum(axis=1) == 1) & inside & jnp.isfinite(target)
        docs = jax.vmap(lambda docs, place: docs[place])(batch.seen.docs, jnp.where(inside, clicked, 0))
        # What is no number teaches nothing, and does not reach the network, whose gradients it would spoil.
        users = batch.seen.user
        teaches &= jnp.isfinite(docs).all(axis=1) & jnp.isfinite(users).all(axis=1)
        users, docs = (jnp.where(teaches[:, None], x, 0.0) for x in (users, docs))
        q = jax.vmap(lambda user, doc: self.q(params, user, doc[None])[0])(users, docs)
        error = q - jax.lax.stop_gradient(jnp.where(teaches, target, 0.0))
        mean_q = jnp.where(teaches, q, 0.0).sum() / jnp.maximum(teaches.sum(), 1)
        return mean_square(error, teaches), {"q": mean_q, "taught": teaches.mean()}
