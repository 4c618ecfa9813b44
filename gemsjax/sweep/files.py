"""What a sweep leaves on disk: one directory that tells the whole story by itself.

    sweep.json           what was asked, each run's settings, which shard holds it, versions and devices
    shards/00/           of one process's share: metrics.jsonl, checkpoints/ (all its runs as one), results.json
    runs.csv             one row a run: its values, status, best validation, test return
    metrics.csv          one row a run and epoch

A shard is driven by one process at a time (locked); the first process makes the two tables from the shards. Called by
the other files of `gemsjax.sweep`.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemsjax import disk, tracking
from gemsjax.errors import DataError, SettingError, require
from gemsjax.sweep.axes import Run

FORMAT = "gemsjax-sweep-1"
"""Marks a `sweep.json` as ours."""
_INDEX, _RESULTS, _RUNS, _METRICS = "sweep.json", "results.json", "runs.csv", "metrics.csv"


def deal(runs: int, shards: int) -> list[list[int]]:
    """Numbers of the runs of each shard: contiguous, sizes that differ by at most one."""
    require(1 <= shards <= runs, "shards", shards, f"a whole number from 1 to {runs}, the number of runs")
    ends = [number * runs // shards for number in range(shards + 1)]
    return [list(range(first, last)) for first, last in zip(ends, ends[1:], strict=False)]


def begin(
    directory: Path, runs: Sequence[Run], shards: int, about: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> list[list[int]]:
    """Write `sweep.json`, or find that of the sweep that goes on; returns the runs of each shard.

    Raises:
      SettingError: there is a sweep already, and neither `resume` nor `overwrite` was given.
      DataError: another sweep lies there.
    """
    require(not (resume and overwrite), "--resume with --overwrite", True, "only one of them")
    index = directory / _INDEX
    if index.exists() and not overwrite:
        if not resume:
            flags = "there is a sweep; --resume continues it, --overwrite deletes it"
            raise SettingError("sweep directory", str(directory), flags)
        return _same(directory, runs)
    if directory.exists() and not index.exists() and any(directory.iterdir()):
        raise DataError(f"{directory} is not empty and holds no sweep; choose another --out")
    dealt = deal(len(runs), shards)
    for number in range(len(dealt)):
        if overwrite and shard(directory, number).exists():  # refused if it is no run's directory or in use
            tracking.RunDirectory(shard(directory, number), {}, overwrite=True).close()
            (shard(directory, number) / _RESULTS).unlink(missing_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    listed = [
        {"number": number, "values": run.values, "settings": dataclasses.asdict(run.settings)}
        for number, run in enumerate(runs)
    ]
    disk.write_json(index, {"format": FORMAT, **about, "shards": dealt, "runs": listed})
    return dealt


def wait_for(path: Path, seconds: float, what: str) -> None:
    """Wait until a file of another process is there.

    Raises:
      DataError: it did not appear in time.
    """
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise DataError(f"{path} did not appear within {seconds:.0f} s: {what}")
        time.sleep(0.2)


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
    free = ("steps", "test_users", "test_stream")

    def plain(settings: Any) -> dict[str, Any]:
        return {k: v for k, v in disk.plain(settings).items() if k not in free}

    old = [plain(run["settings"]) for run in there["runs"]]
    new = [plain(dataclasses.asdict(run.settings)) for run in runs]
    if len(old) != len(new):
        raise DataError(f"{directory} holds a sweep of {len(old)} runs; asked for are {len(new)}")
    for number, (before, now) in enumerate(zip(old, new, strict=True)):
        wrong = disk.differences(before, now)
        if wrong:
            raise DataError(f"{directory} holds another sweep; run {number}: {'; '.join(wrong)}")
    return there["shards"]


def write_results(directory: Path, number: int, rows: list[dict[str, Any]]) -> None:
    """A shard's rows of results, the sign that it is finished."""
    disk.write_json(shard(directory, number) / _RESULTS, rows)


def results(directory: Path, number: int) -> Path:
    """Where a shard's results lie once it is finished."""
    return shard(directory, number) / _RESULTS


def collect(directory: Path) -> list[dict[str, Any]]:
    """Make the tables from the finished shards: one row a run.

    Raises:
      DataError: a shard is not finished.
    """
    found, metrics = [], []
    for number in range(len(read(directory)["shards"])):
        try:
            found += json.loads(results(directory, number).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{directory}: shard {number} is not finished ({error}); --resume continues it") from error
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
