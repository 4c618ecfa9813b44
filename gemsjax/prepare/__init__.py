"""What a run needs before it trains, from the host's side: logged data and frozen weights, made once and kept.

`frozen_weights` makes whatever the run's method acts through; `logged_data`, `pretrained_gems` and `mf_embeddings` are
its parts. All find their earlier results on disk, and continue where they were stopped. Called by runs.py, experiments
and notebooks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemsjax import disk, methods
from gemsjax.envs.catalogue import load_catalogue
from gemsjax.errors import DataError, require
from gemsjax.prepare.common import (
    World,
    as_arrays,
    has_checkpoints,
    items_digest,
    known_checksum,
    log_directory,
    logged_data,
    require_finite,
    world_of,
)
from gemsjax.prepare.gems import PRETRAINING, on_device, pretrained_gems, untrained_gems
from gemsjax.prepare.mf import mf_embeddings
from gemsjax.rankers.items import ItemWeights, item_weights
from gemsjax.rankers.plackett_luce import plackett_luce_weights
from gemsjax.settings import TrainSettings
from gemsjax.types import Array

__all__ = [
    "PRETRAINING", "World", "as_arrays", "frozen_weights", "has_checkpoints", "identity_of", "items_digest",
    "known_checksum", "log_directory", "logged_data", "mf_embeddings", "on_device", "pretrained_gems", "require_finite",
    "untrained_weights", "world_of",
]  # fmt: skip

RANDOM_EMBEDDINGS = 2**32 - 3
"""Where training folds step numbers into the seed's key, random item embeddings fold this."""


def frozen_weights(settings: TrainSettings, world: World, root: Path, data_root: Path) -> Any:
    """What the method acts through and does not change: a pre-trained GeMS, item embeddings, a known simulator, ().

    Args:
      settings: resolved.
      root: of all runs; pre-trained weights are kept below it.
      data_root: of logged data, generated if something has to be pre-trained and it is not there.

    Raises:
      TrainingError, KeyboardInterrupt: see `pretrained_gems`.
    """
    entry = methods.method(settings.method)
    if entry.ranker == "gems":
        return pretrained_gems(settings, world, root, lambda: logged_data(settings, world, data_root))
    if entry.knows_simulator:
        return world.params
    if settings.embeddings is None:
        return ()
    return _weights(settings, jnp.asarray(_embeddings(settings, world, root, data_root)))


def _weights(settings: TrainSettings, embeddings: Array) -> ItemWeights:
    """What rankers over item embeddings [I, E] need, and the Plackett-Luce ranker's own numbers."""
    items, pl = item_weights(embeddings), settings.pl
    return items if pl is None else plackett_luce_weights(items, pl.temperature, pl.penalty)


def _embeddings(settings: TrainSettings, world: World, root: Path, data_root: Path) -> np.ndarray:
    if settings.embeddings == "ideal":
        return np.asarray(world.params.item_embeddings)
    if settings.embeddings == "random":
        key = jax.random.fold_in(jax.random.key(settings.seed), RANDOM_EMBEDDINGS)
        return np.asarray(jax.random.normal(key, world.params.item_embeddings.shape))
    if settings.embeddings in (None, "mf"):
        data, checksum = (lambda: logged_data(settings, world, data_root)), known_checksum(settings, world, data_root)
        return mf_embeddings(settings, world, root, data, checksum)
    return _read(settings.embeddings, world)


def _read(path: str | None, world: World) -> np.ndarray:
    """Item embeddings of the user's own: [I, E], finite, and not the simulator's, which are privileged."""
    array, items = load_catalogue(str(path)), world.dims.num_items
    if array.ndim != 2 or array.shape[0] != items or not np.isfinite(array).all():
        raise DataError(f"{path}: holds an array of shape {array.shape}; wanted are finite numbers [{items}, width]")
    own = np.asarray(world.params.item_embeddings)
    same = array.shape == own.shape and np.allclose(array, own)
    require(not same, "embeddings", path, "others than the simulator's own, which are called 'ideal' and privileged")
    return array


def untrained_weights(settings: TrainSettings, world: World) -> Any:
    """Frozen weights of the right shapes that cost nothing: for restoring and for timing."""
    entry = methods.method(settings.method)
    if entry.ranker == "gems":
        return untrained_gems(settings, world)
    if entry.knows_simulator:
        return world.params
    if settings.embeddings is None:
        return ()
    shape = world.params.item_embeddings.shape
    if settings.embeddings == "mf":
        shape = (world.dims.num_items, settings.mf.dim)
    elif _is_file(settings):
        shape = _read(settings.embeddings, world).shape
    return _weights(settings, jnp.zeros(shape))


def identity_of(settings: TrainSettings, world: World) -> dict[str, Any]:
    """What decides a run's numbers: its settings, the items themselves, and embeddings by what their file holds.

    A checkpoint of another identity is not continued.
    """
    identity = settings.identity() | {"items": items_digest(world)}
    if _is_file(settings):
        identity["embeddings"] = f"file {disk.digest(_read(settings.embeddings, world).tolist())[:12]}"
    return identity


def _is_file(settings: TrainSettings) -> bool:
    return settings.embeddings not in (None, *methods.EMBEDDINGS)
