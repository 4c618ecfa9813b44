"""What the simulator tells privileged learners: who clicks what, as functions of what was remembered of a user.

`make_click_model(env)` gives the click model of an environment, with the contract of `agents.click_model.ClickModel`
(which this module may not import), `make_choice_model(env)` that of RecSim's environments, with the contract of
`ChoiceModel` there. Called by whoever builds agents.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemsjax.envs import clicks
from gemsjax.envs.interest_evolution import EvolutionEnv, EvolutionParams, EvolutionState
from gemsjax.envs.interest_exploration import ExplorationEnv, ExplorationParams, ExplorationState
from gemsjax.envs.topics import TopicEnv, TopicParams, TopicState
from gemsjax.errors import require
from gemsjax.maths import choice
from gemsjax.maths.slate_optimisers import Candidates
from gemsjax.types import Array, CandidateObservation

NO_CLICK = 1.0
"""Appeal of clicking nothing: as much as that of one item that is surely relevant."""


class TopicMemory(NamedTuple):
    """What a topic user's relevances depend on.

    Attributes:
      user_embedding: [D] float32, without any mask.
      bored: [T] bool, the mask of the turn just played; the next turn may begin with another one [16].
    """

    user_embedding: Array
    bored: Array


@dataclasses.dataclass(frozen=True)
class TopicClicks:
    """The click model of the topic simulator, see `agents.click_model.ClickModel` for what the functions mean.

    Its users may click several items of a slate, so greedy and exact slates (`maths.slate_optimisers`) stand on a
    stand-in of a user who makes one choice: proportional to relevance, against `NO_CLICK`. The short-term boost is left
    out, as in the published implementation (it is 1 in all published settings).

    Attributes:
      num_topics, topic_size: T, S.
      independent_clicks: whether the examination table's columns are equal.
    """

    num_topics: int
    topic_size: int
    independent_clicks: bool

    def remember(self, state: TopicState) -> TopicMemory:
        """The embedding and the boredom of a user between turns."""
        return TopicMemory(state.user_embedding, state.bored)

    def candidates(self, params: TopicParams, memory: TopicMemory, boredom: str) -> Candidates:
        """Relevance of every item to a user.

        Args:
          params: of the environment.
          memory: of the user.
          boredom: static, one of `agents.click_model.BOREDOMS`.

        Returns:
          Appeal [I] in [0, 1], against `NO_CLICK`. Source: `get_relevances` of the published implementation.
        """
        interest = jnp.where(self._left_out(memory.bored, boredom), 0.0, memory.user_embedding)
        # Full float32 on every device: the slope magnifies rounding.
        scores = jnp.matmul(params.item_embeddings, interest, precision=jax.lax.Precision.HIGHEST) / params.max_score
        relevance = jax.nn.sigmoid((scores - params.relevance_offset) * params.relevance_slope)
        return Candidates(relevance, jnp.float32(NO_CLICK))

    def penalty(self, params: TopicParams, items: Array) -> Array:
        """What the appeal of items that are shown together is divided by.

        Args:
          params: of the environment.
          items: [n] int32 item numbers; negative ones stand for no item.

        Returns:
          [] float32: `diversity_penalty` where one topic fills `diversity_threshold` of the places or more, else 1.
        """
        topics = jnp.where(items >= 0, params.item_topics[items], -1)
        most = (topics[:, None] == jnp.arange(self.num_topics)).sum(axis=0).max()
        return jnp.where(most >= params.diversity_threshold, params.diversity_penalty, 1.0)

    def click_probabilities(self, params: TopicParams, appeal: Array, no_click: Array) -> Array:
        """Chance of a click on each rank of a slate: the simulator's own (`envs.clicks.click_probabilities`).

        Args:
          params: of the environment.
          appeal: [K] of the slate's items, the penalty included.
          no_click: [] not needed: clicks do not compete.

        Returns:
          [K] float32: appeal times examination, or the recursion over the latest click where ranks depend on it.
        """
        return clicks.click_probabilities(appeal, params.examination, self.independent_clicks)

    def choice_probabilities(self, params: TopicParams, appeal: Array, no_click: Array, clicked: str) -> Array:
        """Chance that each rank is the choice: one of the same clicks, as if they were independent (which they are but
        for tables whose columns differ).

        Args:
          params, appeal, no_click: as in `click_probabilities`.
          clicked: static; `each` of a turn's clicks is the choice with equal chance, or the `first` one is.

        Returns:
          [K] float32 of sum 1 or less.
        """
        chances = self.click_probabilities(params, appeal, no_click)
        return {"each": any_click_chosen, "first": first_click_chosen}[clicked](chances)

    def _left_out(self, bored: Array, boredom: str) -> Array:
        """[D] bool: which numbers of the user count nothing."""
        number, topic, size = (
            jnp.arange(self.num_topics * self.topic_size),
            jnp.arange(self.num_topics),
            self.topic_size,
        )
        first, last = {
            "masked": (size * topic, size * (topic + 1)),
            "misplaced": (size * topic, (size + 1) * topic),
            "none": (topic, topic),
        }[boredom]
        inside = (number >= first[:, None]) & (number < last[:, None])
        return (inside & bored[:, None]).any(axis=0)


@dataclasses.dataclass(frozen=True)
class EvolutionChoice:
    """The choice model of interest evolution, see `agents.click_model.ChoiceModel`: interests and topics are observed,
    so nothing hidden is needed."""

    env: EvolutionEnv
    privileged: bool = False

    def remember(self, state: EvolutionState) -> tuple[()]:
        """Nothing."""
        return ()

    def candidates(self, params: EvolutionParams, seen: CandidateObservation, memory: tuple[()]) -> Candidates:
        """Appeal [C] of the candidates that were observed to the user that was observed."""
        scores = jnp.matmul(seen.docs, seen.user, precision=jax.lax.Precision.HIGHEST)
        return choice.weigh(self.env.choice_model, scores, params.choice, seen.available)

    def chances(self, params: EvolutionParams, candidates: Candidates, slate: Array) -> Array:
        """Chance that each place of a slate [K] is chosen, as the simulator's users choose: [K]."""
        return choice.chances(self.env.choice_model, candidates, slate, params.choice)


@dataclasses.dataclass(frozen=True)
class ExplorationChoice:
    """The choice model of interest exploration, see `agents.click_model.ChoiceModel`.

    Attributes:
      env: the environment's static half.
      privileged: knows each user's affinities; otherwise those of a mean user stand for everybody's.
    """

    env: ExplorationEnv
    privileged: bool = False

    def remember(self, state: ExplorationState) -> Any:
        """The user's affinities, if they are known."""
        return state.affinity if self.privileged else ()

    def candidates(self, params: ExplorationParams, seen: CandidateObservation, memory: Any) -> Candidates:
        """Appeal [C] of the candidates that were observed."""
        of_types = jnp.exp(params.affinities + 0.5 * jnp.square(params.affinity_deviation))
        affinity = memory if self.privileged else params.type_shares @ of_types
        logits = (seen.docs[:, :-1] * affinity).sum(axis=1) + seen.docs[:, -1]
        return choice.weigh(self.env.choice_model, logits, params.choice, seen.available)

    def chances(self, params: ExplorationParams, candidates: Candidates, slate: Array) -> Array:
        """Chance that each place of a slate [K] is chosen, as the simulator's users choose: [K]."""
        return choice.chances(self.env.choice_model, candidates, slate, params.choice)


def first_click_chosen(chances: Array) -> Array:
    """Chance that a rank has the topmost of several independent clicks: their chances [K] -> [K]."""
    none_above = jnp.cumprod(1.0 - chances)
    return chances * jnp.concatenate([jnp.ones(1, chances.dtype), none_above[:-1]])


def any_click_chosen(chances: Array) -> Array:
    """Chance that a rank has the one picked at random out of several independent clicks: their chances [K] -> [K].

    It is p_j E[1 / (1 + the other clicks)] = p_j times the integral over t in [0, 1] of the product over i != j of
    (1 - p_i + p_i t): a polynomial, so Gauss's rule with K/2 nodes is exact.
    """
    nodes, weights = np.polynomial.legendre.leggauss(-(-chances.shape[0] // 2))
    factors = 1.0 - chances[:, None] * (0.5 - 0.5 * nodes)  # above 0: no node is at an end
    return chances * (factors.prod(axis=0) / factors * (0.5 * weights)).sum(axis=1)


def make_click_model(env: Any) -> TopicClicks:
    """The click model of an environment.

    Raises:
      SettingError: the environment has none to tell of.
    """
    require(isinstance(env, TopicEnv), "env", env, "a topic simulator: no click model is known of any other")
    return TopicClicks(env.num_topics, env.topic_size, env.independent_clicks)


def make_choice_model(env: Any, privileged: bool = False) -> EvolutionChoice | ExplorationChoice:
    """The choice model of one of RecSim's environments.

    Args:
      env: its static half.
      privileged: tell what is not observed of the user (in interest evolution all that matters is).

    Raises:
      SettingError: the environment has none to tell of.
    """
    if isinstance(env, ExplorationEnv):
        return ExplorationChoice(env, privileged)
    accepted = "interest_evolution or interest_exploration: no choice model is known of any other"
    require(isinstance(env, EvolutionEnv), "env", getattr(env, "name", env), accepted)
    return EvolutionChoice(env)
