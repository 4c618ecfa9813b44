"""RecSim's interest exploration: which of two kinds is this user? Nothing of it is observed but its clicks. Pure.

Users are of types that like topics differently, documents have a topic and a quality, which are seen; a click has the
logit affinity + quality beside that of no click. Clicks change nothing: the session goes on until it is cut off, and
the best slate holds the largest logits. Made by `gemsjax.make("interest_exploration")`, with the contract of
`TopicEnv`; a slate holds places 0 .. C-1 of the candidates in `observation.docs`. Source: RecSim (arXiv 1909.04847).
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
from gemsjax.errors import require, require_array, require_number
from gemsjax.maths import choice
from gemsjax.maths.choice import ChoiceParams
from gemsjax.maths.randomness import normal
from gemsjax.maths.slate_optimisers import Candidates
from gemsjax.types import Array, CandidateObservation, Key

Info = dict[str, Array]


@struct.dataclass
class ExplorationParams:
    """Everything of the simulator that is a number; all leaves are arrays, so parameters can be vmapped.

    Attributes:
      type_shares: [N] share of each type of user.
      affinities: [N, T] mean of the logarithm of a user's affinity to each topic, by type.
      affinity_deviation: [] its standard deviation.
      topic_shares: [T] share of each topic among documents.
      qualities: [T] mean of the logarithm of a document's quality, by topic.
      quality_deviation: [] its standard deviation.
      choice: of the choice model.
      candidates: [] int32, candidates of a turn; the other places are empty.
      resample: [] bool, new candidates every turn, or the same for a whole session.
      horizon: [] int32, turns after which a session is cut off.
    """

    type_shares: Array
    affinities: Array
    affinity_deviation: Array
    topic_shares: Array
    qualities: Array
    quality_deviation: Array
    choice: ChoiceParams
    candidates: Array
    resample: Array
    horizon: Array


@struct.dataclass
class ExplorationState:
    """One user, and the candidates of the next turn.

    Attributes:
      kind: [] int32, the type of the user.
      affinity: [T] float32, what it adds to the logit of each topic.
      topics: [C] int32, topic of each candidate.
      qualities: [C] float32.
      time: [] int32, turns played.
    """

    kind: Array
    affinity: Array
    topics: Array
    qualities: Array
    time: Array


@dataclasses.dataclass(frozen=True)
class ExplorationEnv:
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
    choice_model: str = "logit"

    @property
    def features(self) -> tuple[int, int]:
        """F and G: nothing is seen of a user; topic and quality of a candidate."""
        return 0, self.num_topics + 1

    @property
    def draws(self) -> int:
        """Uniform numbers that a turn needs: choice, new candidates."""
        return 1 + 2 * self.num_items

    def reset(self, key: Key, params: ExplorationParams) -> tuple[CandidateObservation, ExplorationState]:
        """Draw a user and its first candidates; nothing has been shown yet.

        Args:
          key: for the user's type and affinities, and for the candidates.
          params: of this environment.

        Returns:
          `(obs, state)`: the candidates, with a slate [K] of -1 and no clicks, and the user before turn 1.
        """
        uniforms = jax.random.uniform(key, (1 + self.num_topics + 2 * self.num_items,))
        kind = _drawn(uniforms[0], params.type_shares)
        luck, rest = jnp.split(uniforms[1:], [self.num_topics])
        affinity = jnp.exp(params.affinities[kind] + params.affinity_deviation * normal(luck))
        state = ExplorationState(kind, affinity, *self._candidates(rest, params), jnp.int32(0))
        nothing = jnp.full(self.slate_size, -1, jnp.int32)
        return self._observe(state, nothing, jnp.zeros(self.slate_size, bool), params), state

    def step(
        self, key: Key, state: ExplorationState, slate: Array, params: ExplorationParams
    ) -> tuple[CandidateObservation, ExplorationState, Array, Array, Array, Info]:
        """One turn: as in `EvolutionEnv.step`, but that the reward is the click, users never leave, and `info` has
        `click_probabilities` [K], `kind` [] and `invalid_action` []."""
        return self.play(jax.random.uniform(key, (self.draws,)), state, slate, params)

    def play(
        self, uniforms: Array, state: ExplorationState, slate: Array, params: ExplorationParams
    ) -> tuple[CandidateObservation, ExplorationState, Array, Array, Array, Info]:
        """`step` from given uniform numbers [draws] in [0, 1)."""
        chances = self.click_probabilities(state, slate, params)
        clicks = choice.pick(uniforms[0], chances)
        topics, qualities = self._candidates(uniforms[1:], params)
        after = dataclasses.replace(
            state,
            topics=jnp.where(params.resample, topics, state.topics),
            qualities=jnp.where(params.resample, qualities, state.qualities),
            time=state.time + 1,
        )
        info = {
            "click_probabilities": chances,
            "kind": state.kind,
            "invalid_action": ~all_available(slate, self._available(params)),
        }
        reward, truncated = clicks.any().astype(jnp.float32), after.time >= params.horizon
        return self._observe(after, slate, clicks, params), after, reward, jnp.bool_(False), truncated, info

    def candidates(self, state: ExplorationState, params: ExplorationParams) -> Candidates:
        """Appeal of the candidates to the user: [C]."""
        return self.weigh(state.affinity[state.topics] + state.qualities, params)

    def weigh(self, logits: Array, params: ExplorationParams) -> Candidates:
        """Appeal of candidates with these logits: [C] -> [C]."""
        return choice.weigh(self.choice_model, logits, params.choice, self._available(params))

    def click_probabilities(self, state: ExplorationState, slate: Array, params: ExplorationParams) -> Array:
        """Chance of the click at each place if `slate` [K] is shown next: [K]; 0 where it holds no candidate."""
        return choice.chances(self.choice_model, self.candidates(state, params), slate, params.choice)

    def _available(self, params: ExplorationParams) -> Array:
        return jnp.arange(self.num_items) < params.candidates

    def _candidates(self, uniforms: Array, params: ExplorationParams) -> tuple[Array, Array]:
        """Topics and qualities [C] from 2 C uniform numbers."""
        which, luck = jnp.split(uniforms, 2)
        topics = jax.vmap(lambda uniform: _drawn(uniform, params.topic_shares))(which)
        return topics, jnp.exp(params.qualities[topics] + params.quality_deviation * normal(luck))

    def _observe(
        self, state: ExplorationState, slate: Array, clicks: Array, params: ExplorationParams
    ) -> CandidateObservation:
        available = self._available(params)
        topics = jax.nn.one_hot(state.topics, self.num_topics)
        docs = jnp.concatenate([topics, state.qualities[:, None]], axis=1) * available[:, None]
        return CandidateObservation(jnp.zeros(0), docs, available, slate.astype(jnp.int32), clicks)


def _drawn(uniform: Array, shares: Array) -> Array:
    """A category from one uniform number and shares [n] of sum 1: [] int32."""
    above = (uniform >= jnp.cumsum(shares)).sum(dtype=jnp.int32)
    return jnp.minimum(above, shares.shape[0] - 1)


def interest_exploration(
    name: str,
    *,
    num_candidates: int = 10,
    available: int | None = None,
    slate_size: int = 2,
    horizon: int = 100,
    resample_documents: bool = True,
    choice_model: str = "logit",
    no_click_mass: float = 5.0,
    min_normalizer: float = 0.0,
    attention: float = 1.0,
    score_scaling: float = 0.005,
    type_shares: Any = (0.3, 0.7),
    affinities: Any = ((0.1, 0.7), (0.7, 0.1)),
    affinity_deviation: float = 0.1,
    topic_shares: Any = (0.2, 0.8),
    qualities: Any = (0.8, 0.2),
    quality_deviation: float = 0.1,
) -> tuple[ExplorationEnv, ExplorationParams]:
    """Interest exploration with any settings.

    Args:
      name: of the environment.
      num_candidates: C, places for candidates; `available` of them hold one (all by default).
      slate_size: K, at most C.
      horizon: H, turns after which a session is cut off; nothing else ends one.
      resample_documents: new candidates every turn.
      choice_model, no_click_mass, min_normalizer, attention, score_scaling: see `maths.choice`. Logits here have no
        highest value, so a cascade's chances of a click are cut off at 1.
      type_shares, affinities, affinity_deviation, topic_shares, qualities, quality_deviation: see `ExplorationParams`.

    Returns:
      The static half and the parameters.

    Raises:
      SettingError: a value out of range, or shapes that do not belong together.
    """
    available = num_candidates if available is None else available
    check_sizes(num_candidates, available, slate_size, horizon, resample_documents)
    for setting, value in (("affinity_deviation", affinity_deviation), ("quality_deviation", quality_deviation)):
        require_number(setting, value, 0.0, 10.0)
    types, topics = _shares("type_shares", type_shares), _shares("topic_shares", topic_shares)
    means = _numbers("affinities", affinities, (types.size, topics.size))
    chosen = make_choice(choice_model, no_click_mass, min_normalizer, attention, score_scaling, 0.0, math.inf)
    params = ExplorationParams(
        type_shares=jnp.asarray(types),
        affinities=jnp.asarray(means),
        affinity_deviation=jnp.float32(affinity_deviation),
        topic_shares=jnp.asarray(topics),
        qualities=jnp.asarray(_numbers("qualities", qualities, (topics.size,))),
        quality_deviation=jnp.float32(quality_deviation),
        choice=chosen,
        candidates=jnp.int32(available),
        resample=jnp.bool_(resample_documents),
        horizon=jnp.int32(horizon),
    )
    return ExplorationEnv(name, num_candidates, slate_size, topics.size, horizon, choice_model), params


def _numbers(setting: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.asarray(value, np.float32)
    except (TypeError, ValueError):
        array = np.zeros(0, np.float32)
    fits = array.shape == shape and bool((np.abs(array) <= 5.0).all())
    require(fits, setting, value, f"numbers from -5 to 5 of shape {shape}")
    return array


def _shares(setting: str, value: Any) -> np.ndarray:
    accepted = "shares of at least 0 with sum 1"
    array = require_array(setting, value, accepted).astype(np.float32)
    fits = array.ndim == 1 and array.size > 0 and bool((array >= 0).all()) and abs(float(array.sum()) - 1.0) < 1e-4
    require(fits, setting, value, accepted)
    return array
