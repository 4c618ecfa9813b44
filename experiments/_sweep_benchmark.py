"""How the speed of a sweep depends on its number of runs: `python -m experiments.benchmark --only sweep`.

Runs of SAC+GeMS at the paper's sizes, but a replay of 2,000, with untrained weights: run-updates a second (one
trajectory and one update of one run) for 1, 2, 4 ... runs in both layouts, against single runs one after another; and
where an epoch's seconds go.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments._measure import Figure, figure_of, flops_of
from gemsjax import prepare, sweep
from gemsjax.agents.base import Acting
from gemsjax.errors import require_count
from gemsjax.evaluate import user_keys
from gemsjax.replay import make_replay
from gemsjax.rollout import episodes, returns
from gemsjax.settings import TrainSettings
from gemsjax.sweep.bundle import Bundle, bundle, stacked, with_key
from gemsjax.sweep.layout import going, make_layout, over_runs, place
from gemsjax.sweep.memory import device_limit
from gemsjax.train import Run, TrainState
from gemsjax.types import Array, Key

STEPS, REPEATS, EPISODES = 50, 3, 2_000
"""Steps of every run in a measured call, calls, and episodes of the replay: a call copies the replays of its runs,
which an epoch of a thousand steps with 10,000 episodes does not notice, and a short call would."""
EPOCH = 1_000
"""Steps between validations, of the figures in seconds."""

Steps = Callable[[Run, TrainState, Array], tuple[TrainState, Any]]
"""Of one run: `(run, state, numbers of the steps) -> (state, out)`."""


def figures(settings: TrainSettings, most: int | None) -> list[Figure]:
    """All figures of sweeps.

    Raises:
      SettingError: `most` below 1.
    """
    require_count("--sweep-runs", 8 if most is None else most)
    plan = dataclasses.replace(settings.resolved().plan, warm_up=20, replay_capacity=EPISODES)
    base = dataclasses.replace(settings, plan=plan).resolved()
    cpu = jax.devices()[0].platform == "cpu"
    most = (8 if cpu else 1 << 20) if most is None else most
    alone, flops = one_by_one(base)
    found = [alone]
    for kind in ("mapped", "vmapped"):
        count = 1
        while count <= most and _holds(base, count, kind):
            made = _made(base, count)
            call = _over(made, kind, made.training.steps, STEPS)
            work = flops * count * STEPS if flops else None
            found.append(figure_of(f"sweep_{count}_{kind}", "run-updates/s", count * STEPS, work, call, REPEATS))
            count *= 2
    return found + parts(base, min(most, 4 if cpu else 64))


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
    state = jax.jit(made.training.init)(run)
    compiled = jax.jit(made.training.steps, donate_argnums=1).lower(run, state, jnp.arange(STEPS)).compile()
    flops = flops_of(compiled)
    call = _continued(state, lambda state, numbers: compiled(run, state, numbers), STEPS)
    return figure_of("one_by_one", "run-updates/s", STEPS, flops * STEPS if flops else None, call, REPEATS), flops


def _over(made: Bundle, kind: str, steps: Steps, count: int) -> Callable[[], Any]:
    """A call that makes `count` steps of every run, as one program, and goes on where the last call ended."""
    layout = make_layout(len(made.runs), kind)
    data = place(layout, stacked(made, prepare.untrained_weights))
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


def parts(base: TrainSettings, count: int) -> list[Figure]:
    """Seconds of an epoch of `count` runs by part, in the default layout; each part is a program of its own."""
    made = _made(base, count)
    found = []
    for name, part in _parts(made).items():
        steps = 1 if name == "validate" else STEPS

        def scanned(run: Run, state: TrainState, numbers: Array, part: Any = part) -> tuple[TrainState, Any]:
            one = lambda state, number: part(run, state, jax.random.fold_in(run.key, number))  # noqa: E731
            return jax.lax.scan(one, state, numbers)

        times = 1 if name == "validate" else EPOCH // STEPS
        told = figure_of(f"epoch_{name}_{count}_runs", "s", 1.0, None, _over(made, "auto", scanned, steps), REPEATS)
        value, low, high = (times / speed for speed in (told.value, told.low, told.high))
        found.append(dataclasses.replace(told, value=value, low=low, high=high))
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
