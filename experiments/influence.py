"""Where does personalisation pay? Returns against the weight with which a click pulls the user's taste.

    python -m experiments.influence --budget small

With the published weight 0.1 a slate that is shown again and again creates the taste that it serves, so one constant
slate does well; without influence (the steady environments) only knowing the user helps. Measured by others on the
published focused catalogue, weights 0.1, 0.05, 0.02, 0: constant slate 390, 384 to 389, 341 to 348, 107 to 118;
short-term oracle 104, 116, 133, 150; best item of each topic, sorted by score, 412, 425, 437, 515 (in the order of
topics, by us, 361, 384, 401, 503). Privileged methods are marked. Of trained agents nothing is known yet but the ends
of the small budget, which `results/table2/small-corrected` has: with 0.1 and 0 REINFORCE+SoftMax 299.1 and 116.2,
SAC+GeMS 196.8 and 74.0 (and the constant slate, within 10,112 trajectories, 341.7 and 90.0).

Not a table of the paper, so corrected by default. Budgets: full 100,000 trajectories and ten seeds, small 10,000 and
three, smoke for tests. By the speeds of the benchmark on two cores (`results/benchmark_xeon.json`), not timed: small
about 50 minutes and compiling (twelve slate VAEs and agents of SAC+GeMS 3.5 minutes each, twelve runs of
REINFORCE+SoftMax 0.7), full about 40 hours (forty of 52 and of 7 minutes). Records are below
`OUT/<budget>-<variant>`, and tables and pictures made from all of an environment's records there.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import tyro

from experiments import _study, _tables
from experiments._cli import run_cli
from gemsjax import disk, methods, plots
from gemsjax.errors import require
from gemsjax.maths.statistics import Estimate, t_interval

WEIGHTS = (0.1, 0.05, 0.02, 0.0)
DEFAULT_METHODS = (
    "short-term-oracle", "best-item-per-topic", "best-item-per-topic-sorted", "constant-slate", "reinforce-softmax",
    "sac-gems",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arguments(_study.Arguments):
    """What to run and where to keep it."""

    methods: tuple[str, ...] = DEFAULT_METHODS
    """Methods."""
    weights: tuple[float, ...] = WEIGHTS
    """Influence of a click on the user's embedding; 0 is the steady environment of the same kind."""
    out: Path = Path("results/influence")
    """Root of records, tables and pictures."""


def jobs(arguments: Arguments, env: str) -> list[_study.Job]:
    """Every run, seed by seed."""
    for weight in arguments.weights:
        require(0.0 <= weight <= 1.0, "--weights", weight, "numbers in [0, 1]")
    return [
        arguments.job(method, env, seed, env_settings={"influence": weight})
        for seed in arguments.all_seeds
        for method in arguments.methods
        for weight in arguments.weights
        if seed in arguments.seeds_of(method)
    ]


def _weight(record: dict[str, Any]) -> float:
    return record["config"]["env_settings"]["influence"]


def _again(arguments: Arguments, env: str, record: dict[str, Any]) -> _study.Job | None:
    """The job of a record of this environment."""
    if record["env"] != env or "influence" not in record["config"]["env_settings"]:
        return None
    return arguments.job(record["method"], env, record["seed"] or 0, env_settings={"influence": _weight(record)})


def main(arguments: Arguments) -> None:
    directory, places, place = arguments.directory, arguments.places, _tables.place_of(arguments)
    for env in arguments.envs:
        wanted = _tables.together(jobs(arguments, env), arguments, functools.partial(_again, arguments, env))
        records = sorted(_study.perform(wanted, places), key=place)
        values: dict[tuple[str, float], list[float]] = {}
        privileged = {record["method"] for record in records if record["privileged"]}
        for record in records:
            values.setdefault((record["method"], _weight(record)), []).append(record["test"]["mean_return"])
        table = {key: t_interval(group) for key, group in values.items()}
        text = f"{env}. {_tables.budget_of(records, arguments)}\n\n{markdown(table, privileged)}"
        directory.mkdir(parents=True, exist_ok=True)
        disk.write(directory / f"influence_{env}.md", text.encode())
        lines = {
            methods.marked(method, method in privileged): sorted((w, e) for (m, w), e in table.items() if m == method)
            for method in dict.fromkeys(record["method"] for record in records)
        }
        picture = plots.save(
            plots.lines_with_intervals({f"{env}: influence of a click": lines}, "clicks in 100 turns"),
            directory / f"influence_{env}.png",
        )
        print(text)
        print(f"picture: {picture}")


def markdown(table: dict[tuple[str, float], Estimate], privileged: set[str]) -> str:
    """Methods by weights: mean over seeds ± half the 95 % interval."""
    weights = sorted({weight for _, weight in table}, reverse=True)
    lines = [f"| method | {' | '.join(f'influence {w:g}' for w in weights)} |", "|---" * (len(weights) + 1) + "|"]
    for method in dict.fromkeys(method for method, _ in table):
        cells = [_cell(table.get((method, weight))) for weight in weights]
        lines.append(f"| {methods.marked(method, method in privileged)} | {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", "‡: sees privileged information. ±: half of the 95 % Student-t interval over seeds.", ""]
    )


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    spread = "" if estimate.half != estimate.half else f" ± {estimate.half:.1f}"
    return f"{estimate.value:.1f}{spread}"


if __name__ == "__main__":
    run_cli(lambda: main(tyro.cli(Arguments, prog="python -m experiments.influence", description=__doc__)))
