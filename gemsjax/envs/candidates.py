"""What environments have in common whose turns bring candidates of their own. For interest_evolution, _exploration."""

from __future__ import annotations

import math

import jax.numpy as jnp

from gemsjax.errors import require, require_choice, require_count, require_number
from gemsjax.maths.choice import MODELS, ChoiceParams, check_choice
from gemsjax.types import Array


def all_available(slate: Array, available: Array) -> Array:
    """Whether every place of a slate [K] holds a candidate that there is (`available` [C]): [] bool."""
    inside = (slate >= 0) & (slate < available.shape[0])
    return (inside & available[jnp.where(inside, slate, 0)]).all()


def check_sizes(num_candidates: int, available: int, slate_size: int, horizon: int, resample: bool) -> None:
    """Refuse counts out of range.

    Args:
      num_candidates: C, places for candidates.
      available: how many of them hold one, 0 .. C.
      slate_size: K, 1 .. C.
      horizon: H, turns.
      resample: whether every turn brings new candidates.

    Raises:
      SettingError: naming the count.
    """
    require_count("num_candidates", num_candidates)
    require_count("available", available, 0, num_candidates)
    require_count("slate_size", slate_size, 1, num_candidates)
    require_count("horizon", horizon)
    require(isinstance(resample, bool), "resample_documents", resample, "True or False")


def make_choice(
    model: str, mass: float, least: float, attention: float, scaling: float, lowest: float, highest: float
) -> ChoiceParams:
    """Numbers of a choice model, checked.

    Args:
      model: one of `choice.MODELS`.
      mass, least, attention, scaling: see `choice.ChoiceParams`, in its order.
      lowest, highest: of the scores, as far as they are known; infinite where they are not.

    Returns:
      [] float32 each.

    Raises:
      SettingError: see `maths.choice.check_choice`.
    """
    require_choice("choice_model", model, MODELS)
    for setting, value in (("no_click_mass", mass), ("min_normalizer", least)):
        require_number(setting, value, -math.inf, math.inf)
    for setting, value in (("attention", attention), ("score_scaling", scaling)):
        require_number(setting, value, 0.0, 1.0 if setting == "attention" else 1e6)
    params = ChoiceParams(*(jnp.float32(x) for x in (mass, least, attention, scaling)))
    check_choice(model, params, lowest, highest)
    return params
