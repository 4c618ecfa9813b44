"""A sweep from the host's side: weights are prepared, epochs driven, logged and checkpointed, policies tested.

`run_sweep` is the whole of it and may be stopped and started again, on other devices too. Called by `experiments.sweep`
and notebooks.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemsjax import checkpoint, methods, tracking
from gemsjax.devices import surroundings
from gemsjax.errors import require, require_count
from gemsjax.prepare import has_checkpoints
from gemsjax.prepare.gems import place_of
from gemsjax.runs import row_of
from gemsjax.sweep import files, memory
from gemsjax.sweep.axes import Run
from gemsjax.sweep.bundle import Bundle, bundle, identity, program, saved_like, stacked, test, weights_of
from gemsjax.sweep.cadence import Cadence
from gemsjax.sweep.layout import Layout, gather, going, make_layout, of_run, place
from gemsjax.sweep.pretraining import Together, pretrain
from gemsjax.sweep.processes import WAIT, Process, share, wait_for_all

Rows = list[dict[str, Any]]
NEVER = -1
"""In place of the step at which a run was frozen: it never began."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How a sweep is run; none of it changes which numbers are computed, save `group`, in their last digits.

    Attributes:
      layout, group: see `make_layout`; a sweep that is continued keeps the group that it has, unless one is asked for.
      shards: parts with a checkpoint each, dealt to the processes; by default one a process.
      checkpoint_minutes: at least between checkpoints, as is ten times what the latest one took (see `Cadence`); the
        last epoch, and a signal to stop, always leave one.
      resume, overwrite: what to do with an earlier sweep; refused without either.
      pretrained, data: roots of pre-trained weights and logged data.
      wait: seconds that the first process waits for the others' shards.
      command: the command line that asked for the sweep, for `sweep.json`; empty if none did.
    """

    layout: str = "auto"
    group: int | None = None
    shards: int | None = None
    checkpoint_minutes: float = 5.0
    resume: bool = False
    overwrite: bool = False
    pretrained: Path = Path("runs")
    data: Path = Path("logs")
    wait: float = float(WAIT)
    command: tuple[str, ...] = ()


class Outcome(NamedTuple):
    """What `run_sweep` leaves.

    Attributes:
      directory: of the sweep.
      rows: one a run, as in `runs.csv`; empty for all but the first process, and if the sweep was stopped.
      stopped: whether a signal asked to stop before the end.
    """

    directory: Path
    rows: Rows
    stopped: bool


def run_sweep(
    runs: Sequence[Run],
    directory: Path,
    options: Options = Options(),  # noqa: B008 - frozen
    process: Process = Process(),  # noqa: B008
    devices: Sequence[jax.Device] | None = None,
    on_epoch: Callable[[int, Rows], object] = lambda shard, rows: None,
) -> Outcome:
    """Run a sweep, or this process's share of it.

    Args:
      runs: from `axes.grid` or `axes.paired`.
      directory: of the sweep.
      options: how.
      process: from `processes.start`.
      devices: by default all local ones.
      on_epoch: called with a shard's number and its runs' rows of metrics.

    Raises:
      SettingError: runs whose programs differ, more than memory holds, or an existing sweep.
      DataError: another sweep in the directory, or a damaged one.
    """
    made = bundle(runs)  # refuses before anything is written
    shards = min(process.total, len(runs)) if options.shards is None else options.shards
    require_count("shards", shards, 1, len(runs))
    dealt: list[list[int]] = []
    waiting, target = [files.row_of(number, run, "waiting", 0) for number, run in enumerate(runs)], target_of(made)
    tell = functools.partial(files.tell, directory, waiting, target) if process.rank == 0 else lambda: None
    if process.rank == 0:
        laid = _layout(directory, -(-len(runs) // shards), options, devices)
        about = {"layout_of_a_shard": laid.describe(), "processes": process.total, **surroundings()}
        about |= {"command": options.command} if options.command else {}
        dealt = files.begin(directory, runs, shards, about, resume=options.resume, overwrite=options.overwrite)
        tell()
    wait_for_all("the sweep has begun", process)
    dealt = dealt or files.continued(directory, runs)
    # One size of groups for all shards, be they of unequal length, and for every process.
    group = files.last_layout(directory)["group"]
    options = dataclasses.replace(options, layout="auto", group=group)
    for number in share(len(dealt), process):
        mine = [runs[run] for run in dealt[number]]
        driver = _Shard(number, dealt[number], mine, directory, options, devices, tell)
        if not driver.drive(on_epoch):
            return Outcome(directory, [], stopped=True)
    if process.rank > 0:
        return Outcome(directory, [], stopped=False)
    with tracking.StopRequest() as stop:
        for number in range(len(dealt)):
            if not files.wait_for_results(directory, number, target, options.wait, lambda: stop.requested, tell):
                return Outcome(directory, [], stopped=True)
    return Outcome(directory, files.collect(directory, target), stopped=False)


def _layout(directory: Path, most: int, options: Options, devices: Sequence[jax.Device] | None) -> Layout:
    """Of a shard of `most` runs. One that goes on keeps its group: the last digits of its numbers depend on it."""
    if not (options.resume and files.index(directory).exists()):
        return make_layout(most, options.layout, options.group, devices)
    most = max(len(shard) for shard in files.read(directory)["shards"])
    asked = make_layout(most, options.layout, options.group, devices)
    before = files.last_layout(directory)
    if before["group"] == asked.group:
        return asked
    # A group of one is called mapped whatever was asked for, so only that says something against larger ones.
    if options.group is None and options.layout != "mapped":
        print(f"note: groups of {before['group']}, as the sweep began; on these devices {asked.group} would be usual")
        return make_layout(most, "auto", before["group"], devices)
    print(
        f"note: groups of {asked.group} from here on, {before['group']} until now: the runs' numbers will differ in "
        "their last digits from those of a sweep that was not stopped"
    )
    return asked


def target_of(made: Bundle) -> files.Target:
    """What the results of a sweep are of."""
    return {name: getattr(made.settings, name) for name in ("steps", "test_users", "test_stream")}


class _Shard:
    """One shard's runs, as one program."""

    def __init__(
        self,
        number: int,
        numbers: Sequence[int],
        runs: Sequence[Run],
        directory: Path,
        options: Options,
        devices: Sequence[jax.Device] | None,
        tell: Callable[[], object],
    ) -> None:
        self.number, self.numbers, self.root, self.options = number, list(numbers), directory, options
        self.tell = tell
        self.directory = files.shard(directory, number)
        self.made: Bundle = bundle(runs)
        self.layout: Layout = make_layout(len(runs), options.layout, options.group, devices)
        self.settings = self.made.settings
        self.identity = identity(self.made)

    def drive(self, on_epoch: Callable[[int, Rows], object]) -> bool:
        """Train and test; False if somebody asked to stop, in the test too. A finished shard is not done again."""
        settings, target = self.settings, target_of(self.made)
        done = checkpoint.latest_step(self.checkpoints) or 0
        require(settings.steps >= done, "steps", settings.steps, f"at least the {done} that the sweep already has")
        if files.results(self.root, self.number, target) is not None:
            return True
        title = f"{methods.method(settings.method).title}, {len(self.numbers)} runs"
        with tracking.RunDirectory(self.directory, {"shard": self.number}, resume=True), tracking.StopRequest() as stop:
            self._begin(stop)
            with tracking.Progress(settings.steps, title, start=self.done) as progress:
                while self.done < settings.steps and self.going.any() and not stop.requested:
                    rows = self._epoch()
                    on_epoch(self.number, rows)
                    told = {"return": np.median([row["return"] for row in rows if "frozen" not in row] or [np.nan])}
                    progress.update(self.done, told)
            self._save()
            if self.done < settings.steps and self.going.any():
                self._tell("stopped")
                return False
            files.write_results(self.root, self.number, target, self._test())
            self.tell()
            return not stop.requested

    def _begin(self, stop: tracking.StopRequest) -> None:
        made, options = self.made, self.options
        self.saved, self.cadence = True, Cadence(options.checkpoint_minutes)
        like = saved_like(made)
        # Now, not after hours of compiling or pre-training: what does not fit is refused.
        planned = None if has_checkpoints(self.directory) else self._plan_pretraining()
        need, compiled = memory.need(made, like[1], self.layout)
        memory.refuse_unless_fits(need, self.layout, lambda layout: memory.need(made, like[1], layout)[0])
        self.programs = {min(self.settings.epoch_steps, self.settings.steps): compiled}
        self.program = program(made, self.layout)
        if has_checkpoints(self.directory):
            saved = checkpoint.restore(self.checkpoints, like, config=self.identity, on_host=True)
            (state, data, frozen_at), self.done = saved.tree, saved.step
            self.frozen_at = np.array(frozen_at)
            self.data, self.state = place(self.layout, data), place(self.layout, state)
        else:
            self._tell_before("pre-training")
            try:
                failed = pretrain(made, options.pretrained, options.data, self.layout, stop, planned)
            except KeyboardInterrupt:
                self._tell_before("stopped")
                raise
            data = stacked(made, weights_of(options.pretrained, options.data, failed))
            self.done, self.frozen_at = 0, np.array([self._without_gems(run, failed) for run in made.runs], np.int32)
            self.data = place(self.layout, data)
            self.state = jax.jit(self.program.make)(self.data, going(self.layout))
        self.log = tracking.MetricsLog(self.directory)
        self.log.truncate(self.done + 1)
        rows = tracking.read_metrics(self.directory)
        self.reasons = {row["run"]: row["frozen"] for row in rows if "frozen" in row}
        self._tell("running")

    def _plan_pretraining(self) -> Together | None:
        """Programs of the GeMS that are missing; refuses them if they do not fit."""
        root = self.options.pretrained
        planned = memory.pretraining_need(self.made, root, self.layout)
        if planned is None:
            return None
        memory.refuse_unless_fits(
            planned[0],
            planned[1].layout,
            lambda layout: memory.pretraining_need(self.made, root, layout)[0],  # type: ignore[index]
        )
        return planned[1]

    def _without_gems(self, run: Run, failed: Collection[Path]) -> int:
        """`NEVER` for a run whose GeMS could not be trained."""
        world = self.made.worlds[self.made.runs.index(run)]
        return NEVER if failed and place_of(run.settings, world, self.options.pretrained)[0] in failed else 0

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def going(self) -> np.ndarray:
        """[N] which runs are not frozen."""
        return self.frozen_at == 0

    def _epoch(self) -> Rows:
        started, before = time.perf_counter(), self.going
        length = min(self.settings.epoch_steps, self.settings.steps - self.done)
        numbers = jnp.arange(self.done, self.done + length, dtype=jnp.int32)
        active = going(self.layout, before)
        if length not in self.programs:
            lowered = jax.jit(self.program.call, donate_argnums=1).lower(self.data, self.state, active, numbers)
            self.programs[length] = lowered.compile()
        self.state, told = self.programs[length](self.data, self.state, active, numbers)
        metrics, held = gather(self.layout, told)
        best = gather(self.layout, self.state.best_return)
        seconds = time.perf_counter() - started
        rows = []
        for place_, number in enumerate(self.numbers):
            if not before[place_]:
                continue
            per_step = {name: value[place_] for name, value in metrics.steps.items()}
            row: dict[str, Any] = {"step": self.done + length, "run": number}
            if held[place_]:
                updated = per_step.pop("updated")
                row |= row_of(
                    per_step, updated, metrics.validation[place_], float(best[place_]),
                    step=self.done + length, seconds=seconds,
                )  # fmt: skip
            else:
                row["frozen"] = self.reasons[number] = _reason(per_step, self.done)
                self.frozen_at[place_] = self.done + length
                print(f"\nrun {number} is frozen: {row['frozen']}; the others go on", flush=True)
            rows.append(row)
        self.done, self.saved = self.done + length, False
        self.log.extend(rows)  # the rows first: a sweep that is killed in between drops them on resuming
        if self.cadence.due():
            self._save()
        self._tell("running")
        return rows

    def _rows(self, status: str) -> Rows:
        """Rows of `runs.csv`; `status` of the runs that are not frozen."""
        rows, best = [], gather(self.layout, self.state.best_return)
        for place_, number in enumerate(self.numbers):
            told, steps = status, self.done
            if self.frozen_at[place_] == NEVER:
                told, steps = "frozen: a loss of its GeMS was no longer finite", 0
            elif not self.going[place_]:
                told, steps = f"frozen: {self.reasons[number]}", int(self.frozen_at[place_])
            row = files.row_of(number, self.made.runs[place_], told, steps)
            rows.append(row | ({"best_validation": float(best[place_])} if np.isfinite(best[place_]) else {}))
        return rows

    def _tell_before(self, status: str) -> None:
        """The same before the runs have begun."""
        rows = [files.row_of(number, run, status, 0) for number, run in zip(self.numbers, self.made.runs, strict=True)]
        files.write_progress(self.root, self.number, rows)
        self.tell()

    def _tell(self, status: str) -> None:
        """For whoever looks at the sweep while it goes on, or after it was killed. Nothing is continued from it."""
        files.write_progress(self.root, self.number, self._rows(status))
        self.tell()

    def _save(self) -> None:
        """A checkpoint of all runs as one, without the empty places: it restores on any number of devices."""
        if self.saved:
            return
        started = time.monotonic()
        tree = (*gather(self.layout, (self.state, self.data)), self.frozen_at)
        checkpoint.save(self.checkpoints, tree, step=self.done, config=self.identity)
        self.saved = True
        self.cadence.saved(started)

    def _test(self) -> Rows:
        rows = self._rows("finished")
        for place_, row in enumerate(rows):
            if "best_validation" in row:
                agent = of_run(self.state.best_agent, place_)
                tested = test(self.made, place_, of_run(self.data, place_), agent)
                row |= {"test": tested.mean, "test_se": tested.standard_error, "test_users": int(tested.returns.size)}
        return rows


def _reason(per_step: dict[str, np.ndarray], first: int) -> str:
    """The first number that was not finite, and its step."""
    bad = {name: int(np.argmin(np.isfinite(x))) for name, x in per_step.items() if not np.isfinite(x).all()}
    if not bad:
        return "a weight was not finite after the epoch's last step"
    name = min(bad, key=lambda name: bad[name])
    return f"{name} was {per_step[name][bad[name]]} at step {first + bad[name]}"
