"""The paper's Figure 3: best validation return of SAC+GeMS against the weights of GeMS's loss.

    python -m experiments.figure3 --budget full --catalogues DIR
    python -m experiments.figure3 --budget small --seeds 58407201

Left: against beta (the KL term) at lambda 0.5; right: against lambda (the click term) at beta 1; latent widths 16 and
32, means over seeds with 95 % Student-t intervals. Expected: published is that beta 1.0 is best for both widths, and
305.3 as the test return there (lambda 0.5, width 32); of ours nothing has been run but that point, at the full budget:
321.7, 309.2 and 135.3 (`results/table2/full-published`). Each point needs its own pre-trained GeMS.

Budgets: full 100,000 trajectories and ten seeds (200 runs); small 10,000 and three (60 runs); smoke for tests. By the
speeds of the benchmark on two cores (`results/benchmark_xeon.json`: SAC+GeMS 93 steps/s; pre-training 173 batches/s,
351,560 of them in full), not timed, a run takes about 52 minutes in full and 3.5 at small, so full about a week, small
3.5 hours, and the second command 70 minutes, compiling not counted. Records are below `OUT/<budget>-<variant>`, and CSV
and pictures made from all of an environment's records there. Without `--catalogues` the items are the project's own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from experiments import _study, _tables
from experiments._cli import run_cli
from gemsjax import disk, methods, plots
from gemsjax.errors import require
from gemsjax.maths.statistics import Estimate, t_interval

BETAS = (0.1, 0.2, 0.5, 1.0, 1.5, 2.0)
LAMBDAS = (0.0, 0.2, 0.5, 0.8, 1.0)
WIDTHS = (16, 32)


@dataclasses.dataclass(frozen=True)
class Arguments(_study.Arguments):
    """What to run and where to keep it."""

    variant: str = "published"
    """published, as the paper was made: with the published implementation's slips; or corrected."""
    betas: tuple[float, ...] = BETAS
    """Weights of the KL term."""
    lambdas: tuple[float, ...] = LAMBDAS
    """Weights of the click term."""
    widths: tuple[int, ...] = WIDTHS
    """Latent widths."""
    methods: tuple[str, ...] = ("sac-gems",)
    """Methods that act through GeMS."""
    out: Path = Path("results/figure3")
    """Root of records and pictures."""


Point = tuple[float, float, int]
"""Beta, lambda, latent width."""
_POINT = ("beta", "click_weight", "latent_dim")


def points(arguments: Arguments) -> list[Point]:
    """Both lines of the picture; the point that they share once."""
    lines = [(beta, 0.5, d) for d in arguments.widths for beta in arguments.betas]
    lines += [(1.0, weight, d) for d in arguments.widths for weight in arguments.lambdas]
    return list(dict.fromkeys(lines))


def jobs(arguments: Arguments, env: str) -> list[_study.Job]:
    """Every run, seed by seed."""
    made = []
    for seed in arguments.all_seeds:
        for method in arguments.methods:
            entry = methods.method(method)
            require(entry.learns and entry.ranker == "gems", "--methods", method, "methods that act through GeMS")
            made += [_job(arguments, method, env, seed, point) for point in points(arguments)]
    return made


def _job(arguments: Arguments, method: str, env: str, seed: int, point: Point) -> _study.Job:
    return arguments.job(method, env, seed, gems=dict(zip(_POINT, point, strict=True)))


def _point(record: dict[str, Any]) -> Point:
    beta, weight, width = (record["config"]["gems"][name] for name in _POINT)
    return beta, weight, width


def _again(arguments: Arguments, env: str, record: dict[str, Any]) -> _study.Job | None:
    """The job of a record of this environment."""
    if record["env"] != env or methods.method(record["method"]).ranker != "gems":
        return None
    return _job(arguments, record["method"], env, record["seed"], _point(record))


def estimates(records: Sequence[dict[str, Any]]) -> dict[tuple[str, Point], Estimate]:
    """Best validation return by method and point: mean over seeds with its interval."""
    values: dict[tuple[str, Point], list[float]] = {}
    for record in records:
        values.setdefault((record["method"], _point(record)), []).append(record["best_validation"])
    return {key: t_interval(group) for key, group in values.items()}


def _lines(table: dict[tuple[str, Point], Estimate], axis: int) -> dict[str, list[tuple[float, Estimate]]]:
    """Points along beta (axis 0, at lambda 0.5) or lambda (axis 1, at beta 1) by method and width."""
    other, fixed = 1 - axis, (1.0, 0.5)
    lines: dict[str, list[tuple[float, Estimate]]] = {}
    for (method, point), estimate in table.items():
        if point[other] == fixed[other]:
            lines.setdefault(f"{methods.marked(method, False)}, d = {point[2]}", []).append((point[axis], estimate))
    return {label: sorted(line, key=lambda p: p[0]) for label, line in lines.items()}


def main(arguments: Arguments) -> None:
    directory, places, place = arguments.directory, arguments.places, _tables.place_of(arguments)
    for env in arguments.envs:
        wanted = _tables.together(jobs(arguments, env), arguments, functools.partial(_again, arguments, env))
        records = _study.perform(wanted, places)
        records.sort(key=lambda one: (place(one)[1], _point(one)[::-1], place(one)))
        table = estimates(records)
        panels = {"beta (lambda 0.5)": _lines(table, 0), "lambda (beta 1)": _lines(table, 1)}
        picture = plots.save(
            plots.lines_with_intervals(panels, "best validation return"), directory / f"figure3_{env}.png"
        )
        disk.write(directory / f"figure3_{env}.md", f"{env}. {_tables.budget_of(records, arguments)}\n".encode())
        lines = ["method,beta,lambda,latent_dim,mean,low,high"]
        lines += [f"{m},{p[0]},{p[1]},{p[2]},{e.value:.3f},{e.low:.3f},{e.high:.3f}" for (m, p), e in table.items()]
        disk.write(directory / f"figure3_{env}.csv", ("\n".join(lines) + "\n").encode())
        print("\n".join(lines))
        print(f"picture: {picture}")


if __name__ == "__main__":
    run_cli(lambda: main(tyro.cli(Arguments, prog="python -m experiments.figure3", description=__doc__)))
