"""What a run of PPO or A2C leaves on the disk: lines and tables of its log, checkpoints. Called by the driver.

The only module of this package that touches the disk. A checkpoint holds networks, optimiser, environments, the item
table and the key, with the configuration in its manifest (`gemsjax.checkpoint`): it needs nothing else to go on.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gemsjax import checkpoint, disk
from gemsjax.errors import DataError, require
from gemsjax.on_policy.config import Config, from_identity
from gemsjax.on_policy.training import Learning, LearnState, Run, make_learning


class Logger:
    """Lines for people, on the terminal and in `{tag}.log`, and the same as a table, `{tag}.csv`.

    A line is `[Step n] key=0.0000 | ...`; the table has the header `step,<keys>` once and a row a line. What is None
    or not finite is an empty cell, and left out of the line.
    """

    def __init__(self, log_dir: disk.PathLike, tag: str, *, after: int = 0, quiet: bool = False) -> None:
        """Continue the files of `tag` in `log_dir` (made if missing), or begin them.

        Args:
          log_dir: directory.
          tag: of the files.
          after: rows beyond this step are dropped: a run that resumes there writes them again. 0 begins anew.
          quiet: nothing on the terminal.

        Raises:
          DataError: a table that is none of ours.
        """
        directory = Path(log_dir)
        directory.mkdir(parents=True, exist_ok=True)
        self._lines, self._table, self._quiet = directory / f"{tag}.log", directory / f"{tag}.csv", quiet
        self._columns: list[str] = []
        table = self._read(after) if after else []
        disk.write(self._table, "".join(_row(row) for row in table).encode())
        lines = self._lines.read_text(encoding="utf-8").splitlines(keepends=True) if after and table else []
        disk.write(self._lines, "".join(lines[: max(len(table) - 1, 0)]).encode())

    def log(self, step: int, values: Mapping[str, Any]) -> str:
        """Write one row, and return its line.

        Raises:
          SettingError: other keys than those of the first row.
        """
        plain = {name: disk.plain(value) for name, value in values.items()}
        if not self._columns:
            self._columns = list(plain)
            self._append(self._table, _row(["step", *self._columns]))
        same = list(plain) == self._columns
        require(same, "keys of a row", ", ".join(plain), f"those of the first: {', '.join(self._columns)}")
        shown = " | ".join(f"{name}={value:.4f}" for name, value in plain.items() if value is not None)
        line = f"[Step {step}] {shown}"
        self._append(self._lines, line + "\n")
        self._append(self._table, _row([step, *("" if value is None else value for value in plain.values())]))
        if not self._quiet:
            print(line, flush=True)
        return line

    @staticmethod
    def _append(path: Path, text: str) -> None:
        with open(path, "a", encoding="utf-8", newline="") as stream:
            stream.write(text)

    def _read(self, after: int) -> list[list[str]]:
        """The header and the rows up to step `after`."""
        rows = _rows(self._table)
        if not rows:
            return []
        header, *rows = rows
        if header[:1] != ["step"]:
            raise DataError(f"{self._table} is no table of a run: it does not begin with 'step'")
        self._columns = header[1:]
        kept = []
        for row in rows:
            if len(row) != len(header) or not row[0].isdecimal() or int(row[0]) > after:
                break
            kept.append(row)
        return [header, *kept]


class Loaded(NamedTuple):
    """A run as it was saved.

    Attributes:
      config: without how long, how often and where to.
      learning, run, state: see `training`.
      step: turns played, over all environments.
    """

    config: Config
    learning: Learning
    run: Run
    state: LearnState
    step: int


def place(config: Config) -> Path:
    """Where a configuration's checkpoints are: `{checkpoint_dir}/{algorithm}/`."""
    return Path(config.train.checkpoint_dir) / config.algorithm


def save(config: Config, run: Run, state: LearnState, step: int) -> Path:
    """Write a checkpoint of turn `step`; returns its path. Raises what `checkpoint.save` does."""
    return checkpoint.save(place(config), (run, state), step=step, config=config.identity())


def resume(config: Config, learning: Learning) -> tuple[Run, LearnState, int] | None:
    """The newest undamaged checkpoint of a configuration, None if there has been none.

    Raises:
      DataError: only damaged ones, or one of another configuration (every differing setting is named).
    """
    if not any(place(config).glob("step_*")):
        return None
    restored = checkpoint.restore(place(config), _like(learning), config=disk.plain(config.identity()))
    return *restored.tree, restored.step


def load(directory: disk.PathLike) -> Loaded:
    """The newest undamaged checkpoint of a directory such as `checkpoints/ppo`, whatever its configuration.

    Raises:
      DataError: there is none, or it is not one of PPO or A2C.
    """
    _, manifest = checkpoint.newest_manifest(directory)
    config = from_identity(manifest["config"])
    learning = make_learning(config)
    restored = checkpoint.restore(directory, _like(learning), step=manifest["step"])
    run, state = restored.tree
    return Loaded(config, learning, run, state, restored.step)


def require_no_logs(config: Config) -> None:
    """Refuse to begin a run where another one has left its log, which would be lost.

    Raises:
      SettingError: naming the table.
    """
    for tag in tags(config):
        table = Path(config.train.log_dir) / f"{tag}.csv"
        accepted = "another directory; --resume writes over what is there beyond the newest checkpoint"
        require(not _rows(table), "log_dir", str(table), accepted)


def tags(config: Config) -> tuple[str, str]:
    """Of the run's two logs: of training and of its evaluations."""
    return config.algorithm, f"{config.algorithm}_eval"


def _rows(table: Path) -> list[list[str]]:
    """The header and rows of a table, none if it is not there."""
    if not table.is_file():
        return []
    with open(table, encoding="utf-8", newline="") as stream:
        return list(csv.reader(stream))


def _like(learning: Learning) -> tuple[Any, Any]:
    run = jax.eval_shape(learning.start, jax.random.key(0))
    return run, jax.eval_shape(learning.init, run)


def _row(values: list[Any]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerow(
        "" if isinstance(value, float) and not math.isfinite(value) else value for value in values
    )
    return stream.getvalue()
