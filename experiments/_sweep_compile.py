"""How long the program of 60 runs takes to compile: a process of its own, so that nothing is traced or cached before.

    python -m experiments._sweep_compile --out compile.json

Called by `experiments.benchmark` (figures `sweep_60_compile_cold` and `sweep_60_compile_warm`). XLA is given shapes,
not numbers, so this needs the memory of no run.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import tyro

from experiments._cli import run_cli
from gemsjax import disk, sweep
from gemsjax.devices import use_precision, use_unroll
from gemsjax.settings import PUBLISHED_SEEDS, TrainSettings
from gemsjax.sweep import memory
from gemsjax.sweep.bundle import Bundle, bundle, data_like
from gemsjax.sweep.layout import make_layout

ENVIRONMENTS = tuple(f"{items}_{clicks}" for items in ("focused", "diffuse") for clicks in ("topdown", "mix", "divpen"))
"""The published six."""


def published(base: TrainSettings) -> Bundle:
    """The paper's ten seeds of one method in its six environments: 60 runs of one program."""
    return bundle(sweep.grid(base, {"seed": PUBLISHED_SEEDS, "env": ENVIRONMENTS}))


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Where the answer goes, and the settings of the machine, as in `experiments.sweep`."""

    out: Path
    precision: str = "default"
    unroll: int = 1


def main(arguments: Arguments) -> None:
    """Compile one epoch of SAC+GeMS at the paper's sizes on all devices, and write the seconds."""
    use_precision(arguments.precision)
    use_unroll(arguments.unroll)
    made = published(TrainSettings().resolved())
    layout = make_layout(len(made.runs))
    data = data_like(made, len(made.runs))
    started = time.perf_counter()
    memory.need(made, data, layout)
    disk.write_json(arguments.out, {"seconds": time.perf_counter() - started, **layout.describe()})


if __name__ == "__main__":
    run_cli(lambda: main(tyro.cli(Arguments, args=sys.argv[1:], description=__doc__)))
