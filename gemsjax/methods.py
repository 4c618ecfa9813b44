"""Every method by name: what it is called, what it assumes, how it is built. Adding a method is one line here.

Tables, run names and command lines read this registry; so what a method assumes is written once. Called by runs.py,
experiments and anyone who wants a method by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from gemsjax.agents import references, sac
from gemsjax.agents.base import Agent, Policy
from gemsjax.errors import require_choice
from gemsjax.rankers import Ranker
from gemsjax.types import Dims


@dataclasses.dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
      title: as tables print it.
      policy: `(dims) -> Policy` of a method that does not learn.
      agent: `(spec, dims, ranker) -> Agent` of one that does.
      spec, hypers: classes of its static choices and of its hyper-parameters, with their defaults.
      check_spec, check_hypers: raise `SettingError` for a value out of range.
      ranker: name of the pre-trained ranker that it acts through, or None.
      privileged: sees what a real system could not (scores, user embedding, boredom).
    """

    title: str
    policy: Callable[[Dims], Policy] | None = None
    agent: Callable[[Any, Dims, Ranker], Agent] | None = None
    spec: type | None = None
    hypers: type | None = None
    check_spec: Callable[[Any], None] = lambda spec: None
    check_hypers: Callable[[Any], None] = lambda hypers: None
    ranker: str | None = None
    privileged: bool = False

    @property
    def directory(self) -> str:
        """Its name in run directories: `SAC_GeMS` for `SAC+GeMS`."""
        return self.title.replace("+", "_").replace(" ", "_")

    @property
    def learns(self) -> bool:
        return self.agent is not None


METHODS = {
    "random": Method("Random", policy=references.make_random),
    "short-term-oracle": Method("Short-term oracle", policy=references.make_short_term_oracle, privileged=True),
    "epsilon-greedy-oracle": Method(
        "Epsilon-greedy oracle", policy=references.make_epsilon_greedy_oracle, privileged=True
    ),
    "sac-gems": Method(
        "SAC+GeMS",
        agent=sac.make_sac,
        spec=sac.SACSpec,
        hypers=sac.SACHypers,
        check_spec=sac.validate_spec,
        check_hypers=sac.validate_hypers,
        ranker="gems",
    ),
}


def method(name: str) -> Method:
    """The method called `name`.

    Raises:
      SettingError: an unknown name; the message lists all and names the closest.
    """
    require_choice("method", name, METHODS)
    return METHODS[name]


def learners() -> tuple[str, ...]:
    """Names of the methods that train."""
    return tuple(name for name, entry in METHODS.items() if entry.learns)
