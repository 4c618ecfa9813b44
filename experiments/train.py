"""Train one method in one environment; what it needs (logged data, a pre-trained GeMS) is made first and kept.

    python -m experiments.train --method sac-gems --env focused_topdown --seed 58407201

As in the paper: 100,000 trajectories, validation every 1000 on 200 users, the best policy tested on 500. About an hour
on two CPU cores at the speeds of the benchmark, pre-training included; the published implementation returns 305 there.
Ctrl-C, SIGTERM and even SIGKILL lose at most the epoch in progress: the same command with --resume continues to the
same numbers.
A shorter run: --steps 5000 --gems.users 4000 --gems.epochs 4 --warm-up 100 --initial-alpha 0.01.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments._cli import run_cli
from gemsjax import methods, plots, prepare, runs, tracking
from gemsjax.devices import use_precision, use_unroll
from gemsjax.pretrain.matrix_factorisation import MFSettings
from gemsjax.settings import GeMSSettings, PLSettings, TrainSettings, defaults


@dataclasses.dataclass(frozen=True)
class Where:
    """Where results go, and what to do with earlier ones."""

    out: Path = Path("runs")
    """Root of all runs."""
    data: Path = Path("logs")
    """Root of logged data."""
    resume: bool = False
    """Continue an interrupted run."""
    overwrite: bool = False
    """Delete an earlier run of the same name first."""
    track: str = "none"
    """Also log to: tensorboard or wandb."""
    precision: str = "default"
    """Of float32 matrix products on accelerators: default (JAX's own), high or highest. Continue a run with its own."""
    unroll: int = 1
    """Turns that a pass of the beliefs' scans makes, up to 100: fewer passes on a GPU, a larger program to compile."""


def arguments_of(name: str, variant: str) -> type:
    """The command line of one method in a variant, whose values are the defaults: all of its settings are flags."""
    entry, usual = methods.method(name), defaults(name, variant)
    plain = (f for f in dataclasses.fields(TrainSettings) if f.name in _PLAIN)
    fields: list[Any] = [(f.name, f.type, usual.get(f.name, f)) for f in plain]
    for part in ("plan", "hypers", "spec"):
        kind: Any = type(usual[part])
        fields.append((part, Annotated[kind, tyro.conf.OmitArgPrefixes], usual[part]))
    if entry.ranker == "gems":
        fields.append(("gems", GeMSSettings, usual["gems"]))
    if "mf" in entry.embeddings:
        fields.append(("mf", MFSettings, usual["mf"]))
    if entry.ranker == "pl":
        fields.append(("pl", PLSettings, usual["pl"]))
    fields.append(("where", tyro.conf.OmitArgPrefixes[Where], Where()))
    made = dataclasses.make_dataclass("Arguments", fields, frozen=True)
    made.__doc__ = TrainSettings.__doc__
    return made


_PLAIN = (
    "method", "variant", "env", "seed", "steps", "epoch_steps", "test_users", "test_stream", "catalogue",
    "env_settings", "embeddings",
)  # fmt: skip


def parse(arguments: list[str]) -> tuple[TrainSettings, Where]:
    """Settings from a command line; the method decides which flags there are."""
    chosen, _ = tyro.cli(Method, args=arguments, return_unknown_args=True, add_help=False)
    TrainSettings(method=chosen.method, variant=chosen.variant).resolved()  # who does not learn has no flags below
    parsed: Any = tyro.cli(
        arguments_of(chosen.method, chosen.variant),
        args=arguments,
        prog="python -m experiments.train",
        description=__doc__,
    )
    values = {f.name: getattr(parsed, f.name) for f in dataclasses.fields(parsed)}
    where = values.pop("where")
    return TrainSettings(**values).resolved(), where


@dataclasses.dataclass(frozen=True)
class Method:
    method: Annotated[str, tyro.conf.arg(help="method to train")] = "sac-gems"
    variant: Annotated[str, tyro.conf.arg(help="corrected or published")] = "corrected"


def main(settings: TrainSettings, where: Where) -> None:
    use_precision(where.precision)
    use_unroll(where.unroll)
    tracking.check_tracker(where.track)
    runs.check_directory(settings, where.out, resume=where.resume, overwrite=where.overwrite)
    world = prepare.world_of(settings)
    name = runs.name_of(settings)
    print(name.full)
    weights = prepare.frozen_weights(settings, world, where.out, where.data)
    outcome = runs.train(
        settings, world, weights, where.out, resume=where.resume, overwrite=where.overwrite, track=where.track
    )
    rows = tracking.read_metrics(outcome.directory)
    title = methods.marked(settings.method, settings.privileged, name.full)
    curve = plots.learning_curve(rows, title, users_per_step=settings.plan.users_per_step)
    plots.save(curve, outcome.directory / "learning_curve.png")
    if outcome.test is None:
        print(f"stopped after step {rows[-1]['step'] if rows else 0}; the same command with --resume continues")
        sys.exit(130)
    low, high = outcome.test.interval
    print(f"test: {outcome.test.mean:.1f} clicks in an episode (95 % interval {low:.1f} to {high:.1f})")
    print(f"everything is in {outcome.directory}")


if __name__ == "__main__":
    run_cli(lambda: main(*parse(sys.argv[1:])))
