"""The slate VAEs of many runs, pre-trained as one program; each is kept where a single run looks for its own.

They go in groups of the sweep's size however many are missing, so that weights do not depend on what is there already.
Called by `drive.py`; runs that act through no GeMS, or whose GeMS is already there, cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gemsjax import checkpoint, datasets, disk, methods, prepare, tracking
from gemsjax.prepare import World, as_arrays, has_checkpoints
from gemsjax.prepare import gems as single
from gemsjax.pretrain.gems import GeMSHypers, GeMSState, Pretraining, Slates, make_pretraining
from gemsjax.settings import TrainSettings
from gemsjax.shares import wide_vectors
from gemsjax.sweep.bundle import Bundle
from gemsjax.sweep.layout import Layout, Program, gather, going, make_layout, of_run, over_runs, place
from gemsjax.types import Array


class Data(NamedTuple):
    """Of one pre-training: its key's numbers, hyper-parameters, and which of the logged data sets it learns from."""

    key: Array
    hypers: GeMSHypers
    dataset: Array


class One(NamedTuple):
    """A slate VAE: of which run (the last of those that share it), where it lies, and what says which it is."""

    settings: TrainSettings
    world: World
    directory: Path
    config: dict[str, Any]


class Together(NamedTuple):
    """The programs of several slate VAEs, to plan with and then to train with: what is compiled is compiled once.

    Attributes:
      layout: of the VAEs.
      pretraining: of one.
      make: `(data, going) -> state`.
      update, validate: compiled when called, or by `lower(...).compile()` before; the state is donated. See `programs`.
    """

    layout: Layout
    pretraining: Pretraining
    make: Any
    update: Any
    validate: Any


def wanted(made: Bundle, root: Path) -> list[One]:
    """The GeMS of all runs, each once, in the order of their directories."""
    if methods.method(made.settings.method).ranker != "gems":
        return []
    found: dict[Path, One] = {}
    for run, world in zip(made.runs, made.worlds, strict=True):
        directory, config = single.place_of(run.settings, world, root)
        found[directory] = One(run.settings, world, directory, config)
    return [one for _, one in sorted(found.items())]


def missing(made: Bundle, root: Path) -> list[One]:
    """Those that no earlier run left, by their files alone: `pretrain` looks into them too."""
    return [one for one in wanted(made, root) if checkpoint.latest_step(one.directory / single.WEIGHTS) is None]


def together(ones: Sequence[One], layout: Layout) -> Together:
    """Programs of these slate VAEs; `layout` is that of the sweep's runs."""
    layout = layout_of(len(ones), layout)
    pretraining = make_pretraining(ones[0].settings.gems.spec, ones[0].world.dims)
    updates, validate = programs(pretraining, layout)
    return Together(layout, pretraining, jax.jit(updates.make), jitted(layout, updates), jitted(layout, validate))


def pretrain(
    made: Bundle,
    root: Path,
    data_root: Path,
    layout: Layout,
    stop: tracking.StopRequest,
    planned: Together | None = None,
) -> frozenset[Path]:
    """Pre-train what is missing. Stopped, it continues at the epoch that it was in.

    Args:
      made, layout: of the sweep.
      root, data_root: of pre-trained weights and logged data.
      stop: asked for between calls.
      planned: programs that are there already, used if they are of as many VAEs as are missing.

    Returns:
      Directories of those whose loss was no longer finite; the others are finished and kept.

    Raises:
      KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    ones = wanted(made, root)
    if not ones:
        return frozenset()
    root.mkdir(parents=True, exist_ok=True)
    with ExitStack() as locks:
        # Processes whose runs share a GeMS wait for each other; in one order, so that none waits in a circle.
        for one in ones:
            name = one.directory.relative_to(root).as_posix().replace("/", "_")
            locks.enter_context(disk.lock(root / f".{name}.lock"))
        ones = [one for one in ones if single.kept_weights(one.settings, one.world, root) is None]
        if not ones:
            return frozenset()
        fits = planned is not None and planned.layout == layout_of(len(ones), layout)
        driver = _Pretraining(ones, root, data_root, planned if planned and fits else together(ones, layout))
        if stop.requested:
            raise KeyboardInterrupt("before GeMS is pre-trained")
        return driver.drive(stop)


class _Pretraining:
    """Several slate VAEs as one program."""

    def __init__(self, ones: list[One], root: Path, data_root: Path, programs: Together) -> None:
        self.ones, self.gems = ones, ones[0].settings.gems
        self.programs, self.layout, self.pretraining = programs, programs.layout, programs.pretraining
        logs = {prepare.log_directory(one.settings, one.world, data_root): one for one in ones}
        logged = [prepare.logged_data(one.settings, one.world, data_root) for one in logs.values()]
        self.config = {"gems": [one.config for one in ones], "datasets": [data.checksum for data in logged]}
        self.directory = root / "GeMS" / f"together-{checkpoint.config_hash(self.config)[:6]}"
        validation, training = zip(*(datasets.split(data) for data in logged), strict=True)
        self.validation, self.training = (share_sets(self.layout, sets) for sets in (validation, training))
        self.bound = [single.bound_slates(data) for data in logged]
        self.logs = list(logs)
        self.which = [self.logs.index(prepare.log_directory(o.settings, o.world, data_root)) for o in ones]

    def drive(self, stop: tracking.StopRequest) -> frozenset[Path]:
        """All epochs; then the weights of each, where a single run's lie. Returns the directories without any."""
        self.data = data_of(self.layout, [one.settings for one in self.ones], self.which)
        with ExitStack() as held:
            for one in self.ones:
                held.enter_context(tracking.RunDirectory(one.directory, one.config, resume=True))
            state, done, fine = self._resume()
            logs = [tracking.MetricsLog(one.directory) for one in self.ones]
            for log in logs:
                log.truncate(done + 1)
            for epoch in range(done, self.gems.epochs):
                state, fine = self._epoch(state, fine, epoch, logs, stop)
            return self._keep(state, fine)

    def _resume(self) -> tuple[GeMSState, int, np.ndarray]:
        fine = np.ones(len(self.ones), bool)
        if not has_checkpoints(self.directory):
            return self.programs.make(self.data, going(self.layout)), 0, fine
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
                inputs = (self.training, jnp.int32(epoch), piece)
                state, metrics = self.programs.update(self.data, state, active, *inputs)
                losses.append(gather(self.layout, metrics))
                fine = fine & np.isfinite(losses[-1]["loss"]).all(axis=1)
                progress.update(start + int(piece[-1]) + 1, {"loss": np.nanmean(losses[-1]["loss"])})
                if stop.requested:
                    raise KeyboardInterrupt(f"in epoch {epoch + 1} of GeMS, which begins anew when asked for again")
        state, validated = self.programs.validate(self.data, state, going(self.layout, fine), self.validation)
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


def layout_of(count: int, layout: Layout) -> Layout:
    """Of `count` pre-trainings: groups as those of the sweep's runs, padded, on the same devices."""
    return make_layout(count, "auto", layout.group, layout.devices)


def programs(pretraining: Pretraining, layout: Layout) -> tuple[Program, Program]:
    """`pretraining.updates` and `validate` over all, see `over_runs`: shared are the data sets (`share_sets`), and of
    the updates the epoch [] and the numbers of its batches [m]."""

    def updates(
        data: Data, state: GeMSState, active: Array, training: Slates, epoch: Array, batches: Array
    ) -> tuple[GeMSState, Any]:
        del active  # who is no longer finite stays so
        return pretraining.updates(state, data.hypers, _key(data), _of(training, data), epoch, batches)

    def validate(data: Data, state: GeMSState, active: Array, validation: Slates) -> tuple[GeMSState, Any]:
        del active
        return pretraining.validate(state, data.hypers, _of(validation, data))

    begin = lambda data: pretraining.init(single.first_key(_key(data)))  # noqa: E731
    return over_runs(layout, begin, updates), over_runs(layout, begin, validate)


def jitted(layout: Layout, program: Program) -> Any:
    """`jax.jit` of one of the `programs`, as single pre-trainings compile theirs; the state is donated."""
    return jax.jit(program.call, donate_argnums=1, compiler_options=wide_vectors(layout.devices[0].platform))


def data_of(layout: Layout, settings: Sequence[TrainSettings], which: Sequence[int]) -> Data:
    """Data [places, ...] on their devices; `which` of the data sets each learns from."""
    data = [
        Data(np.asarray(jax.random.key_data(single.pretraining_key(one.seed))),  # type: ignore[arg-type]
             as_arrays(one.gems.hypers), np.int32(number))  # type: ignore[arg-type]
        for one, number in zip(settings, which, strict=True)
    ]  # fmt: skip
    return place(layout, jax.tree.map(lambda *x: np.stack([np.asarray(y) for y in x]), *data))


def share_sets(layout: Layout, sets: Sequence[datasets.LoggedSlates]) -> Slates:
    """Data sets of one size as flat rows [sets, N, ...], once on every device that works, straight from the host."""

    def shared(columns: list[np.ndarray]) -> Array:
        flat = np.stack([column.reshape(-1, *column.shape[2:]) for column in columns])
        return jax.device_put(flat, NamedSharding(layout.mesh, PartitionSpec()))

    return Slates(shared([data.slates for data in sets]), shared([data.clicks for data in sets]))


def _key(data: Data) -> Array:
    return jax.random.wrap_key_data(data.key)


class _Rows:
    """One of several arrays [sets, N, ...] as an array [N, ...] that is only read by rows.

    Each row is gathered by (set, row): slicing the set out first would copy all of it for every run of a group.
    """

    def __init__(self, arrays: Array, number: Array) -> None:
        self.arrays, self.number = arrays, number
        self.shape, self.dtype = arrays.shape[1:], arrays.dtype

    def __getitem__(self, rows: Array) -> Array:
        return self.arrays[self.number, rows]


def _of(slates: Slates, data: Data) -> Slates:
    """The run's own logged data."""
    return Slates(*(_Rows(column, data.dataset) for column in slates))  # type: ignore[arg-type]
