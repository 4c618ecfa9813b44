"""What an agent is to rollouts and training loops: frozen tuples of pure functions, sizes already bound.

Nothing callable is ever part of a state: states, hyper-parameters and ranker weights are pytrees of arrays, so they can
be vmapped over runs, donated and checkpointed. Imported by agents, rollout and training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from gemsjax.types import Array, Key, Metrics, Observation

AgentState = Any
Hypers = Any
Weights = Any
"""What is frozen while a method learns: weights of its ranker, item embeddings, a known simulator's parameters, ()."""
Noise = Any


class Acting(NamedTuple):
    """What a policy acts on, the same for every user: trained state, hyper-parameters, frozen weights."""

    state: AgentState = ()
    hypers: Hypers = ()
    weights: Weights = ()
    at_random: Array | bool = False
    """Whether training is in its warm-up, in which an exploring policy acts at random."""
    step: Array | int = 0
    """Number of the training step, for schedules of exploration."""


class Choice(NamedTuple):
    """One turn's decision: the slate [K] to show (-1: the oracle's item of that rank), the action [A] to learn from."""

    slate: Array
    action: Array


class Policy(NamedTuple):
    """How one user's slates are chosen.

    Attributes:
      start: `() -> memory` before the first observation.
      act: `(acting, memory, observation, hidden, uniforms [draws]) -> (choice, memory)`; `hidden` is None unless
        privileged.
      draws: uniform numbers that a turn needs; a rollout draws those of whole episodes outside its scan.
      privileged: sees the simulator's user and parameters, `hidden = (state, params)`; every table marks it.
      asks_oracle: may put -1 into slates, which a privileged rule of the simulator fills.
      remember: `(simulator's user after a turn) -> arrays` that a privileged agent learns from: `Episode.hidden`.
    """

    start: Callable[[], Any]
    act: Callable[[Acting, Any, Observation, Any, Array], tuple[Choice, Any]]
    draws: int = 0
    privileged: bool = False
    asks_oracle: bool = False
    remember: Callable[[Any], Any] | None = None


class Agent(NamedTuple):
    """A learner that trains on episodes, or on single transitions.

    Attributes:
      init: `(key, hypers) -> state`.
      explore: policy that collects training episodes (at random while `acting.at_random`).
      greedy: policy that is evaluated.
      draw_update: `(key, batch size) -> noise` of one update.
      update: `(acting, batch of episodes or transitions [B], noise) -> (state, metrics)`.
      shares: whether several devices may share an update: it averages over the devices what is a mean over the batch,
        and draws noise for its own share only (see `shares.py`).
    """

    init: Callable[[Key, Hypers], AgentState]
    explore: Policy
    greedy: Policy
    draw_update: Callable[[Key, int], Noise]
    update: Callable[[Acting, Any, Noise], tuple[AgentState, Metrics]]
    shares: bool = False
