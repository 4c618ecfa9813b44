"""How the speed of a sweep depends on its number of runs: `python -m experiments.benchmark --only sweep`.

Runs of SAC+GeMS at the paper's sizes, but a replay of 2,000, with untrained weights: run-updates a second (one
trajectory and one update of one run) for 1, 2, 4 ... and 60 runs in both layouts, against single runs one after
another; and where an epoch's seconds go, each part against its floor. On an accelerator also, and elsewhere by name
only, since it takes long there:

    sweep_60_steps         steps a second of each of 60 runs (10 seeds, 6 environments) with the paper's replay
    gems_60_together       batches a second of each of 60 slate VAEs; 10 epochs of the paper's are 351,560 batches
    sweep_60_compile_cold, sweep_60_compile_warm
                           seconds until the program of those runs is there, without and with the cache; by name only

Figures come one by one, and a count that is out of memory ends its series, so nothing measured before is lost.
What other settings of the machine give takes a command each, with a file of its own:

    python -m experiments.benchmark --only sweep --unroll 4 --json results/benchmark_sweep_unroll_4.json
    python -m experiments.benchmark --only sweep --precision high --json results/benchmark_sweep_high.json
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments._measure import Figure, figure_of, flops_of, matrix_rate, turn_flops
from experiments._sweep_compile import published
from gemsjax import datasets, prepare, runs, sweep
from gemsjax.agents.base import Acting, Agent
from gemsjax.devices import surroundings
from gemsjax.errors import require_count
from gemsjax.evaluate import user_keys
from gemsjax.pretrain.gems import make_pretraining
from gemsjax.replay import make_replay
from gemsjax.rollout import episodes, returns
from gemsjax.settings import TrainSettings
from gemsjax.shares import everywhere, together
from gemsjax.sweep.bundle import Bundle, bundle, stacked, with_key
from gemsjax.sweep.layout import going, make_layout, over_runs, place
from gemsjax.sweep.memory import device_limit
from gemsjax.sweep.pretraining import data_of, jitted, programs, share_sets
from gemsjax.train import Plan, Run, Training, TrainState
from gemsjax.types import Array, Key

STEPS, REPEATS, EPISODES = 50, 3, 2_000
"""Steps of every run in a measured call, calls, and episodes of the replay: a call copies the replays of its runs,
which an epoch of a thousand steps with 10,000 episodes does not notice, and a short call would."""
EPOCH = 1_000
"""Steps between validations, of the figures in seconds."""

Steps = Callable[[Run, TrainState, Array], tuple[TrainState, Any]]
"""Of one run: `(run, state, numbers of the steps) -> (state, out)`."""


COMPILE = ("sweep_60_compile_cold", "sweep_60_compile_warm")
NAMES = ("sweep", "sweep_60_steps", "gems_60_together", *COMPILE)
"""What may be asked for."""
MAPPED = 4
"""The most mapped runs on an accelerator: one after another they are as fast as one, however many there are."""


def figures(settings: TrainSettings, most: int | None, wanted: Collection[str]) -> Iterator[Figure]:
    """The wanted figures of sweeps, each as soon as it is measured.

    Raises:
      SettingError: `most` below 1.
    """
    require_count("--sweep-runs", 8 if most is None else most)
    if "sweep" in wanted:
        yield from scaling(settings, most)
    of_sweep = "sweep" in wanted and jax.devices()[0].platform != "cpu"
    for name, measure in (("sweep_60_steps", sixty_runs), ("gems_60_together", sixty_vaes)):
        if name in wanted or of_sweep:
            yield from unless_out_of_memory(name, functools.partial(measure, settings))
    yield from compile_figures([name for name in COMPILE if name in wanted])


def scaling(settings: TrainSettings, most: int | None) -> Iterator[Figure]:
    """Single runs, then sweeps of more and more runs, then an epoch by part."""
    plan = dataclasses.replace(settings.resolved().plan, warm_up=20, replay_capacity=EPISODES)
    base = dataclasses.replace(settings, plan=plan).resolved()
    cpu = jax.devices()[0].platform == "cpu"
    most = (8 if cpu else 1 << 20) if most is None else most
    alone, flops = one_by_one(base)
    yield alone
    for kind in ("mapped", "vmapped"):
        for count in counts(most if cpu or kind == "vmapped" else min(most, MAPPED)):
            if not _holds(base, count, kind):
                break
            name = f"sweep_{count}_{kind}"
            measured = list(unless_out_of_memory(name, functools.partial(_of_count, base, count, kind, name, flops)))
            if not measured:
                break
            yield from measured
    yield from unless_out_of_memory("the parts of an epoch", lambda: parts(base, min(most, 4 if cpu else 64)))


def counts(most: int) -> list[int]:
    """Numbers of runs up to `most`: powers of two, 60 (the paper's), and a small `most` itself."""
    usual = {60, *(2**power for power in range(21))}
    return sorted(count for count in usual | ({most} if most < 1_000 else set()) if count <= most)


def unless_out_of_memory(name: str, measure: Callable[[], Figure | list[Figure]]) -> Iterator[Figure]:
    """What `measure` gives; nothing, and a line that says so, if the device has not the memory for it."""
    try:
        measured = measure()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        print(f"{name}: out of memory", flush=True)
        return
    yield from [measured] if isinstance(measured, Figure) else measured


def _of_count(base: TrainSettings, count: int, kind: str, name: str, flops: float | None) -> Figure:
    made = _made(base, count)
    call = _over(made, kind, made.training.steps, STEPS)
    work = flops * count * STEPS if flops else None
    return figure_of(name, "run-updates/s", count * STEPS, work, call, REPEATS)


def sixty_runs(settings: TrainSettings) -> Figure:
    """Steps a second of each of 60 runs, with the paper's 10,000 episodes of replay and a warm-up of 20."""
    plan = dataclasses.replace(settings.resolved().plan, warm_up=20)
    made = published(dataclasses.replace(settings, plan=plan).resolved())
    steps = 20 if jax.devices()[0].platform == "cpu" else 200
    flops = _step_flops(made, made.training.steps)
    call = _over(made, "auto", made.training.steps, steps)
    work = flops * len(made.runs) * steps if flops else None
    return figure_of("sweep_60_steps", "steps/s of each run", steps, work, call, REPEATS)


def sixty_vaes(settings: TrainSettings) -> Figure:
    """Batches a second of each of 60 slate VAEs, on six data sets of made-up slates."""
    made, cpu = published(settings.resolved()), jax.devices()[0].platform == "cpu"
    dims, batches = made.worlds[0].dims, 5 if cpu else 200
    shape = (2_000 if cpu else 90_000, dims.horizon, dims.slate_size)  # 90,000 users: the paper's training part
    rng, names = np.random.default_rng(0), sorted({run.settings.env for run in made.runs})
    sets = [
        datasets.LoggedSlates(
            rng.integers(0, dims.num_items, shape, np.int16), rng.integers(0, 2**10, shape[:2], np.uint16), {}
        )
        for _ in names
    ]
    layout = make_layout(len(made.runs))
    pretraining = make_pretraining(made.settings.gems.spec, dims)
    program, _ = programs(pretraining, layout)
    data = data_of(layout, [run.settings for run in made.runs], [names.index(run.settings.env) for run in made.runs])
    shared, active = share_sets(layout, sets), going(layout)
    state = jax.jit(program.make)(data, active)
    inputs = (shared, jnp.int32(0), jnp.arange(batches))
    update = jitted(layout, program).lower(data, state, active, *inputs).compile()
    call = _continued(state, lambda state, numbers: update(data, state, active, shared, jnp.int32(0), numbers), batches)
    alone = jax.eval_shape(pretraining.init, jax.random.key(0)), prepare.as_arrays(made.settings.gems.hypers)
    of_one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shared)
    flops = flops_of(jax.jit(pretraining.updates).lower(*alone, jax.random.key(0), of_one, *inputs[1:]).compile())
    work = flops * len(made.runs) * batches if flops else None
    return figure_of("gems_60_together", "batches/s of each VAE", batches, work, call, REPEATS)


def compile_figures(names: Collection[str]) -> Iterator[Figure]:
    """Seconds to trace, lower and compile 60 runs of SAC+GeMS at the paper's sizes, each in a process of its own."""
    if not names:
        return
    with tempfile.TemporaryDirectory() as directory:
        for name in COMPILE:  # the warm one needs the cold one's cache
            before, out = matrix_rate(), Path(directory) / f"{name}.json"
            # This process may hold most of an accelerator's memory; the other one needs hardly any.
            own = {"GEMSJAX_COMPILE_CACHE": str(Path(directory) / "cache"), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"} | own
            told = surroundings()
            settings = [f"--{setting}={told[setting]}" for setting in ("precision", "unroll")]
            command = [sys.executable, "-m", "experiments._sweep_compile", "--out", str(out), *settings]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise OSError(f"{name} failed: {done.stderr.strip() or done.stdout.strip()}")
            seconds = float(json.loads(out.read_text())["seconds"])
            if name in names:
                yield Figure(name, seconds, "s", None, (before + matrix_rate()) / 2, seconds, seconds)


def _made(base: TrainSettings, count: int) -> Bundle:
    return bundle(sweep.grid(base, {"seed": list(range(1, count + 1))}))


def _single(made: Bundle) -> Run:
    settings, world = made.settings, made.worlds[0]
    weights = prepare.untrained_weights(settings, world)
    return Run(jax.random.key(settings.seed), prepare.as_arrays(settings.hypers), weights, world.params)


def _holds(base: TrainSettings, count: int, kind: str) -> bool:
    """Whether a device has room for its runs' state twice, which leaves the program as much again."""
    made, layout = _made(base, 1), make_layout(count, kind)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(made.training.init, _single(made))))
    limit = device_limit(layout)
    return limit is None or 2 * size * layout.places // len(layout.devices) <= limit


def one_by_one(base: TrainSettings) -> tuple[Figure, float | None]:
    """Single runs, as `experiments.train` makes them; and the operations of one step."""
    made = _made(base, 1)
    run = _single(made)
    call, flops = steps_of_one(made.training, made.agent, made.settings.plan, run, STEPS)
    return figure_of("one_by_one", "run-updates/s", STEPS, flops * STEPS if flops else None, call, REPEATS), flops


def steps_of_one(
    training: Training, agent: Agent, plan: Plan, run: Run, count: int
) -> tuple[Callable[[], Any], float | None]:
    """A call that makes `count` steps of a run as `experiments.train` does, and goes on where the last call ended; the
    operations of a step.

    Of devices that share an update XLA counts one's, and of what is made block by block one block's: operations are
    those of one device in one piece.
    """
    devices, state, numbers = runs.sharers_of(agent, plan), jax.jit(training.init)(run), jnp.arange(count)
    alone = jax.jit(training.steps, donate_argnums=1).lower(run, state, numbers)
    run, state, numbers = everywhere(devices, (run, state, numbers))
    compiled = together(devices, training.steps, donate_argnums=1).lower(run, state, numbers).compile()
    flops = flops_of(compiled if len(devices) == 1 else alone.compile())
    return _continued(state, lambda state, numbers: compiled(run, state, everywhere(devices, numbers)), count), flops


def _over(made: Bundle, kind: str, steps: Steps, count: int) -> Callable[[], Any]:
    """A call that makes `count` steps of every run, as one program, and goes on where the last call ended."""
    layout = make_layout(len(made.runs), kind)
    weights = prepare.untrained_weights(made.settings, made.worlds[0])  # of one size, whatever they hold
    data = place(layout, stacked(made, lambda settings, world: weights))
    program = over_runs(
        layout,
        lambda run: made.training.init(with_key(run)),
        lambda run, state, _active, numbers: steps(with_key(run), state, numbers),
    )
    active = going(layout)
    state = jax.jit(program.make)(data, active)
    compiled = jax.jit(program.call, donate_argnums=1).lower(data, state, active, jnp.arange(count)).compile()
    return _continued(state, lambda state, numbers: compiled(data, state, active, numbers), count)


def _continued(state: Any, program: Callable[[Any, Array], tuple[Any, Any]], count: int) -> Callable[[], Any]:
    """Calls that continue one another, since the state is donated; the first one, with its warm-up, is made here."""
    held = {"state": state, "done": 0}

    def call() -> Any:
        held["state"], out = program(held["state"], jnp.arange(count) + held["done"])
        held["done"] += count
        return out

    call()
    return call


def _step_flops(made: Bundle, steps: Steps) -> float | None:
    """Operations of one step of one run."""
    run = _single(made)
    state = jax.eval_shape(made.training.init, run)
    return flops_of(jax.jit(steps).lower(run, state, jnp.arange(STEPS)).compile())


def parts(base: TrainSettings, count: int) -> list[Figure]:
    """Seconds of an epoch of `count` runs by part, in the default layout; each part is a program of its own.

    Of the floor: an update's operations are counted as those of a training step are, those of simulated users by one
    turn of one. Storing and sampling move numbers and hardly compute with them: they have no floor.
    """
    made = _made(base, count)
    simulated, found = _simulated(made), []
    for name, part in _parts(made).items():
        steps = 1 if name == "validate" else STEPS

        def scanned(run: Run, state: TrainState, numbers: Array, part: Any = part) -> tuple[TrainState, Any]:
            one = lambda state, number: part(run, state, jax.random.fold_in(run.key, number))  # noqa: E731
            return jax.lax.scan(one, state, numbers)

        flops = _step_flops(made, scanned) if name == "update" else simulated.get(name)
        work = flops * count * steps if flops else None
        times = 1 if name == "validate" else EPOCH // STEPS
        told = figure_of(f"epoch_{name}_{count}_runs", "s", 1.0, work, _over(made, "auto", scanned, steps), REPEATS)
        value, low, high = (times / speed for speed in (told.value, told.low, told.high))
        found.append(dataclasses.replace(told, value=value, low=low, high=high))
    return found


def _simulated(made: Bundle) -> dict[str, float | None]:
    """Operations of the parts that play users: those of one turn, times turns and users."""
    run, users = _single(made), made.settings.plan.validation_users
    acting = Acting(jax.eval_shape(made.training.init, run).agent, run.hypers, run.weights)
    found: dict[str, float | None] = {}
    for name, policy, played in (("collect", made.agent.explore, 1), ("validate", made.agent.greedy, users)):
        flops = turn_flops(made.env, policy, run.env_params, acting)
        found[name] = flops * made.env.horizon * played if flops else None
    return found


def _parts(made: Bundle) -> dict[str, Callable[[Run, TrainState, Key], tuple[TrainState, Any]]]:
    """The parts of a training step, and the validation of an epoch."""
    plan, env, agent = made.settings.plan, made.env, made.agent
    users = user_keys("validation", plan.validation_users)
    replay = make_replay(made.worlds[0].dims, plan.replay_capacity, plan.batch_size)

    def acting(run: Run, state: TrainState) -> Acting:
        return Acting(state.agent, run.hypers, run.weights)

    def collect(run: Run, state: TrainState, key: Key) -> tuple[TrainState, Any]:
        return state, episodes(env, agent.explore, key[None], run.env_params, acting(run, state)).reward

    def store_and_sample(run: Run, state: TrainState, key: Key) -> tuple[TrainState, Any]:
        sampled = replay.sample(dataclasses.replace(state.replay, added=jnp.int32(plan.replay_capacity)), key)
        stored = replay.add(state.replay, jax.tree.map(lambda x: x[:1], sampled))
        return dataclasses.replace(state, replay=stored), jax.tree.map(lambda x: x.sum(), sampled)

    def update(run: Run, state: TrainState, key: Key) -> tuple[TrainState, Any]:
        batch = jax.tree.map(lambda x: x[: plan.batch_size], state.replay.episodes)
        batch = jax.tree.map(lambda x: x.astype(jnp.int32) if x.dtype == jnp.int16 else x, batch)
        learnt, metrics = agent.update(acting(run, state), batch, agent.draw_update(key, plan.batch_size))
        return dataclasses.replace(state, agent=learnt), metrics

    def validate(run: Run, state: TrainState, _key: Key) -> tuple[TrainState, Any]:
        return state, returns(env, agent.greedy, users, run.env_params, acting(run, state))

    return {"collect": collect, "store_and_sample": store_and_sample, "update": update, "validate": validate}
