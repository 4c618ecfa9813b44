"""The runs of a sweep as one: their common program, and their data stacked along the run axis.

Called by the other files of `gemsjax.sweep`; host code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemsjax import prepare, runs
from gemsjax.agents.base import Acting, Agent
from gemsjax.errors import SettingError
from gemsjax.evaluate import Evaluation, evaluate
from gemsjax.prepare import World, as_arrays, gems
from gemsjax.settings import TrainSettings
from gemsjax.sweep.axes import DATA, Run
from gemsjax.sweep.layout import Layout, Program, over_runs
from gemsjax.train import EpochMetrics, Training, TrainState, make_training
from gemsjax.train import Run as RunData
from gemsjax.types import Array


class Bundle(NamedTuple):
    """Runs that share a program.

    Attributes:
      runs: settings of each.
      worlds: environment of each, under its own name.
      env: the static half that all run with.
      agent, training: of all.
    """

    runs: tuple[Run, ...]
    worlds: tuple[World, ...]
    env: Any
    agent: Agent
    training: Training

    @property
    def settings(self) -> TrainSettings:
        """Those of the first run, for what all have in common."""
        return self.runs[0].settings


class Slice(NamedTuple):
    """What an epoch tells of one run: `EpochMetrics` and whether it `held`, that is, everything stayed finite."""

    metrics: EpochMetrics
    held: Array


def bundle(runs_of_sweep: Sequence[Run]) -> Bundle:
    """Find what the runs have in common.

    Raises:
      SettingError: runs whose programs differ; the message names the setting and both values.
    """
    worlds = worlds_of(runs_of_sweep)
    first = runs_of_sweep[0].settings
    same_data = {"seed", "env", "catalogue", "env_settings", "hypers", "embeddings"}
    for run in runs_of_sweep:
        for field in dataclasses.fields(TrainSettings):
            ours, theirs = getattr(first, field.name), getattr(run.settings, field.name)
            if field.name in DATA:
                ours, theirs = (_without(part, DATA[field.name]) for part in (ours, theirs))
            if field.name not in same_data and ours != theirs:
                raise SettingError(
                    field.name, theirs, f"{ours!r}, as of the sweep's first run: it is part of the program"
                )
    _same_weights(runs_of_sweep, worlds)
    env = _common_env([world.env for world in worlds])
    common = worlds[0]._replace(env=env)
    agent = runs.make_agent(first, common, prepare.untrained_weights(first, common))
    return Bundle(tuple(runs_of_sweep), tuple(worlds), env, agent, make_training(env, agent, first.plan))


def _same_weights(runs_of_sweep: Sequence[Run], worlds: Sequence[World]) -> None:
    """Refuse item embeddings of several widths."""
    shapes: dict[str | None, Any] = {}
    for run, world in zip(runs_of_sweep, worlds, strict=True):
        source = run.settings.embeddings
        if source not in shapes:
            shapes[source] = jax.tree.map(jnp.shape, prepare.untrained_weights(run.settings, world))
    first, *others = shapes.items()
    for source, shape in others:
        if shape != first[1]:
            told = f"embeddings of one width; {first[0]!r} has {first[1]}, this {shape}"
            raise SettingError("embeddings", source, told)


def _without(part: Any, names: Sequence[str]) -> dict[str, Any]:
    """Settings of a ranker without those that are data; of none, none."""
    given = {} if part is None else dataclasses.asdict(part)
    return {name: value for name, value in given.items() if name not in names}


def worlds_of(runs_of_sweep: Sequence[Run]) -> list[World]:
    """The runs' environments; equal ones are built once."""
    found: dict[str, World] = {}

    def world(settings: TrainSettings) -> World:
        name = repr((settings.env, settings.catalogue, settings.env_settings, settings.gems))
        if name not in found:
            found[name] = prepare.world_of(settings)
        return found[name]

    return [world(run.settings) for run in runs_of_sweep]


def _common_env(envs: Sequence[Any]) -> Any:
    """One static half for all: of one size; clicks are drawn by the general rule unless all may use the simple one.

    Both rules draw the same clicks from the same numbers.
    """
    first = envs[0]
    for env in envs:
        if type(env) is not type(first):
            raise SettingError("env", env.name, f"environments of one kind; {first.name} is another")
        for field in dataclasses.fields(first):
            ours, theirs = getattr(first, field.name), getattr(env, field.name)
            if field.name not in ("name", "independent_clicks") and ours != theirs:
                raise SettingError(
                    f"{field.name} of {env.name}", theirs, f"{ours} as of {first.name}: one program, one size"
                )
    names = list(dict.fromkeys(env.name for env in envs))
    common = {"name": names[0] if len(names) == 1 else "several"}
    if hasattr(first, "independent_clicks"):
        common["independent_clicks"] = all(env.independent_clicks for env in envs)
    return dataclasses.replace(first, **common)


def stacked(made: Bundle, weights: Weights) -> RunData:
    """The runs' data on the host, [N, ...]; keys travel as plain numbers."""
    pairs = [(run.settings, world) for run, world in zip(made.runs, made.worlds, strict=True)]
    return _stack([_data(settings, world, weights(settings, world)) for settings, world in pairs])


def data_like(made: Bundle, runs_: int | None = None) -> RunData:
    """Shapes of one run's data, or of those of several, [runs_, ...]."""
    data = _data(made.settings, made.worlds[0], prepare.untrained_weights(made.settings, made.worlds[0]))
    axis = () if runs_ is None else (runs_,)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*axis, *np.shape(x)), x.dtype), data)


def saved_like(made: Bundle) -> tuple[Any, RunData, Any]:
    """Shapes of a sweep's checkpoint, [N, ...]: states, data, and when each run was frozen (0: it goes on)."""
    data = data_like(made)
    state = jax.eval_shape(lambda data: made.training.init(with_key(data)), data)
    like = (state, data, jax.ShapeDtypeStruct((), jnp.int32))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(made.runs), *x.shape), x.dtype), like)


def identity(made: Bundle) -> dict[str, Any]:
    """What a sweep's checkpoint must agree on to be continued."""
    pairs = zip(made.runs, made.worlds, strict=True)
    return {"runs": [prepare.identity_of(run.settings, world) for run, world in pairs]}


Weights = Callable[[TrainSettings, World], Any]


def weights_of(root: Path, data_root: Path, without: Collection[Path] = ()) -> Weights:
    """What a run acts through, see `prepare.frozen_weights`; untrained for those whose GeMS could not be trained."""

    def weights(settings: TrainSettings, world: World) -> Any:
        if without and gems.place_of(settings, world, root)[0] in without:
            return prepare.untrained_weights(settings, world)
        return prepare.frozen_weights(settings, world, root, data_root)

    return weights


def _data(settings: TrainSettings, world: World, weights: Any) -> RunData:
    key = np.asarray(jax.random.key_data(jax.random.key(settings.seed)))
    return RunData(key, as_arrays(settings.hypers), weights, world.params)  # type: ignore[arg-type]


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *trees)


def with_key(run: RunData) -> RunData:
    """A run whose key is a key again."""
    return dataclasses.replace(run, key=jax.random.wrap_key_data(run.key))


def program(made: Bundle, layout: Layout) -> Program:
    """One epoch of every run: `call(data, state, active, step numbers) -> (state, Slice)`.

    A run in which a number is no longer finite keeps its networks of before the epoch (its replay is of no more use),
    and so does one that is not active.
    """

    def step(run: RunData, state: TrainState, active: Array, numbers: Array) -> tuple[TrainState, Slice]:
        new, metrics = made.training.epoch(with_key(run), state, numbers)
        told = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(metrics.steps)]
        held = metrics.finite & jnp.stack(told).all() & active
        kept = {
            name: jax.tree.map(lambda x, y: jnp.where(held, x, y), getattr(new, name), getattr(state, name))
            for name in ("agent", "best_agent", "best_return")
        }
        return dataclasses.replace(new, **kept), Slice(metrics, held)

    return over_runs(layout, lambda run: made.training.init(with_key(run)), step)


def test(made: Bundle, number: int, data: RunData, agent_state: Any) -> Evaluation:
    """Return of one run's policy on its test users; `data` and `agent_state` are that run's, without a run axis."""
    settings = made.runs[number].settings
    acting = Acting(agent_state, data.hypers, data.weights)
    return evaluate(made.env, made.agent.greedy, data.env_params, acting, settings.test_users, settings.test_stream)
