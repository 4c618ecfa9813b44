"""TD3 (Fujimoto et al., 2018) through a ranker, with recurrent beliefs and episode replay.

DDPG with two critics of which targets take the smaller value, noise on the target policy's actions, and an actor (and
targets) updated less often than the critics; see `deterministic.py`. `make_td3(spec, dims, ranker)` gives an `Agent`.
"""

from __future__ import annotations

import dataclasses

from flax import struct

from gemsjax.agents import deterministic
from gemsjax.agents.base import Agent
from gemsjax.agents.deterministic import DeterministicHypers, DeterministicSpec, Rule, validate_spec
from gemsjax.rankers import Ranker
from gemsjax.types import Dims

__all__ = ["TD3Hypers", "TD3Spec", "make_td3", "validate_hypers", "validate_spec"]


@dataclasses.dataclass(frozen=True)
class TD3Spec(DeterministicSpec):
    """Static choices: those of `DeterministicSpec`, and

    Attributes:
      delay: updates of the critics for one of the actor and of the targets.
    """

    delay: int = 2


@struct.dataclass
class TD3Hypers(DeterministicHypers):
    """Hyper-parameters: those of `DeterministicHypers`, and

    Attributes:
      smoothing: standard deviation of the noise on the target policy's actions, in half ranges of the box.
      smoothing_clip: the largest such noise.
    """

    smoothing: float = 0.2
    smoothing_clip: float = 0.5


def validate_hypers(hypers: TD3Hypers) -> None:
    """Raise `SettingError` for a hyper-parameter outside its range (host-side numbers only)."""
    deterministic.validate_hypers(hypers, positive=("smoothing", "smoothing_clip"))


def make_td3(spec: TD3Spec, dims: Dims, ranker: Ranker) -> Agent:
    """TD3 whose actions a `ranker` turns into slates.

    Raises:
      SettingError: a count below 1.
    """
    validate_spec(spec)
    return deterministic.make_deterministic(spec, dims, ranker, Rule(critics=2, smooth=True, delay=spec.delay))
