"""Training a ranking policy on users of a ranking environment, and judging it: any number of steps is one program.

`make_ranking_training(env, agent, users)` gives pure functions over one run; `vmap` them over `Run`s that differ in
seed, hyper-parameters or the environment's numbers. Randomness: step n draws from `fold_in(key, n)`, so results do not
depend on how steps are cut, and runs of one key meet the same users. Called by experiments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from gemsjax.errors import require, require_count
from gemsjax.maths.plackett_luce import mean_pairwise_cosine
from gemsjax.ranking.agent import RankingAgent, RankingAgentHypers, RankingState, Slates
from gemsjax.ranking.policy import RankingObservation, RankingStep, usable_items
from gemsjax.types import Array, Key, Metrics, Params

INIT = 2**32 - 1
"""Where steps have their number, initialisation has this."""


@struct.dataclass
class RankingRun:
    """The data of one run; may carry a run axis.

    Attributes:
      key: of the run.
      hypers: of agent and policy.
      env_params: of the environment.
    """

    key: Key
    hypers: RankingAgentHypers
    env_params: Any


class RankingTraining(NamedTuple):
    """Pure functions, sizes bound.

    Attributes:
      init: `(run) -> state`.
      steps: `(run, state, numbers [n]) -> (state, metrics [n])`: each meets new users, shows slates, learns from them.
        Metrics are of the policy before it learns: the `loss`, `clicks` of a slate, `similarity` (mean cosine of its
        pairs) and what `scorer_quality` tells.
    """

    init: Callable[[RankingRun], RankingState]
    steps: Callable[[RankingRun, RankingState, Array], tuple[RankingState, Metrics]]


def make_ranking_training(env: Any, agent: RankingAgent, users: int) -> RankingTraining:
    """Bind an environment of `ranking.envs`, an agent, and how many users come in a step.

    Raises:
      SettingError: sizes that differ, or feedback that the agent does not learn from.
    """
    require_count("users", users)
    sizes, wanted = (env.num_items, env.num_slots), (agent.policy.spec.num_items, agent.policy.spec.num_slots)
    require(sizes == wanted, "num_items, num_slots", wanted, f"those of the environment, {sizes}")
    told = getattr(env, "feedback", "score_vector")
    fits = (told == "score_vector") == (agent.spec.feedback == "score_vector")
    require(fits, "feedback", agent.spec.feedback, f"that of the environment, {told}")

    def init(run: RankingRun) -> RankingState:
        shape = jax.eval_shape(lambda: env.reset(run.key, run.env_params)[0])
        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)
        return agent.init(jax.random.fold_in(run.key, INIT), blank)

    def meet(run: RankingRun, variables: Params, keys: Key) -> tuple[RankingObservation, RankingStep, Any]:
        """One user's observation, slate and response, from three keys."""
        observation, state = env.reset(keys[0], run.env_params)
        step = agent.policy.action(variables, run.hypers, observation, keys[1])
        return observation, step, env.respond(keys[2], state, step.action, run.env_params)

    def one(run: RankingRun, state: RankingState, number: Array) -> tuple[RankingState, Metrics]:
        keys = jax.random.split(jax.random.fold_in(run.key, number), (users, 3))
        observation, step, response = jax.vmap(lambda keys: meet(run, state.variables, keys))(keys)
        shown = jax.vmap(lambda items, slate: items[slate])(observation.items, step.action)
        true = jax.vmap(lambda state: env.relevance(state, run.env_params))(observation)
        judge = lambda seen, scores, true: scorer_quality(scores, true, usable_items(seen), env.num_slots)  # noqa: E731
        quality = jax.vmap(judge)(observation, step.predicted_rewards_mean, true)
        told = {
            "clicks": response.clicks.sum(axis=-1).astype(jnp.float32),
            "similarity": jax.vmap(mean_pairwise_cosine)(shown, step.valid),
        }
        state, metrics = agent.update(state, run.hypers, Slates(observation.user, shown, response.feedback, step.valid))
        return state, metrics | {name: value.mean() for name, value in (told | quality).items()}

    def steps(run: RankingRun, state: RankingState, numbers: Array) -> tuple[RankingState, Metrics]:
        return jax.lax.scan(lambda state, number: one(run, state, number), state, numbers)

    return RankingTraining(init, steps)


def scorer_quality(scores: Array, true: Array, there: Array, size: int) -> Metrics:
    """How well scores [N] know what items are worth, [N], among those that there are, [N] bool.

    `correlation` is Pearson's, 0 where either does not vary; `recovered` the mean worth of the `size` best items by
    score on a scale from the mean of all items (0) to the best possible (1); `error` the mean absolute difference of
    score and worth. Each is one number, 0 if there is no item; items whose score or worth is not finite do not count.
    """
    there = there & jnp.isfinite(scores) & jnp.isfinite(true)
    number = jnp.maximum(there.sum(), 1)
    mean = lambda x: jnp.where(there, x, 0.0).sum() / number  # noqa: E731
    scores, true = jnp.where(there, scores, 0.0), jnp.where(there, true, 0.0)
    apart = scores - mean(scores), true - mean(true)
    spread = mean(jnp.square(apart[0])) * mean(jnp.square(apart[1]))
    correlation = mean(apart[0] * apart[1]) / jnp.sqrt(jnp.where(spread > 0.0, spread, 1.0))
    slots = jnp.arange(size) < there.sum()

    def worth_of_best(by: Array) -> Array:
        best = jax.lax.top_k(jnp.where(there, by, -jnp.inf), size)[1]
        return jnp.where(slots, true[best], 0.0).sum() / jnp.maximum(slots.sum(), 1)

    gain, possible = worth_of_best(scores) - mean(true), worth_of_best(true) - mean(true)
    recovered = jnp.where(possible > 0.0, gain / jnp.where(possible > 0.0, possible, 1.0), 0.0)
    return {
        "correlation": jnp.where(spread > 0.0, correlation, 0.0),
        "recovered": recovered,
        "error": mean(jnp.abs(scores - true)),
    }
