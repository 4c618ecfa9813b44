"""A training run from the host's side: epochs are driven, logged, checkpointed, resumed; the best policy is tested.

The stages (`prepare.logged_data`, `prepare.pretrained_gems`, `train`) may be called one by one, as the quickstart and
notebooks do. Files of a run: `config.json`, `metrics.jsonl`, `metrics.csv`, `checkpoints/`, plots, and `result.json`
once it is tested (see `table_row` and `facts_of`; versions, device and seconds too).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemsjax import checkpoint, disk, methods, tracking
from gemsjax.agents.base import Acting, Agent
from gemsjax.devices import surroundings
from gemsjax.envs.knowledge import make_click_model
from gemsjax.errors import DataError, require
from gemsjax.evaluate import Evaluation, evaluate
from gemsjax.prepare import World, as_arrays, has_checkpoints, identity_of, require_finite, untrained_weights, world_of
from gemsjax.pretrain.gems import make_pretraining
from gemsjax.rankers import items
from gemsjax.rankers.gems import make_gems_ranker
from gemsjax.rankers.plackett_luce import make_plackett_luce_ranker
from gemsjax.settings import TrainSettings, from_config
from gemsjax.shares import everywhere, on_one, sharers, together
from gemsjax.train import Plan, Run, TrainState, make_training


class Outcome(NamedTuple):
    """What `train` leaves.

    Attributes:
      directory: of the run.
      test: returns of the best validated policy on the test users; None if the run was stopped before its end.
      seconds: of this call, by part: `compile`, `train`, `test`.
      stopped: whether a signal asked to stop, be it in the run's last epoch.
    """

    directory: Path
    test: Evaluation | None
    seconds: dict[str, float]
    stopped: bool = False


# -- training ----------------------------------------------------------------------------------------------------------


def make_agent(settings: TrainSettings, world: World, weights: Any = ()) -> Agent:
    """The learner that the (resolved) settings describe; `weights` tell how wide item embeddings are."""
    entry = methods.method(settings.method)
    assert entry.agent is not None
    means: Any = None
    if entry.ranker == "gems":
        means = make_gems_ranker(make_pretraining(settings.gems.spec, world.dims).vae, settings.gems.drawn)
    elif settings.pl is not None:
        means = make_plackett_luce_ranker(world.dims, weights.embeddings.shape[1], settings.pl.drawn)
    elif entry.ranker is not None:
        make_ranker = {"topk": items.make_topk_ranker, "khead": items.make_khead_ranker}[entry.ranker]
        means = make_ranker(world.dims, weights.embeddings.shape[1])
    elif entry.knows_simulator:
        means = make_click_model(world.env)
    return entry.agent(settings.spec, world.dims, means)


def sharers_of(agent: Agent, plan: Plan) -> tuple[jax.Device, ...]:
    """The devices that train an agent together, each with all of its replay and at least four episodes of a batch.

    The rollout and the meetings are not shared, so that more devices would hardly gain; only two have been measured.
    """
    return sharers(plan.batch_size if agent.shares else 1, least=4)


def train(
    settings: TrainSettings,
    world: World,
    weights: Any,
    root: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    track: str = "none",
    on_epoch: Callable[[dict[str, float]], object] = lambda row: None,
) -> Outcome:
    """Train, validate every epoch, keep the best, test it.

    Args:
      settings: resolved.
      world: from `world_of`.
      weights: from `prepare.frozen_weights`.
      root: of all runs.
      resume, overwrite: what to do with an existing run directory; refused without either.
      track: see `tracking.open_tracker`.
      on_epoch: called with each epoch's row of metrics.

    Raises:
      SettingError, DataError: an existing directory, or a checkpoint of another configuration.
      TrainingError: a loss is no longer finite; the last good checkpoint stays.
    """
    tracking.check_tracker(track)
    name = name_of(settings)
    identity = identity_of(settings, world)
    config = dataclasses.asdict(settings)
    target = directory_of(settings, root)
    with tracking.RunDirectory(target, config, resume=resume, overwrite=overwrite) as directory:
        if directory.resumed:
            _refuse_other(tracking.read_config(directory.path), settings, directory.path)
        driver = _Driver(settings, world, weights, directory.path, identity)
        directory.write_config(config)  # how long it trains may have changed
        tracker = tracking.open_tracker(
            track, directory.path, name.full, config, resumed_step=driver.done + 1 if driver.done else None
        )
        try:
            return driver.drive((tracker.log, on_epoch))
        finally:
            tracker.close()


def check_directory(settings: TrainSettings, root: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise what `train` would about an earlier run, so that nobody waits for its preparation in vain."""
    directory = directory_of(settings, root)
    if tracking.check_run_directory(directory, resume=resume, overwrite=overwrite) and resume:
        _refuse_other(tracking.read_config(directory), settings, directory)


def name_of(settings: TrainSettings) -> tracking.RunName:
    """Where a run lives and what it is called, e.g. `SAC_GeMS_focused_topdown_KL1.0_click0.5_seed58407201`."""
    entry, gems = methods.method(settings.method), settings.gems
    through_gems = (gems.beta, gems.click_weight) if entry.ranker == "gems" else (None, None)
    return tracking.run_name(settings.env, settings.seed, *through_gems, method=entry.directory)


def directory_of(settings: TrainSettings, root: Path) -> Path:
    """Where a run lies or will lie below `root`: by its name, or with a hash behind it, as a sweep may export it."""
    plain, hashed = directories_of(settings, root)
    return hashed if hashed.exists() else plain


def directories_of(settings: TrainSettings, root: Path) -> tuple[Path, Path]:
    """A run's directory by its name alone, and with a hash of all its settings (gamma, say) behind the name."""
    plain = root / name_of(settings).directory
    return plain, plain.with_name(f"{plain.name}-{checkpoint.config_hash(disk.plain(settings.identity()))[:6]}")


def holds_another(directory: Path, settings: TrainSettings) -> bool:
    """Whether a run of other settings lies in `directory`; not so if nothing does, or nothing that can be read."""
    try:
        config = tracking.read_config(directory)
        return disk.plain(from_config(config).identity()) != disk.plain(settings.identity())
    except DataError:
        return False


class _Driver:
    """The state of one call of `train`."""

    def __init__(
        self, settings: TrainSettings, world: World, weights: Any, directory: Path, identity: dict[str, Any]
    ) -> None:
        self.settings, self.world, self.directory, self.identity = settings, world, directory, identity
        self.agent = make_agent(settings, world, weights)
        self.training = make_training(world.env, self.agent, settings.plan)
        self.run = Run(jax.random.key(settings.seed), as_arrays(settings.hypers), weights, world.params)
        self.seconds = dict.fromkeys(("compile", "train", "test"), 0.0)
        like = jax.eval_shape(lambda: (self.training.init(self.run), self.run))
        if has_checkpoints(directory):  # damaged ones raise instead of starting anew
            (self.state, self.run), self.done, _ = checkpoint.restore(self.checkpoints, like, config=identity)
        else:
            self.state, self.done = jax.jit(self.training.init)(self.run), 0
        self.devices = sharers_of(self.agent, settings.plan)
        self.run, self.state = everywhere(self.devices, (self.run, self.state))
        accepted = f"at least the {self.done} that the run in {directory} already has"
        require(settings.steps >= self.done, "steps", settings.steps, accepted)
        self.log = tracking.MetricsLog(directory)
        self.log.truncate(self.done + 1)

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def drive(self, listeners: Sequence[Callable[[dict[str, float]], object]]) -> Outcome:
        steps, size = self.settings.steps, self.settings.epoch_steps
        with (
            tracking.StopRequest() as stop,
            tracking.Progress(steps, methods.method(self.settings.method).title, start=self.done) as progress,
        ):
            programs: dict[int, Any] = {}
            while self.done < steps and not stop.requested:
                length = min(size, steps - self.done)
                if length not in programs:
                    programs[length] = self._compile(length)
                row = self._epoch(programs[length], length)
                for listener in listeners:
                    listener(row)
                progress.update(self.done, {k: row[k] for k in ("return", "validation") if k in row})
        finished = self.done >= steps
        return Outcome(self.directory, self._test() if finished else None, self.seconds, bool(stop.requested))

    def _compile(self, length: int) -> Any:
        started = time.perf_counter()
        numbers, epoch = everywhere(self.devices, jnp.arange(length)), together(self.devices, self.training.epoch, 1)
        program = epoch.lower(self.run, self.state, numbers).compile()
        self.seconds["compile"] += time.perf_counter() - started
        return program

    def _epoch(self, program: Any, length: int) -> dict[str, float]:
        started = time.perf_counter()
        numbers = everywhere(self.devices, jnp.arange(self.done, self.done + length, dtype=jnp.int32))
        state, metrics = program(self.run, self.state, numbers)
        per_step, validation, finite = jax.tree.map(np.asarray, metrics)
        self.seconds["train"] += time.perf_counter() - started
        updated = per_step.pop("updated")
        require_finite(per_step, self.done, "step", self.directory)
        last = self.done + length - 1
        require_finite({"a weight": np.where(finite, [0.0], np.nan)}, last, "step", self.directory)
        self.state, self.done = state, self.done + length
        seconds = time.perf_counter() - started
        row = row_of(per_step, updated, validation, float(state.best_return), step=self.done, seconds=seconds)
        # The row first: a run that is killed in between drops it on resuming and writes it again.
        self.log.append(row)
        checkpoint.save(self.checkpoints, (self.state, self.run), step=self.done, config=self.identity)
        return row

    def _test(self) -> Evaluation:
        started = time.perf_counter()
        acting, params = on_one(
            self.devices,
            (Acting(self.state.best_agent, self.run.hypers, self.run.weights), self.run.env_params),
        )
        users, stream = self.settings.test_users, self.settings.test_stream
        tested = evaluate(self.world.env, self.agent.greedy, params, acting, users, stream)
        self.seconds["test"] += time.perf_counter() - started
        result = table_row(self.settings.env, self.settings.method, tested) | facts_of(self.settings, self.identity)
        # Training: of all calls, without compiling; the others: of the call that finished the run.
        trained = sum(row["seconds"] for row in tracking.read_metrics(self.directory))
        result |= {
            "steps": self.done,
            "best_validation": float(self.state.best_return),
            "seconds": self.seconds | {"train": trained},
            **surroundings(),
        }
        disk.write_json(self.directory / "result.json", result)
        return tested


def row_of(
    per_step: dict[str, np.ndarray],
    updated: np.ndarray,
    validation: np.ndarray,
    best: float,
    *,
    step: int,
    seconds: float,
) -> dict[str, float]:
    """An epoch's row of metrics: means over its steps (of updates: over those that updated), and its validation."""
    per_step = dict(per_step)
    row = {"step": step, "return": float(per_step.pop("return").mean())}
    if updated.any():
        row |= {name: float(value[updated].mean()) for name, value in per_step.items()}
    error = float(validation.std(ddof=1) / np.sqrt(validation.size)) if validation.size > 1 else 0.0
    return row | {
        "validation": float(validation.mean()),
        "validation_se": error,
        "best_validation": best,
        "seconds": seconds,
    }


class Trained(NamedTuple):
    """A trained policy, ready to act.

    Attributes:
      settings, world: of its run.
      agent: `agent.greedy` acts.
      acting: what it acts on: the best validated state.
      step: at which its checkpoint was saved.
    """

    settings: TrainSettings
    world: World
    agent: Agent
    acting: Acting
    step: int


def load(directory: Path | str) -> Trained:
    """The best validated policy of a run directory.

    Raises:
      DataError: no run directory, no undamaged checkpoint, or one of another configuration.
    """
    directory = Path(directory)
    settings = from_config(tracking.read_config(directory)).resolved()
    world = world_of(settings)
    blank = _blank_run(settings, world)
    agent = make_agent(settings, world, blank.weights)
    training = make_training(world.env, agent, settings.plan)
    like = jax.eval_shape(lambda: blank)
    state_like = jax.eval_shape(training.init, like)
    identity = identity_of(settings, world)
    (state, run), step, _ = checkpoint.restore(directory / "checkpoints", (state_like, like), config=identity)
    assert isinstance(state, TrainState)
    return Trained(settings, world, agent, Acting(state.best_agent, run.hypers, run.weights), step)


def _blank_run(settings: TrainSettings, world: World) -> Run:
    """A run of the right shapes."""
    return Run(jax.random.key(0), as_arrays(settings.hypers), untrained_weights(settings, world), world.params)


# -- small things ------------------------------------------------------------------------------------------------------


def table_row(env: str, method: str, evaluation: Evaluation) -> dict[str, Any]:
    """One row of the JSON that evaluations write: `env, method, users, mean_return, se_return`."""
    return {
        "env": env,
        "method": method,
        "users": int(evaluation.returns.size),
        "mean_return": evaluation.mean,
        "se_return": evaluation.standard_error,
    }


def facts_of(settings: TrainSettings, identity: dict[str, Any]) -> dict[str, Any]:
    """Which run a result is of, and whom it was tested on: `variant, privileged, seed, config_hash, stream`.

    Args:
      settings: resolved.
      identity: of the run, see `prepare.identity_of`; the hash is that of its checkpoints' manifests.
    """
    return {
        "variant": settings.variant,
        "privileged": settings.privileged,
        "seed": settings.seed,
        "config_hash": checkpoint.config_hash(identity),
        "stream": settings.test_stream,
    }


def _refuse_other(config: dict[str, Any], settings: TrainSettings, directory: Path) -> None:
    wrong = disk.differences(disk.plain(from_config(config).identity()), disk.plain(settings.identity()))
    if wrong:
        raise DataError(f"{directory} holds a run of another configuration: {'; '.join(wrong)}")
