"""Ranking environments: a user comes with items, sees one slate, clicks or does not, and is gone. Pure, one user.

`RankingEnv` has cascading users (ghost actions, or a distance threshold), `PositionBiasEnv` users who look at each slot
with a known probability. Both follow TF-Agents' bandit environments. `reset` and `step` have the contract of the slate
simulator, an episode being one turn. Called by `ranking.training` and experiments.

Letters: G numbers of a user, N items of D numbers each, S slots.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from gemsjax.errors import require, require_choice, require_count
from gemsjax.maths.categorical import draw_items
from gemsjax.maths.plackett_luce import LOWEST, unit_rows
from gemsjax.maths.randomness import normal, whole_number
from gemsjax.ranking.agent import Cascade, Feedback
from gemsjax.ranking.policy import RankingObservation, available_items
from gemsjax.types import Array, Key

CLICK_MODELS = ("ghost_actions", "distance_based")
FEEDBACKS = ("cascading", "score_vector")


def _product(matrix: Array, vector: Array) -> Array:
    """In full float32 everywhere: accelerators would round to ten bits, and thresholds decide on the result."""
    return jnp.matmul(matrix, vector, precision=jax.lax.Precision.HIGHEST)


class Response(NamedTuple):
    """What one user does with a slate.

    Attributes:
      feedback: as the environment's feedback model tells it.
      clicks: [S] bool.
      invalid_action: [] bool, whether the slate names items that there are not where one was left: what is in slots
        beyond the number of available items is padding. Nobody clicks either.
    """

    feedback: Feedback
    clicks: Array
    invalid_action: Array


@struct.dataclass
class RankingParams:
    """Numbers of `RankingEnv`.

    Attributes:
      matrix: [D, G]; an item's score is `item . matrix . user`.
      distance_threshold: [] score from which on an item is near enough (`distance_based` only).
    """

    matrix: Array
    distance_threshold: Array | float = math.inf


@struct.dataclass
class PositionBiasParams:
    """Numbers of `PositionBiasEnv`: observation [S], the probability that a user looks at each slot."""

    observation: Array


@dataclasses.dataclass(frozen=True)
class _Bandit:
    """Static half that both environments share.

    Attributes:
      user_fn: `(key) -> [G]` features of a user.
      items_fn: `(key) -> [N, D]` features of its items.
      num_items, num_slots: N, S.
      least_items: if set, between so many and N items are available, evenly; else all.
    """

    user_fn: Callable[[Key], Array]
    items_fn: Callable[[Key], Array]
    num_items: int
    num_slots: int
    least_items: int | None = None

    def __post_init__(self) -> None:
        require_count("num_items", self.num_items)
        require_count("num_slots", self.num_slots, 1, self.num_items)
        if self.least_items is not None:
            require_count("least_items", self.least_items, 0, self.num_items)

    def reset(self, key: Key, params: Any) -> tuple[RankingObservation, RankingObservation]:
        """A new user with items: the observation, which is also the state."""
        del params
        user_key, items_key, count_key = jax.random.split(key, 3)
        count = None
        if self.least_items is not None:
            choices = self.num_items - self.least_items + 1
            count = self.least_items + whole_number(jax.random.uniform(count_key), choices)
        observation = RankingObservation(self.user_fn(user_key), self.items_fn(items_key), count)
        return observation, observation

    def step(
        self, key: Key, state: RankingObservation, slate: Array, params: Any
    ) -> tuple[RankingObservation, RankingObservation, Feedback, Array, Array, dict[str, Array]]:
        """Show a slate [S] and meet the next user.

        Returns:
          The next observation and state, the feedback, terminated (always), truncated (never), and `info`: `clicks` [S]
          and `invalid_action` [].
        """
        respond_key, next_key = jax.random.split(key)
        response = self.respond(respond_key, state, slate, params)
        observation, state = self.reset(next_key, params)
        info = {"clicks": response.clicks, "invalid_action": response.invalid_action}
        return observation, state, response.feedback, jnp.bool_(True), jnp.bool_(False), info

    def respond(self, key: Key, state: RankingObservation, slate: Array, params: Any) -> Response:
        """What the user does with a slate [S]."""
        raise NotImplementedError

    def relevance(self, state: RankingObservation, params: Any) -> Array:
        """What every item is worth to the user: [N]."""
        raise NotImplementedError

    def _shown(self, state: RankingObservation, slate: Array, params: Any) -> tuple[Array, Array]:
        """Relevance of the slotted items, [S], -inf where there is none, and which slots have one."""
        inside = (slate >= 0) & (slate < self.num_items)
        place = jnp.clip(slate, 0, self.num_items - 1)
        there = available_items(state)
        inside = inside if there is None else inside & there[place]
        worth = self.relevance(state._replace(items=state.items[place]), params)
        return jnp.where(inside & jnp.isfinite(worth), worth, -jnp.inf), inside

    def _invalid(self, state: RankingObservation, inside: Array) -> Array:
        """Whether a slot is empty, [S] bool `inside`, that could have had an item: []."""
        usable = jnp.isfinite(state.items).all(axis=-1) & jnp.isfinite(state.user).all()
        there = available_items(state)
        number = (usable if there is None else usable & there).sum()
        return (~inside & (jnp.arange(self.num_slots) < number)).any()


@dataclasses.dataclass(frozen=True)
class RankingEnv(_Bandit):
    """Users who choose one item of a slate or none; parameters are `RankingParams`.

    With ghost actions, D invisible items (the unit vectors) compete with the slotted ones: every score gets standard
    normal noise, and an item is chosen with a probability proportional to the sigmoid of that; a ghost is no click.
    With a distance threshold the best item is chosen if it is near enough, or under `real_cascade` the first that is.

    Attributes:
      feedback: `cascading`, or `score_vector`: 1 for the chosen slot, else 0.
      click_model: one of `CLICK_MODELS`.
      real_cascade: see above; `distance_based` only.
    """

    feedback: str = "cascading"
    click_model: str = "ghost_actions"
    real_cascade: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("feedback", self.feedback, FEEDBACKS)
        require_choice("click_model", self.click_model, CLICK_MODELS)
        fits = self.click_model == "distance_based" or not self.real_cascade
        require(fits, "real_cascade", self.real_cascade, "False unless the click model is distance_based")

    def params(self, matrix: Array, distance_threshold: float | None = None) -> RankingParams:
        """Parameters from the scores' matrix [D, G] and, for `distance_based`, the threshold.

        Raises:
          SettingError: a missing threshold, one that is not finite, or one for users who have none.
        """
        if self.click_model != "distance_based":
            accepted = "None unless the click model is distance_based"
            require(distance_threshold is None, "distance_threshold", distance_threshold, accepted)
            return RankingParams(jnp.asarray(matrix, jnp.float32))
        fits = distance_threshold is not None and math.isfinite(distance_threshold)
        require(fits, "distance_threshold", distance_threshold, "a finite number: distance_based users need one")
        return RankingParams(jnp.asarray(matrix, jnp.float32), jnp.float32(distance_threshold))

    def relevance(self, state: RankingObservation, params: RankingParams) -> Array:
        """Scores of the items: [N]."""
        return _product(state.items, _product(params.matrix, state.user))

    def choice_logits(self, state: RankingObservation, slate: Array, params: RankingParams, noise: Array) -> Array:
        """Log of what the choice among slots and ghosts is proportional to: noise [S + D] -> [S + D]."""
        shown, _ = self._shown(state, slate, params)
        scores = jnp.concatenate([shown, _product(params.matrix, state.user)])
        return jnp.where(jnp.isfinite(scores), jax.nn.log_sigmoid(scores + noise), -jnp.inf)

    def respond(self, key: Key, state: RankingObservation, slate: Array, params: RankingParams) -> Response:
        """What the user does with a slate [S]."""
        size, inside = self.num_slots, self._shown(state, slate, params)[1]
        if self.click_model == "ghost_actions":
            uniforms = jax.random.uniform(key, (size + params.matrix.shape[0] + 1,))
            logits = self.choice_logits(state, slate, params, normal(uniforms[:-1]))
            drawn = draw_items(jnp.maximum(logits, LOWEST), uniforms[-1:])[0]
            chosen = jnp.where(jnp.isfinite(logits[drawn]), jnp.minimum(drawn, size), size)
        else:
            chosen = self._nearest(self._shown(state, slate, params)[0], params)
        chosen = chosen.astype(jnp.int32)
        clicks = jnp.arange(size) == chosen
        worth = (chosen < size).astype(jnp.float32)
        feedback = Cascade(chosen, worth) if self.feedback == "cascading" else clicks.astype(jnp.float32)
        return Response(feedback, clicks, self._invalid(state, inside))

    def _nearest(self, shown: Array, params: RankingParams) -> Array:
        """The slot that is chosen, S for none."""
        near = shown >= params.distance_threshold
        first = jnp.argmax(near) if self.real_cascade else jnp.argmax(shown)
        return jnp.where(near.any(), first, self.num_slots)


@dataclasses.dataclass(frozen=True)
class PositionBiasEnv(_Bandit):
    """Users who look at slot j with probability o_j and click what they look at with the item's relevance, each slot on
    its own: several clicks are possible. Feedback is a score vector; parameters are `PositionBiasParams`.

    Attributes:
      relevance_fn: `(user [G], items [n, D]) -> [n]`; cut off to [0, 1]. What is not finite is never clicked.
    """

    relevance_fn: Callable[[Array, Array], Array] = lambda user, items: jax.nn.sigmoid(_product(items, user))

    def params(self, observation: Any) -> PositionBiasParams:
        """Parameters from the probabilities [S].

        Raises:
          SettingError: not S numbers from 0 to 1.
        """
        fits = len(observation) == self.num_slots and all(0.0 <= float(one) <= 1.0 for one in observation)
        require(fits, "observation", observation, f"{self.num_slots} probabilities")
        return PositionBiasParams(jnp.asarray(observation, jnp.float32))

    def relevance(self, state: RankingObservation, params: PositionBiasParams) -> Array:
        """Probability that an item that is looked at is clicked: [N]; NaN where the relevance is not finite."""
        worth = self.relevance_fn(state.user, state.items)
        # Before the cut, which would make a certain click of an infinite one.
        return jnp.where(jnp.isfinite(worth), jnp.clip(worth, 0.0, 1.0), jnp.nan)

    def click_probabilities(self, state: RankingObservation, slate: Array, params: PositionBiasParams) -> Array:
        """Of every slot: [S]."""
        return jnp.maximum(self._shown(state, slate, params)[0], 0.0) * params.observation

    def respond(self, key: Key, state: RankingObservation, slate: Array, params: PositionBiasParams) -> Response:
        """What the user does with a slate [S]."""
        inside = self._shown(state, slate, params)[1]
        clicks = jax.random.uniform(key, (self.num_slots,)) < self.click_probabilities(state, slate, params)
        return Response(clicks.astype(jnp.float32), clicks, self._invalid(state, inside))


# -- the demo's users and items ----------------------------------------------------------------------------------------


def demo_user(dim: int) -> Callable[[Key], Array]:
    """Users of TF-Agents' demo: [dim] numbers that are -1 or 0."""
    return lambda key: -jax.random.bernoulli(key, 0.5, (dim,)).astype(jnp.float32)


def demo_items(number: int, dim: int) -> Callable[[Key], Array]:
    """Items of TF-Agents' demo: [number, dim] whole numbers from -2 to 2, scaled to length 1."""
    return lambda key: unit_rows(whole_number(jax.random.uniform(key, (number, dim)), 5) - 2.0)


def demo_relevance(user: Array, items: Array) -> Array:
    """Relevance of TF-Agents' demo: sigmoid of the dot product in the dimensions that both have, [n]."""
    shared = min(user.shape[-1], items.shape[-1])
    return jax.nn.sigmoid(_product(items[..., :shared], user[:shared]))
