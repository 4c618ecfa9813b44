"""See SAC+GeMS learn to beat the short-term oracle, from nothing, on a laptop.

    python -m experiments.quickstart

Logs users, pre-trains GeMS on their slates, trains SAC in its latent space, and compares the policy with random slates,
the logging policy and the short-term oracle; writes a table, a checkpoint and two pictures. About three minutes on two
CPU cores. Expect SAC+GeMS above 250 clicks where the oracle has about 104.

The preset differs from the paper in what makes it fast: 4,000 trajectories instead of 100,000, 4,000 logged users and
4 epochs instead of 100,000 and 10, 100 random trajectories instead of 2,000, and a temperature that starts at 0.01
instead of 1 (the published start needs about 7,500 trajectories to pass the oracle). `experiments.train` follows
the paper.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from experiments._cli import run_cli
from gemsjax import disk, methods, plots, prepare, runs, tracking
from gemsjax.agents.base import Acting
from gemsjax.agents.sac import SACHypers
from gemsjax.clock import CompileClock, compile_clock
from gemsjax.devices import surroundings
from gemsjax.evaluate import Evaluation, evaluate, recommended_scores
from gemsjax.settings import GeMSSettings, TrainSettings
from gemsjax.train import Plan

REFERENCES = ("random", "short-term-oracle", "epsilon-greedy-oracle")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What may be changed; the defaults are the quickstart."""

    env: str = "focused_topdown"
    """Name of an environment."""
    catalogue: str | None = None
    """File or name of item embeddings instead of the environment's own."""
    seed: int = 58407201
    """Of pre-training and training; logged data are the same for all."""
    steps: int = 4_000
    """Training trajectories."""
    smoke: bool = False
    """Everything at the smallest size, in under a minute: to test an installation, not to learn."""
    out: Path | None = None
    """Directory for everything; by default a new one, runs/quickstart or runs/quickstart-2 and so on."""
    json: Path | None = None
    """Write the table, the seconds of each stage, and what was run on what to this file."""


def preset(arguments: Arguments) -> TrainSettings:
    """The settings of the quickstart."""
    smoke = arguments.smoke
    settings = TrainSettings(
        env=arguments.env,
        seed=arguments.seed,
        steps=40 if smoke else arguments.steps,
        epoch_steps=20 if smoke else min(500, arguments.steps),
        test_users=50 if smoke else 500,
        catalogue=arguments.catalogue,
        plan=Plan(warm_up=20 if smoke else 100, replay_capacity=4_000, validation_users=20 if smoke else 200),
        # Starting the temperature low finds a good policy ten times sooner; see the head of this file.
        hypers=SACHypers(initial_alpha=0.01, first_alpha=0.01),
        gems=GeMSSettings(users=100, epochs=1) if smoke else GeMSSettings(users=4_000, epochs=4),
    )
    return settings.resolved()


class Stages:
    """Wall-clock seconds of each stage, compiling included, in order."""

    def __init__(self, console: Console) -> None:
        self.seconds: dict[str, float] = {}
        self._console = console

    @contextmanager
    def __call__(self, name: str, says: str) -> Iterator[None]:
        self._console.print(f"[bold]{says}[/bold]")
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


def main(arguments: Arguments) -> None:
    console = Console()
    settings = preset(arguments)
    if arguments.json is not None:  # now, so that a wrong place is not found out at the end
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
    world = prepare.world_of(settings)
    root = _free(Path("runs/quickstart")) if arguments.out is None else arguments.out
    tracking.check_run_directory(root / runs.name_of(settings).directory, resume=False, overwrite=False)
    stages = Stages(console)
    with compile_clock() as clock:
        with stages("references", f"References in {settings.env}, {settings.test_users} users"):
            table = {name: _reference(name, world, settings.test_users) for name in REFERENCES}
        with stages("logged_data", f"Logging {settings.gems.users:,} users of the epsilon-greedy oracle"):
            data = prepare.logged_data(settings, world, root / "logs")
        with stages("gems_pretraining", "Pre-training GeMS on their slates"):
            weights = prepare.pretrained_gems(settings, world, root, lambda: data)
        with stages("training", "Training SAC in GeMS's latent space (temperature started low, see --help)"):
            outcome = runs.train(settings, world, weights, root)
        if outcome.test is None:
            raise KeyboardInterrupt(f"what there is lies in {outcome.directory}")
        table[settings.method] = outcome.test
        with stages("pictures", "Drawing"):
            pictures = _draw(settings, world, outcome.directory, root, table)
    _show(console, table, stages.seconds, clock)
    for picture in pictures:
        console.print(f"picture: {picture}", soft_wrap=True)
    console.print(f"checkpoint: {outcome.directory / 'checkpoints'}", soft_wrap=True)
    if arguments.json is not None:
        rows = [runs.table_row(settings.env, name, evaluation) for name, evaluation in table.items()]
        seconds = stages.seconds | {"compile": clock.seconds, "total": sum(stages.seconds.values())}
        facts = runs.facts_of(settings, prepare.identity_of(settings, world))
        facts["privileged_methods"] = [name for name in table if methods.method(name).privileged]
        disk.write_json(arguments.json, {"table": rows, "seconds": seconds, **facts, **surroundings()})


def _free(path: Path) -> Path:
    """`path`, or `path-2`, `path-3` ... : a quickstart never touches an earlier one."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def _reference(name: str, world: prepare.World, users: int) -> Evaluation:
    entry = methods.method(name)
    assert entry.policy is not None
    return evaluate(world.env, entry.policy(world.dims), world.params, users=users)


def _marked(name: str) -> str:
    return methods.marked(name, methods.method(name).privileged)


def _draw(
    settings: TrainSettings, world: prepare.World, directory: Path, root: Path, table: dict[str, Evaluation]
) -> list[Path]:
    rows = tracking.read_metrics(directory)
    title = f"{_marked(settings.method)} in {settings.env}"
    references = {_marked(name): table[name] for name in REFERENCES}
    trained = runs.load(directory)
    oracle = methods.method("short-term-oracle")
    assert oracle.policy is not None
    policies: dict[str, tuple[Any, Acting]] = {
        _marked("short-term-oracle"): (oracle.policy(world.dims), Acting()),
        _marked(settings.method): (trained.agent.greedy, trained.acting),
    }
    users = min(200, settings.test_users)
    recommended = {
        name: recommended_scores(world.env, policy, world.params, acting, users)
        for name, (policy, acting) in policies.items()
    }
    offset = float(world.params.relevance_offset)
    return [
        plots.save(plots.learning_curve(rows, title, references), root / "learning_curve.png"),
        plots.save(plots.score_densities(recommended, offset), root / "item_scores.png"),
    ]


def _show(console: Console, table: dict[str, Evaluation], seconds: dict[str, float], clock: CompileClock) -> None:
    results = Table("method", "clicks in 100 turns", "95 % interval", "users", title="Test users")
    for name, evaluation in table.items():
        low, high = evaluation.interval
        results.add_row(
            _marked(name),
            f"{evaluation.mean:.1f}",
            f"{low:.1f} to {high:.1f}",
            str(evaluation.returns.size),
        )
    results.caption = methods.PRIVILEGED
    console.print(results)
    times = Table("stage", "seconds", title="Time")
    for name, spent in seconds.items():
        times.add_row(name.replace("_", " "), f"{spent:.1f}")
    times.add_row("together", f"{sum(seconds.values()):.1f}")
    times.caption = f"{clock.seconds:.1f} s of it compiling {clock.programs} programs"
    console.print(times)


if __name__ == "__main__":
    run_cli(lambda: main(tyro.cli(Arguments, prog="python -m experiments.quickstart", description=__doc__)))
