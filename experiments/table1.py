"""The paper's Table 1: what each method takes for granted, from what its registry entry and its code declare.

    python -m experiments.table1 --out results/table1.md

Takes a second. Nothing in the table is typed here: whether a method needs logged data follows from what it acts
through, whether it sees privileged information from what its policies declare, and the rest is `Method.assumes`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from experiments._cli import run_cli
from gemsjax import disk, methods


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Where to write the table."""

    out: Path | None = None
    """File to write the Markdown to, besides the terminal."""


COLUMNS = ("method", "learns", "needs logged data", "sees privileged information", "further assumptions")


def rows() -> list[tuple[str, ...]]:
    """One row a method, in the order of `COLUMNS`."""
    return [
        (entry.title, *map(_yes, (entry.learns, entry.needs_log, entry.privileged)), "; ".join(entry.assumes))
        for entry in methods.METHODS.values()
    ]


def _yes(value: bool) -> str:
    return "yes" if value else ""


def markdown() -> str:
    """The table as Markdown."""
    table = [COLUMNS, tuple("---" for _ in COLUMNS), *rows()]
    return "\n".join(f"| {' | '.join(row)} |" for row in table) + "\n"


def main(arguments: Arguments) -> None:
    text = markdown()
    print(text)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        disk.write(arguments.out, text.encode())
        print(f"written: {arguments.out}")


if __name__ == "__main__":
    run_cli(lambda: main(tyro.cli(Arguments, prog="python -m experiments.table1", description=__doc__)))
