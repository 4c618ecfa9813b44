"""The paper's Table 1: what each method takes for granted, from what its registry entry and its code declare.

    python -m experiments.table1

Takes a second and writes `OUT/table1.md`. Nothing in the table is typed here: whether a method needs logged data
follows from what it acts through, whether it sees privileged information from what its policies declare, and the rest
is `Method.assumes`. Expected: a row a method, as in `results/table1.md`. Nothing is run, so there are no budgets,
seeds, environments or variants to ask for, and nothing to resume.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from experiments._cli import run_cli
from gemsjax import disk, methods


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Which methods, and where to write the table."""

    methods: tuple[str, ...] = tuple(methods.METHODS)
    """Methods, a row each."""
    out: Path = Path("results")
    """Directory for `table1.md`."""


COLUMNS = ("method", "learns", "needs logged data", "sees privileged information", "further assumptions")


def rows(names: Sequence[str] = tuple(methods.METHODS)) -> list[tuple[str, ...]]:
    """One row a method, in the order of `COLUMNS`.

    Raises:
      SettingError: an unknown method.
    """
    return [
        (entry.title, *map(_yes, (entry.learns, entry.needs_log, entry.privileged)), "; ".join(entry.assumes))
        for entry in map(methods.method, names)
    ]


def _yes(value: bool) -> str:
    return "yes" if value else ""


def markdown(names: Sequence[str] = tuple(methods.METHODS)) -> str:
    """The table as Markdown."""
    table = [COLUMNS, tuple("---" for _ in COLUMNS), *rows(names)]
    return "\n".join(f"| {' | '.join(row)} |" for row in table) + "\n"


def main(arguments: Arguments) -> None:
    text, path = markdown(arguments.methods), arguments.out / "table1.md"
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    disk.write(path, text.encode())
    print(f"written: {path}")


if __name__ == "__main__":
    run_cli(lambda: main(tyro.cli(Arguments, prog="python -m experiments.table1", description=__doc__)))
