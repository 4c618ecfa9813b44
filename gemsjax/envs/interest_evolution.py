"""RecSim's interest evolution: a user with a budget of time, whose interests move with what it watches. Pure, one user.

Every turn brings C candidate videos, each of one topic and of a hidden quality; the user chooses at most one of the
slate by its interests. A good video costs less of the budget than it lasts, a bad one more; so recommending what the
user likes best (a myopic policy) ends the session sooner than need be. Made by `gemsjax.make("interest_evolution")`,
with the contract of `TopicEnv`; a slate holds places 0 .. C-1 of the candidates in `observation.docs`.

Rules (click on a video of topic j, interests I, w = min(budget, length)): I_j moves by drift (1 - |I_j|) (1 - I_j),
upwards with probability (I_j + 1) / 2, else downwards, within [-1, 1]; budget += bonus w (user_q_factor score +
doc_q_factor quality) - w. Without a click budget -= step_penalty. The session ends when the budget is used up; whoever
has left stays away: later turns bring neither clicks nor reward. Source: Ie et al. 2019, RecSim (arXiv 1909.04847).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from gemsjax.envs.candidates import all_available, check_sizes, make_choice
from gemsjax.errors import require_choice, require_number
from gemsjax.maths import choice
from gemsjax.maths.choice import ChoiceParams
from gemsjax.maths.randomness import normal, whole_number
from gemsjax.maths.slate_optimisers import Candidates
from gemsjax.types import Array, CandidateObservation, Key

Info = dict[str, Array]


@struct.dataclass
class EvolutionParams:
    """Everything of the simulator that is a number; all leaves are arrays, so parameters can be vmapped.

    Attributes:
      quality_means: [T] mean quality of each topic's videos.
      quality_deviation: [] its standard deviation within a topic.
      video_length: [] time that a video lasts.
      budget: [] time that a user has at first.
      step_penalty: [] time lost when nothing is clicked.
      bonus: [] time gained back for a unit of utility, a unit of watching.
      user_q_factor, doc_q_factor: [] weights of the user's score and of the quality in the utility. The score is the
        interest in the topic, less `choice.min_normalizer` under the proportional choice models.
      drift: [] how much interests move.
      choice: of the choice model.
      candidates: [] int32, candidates of a turn; the other places are empty.
      resample: [] bool, new candidates every turn, or the same for a whole session.
      horizon: [] int32, turns after which a session is cut off.
    """

    quality_means: Array
    quality_deviation: Array
    video_length: Array
    budget: Array
    step_penalty: Array
    bonus: Array
    user_q_factor: Array
    doc_q_factor: Array
    drift: Array
    choice: ChoiceParams
    candidates: Array
    resample: Array
    horizon: Array


@struct.dataclass
class EvolutionState:
    """One user between turns, and the candidates of the next one.

    Attributes:
      interests: [T] float32 in [-1, 1].
      budget: [] float32, time that is left.
      topics: [C] int32, topic of each candidate.
      qualities: [C] float32.
      time: [] int32, turns played.
    """

    interests: Array
    budget: Array
    topics: Array
    qualities: Array
    time: Array


@dataclasses.dataclass(frozen=True)
class EvolutionEnv:
    """The static half; hashable, so it may be a static argument of `jit`.

    Attributes:
      name: for messages, tables and run names.
      num_items, slate_size, num_topics, horizon: C, K, T, H.
      choice_model: one of `choice.MODELS`.
    """

    name: str
    num_items: int
    slate_size: int
    num_topics: int
    horizon: int
    choice_model: str = "proportional"

    # -- the contract ------------------------------------------------------------------------------------------------

    @property
    def features(self) -> tuple[int, int]:
        """F and G: numbers that are seen of a user (its interests) and of a candidate (its topic)."""
        return self.num_topics, self.num_topics

    @property
    def draws(self) -> int:
        """Uniform numbers that a turn needs: choice, direction of the drift, new candidates."""
        return 2 + 2 * self.num_items

    def reset(self, key: Key, params: EvolutionParams) -> tuple[CandidateObservation, EvolutionState]:
        """Draw a user, with interests U(-1, 1), and its first candidates; nothing has been shown yet.

        Args:
          key: for the user and the candidates.
          params: of this environment.

        Returns:
          `(obs, state)`: interests and candidates, with a slate [K] of -1 and no clicks, and the user before turn 1.
        """
        uniforms = jax.random.uniform(key, (self.num_topics + 2 * self.num_items,))
        interests = 2.0 * uniforms[: self.num_topics] - 1.0
        topics, qualities = self._candidates(uniforms[self.num_topics :], params)
        state = EvolutionState(interests, params.budget, topics, qualities, jnp.int32(0))
        nothing = jnp.full(self.slate_size, -1, jnp.int32)
        return self._observe(state, nothing, jnp.zeros(self.slate_size, bool), params), state

    def step(
        self, key: Key, state: EvolutionState, slate: Array, params: EvolutionParams
    ) -> tuple[CandidateObservation, EvolutionState, Array, Array, Array, Info]:
        """One turn.

        Args:
          key: for the choice, the drift and the next candidates.
          state: the user before the turn.
          slate: [K] places of candidates. A number outside 0 .. C-1, or the place of no candidate, is never clicked and
            raises the flag `info["invalid_action"]`.
          params: of this environment.

        Returns:
          `(obs, state, reward, terminated, truncated, info)`: the next candidates with the slate and its clicks, the
          user after the turn, the time watched, whether the budget is used up, whether `horizon` turns are played (and
          it is not), and what is hidden from agents: `click_probabilities` [K], `qualities` [K] (0 where the slate
          holds no candidate), `budget` [], `invalid_action` [].
        """
        return self.play(jax.random.uniform(key, (self.draws,)), state, slate, params)

    def play(
        self, uniforms: Array, state: EvolutionState, slate: Array, params: EvolutionParams
    ) -> tuple[CandidateObservation, EvolutionState, Array, Array, Array, Info]:
        """`step` from given uniform numbers [draws] in [0, 1)."""
        chances = self.click_probabilities(state, slate, params)
        clicks = choice.pick(uniforms[0], chances)
        after = self.transition(state, slate, clicks, uniforms[1], params)
        topics, qualities = self._candidates(uniforms[2:], params)
        after = dataclasses.replace(
            after,
            topics=jnp.where(params.resample, topics, state.topics),
            qualities=jnp.where(params.resample, qualities, state.qualities),
        )
        reward = jnp.where(clicks.any(), jnp.minimum(state.budget, params.video_length), 0.0)
        terminated = ~(after.budget > 0.0)
        truncated = (after.time >= params.horizon) & ~terminated
        info = {
            "click_probabilities": chances,
            "qualities": self._shown_qualities(state, slate, params),
            "budget": after.budget,
            "invalid_action": ~all_available(slate, self._available(params)),
        }
        return self._observe(after, slate, clicks, params), after, reward, terminated, truncated, info

    # -- its parts -----------------------------------------------------------------------------------------------------

    def candidates(self, state: EvolutionState, params: EvolutionParams) -> Candidates:
        """Appeal of the candidates to the user: [C]."""
        scores = state.interests[state.topics]  # u . d of a one-hot d
        return choice.weigh(self.choice_model, scores, params.choice, self._available(params))

    def click_probabilities(self, state: EvolutionState, slate: Array, params: EvolutionParams) -> Array:
        """Chance of the click at each place if `slate` [K] is shown next: [K] float32.

        It is 0 where the slate holds no candidate, and everywhere for whoever has left.
        """
        found = choice.chances(self.choice_model, self.candidates(state, params), slate, params.choice)
        return jnp.where(state.budget > 0.0, found, 0.0)

    def transition(
        self, state: EvolutionState, slate: Array, clicks: Array, uniform: Array, params: EvolutionParams
    ) -> EvolutionState:
        """The user after a slate got given clicks: interests, budget, time. The candidates stay.

        Args:
          state: the user before the turn.
          slate: [K] places of candidates.
          clicks: [K] bool, at most one True, and none where the slate holds no candidate.
          uniform: [] in [0, 1), for the direction of the drift.
          params: of this environment.

        Returns:
          The user after the turn.
        """
        clicked = clicks.any()
        place = jnp.clip(slate[jnp.argmax(clicks)], 0, self.num_items - 1)
        topic, quality = state.topics[place], state.qualities[place]
        doc = jax.nn.one_hot(topic, self.num_topics)
        delta, upwards = interest_step(state.interests, doc, params.drift)
        moved = state.interests + jnp.where(uniform < upwards, delta, -delta)
        score = state.interests[topic]
        # The reference's score is that of its choice model, which is the shifted one where choice is proportional. Its
        # text knows no other model here; under the others the score is the product itself. By default neither counts.
        if self.choice_model.startswith("proportional"):
            score = score - params.choice.min_normalizer
        watched = jnp.minimum(state.budget, params.video_length)
        left = remaining_budget(state.budget, watched, score, quality, params)
        stays = state.budget > 0.0
        return dataclasses.replace(
            state,
            interests=jnp.where(clicked & stays, jnp.clip(moved, -1.0, 1.0), state.interests),
            budget=jnp.where(stays, jnp.where(clicked, left, state.budget - params.step_penalty), state.budget),
            time=state.time + 1,
        )

    def _shown_qualities(self, state: EvolutionState, slate: Array, params: EvolutionParams) -> Array:
        """Of the slate's candidates, 0 for places that hold none: [K]."""
        inside = (slate >= 0) & (slate < self.num_items)
        place = jnp.where(inside, slate, 0)
        return jnp.where(inside & self._available(params)[place], state.qualities[place], 0.0)

    def _available(self, params: EvolutionParams) -> Array:
        return jnp.arange(self.num_items) < params.candidates

    def _candidates(self, uniforms: Array, params: EvolutionParams) -> tuple[Array, Array]:
        """Topics and qualities [C] from 2 C uniform numbers."""
        which, luck = jnp.split(uniforms, 2)
        topics = whole_number(which, self.num_topics)
        return topics, params.quality_means[topics] + params.quality_deviation * normal(luck)

    def _observe(
        self, state: EvolutionState, slate: Array, clicks: Array, params: EvolutionParams
    ) -> CandidateObservation:
        available = self._available(params)
        docs = jax.nn.one_hot(state.topics, self.num_topics) * available[:, None]
        return CandidateObservation(state.interests, docs, available, slate.astype(jnp.int32), clicks)


def interest_step(interests: Array, doc: Array, drift: Array | float) -> tuple[Array, Array]:
    """How far a click moves interests, and the chance that they move towards the document and not away from it.

    Args:
      interests: [T] in [-1, 1].
      doc: [T] features of what was clicked, 0 or 1.
      drift: alpha = drift (1 - |interests|).

    Returns:
      [T] and [].
    """
    return drift * (1.0 - jnp.abs(interests)) * doc * (doc - interests), (doc * (interests + 1.0) / 2.0).sum()


def remaining_budget(budget: Array, watched: Array, score: Array, quality: Array, params: EvolutionParams) -> Array:
    """What a click leaves of the budget: the time watched is gone, a part of it is given back for its utility.

    Args:
      budget, watched: [] time that was left, and that the click takes.
      score, quality: [] of the user for the video, and of the video.
      params: of the environment.

    Returns:
      [] time.
    """
    received = params.user_q_factor * score + params.doc_q_factor * quality
    return budget - watched + params.bonus * watched * received


NUMBERS = {
    "quality_deviation": (0.1, 0.0, 1e6),
    "video_length": (4.0, 1e-6, 1e6),
    "budget": (200.0, 1e-6, 1e6),
    "step_penalty": (0.5, 0.0, 1e6),
    "bonus": (0.9 / 3.4, 0.0, 1e6),
    "user_q_factor": (0.0, -1e6, 1e6),
    "doc_q_factor": (1.0, -1e6, 1e6),
    "drift": (0.3, 0.0, 1.0),
}
"""Keywords of `interest_evolution` that `EvolutionParams` explains: default, lowest and highest value."""


def interest_evolution(
    name: str,
    *,
    num_candidates: int = 10,
    available: int | None = None,
    slate_size: int = 2,
    horizon: int = 400,
    resample_documents: bool = True,
    choice_model: str = "proportional",
    no_click_mass: float = 1.0,
    min_normalizer: float = -1.0,
    attention: float = 1.0,
    score_scaling: float | None = None,
    **numbers: float,
) -> tuple[EvolutionEnv, EvolutionParams]:
    """Interest evolution with any settings. No session with the default numbers lasts longer than the horizon, but for
    videos beyond four standard deviations of the best topic's quality.

    Args:
      name: of the environment.
      num_candidates: C, places for candidates; `available` of them hold one (all by default).
      slate_size: K, at most C.
      horizon: H, turns after which a session is cut off.
      resample_documents: new candidates every turn.
      choice_model, no_click_mass, min_normalizer, attention, score_scaling: see `maths.choice`; the scaling is by
        default what makes the largest chance of a click 1.
      **numbers: of `NUMBERS`.

    Returns:
      The static half and the parameters.

    Raises:
      SettingError: an unknown keyword or a value out of range.
    """
    available = num_candidates if available is None else available
    check_sizes(num_candidates, available, slate_size, horizon, resample_documents)
    for setting, value in numbers.items():
        require_choice("keyword", setting, NUMBERS)
        require_number(setting, value, *NUMBERS[setting][1:])
    if score_scaling is None:
        score_scaling = math.exp(-1.0) if choice_model.startswith("exp") else 1.0 / max(1.0 - min_normalizer, 1e-6)
    chosen = make_choice(choice_model, no_click_mass, min_normalizer, attention, score_scaling, -1.0, 1.0)
    means: Any = np.concatenate([np.linspace(-3.0, 0.0, 14), np.linspace(0.0, 3.0, 6)])
    params = EvolutionParams(
        quality_means=jnp.asarray(means, jnp.float32),
        choice=chosen,
        candidates=jnp.int32(available),
        resample=jnp.bool_(resample_documents),
        horizon=jnp.int32(horizon),
        **{setting: jnp.float32(numbers.get(setting, NUMBERS[setting][0])) for setting in NUMBERS},
    )
    return EvolutionEnv(name, num_candidates, slate_size, len(means), horizon, choice_model), params
