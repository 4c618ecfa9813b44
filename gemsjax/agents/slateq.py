"""SlateQ: a Q for every item; slates are put together with the simulator's click model (Ie et al. 2019; GeMS paper).

`make_slateq(spec, dims, click_model)` gives an `Agent`, which is privileged: `acting.weights` are the simulator's
parameters and `Episode.hidden` is what the click model remembers of its users. SlateQ takes it that at most one item of
a slate is chosen and that all that follows depends on which: Q(s, A) = sum over j in A of P(j chosen | s, A) Q(s, j),
where Q(s, j) is the turn's reward and what follows it. This simulator's users click several items a turn. So the choice
is one of the turn's clicks, each as likely as the others: every clicked item gets a target, and those of a turn count
as one. (The published sum of P(click j) Q(s, j) counts what follows once for each expected click; with more than
1 / gamma of them a turn its Q grow without end. That is the setting `value`.) The published variant is `PUBLISHED`;
bracketed numbers in comments: README, "Where they differ".
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import struct

from gemsjax.agents.actor import outcomes
from gemsjax.agents.base import Acting, Agent, Choice, Policy
from gemsjax.agents.checks import check_hypers, check_widths
from gemsjax.agents.click_model import BOREDOMS, ClickModel
from gemsjax.agents.exploration import epsilon
from gemsjax.belief import Belief, make_gru
from gemsjax.errors import require_choice
from gemsjax.maths.optimise import adam_init, adam_step
from gemsjax.maths.randomness import whole_number
from gemsjax.maths.selection import map_selected, picked_outputs
from gemsjax.maths.slate_optimisers import OPTIMISERS, Candidates
from gemsjax.nets.mlp import MLP
from gemsjax.types import Array, Dims, Episode, Key, Metrics, Observation, Params, time_major

CHOICES = {
    "serving": tuple(OPTIMISERS),
    "target": (*OPTIMISERS, "sarsa"),
    "credit": ("corrected", "published"),
    "clicked": ("each", "first"),
    "reward": ("turn", "one"),
    "value": ("choice", "clicks"),
    "penalty": ("slate", "batch"),
    "acting_boredom": BOREDOMS,
    "target_boredom": BOREDOMS,
    "target_update": ("after", "before"),
}
"""The named choices of `SlateQSpec`."""

PUBLISHED = {
    "spec": {
        "credit": "published",
        "clicked": "first",
        "reward": "one",
        "value": "clicks",
        "penalty": "batch",
        "acting_boredom": "misplaced",
        "target_boredom": "none",
        "target_update": "before",
    }
}
"""What the published implementation does otherwise ([17], [21], [33])."""


@dataclasses.dataclass(frozen=True)
class SlateQSpec:
    """Static choices: changing one makes another program.

    Attributes:
      hidden: width of Q's hidden layer.
      belief_width: width of the recurrent state.
      item_dim: width of the belief's item embeddings.
      serving: how a slate is put together for acting: `topk`, `greedy` or `exact` (`maths.slate_optimisers`).
      target: the same for the next slate of the target, or `sarsa`: the slate that was shown next.
      credit: Q(s_t, .) learns of the slate in o_{t+1}, which action t showed (`corrected`), or of the one in o_t, which
        the state has already seen (`published`).
      clicked: whether `each` clicked item of a turn gets a target or only the `first`.
      reward: in a target: what the whole `turn` brought, or always `one`.
      value: of the next slate: the sum of Q over its items times the chance of the `choice`, or times that of `clicks`.
      penalty: the diversity penalty in the target is that of each `slate`, or that of the whole `batch` taken as one.
      acting_boredom, target_boredom: `masked`, `misplaced` or `none`, see `click_model.BOREDOMS`.
      target_update: the target network follows `after` the gradient step or `before` it.
    """

    hidden: int = 256
    belief_width: int = 20
    item_dim: int = 20
    serving: str = "topk"
    target: str = "topk"
    credit: str = "corrected"
    clicked: str = "each"
    reward: str = "turn"
    value: str = "choice"
    penalty: str = "slate"
    acting_boredom: str = "masked"
    target_boredom: str = "masked"
    target_update: str = "after"


@struct.dataclass
class SlateQHypers:
    """Numbers that may differ between runs of one program.

    Attributes:
      gamma: discount per turn.
      tau: share of the online network that enters the target network at every update.
      rate: Adam's learning rate of Q and its belief.
      first_epsilon, last_epsilon: chance of a random slate at step 0 and after many steps.
      epsilon_steps: steps in which what epsilon has left to fall shrinks to 1/e.
    """

    gamma: float = 0.8
    tau: float = 0.002
    rate: float = 1e-3
    first_epsilon: float = 1.0
    last_epsilon: float = 0.01
    epsilon_steps: float = 1_000.0


def validate_spec(spec: SlateQSpec) -> None:
    """Raise `SettingError` for a width below 1 or an unknown choice."""
    check_widths(spec)
    for name, choices in CHOICES.items():
        require_choice(name, getattr(spec, name), choices)


def validate_hypers(hypers: SlateQHypers) -> None:
    """Raise `SettingError` for a hyper-parameter outside its range (host-side numbers only)."""
    shares = ("gamma", "tau", "first_epsilon", "last_epsilon")
    check_hypers(hypers, rates=("rate",), shares=shares, positive=("epsilon_steps",))


class SlateQParams(NamedTuple):
    """What is trained: the belief, and Q of all items as an `MLP` of two layers."""

    belief: Any
    q: Any


@struct.dataclass
class SlateQState:
    """Everything that an update changes: `SlateQParams`, the target network of `q`, Adam's moments."""

    params: SlateQParams
    target: Params
    optimiser: Any


def make_slateq(spec: SlateQSpec, dims: Dims, click_model: ClickModel) -> Agent:
    """SlateQ that knows how users click.

    Raises:
      SettingError: see `validate_spec`.
    """
    validate_spec(spec)
    learner = _Learner(spec, dims, click_model, make_gru(dims, spec.belief_width, spec.item_dim))
    return Agent(
        init=learner.init,
        explore=Policy(
            learner.belief.start,
            learner.explore,
            draws=dims.slate_size + 1,
            privileged=True,
            remember=click_model.remember,
        ),
        greedy=Policy(learner.belief.start, learner.greedy, privileged=True),
        draw_update=lambda _key, _batch: (),
        update=learner.update,
    )


class _Next(NamedTuple):
    """The slate of a target: its items, their appeal and target Q [K] each, and the appeal of clicking nothing."""

    slate: Array
    appeal: Array
    q: Array
    no_click: Array


@dataclasses.dataclass(frozen=True)
class _Learner:
    """The agent's functions with their sizes bound."""

    spec: SlateQSpec
    dims: Dims
    model: ClickModel
    belief: Belief

    def init(self, key: Key, _hypers: SlateQHypers) -> SlateQState:
        belief_key, q_key = jax.random.split(key)
        q = self._network.init(q_key, jnp.zeros(self.belief.width))["params"]
        params = SlateQParams(self.belief.init(belief_key), q)
        # An array of its own: a donated state may not hold one buffer twice.
        return SlateQState(params, jax.tree.map(jnp.copy, q), adam_init(params))

    # -- acting ----------------------------------------------------------------------------------------------------

    def greedy(
        self, acting: Acting, memory: Array, seen: Observation, hidden: Any, _uniforms: Array
    ) -> tuple[Choice, Array]:
        user, simulator = hidden
        memory = self.belief.step(acting.state.params.belief, memory, seen)
        candidates = self.model.candidates(simulator, self.model.remember(user), self.spec.acting_boredom)
        slate = OPTIMISERS[self.spec.serving](candidates, self._q(acting.state.params.q, memory), self.dims.slate_size)
        return Choice(slate, slate), memory

    def explore(
        self, acting: Acting, memory: Array, seen: Observation, hidden: Any, uniforms: Array
    ) -> tuple[Choice, Array]:
        choice, memory = self.greedy(acting, memory, seen, hidden, uniforms)
        anything = whole_number(uniforms[:-1], self.dims.num_items)  # items may repeat, as published
        slate = jnp.where(acting.at_random | (uniforms[-1] < epsilon(acting)), anything, choice.slate)
        return Choice(slate, slate), memory

    # -- learning --------------------------------------------------------------------------------------------------

    def update(self, acting: Acting, batch: Episode, _noise: tuple) -> tuple[SlateQState, Metrics]:
        state, hypers = acting.state, acting.hypers
        chex.assert_rank((batch.observation.slate, batch.reward), (3, 2))
        chex.assert_equal_shape_prefix((batch.observation.slate, batch.reward), 2)
        seen, action, reward, hidden = time_major((batch.observation, batch.action, batch.reward, batch.hidden))
        states, pull_belief = jax.vjp(lambda p: self.belief.unroll((p,), seen)[0], state.params.belief)
        credited = seen if self.spec.credit == "published" else outcomes(batch)  # [21]
        learns = _targeted(credited.clicks, self.spec.clicked)

        earned = reward if self.spec.reward == "turn" else jnp.ones_like(reward)
        target = earned + hypers.gamma * self._values(acting, states, hidden, action, learns.any(axis=-1))
        (loss, mean_q), (q_grad, states_grad) = jax.value_and_grad(self._loss, (0, 1), has_aux=True)(
            state.params.q, states, credited.slate, learns, target
        )
        gradients = SlateQParams(pull_belief(states_grad)[0], q_grad)
        params, optimiser = adam_step(state.params, gradients, state.optimiser, hypers.rate)
        followed = state.params.q if self.spec.target_update == "before" else params.q
        targets = jax.tree.map(lambda old, new: old + hypers.tau * (new - old), state.target, followed)
        metrics = {"critic_loss": loss, "q": mean_q, "epsilon": epsilon(acting)}
        return SlateQState(params, targets, optimiser), metrics

    def _values(self, acting: Acting, states: Array, hidden: Any, action: Array, wanted: Array) -> Array:
        """What follows each turn whose value is wanted, [H, B]: the next slate's value by the target network."""
        turns = (states[1:], jax.tree.map(lambda x: x[:-1], hidden), action[1:])
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), turns)
        wanted_flat = wanted[:-1].reshape(-1)

        def of_turn(turn: tuple) -> _Next:
            return self._next_slate(acting, *turn)

        shown = map_selected(of_turn, wanted_flat, flat)
        params = acting.weights
        if self.spec.penalty == "batch":  # [33]
            penalty = self.model.penalty(params, jnp.where(wanted_flat[:, None], shown.slate, -1).reshape(-1))[None]
        else:
            penalty = jax.vmap(lambda slate: self.model.penalty(params, slate))(shown.slate)
        appeal = shown.appeal / penalty[:, None]
        chance = partial(self.model.click_probabilities, params)
        if self.spec.value == "choice":
            chance = partial(self.model.choice_probabilities, params, clicked=self.spec.clicked)
        # Turns that were left out have no slate, so their chances may be anything.
        values = (jax.vmap(chance)(appeal, shown.no_click) * shown.q).sum(axis=-1)
        values = jnp.where(wanted_flat, values, 0.0).reshape(wanted[:-1].shape)
        return jax.lax.stop_gradient(jnp.pad(values, ((0, 1), (0, 0))))  # nothing follows the last turn

    def _next_slate(self, acting: Acting, state: Array, memory: Any, shown: Array) -> _Next:
        candidates = self.model.candidates(acting.weights, memory, self.spec.target_boredom)
        q = self._q(acting.state.target, state)
        slate = self._slate_of_target(candidates, q, shown)
        return _Next(slate, candidates.weights()[slate], q[slate], candidates.no_click)

    def _slate_of_target(self, candidates: Candidates, q: Array, shown: Array) -> Array:
        if self.spec.target == "sarsa":
            return shown
        return OPTIMISERS[self.spec.target](candidates, q, self.dims.slate_size)

    def _loss(self, q: Params, states: Array, slate: Array, learns: Array, target: Array) -> tuple[Array, Array]:
        """Mean squared error of Q, and the mean Q: of turns, or as published of the items with a target."""
        hidden = jax.nn.relu(MLP((self.spec.hidden,)).apply({"params": {"layer0": q["layer0"]}}, states))
        flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
        head, learns = q["layer1"], flat(learns)
        found = picked_outputs(flat(hidden), head["kernel"], head["bias"], flat(slate), learns)
        error = jnp.where(learns, found - flat(target)[:, None], 0.0)
        weight = learns.astype(error.dtype)
        if self.spec.value == "choice":  # any click of a turn may be the choice
            weight = weight / jnp.maximum(learns.sum(axis=1, keepdims=True), 1)
        weight = weight / jnp.maximum(weight.sum(), 1.0)
        return (weight * jnp.square(error)).sum(), (weight * found).sum()

    @property
    def _network(self) -> MLP:
        return MLP((self.spec.hidden, self.dims.num_items))

    def _q(self, params: Params, state: Array) -> Array:
        """Q of every item: [width] -> [I]."""
        return self._network.apply({"params": params}, state)


def _targeted(clicks: Array, which: str) -> Array:
    """Which clicked ranks get a target: [..., K] bool."""
    if which == "each":
        return clicks
    return clicks & (jnp.cumsum(clicks, axis=-1) == 1)  # the topmost [24]
