"""The paper's Table 2: methods by environments, mean return of the test users over seeds.

    python -m experiments.table2 --budget full --catalogues DIR
    python -m experiments.table2 --budget small --variant corrected --envs focused_topdown steady_topdown
    python -m experiments.table2 --budget long --variant corrected --envs focused_topdown --methods constant-slate
        --catalogues DIR

Every run leaves a record below `OUT/<budget>-<variant>/records`; the table (Markdown, CSV) and the picture are made
from all records there, whichever of them are asked for. Stopped and started again it continues: a run loses at most the
epoch it was in. `--catalogues` names a directory with the published item embeddings (`item_embeddings_focused.npy`,
`item_embeddings_diffuse.npy`); without it the project's own catalogues are used. Each catalogue wants its own `--out`.

Expected: published numbers, where there are any, stand in brackets (SAC+GeMS 305.3 on focused TopDown); ours are in
`results/table2`, of focused TopDown (mean ± half the 95 % interval over seeds, of references over users):
  full, published: SAC+GeMS 255.4 ± 258.8 (321.7, 309.2 and 135.3). Nothing else of the paper's table has been run.
  full, corrected: constant-slate 378.4 ± 39.1; random 34.0 ± 0.6, short-term oracle 107.1 ± 4.0.
  small, published: SAC+TopK(ideal) 349.9 ± 27.5, constant-slate 313.9 ± 84.2, SAC+TopK(MF) 289.4 ± 127.3,
    REINFORCE+SoftMax 237.9 ± 80.6, SAC+GeMS 176.1 ± 100.5, SlateQ 162.3 ± 18.9, SAC+WkNN 72.0 (one seed).
  small, corrected: SAC+TopK(ideal) 378.5 ± 3.6, SAC+TopK(MF) 371.8 ± 66.8, constant-slate 341.7 ± 65.1,
    REINFORCE+SoftMax 299.1 ± 211.9, SAC+GeMS 196.8 ± 56.5, SAC+WkNN 164.8 ± 200.7, SlateQ 149.3 ± 28.8.

Budgets, times on two cores: full is the paper's (100,000 trajectories, ten seeds). By the speeds of the benchmark
(`results/benchmark_xeon.json`), not timed, a run trains about 7 minutes (REINFORCE+SoftMax), 13 (SAC+TopK), 18 (SlateQ,
and SAC+GeMS after 34 of pre-training) or 96 (SAC+WkNN), so all of the paper's table takes more than a week. The three
runs of SAC+GeMS took 26 to 52 minutes of training; constant-slate 11 seconds. small is 10,000 trajectories and
three seeds: on one core, with other work beside it, a run took seconds (constant-slate), 1 to 3 minutes
(REINFORCE+SoftMax, SlateQ), 2 to 15 (SAC; GeMS's pre-training 2 to 7 more), 15 to 30 (SAC+WkNN). long is 2,000,000 and
one seed, validated every 200,000: only searches finish it in minutes; constant-slate took 202 seconds
and returned 409.5. smoke is for tests.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from experiments import _study, _tables
from experiments._cli import run_cli
from experiments._paper import ENVIRONMENTS, PAPER_METHODS, PUBLISHED
from gemsjax import disk, methods, plots
from gemsjax.maths.statistics import t_interval, welch

SIGNIFICANT = 0.05


@dataclasses.dataclass(frozen=True)
class Arguments(_study.Arguments):
    """What to run and where to keep it."""

    variant: str = "published"
    """published, as the paper was made: with the published implementation's slips; or corrected."""
    envs: tuple[str, ...] = ENVIRONMENTS
    """Environments."""
    methods: tuple[str, ...] = (*PAPER_METHODS, "constant-slate")
    """Methods."""
    out: Path = Path("results/table2")
    """Root of records, tables and pictures."""


def jobs(arguments: Arguments) -> list[_study.Job]:
    """All runs, seed by seed, so that an unfinished table has all methods.

    Raises:
      SettingError: an unknown budget, variant, method or environment.
    """
    return [
        arguments.job(method, env, seed)
        for seed in arguments.all_seeds
        for env in arguments.envs
        for method in arguments.methods
        if seed in arguments.seeds_of(method)
    ]


Cells = Mapping[tuple[str, str], list[float]]
"""Test returns of the seeds (of a reference: its users' mean alone), by method and environment."""


def cells(records: Sequence[Mapping[str, Any]]) -> Cells:
    """Returns by method and environment, one a seed."""
    found: dict[tuple[str, str], list[float]] = {}
    for record in records:
        found.setdefault((record["method"], record["env"]), []).append(record["test"]["mean_return"])
    return found


def best_learner(found: Cells, privileged: set[str], env: str) -> str | None:
    """The method with the highest mean in an environment among those that see nothing privileged."""
    means = {m: t_interval(values).value for (m, e), values in found.items() if e == env and m not in privileged}
    return max(means, key=lambda name: means[name], default=None)


def rows(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a cell: `method, env, privileged, seeds, mean, half_interval, p_against_best, best, published`."""
    found = cells(records)
    privileged = {record["method"] for record in records if record["privileged"]}
    table = []
    for (method, env), values in found.items():
        best, estimate = best_learner(found, privileged, env), t_interval(values)
        against = [] if best is None else found[(best, env)]
        half = estimate.half
        if not methods.method(method).learns:  # no seeds: the interval is that of the users
            record = next(r for r in records if (r["method"], r["env"]) == (method, env))
            half = 1.96 * record["test"]["se_return"]
        table.append(
            {
                "method": method,
                "env": env,
                "privileged": method in privileged,
                "seeds": len(values),
                "mean": estimate.value,
                "half_interval": half,
                "p_against_best": welch(values, against) if best not in (None, method) else math.nan,
                "best": method == best,
                "published": PUBLISHED.get((method, env), ""),
            }
        )
    return table


def markdown(table: Sequence[Mapping[str, Any]], says: str) -> str:
    """The table as Markdown, with a legend."""
    names, envs = _order(table, "method"), _order(table, "env")
    by_cell = {(row["method"], row["env"]): row for row in table}
    lines = [says, "", f"| method | {' | '.join(envs)} |", "|---" * (len(envs) + 1) + "|"]
    for name in names:
        title = methods.marked(name, any(row["privileged"] for row in table if row["method"] == name))
        shown = [_cell(by_cell.get((name, env))) for env in envs]
        lines.append(f"| {title} | {' | '.join(shown)} |")
    legend = (
        "Mean return (clicks in 100 turns) of the test users over seeds, with the half width of the 95 % Student-t "
        "interval over seeds (of references, which have no seeds: over users). **Bold**: the best method without "
        "privileged information; *: differs from it by Welch's t-test (p < 0.05, not corrected for the number of "
        "comparisons). ‡: sees privileged information. [Square brackets]: printed in the paper."
    )
    return "\n".join([*lines, "", legend, ""])


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    text = f"{row['mean']:.1f}"
    if math.isfinite(row["half_interval"]):
        text += f" ± {row['half_interval']:.1f}"
    if row["best"]:
        text = f"**{text}**"
    if row["p_against_best"] < SIGNIFICANT:
        text += "*"
    return text + (f" [{row['published']}]" if row["published"] else "")


def _order(table: Sequence[Mapping[str, Any]], column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in table))


def comma_separated(table: Sequence[Mapping[str, Any]]) -> str:
    """The rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def write(records: Sequence[Mapping[str, Any]], directory: Path, name: str, says: str) -> Path:
    """Table and picture of the records; returns the Markdown file."""
    table = rows(records)
    directory.mkdir(parents=True, exist_ok=True)
    disk.write(directory / f"{name}.md", markdown(table, says).encode())
    disk.write(directory / f"{name}.csv", comma_separated(table).encode())
    found, privileged = cells(records), {r["method"] for r in records if r["privileged"]}
    panels = {
        env: {methods.marked(m, m in privileged): values for (m, e), values in found.items() if e == env}
        for env in _order(table, "env")
    }
    plots.save(plots.seed_scatter(panels), directory / f"{name}.png")
    return directory / f"{name}.md"


def main(arguments: Arguments) -> None:
    again = lambda record: arguments.job(record["method"], record["env"], record["seed"] or 0)  # noqa: E731
    wanted = _tables.together(jobs(arguments), arguments, again)
    records = sorted(_study.perform(wanted, arguments.places), key=_tables.place_of(arguments))
    written = write(records, arguments.directory, "table2", _tables.budget_of(records, arguments))
    print(written.read_text(encoding="utf-8"))
    print(f"written: {arguments.directory}/table2.md, table2.csv, table2.png")


if __name__ == "__main__":
    run_cli(lambda: main(tyro.cli(Arguments, prog="python -m experiments.table2", description=__doc__)))
