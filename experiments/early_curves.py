"""The first 3,000 trajectories of training beside those of the published implementation: do we learn as it does?

    python -m experiments.early_curves --catalogues DIR

Four methods as published, five seeds each, on focused TopDown with the published item embeddings, in the set-up that
was recorded of the published implementation, one run a method (`experiments._paper.EARLY`): 200 random trajectories, a
slate VAE of 5 epochs on 1,800 users. DIR holds the authors' `item_embeddings_focused.npy` and `mf_focused_topdown.npy`.
An interval is where one more run of ours would lie 19 times of 20, so about one in twenty of
the recorded means may lie outside. About 15 minutes on two cores.

Records, Markdown, CSV and a picture are below `OUT/full-published`; `--budget smoke` is for tests, and needs no DIR.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from experiments import _study
from experiments._cli import run_cli
from experiments._paper import EARLY, EARLY_STEP
from gemsjax import disk, plots
from gemsjax.errors import require, require_choice
from gemsjax.maths.statistics import Estimate, prediction_interval

BUDGETS = {
    "full": _study.Budget(
        trajectories=3_000,
        epoch=EARLY_STEP,
        seeds=5,
        gems={"users": 2_000, "epochs": 5},
        plan={"warm_up": 200},
    ),
    "smoke": _study.BUDGETS["smoke"],
}
RECORDED = "focused_topdown"
"""The environment that the published implementation was recorded in."""


@dataclasses.dataclass(frozen=True)
class Arguments(_study.Arguments):
    """What to run and where to keep it."""

    budget: str = "full"
    """full or smoke."""
    variant: str = "published"
    """published, or corrected: what the corrections change at the beginning."""
    methods: tuple[str, ...] = tuple(EARLY)
    """Methods."""
    out: Path = Path("results/early_curves")
    """Root of records, table and picture."""

    @property
    def spending(self) -> _study.Budget:
        """The budget.

        Raises:
          SettingError: an unknown one.
        """
        require_choice("--budget", self.budget, BUDGETS)
        return BUDGETS[self.budget]


@dataclasses.dataclass(frozen=True)
class Point:
    """Mean clicks of a training trajectory in one stretch of training.

    Attributes:
      method: of the runs.
      privileged: as they were run.
      step: the last trajectory of the stretch.
      recorded: of the published implementation, with 1.96 standard errors; None where nothing was recorded.
      ours: mean over seeds with the interval of one more run.
    """

    method: str
    privileged: bool
    step: int
    recorded: Estimate | None
    ours: Estimate

    @property
    def title(self) -> str:
        """Of the method, with the mark of privileged information."""
        return _study.marked(self.method, self.privileged)

    @property
    def outside(self) -> bool:
        """The recorded mean lies outside the interval (False while there is none)."""
        return self.recorded is not None and not self.ours.low <= self.recorded.value <= self.ours.high


def jobs(arguments: Arguments) -> list[_study.Job]:
    """All runs, seed by seed.

    Raises:
      SettingError: something else than was recorded is asked for.
    """
    require(arguments.envs == (RECORDED,), "--envs", " ".join(arguments.envs), f"{RECORDED}, which was recorded")
    for method in arguments.methods:
        require_choice("--methods", method, EARLY)
    found = arguments.catalogues is not None or arguments.spending is BUDGETS["smoke"]
    require(found, "--catalogues", None, "a directory with the published embeddings")
    return [_job(arguments, method, seed) for seed in arguments.all_seeds for method in arguments.methods]


def _job(arguments: Arguments, method: str, seed: int) -> _study.Job:
    if method != "sac-topk-mf" or arguments.catalogues is None:
        return arguments.job(method, RECORDED, seed)
    return arguments.job(method, RECORDED, seed, embeddings=str(arguments.catalogues / f"mf_{RECORDED}.npy"))


def points(records: Sequence[dict[str, Any]]) -> list[Point]:
    """Every stretch of every method; records of one method have the same ones."""
    found: dict[tuple[str, bool, int], list[float]] = {}
    for record in records:
        for row in record["validation"]:
            found.setdefault((record["method"], record["privileged"], row["step"]), []).append(row["return"])
    return [Point(*key, _recorded(key[0], key[2]), prediction_interval(values)) for key, values in found.items()]


def _recorded(method: str, step: int) -> Estimate | None:
    number, rest = divmod(step, EARLY_STEP)
    if rest or not 0 < number <= len(EARLY[method]):
        return None
    mean, error = EARLY[method][number - 1]
    return Estimate(mean, mean - 1.96 * error, mean + 1.96 * error)


def markdown(table: Sequence[Point], says: str) -> str:
    """One row a method: the recorded mean, then ours with its interval, after each stretch."""
    steps = sorted({point.step for point in table})
    legend = "Recorded / ours (where one more run of ours would lie); ° the recorded one lies outside, ‡ privileged."
    lines = [says, "", legend, "", "| method | " + " | ".join(f"{step:,}" for step in steps) + " |"]
    lines.append("|---" * (len(steps) + 1) + "|")
    for title in dict.fromkeys(point.title for point in table):
        cells = [_cell(point) for step in steps for point in table if (point.title, point.step) == (title, step)]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(point: Point) -> str:
    recorded = "" if point.recorded is None else f"{point.recorded.value:.1f}{'°' if point.outside else ''}"
    return f"{recorded} / {point.ours.value:.1f} ({point.ours.low:.1f} to {point.ours.high:.1f})"


def _panels(table: Sequence[Point], seeds: int) -> dict[str, dict[str, list[tuple[float, Estimate]]]]:
    panels: dict[str, dict[str, list[tuple[float, Estimate]]]] = {}
    for point in table:
        lines = panels.setdefault(point.title, {})
        lines.setdefault(f"this project, {seeds} seeds", []).append((point.step, point.ours))
        if point.recorded is not None:
            lines.setdefault("published implementation, one", []).append((point.step, point.recorded))
    return panels


def main(arguments: Arguments) -> None:
    records = _study.perform(jobs(arguments), arguments.places)
    table, directory = points(records), arguments.directory
    text = markdown(table, _study.budget_of(records, arguments))
    disk.write(directory / "early_curves.md", text.encode())
    lines = ["method,trajectories,recorded,mean,low,high"]
    for point in table:
        recorded = "" if point.recorded is None else f"{point.recorded.value:.2f}"
        numbers = ",".join(f"{x:.3f}" for x in point.ours)
        lines.append(f"{point.method},{point.step},{recorded},{numbers}")
    disk.write(directory / "early_curves.csv", ("\n".join(lines) + "\n").encode())
    figure = plots.lines_with_intervals(_panels(table, len(arguments.all_seeds)), "clicks a training trajectory")
    picture = plots.save(figure, directory / "early_curves.png")
    print(text)
    print(f"picture: {picture}")


if __name__ == "__main__":
    run_cli(lambda: main(tyro.cli(Arguments, prog="python -m experiments.early_curves", description=__doc__)))
