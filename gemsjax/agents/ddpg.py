"""DDPG (Lillicrap et al., 2016) through a ranker, with recurrent beliefs and episode replay.

One critic, target networks, Gaussian noise on explored actions; see `deterministic.py` for what it shares with TD3.
`make_ddpg(spec, dims, ranker)` gives an `Agent`.
"""

from __future__ import annotations

import dataclasses

from flax import struct

from gemsjax.agents.base import Agent
from gemsjax.agents.deterministic import (
    DeterministicHypers,
    DeterministicSpec,
    Rule,
    make_deterministic,
    validate_hypers,
    validate_spec,
)
from gemsjax.rankers import Ranker
from gemsjax.types import Dims

__all__ = ["DDPGHypers", "DDPGSpec", "make_ddpg", "validate_hypers", "validate_spec"]


@dataclasses.dataclass(frozen=True)
class DDPGSpec(DeterministicSpec):
    """Static choices: see `DeterministicSpec`."""


@struct.dataclass
class DDPGHypers(DeterministicHypers):
    """Hyper-parameters: see `DeterministicHypers`."""


def make_ddpg(spec: DDPGSpec, dims: Dims, ranker: Ranker) -> Agent:
    """DDPG whose actions a `ranker` turns into slates.

    Raises:
      SettingError: a width below 1.
    """
    validate_spec(spec)
    return make_deterministic(spec, dims, ranker, Rule(critics=1, smooth=False, delay=1))
