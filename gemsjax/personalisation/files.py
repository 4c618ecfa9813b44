"""A store's table on the disk: a directory of `.npy` chunks and a `store.json` that is written last.

Chunks are named after their content, so saving again leaves the old table whole until the new `store.json` takes its
place, writes only chunks that changed, and removes what is no longer named. The only module of this package that
touches the disk.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemsjax.disk import PathLike, digest, flush_directory, is_temporary, lock, write, write_json
from gemsjax.errors import DataError, SettingError, require, require_count
from gemsjax.personalisation.store import Store, Table, make_store

FORMAT, FORMAT_VERSION = "gemsjax-user-states", 1
_INDEX, _LOCK = "store.json", ".lock"


def save(store: Store, table: Table, directory: PathLike, users_per_chunk: int = 2**17) -> Path:
    """Write a table; killed at any time, the directory holds the old one or the new one.

    Args:
      store: whose table it is.
      table: as `store.update` returned it.
      directory: made if missing; new, empty, or holding an earlier table.
      users_per_chunk: users a file.

    Returns:
      The directory.

    Raises:
      SettingError: a number of users a file below 1; a table that is not one of this store (another number of users,
        vectors of another length).
      DataError: the directory holds something else, another process is saving there, or the disk cannot be written.
    """
    require_count("users_per_chunk", users_per_chunk, 1)
    expected, found = jax.eval_shape(store.init).shape, np.shape(table)
    users = f"{store.users} users with vectors of {store.dim} numbers"
    require(found == expected, "table", found, f"of the shape {expected}, a table of this store ({users})")
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        foreign = [path.name for path in directory.iterdir() if not _is_ours(path)]
        if foreign:
            raise DataError(f"{directory} is not empty and holds no user states (but {foreign[0]}): choose another one")
        with lock(directory / _LOCK, "another process is saving user states"):
            _write(store, table, directory, users_per_chunk)
    except OSError as error:
        raise DataError(f"{directory} cannot be written: {error}") from error
    return directory


def load(directory: PathLike) -> tuple[Store, Table]:
    """The store of a directory's sizes on the local devices (however many wrote it), and its table.

    Raises:
      DataError: naming the file that is missing, truncated, altered, of another format or of a newer version.
    """
    directory = Path(directory)
    index = _read_index(directory / _INDEX)
    try:
        store = make_store(index["users"], index["dim"])
    except SettingError as error:
        raise DataError(f"{directory / _INDEX} was altered: {error}") from error
    numbers = np.empty((store.users, 2 * store.dim + 1), np.float32)
    for number, entry in enumerate(index["chunks"]):
        part = numbers[number * index["users_per_chunk"] :][: index["users_per_chunk"]]
        part[:] = _read_chunk(directory / entry["file"], entry, part.shape)
    return store, store.place(numbers)


def _write(store: Store, table: Table, directory: Path, users_per_chunk: int) -> None:
    numbers, chunks = np.asarray(jax.device_get(table))[: store.users], []
    for first in range(0, store.users, users_per_chunk):
        stream = io.BytesIO()
        np.lib.format.write_array(stream, numbers[first : first + users_per_chunk].astype("<f4"), allow_pickle=False)
        content = stream.getvalue()
        sha256 = hashlib.sha256(content).hexdigest()
        path = directory / f"states_{first // users_per_chunk:05d}_{sha256[:16]}.npy"
        if not (path.is_file() and _sha256(path) == sha256):
            write(path, content)
        chunks.append({"file": path.name, "bytes": len(content), "sha256": sha256})
    flush_directory(directory)  # the chunks' names are on the disk before that of the index
    index = {"format": FORMAT, "format_version": FORMAT_VERSION, "users": store.users, "dim": store.dim}
    index |= {"users_per_chunk": users_per_chunk, "chunks": chunks}
    write_json(directory / _INDEX, index | {"checksum": digest(index)})
    flush_directory(directory)
    wanted = {entry["file"] for entry in chunks} | {_INDEX, _LOCK}
    for path in directory.iterdir():
        if path.name not in wanted:
            path.unlink(missing_ok=True)


def _is_ours(path: Path) -> bool:
    chunk = path.name.startswith("states_") and path.suffix == ".npy"
    return chunk or path.name in (_INDEX, _LOCK) or is_temporary(path)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_index(path: Path) -> dict[str, Any]:
    """`store.json`, everything in it verified to be as it was written."""
    if not path.is_file():
        raise DataError(f"{path.parent} holds no user states: it has no {_INDEX}")
    try:
        index = json.loads(path.read_bytes())
        found, version, checksum = index["format"], index["format_version"], index.pop("checksum")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: it was truncated or altered ({error!r})") from error
    if found != FORMAT:
        raise DataError(f"{path} is of the format {found!r}, not {FORMAT!r}")
    if version != FORMAT_VERSION:
        raise DataError(f"{path} is of format version {version!r}, this gemsjax reads {FORMAT_VERSION}")
    if checksum != digest(index):
        raise DataError(f"{path} was altered: its checksum is not that of its contents")
    try:
        chunks = -(-index["users"] // index["users_per_chunk"])
        names = [os.path.basename(entry["file"]) == entry["file"] for entry in index["chunks"]]
        whole = len(names) == chunks and all(names)
        whole &= all(isinstance(index[name], int) for name in ("users", "dim", "users_per_chunk"))
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise DataError(f"{path} is not an index of user states: {error!r}") from error
    if not whole:
        raise DataError(f"{path} is not an index of user states: its chunks do not make up its users")
    return index


def _read_chunk(path: Path, entry: dict[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} is missing or cannot be read: {error}") from error
    if len(content) != entry["bytes"]:
        raise DataError(f"{path} is truncated or altered: it has {len(content)} bytes instead of {entry['bytes']}")
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise DataError(f"{path} was altered: its SHA-256 is not the one in {_INDEX}")
    try:
        chunk = np.load(io.BytesIO(content), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if chunk.shape != shape or chunk.dtype != np.float32:
        raise DataError(f"{path} holds {chunk.dtype} {list(chunk.shape)}, {_INDEX} says float32 {list(shape)}")
    return chunk
