"""RecSim's agents by name: SlateQ's ways to put slates together, serving and in targets; myopic, random, full-slate.

`slate_<serving>_<target>_q` are the off-policy ones (QL-TT-TS and so on in the paper), `slate_<serving>_sarsa` the
on-policy ones, `myopic_*` these without a future. Called by whoever builds agents for candidates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from gemsjax.agents.base import Agent
from gemsjax.agents.candidate_slateq import CandidateHypers, CandidateSpec, make_candidate_slateq, validate_hypers
from gemsjax.agents.click_model import ChoiceModel
from gemsjax.agents.full_slateq import make_full_slateq
from gemsjax.errors import require_choice
from gemsjax.types import CandidateDims

Make = Callable[[CandidateSpec, CandidateDims, ChoiceModel], Agent]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One named agent.

    Attributes:
      title: as tables print it.
      spec: what it changes of a `CandidateSpec`.
      hypers: what it changes of `CandidateHypers`.
      make: of the agent.
      learns: whether training changes what it does.
    """

    title: str
    spec: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    hypers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    make: Make = make_candidate_slateq
    learns: bool = True


def _slateq(title: str, serving: str, target: str, **hypers: float) -> Variant:
    return Variant(title, {"serving": serving, "target": target}, hypers)


VARIANTS = {
    "dp_random": Variant(
        "random",
        {"serving": "greedy", "target": "sarsa"},
        {"first_epsilon": 1.0, "last_epsilon": 1.0, "test_epsilon": 1.0},
        learns=False,
    ),
    "myopic_slate_topk_sarsa": _slateq("myopic, top K", "topk", "sarsa", gamma=0.0),
    "myopic_slate_greedy_sarsa": _slateq("myopic, greedy", "greedy", "sarsa", gamma=0.0),
    "slate_topk_sarsa": _slateq("SARSA-TS", "topk", "sarsa"),
    "slate_greedy_sarsa": _slateq("SARSA-GS", "greedy", "sarsa"),
    "slate_topk_topk_q": _slateq("QL-TT-TS", "topk", "topk"),
    "slate_greedy_greedy_q": _slateq("QL-GT-GS", "greedy", "greedy"),
    "slate_topk_optimal_q": _slateq("QL-OT-TS", "topk", "exact"),
    "slate_greedy_optimal_q": _slateq("QL-OT-GS", "greedy", "exact"),
    "slate_optimal_optimal_q": _slateq("QL-OT-OS", "exact", "exact"),
    "full_slate_q": Variant("full-slate Q", make=make_full_slateq),
}


def variant(name: str) -> Variant:
    """The agent called `name`.

    Raises:
      SettingError: an unknown name; the message lists all and names the closest.
    """
    require_choice("agent", name, VARIANTS)
    return VARIANTS[name]


def make_named(
    name: str,
    dims: CandidateDims,
    model: ChoiceModel,
    spec: CandidateSpec | None = None,
    hypers: CandidateHypers | None = None,
) -> tuple[Agent, CandidateHypers]:
    """An agent by name, and its hyper-parameters.

    Args:
      name: of `VARIANTS`.
      dims, model: of the environment.
      spec, hypers: what the name does not say (widths, optimiser, rates); the defaults otherwise.

    Raises:
      SettingError: an unknown name, or a setting out of range.
    """
    found = variant(name)
    hypers = dataclasses.replace(CandidateHypers() if hypers is None else hypers, **found.hypers)
    validate_hypers(hypers)
    return found.make(dataclasses.replace(spec or CandidateSpec(), **found.spec), dims, model), hypers
