"""Generating logged data: users of the logging policy, chunk by chunk, so that it can stop and go on anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gemsjax.datasets import files
from gemsjax.datasets.files import PathLike, Schema
from gemsjax.datasets.logging_policy import make_player, stored_types
from gemsjax.errors import DataError, require, require_count


class LoggedData(NamedTuple):
    """A complete data set on disk.

    Attributes:
      directory: where it is.
      schema: contents of its `schema.json`.
      generated: users that this call of `generate` played; the others were there already.
    """

    directory: Path
    schema: Schema
    generated: int


def generate(
    env: Any,
    params: Any,
    directory: PathLike,
    *,
    users: int = 100_000,
    epsilon: float = 0.5,
    seed: int = 2754851,
    chunk_users: int = 2048,
    on_progress: Callable[[int], object] = lambda done: None,
    config_extra: Mapping[str, Any] | None = None,
) -> LoggedData:
    """Write users of the epsilon-greedy oracle to `directory`, or continue there, or find it complete.

    A complete data set is verified and left alone; damaged chunks of an unfinished one are made again. Killing this at
    any time leaves a directory that the same call continues.

    Args:
      env, params: the environment; it must be able to fill in the oracle's items (`env.resolve`).
      directory: new, empty, or holding the same configuration.
      users: U.
      epsilon: probability that a rank shows a random item instead of the oracle's.
      seed: 0 .. 2**32 - 1. User u is a function of (seed, u): more users or other chunks do not change it.
      chunk_users: users a file, which are played at once, 128 or more on each of `jax.local_devices()`.
      on_progress: called with the number of finished users, first with those that are there already.
      config_extra: JSON-like settings to store and compare besides (the name of the catalogue's file, say).

    Raises:
      SettingError: a setting out of range.
      DataError: the directory holds something else or another configuration (every difference is named), a complete
        data set is damaged, or the disk cannot be written.
    """
    require_count("users", users, 1, 2**31)
    require_count("seed", seed, 0, 2**32 - 1)
    require_count("chunk_users", chunk_users, 1, 2**20)
    number = isinstance(epsilon, int | float) and not isinstance(epsilon, bool)
    require(number and 0.0 <= epsilon <= 1.0, "epsilon", epsilon, "a number from 0 to 1")
    directory = Path(directory)
    users, chunk_users, seed = int(users), int(chunk_users), int(seed)  # JSON knows no NumPy
    counts = {"users": users, "users_per_chunk": chunk_users, "seed": seed, "epsilon": float(epsilon)}
    config = {"policy": "epsilon_greedy_oracle", **counts, **_describe(env, params), **(config_extra or {})}
    config = json.loads(json.dumps(config))  # as it will be once it has been through a file
    try:
        complete = files.find(directory, config)
        if complete is not None:
            on_progress(users)
            return LoggedData(directory, complete, 0)
        draft = files.begin(directory, config, lambda: _draft(env, -(-users // chunk_users)))
        generated = _play_missing(directory, draft, env, params, on_progress)
        return LoggedData(directory, files.finish(directory, draft), generated)
    except OSError as error:
        raise DataError(f"{directory} cannot be used: {error} (once that is mended, the same call goes on)") from error


def _describe(env: Any, params: Any) -> dict[str, Any]:
    """What identifies an environment: its sizes, its numbers to read, and digests of every bit of its parameters."""
    leaves = {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
              for path, leaf in jax.tree_util.tree_leaves_with_path(params)}  # fmt: skip
    digests = {
        name: files.digest(f"{leaf.dtype} {leaf.shape} ".encode() + leaf.tobytes()) for name, leaf in leaves.items()
    }
    sizes = {name: getattr(env, name) for name in ("name", "num_items", "slate_size", "horizon")}
    plain = {
        name: value for name, value in getattr(env, "__dict__", {}).items() if isinstance(value, str | int | float)
    }
    # What could not be set once goes without saying, so that data sets of then are still found.
    sizes |= {name: value for name, value in plain.items() if _BEFORE.get(name) != value}
    return {
        "environment": sizes,
        "constants": {name: leaf.item() for name, leaf in leaves.items() if leaf.ndim == 0},
        "item_embeddings_sha256": digests.get("item_embeddings"),
        "env_params_sha256": files.digest(json.dumps(digests, sort_keys=True).encode()),
    }


_BEFORE = {"memory": 10, "user_norm": "topics"}


def _draft(env: Any, chunks: int) -> Schema:
    columns = {name: {"dtype": dtype, "shape": list(shape)} for name, (dtype, shape) in stored_types(env).items()}
    made_with = {"gemsjax": _own_version(), "jax": jax.__version__, "backend": jax.default_backend()}
    return {"made_with": made_with, "columns": columns, "chunks": [None] * chunks}


def _own_version() -> str:
    try:
        return metadata.version("gemsjax")
    except metadata.PackageNotFoundError:
        return "not installed"


def _play_missing(directory: Path, draft: Schema, env: Any, params: Any, report: Callable[[int], object]) -> int:
    """Play and store the chunks without an entry; the next one is computed while one is written."""
    config, chunks = draft["config"], draft["chunks"]
    size = config["users_per_chunk"]
    sizes = [min(size, config["users"] - number * size) for number in range(len(chunks))]
    missing = [number for number, entry in enumerate(chunks) if entry is None]
    done = config["users"] - sum(sizes[number] for number in missing)
    report(done)
    play = make_player(env, config["epsilon"], config["seed"], min(size, config["users"]))
    upcoming = play(missing[0] * size, params) if missing else {}
    for number, following in zip(missing, [*missing[1:], None], strict=True):
        playing, upcoming = upcoming, {} if following is None else play(following * size, params)
        columns = {name: np.asarray(column)[: sizes[number]] for name, column in playing.items()}
        files.add_chunk(directory, draft, number, columns)
        done += sizes[number]
        report(done)
    return sum(sizes[number] for number in missing)


def summary(data: LoggedData) -> dict[str, Any]:
    """What to tell of a data set: users, mean return with its standard error, bytes, checksum, path."""
    chunks, users = data.schema["chunks"], data.schema["config"]["users"]
    mean = sum(entry["clicks"] for entry in chunks) / users
    variance = max(sum(entry["squared_returns"] for entry in chunks) / users - mean**2, 0.0)
    return {
        "users": users,
        "mean_return": mean,
        "standard_error": (variance / max(users - 1, 1)) ** 0.5,
        "bytes": sum(entry["bytes"] for entry in chunks),
        "checksum": data.schema["checksum"],
        "path": str(data.directory),
    }
