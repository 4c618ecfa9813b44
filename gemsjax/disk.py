"""Files that are whole or not there, and configurations that can be compared. For checkpoint, tracking and datasets."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TextIO

from gemsjax.errors import DataError

PathLike = str | os.PathLike[str]


def write(path: PathLike, content: bytes) -> None:
    """Whatever happens meanwhile, `path` holds what it held, or all of `content`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Whether a `write` that was killed has left this."""
    return path.name.startswith(".") and path.suffix == ".tmp"


def write_json(path: PathLike, value: Any) -> None:
    """`write` of `plain(value)`, indented."""
    write(path, (json.dumps(plain(value), indent=2, allow_nan=False) + "\n").encode())


def lock(path: PathLike, refusal: str | None = None) -> TextIO:
    """Hold `path` until the stream is closed. The system lets go when a process dies, so no lock is ever stale.

    Args:
      path: of a small file, which stays.
      refusal: what to say if another process holds it; None waits for it.

    Raises:
      DataError: another process holds it, and there is a refusal.
    """
    path = Path(path)
    stream = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - held open on purpose
    try:
        import fcntl

        fcntl.flock(stream, fcntl.LOCK_EX | (fcntl.LOCK_NB if refusal else 0))
    except BlockingIOError as error:
        stream.seek(0)
        holder = stream.read().strip()
        stream.close()
        raise DataError(f"{refusal} in {path.parent} ({holder})") from error
    except (ImportError, OSError):
        pass  # this system or disk has no such locks: only the refusal of existing directories keeps processes apart
    stream.truncate(0)
    stream.write(f"process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    stream.flush()
    return stream


def flush_directory(path: PathLike) -> None:
    """Put the names in a directory on the disk (where directories can be opened)."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: arrays as lists, dataclasses as dicts, paths as text, NaN and infinities as null."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(inner) for inner in value]
    if hasattr(value, "tolist"):  # arrays and scalars of NumPy and jax
        return plain(value.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def canonical(value: Any) -> str:
    """JSON text that equal configurations share: sorted keys, no spaces.

    Raises:
      DataError: the value holds something that JSON cannot (NaN included).
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"the configuration cannot be written as JSON: {error}") from error


def digest(value: Any) -> str:
    """SHA-256 of `canonical(value)`, in hexadecimal."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Settings in which a configuration on disk differs from the one asked for: dotted name and both values of each."""
    old, new = dict(_flat(there)), dict(_flat(here))
    return [
        f"{name} is {old.get(name, 'absent')} there and {new.get(name, 'absent')} here"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and values as JSON text, so that `true` and 1 or a missing key and null stay apart; 1 is 1.0."""
    if isinstance(value, Mapping) and (value or not key):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else name)
    else:
        value = int(value) if isinstance(value, float) and value.is_integer() else value
        yield key, json.dumps(value, sort_keys=True)
