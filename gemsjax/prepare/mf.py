"""Item embeddings of matrix factorisation, made once and kept: found on disk, or continued where they were stopped.

Called through `gemsjax.prepare` and by `experiments.train_mf`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemsjax import checkpoint, datasets, disk, tracking
from gemsjax.prepare.common import World, has_checkpoints, items_digest, require_finite
from gemsjax.pretrain.matrix_factorisation import Clicks, MFSettings, clicked_items, divide, make_factorisation
from gemsjax.settings import TrainSettings

FACTORISATION = 2**32 - 4
"""Where training folds step numbers into the seed's key, matrix factorisation folds this."""
CHECKS_PER_CHECKPOINT = 20
"""Validations between checkpoints; a checkpoint holds the users' table and takes about as long as one of them."""


class KeptEmbeddings(NamedTuple):
    """Item embeddings [I, D], and the directory that keeps them with the losses that led to them."""

    embeddings: np.ndarray
    directory: Path


def mf_embeddings(
    settings: TrainSettings,
    world: World,
    root: Path,
    data: Callable[[], datasets.LoggedSlates],
    checksum: str | None = None,
) -> np.ndarray:
    """The items' vectors at the lowest validation loss, [I, D] float32: see `kept_embeddings`."""
    return kept_embeddings(settings, world, root, data, checksum).embeddings


def kept_embeddings(
    settings: TrainSettings,
    world: World,
    root: Path,
    data: Callable[[], datasets.LoggedSlates],
    checksum: str | None = None,
) -> KeptEmbeddings:
    """Embeddings that an earlier call left below `root/MF`, else trained now (and kept there).

    They are kept by data set, settings and seed. Two processes may ask at once: the second waits for the first.

    Args:
      settings: of the run; its `env`, `env_settings`, `seed` and `mf` count.
      world: its environment.
      root: of all runs.
      data: the logged data; called only if there is something to train.
      checksum: of the logged data where that is known without `data`; then no embeddings of other data are accepted.

    Raises:
      TrainingError: a loss is no longer finite.
      DataError: too few clicks, or damaged files.
      KeyboardInterrupt: Ctrl-C or SIGTERM; the next call goes on from there.
    """
    config = {
        "seed": settings.seed,
        "env": settings.env,
        "items": items_digest(world),
        "env_settings": settings.env_settings,
        "mf": dataclasses.asdict(settings.mf),
    }
    where = root / tracking.run_name(settings.env, settings.seed, method="MF").directory
    where = where.with_name(f"{where.name}-{checkpoint.config_hash(config)[:6]}")
    shape = (world.dims.num_items, settings.mf.dim)
    found = _find(where, checksum, shape, config)
    if found is not None:
        return found
    logged = data()
    where.parent.mkdir(parents=True, exist_ok=True)
    with disk.lock(where.with_name(f".{where.name}.lock")):
        found = _find(where, logged.checksum, shape, config)  # another process may have made it meanwhile
        return found if found is not None else _make(settings, where, config, logged, shape)


def _directory(where: Path, checksum: str) -> Path:
    return where.with_name(f"{where.name}-data{checksum[:6]}")


def _find(where: Path, checksum: str | None, shape: tuple[int, int], config: dict[str, Any]) -> KeptEmbeddings | None:
    """Finished embeddings of the data set, or where that is unknown the latest."""
    if checksum is not None:
        places = [_directory(where, checksum)]
    else:
        places = sorted(where.parent.glob(f"{where.name}-data*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for directory in places:
        if checkpoint.latest_step(directory / "weights") is not None:
            whose = checksum or tracking.read_config(directory).get("dataset")
            like: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
            kept = checkpoint.restore(directory / "weights", like, config=config | {"dataset": whose})
            return KeptEmbeddings(np.asarray(kept.tree), directory)
    return None


def _make(
    settings: TrainSettings,
    where: Path,
    config: dict[str, Any],
    data: datasets.LoggedSlates,
    shape: tuple[int, int],
) -> KeptEmbeddings:
    directory, config = _directory(where, data.checksum), config | {"dataset": data.checksum}
    with tracking.RunDirectory(directory, config, resume=True), tracking.StopRequest() as stop:
        embeddings, done = _train(settings.mf, settings.seed, directory, config, data, shape[0], stop)
        checkpoint.save(directory / "weights", embeddings, step=done, config=config)
    return KeptEmbeddings(np.asarray(embeddings), directory)


def _train(
    mf: MFSettings,
    seed: int,
    directory: Path,
    config: dict[str, Any],
    data: datasets.LoggedSlates,
    items: int,
    stop: tracking.StopRequest,
) -> tuple[jax.Array, int]:
    """The best embeddings, and how many updates there were."""
    parts = divide(clicked_items(data), data.users, mf)
    validation, training = (Clicks(*map(jnp.asarray, part)) for part in parts)
    static = {name: getattr(mf, name) for name in ("dim", "batch_size", "optimiser", "validation")}
    init, updates, validate = _programs(MFSettings(**static), data.users, items)
    init_key, key, check_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), FACTORISATION), 3)
    state, done = init(init_key), 0
    if has_checkpoints(directory):
        state, done, _ = checkpoint.restore(directory / "checkpoints", state, config=config)
    log, rate = tracking.MetricsLog(directory), jnp.float32(mf.rate)
    log.truncate(done + 1)
    total = mf.max_epochs * (parts.training.users.size // mf.batch_size)
    with tracking.Progress(total, "MF", start=done, unit="batches") as progress:
        while done < total and int(state.waited) < mf.patience:
            batches = np.arange(done, min(done + mf.check_every, total), dtype=np.int32)
            state, losses = updates(state, rate, key, training, batches)
            require_finite({"loss": np.asarray(losses)}, done, "batch", directory)
            done += batches.size
            check = -(-done // mf.check_every)
            state, loss = validate(state, rate, check_key, validation, jnp.int32(check))
            row = {"loss": float(losses.mean()), "validation_loss": float(loss)}
            require_finite({k: np.array([v]) for k, v in row.items()}, check, "validation", directory)
            log.append({"step": done, **row})
            progress.update(done, row)
            if stop.requested or check % CHECKS_PER_CHECKPOINT == 0:
                checkpoint.save(directory / "checkpoints", state, step=done, config=config)
            if stop.requested:
                raise KeyboardInterrupt(f"after {done:,} batches of matrix factorisation, which go on when asked again")
    return state.best_items, done


@functools.lru_cache(maxsize=4)
def _programs(mf: MFSettings, users: int, items: int) -> tuple[Callable[..., Any], ...]:
    """Compiled `init`, `updates` and `validate`, which the seeds of a sweep share. Only static choices count."""
    factorisation = make_factorisation(mf, users, items)
    donating = functools.partial(jax.jit, donate_argnums=0)
    return jax.jit(factorisation.init), donating(factorisation.updates), donating(factorisation.validate)
