"""The first 3,000 trajectories of training beside those of the published implementation: do we learn as it does?

    python -m experiments.early_curves --catalogues DIR

Four methods as published, five seeds each, on focused TopDown with the published item embeddings, in the set-up that
was recorded of the published implementation, one run a method (`experiments._paper.EARLY`): 200 random trajectories, a
slate VAE of 5 epochs on 1,800 users. DIR holds the authors' `item_embeddings_focused.npy` and `mf_focused_topdown.npy`.
Compared are clicks of training trajectories, stretch by stretch, and at the end the greedy policy's on 200 users.

An interval is where one more run of ours would lie 19 times of 20, were it on the same logged data: with five seeds
three standard deviations either way, so lying within says little where seeds differ much. Stretches of one recorded run
go together: there are four comparisons rather than 28. The first stretch is random for two fifths.

Records are below `OUT/<budget>-<variant>`, and Markdown, CSV and a picture made from all records there.
`--budget smoke` is for tests, without DIR.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import tyro

from experiments import _study, _tables
from experiments._cli import run_cli
from experiments._paper import EARLY, EARLY_GREEDY, EARLY_STEP
from gemsjax import disk, methods, plots
from gemsjax.errors import require, require_choice
from gemsjax.maths.statistics import Estimate, prediction_interval

BUDGETS = {
    "recorded": _study.Budget(
        trajectories=3_000,
        epoch=EARLY_STEP,
        seeds=5,
        gems={"users": 2_000, "epochs": 5},
        plan={"warm_up": 200, "common_users": False},  # seeds on the same users would be too much alike
    ),
    "smoke": _study.BUDGETS["smoke"],
}
RECORDED = "focused_topdown"
"""The environment that the published implementation was recorded in."""


@dataclasses.dataclass(frozen=True)
class Arguments(_study.Arguments):
    """What to run and where to keep it."""

    budget: str = "recorded"
    """recorded or smoke."""
    variant: str = "published"
    """published, or corrected: what the corrections change at the beginning."""
    methods: tuple[str, ...] = tuple(EARLY)
    """Methods."""
    out: Path = Path("results/early_curves")
    """Root of records, table and picture."""
    budgets: ClassVar[Mapping[str, _study.Budget]] = BUDGETS


@dataclasses.dataclass(frozen=True)
class Point:
    """Clicks in one stretch of training, or of the greedy policy after it.

    Attributes:
      method: of the runs.
      privileged: as they were run.
      step: the last trajectory.
      greedy: the policy's own choices on validation users, not training trajectories.
      recorded: mean of the published implementation and its standard error; None where nothing was recorded.
      ours: mean over seeds with the interval of one more run (NaN with one seed).
    """

    method: str
    privileged: bool
    step: int
    greedy: bool
    recorded: tuple[float, float] | None
    ours: Estimate

    @property
    def title(self) -> str:
        """Of the method, with the mark of privileged information."""
        return methods.marked(self.method, self.privileged)

    @property
    def column(self) -> str:
        return f"{'greedy, after ' if self.greedy else ''}{self.step:,}"

    @property
    def outside(self) -> bool:
        """The recorded mean lies outside the interval (False while there is none of the two)."""
        return self.recorded is not None and (self.recorded[0] < self.ours.low or self.recorded[0] > self.ours.high)


def jobs(arguments: Arguments) -> list[_study.Job]:
    """All runs, seed by seed.

    Raises:
      SettingError: something else than was recorded is asked for.
    """
    require(arguments.envs == (RECORDED,), "--envs", " ".join(arguments.envs), f"{RECORDED}, which was recorded")
    for method in arguments.methods:
        require_choice("--methods", method, EARLY)
    given = arguments.catalogues is not None or arguments.spending is BUDGETS["smoke"]
    require(given, "--catalogues", None, "a directory with the published embeddings")
    return [_job(arguments, method, seed) for seed in arguments.all_seeds for method in arguments.methods]


def _job(arguments: Arguments, method: str, seed: int) -> _study.Job:
    if method != "sac-topk-mf" or arguments.catalogues is None:
        return arguments.job(method, RECORDED, seed)
    return arguments.job(method, RECORDED, seed, embeddings=str(arguments.catalogues / f"mf_{RECORDED}.npy"))


def points(records: Sequence[dict[str, Any]]) -> list[Point]:
    """Every stretch of every method, its greedy policy at the end; records of a method have the same stretches."""
    found: dict[tuple[str, bool, int, bool], list[float]] = {}
    for record in records:
        key, rows = (record["method"], record["privileged"]), record["validation"]
        for row in rows:
            found.setdefault((*key, row["step"], False), []).append(row["return"])
        found.setdefault((*key, rows[-1]["step"], True), []).append(rows[-1]["validation"])
    return [
        Point(method, privileged, step, greedy, _recorded(method, step, greedy), prediction_interval(values))
        for (method, privileged, step, greedy), values in found.items()
    ]


def _recorded(method: str, step: int, greedy: bool) -> tuple[float, float] | None:
    number, rest = divmod(step, EARLY_STEP)
    if rest or not 0 < number <= len(EARLY[method]):
        return None
    if greedy:
        return EARLY_GREEDY[method] if number == len(EARLY[method]) else None
    return EARLY[method][number - 1]


def markdown(table: Sequence[Point], says: str) -> str:
    """One row a method: the recorded mean, then ours with its interval, for each stretch and the greedy policy."""
    columns = dict.fromkeys(point.column for point in sorted(table, key=lambda point: (point.greedy, point.step)))
    legend = "Recorded / ours (where one more run of ours would lie); ° the recorded one lies outside, ‡ privileged."
    lines = [says, "", legend, "", f"| method | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for title in dict.fromkeys(point.title for point in table):
        cells = {point.column: _cell(point) for point in table if point.title == title}
        lines.append(f"| {title} | {' | '.join(cells.get(column, '') for column in columns)} |")
    return "\n".join(lines) + "\n"


def _cell(point: Point) -> str:
    recorded = "" if point.recorded is None else f"{point.recorded[0]:.1f}{'°' if point.outside else ''}"
    interval = "" if point.ours.low != point.ours.low else f" ({point.ours.low:.1f} to {point.ours.high:.1f})"
    return f"{recorded} / {point.ours.value:.1f}{interval}"


def comma_separated(table: Sequence[Point]) -> str:
    """The points as CSV; of ours the interval is that of one more run."""
    lines = ["method,privileged,trajectories,greedy,recorded,recorded_se,mean,one_more_low,one_more_high"]
    for point in table:
        recorded = ("", "") if point.recorded is None else point.recorded
        numbers = ",".join(f"{x:.3f}" for x in point.ours)
        lines.append(
            f"{point.method},{point.privileged},{point.step},{point.greedy},{recorded[0]},{recorded[1]},{numbers}"
        )
    return "\n".join(lines) + "\n"


def _panels(table: Sequence[Point], seeds: Mapping[str, int]) -> dict[str, dict[str, list[tuple[float, Estimate]]]]:
    """Lines of the training trajectories for `plots.lines_with_intervals`."""
    panels: dict[str, dict[str, list[tuple[float, Estimate]]]] = {}
    for point in table:
        if point.greedy:
            continue
        lines = panels.setdefault(f"{point.title}, trajectories", {})
        here = f"here: mean of {seeds[point.method]} seeds, where one more would lie"
        lines.setdefault(here, []).append((point.step, point.ours))
        if point.recorded is not None:
            mean, error = point.recorded
            recorded = Estimate(mean, mean - 1.96 * error, mean + 1.96 * error)
            lines.setdefault("published implementation: one run, 95 % of its mean", []).append((point.step, recorded))
    return panels


def main(arguments: Arguments) -> None:
    again = lambda record: _job(arguments, record["method"], record["seed"])  # noqa: E731
    wanted = _tables.together(jobs(arguments), arguments, again)
    records = sorted(_study.perform(wanted, arguments.places), key=_tables.place_of(arguments))
    table, directory = points(records), arguments.directory
    text = markdown(table, _tables.budget_of(records, arguments))
    disk.write(directory / "early_curves.md", text.encode())
    disk.write(directory / "early_curves.csv", comma_separated(table).encode())
    seeds = Counter(record["method"] for record in records)
    figure = plots.lines_with_intervals(_panels(table, seeds), "clicks in a training trajectory")
    picture = plots.save(figure, directory / "early_curves.png")
    print(text)
    print(f"picture: {picture}")


if __name__ == "__main__":
    run_cli(lambda: main(tyro.cli(Arguments, prog="python -m experiments.early_curves", description=__doc__)))
