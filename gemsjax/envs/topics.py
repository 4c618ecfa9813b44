"""The topic simulator of the GeMS paper: one user who clicks, gets bored of topics and drifts. Pure, one user.

`vmap` it over users (and over `TopicParams`: environments that differ in numbers only are one program). Made by
`gemsjax.make`; called by rollouts, datasets and anyone who wants a user by hand:

    env, params = gemsjax.make("focused_topdown")
    obs, state = env.reset(key, params)
    obs, state, reward, terminated, truncated, info = env.step(key, state, slate, params)

`step` = draw clicks from `click_probabilities`, then `transition`; both are public, so recorded clicks can be replayed.
Source: paper section 4.1 and appendix, in the details the published implementation (README, "Where they differ").
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from gemsjax.envs import clicks as click_model
from gemsjax.envs.queues import append, drop
from gemsjax.envs.slates import check_if_known, only_if_asked
from gemsjax.maths.randomness import normal, whole_number
from gemsjax.maths.slates import top_items
from gemsjax.types import Array, Key, Observation

USER_NORMS = ("topics", "unit")
"""What a user is divided by: the sum of its topic norms (published implementation), or its length (paper's text)."""

Info = dict[str, Array]


@struct.dataclass
class TopicParams:
    """Everything of the simulator that is a number; all leaves are arrays, so parameters can be vmapped.

    Attributes:
      item_embeddings: [I, D] float32, non-negative, D = T*S.
      item_topics: [I] int32, the topic with the largest norm in each item.
      max_score: [] the largest item norm; scores are divided by it.
      first_slate: [K] int32, what every user is shown at reset.
      examination: [K, K+1] see `clicks.examination_table`.
      relevance_offset, relevance_slope: [] relevance = sigmoid((score - offset) * slope).
      diversity_threshold, diversity_penalty: [] attractiveness is divided by the penalty when one topic fills
        `threshold` slots or more.
      boredom_threshold: [] clicks on a topic in the history that make it boring.
      boredom_duration: [] turns that boredom lasts.
      memory_window: [] turns after which a click leaves the history.
      influence: [] weight of a clicked item in the user's drift; 0 keeps users as they are.
      short_term_boost: [] factor on the topic of the latest click; 1 in all published settings.
      user_noise: [] standard deviation of a user's components over the bound that clips them (users are normalised, so
        this ratio, `user_noise / user_clip` of `gemsjax.make`, is all that counts).
      user_focus: [] power on the U(0, 1) topic weights of users.
      horizon: [] int32, turns of an episode.
    """

    item_embeddings: Array
    item_topics: Array
    max_score: Array
    first_slate: Array
    examination: Array
    relevance_offset: Array
    relevance_slope: Array
    diversity_threshold: Array
    diversity_penalty: Array
    boredom_threshold: Array
    boredom_duration: Array
    memory_window: Array
    influence: Array
    short_term_boost: Array
    user_noise: Array
    user_focus: Array
    horizon: Array


@struct.dataclass
class TopicState:
    """One user between turns.

    Attributes:
      user_embedding: [D] float32; its topic norms sum to 1 (with `user_norm` "unit", its length is 1).
      bored: [T] bool, the mask that the latest turn used.
      bored_timeout: [T] int32, turns of boredom left (`boredom_duration` where not bored).
      clicked_topics: [M] int32 queue of the latest clicks' topics, oldest first, -1 beyond its length.
      clicked_topics_length: [] int32.
      click_times: [M] int32 queue of the latest clicks' turns, oldest first, -1 beyond its length.
      click_times_length: [] int32; shorter than the topic queue, see `_remember`.
      short_term_topic: [] int32, topic of the latest click.
      time: [] int32, turns played.
    """

    user_embedding: Array
    bored: Array
    bored_timeout: Array
    clicked_topics: Array
    clicked_topics_length: Array
    click_times: Array
    click_times_length: Array
    short_term_topic: Array
    time: Array


@dataclasses.dataclass(frozen=True)
class TopicEnv:
    """The static half of the simulator; hashable, so it may be a static argument of `jit`.

    Attributes:
      name: for messages, tables and run names.
      num_items, slate_size, num_topics, topic_size, horizon: I, K, T, S, H.
      independent_clicks: whether the examination table's columns are equal.
      memory: M, how many of the latest clicks the two history queues hold.
      user_norm: one of `USER_NORMS`.
    """

    name: str
    num_items: int
    slate_size: int
    num_topics: int
    topic_size: int
    horizon: int
    independent_clicks: bool = True
    memory: int = 10
    user_norm: str = "topics"

    # -- the contract ------------------------------------------------------------------------------------------------

    def reset(self, key: Key, params: TopicParams) -> tuple[Observation, TopicState]:
        """Draw a user and its clicks on the first slate, with nothing boring yet.

        The process of the published implementation: `|clip(noise N(0, 1), -clip, clip)|` times the topic weights
        U(0, 1)^focus (their sum 1), over the user's norm. Its clicks are seen by agents but are not part of the return.

        Args:
          key: for the user and its clicks.
          params: of this environment.

        Returns:
          `(obs, state)`: `params.first_slate` [K] with its clicks [K], and the user before turn 1.
        """
        parts = (self.num_topics * self.topic_size, self.num_topics, self.slate_size, 1)
        ends = tuple(sum(parts[: i + 1]) for i in range(len(parts)))
        components, weights, luck, topic = jnp.split(jax.random.uniform(key, (ends[-1],)), ends[:-1])
        user = self._make_user(components, weights, params)
        appeal, _ = self._appeal(user, params.first_slate, params)
        clicks = click_model.sample_clicks(luck, appeal, params.examination, self.independent_clicks)
        state = self.initial_state(user, clicks, params)
        any_topic = whole_number(topic[0], self.num_topics)
        state = dataclasses.replace(state, short_term_topic=jnp.where(clicks.any(), state.short_term_topic, any_topic))
        return Observation(params.first_slate, clicks), state

    def step(
        self, key: Key, state: TopicState, slate: Array, params: TopicParams
    ) -> tuple[Observation, TopicState, Array, Array, Array, Info]:
        """One turn.

        Args:
          key: for the clicks.
          state: the user before the turn.
          slate: [K] integer; -1 stands for the oracle's item of that rank. Any other number outside the catalogue is
            never clicked and raises the flag `info["invalid_action"]`, compiled or not; `gemsjax.check_slate` refuses
            it beforehand, for slates that come from a person or a file.
          params: of this environment.

        Returns:
          `(obs, state, reward, terminated, truncated, info)`: the slate and its clicks, the user after the turn, the
          number of clicks (float32), False (users never leave), whether `horizon` turns are played, and what is
          hidden from agents: `scores` [K], `click_probabilities` [K], `bored` [T], `invalid_action` [].
        """
        slate = self.resolve(state, slate, params)
        return self.play(jax.random.uniform(key, (self.draws,)), state, slate, params)

    def initial_state(self, user_embedding: Array, clicks: Array, params: TopicParams) -> TopicState:
        """The state after the reset slate `params.first_slate` got `clicks`, for a given user.

        The clicks' topics enter the topic queue; their times do not enter the time queue (published implementation).

        Args:
          user_embedding: [D], taken as it is: not normalised.
          clicks: [K] bool or 0/1.
          params: of this environment.

        Returns:
          The user before turn 1; its short-term topic is that of the topmost click, 0 without one.
        """
        T = self.num_topics
        clicks = clicks.astype(bool)
        topics = params.item_topics[params.first_slate]
        nothing = jnp.full(self.memory, -1, jnp.int32)
        none = jnp.int32(0)
        queue, length = append(nothing, none, topics, clicks)
        return TopicState(
            user_embedding=jnp.asarray(user_embedding, jnp.float32),
            bored=jnp.zeros(T, bool),
            bored_timeout=jnp.full(T, params.boredom_duration, jnp.int32),
            clicked_topics=queue,
            clicked_topics_length=length,
            click_times=nothing,
            click_times_length=none,
            short_term_topic=_latest(topics, clicks, none),
            time=none,
        )

    def click_probabilities(self, state: TopicState, slate: Array, params: TopicParams) -> Array:
        """Probability of a click on each rank of the slate that is shown next.

        Args:
          state: the user before the turn.
          slate: [K] as in `step`. There is no flag here: numbers outside the catalogue are refused where they are
            known, and have probability 0 where they are traced (`jit`, `vmap`).
          params: of this environment.

        Returns:
          [K] float32; with a user browsing model, the marginal probabilities.

        Raises:
          DataError: see `gemsjax.check_slate`; outside of traced programs only.
        """
        slate = self.resolve(state, check_if_known(slate, self), params)
        appeal, _ = self._appeal(self._interest(_begin_turn(state, params), params), slate, params)
        return click_model.click_probabilities(appeal, params.examination, self.independent_clicks)

    def transition(self, state: TopicState, slate: Array, clicks: Array, params: TopicParams) -> TopicState:
        """The user after a slate got given clicks: boredom, histories, drift.

        Args:
          state: the user before the turn.
          slate: [K] as in `click_probabilities`; clicks on traced numbers outside the catalogue change nothing.
          clicks: [K] bool or 0/1.
          params: of this environment.

        Returns:
          The user after the turn.

        Raises:
          DataError: see `gemsjax.check_slate`; outside of traced programs only.
        """
        slate = self.resolve(state, check_if_known(slate, self), params)
        return self._finish_turn(_begin_turn(state, params), slate, clicks.astype(bool), params)

    # -- the parts of a step that rollouts call one by one -----------------------------------------------------------

    @property
    def draws(self) -> int:
        """Uniform numbers that a turn needs: one for each click."""
        return self.slate_size

    def play(
        self, uniforms: Array, state: TopicState, slate: Array, params: TopicParams
    ) -> tuple[Observation, TopicState, Array, Array, Array, Info]:
        """`step` from given uniform numbers [draws] in [0, 1), for a slate [K] of items only (-1 is invalid here)."""
        state = _begin_turn(state, params)
        appeal, scores = self._appeal(self._interest(state, params), slate, params)
        clicks = click_model.sample_clicks(uniforms, appeal, params.examination, self.independent_clicks)
        state = self._finish_turn(state, slate, clicks, params)
        info = {
            "scores": scores,
            "click_probabilities": click_model.click_probabilities(appeal, params.examination, self.independent_clicks),
            "bored": state.bored,
            "invalid_action": ~self._valid(slate).all(),
        }
        reward = clicks.sum(dtype=jnp.float32)
        return Observation(slate, clicks), state, reward, jnp.bool_(False), state.time >= params.horizon, info

    def oracle_slate(self, state: TopicState, params: TopicParams) -> Array:
        """The short-term oracle: the items with the K largest scores in the next turn, knowing its boredom: [K] int32.

        Source: what -1 stands for in the published implementation.
        """
        interest = self._interest(_begin_turn(state, params), params)
        return top_items(_scores(params.item_embeddings, interest), self.slate_size)

    def resolve(self, state: TopicState, slate: Array, params: TopicParams) -> Array:
        """Put the oracle's item of the same rank wherever `slate` [K] holds -1: [K] int32.

        Scoring the whole catalogue costs several times the rest of a turn, so it happens only if some slate asks.
        """
        return only_if_asked(partial(_substitute, self))(state, slate.astype(jnp.int32), params)

    # -- rules ---------------------------------------------------------------------------------------------------------

    def _make_user(self, components: Array, weights: Array, params: TopicParams) -> Array:
        """A user [D] from uniform numbers [D] and [T]."""
        T, S = self.num_topics, self.topic_size
        components = jnp.abs(jnp.clip(params.user_noise * normal(components.reshape(T, S)), -1.0, 1.0))
        weights = weights**params.user_focus
        user = (components * (weights / weights.sum())[:, None]).reshape(T * S)
        return user / self._norm(user)

    def _norm(self, user: Array) -> Array:
        """What a user [D] is divided by: []."""
        squares = jnp.square(user.reshape(self.num_topics, -1)).sum(axis=1)
        return jnp.sqrt(squares).sum() if self.user_norm == "topics" else jnp.sqrt(squares.sum())

    def _interest(self, state: TopicState, params: TopicParams) -> Array:
        """The user embedding as this turn sees it: bored topics masked, the short-term topic boosted."""
        boosted = jnp.arange(self.num_topics) == state.short_term_topic
        factor = jnp.where(state.bored, 0.0, jnp.where(boosted, params.short_term_boost, 1.0))
        return (state.user_embedding.reshape(self.num_topics, self.topic_size) * factor[:, None]).reshape(-1)

    def _valid(self, slate: Array) -> Array:
        return (slate >= 0) & (slate < self.num_items)

    def _appeal(self, interest: Array, slate: Array, params: TopicParams) -> tuple[Array, Array]:
        """Attractiveness and score of every slot, [K] each."""
        valid = self._valid(slate)
        items = jnp.clip(slate, 0, self.num_items - 1)
        scores = _scores(params.item_embeddings[items], interest) / params.max_score
        relevance = jax.nn.sigmoid((scores - params.relevance_offset) * params.relevance_slope)
        topics = jnp.where(valid, params.item_topics[items], -1)
        same_topic = (topics[:, None] == jnp.arange(self.num_topics)).sum(axis=0).max()
        penalty = jnp.where(same_topic >= params.diversity_threshold, params.diversity_penalty, 1.0)
        return jnp.where(valid, relevance / penalty, 0.0), jnp.where(valid, scores, 0.0)

    def _finish_turn(self, state: TopicState, slate: Array, clicks: Array, params: TopicParams) -> TopicState:
        items = jnp.clip(slate, 0, self.num_items - 1)
        clicks = clicks & self._valid(slate)
        topics = params.item_topics[items]
        state = _remember(state, topics, clicks, params)
        drifted = self._drift(state.user_embedding, params.item_embeddings[items], clicks, params)
        return dataclasses.replace(
            state, user_embedding=drifted, short_term_topic=_latest(topics, clicks, state.short_term_topic)
        )

    def _drift(self, user: Array, items: Array, clicks: Array, params: TopicParams) -> Array:
        """Pull the user [D] towards each clicked item of [K, D] in rank order, renormalising after each click."""
        for rank in range(items.shape[0]):
            pulled = (1.0 - params.influence) * user + params.influence * items[rank]
            # Without the barrier XLA computes all earlier norms again inside each later one (1.7 times the whole turn).
            norm = jax.lax.optimization_barrier(self._norm(pulled))
            user = jnp.where(clicks[rank], pulled / norm, user)
        return user


def _scores(items: Array, interest: Array) -> Array:
    """[n, D] . [D] -> [n], in full float32: a GPU's shortened products would be magnified by the relevance's slope."""
    return jnp.matmul(items, interest, precision=jax.lax.Precision.HIGHEST)


# -- one rule each -----------------------------------------------------------------------------------------------------


def _begin_turn(state: TopicState, params: TopicParams) -> TopicState:
    """Advance time and boredom: timers run down, then topics clicked too often become boring."""
    timeout = state.bored_timeout - state.bored
    bored = state.bored & (timeout > 0)
    timeout = jnp.where(bored, timeout, params.boredom_duration.astype(jnp.int32))
    topics = jnp.arange(state.bored.shape[0])
    counts = (state.clicked_topics[:, None] == topics).sum(axis=0)
    bored = bored | (counts >= params.boredom_threshold)
    return dataclasses.replace(state, bored=bored, bored_timeout=timeout, time=state.time + 1)


def _remember(state: TopicState, topics: Array, clicks: Array, params: TopicParams) -> TopicState:
    """Append this turn's clicks to both queues, then drop what is too old.

    The reset clicks are in the topic queue only, so the queues are misaligned and a drop takes the oldest topic, which
    need not be the one whose time ran out. The published numbers depend on it.
    """
    queue, length = append(state.clicked_topics, state.clicked_topics_length, topics, clicks)
    now = jnp.full_like(topics, state.time)
    times, times_length = append(state.click_times, state.click_times_length, now, clicks)
    # Times ascend, so those too old are the leading ones; -1 marks the empty tail.
    old = ((times >= 0) & (times < state.time - params.memory_window)).sum(dtype=jnp.int32)
    return dataclasses.replace(
        state,
        clicked_topics=drop(queue, old),
        clicked_topics_length=length - old,
        click_times=drop(times, old),
        click_times_length=times_length - old,
    )


def _latest(topics: Array, clicks: Array, otherwise: Array) -> Array:
    """Topic of the lowest clicked rank, `otherwise` without a click."""
    rank = jnp.where(clicks, jnp.arange(topics.shape[0]), -1).max()
    return jnp.where(rank >= 0, topics[rank], otherwise).astype(jnp.int32)


def _substitute(env: TopicEnv, state: TopicState, slate: Array, params: TopicParams) -> Array:
    return jnp.where(slate == -1, env.oracle_slate(state, params), slate)
