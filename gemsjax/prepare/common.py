"""What preparations share: the world of a run, its logged data, and how weights are kept. For the other files here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemsjax import checkpoint, datasets, disk, tracking
from gemsjax.errors import DataError, TrainingError
from gemsjax.settings import TrainSettings, make_world
from gemsjax.types import Dims


class World(NamedTuple):
    """The environment of a run with its sizes."""

    env: Any
    params: Any
    dims: Dims


def world_of(settings: TrainSettings) -> World:
    """The environment that the settings name."""
    return World(*make_world(settings))


def logged_data(settings: TrainSettings, world: World, data_root: Path) -> datasets.LoggedSlates:
    """The logged slates that the run's pre-training learns from, generated below `data_root` if they are not there."""
    log, directory = settings.log, log_directory(settings, world, data_root)
    data_root.mkdir(parents=True, exist_ok=True)
    # Runs of several seeds share their data: whoever comes second waits for the first and finds them.
    with (
        disk.lock(data_root / f".{directory.name}.lock"),
        tracking.Progress(log.users, "logged data", unit="users") as progress,
    ):
        datasets.generate(
            world.env, world.params, directory, users=log.users, epsilon=log.epsilon, on_progress=progress.update
        )
    return datasets.load(directory)


def log_directory(settings: TrainSettings, world: World, data_root: Path) -> Path:
    """Where the logged data of these settings lie or will lie."""
    log = settings.log
    identity = {"env": settings.env, "items": items_digest(world), **settings.env_settings}
    return data_root / f"{settings.env}_eps{log.epsilon}_users{log.users}-{checkpoint.config_hash(identity)[:6]}"


def known_checksum(settings: TrainSettings, world: World, data_root: Path) -> str | None:
    """Checksum of the logged data if they are complete on disk, else None; reads the schema only."""
    try:
        return datasets.read_schema(log_directory(settings, world, data_root))["checksum"]
    except DataError:
        return None


def items_digest(world: World) -> str:
    """What the environment's items are, whatever the file that they came from is called."""
    return disk.digest(np.asarray(world.params.item_embeddings).tolist())[:12]


def has_checkpoints(directory: Path) -> bool:
    """Whether a run ever finished a checkpoint: what a kill leaves of the first one is not one that got lost."""
    return any((directory / "checkpoints").glob("step_*"))


def as_arrays(hypers: Any) -> Any:
    """Hyper-parameters as float32 scalars, so that changing one does not compile again."""
    return jax.tree.map(jnp.float32, hypers)


def require_finite(metrics: dict[str, np.ndarray], first: int, unit: str, directory: Path) -> None:
    """Stop at the first value that is not finite, naming it; the checkpoint before it stays."""
    bad = {name: int(np.argmin(np.isfinite(value))) for name, value in metrics.items() if not np.isfinite(value).all()}
    if bad:
        name = min(bad, key=lambda name: bad[name])
        kept = checkpoint.latest_step(directory / "checkpoints")
        stays = f"the checkpoint of {kept} stays in {directory}" if kept is not None else "there was no checkpoint yet"
        raise TrainingError(f"{unit} {first + bad[name]}: {name} is {metrics[name][bad[name]]}; {stays}")
