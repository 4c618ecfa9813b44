"""One run out of a sweep as an ordinary run directory, which `experiments.evaluate` and `train --resume` take.

Called by `experiments.sweep --export` and notebooks.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gemsjax import checkpoint, disk, runs, tracking
from gemsjax.errors import DataError, require_count
from gemsjax.prepare import identity_of
from gemsjax.settings import from_config
from gemsjax.sweep import files
from gemsjax.sweep.axes import Run
from gemsjax.sweep.bundle import bundle, data_like, with_key


def export(directory: Path | str, number: int, root: Path | str, *, overwrite: bool = False) -> Path:
    """Write run `number` of the sweep in `directory` below `root`, the root of single runs; returns its directory.

    Raises:
      SettingError: no such run, or a run directory that is already there.
      DataError: no sweep, or none with an undamaged checkpoint.
    """
    directory = Path(directory)
    told = files.read(directory)
    require_count("run", number, 0, len(told["runs"]) - 1)
    shard = next(i for i, numbers in enumerate(told["shards"]) if number in numbers)
    numbers = told["shards"][shard]
    listed = [Run(told["runs"][n]["values"], from_config(told["runs"][n]["settings"]).resolved()) for n in numbers]
    made, place = bundle(listed), numbers.index(number)
    data = data_like(made)
    state = jax.eval_shape(lambda data: made.training.init(with_key(data)), data)
    like = (state, data, jax.ShapeDtypeStruct((), jnp.int32))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(numbers), *x.shape), x.dtype), like)
    identity = {"runs": [identity_of(run.settings, world) for run, world in zip(listed, made.worlds, strict=True)]}
    source = files.shard(directory, shard)
    (state, data, frozen_at), step, _ = checkpoint.restore(source / "checkpoints", like, config=identity)
    if int(frozen_at[place]) > 0 and not np.isfinite(state.best_return[place]):
        raise DataError(
            f"run {number} of {directory} was frozen before its first validation: there is nothing to export"
        )
    run, world = listed[place], made.worlds[place]
    config = dataclasses.asdict(run.settings)
    target = Path(root) / runs.name_of(run.settings).directory
    with tracking.RunDirectory(target, config, overwrite=overwrite):
        mine = jax.tree.map(lambda x: x[place], (state, data))
        tree = (mine[0], with_key(mine[1]))
        checkpoint.save(target / "checkpoints", tree, step=step, config=identity_of(run.settings, world))
        log = tracking.MetricsLog(target)
        for row in tracking.read_metrics(source):
            if row["run"] == number and row["step"] <= step:
                log.append({name: value for name, value in row.items() if name != "run"})
        if files.results(directory, shard).exists():
            _result(target, json.loads(files.results(directory, shard).read_text(encoding="utf-8")), number)
    return target


def _result(target: Path, rows: list[dict], number: int) -> None:
    """`result.json` as a single run writes it, if the run was tested."""
    row = next(row for row in rows if row["run"] == number)
    if "test" in row:
        names = {"mean_return": "test", "se_return": "test_se", "users": "test_users"}
        same = ("env", "method", "privileged", "seed", "steps", "best_validation")
        disk.write_json(
            target / "result.json", {name: row[old] for name, old in names.items()} | {name: row[name] for name in same}
        )
