"""The files of a data set: chunks and `schema.json`, written so that what looks complete is, and checked when read.

The only module of this package that touches the disk; knows nothing of environments. Called by its neighbours.
While a data set is being made it has a `partial.json` (the schema so far, null for a missing chunk) instead.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemsjax.disk import PathLike, differences, flush_directory, is_temporary, write, write_json
from gemsjax.errors import DataError

FORMAT, FORMAT_VERSION = "gemsjax-logged-slates", 1

Schema = dict[str, Any]
"""format, format_version, made_with, config, columns (type and one user's shape of each), chunks, checksum."""
Entry = dict[str, Any]
"""A chunk in the schema: file, users, bytes, sha256, clicks (of all users), squared_returns (sum over users)."""
Columns = Mapping[str, np.ndarray]

_SCHEMA, _PARTIAL = "schema.json", "partial.json"


# -- reading -----------------------------------------------------------------------------------------------------------


def read_schema(directory: PathLike) -> Schema:
    """`schema.json` of a complete data set.

    Raises:
      DataError: there is none, or it is of another format, of a newer version, or inconsistent.
    """
    path = Path(directory) / _SCHEMA
    if not path.exists() and path.with_name(_PARTIAL).exists():
        raise DataError(f"{directory} is unfinished: generating it again with the same settings continues it")
    if not path.exists():
        raise DataError(f"{directory} is not a data set: it has no {_SCHEMA}")
    schema = _read_json(path)
    if None in schema["chunks"] or schema.get("checksum") != _checksum(schema["chunks"]):
        raise DataError(f"{path} was altered: its checksum is not that of its chunks")
    return schema


def read_chunks(directory: Path, schema: Schema, users: int, verify: bool = True) -> Iterator[dict[str, np.ndarray]]:
    """The columns of the chunks that hold the first `users` users, one chunk at a time.

    Raises:
      DataError: naming the file that is missing, truncated, altered or not as the schema says.
    """
    items = schema["config"]["environment"]["num_items"]
    for entry in schema["chunks"][: -(-users // schema["config"]["users_per_chunk"])]:
        path, content = directory / entry["file"], _read_file(directory, entry, verify)
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as archive:
                chunk = {name: archive[name] for name in schema["columns"]}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        for name, column in schema["columns"].items():
            found = f"{chunk[name].dtype} {list(chunk[name].shape)}"
            expected = f"{column['dtype']} {[entry['users'], *column['shape']]}"
            if found != expected:
                raise DataError(f"{path}: its {name} are {found}, {_SCHEMA} says {expected}")
        if verify and not 0 <= chunk["slates"].min() <= chunk["slates"].max() < items:
            raise DataError(f"{path}: holds item numbers outside the catalogue of {items}")
        yield chunk


def _read_file(directory: Path, entry: Entry, verify: bool = True) -> bytes:
    path = directory / entry["file"]
    if not path.is_file():
        raise DataError(f"{path} is missing")
    content = path.read_bytes()
    if len(content) != entry["bytes"]:
        raise DataError(f"{path} is truncated or altered: it has {len(content)} bytes instead of {entry['bytes']}")
    if verify and digest(content) != entry["sha256"]:
        raise DataError(f"{path} was altered: its SHA-256 is not the one in {_SCHEMA}")
    return content


def _read_json(path: Path) -> Schema:
    """A schema or draft that this version can use."""
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
        found, version = schema["format"], schema["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read as a data set's: {error!r}") from error
    if found != FORMAT:
        raise DataError(f"{path} is of the format {found!r}, not {FORMAT!r}")
    if version != FORMAT_VERSION:
        advice = "a newer gemsjax reads it" if version > FORMAT_VERSION else "generate the data set again"
        raise DataError(f"{path} is of format version {version}, this gemsjax reads {FORMAT_VERSION}: {advice}")
    if not _is_complete(schema):
        raise DataError(f"{path} was altered: it is not a schema")
    return schema


def _is_complete(schema: Schema) -> bool:
    """Whether everything that is read later is there, and files are plain names (not paths to somewhere else)."""
    try:
        sizes = [schema["config"][name] for name in ("users", "users_per_chunk")]
        sizes += [schema["config"]["environment"]["num_items"], len(schema["columns"]["slates"]["shape"])]
        entries = [entry for entry in schema["chunks"] if entry is not None]
        sizes += [entry[name] for entry in entries for name in ("users", "bytes")]
        names = [entry["file"] for entry in entries] + [entry["sha256"] for entry in entries]
        return all(isinstance(size, int) for size in sizes) and all(os.path.basename(name) == name for name in names)
    except (KeyError, TypeError):
        return False


def digest(content: bytes) -> str:
    """SHA-256, hex."""
    return hashlib.sha256(content).hexdigest()


def _checksum(chunks: list[Entry]) -> str:
    return digest(" ".join(entry["sha256"] for entry in chunks).encode())


# -- writing -----------------------------------------------------------------------------------------------------------


def find(directory: Path, config: Mapping[str, Any]) -> Schema | None:
    """The schema of a complete data set with this configuration, all of its files verified; None without a schema.

    Raises:
      DataError: another configuration, or damage.
    """
    if not (directory / _SCHEMA).exists():
        return None
    schema = read_schema(directory)
    _require_same(directory, schema["config"], config)
    for entry in schema["chunks"]:
        _read_file(directory, entry)
    return schema


def begin(directory: Path, config: Mapping[str, Any], describe: Callable[[], Schema]) -> Schema:
    """The draft of a data set: begun now, or that of an earlier call without the chunks that are damaged.

    Args:
      directory: made if missing.
      config: what an earlier call must have had, too.
      describe: gives `made_with`, `columns` and empty `chunks`, if the draft is begun now.

    Raises:
      DataError: another configuration, or the directory holds something else.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / _PARTIAL).exists():
        draft = _read_json(directory / _PARTIAL)
        _require_same(directory, draft["config"], config)
        return draft | {"chunks": [e if e and _is_good(directory, e) else None for e in draft["chunks"]]}
    if any(not is_temporary(path) for path in directory.iterdir()):
        raise DataError(f"{directory} is not empty and holds no data set: choose another directory")
    draft = {"format": FORMAT, "format_version": FORMAT_VERSION, "config": config, **describe()}
    write_json(directory / _PARTIAL, draft)
    return draft


def add_chunk(directory: Path, draft: Schema, number: int, columns: Columns) -> None:
    """Write chunk `number` and note it in the draft, on disk too."""
    content, clicks = _npz(columns), np.bitwise_count(columns["clicks"]).sum(axis=(1, 2), dtype=np.int64)
    entry: Entry = {
        "file": f"chunk_{number:05d}.npz",
        "users": len(clicks),
        "bytes": len(content),
        "sha256": digest(content),
        "clicks": int(clicks.sum()),
        "squared_returns": int((clicks**2).sum()),
    }
    write(directory / entry["file"], content)
    draft["chunks"][number] = entry
    write_json(directory / _PARTIAL, draft)


def finish(directory: Path, draft: Schema) -> Schema:
    """Make a data set of a draft that has all its chunks: from here on it is complete."""
    schema = draft | {"checksum": _checksum(draft["chunks"])}
    flush_directory(directory)  # the chunks' names are on the disk before that of the schema
    write_json(directory / _SCHEMA, schema)
    for path in directory.iterdir():
        if path.name == _PARTIAL or is_temporary(path):
            path.unlink(missing_ok=True)
    flush_directory(directory)
    return schema


def _is_good(directory: Path, entry: Entry) -> bool:
    try:
        return bool(_read_file(directory, entry))
    except DataError:
        return False


def _npz(columns: Columns) -> bytes:
    """As `np.savez` writes them, but without the time: equal arrays are equal bytes."""
    archive_bytes = io.BytesIO()
    with zipfile.ZipFile(archive_bytes, "w") as archive:
        for name, column in columns.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(column), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), member.getvalue())
    return archive_bytes.getvalue()


def _require_same(directory: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    wrong = differences(there, here)
    if wrong:
        raise DataError(f"{directory} holds a data set of another configuration: {'; '.join(wrong)}")
