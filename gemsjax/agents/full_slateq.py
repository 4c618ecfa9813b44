"""Q-learning over whole slates: a value for every ordered slate of the candidates. What SlateQ's decomposition saves.

`make_full_slateq(spec, dims, model)` gives an `Agent` that learns from `Transition`s; the network sees user and
candidates in their order and has C! / (C - K)! outputs. It needs no choice model, and every turn teaches, clicked or
not: reward + gamma max Q(s', .) of the target network. RecSim's comparison for SlateQ (arXiv 1909.04847).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemsjax.agents.base import Acting, Agent
from gemsjax.agents.candidate_slateq import CandidateSpec, mean_square, q_agent, validate_spec
from gemsjax.agents.click_model import ChoiceModel
from gemsjax.errors import require, require_count
from gemsjax.maths.slates import best_item
from gemsjax.nets.mlp import MLP
from gemsjax.types import Array, CandidateDims, CandidateObservation, Metrics, Params, Transition

MOST_SLATES = 20_000
"""More outputs than this are refused."""


def slates_of(dims: CandidateDims) -> np.ndarray:
    """All ordered slates: [n, K] int32."""
    return np.array(list(itertools.permutations(range(dims.candidates), dims.slate_size)), np.int32)


def make_full_slateq(spec: CandidateSpec, dims: CandidateDims, _model: ChoiceModel | None = None) -> Agent:
    """Q-learning over whole slates; `serving` and `target` have no meaning here, and no choice model is asked.

    Raises:
      SettingError: see `validate_spec`; a slate larger than the candidates, or too many slates.
    """
    validate_spec(spec)
    require_count("slate_size", dims.slate_size, 1, dims.candidates)
    count = math.perm(dims.candidates, dims.slate_size)
    require(count <= MOST_SLATES, "slate_size", dims.slate_size, f"at most {MOST_SLATES} slates, not {count}")
    slates = slates_of(dims)
    network = MLP((*spec.hidden, count))

    def q(params: Params, seen: CandidateObservation) -> Array:
        docs = jnp.where(seen.available[:, None], seen.docs, 0.0)  # places of no candidate may hold anything
        return network.apply({"params": params}, jnp.concatenate([seen.user, docs.reshape(-1)]))

    def best_of(values: Array, available: Array) -> tuple[Array, Array]:
        """Number and value of the best slate with as many candidates as there can be; worth 0 without any."""
        filled = available[slates].sum(axis=1)
        number = best_item(jnp.where(filled == filled.max(), values, -jnp.inf))
        return number, jnp.where(filled.max() > 0, values[number], 0.0)

    def best(acting: Acting, seen: CandidateObservation, _memory: Any) -> Array:
        return jnp.asarray(slates)[best_of(q(acting.state.params, seen), seen.available)[0]]

    def loss(params: Params, acting: Acting, batch: Transition) -> tuple[Array, Metrics]:
        hypers: Any = acting.hypers
        following = lambda seen: best_of(q(acting.state.target, seen), seen.available)[1]  # noqa: E731
        values = jax.vmap(following)(batch.next_seen)
        target = batch.reward + hypers.gamma * jnp.where(batch.terminated, 0.0, values)
        same = (batch.slate[:, None, :] == slates).all(axis=2)
        teaches = batch.valid & same.any(axis=1) & jnp.isfinite(target)
        # What is no number teaches nothing, and does not reach the network, whose gradients it would spoil.
        user, docs, available = batch.seen.user, batch.seen.docs, batch.seen.available
        teaches &= jnp.isfinite(user).all(axis=1) & (jnp.isfinite(docs).all(axis=2) | ~available).all(axis=1)
        user, docs = jnp.where(teaches[:, None], user, 0.0), jnp.where(teaches[:, None, None], docs, 0.0)
        values = jax.vmap(lambda seen: q(params, seen))(batch.seen._replace(user=user, docs=docs))
        found = jnp.where(same, values, 0.0).sum(axis=1)
        error = found - jax.lax.stop_gradient(jnp.where(teaches, target, 0.0))
        mean_q = jnp.where(teaches, found, 0.0).sum() / jnp.maximum(teaches.sum(), 1)
        return mean_square(error, teaches), {"q": mean_q, "taught": teaches.mean()}

    return q_agent(spec, dims, None, network, dims.user + dims.candidates * dims.doc, best, loss)
