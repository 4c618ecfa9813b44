"""Ranking policies, how they learn from clicks, and users to rank for; after TF-Agents' ranking bandits.

    policy = make_ranking_policy(RankingSpec(num_items=100, num_slots=5, kind="cosine"), CommonTowerScorer())
    agent = make_ranking_agent(RankingAgentSpec(feedback="cascading"), policy)
    training = make_ranking_training(env, agent, users=128)
    state, metrics = jax.jit(training.steps)(run, training.init(run), jnp.arange(1000))

`policy` draws slates, `agent` learns a scorer, `envs` has the users, `training` brings them together.
"""

from gemsjax.maths.plackett_luce import LogitHook, Penaliser
from gemsjax.nets.scorer import CommonTowerScorer, DotProductScorer
from gemsjax.ranking.agent import (
    Cascade,
    RankingAgent,
    RankingAgentHypers,
    RankingAgentSpec,
    RankingState,
    Slates,
    make_ranking_agent,
)
from gemsjax.ranking.envs import PositionBiasEnv, RankingEnv
from gemsjax.ranking.policy import (
    RankingHypers,
    RankingObservation,
    RankingPolicy,
    RankingSpec,
    RankingStep,
    make_ranking_policy,
    soft_update,
)
from gemsjax.ranking.training import RankingRun, RankingTraining, make_ranking_training, scorer_quality

__all__ = [
    "Cascade",
    "CommonTowerScorer",
    "DotProductScorer",
    "LogitHook",
    "Penaliser",
    "PositionBiasEnv",
    "RankingAgent",
    "RankingAgentHypers",
    "RankingAgentSpec",
    "RankingEnv",
    "RankingHypers",
    "RankingObservation",
    "RankingPolicy",
    "RankingRun",
    "RankingSpec",
    "RankingState",
    "RankingStep",
    "RankingTraining",
    "Slates",
    "make_ranking_agent",
    "make_ranking_policy",
    "make_ranking_training",
    "scorer_quality",
    "soft_update",
]
