"""What a run leaves on disk and on the terminal: its directory, metrics, progress, and requests to stop.

Standard library, plus rich for the live bar. Host code between epochs: used by training, sweeps and experiments, never
by what is compiled. Everything written here is text: JSON, JSON lines, CSV.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from gemsjax.disk import PathLike, is_temporary, lock, plain, write, write_json
from gemsjax.errors import DataError, SettingError, require, require_choice

FORMAT = "gemsjax-run-1"
"""Marks a `config.json` as ours: only directories that hold one are ever emptied."""
TRACKERS = ("none", "tensorboard", "wandb")
_CONFIG, _LOCK, _ROWS, _TABLE = "config.json", ".lock", "metrics.jsonl", "metrics.csv"


class RunName(NamedTuple):
    """Where a run lives below the root of all runs, and what tables, trackers and files call it."""

    directory: str
    full: str


def run_name(
    env: str, seed: int, beta: float | None = None, click_weight: float | None = None, *, method: str
) -> RunName:
    """Published naming: `SAC_GeMS/focused_topdown_KL1.0_click0.5_seed58407201`, and the same joined by underscores.

    Args:
      env: name of the environment; hyphens become underscores.
      seed: of the run.
      beta, click_weight: weights of the KL and click terms of the ranker's pre-training, if there was one.
      method: directory name of the method, `SAC_GeMS` for `sac-gems`.
    """
    weights = (("KL", beta), ("click", click_weight))
    parts = [f"{word}{float(weight)}" for word, weight in weights if weight is not None]
    name = "_".join([env.replace("-", "_"), *parts, f"seed{seed}"])
    for setting, text in (("env", name), ("method", method)):
        require(bool(text) and text not in (".", "..") and not set(text) & set("/\\"), setting, text, "a plain name")
    return RunName(f"{method}/{name}", f"{method}_{name}")


class RunDirectory:
    """One run's directory, locked against a second process until `close` (or the end of a `with`).

    Attributes:
      path: the directory.
      resumed: whether there was a run to continue.
    """

    def __init__(
        self, path: PathLike, config: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False
    ) -> None:
        """Make `path` and write its `config.json`; a resumed run keeps the one it has (see `write_config`).

        Args:
          path: such as `runs/` + `run_name(...).directory`.
          config: the resolved configuration.
          resume: continue what is there; starts anew if there is nothing.
          overwrite: empty the directory first, provided that it holds a `config.json` written by this class.

        Raises:
          SettingError: the directory is not empty and neither flag is given, or both are.
          DataError: `overwrite` or `resume` of something that is no run directory, or another run goes on there.
        """
        self.path = Path(path)
        kept = check_run_directory(self.path, resume=resume, overwrite=overwrite)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.path / _LOCK, "another run is going on")
        self.resumed = kept and resume
        if overwrite:
            self._empty()
        if not self.resumed:
            self.write_config(config)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Replace `config.json`, for a resumed run whose configuration may change (how long it trains, say)."""
        write_json(self.path / _CONFIG, {"format": FORMAT, "config": config})

    def close(self) -> None:
        """Let go of the lock. The small lock file stays: removing it would race with the next process."""
        self._lock.close()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _empty(self) -> None:
        # config.json goes last, so that a removal that was cut short can be repeated.
        for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == _CONFIG):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != _LOCK:
                entry.unlink()


def check_run_directory(path: PathLike, *, resume: bool, overwrite: bool) -> bool:
    """Whether `path` holds an earlier run; raises what `RunDirectory` would, so that nobody waits for it in vain."""
    require(not (resume and overwrite), "--resume with --overwrite", True, "only one of them")
    path = Path(path)
    kept = path.is_dir() and any(entry.name != _LOCK and not is_temporary(entry) for entry in path.iterdir())
    if kept and not (resume or overwrite):
        flags = "it is not empty; --resume continues it, --overwrite deletes what is in it"
        raise SettingError("run directory", str(path), flags)
    if kept:
        read_config(path)
    return kept


def read_config(directory: PathLike) -> dict[str, Any]:
    """The configuration of a run directory.

    Raises:
      DataError: no `config.json`, or none written by `RunDirectory`.
    """
    path = Path(directory) / _CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{directory} is no run directory: its {_CONFIG} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{directory} is no run directory: its {_CONFIG} is not marked {FORMAT!r}")
    return content["config"]


class MetricsLog:
    """Rows of scalars, one an epoch: `metrics.jsonl`, flushed to disk at every call, and the same as `metrics.csv`.

    A column that appears later widens the table. NaN and infinities are null, an empty cell in the table.
    """

    def __init__(self, directory: PathLike) -> None:
        """Continue the files of `directory`, or begin them; a half-written last row is dropped.

        Raises:
          DataError: a damaged row that is not the last.
        """
        self._rows, self._table = Path(directory) / _ROWS, Path(directory) / _TABLE
        self._columns: list[str] = []
        self._replace(read_metrics(directory))

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row, which has a whole number `step` and otherwise scalars (of Python, NumPy or jax)."""
        self.extend([row])

    def extend(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add several rows, flushed to disk together."""
        added = [plain(row) for row in rows]
        for row in added:
            step = row.get("step")
            whole = isinstance(step, int) and not isinstance(step, bool)
            require(whole, "step of a row of metrics", step, "a whole number")
        _append(self._rows, "".join(json.dumps(row, allow_nan=False) + "\n" for row in added))
        if all(row.keys() <= set(self._columns) for row in added):
            _append(self._table, _csv(added, self._columns))
        else:
            self._write_table(read_metrics(self._rows.parent))

    def truncate(self, step: int) -> None:
        """Drop every row whose `step` is `step` or more: what a run that resumes there will write again."""
        self._replace([row for row in read_metrics(self._rows.parent) if row["step"] < step])

    def _replace(self, rows: list[dict[str, Any]]) -> None:
        write(self._rows, "".join(json.dumps(row) + "\n" for row in rows).encode())
        self._write_table(rows)

    def _write_table(self, rows: list[dict[str, Any]]) -> None:
        self._columns = list(dict.fromkeys(key for row in rows for key in row))
        header = _csv([dict(zip(self._columns, self._columns, strict=True))], self._columns) if rows else ""
        write(self._table, (header + _csv(rows, self._columns)).encode())


def read_metrics(directory: PathLike) -> list[dict[str, Any]]:
    """All rows of a run's metrics, oldest first; [] if there are none. A half-written last row is left out.

    Raises:
      DataError: a damaged row that is not the last, with its line.
    """
    path, rows = Path(directory) / _ROWS, []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("no row with a step")
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(f"{path}, line {number} is damaged: {error}") from error
        rows.append(row)
    return rows


def _append(path: Path, text: str) -> None:
    with open(path, "a", encoding="utf-8", newline="") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _csv(rows: Iterable[Mapping[str, Any]], columns: list[str]) -> str:
    stream = io.StringIO()
    csv.DictWriter(stream, columns, lineterminator="\n").writerows(rows)
    return stream.getvalue()


class Progress:
    """A live bar on a terminal; elsewhere (files, notebooks, batch jobs) a plain line every few seconds."""

    def __init__(
        self, total: int, description: str = "", *, start: int = 0, unit: str = "steps", every: float = 5.0
    ) -> None:
        """Count `unit` from `start` (where a run resumes) to `total`; `every`: least seconds between plain lines."""
        self._total, self._unit, self._every, self._description = total, unit, every, description
        self._times = deque([(time.monotonic(), start)], maxlen=20)
        self._start, self._printed = start, -math.inf
        self._bar: Any = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[text]}", markup=False))
            self._bar = Bar(*columns)
            self._bar.add_task(description, total=total, completed=start, text="")

    def update(self, done: int, metrics: Mapping[str, Any] | None = None) -> None:
        """`done` of `total` are done; `metrics` are shown as they are named, four digits each."""
        self._times.append((time.monotonic(), done))
        text = self._text(done, metrics or {})
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, text=text)
        elif done >= self._total or (done > self._start and time.monotonic() - self._printed >= self._every):
            print(f"{self._description} {text}".strip(), flush=True)
            self._printed = time.monotonic()

    def _text(self, done: int, metrics: Mapping[str, Any]) -> str:
        (before, first), (now, last) = self._times[0], self._times[-1]
        rate = (last - first) / max(now - before, 1e-9)
        left = f"{timedelta(seconds=round((self._total - done) / rate))} left" if rate > 0 else "? left"
        shown = [f"{name} {float(value):.4g}" for name, value in metrics.items()]
        return "  ".join([f"{done:,}/{self._total:,} {self._unit}", f"{rate:,.3g}/s", left, *shown])

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


class Tracker(NamedTuple):
    """Where else rows go: `log(row)`, a row as given to `MetricsLog.append`, and `close()`."""

    log: Callable[[Mapping[str, Any]], object]
    close: Callable[[], object]


def check_tracker(track: str) -> None:
    """Raise `SettingError` for a tracker that `open_tracker` would refuse."""
    require_choice("track", track, TRACKERS)
    package = {"tensorboard": "tensorboardX", "wandb": "wandb"}.get(track)
    if package is not None and importlib.util.find_spec(package) is None:
        raise SettingError("track", track, "its package is not installed: pip install 'gemsjax[tracking]'")


def open_tracker(
    track: str, directory: PathLike, name: str, config: Mapping[str, Any], *, resumed_step: int | None = None
) -> Tracker:
    """The tracker that `--track` names: `none`, `tensorboard` (below `directory/tensorboard`) or `wandb`.

    Args:
      track: one of `TRACKERS`.
      directory, name: of the run; the full name.
      config: resolved configuration, shown by wandb.
      resumed_step: where a resumed run goes on; TensorBoard then hides what it had from there on.

    Raises:
      SettingError: another name, or its package is not installed.
    """
    require_choice("track", track, TRACKERS)
    try:
        if track == "tensorboard":
            return _tensorboard(os.path.join(directory, "tensorboard"), resumed_step)
        if track == "wandb":
            return _wandb(name, os.fspath(directory), plain(config))
    except ImportError as error:
        needs = f"its package is not installed: pip install 'gemsjax[tracking]' ({error})"
        raise SettingError("track", track, needs) from error
    return Tracker(lambda row: None, lambda: None)


def _tensorboard(directory: str, resumed_step: int | None) -> Tracker:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(directory, purge_step=resumed_step)

    def log(row: Mapping[str, Any]) -> None:
        for key, value in _numbers(row).items():
            writer.add_scalar(key, value, plain(row["step"]))

    return Tracker(log, writer.close)


def _wandb(name: str, directory: str, config: dict[str, Any]) -> Tracker:
    import wandb

    run = wandb.init(project="gemsjax", name=name, dir=directory, config=config)
    return Tracker(lambda row: run.log(_numbers(row), step=plain(row["step"])), run.finish)


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in plain(row).items() if isinstance(value, int | float) and key != "step"}


class StopRequest:
    """Within `with StopRequest() as stop:` Ctrl-C and SIGTERM set `stop.requested`, to be read between epochs.

    The second Ctrl-C raises KeyboardInterrupt. Python sees signals when a compiled epoch returns, not within it.
    Handlers can only be set by the main thread: elsewhere nothing is ever requested.
    """

    def __init__(self, signals: Iterable[signal.Signals] = (signal.SIGINT, signal.SIGTERM)) -> None:
        self.requested = False
        self._signals = tuple(signals)
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _handle(self, number: int, _: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        note = f"\n{signal.Signals(number).name}: stopping after this epoch (Ctrl-C again stops at once)\n"
        with suppress(OSError):
            os.write(2, note.encode())  # a print could interrupt another print
