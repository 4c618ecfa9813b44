"""Many runs, one after another, each leaving one JSON record: what tables and figures are made from, and only from it.

A study is a list of `Job`s. `perform` skips those whose record is there, resumes one that was stopped, and so may be
killed and started again at any time: a run loses at most the epoch it was in and is never counted twice. A record holds
the configuration with its hash, seed, variant, validation curve, test return, versions, device and seconds. (Of the
older ones some say less about the device, and those of references nothing about seconds.)
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gemsjax import checkpoint, disk, methods, prepare, runs, tracking
from gemsjax.devices import surroundings
from gemsjax.errors import DataError, require, require_choice
from gemsjax.evaluate import evaluate
from gemsjax.settings import PUBLISHED_SEEDS, TrainSettings, defaults
from gemsjax.train import Plan


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much a study spends.

    Attributes:
      trajectories: of training, per run; `job` says what becomes of them where an update takes many users.
      epoch: trajectories between validations.
      seeds: how many of the published seeds.
      gems, mf: changes of pre-training.
      plan: changes of the counts of training.
      test_users: of the test.
      env_settings: constants of a smaller world, for tests (not with a catalogue from a file).
    """

    trajectories: int
    epoch: int
    seeds: int
    gems: dict[str, Any] = dataclasses.field(default_factory=dict)
    mf: dict[str, Any] = dataclasses.field(default_factory=dict)
    plan: dict[str, Any] = dataclasses.field(default_factory=dict)
    test_users: int = 500
    env_settings: dict[str, int] = dataclasses.field(default_factory=dict)


_FEW = {"users": 100, "epochs": 1, "hidden": (16, 8), "latent_dim": 4}
BUDGETS = {
    "full": Budget(100_000, 1_000, 10),
    "small": Budget(10_000, 1_000, 3, gems={"users": 10_000, "epochs": 5}, mf={"users": 10_000}),
    "long": Budget(2_000_000, 200_000, 1),
    "smoke": Budget(
        trajectories=60,
        epoch=30,
        seeds=2,
        gems=_FEW,
        mf={"users": 100, "max_epochs": 1},
        plan={"warm_up": 20, "replay_capacity": 60, "validation_users": 10},
        test_users=20,
        env_settings={"num_items": 60, "slate_size": 4, "horizon": 10},
    ),
}
"""The paper's budget; one for an afternoon on two cores; one for searches like constant-slate's; one for tests."""


@dataclasses.dataclass(frozen=True)
class Places:
    """Where a study keeps what.

    Attributes:
      records: one JSON a run; small, for the repository.
      runs: checkpoints and pre-trained weights.
      data: logged data.
    """

    records: Path
    runs: Path
    data: Path


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What every study asks for: what to run and where to keep it. Studies change the defaults and add their own."""

    budget: str = "small"
    """full, small, smoke, or long: 2 million trajectories and one seed, for searches."""
    variant: str = "corrected"
    """corrected, or published: with the published implementation's slips."""
    seeds: tuple[int, ...] = ()
    """Seeds; by default the first of the paper's, as many as the budget has."""
    envs: tuple[str, ...] = ("focused_topdown",)
    """Environments."""
    methods: tuple[str, ...] = ("sac-gems",)
    """Methods."""
    catalogues: Path | None = None
    """Directory with the published item embeddings; without it the project's own are used."""
    out: Path = Path("results")
    """Root of records, tables and pictures."""
    runs: Path = Path("runs")
    """Root of checkpoints and pre-trained weights."""
    data: Path = Path("logs")
    """Root of logged data."""
    budgets: ClassVar[Mapping[str, Budget]] = BUDGETS

    @property
    def spending(self) -> Budget:
        """The budget.

        Raises:
          SettingError: an unknown one.
        """
        require_choice("--budget", self.budget, self.budgets)
        return self.budgets[self.budget]

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds of learners.

        Raises:
          SettingError: one is named twice.
        """
        require(len(set(self.seeds)) == len(self.seeds), "--seeds", self.seeds, "each once")
        return self.seeds or PUBLISHED_SEEDS[: self.spending.seeds]

    def seeds_of(self, method: str) -> tuple[int, ...]:
        """Seeds to run a method with: a reference is the same for all, so it is run once."""
        return self.all_seeds if methods.method(method).learns else self.all_seeds[:1]

    @property
    def directory(self) -> Path:
        """Of this budget and variant."""
        return self.out / f"{self.budget}-{self.variant}"

    @property
    def places(self) -> Places:
        """Where this study keeps what."""
        return Places(self.directory / "records", self.runs, self.data)

    def job(self, method: str, env: str, seed: int, label: str = "", **changes: Any) -> Job:
        """A run at this study's budget, see `job`."""
        items = catalogue(self.catalogues, env)
        return job(method, env, seed, self.variant, self.spending, label, catalogue=items, **changes)


@dataclasses.dataclass(frozen=True)
class Job:
    """One run (a reference without training has no seed) and how it is labelled.

    Attributes:
      settings: resolved; of a reference its `method` and `env` count, and `test_users`, `test_stream`.
      label: what a table calls it where the method's name is not enough (`gamma 0`), else ''.
    """

    settings: TrainSettings
    label: str = ""

    @property
    def learns(self) -> bool:
        return methods.method(self.settings.method).learns


def job(method: str, env: str, seed: int, variant: str, budget: Budget, label: str = "", **changes: Any) -> Job:
    """A run of a study at its budget.

    Where an update takes several users, the trajectories are rounded up to whole updates: 100,000 are 100,096 for
    constant-slate and others of 128 users an update, and records, which say so, were made and are found that way.

    Args:
      changes: other settings of the run; those of `gems`, `hypers`, `plan`, `spec` as dictionaries of what differs.

    Raises:
      SettingError: see `TrainSettings.resolved`.
    """
    require_choice("--variant", variant, ("corrected", "published"))
    entry = methods.method(method)
    plain = {name: value for name, value in changes.items() if not isinstance(value, dict)}
    smaller = budget.env_settings if plain.get("catalogue") is None else {}
    plain["env_settings"] = {**smaller, **changes.get("env_settings", {})}
    if not entry.learns:
        stream = "training" if variant == "published" else "test"
        test: dict[str, Any] = {"test_users": budget.test_users, "test_stream": stream}
        return Job(TrainSettings(method, variant, env, seed=0, **test, **plain), label)
    usual = defaults(method, variant)
    parts = {name: {**getattr(budget, name, {}), **changes.get(name, {})} for name in _PARTS}
    parts["plan"] = _fitting(usual["plan"], parts["plan"])
    made = {name: dataclasses.replace(usual[name], **parts[name]) for name in _PARTS}
    per_step = made["plan"].users_per_step
    return Job(
        TrainSettings(
            method, variant, env, seed, steps=math.ceil(budget.trajectories / per_step),
            epoch_steps=math.ceil(budget.epoch / per_step), test_users=budget.test_users, **plain, **made,
        ).resolved(),
        label,
    )  # fmt: skip


_REFERENCE_SETTINGS = ("method", "env", "env_settings", "variant", "test_users", "test_stream")
_PARTS = ("plan", "hypers", "spec", "gems", "mf")


def _fitting(plan: Plan, changes: dict[str, Any]) -> dict[str, Any]:
    """A budget's changes of a plan, but the replay of one on policy and the warm-up of one that has none."""
    unfit = {"replay_capacity": plan.replay_capacity == plan.batch_size, "warm_up": plan.warm_up == 0}
    return {name: value for name, value in changes.items() if not unfit.get(name)}


def name_of(job: Job) -> str:
    """Of a record: method, environment, GeMS parameters, seed, and six digits of what was asked for."""
    settings = job.settings
    full = runs.name_of(settings).full if job.learns else f"{methods.method(settings.method).directory}_{settings.env}"
    return f"{full}-{checkpoint.config_hash(asked_of(job))[:6]}"


def perform(jobs: Sequence[Job], places: Places) -> list[dict[str, Any]]:
    """Do what is not yet done, in order; returns all records.

    Raises:
      KeyboardInterrupt: stopped; started again, it continues.
      TrainingError: a loss is no longer finite.
    """
    require(bool(jobs), "--methods, --envs", "nothing", "at least one method and one environment")
    names = [name_of(job) for job in jobs]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, "jobs", ", ".join(twice), "each run once")
    records = []
    for number, (one, name) in enumerate(zip(jobs, names, strict=True), 1):
        found = find(one, places)
        if found is None:
            print(f"[{number}/{len(jobs)}] {name}", flush=True)
            found, stopped = _train(one, places) if one.learns else (_evaluate(one), False)
            places.records.mkdir(parents=True, exist_ok=True)
            disk.write_json(places.records / f"{name}.json", found)
            if stopped:
                raise KeyboardInterrupt("that run was finished; the same command continues with the next")
        records.append(found | {"label": one.label})
    return records


def find(job: Job, places: Places) -> dict[str, Any] | None:
    """The record of a job, if it was done.

    What a record's configuration does not say is taken to be today's default: so a setting that is added to the package
    later does not undo what was run, and asking for another value of it does.
    """
    asked, stem = _completed(job, asked_of(job)), name_of(job).rpartition("-")[0]
    for path in sorted(places.records.glob(f"{stem}-*.json")):
        record = read(path)
        if _completed(job, record["config"]) == asked:
            return record
    return None


def _completed(job: Job, config: dict[str, Any]) -> dict[str, Any]:
    """A configuration, of a record say, with today's defaults where it is silent."""
    if not job.learns:
        return config
    usual = disk.plain(dataclasses.asdict(TrainSettings(job.settings.method, job.settings.variant).resolved()))
    config = {name: usual[name] for name in usual if name != "catalogue"} | config
    return config | {name: usual[name] | config[name] for name in _PARTS}


def read(path: Path) -> dict[str, Any]:
    """A record.

    Raises:
      DataError: not a record of a study.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        missing = {"method", "env", "test", "config"} - record.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: is not a record of a run ({error})") from error
    if missing:
        raise DataError(f"{path}: is not a record of a run: it lacks {', '.join(sorted(missing))}")
    return record


# -- one run -----------------------------------------------------------------------------------------------------------


def asked_of(job: Job) -> dict[str, Any]:
    """What decides a record's numbers, whatever the files that catalogue and embeddings came from are called."""
    settings = job.settings
    world, config = prepare.world_of(settings), dataclasses.asdict(settings)
    if job.learns:
        config |= prepare.identity_of(settings, world)
    else:
        config = {name: config[name] for name in _REFERENCE_SETTINGS} | {"items": prepare.items_digest(world)}
    config.pop("catalogue", None)
    return disk.plain(config)


def trained(job: Job, places: Places) -> runs.Trained:
    """The policy of a job that was done here.

    Raises:
      DataError: its run directory is not there (records travel with the repository, runs do not).
    """
    record = find(job, places)
    root = _root(job, places) if record is None else places.runs / record["run"]
    return runs.load(root / runs.name_of(job.settings).directory)


def _root(job: Job, places: Places) -> Path:
    """A directory of its own for each configuration: runs that differ in one number only do not meet."""
    return places.runs / checkpoint.config_hash(asked_of(job))[:6]


def _train(job: Job, places: Places) -> tuple[dict[str, Any], bool]:
    """The record of a run, and whether somebody asked to stop meanwhile."""
    settings, started = job.settings, time.perf_counter()
    world = prepare.world_of(settings)
    weights = prepare.frozen_weights(settings, world, places.runs, places.data)
    prepared = time.perf_counter() - started
    outcome = runs.train(settings, world, weights, _root(job, places), resume=True)
    if outcome.test is None:
        raise KeyboardInterrupt("the same command continues")
    rows = tracking.read_metrics(outcome.directory)
    kept = ("step", "return", "validation", "validation_se")
    record = _record(job, world, outcome.test.returns) | {
        "seed": settings.seed,
        "run": _root(job, places).name,
        "trajectories": settings.steps * settings.plan.users_per_step,
        "best_validation": max(row["validation"] for row in rows),
        "validation": [{name: row[name] for name in kept} for row in rows],
        # Training: of all calls, without compiling; the others: of the call that finished the run.
        "seconds": outcome.seconds | {"prepare": prepared, "train": sum(row["seconds"] for row in rows)},
    }
    return record, outcome.stopped


def _evaluate(job: Job) -> dict[str, Any]:
    settings = job.settings
    world, entry = prepare.world_of(settings), methods.method(settings.method)
    assert entry.policy is not None
    policy, started = entry.policy(world.dims), time.perf_counter()
    tested = evaluate(world.env, policy, world.params, users=settings.test_users, stream=settings.test_stream)
    seconds = {"test": time.perf_counter() - started}
    return _record(job, world, tested.returns) | {"seed": None, "trajectories": 0, "seconds": seconds}


def _record(job: Job, world: prepare.World, returns: np.ndarray) -> dict[str, Any]:
    settings, asked = job.settings, asked_of(job)
    return {
        "method": settings.method,
        "env": settings.env,
        "variant": settings.variant,
        "privileged": settings.privileged,
        "test": {
            "users": int(returns.size),
            "mean_return": float(returns.mean()),
            "se_return": float(returns.std(ddof=1) / math.sqrt(returns.size)),
        },
        "config": asked,
        "config_hash": checkpoint.config_hash(asked),
        "catalogue": "the environment's own" if settings.catalogue is None else Path(settings.catalogue).name,
        **surroundings(),
    }


def catalogue(directory: Path | None, env: str) -> str | None:
    """The published item embeddings for an environment below `directory`, None (the project's own) without one.

    Raises:
      DataError: there is no such file.
      SettingError: an environment whose items were never published.
    """
    if directory is None:
        return None
    require(not env.startswith("peaked"), "--catalogues", env, "no peaked environment: no such file was published")
    items = "diffuse" if env.startswith("diffuse") else "focused"
    path = directory / f"item_embeddings_{items}.npy"
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; --catalogues names a directory with the published embeddings")
    return str(path)
