"""One run out of a sweep as an ordinary run directory, which `experiments.evaluate` and `train --resume` take.

Called by `experiments.sweep --export` and notebooks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from gemsjax import checkpoint, disk, runs, tracking
from gemsjax.errors import DataError, require_count
from gemsjax.prepare import identity_of
from gemsjax.settings import TrainSettings, from_config
from gemsjax.sweep import files
from gemsjax.sweep.axes import Run
from gemsjax.sweep.bundle import bundle, identity, saved_like, with_key
from gemsjax.sweep.drive import target_of


def export(directory: Path | str, number: int, root: Path | str, *, overwrite: bool = False) -> Path:
    """Write run `number` of the sweep in `directory` below `root`, the root of single runs; returns its directory.

    It has a single run's name, and a hash of its settings behind that where the name alone would not tell it from
    another run of the sweep, or from one that is already there.

    Raises:
      SettingError: no such run, or a run directory that is already there.
      DataError: no sweep, none with an undamaged checkpoint, or a frozen run, which nobody could continue.
    """
    directory = Path(directory)
    told = files.read(directory)
    require_count("run", number, 0, len(told["runs"]) - 1)
    shard = next(i for i, numbers in enumerate(told["shards"]) if number in numbers)
    numbers, source = told["shards"][shard], files.shard(directory, shard)
    mine = [row for row in tracking.read_metrics(source) if row["run"] == number]
    stopped = [row["frozen"] for row in mine if "frozen" in row]
    if stopped or not mine:
        why = f"it was frozen: {stopped[0]}" if stopped else "it never began"
        raise DataError(f"run {number} of {directory} is none that could be continued: {why}")
    listed = [told["runs"][n] for n in numbers]
    made = bundle([Run(run["values"], from_config(run["settings"]).resolved()) for run in listed])
    place = numbers.index(number)
    saved = checkpoint.restore(source / "checkpoints", saved_like(made), config=identity(made), on_host=True)
    (state, data, _), step = saved.tree, saved.step
    run, world = made.runs[place], made.worlds[place]
    config = dataclasses.asdict(run.settings)
    target = _target(Path(root), run.settings, [from_config(run["settings"]).resolved() for run in told["runs"]])
    with tracking.RunDirectory(target, config, overwrite=overwrite):
        state, data = jax.tree.map(lambda x: x[place], (state, data))
        tree = (state, with_key(data))
        checkpoint.save(target / "checkpoints", tree, step=step, config=identity_of(run.settings, world))
        log = tracking.MetricsLog(target)
        for row in mine:
            if row["step"] <= step:
                log.append({name: value for name, value in row.items() if name != "run"})
        rows = files.results(directory, shard, target_of(made))
        if rows is not None and step == run.settings.steps:
            _result(target, rows, number, runs.facts_of(run.settings, identity_of(run.settings, world)))
    return target


def _target(root: Path, settings: TrainSettings, of_sweep: Sequence[TrainSettings]) -> Path:
    """Where a run goes, one place for each distinct run; `train --resume` finds both, see `runs.directory_of`."""
    plain, hashed = runs.directories_of(settings, root)
    alike = sum(runs.name_of(other).directory == runs.name_of(settings).directory for other in of_sweep)
    return hashed if alike > 1 or hashed.exists() or runs.holds_another(plain, settings) else plain


def _result(target: Path, rows: list[dict], number: int, facts: dict[str, Any]) -> None:
    """`result.json` as a single run writes it, if it was tested; where it ran stands in `sweep.json`."""
    row = next(row for row in rows if row["run"] == number)
    if "test" in row:
        names = {"mean_return": "test", "se_return": "test_se", "users": "test_users"}
        same = ("env", "method", "privileged", "seed", "steps", "best_validation")
        disk.write_json(
            target / "result.json",
            {name: row[old] for name, old in names.items()} | {name: row[name] for name in same} | facts,
        )
