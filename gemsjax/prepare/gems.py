"""A pre-trained GeMS, made once and kept: `pretrained_gems` finds its earlier result, and continues where it stopped.

Called through `gemsjax.prepare`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemsjax import checkpoint, datasets, tracking
from gemsjax.prepare.common import World, as_arrays, has_checkpoints, items_digest, require_finite
from gemsjax.pretrain.gems import GeMSState, Pretraining, Slates, make_pretraining
from gemsjax.rankers.gems import GeMSWeights
from gemsjax.settings import GeMSSettings, TrainSettings
from gemsjax.shares import everywhere, on_one, sharers, together

BOUND_USERS = 1_000
"""Logged users whose latent codes span the action box (published implementation)."""
PRETRAINING = 2**32 - 2
"""Where training folds step numbers into the seed's key, pre-training folds this."""
WEIGHTS = "weights"
"""Where the finished weights lie below a pre-training's directory."""
LEAST_SHARE = 64
"""Slates of a batch for each device at least; two devices with 128 each have been measured."""
CALLS_PER_EPOCH = 10
"""Pieces in which an epoch of pre-training is called, for progress and Ctrl-C."""


def pretrained_gems(
    settings: TrainSettings, world: World, root: Path, data: Callable[[], datasets.LoggedSlates]
) -> GeMSWeights:
    """A pre-trained GeMS: the one that an earlier run left below `root/GeMS`, else trained now (and kept there).

    Stopped half-way it continues at the epoch that it was in. `data` is called only if there is something to train.

    Raises:
      TrainingError: a loss is no longer finite.
      KeyboardInterrupt: Ctrl-C or SIGTERM; what is lost is the epoch in progress, which is done again the same.
    """
    gems, pretraining = settings.gems, make_pretraining(settings.gems.spec, world.dims)
    directory, config = place_of(settings, world, root)
    kept = kept_weights(settings, world, root)
    if kept is not None:
        return kept
    logged = data()
    with tracking.RunDirectory(directory, config, resume=True), tracking.StopRequest() as stop:
        weights = _pretrain(pretraining, gems, settings.seed, directory, config, logged, stop)
        checkpoint.save(directory / WEIGHTS, weights, step=gems.epochs, config=config)
        if stop.requested:
            raise KeyboardInterrupt("GeMS is pre-trained and kept")
    return weights


def place_of(settings: TrainSettings, world: World, root: Path) -> tuple[Path, dict[str, Any]]:
    """Where a pre-trained GeMS of these settings lies or will lie, and the configuration that says what it is."""
    gems = settings.gems
    config = {
        "seed": settings.seed,
        "env": settings.env,
        "items": items_digest(world),
        "env_settings": settings.env_settings,
        "gems": gems.pretraining(),
    }
    name = tracking.run_name(settings.env, settings.seed, gems.beta, gems.click_weight, method="GeMS").directory
    return root / f"{name}-{checkpoint.config_hash(config)[:6]}", config


def kept_weights(settings: TrainSettings, world: World, root: Path) -> GeMSWeights | None:
    """The pre-trained GeMS of these settings if an earlier run left one."""
    directory, config = place_of(settings, world, root)
    if checkpoint.latest_step(directory / WEIGHTS) is None:
        return None
    pretraining = make_pretraining(settings.gems.spec, world.dims)
    like, latent = jax.eval_shape(pretraining.init, jax.random.key(0)).params, settings.gems.latent_dim
    bound: Any = jax.ShapeDtypeStruct((latent,), jnp.float32)
    return checkpoint.restore(directory / WEIGHTS, GeMSWeights(like, bound, bound), config=config).tree


def _pretrain(
    pretraining: Pretraining,
    gems: GeMSSettings,
    seed: int,
    directory: Path,
    config: dict[str, Any],
    data: datasets.LoggedSlates,
    stop: tracking.StopRequest,
) -> GeMSWeights:
    devices = sharers(gems.batch_size, LEAST_SHARE)
    validation, training = (everywhere(devices, on_device(part)) for part in datasets.split(data))
    config = config | {"dataset": data.checksum}
    updates = jitted(devices, pretraining.updates, donate_argnums=0)
    validate = jitted(devices, pretraining.validate, donate_argnums=0)
    state, done = _resume_pretraining(pretraining, pretraining_key(seed), directory, config)
    state, key, hypers = everywhere(devices, (state, pretraining_key(seed), as_arrays(gems.hypers)))
    log = tracking.MetricsLog(directory)
    log.truncate(done + 1)
    batches = training.slates.shape[0] // gems.batch_size
    pieces = pieces_of(batches)
    with tracking.Progress(gems.epochs * batches, "GeMS", start=done * batches, unit="batches") as progress:
        for epoch in range(done, gems.epochs):
            losses: list[dict[str, np.ndarray]] = []
            for piece in pieces:
                numbers = everywhere(devices, (jnp.int32(epoch), jnp.asarray(piece)))
                state, metrics = updates(state, hypers, key, training, *numbers)
                losses.append(jax.tree.map(np.asarray, metrics))
                require_finite(losses[-1], epoch * batches + int(piece[0]), "batch", directory)
                progress.update(epoch * batches + int(piece[-1]) + 1, {"loss": losses[-1]["loss"].mean()})
                if stop.requested:
                    raise KeyboardInterrupt(f"in epoch {epoch + 1} of GeMS, which begins anew when asked for again")
            state, validated = validate(state, hypers, validation)
            require_finite({k: np.asarray(v)[None] for k, v in validated.items()}, epoch + 1, "epoch", directory)
            means = {name: float(np.concatenate([piece[name] for piece in losses]).mean()) for name in losses[0]}
            log.append({"step": epoch + 1, **means, **{f"validation_{k}": float(v) for k, v in validated.items()}})
            checkpoint.save(directory / "checkpoints", state, step=epoch + 1, config=config)
    return jax.jit(pretraining.bounds)(on_one(devices, state.best_params), bound_slates(data))


def jitted(devices: Sequence[jax.Device], part: Callable[..., Any], donate_argnums: int | tuple[int, ...] = ()) -> Any:
    """`updates` or `validate` of a `Pretraining` as the program of these devices; for the benchmark too."""
    return together(devices, part, donate_argnums, wide=True)


def pretraining_key(seed: int) -> jax.Array:
    """Key of a pre-training: a stream of its own, since training folds its step numbers into the seed's key."""
    return jax.random.fold_in(jax.random.key(seed), PRETRAINING)


def first_key(key: jax.Array) -> jax.Array:
    """Key of the first weights, from a pre-training's key, whose epochs are folded in elsewhere."""
    return jax.random.fold_in(key, PRETRAINING)


def bound_slates(data: datasets.LoggedSlates) -> Slates:
    """The logged slates whose codes span the action box."""
    return on_device(dataclasses.replace(data, slates=data.slates[:BOUND_USERS], clicks=data.clicks[:BOUND_USERS]))


def pieces_of(batches: int) -> list[np.ndarray]:
    """An epoch's batch numbers in about CALLS_PER_EPOCH calls: of one length if that divides them, else with a rest.

    Each length is a program; with the rest there are two.
    """
    counts = [n for n in range(CALLS_PER_EPOCH // 2, 2 * CALLS_PER_EPOCH + 1) if batches % n == 0]
    nearest = min(counts, key=lambda n: abs(n - CALLS_PER_EPOCH), default=None)
    length = -(-batches // CALLS_PER_EPOCH) if nearest is None else batches // nearest
    numbers = np.arange(batches, dtype=np.int32)
    return [numbers[start : start + length] for start in range(0, batches, length)]


def _resume_pretraining(
    pretraining: Pretraining, key: jax.Array, directory: Path, config: dict[str, Any]
) -> tuple[GeMSState, int]:
    if not has_checkpoints(directory):
        return jax.jit(pretraining.init)(first_key(key)), 0
    like = jax.eval_shape(pretraining.init, key)
    state, done, _ = checkpoint.restore(directory / "checkpoints", like, config=config)
    return state, done


def untrained_gems(settings: TrainSettings, world: World) -> GeMSWeights:
    """A GeMS of the right shapes that has learnt nothing: for restoring and for timing."""
    params = make_pretraining(settings.gems.spec, world.dims).init(jax.random.key(0)).params
    latent = settings.gems.latent_dim
    return GeMSWeights(params, jnp.zeros(latent), jnp.full(latent, 3.0))


def on_device(data: datasets.LoggedSlates) -> Slates:
    """Logged users as flat rows on the default device, in storage types."""
    return Slates(*(jnp.asarray(column.reshape(-1, *column.shape[2:])) for column in (data.slates, data.clicks)))
