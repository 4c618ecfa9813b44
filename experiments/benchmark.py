"""How fast the parts are, against what this machine could do at best.

    python -m experiments.benchmark --json results/benchmark.json
    python -m experiments.benchmark --only simulator_random train_sac-gems
    python -m experiments.benchmark --only sweep --json results/benchmark_sweep.json
    python -m experiments.benchmark --only sweep_60_compile_cold sweep_60_compile_warm
    python -m experiments.benchmark --only sweep --precision high --unroll 4 --json results/benchmark_sweep_high_4.json

Each figure is the median of several repetitions after a warm-up. The rate of a large float32 matrix product is measured
around each figure, because shared machines drift: `floor_fraction` is the time that the figure's floating-point
operations (counted by XLA's cost analysis) would take at that rate, over the time that it took. Simulation is hardly
arithmetic, so its fraction is small. About four minutes on two CPU cores, half of it for the two compile figures; the
speed of sweeps against their number of runs is measured only when asked for. `--precision` and `--unroll` are of the
whole process: to compare some, give each a command (and a file) of its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments import _sweep_benchmark
from experiments._cli import run_cli
from experiments._measure import Figure, figure_of, flops_of, matrix_rate, turn_flops
from gemsjax import datasets, disk, methods, personalisation, prepare, runs
from gemsjax.agents.base import Acting
from gemsjax.devices import surroundings, use_precision, use_unroll
from gemsjax.errors import require, require_choice
from gemsjax.evaluate import play_users
from gemsjax.prepare.gems import LEAST_SHARE, jitted
from gemsjax.pretrain.gems import Slates, make_pretraining
from gemsjax.pretrain.matrix_factorisation import Clicks, MFSettings, make_factorisation
from gemsjax.settings import GeMSSettings, TrainSettings
from gemsjax.shares import everywhere, sharers
from gemsjax.train import Run, make_training

USERS = 4_000
"""Simulated at once."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Which figures, and where to write them."""

    only: tuple[str, ...] = ()
    """Names of figures; all by default."""
    env: str = "focused_topdown"
    """Environment."""
    sweep_runs: int | None = None
    """Of `--only sweep`: the most runs; by default 8 on CPUs, and as many as memory holds on accelerators."""
    json: Path | None = None
    """Write machine and figures to this file, anew after each figure."""
    add: bool = False
    """Keep the figures in that file that are not measured now; refused if they are another machine's."""
    precision: str = "default"
    """Of float32 matrix products on accelerators, see `experiments.sweep`; the matrix rate is measured with it too."""
    unroll: int = 1
    """Turns that a pass of the beliefs' scans makes, see `experiments.sweep`."""


# -- the figures -------------------------------------------------------------------------------------------------------


def simulator(name: str, reference: str, settings: TrainSettings) -> Figure:
    """Turns a second of `USERS` users under a reference policy, all devices."""
    world = prepare.world_of(settings)
    entry = methods.method(reference)
    assert entry.policy is not None
    policy, counter = entry.policy(world.dims), iter(range(10**6))

    def play() -> Any:
        return play_users(world.env, policy, next(counter), USERS, world.params, Acting())

    flops = turn_flops(world.env, policy, world.params, Acting())
    turns = USERS * world.dims.horizon
    return figure_of(name, "turns/s", turns, flops * turns if flops else None, play)


def logged_users(settings: TrainSettings) -> Figure:
    """Users a second of the epsilon-greedy oracle, stored on disk; compiling is left out."""
    world, users = prepare.world_of(settings), 10_000
    marks: list[tuple[float, int]] = []
    before = matrix_rate()
    with tempfile.TemporaryDirectory() as directory:
        report = lambda done: marks.append((time.perf_counter(), done))  # noqa: E731
        datasets.generate(world.env, world.params, Path(directory) / "log", users=users, on_progress=report)
    rate = (before + matrix_rate()) / 2
    marks = [mark for mark in marks if mark[1] > 0]  # the first chunk carries the compilation
    speeds = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(marks[:-1], marks[1:], strict=True)]
    overall = (marks[-1][1] - marks[0][1]) / (marks[-1][0] - marks[0][0])
    return Figure("logged_users", overall, "users/s", None, rate, min(speeds), max(speeds))


def gems_pretraining(settings: TrainSettings) -> Figure:
    """Updates a second of the slate VAE at its batch of 256 slates."""
    world, gems, batches = prepare.world_of(settings), GeMSSettings(), 40
    pretraining = make_pretraining(gems.spec, world.dims)
    rng = np.random.default_rng(0)
    slates = rng.integers(0, world.dims.num_items, (100_000, world.dims.slate_size), np.int16)
    data = Slates(jnp.asarray(slates), jnp.asarray(rng.random(slates.shape) < 0.1))
    state, hypers = jax.jit(pretraining.init)(jax.random.key(0)), prepare.as_arrays(gems.hypers)
    inputs = (state, hypers, jax.random.key(0), data, jnp.int32(0), jnp.arange(batches))
    flops = flops_of(jax.jit(pretraining.updates).lower(*inputs).compile())
    devices = sharers(gems.batch_size, LEAST_SHARE)
    inputs = everywhere(devices, inputs)
    compiled = jitted(devices, pretraining.updates).lower(*inputs).compile()
    return figure_of(
        "gems_pretraining", "batches/s", batches, flops * batches if flops else None, lambda: compiled(*inputs)
    )


def mf_pretraining(_settings: TrainSettings) -> Figure:
    """Positive pairs a second of the matrix factorisation: 100,000 users with 95 made-up clicks each, 1,000 items."""
    mf, users, items, each, count = MFSettings(), 100_000, 1_000, 95, 1_000
    clicked = np.random.default_rng(0).integers(0, items, users * each).astype(np.int16)
    clicks = Clicks(jnp.asarray(np.repeat(np.arange(users, dtype=np.int32), each)), jnp.asarray(clicked))
    factorisation, key, rate = make_factorisation(mf, users, items), jax.random.key(0), jnp.float32(mf.rate)
    held: dict[str, Any] = {"state": jax.jit(factorisation.init)(key), "done": 0}
    ids = jnp.zeros(mf.batch_size, jnp.int32)
    flops = flops_of(jax.jit(factorisation.step).lower(held["state"], ids, ids, ids, rate).compile())
    updates = jax.jit(factorisation.updates, donate_argnums=0)

    def call() -> Any:
        batches = np.arange(held["done"], held["done"] + count, dtype=np.int32)
        held["state"], losses = updates(held["state"], rate, key, clicks, batches)
        held["done"] += count
        return losses

    pairs = count * mf.batch_size
    return figure_of("mf_pretraining", "pairs/s", pairs, flops * count if flops else None, call)


def personalisation_updates() -> Figure:
    """User updates a second in a store of a million users: 64 candidates of 32 numbers, scored and learnt from.

    The kindest case: all users of a batch are distinct, so that there is one round, and the same batch lies on the
    devices already (`store.share`), so neither making it nor moving it there is measured; ids are of the host. Batches
    of NumPy arrays and repeated users are slower, see docs/performance.md. The floor counts the two products with
    the candidates; they are bound by memory, since every number takes part in each once.
    """
    users, dim, candidates, batch = 1_000_000, 32, 64, 16_384
    rng, store = np.random.default_rng(0), personalisation.make_store(users, dim)
    numbers = lambda *shape: rng.standard_normal((batch, *shape), np.float32)  # noqa: E731
    one, there = np.ones((batch, 1), bool), np.ones((batch, candidates), bool)
    chosen, gate = rng.integers(0, candidates, (batch, 1), np.int32), np.ones(batch, np.float32)
    parts = (numbers(candidates), numbers(candidates, dim), there, chosen, one, numbers(), gate)
    served = personalisation.Interaction(*map(jnp.asarray, parts))
    ids, served = rng.choice(users, batch, replace=False), store.share(served)
    held, config = {"table": store.init()}, personalisation.PersonalisationConfig()

    def call() -> Any:
        learnt = store.update(held["table"], ids, served, config)
        held["table"] = learnt.table
        return learnt.updated

    return figure_of("personalisation_updates", "updates/s", batch, 4.0 * candidates * dim * batch, call)


def train(method: str, settings: TrainSettings) -> Figure:
    """Training steps a second: one trajectory and one update each (or as many as the method's plan says)."""
    usual = methods.method(method).plan
    plan = dataclasses.replace(usual, warm_up=min(usual.warm_up, usual.batch_size))
    settings = TrainSettings(method=method, env=settings.env, plan=plan).resolved()
    world, count = prepare.world_of(settings), 40
    weights = prepare.untrained_weights(settings, world)
    agent = runs.make_agent(settings, world, weights)
    run = Run(jax.random.key(0), prepare.as_arrays(settings.hypers), weights, world.params)
    call, flops = _sweep_benchmark.steps_of_one(make_training(world.env, agent, plan), agent, plan, run, count)
    return figure_of(f"train_{method}", "steps/s", count, flops * count if flops else None, call)


def compile_figures(only: set[str]) -> list[Figure]:
    """Seconds that a shortened quickstart compiles, in a new process: with an empty cache, then with that cache."""
    figures = []
    rate = matrix_rate()
    with tempfile.TemporaryDirectory() as directory:
        for name in ("compile_cold", "compile_warm"):
            if name == "compile_warm" or only & {"compile_cold", "compile_warm"}:
                seconds = _quickstart_compile_seconds(Path(directory), name)
                figures.append(Figure(name, seconds, "s", None, rate, seconds, seconds))
    return [figure for figure in figures if figure.name in only]


def _quickstart_compile_seconds(directory: Path, name: str) -> float:
    """The quickstart's own programs at their own sizes, fewer of their repetitions."""
    out = directory / f"{name}.json"
    command = [sys.executable, "-m", "experiments.quickstart", "--steps", "500", "--json", str(out)]
    environment = os.environ | {"GEMSJAX_COMPILE_CACHE": str(directory / "cache")}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run([*command, "--out", str(directory / name)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"the quickstart failed: {done.stderr.strip() or done.stdout.strip()}")
    return float(json.loads(out.read_text())["seconds"]["compile"])


def available() -> dict[str, Callable[[TrainSettings], Figure]]:
    """Figures by name, those of the compile times left out."""
    figures: dict[str, Callable[[TrainSettings], Figure]] = {
        "simulator_random": lambda settings: simulator("simulator_random", "random", settings),
        "simulator_oracle": lambda settings: simulator("simulator_oracle", "short-term-oracle", settings),
        "logged_users": logged_users,
        "gems_pretraining": gems_pretraining,
        "mf_pretraining": mf_pretraining,
        "personalisation_updates": lambda _: personalisation_updates(),
    }
    for name in methods.learners():
        figures[f"train_{name}"] = lambda settings, name=name: train(name, settings)  # type: ignore[misc]
    return figures


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    about = surroundings()
    return {
        "device": f"{about['device']['platform']}: {about['device']['kind']}",
        "devices": len(jax.devices()),
        "cores": os.cpu_count(),
        "gemm_gflops": matrix_rate(),
        **{name: about["versions"][name] for name in ("python", "jax")},
        **{name: about[name] for name in ("precision", "unroll")},
    }


def main(arguments: Arguments) -> None:
    use_precision(arguments.precision)
    use_unroll(arguments.unroll)
    console, figures = Console(), available()
    compile_names = {"compile_cold", "compile_warm"}
    if (arguments.precision, arguments.unroll) != ("default", 1):  # the quickstart's process has neither
        asked = sorted(compile_names & set(arguments.only))
        require(not asked, "--only", asked, "others: the quickstart, whose time it is, has no --precision or --unroll")
        compile_names = set()
    for name in arguments.only:
        require_choice("--only", name, [*figures, "compile_cold", "compile_warm", *_sweep_benchmark.NAMES])
    if arguments.json is not None:  # now, so that a wrong place is not found out at the end
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
    wanted = set(arguments.only) or {*figures, *compile_names}
    settings, about = TrainSettings(env=arguments.env), machine()
    measured: list[Figure] = []
    kept = earlier(arguments.json, about) if arguments.add else []

    def note(figure: Figure) -> None:
        measured.append(figure)
        console.print(f"{figure.name}: {figure.value:,.4g} {figure.unit}")
        if arguments.json is not None:
            write(arguments.json, about, kept, measured)

    for name, measure in figures.items():
        if name in wanted:
            with console.status(name):
                note(measure(settings))
    with console.status("sweep"):
        for figure in _sweep_benchmark.figures(settings, arguments.sweep_runs, wanted):
            note(figure)
    if wanted & compile_names:
        with console.status("compile_cold, compile_warm"):
            for figure in compile_figures(wanted & compile_names):
                note(figure)
    _print(console, measured)


def earlier(path: Path | None, about: dict[str, Any]) -> list[Figure]:
    """Figures that an earlier benchmark left in a file.

    Raises:
      SettingError: no file to add to, or one of another kind of machine.
    """
    require(path is not None, "--add", True, "with --json FILE")
    if path is None or not path.exists():
        return []
    held = json.loads(path.read_text(encoding="utf-8"))
    usual = {"precision": "default", "unroll": 1}  # of files from before these were recorded
    for fact in ("device", "devices", "jax", *usual):
        there, here = held["machine"].get(fact, usual.get(fact)), about.get(fact, usual.get(fact))
        require(there == here, "--add", str(path), f"a file of this machine: {fact} is {there} there and {here} here")
    return [Figure(**figure) for figure in held["figures"]]


def write(path: Path, about: dict[str, Any], kept: list[Figure], measured: list[Figure]) -> None:
    """Write the machine and all figures; of two of one name, the one measured now."""
    now = {figure.name: figure for figure in measured}
    found = [*(figure for figure in kept if figure.name not in now), *measured]
    rates = [about["gemm_gflops"], *(figure.gemm_gflops for figure in found)]
    disk.write_json(path, {"machine": about | {"gemm_gflops": statistics.median(rates)}, "figures": found})


def _print(console: Console, measured: list[Figure]) -> None:
    table = Table("figure", "median", "slowest to fastest", "unit", "of the floor", "matrix rate, GFLOP/s")
    for f in measured:
        share = "" if f.floor_fraction is None else f"{f.floor_fraction:.1%}"
        table.add_row(
            f.name, f"{f.value:,.4g}", f"{f.low:,.4g} to {f.high:,.4g}", f.unit, share, f"{f.gemm_gflops:.0f}"
        )
    console.print(table)


if __name__ == "__main__":
    run_cli(lambda: main(tyro.cli(Arguments, prog="python -m experiments.benchmark", description=__doc__)))
