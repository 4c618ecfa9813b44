"""What a person asks for when training: plain frozen dataclasses with defaults, checked before anything compiles.

Command lines are made from these classes; run directories hold them as `config.json`. Imported by runs.py, experiments.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from gemsjax import methods
from gemsjax.envs.registry import make, require_catalogue
from gemsjax.errors import DataError, is_number, is_whole, require, require_choice, require_count
from gemsjax.evaluate import USER_STREAMS
from gemsjax.pretrain.gems import NOISES, GeMSHypers, GeMSSpec
from gemsjax.pretrain.matrix_factorisation import MFSettings, check_mf
from gemsjax.train import Plan, validate_plan
from gemsjax.types import Dims

PUBLISHED_SEEDS = (
    58407201, 496912423, 2465781, 300029, 215567, 23437561, 309081907, 548260111, 51941177, 212407167,
)  # fmt: skip
"""The ten seeds of the paper's tables."""


@dataclasses.dataclass(frozen=True)
class GeMSSettings:
    """Pre-training of the slate VAE and the logged data that it learns from.

    Attributes:
      beta: weight of the KL term.
      click_weight: weight of the click reconstruction (the paper's lambda).
      latent_dim: numbers in a latent action.
      item_dim: width of the item embeddings.
      hidden: widths of the encoder's hidden layers.
      rate: Adam's learning rate.
      batch_size: slates an update.
      epochs: passes over the training slates.
      noise: 'deviation', or 'variance' as in the published code.
      shuffle: a new order of the slates each epoch; the published code has none.
      users: logged users; the first tenth validates.
      epsilon: share of random items in the slates of the oracle that logs.
      drawn: when acting, exploring slates are drawn from the decoder's softmax, slot by slot; else the best item is
        taken in every slot, as in tests.
    """

    beta: float = 1.0
    click_weight: float = 0.5
    latent_dim: int = 32
    item_dim: int = 20
    hidden: tuple[int, ...] = (512, 256)
    rate: float = 1e-3
    batch_size: int = 256
    epochs: int = 10
    noise: str = "deviation"
    shuffle: bool = True
    users: int = 100_000
    epsilon: float = 0.5
    drawn: bool = False

    @property
    def spec(self) -> GeMSSpec:
        return GeMSSpec(self.latent_dim, self.item_dim, self.hidden, self.batch_size, self.noise, self.shuffle)

    @property
    def hypers(self) -> GeMSHypers:
        return GeMSHypers(self.beta, self.click_weight, self.rate)

    def pretraining(self) -> dict[str, Any]:
        """What decides the pre-trained weights."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "drawn"}


@dataclasses.dataclass(frozen=True)
class PLSettings:
    """How the Plackett-Luce ranker makes slates.

    Attributes:
      temperature: by which an item's product with the query is divided, but not the penalty.
      penalty: factor of 1 + cosine with the most similar item above; 0 for none.
      drawn: exploring slates are drawn; else the best item is taken in every slot, as in tests.
    """

    temperature: float = 0.1
    penalty: float = 0.0
    drawn: bool = True


_BY_METHOD: Any = None
TRAJECTORIES, EPOCH_TRAJECTORIES = 100_000, 1_000
"""Of training, and between validations (paper, section 5.1)."""
VARIANTS = ("corrected", "published")
_PUBLISHED: dict[str, dict[str, Any]] = {
    "plan": {"common_users": True},
    "gems": {"noise": "variance", "shuffle": False},
    "mf": {"validation": "training"},
}
"""What the published variant changes for every method; `Method.published` adds what it changes for one."""


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """One training run.

    What is None is filled in by `resolved`: the method's defaults in the variant.

    Attributes:
      method: name of a method that learns.
      variant: `corrected`, or `published`: with the published implementation's slips (README, "Where they differ").
      env: name of an environment.
      seed: seed of the run, its pre-training included.
      steps: training steps; each collects episodes and updates, by default one of both. By default as many as the
        paper's 100,000 trajectories take where a step collects the method's usual number.
      epoch_steps: steps between validations (and checkpoints); by default those of the paper's 1,000 trajectories. Runs
        with 128 users a step that were begun when it was 1,000 for all go on with that: `epoch_steps=1000`.
      test_users: users of the test at the end.
      catalogue: file or name of item embeddings instead of the environment's own.
      env_settings: constants of the environment to change, such as `influence 0.05`, `slate_size 5`, `user_norm unit`.
      test_stream: population of the test: `test`, or as published [19] `training`, users that training met too.
      embeddings: source of the item embeddings, for methods that have any: a name that the method accepts, or in place
        of `mf` a file of them.
      plan: counts of training.
      hypers: the method's hyper-parameters.
      spec: the method's static choices.
      gems: pre-training, for methods that act through GeMS.
      mf: matrix factorisation, for methods on such embeddings.
      pl: slates, for methods that act through the Plackett-Luce ranker.
    """

    method: str = "sac-gems"
    variant: str = "corrected"
    env: str = "focused_topdown"
    seed: int = PUBLISHED_SEEDS[0]
    steps: int = _BY_METHOD
    epoch_steps: int = _BY_METHOD
    test_users: int = 500
    catalogue: str | None = None
    env_settings: dict[str, int | float | str] = dataclasses.field(default_factory=dict)
    test_stream: str = _BY_METHOD
    embeddings: str | None = None
    plan: Plan = _BY_METHOD
    hypers: Any = None
    spec: Any = None
    gems: GeMSSettings = _BY_METHOD
    mf: MFSettings = _BY_METHOD
    pl: PLSettings | None = None

    def resolved(self) -> TrainSettings:
        """The same with the method's own defaults where `hypers` or `spec` is None, checked.

        Raises:
          SettingError: naming the setting, its value and what is accepted.
        """
        entry = methods.method(self.method)
        require(entry.learns, "method", self.method, f"one that learns: {', '.join(methods.learners())}")
        usual = defaults(self.method, self.variant)
        missing = {name: value for name, value in usual.items() if getattr(self, name) is None}
        filled = dataclasses.replace(self, **missing)
        _check(filled, entry)
        return _in_python(filled)

    @property
    def privileged(self) -> bool:
        """Whether the run sees what a real system could not."""
        return methods.method(self.method).privileged or self.embeddings == "ideal"

    @property
    def log(self) -> GeMSSettings | MFSettings:
        """Whose `users` and `epsilon` describe the logged data that the run's pre-training learns from."""
        return self.gems if methods.method(self.method).ranker == "gems" else self.mf

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be continued: everything but how long to train and whom to test on."""
        config = dataclasses.asdict(self)
        for free in ("steps", "test_users", "test_stream"):
            del config[free]
        # As before there were these.
        if self.pl is None:
            del config["pl"]
        if self.gems is not None and not self.gems.drawn:
            del config["gems"]["drawn"]
        return config


def defaults(method: str, variant: str) -> dict[str, Any]:
    """What a method's settings are in a variant: `plan, hypers, spec, gems, mf, pl, embeddings, test_stream, steps` and
    `epoch_steps` by name.

    Raises:
      SettingError: an unknown method or variant.
    """
    require_choice("variant", variant, VARIANTS)
    entry = methods.method(method)
    assert entry.hypers is not None and entry.spec is not None
    parts: dict[str, Any] = {
        "plan": entry.plan,
        "hypers": entry.hypers(),
        "spec": entry.spec(),
        "gems": GeMSSettings(),
        "mf": MFSettings(),
    }
    plain: dict[str, Any] = {"embeddings": entry.embeddings[0] if entry.embeddings else None, "test_stream": "test"}
    plain["pl"] = PLSettings() if entry.ranker == "pl" else None
    for name, trajectories in (("steps", TRAJECTORIES), ("epoch_steps", EPOCH_TRAJECTORIES)):
        plain[name] = -(-trajectories // entry.plan.users_per_step)
    if variant == "published":
        for part, value in parts.items():
            changes = {**_PUBLISHED.get(part, {}), **entry.published.get(part, {})}
            parts[part] = dataclasses.replace(value, **changes)
        plain |= {"test_stream": "training", **entry.published.get("settings", {})}
    return parts | plain


def _in_python(value: Any) -> Any:
    """The same settings with NumPy's numbers as Python's, which a run's files can hold."""
    if isinstance(value, np.generic):
        return value.item()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _in_python(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    if isinstance(value, dict):
        return {name: _in_python(inner) for name, inner in value.items()}
    return tuple(_in_python(inner) for inner in value) if type(value) is tuple else value


def _check(settings: TrainSettings, entry: methods.Method) -> None:
    require_count("seed", settings.seed, 0, 2**32 - 1)
    require_count("steps", settings.steps)
    require_count("epoch_steps", settings.epoch_steps)
    require_count("test_users", settings.test_users)
    for own, flag in (("name", "--env"), ("catalogue", "--catalogue")):
        given = settings.env_settings.get(own)
        require(given is None, f"env_settings.{own}", given, f"it is set by {flag}")
    validate_plan(settings.plan)
    _check_policy(settings.plan, entry)
    entry.check_spec(settings.spec)
    entry.check_hypers(settings.hypers)
    require_choice("test_stream", settings.test_stream, USER_STREAMS)
    accepted = f"one of {', '.join(entry.embeddings)}" if entry.embeddings else f"nothing: {entry.title} has none"
    is_file = "mf" in entry.embeddings and Path(settings.embeddings or "").suffix != ""
    known = is_file or settings.embeddings in (entry.embeddings or (None,))
    require(known, "embeddings", settings.embeddings, accepted + (", or a file" if "mf" in entry.embeddings else ""))
    if entry.ranker == "gems":
        check_gems(settings.gems)
    if settings.embeddings == "mf":
        check_mf(settings.mf)
    require((settings.pl is not None) == (entry.ranker == "pl"), "pl", settings.pl, f"nothing: {entry.title} has none")
    if settings.pl is not None:
        temperature, penalty = settings.pl.temperature, settings.pl.penalty
        fits = is_number(temperature) and 0.0 < temperature < math.inf
        require(fits, "pl.temperature", temperature, "a finite number above 0")
        fits = is_number(penalty) and 0.0 <= penalty < math.inf
        require(fits, "pl.penalty", penalty, "a finite number of at least 0")


def _check_policy(plan: Plan, entry: methods.Method) -> None:
    users = plan.users_per_step
    if entry.on_policy:
        for name in ("batch_size", "replay_capacity"):
            accepted = f"users_per_step = {users}: {entry.title} learns from the episodes of its own step"
            require(getattr(plan, name) == users, name, getattr(plan, name), accepted)
    if entry.own_policy:
        for name, only in (("stale", False), ("update_in_warm_up", False), ("updates_per_step", 1)):
            accepted = f"only {only}, since {entry.title} learns once from each episode, of the policy that it updates"
            require(getattr(plan, name) == only, name, getattr(plan, name), accepted)
    require_count("batch_size", plan.batch_size, entry.least_users)


def check_gems(gems: GeMSSettings) -> None:
    """Raise `SettingError` for a setting of pre-training outside its range."""
    for name in ("epochs", "latent_dim", "item_dim", "batch_size"):
        require_count(f"gems.{name}", getattr(gems, name))
    listed = isinstance(gems.hidden, tuple) and len(gems.hidden) > 0
    widths = listed and all(is_whole(width) and width >= 1 for width in gems.hidden)
    require(widths, "gems.hidden", gems.hidden, "a tuple of one width or more, each a whole number of at least 1")
    require_count("gems.users", gems.users, 10)
    for name in ("beta", "click_weight"):
        value = getattr(gems, name)
        require(is_number(value) and 0.0 <= value < 1e30, f"gems.{name}", value, "a finite number of at least 0")
    require_choice("gems.noise", gems.noise, NOISES)
    require(isinstance(gems.drawn, bool), "gems.drawn", gems.drawn, "True or False")
    require(is_number(gems.rate) and 0.0 < gems.rate < 1.0, "gems.rate", gems.rate, "a number in (0, 1)")
    share = is_number(gems.epsilon) and 0.0 <= gems.epsilon <= 1.0
    require(share, "gems.epsilon", gems.epsilon, "a probability")


def from_config(config: dict[str, Any]) -> TrainSettings:
    """Settings from a run directory's `config.json`.

    Raises:
      DataError: keys that this version does not know, or missing ones.
    """
    try:
        entry = methods.method(config["method"])
        assert entry.hypers is not None and entry.spec is not None
        parts = {
            "plan": Plan(**config["plan"]),
            "hypers": entry.hypers(**config["hypers"]),
            "spec": entry.spec(**config["spec"]),
            "gems": GeMSSettings(**{**config["gems"], "hidden": tuple(config["gems"]["hidden"])}),
            "mf": MFSettings(**config["mf"]),
            "pl": PLSettings(**config["pl"]) if config.get("pl") else None,
        }
        return TrainSettings(**{**config, **parts})
    except (KeyError, TypeError) as error:
        raise DataError(f"config.json does not describe a training run of this version: {error}") from error


def make_world(settings: TrainSettings) -> tuple[Any, Any, Dims]:
    """The environment's static half and parameters, and its sizes.

    Raises:
      SettingError, DataError: see `gemsjax.make`.
    """
    env, params = make(settings.env, catalogue=settings.catalogue, **settings.env_settings)
    require_catalogue(env)
    if methods.method(settings.method).ranker == "gems":
        gems = settings.gems or GeMSSettings()
        slates = (gems.users - gems.users // 10) * env.horizon
        enough = f"enough logged users for one batch of {gems.batch_size} slates"
        require(slates >= gems.batch_size, "gems.users", gems.users, enough)
    return env, params, Dims(env.num_items, env.slate_size, env.horizon)
