"""What a sweep leaves on disk: one directory that tells the whole story by itself.

    sweep.json           what was asked (axes, command lines), each run's settings and shard, versions, devices
    shards/00/           of one process's share: metrics.jsonl, checkpoints/ (all its runs as one), progress.json (where
                         each run is), results.json
    runs.csv             one row a run: its values, status, steps, best validation, test return; as of the latest epoch
    metrics.csv          one row a run and epoch, once all are finished

A shard is driven by one process at a time (locked); the first process makes the two tables from the shards: `runs.csv`
after each of its epochs, and while it waits for the others. A run's status is `waiting`, `pre-training`, `running`,
`stopped` (by a signal), `frozen: ` and why, or `finished`; `running` where no process is left means that they were
killed. Called by the other files of `gemsjax.sweep`.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gemsjax import disk, tracking
from gemsjax.errors import DataError, SettingError, require
from gemsjax.settings import from_config
from gemsjax.sweep.axes import Run

FORMAT = "gemsjax-sweep-1"
"""Marks a `sweep.json` as ours."""
_INDEX, _RUNS, _METRICS = "sweep.json", "runs.csv", "metrics.csv"
_PROGRESS, _RESULTS = "progress.json", "results.json"
TELL = 10.0
"""Seconds between looks at how far the other processes are, for who waits for them."""


def deal(runs: int, shards: int) -> list[list[int]]:
    """Numbers of the runs of each shard: contiguous, sizes that differ by at most one."""
    require(1 <= shards <= runs, "shards", shards, f"a whole number from 1 to {runs}, the number of runs")
    ends = [number * runs // shards for number in range(shards + 1)]
    return [list(range(first, last)) for first, last in zip(ends, ends[1:], strict=False)]


def begin(
    directory: Path, runs: Sequence[Run], shards: int, about: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> list[list[int]]:
    """Write `sweep.json`, or continue that of the sweep that goes on; returns the runs of each shard.

    A resumed sweep keeps its shards; `about` (devices, versions) is added to its list of starts.

    Raises:
      SettingError: there is a sweep already, and neither `resume` nor `overwrite` was given.
      DataError: another sweep lies there, or one that goes on.
    """
    require(not (resume and overwrite), "--resume with --overwrite", True, "only one of them")
    started, starts, dealt = time.strftime("%Y-%m-%d %H:%M:%S"), [], deal(len(runs), shards)
    if index(directory).exists() and not overwrite:
        if not resume:
            flags = "there is a sweep; --resume continues it, --overwrite deletes it"
            raise SettingError("sweep directory", str(directory), flags)
        dealt, starts = _same(directory, runs), read(directory)["starts"]
    elif index(directory).exists():
        _empty(directory)
    elif directory.exists() and any(directory.iterdir()):
        raise DataError(f"{directory} is not empty and holds no sweep; choose another --out")
    directory.mkdir(parents=True, exist_ok=True)
    listed = [
        {"number": number, "values": run.values, "settings": dataclasses.asdict(run.settings)}
        for number, run in enumerate(runs)
    ]
    asked = {"axes": axes_of(runs), "starts": [*starts, {"at": started, **about}]}
    disk.write_json(index(directory), {"format": FORMAT, **asked, "shards": dealt, "runs": listed})
    return dealt


def axes_of(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The values of every axis in the order in which they were asked for, each once."""
    values = {name: [run.values[name] for run in runs] for name in runs[0].values}
    return {name: [x for place, x in enumerate(all_) if x not in all_[:place]] for name, all_ in values.items()}


def last_layout(directory: Path) -> dict[str, Any]:
    """How the sweep was laid out when it was last started, see `Layout.describe`."""
    return read(directory)["starts"][-1]["layout_of_a_shard"]


def continued(directory: Path, runs: Sequence[Run]) -> list[list[int]]:
    """The runs of each shard of a sweep that another process has begun.

    Raises:
      DataError: it is another sweep.
    """
    return _same(directory, runs)


def _empty(directory: Path) -> None:
    """Delete a sweep, provided that no process works on it; the index goes last, so that it can be repeated."""
    shards = sorted((directory / "shards").glob("*"))
    with ExitStack() as locks:
        for path in shards:
            locks.enter_context(tracking.RunDirectory(path, {}, resume=True))
    for path in shards:
        tracking.RunDirectory(path, {}, overwrite=True).close()
        (path / "config.json").unlink()
    for name in (_RUNS, _METRICS, _INDEX):
        (directory / name).unlink(missing_ok=True)


def index(directory: Path) -> Path:
    """The file that says what a sweep is."""
    return directory / _INDEX


def read(directory: Path | str) -> dict[str, Any]:
    """A sweep's `sweep.json`.

    Raises:
      DataError: there is none, or it is not ours.
    """
    path = Path(directory) / _INDEX
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{directory} holds no sweep: its {_INDEX} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{directory} holds no sweep: its {_INDEX} is not marked {FORMAT!r}")
    return content


def shard(directory: Path, number: int) -> Path:
    """Directory of a shard."""
    return directory / "shards" / f"{number:02d}"


def _same(directory: Path, runs: Sequence[Run]) -> list[list[int]]:
    there = read(directory)
    # Identities, which say nothing of a setting that came later and stands at what was done before.
    old = [disk.plain(from_config(run["settings"]).resolved().identity()) for run in there["runs"]]
    new = [disk.plain(run.settings.identity()) for run in runs]
    if len(old) != len(new):
        raise DataError(f"{directory} holds a sweep of {len(old)} runs; asked for are {len(new)}")
    for number, (before, now) in enumerate(zip(old, new, strict=True)):
        wrong = disk.differences(before, now)
        if wrong:
            raise DataError(f"{directory} holds another sweep; run {number}: {'; '.join(wrong)}")
    return there["shards"]


Target = Mapping[str, Any]
"""What results are of: `steps`, `test_users`, `test_stream`."""


def write_results(directory: Path, number: int, target: Target, rows: list[dict[str, Any]]) -> None:
    """A shard's rows of results, the sign that it is finished."""
    disk.write_json(shard(directory, number) / _RESULTS, {"of": target, "rows": rows})


def results(directory: Path, number: int, target: Target) -> list[dict[str, Any]] | None:
    """A shard's rows of results if it is finished, and with this target."""
    try:
        found = json.loads((shard(directory, number) / _RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found["rows"] if found["of"] == target else None


def row_of(number: int, run: Run, status: str, steps: int) -> dict[str, Any]:
    """A run's row in `runs.csv`, as far as it is known before there are results."""
    settings = run.settings
    row: dict[str, Any] = {"run": number, "method": settings.method, "env": settings.env}
    row |= {"seed": settings.seed, "variant": settings.variant} | run.values
    return row | {"status": status, "steps": steps, "privileged": settings.privileged}


def write_progress(directory: Path, number: int, rows: list[dict[str, Any]]) -> None:
    """Where a shard's runs are, in rows of `runs.csv`."""
    disk.write_json(shard(directory, number) / _PROGRESS, {"rows": rows})


def tell(directory: Path, waiting: Sequence[Mapping[str, Any]], target: Target) -> None:
    """Write `runs.csv` as it is now. For the first process only: two could write at once on a shared disk.

    Args:
      directory: of the sweep.
      waiting: a row for each run that no shard tells of yet.
      target: what results are of.
    """
    found = {row["run"]: row for row in waiting}
    for number in range(len(read(directory)["shards"])):
        rows = results(directory, number, target)
        if rows is None:
            try:
                rows = json.loads((shard(directory, number) / _PROGRESS).read_text(encoding="utf-8"))["rows"]
            except (OSError, ValueError):
                rows = []
        found |= {row["run"]: row for row in rows or []}
    disk.write(directory / _RUNS, _table([found[number] for number in sorted(found)]).encode())


def wait_for_results(
    directory: Path,
    number: int,
    target: Target,
    seconds: float,
    stop: Callable[[], bool] = lambda: False,
    meanwhile: Callable[[], object] = lambda: None,
) -> bool:
    """Wait until another process has finished its shard, or until `stop()`: False then. Calls `meanwhile` now and then.

    Raises:
      DataError: it did not in time.
    """
    started = told = time.monotonic()
    deadline = started + seconds
    while results(directory, number, target) is None:
        if time.monotonic() > told + TELL:
            meanwhile()
            told = time.monotonic()
        if time.monotonic() > deadline:
            raise DataError(f"{directory}: another process did not finish shard {number} within {seconds:.0f} s")
        if stop():
            return False
        time.sleep(0.2)
    return True


def collect(directory: Path, target: Target) -> list[dict[str, Any]]:
    """Make the tables from the finished shards: one row a run.

    Raises:
      DataError: a shard is not finished.
    """
    found, metrics = [], []
    for number in range(len(read(directory)["shards"])):
        rows = results(directory, number, target)
        if rows is None:
            raise DataError(f"{directory}: shard {number} is not finished; --resume continues it")
        found += rows
        metrics += tracking.read_metrics(shard(directory, number))
    found.sort(key=lambda row: row["run"])
    metrics.sort(key=lambda row: (row["step"], row["run"]))
    disk.write(directory / _RUNS, _table(found).encode())
    disk.write(directory / _METRICS, _table(metrics).encode())
    return found


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    stream = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
