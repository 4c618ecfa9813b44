"""How a user picks at most one item of a slate: proportional, logit and cascade choice. Pure, one user; vmap it.

`weigh` turns scores of all candidates into appeals, which is also what SlateQ's optimisers need; `chances` turns the
appeals of a slate into the chance of a click at each place; `pick` draws. Source: the choice models of RecSim (Ie et
al. 2019, arXiv 1909.04847). What is known on the host is checked and refused; inside compiled programs nothing can be
raised, so appeals are clipped to what a chance may be. May be used by environments and agents.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from gemsjax.errors import require, require_choice
from gemsjax.maths.slate_optimisers import Candidates
from gemsjax.types import Array

MODELS = ("proportional", "logit", "exponential_cascade", "proportional_cascade")
"""P(i) proportional to score_i - m, beside no_click_mass - m; softmax of the scores and no_click_mass; users who look
from the top and click what they look at with chance scaling exp(score), or scaling (score - m)."""


@struct.dataclass
class ChoiceParams:
    """Numbers of the choice models, all traced; each model reads its own.

    Attributes:
      no_click_mass: score of clicking nothing (proportional, logit); -inf in the latter: something is clicked.
      min_normalizer: m, the lowest score that there is (proportional ones).
      attention: chance that a place which was reached is looked at, in [0, 1] (cascades).
      score_scaling: factor of the chance of a click, at least 0 (cascades).
    """

    no_click_mass: Array | float = 1.0
    min_normalizer: Array | float = -1.0
    attention: Array | float = 1.0
    score_scaling: Array | float = 1.0


def check_choice(model: str, params: ChoiceParams, lowest: float = -math.inf, highest: float = math.inf) -> None:
    """Refuse numbers out of range; traced ones cannot be looked at.

    Args:
      model: one of `MODELS`.
      params: its numbers.
      lowest, highest: of the scores, as far as they are known; infinite where they are not.

    Raises:
      SettingError: an unknown model, a number out of range, negative weights, or chances above 1.
    """
    require_choice("choice_model", model, MODELS)
    mass, least, attention, scaling = (
        None if isinstance(value, jax.core.Tracer) else np.asarray(value)
        for value in (params.no_click_mass, params.min_normalizer, params.attention, params.score_scaling)
    )
    if model == "logit":
        require(mass is None or bool((mass < np.inf).all()), "no_click_mass", mass, "a number below infinity")
    if model == "proportional":
        fits = mass is None or least is None or bool((np.isfinite(mass) & (mass >= least)).all())
        require(fits, "no_click_mass", mass, f"a number of at least min_normalizer = {least}")
    if model.startswith("proportional") and least is not None:
        fits = bool(np.isfinite(least).all()) and (math.isinf(lowest) or bool((least <= lowest).all()))
        accepted = "a number" if math.isinf(lowest) else f"a number of at most {lowest:g}, the lowest score"
        require(fits, "min_normalizer", least, accepted)
    if model.endswith("cascade"):
        within = attention is None or bool(((attention >= 0) & (attention <= 1)).all())
        require(within, "attention", attention, "a number from 0 to 1")
        positive = scaling is None or bool((np.isfinite(scaling) & (scaling >= 0)).all())
        require(positive, "score_scaling", scaling, "a number of at least 0")
        if scaling is not None and least is not None and math.isfinite(highest):
            most = scaling * (np.exp(highest) if model.startswith("exp") else highest - least)
            accepted = f"a number that keeps the chance of a click at 1 or below, not {float(np.max(most)):g}"
            require(bool((most <= 1 + 1e-6).all()), "score_scaling", scaling, accepted)


def weigh(model: str, scores: Array, params: ChoiceParams, available: Array | None = None) -> Candidates:
    """Appeals of all candidates to one user.

    Args:
      model: one of `MODELS`.
      scores: [C]; one that is not finite counts as absent.
      params: see `ChoiceParams`.
      available: [C] bool, or None: all.

    Returns:
      Appeals [C] (of a cascade: chances of a click once looked at) and that of no click, which is infinite for a
      cascade: a click on one item does not depend on what stands below it. Absent ones are not available.

    Raises:
      SettingError: see `check_choice`; scores known on the host count as their bounds.
    """
    known = not isinstance(scores, jax.core.Tracer) and not isinstance(available, jax.core.Tracer)
    check_choice(model, params, *(_bounds(scores, available) if known else ()))
    scores = jnp.asarray(scores, jnp.float32)
    there = jnp.isfinite(scores) if available is None else available & jnp.isfinite(scores)
    scores = jnp.where(there, scores, 0.0)
    if model == "logit":
        mass = jnp.asarray(params.no_click_mass, jnp.float32)
        best = jnp.maximum(jnp.max(scores, initial=-jnp.inf, where=there), mass)
        best = jnp.where(jnp.isfinite(best), best, 0.0)
        appeal, no_click = jnp.exp(scores - best), jnp.exp(mass - best)
    elif model == "proportional":
        appeal = scores - params.min_normalizer
        no_click = jnp.asarray(params.no_click_mass - params.min_normalizer, jnp.float32)
    else:
        shifted = jnp.exp(scores) if model.startswith("exp") else scores - params.min_normalizer
        appeal, no_click = jnp.minimum(params.score_scaling * shifted, 1.0), jnp.float32(jnp.inf)
    return Candidates(jnp.where(there, jnp.maximum(appeal, 0.0), 0.0), jnp.maximum(no_click, 0.0), there)


def chances(model: str, candidates: Candidates, slate: Array, params: ChoiceParams) -> Array:
    """Chance of the click at each place of a slate; what is left to 1 is that of no click.

    Args:
      model: one of `MODELS`.
      candidates: from `weigh`, [C].
      slate: [K] places of candidates; numbers outside 0 .. C-1 and candidates that are absent are never clicked.
      params: see `ChoiceParams`.

    Returns:
      [K], of sum 1 or less.
    """
    inside = (slate >= 0) & (slate < candidates.appeal.shape[0])
    weight = jnp.where(inside, candidates.weights()[jnp.where(inside, slate, 0)], 0.0)
    if model.endswith("cascade"):
        clicked = params.attention * weight
        none_above = jnp.cumprod(1.0 - clicked)
        return clicked * jnp.concatenate([jnp.ones(1, clicked.dtype), none_above[:-1]])
    total = candidates.no_click + weight.sum()
    return weight / jnp.where(total > 0.0, total, 1.0)


def pick(uniform: Array, chance: Array) -> Array:
    """At most one click from one uniform number: chances [K] -> [K] bool."""
    place = (uniform >= jnp.cumsum(chance)).sum()
    return jnp.arange(chance.shape[0]) == place


def _bounds(scores: Any, available: Any) -> tuple[float, float]:
    """Lowest and highest score of the candidates that there are."""
    numbers = np.asarray(scores, np.float64)
    there = np.isfinite(numbers) & (True if available is None else np.asarray(available))
    return (float(numbers[there].min()), float(numbers[there].max())) if there.any() else (-math.inf, math.inf)
