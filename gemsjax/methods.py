"""Every method by name: what it is called, what it assumes, how it is built. Adding a method is one line here.

Tables, run names and command lines read this registry; so what a method assumes is written once. Called by runs.py,
experiments and anyone who wants a method by name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any

from gemsjax.agents import (
    a2c,
    constant_slate,
    ddpg,
    deterministic,
    dqn,
    ppo,
    references,
    reinforce,
    reinforce_batch,
    reinforce_softmax,
    sac,
    slateq,
    td3,
    topk_reinforce,
    wolpertinger,
)
from gemsjax.agents.base import Agent, Policy
from gemsjax.errors import require_choice
from gemsjax.train import Plan
from gemsjax.types import Dims

RANKERS = ("gems", "topk", "khead", "pl")
EMBEDDINGS = ("ideal", "mf", "random")
"""Where a method's item embeddings may come from: the simulator's own (privileged), matrix factorisation of logged
clicks, or N(0, 1)."""


@dataclasses.dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
      title: as tables print it.
      policy: `(dims) -> Policy` of a method that does not learn.
      agent: `(spec, dims, means) -> Agent` of one that does; `means` is the `Ranker` or `ClickModel` that it acts
        through, or None.
      spec, hypers: classes of its static choices and of its hyper-parameters; their defaults are the corrected variant.
      plan: its counts of training.
      published: what `--variant published` changes, by part: `{"spec": {...}, "hypers": {...}, "plan": {...}}`.
      check_spec, check_hypers: raise `SettingError` for a value out of range.
      ranker: name of the ranker that it acts through, or None.
      embeddings: where its item embeddings may come from, the default first; empty for methods without any.
      knows_simulator: is given the simulator's parameters and click model.
      privileged: sees what a real system could not (scores, user embedding, boredom, the simulator's items).
      on_policy: learns from the episodes of its own step only, so its replay holds just these.
      own_policy: its update is right only for episodes of the policy that it updates: none that are older, drawn at
        random, or learnt from before.
      least_users: episodes that an update needs at least.
      assumes: what else it takes for granted, in a table's words.
    """

    title: str
    policy: Callable[[Dims], Policy] | None = None
    agent: Callable[[Any, Dims, Any], Agent] | None = None
    spec: type | None = None
    hypers: type | None = None
    plan: Plan = Plan()
    published: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    check_spec: Callable[[Any], None] = lambda spec: None
    check_hypers: Callable[[Any], None] = lambda hypers: None
    ranker: str | None = None
    embeddings: tuple[str, ...] = ()
    knows_simulator: bool = False
    privileged: bool = False
    on_policy: bool = False
    own_policy: bool = False
    least_users: int = 1
    assumes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.privileged or not (self.knows_simulator or self.embeddings[:1] == ("ideal",)), self.title

    @property
    def directory(self) -> str:
        """Its name in run directories: `SAC_TopK_ideal` for `SAC+TopK (ideal)`."""
        return re.sub(r"\W+", "_", self.title).strip("_")

    @property
    def learns(self) -> bool:
        return self.agent is not None

    @property
    def needs_log(self) -> bool:
        """Whether something of it is pre-trained on logged data (by default, where its embeddings can be chosen)."""
        return self.ranker == "gems" or self.embeddings[:1] == ("mf",)


def _learner(module: ModuleType, make: Callable[..., Agent], spec: type, hypers: type, **about: Any) -> dict[str, Any]:
    """What a learner's file declares: its maker, classes and checks, and its published variant where it has one."""
    declared: dict[str, Any] = {
        "agent": make,
        "spec": spec,
        "hypers": hypers,
        "published": getattr(module, "PUBLISHED", {}),
    }
    for part in ("spec", "hypers"):
        declared[f"check_{part}"] = about.get(f"check_{part}") or getattr(module, f"validate_{part}")
    return declared | about


_ON_POLICY = Plan(batch_size=1, replay_capacity=1, warm_up=0)
"""One episode and one update on it."""
_STALE = {"stale": True, "update_in_warm_up": True, "warm_up": 2_000}
"""Published slips of REINFORCE: it learns from the episode before [22], and from random ones [23]."""
_DIVIDED = {"return_to_go": "divided"}
_DRAWS = "slates of independent draws"

_SAC = _learner(sac, sac.make_sac, sac.SACSpec, sac.SACHypers)
_WKNN = _learner(
    wolpertinger,
    wolpertinger.make_wknn,
    wolpertinger.WkNNSpec,
    sac.SACHypers,
    check_hypers=sac.validate_hypers,
    published=wolpertinger.PUBLISHED | {"settings": {"embeddings": "random"}},
)
_SLATEQ = _learner(slateq, slateq.make_slateq, slateq.SlateQSpec, slateq.SlateQHypers)
_SOFTMAX = _learner(
    reinforce_softmax,
    reinforce_softmax.make_reinforce_softmax,
    reinforce_softmax.SoftmaxSpec,
    reinforce_softmax.SoftmaxHypers,
    plan=_ON_POLICY,
    on_policy=True,
    published={"spec": {"credit": "published", **_DIVIDED}, "plan": _STALE},
)
_MANY = Plan(users_per_step=128, batch_size=128, replay_capacity=128, warm_up=0)
"""128 episodes and one update on them."""
_CONSTANT = _learner(
    constant_slate,
    constant_slate.make_constant_slate,
    constant_slate.ConstantSlateSpec,
    constant_slate.ConstantSlateHypers,
    plan=_MANY,
    on_policy=True,
    least_users=2,
)
_BATCH = _learner(
    reinforce_batch,
    reinforce_batch.make_reinforce_batch,
    reinforce_batch.BatchSpec,
    reinforce_batch.BatchHypers,
    plan=_MANY,
    on_policy=True,
    least_users=2,
)
_REINFORCE = _learner(
    reinforce,
    reinforce.make_reinforce,
    reinforce.ReinforceSpec,
    reinforce.ReinforceHypers,
    plan=_ON_POLICY,
    on_policy=True,
    published={"spec": _DIVIDED, "plan": _STALE},
)
_OFF_POLICY = _learner(
    topk_reinforce, topk_reinforce.make_topk_reinforce, topk_reinforce.TopKSpec, topk_reinforce.TopKHypers
)
_DQN = _learner(dqn, dqn.make_dqn, dqn.DQNSpec, dqn.DQNHypers)
_DDPG = _learner(
    ddpg,
    ddpg.make_ddpg,
    ddpg.DDPGSpec,
    ddpg.DDPGHypers,
    check_spec=deterministic.validate_spec,
    check_hypers=deterministic.validate_hypers,
)
_TD3 = _learner(td3, td3.make_td3, td3.TD3Spec, td3.TD3Hypers, check_spec=deterministic.validate_spec)
_OWN = {"plan": _MANY, "on_policy": True, "own_policy": True, "least_users": 2}
_PPO = _learner(ppo, ppo.make_ppo, ppo.PPOSpec, ppo.PPOHypers, **_OWN)
_A2C = _learner(a2c, a2c.make_a2c, a2c.A2CSpec, a2c.A2CHypers, **_OWN)

METHODS = {
    "random": Method("Random", policy=references.make_random),
    "short-term-oracle": Method("Short-term oracle", policy=references.make_short_term_oracle, privileged=True),
    "epsilon-greedy-oracle": Method(
        "Epsilon-greedy oracle", policy=references.make_epsilon_greedy_oracle, privileged=True
    ),
    "best-item-per-topic": Method("Best item per topic", policy=references.make_best_item_per_topic, privileged=True),
    "best-item-per-topic-sorted": Method(
        "Best item per topic, sorted",
        policy=partial(references.make_best_item_per_topic, by_score=True),
        privileged=True,
    ),
    "constant-slate": Method("Constant slate", assumes=("one slate suits all",), **_CONSTANT),
    "sac-gems": Method("SAC+GeMS", ranker="gems", **_SAC),
    "sac-topk-ideal": Method("SAC+TopK (ideal)", ranker="topk", embeddings=("ideal",), privileged=True, **_SAC),
    "sac-topk-mf": Method("SAC+TopK (MF)", ranker="topk", embeddings=("mf",), **_SAC),
    "sac-khead": Method("SAC+k-head", ranker="khead", embeddings=("mf", "ideal"), **_SAC),
    "sac-pl": Method("SAC+PL", ranker="pl", embeddings=("mf", "ideal"), **_SAC),
    "sac-wknn": Method("SAC+WkNN", ranker="khead", embeddings=("mf", "ideal", "random"), **_WKNN),
    "slateq": Method("SlateQ", knows_simulator=True, privileged=True, assumes=("one click a slate",), **_SLATEQ),
    "reinforce-softmax": Method("REINFORCE+SoftMax", assumes=(_DRAWS, "one click a slate"), **_SOFTMAX),
    "reinforce-batch": Method("REINFORCE (batch)", assumes=(_DRAWS,), **_BATCH),
    "reinforce-topk": Method("REINFORCE (top-K off-policy)", assumes=(_DRAWS,), **_OFF_POLICY),
    "reinforce-gems": Method("REINFORCE+GeMS", ranker="gems", **_REINFORCE),
    "ppo-gems": Method("PPO+GeMS", ranker="gems", **_PPO),
    "ppo-topk-mf": Method("PPO+TopK (MF)", ranker="topk", embeddings=("mf",), **_PPO),
    "a2c-gems": Method("A2C+GeMS", ranker="gems", **_A2C),
    "a2c-topk-mf": Method("A2C+TopK (MF)", ranker="topk", embeddings=("mf",), **_A2C),
    "dqn": Method("DQN", assumes=("a slate is worth the mean of its items",), **_DQN),
    "ddpg-gems": Method("DDPG+GeMS", ranker="gems", **_DDPG),
    "td3-gems": Method("TD3+GeMS", ranker="gems", **_TD3),
}


def method(name: str) -> Method:
    """The method called `name`.

    Raises:
      SettingError: an unknown name; the message lists all and names the closest.
    """
    require_choice("method", name, METHODS)
    return METHODS[name]


MARK = "‡"
PRIVILEGED = f"{MARK} privileged: sees what only the simulator knows"
"""The line that explains the mark below tables and pictures."""


def marked(name: str, privileged: bool, label: str = "") -> str:
    """What tables and pictures call a method: its title (or a label), and the mark of privileged information.

    Args:
      name: of the method.
      privileged: of the run, as its settings may decide (`TrainSettings.privileged`); of a reference, the registry's.
      label: instead of the title.

    Raises:
      SettingError: see `method`.
    """
    return (label or method(name).title) + (f" {MARK}" if privileged else "")


def learners() -> tuple[str, ...]:
    """Names of the methods that train."""
    return tuple(name for name, entry in METHODS.items() if entry.learns)
