"""The slate VAEs of many runs, pre-trained as one program; each is kept where a single run looks for its own.

Called by `drive.py`; runs that act through no GeMS, or whose GeMS is already there, cost nothing.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemsjax import checkpoint, datasets, disk, methods, prepare, tracking
from gemsjax.prepare import World, as_arrays, has_checkpoints
from gemsjax.prepare import gems as single
from gemsjax.pretrain.gems import GeMSHypers, GeMSState, Pretraining, Slates, make_pretraining
from gemsjax.settings import TrainSettings
from gemsjax.sweep.bundle import Bundle
from gemsjax.sweep.layout import Layout, Program, gather, going, make_layout, of_run, over_runs, place
from gemsjax.types import Array


class Data(NamedTuple):
    """Of one pre-training: its key's numbers, hyper-parameters, and which of the logged data sets it learns from."""

    key: Array
    hypers: GeMSHypers
    dataset: Array


class _One(NamedTuple):
    settings: TrainSettings
    world: World
    directory: Path
    config: dict[str, Any]


def pretrain(made: Bundle, root: Path, data_root: Path, layout: Layout, stop: tracking.StopRequest) -> frozenset[Path]:
    """Pre-train what is missing. Stopped, it continues at the epoch that it was in.

    Returns:
      Directories of those whose loss was no longer finite; the others are finished and kept.

    Raises:
      KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    if methods.method(made.settings.method).ranker != "gems":
        return frozenset()
    wanted: dict[Path, _One] = {}
    for run, world in zip(made.runs, made.worlds, strict=True):
        directory, config = single.place_of(run.settings, world, root)
        wanted[directory] = _One(run.settings, world, directory, config)
    root.mkdir(parents=True, exist_ok=True)
    with ExitStack() as locks:
        # Processes whose runs share a GeMS wait for each other; in one order, so that none waits in a circle.
        for directory in sorted(wanted):
            name = directory.relative_to(root).as_posix().replace("/", "_")
            locks.enter_context(disk.lock(root / f".{name}.lock"))
        missing = [
            one for _, one in sorted(wanted.items()) if single.kept_weights(one.settings, one.world, root) is None
        ]
        if not missing:
            return frozenset()
        together = _Pretraining(missing, root, data_root, layout)
        if stop.requested:
            raise KeyboardInterrupt("before GeMS is pre-trained")
        return together.drive(stop)


class _Pretraining:
    """Several slate VAEs as one program."""

    def __init__(self, ones: list[_One], root: Path, data_root: Path, layout: Layout) -> None:
        self.ones, self.gems = ones, ones[0].settings.gems
        kind = "mapped" if layout.group == 1 else "vmapped"
        group = None if layout.group == 1 else min(layout.group, len(ones))
        self.layout = make_layout(len(ones), kind, group, layout.devices)
        self.pretraining: Pretraining = make_pretraining(self.gems.spec, ones[0].world.dims)
        logs = {prepare.log_directory(one.settings, one.world, data_root): one for one in ones}
        logged = [prepare.logged_data(one.settings, one.world, data_root) for one in logs.values()]
        self.config = {"gems": [one.config for one in ones], "datasets": [data.checksum for data in logged]}
        self.directory = root / "GeMS" / f"together-{checkpoint.config_hash(self.config)[:6]}"
        splits = [tuple(map(prepare.on_device, datasets.split(data))) for data in logged]
        validation, training = (_stack(parts) for parts in zip(*splits, strict=True))
        self.bound = [single.bound_slates(data) for data in logged]
        self.logs = list(logs)
        self.which = [self.logs.index(prepare.log_directory(o.settings, o.world, data_root)) for o in ones]
        self.validation, self.training = validation, training

    def drive(self, stop: tracking.StopRequest) -> frozenset[Path]:
        """All epochs; then the weights of each, where a single run's lie. Returns the directories without any."""
        begin = lambda data: self.pretraining.init(single.first_key(_key(data)))  # noqa: E731
        updates, validate = over_runs(self.layout, begin, self._updates), over_runs(self.layout, begin, self._validate)
        self.update = jax.jit(updates.call, donate_argnums=1)
        self.validate = jax.jit(validate.call, donate_argnums=1)
        data = [
            Data(np.asarray(jax.random.key_data(single.pretraining_key(one.settings.seed))),  # type: ignore[arg-type]
                 as_arrays(one.settings.gems.hypers), np.int32(which))  # type: ignore[arg-type]
            for one, which in zip(self.ones, self.which, strict=True)
        ]  # fmt: skip
        self.data = place(self.layout, jax.tree.map(lambda *x: np.stack([np.asarray(y) for y in x]), *data))
        with ExitStack() as held:
            for one in self.ones:
                held.enter_context(tracking.RunDirectory(one.directory, one.config, resume=True))
            state, done, fine = self._resume(updates)
            logs = [tracking.MetricsLog(one.directory) for one in self.ones]
            for log in logs:
                log.truncate(done + 1)
            for epoch in range(done, self.gems.epochs):
                state, fine = self._epoch(state, fine, epoch, logs, stop)
            return self._keep(state, fine)

    def _resume(self, updates: Program) -> tuple[GeMSState, int, np.ndarray]:
        fine = np.ones(len(self.ones), bool)
        if not has_checkpoints(self.directory):
            return jax.jit(updates.make)(self.data, going(self.layout)), 0, fine
        like = jax.eval_shape(self.pretraining.init, jax.random.key(0))
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(self.ones), *x.shape), x.dtype), like)
        saved = checkpoint.restore(self.directory / "checkpoints", (like, fine), config=self.config)
        state, fine = saved.tree
        return place(self.layout, state), saved.step, np.asarray(fine)

    def _epoch(
        self, state: GeMSState, fine: np.ndarray, epoch: int, logs: list[tracking.MetricsLog], stop: Any
    ) -> tuple[GeMSState, np.ndarray]:
        batches = self.training.slates.shape[1] // self.gems.batch_size
        losses, count = [], len(self.ones)
        start, total = epoch * batches, self.gems.epochs * batches
        with tracking.Progress(total, f"GeMS, {count} together", start=start, unit="batches") as progress:
            for piece in single.pieces_of(batches):
                active = going(self.layout, fine)
                state, metrics = self.update(self.data, state, active, self.training, jnp.int32(epoch), piece)
                losses.append(gather(self.layout, metrics))
                fine = fine & np.isfinite(losses[-1]["loss"]).all(axis=1)
                progress.update(start + int(piece[-1]) + 1, {"loss": np.nanmean(losses[-1]["loss"])})
                if stop.requested:
                    raise KeyboardInterrupt(f"in epoch {epoch + 1} of GeMS, which begins anew when asked for again")
        state, validated = self.validate(self.data, state, going(self.layout, fine), self.validation)
        told = gather(self.layout, validated)
        fine = fine & np.isfinite(told["loss"])
        for number in np.flatnonzero(fine):
            log = logs[number]
            means = {name: float(np.concatenate([p[name][number] for p in losses]).mean()) for name in losses[0]}
            log.append({"step": epoch + 1, **means, **{f"validation_{k}": float(v[number]) for k, v in told.items()}})
        tree = (gather(self.layout, state), fine)
        checkpoint.save(self.directory / "checkpoints", tree, step=epoch + 1, config=self.config, keep=1)
        return state, fine

    def _keep(self, state: GeMSState, fine: np.ndarray) -> frozenset[Path]:
        bounds = jax.jit(self.pretraining.bounds)
        for number, one in enumerate(self.ones):
            if fine[number]:
                weights = bounds(of_run(state.best_params, number), self.bound[self.which[number]])
                checkpoint.save(one.directory / single.WEIGHTS, weights, step=self.gems.epochs, config=one.config)
        failed = frozenset(one.directory for one, well in zip(self.ones, fine, strict=True) if not well)
        for directory in sorted(failed):
            print(f"a loss of GeMS is no longer finite in {directory}; the others are kept and go on", flush=True)
        if not failed:
            checkpoint.remove(self.directory / "checkpoints")
        return failed

    def _updates(
        self, data: Data, state: GeMSState, active: Array, training: Slates, epoch: Array, batches: Array
    ) -> tuple[GeMSState, Any]:
        del active  # who is no longer finite stays so
        return self.pretraining.updates(state, data.hypers, _key(data), _of(training, data), epoch, batches)

    def _validate(self, data: Data, state: GeMSState, active: Array, validation: Slates) -> tuple[GeMSState, Any]:
        del active
        return self.pretraining.validate(state, data.hypers, _of(validation, data))


def _key(data: Data) -> Array:
    return jax.random.wrap_key_data(data.key)


def _of(slates: Slates, data: Data) -> Slates:
    """The run's own logged data of [sets, N, ...]; a single set is not copied."""
    if slates.slates.shape[0] == 1:
        return jax.tree.map(lambda x: x[0], slates)
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, data.dataset, keepdims=False), slates)


def _stack(parts: tuple[Slates, ...]) -> Slates:
    return jax.tree.map(lambda *x: jnp.stack(x), *parts)
