"""What a privileged learner is told of the simulator: how users click. Environments make one (`envs.knowledge`).

The functions take the simulator's parameters as data (`acting.weights`) and one user at a time; the caller vmaps.
"""

from __future__ import annotations

from typing import Any, Protocol

from gemsjax.maths.slate_optimisers import Candidates
from gemsjax.types import Array, CandidateObservation

BOREDOMS = ("masked", "misplaced", "none")
"""What a user's boredom does to relevance: the bored topics count nothing; the published slip [17], which leaves out
other numbers of the user than those of the bored topics; boredom is forgotten."""


class ClickModel(Protocol):
    """A simulator's click model; hashable and without arrays.

    A model of users who are never bored takes `boredom` and does nothing with it.
    """

    def remember(self, state: Any) -> Any:
        """What relevance depends on, out of the simulator's state of one user: a pytree of arrays."""

    def candidates(self, params: Any, memory: Any, boredom: str) -> Candidates:
        """The appeal of all items to a remembered user."""

    def penalty(self, params: Any, items: Array) -> Array:
        """What the appeal of items that are shown together is divided by: [n] item numbers, -1 for none -> []."""

    def click_probabilities(self, params: Any, appeal: Array, no_click: Array) -> Array:
        """Chance of a click on each rank of a slate: appeal [K] (penalty included), v_0 [] -> [K]."""

    def choice_probabilities(self, params: Any, appeal: Array, no_click: Array, clicked: str) -> Array:
        """Chance that each rank is the choice, [K], of sum 1 or less: of the turn's clicks, `each` equally likely, or
        the `first`. Where a user clicks at most once, the chance of a click."""


class ChoiceModel(Protocol):
    """How users choose at most one item where each turn brings candidates of its own; hashable and without arrays."""

    @property
    def privileged(self) -> bool:
        """Whether it needs what is not observed of a user."""

    def remember(self, state: Any) -> Any:
        """What the choice depends on beside the observation, out of the simulator's state of one user; else ()."""

    def candidates(self, params: Any, seen: CandidateObservation, memory: Any) -> Candidates:
        """Appeal of the candidates of one turn."""

    def chances(self, params: Any, candidates: Candidates, slate: Array) -> Array:
        """Chance that each place of a slate [K] is chosen: [K]; 0 where it holds no candidate."""
