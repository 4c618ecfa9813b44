"""Logged data in memory: reading it, splitting it, its returns, and its stored form as observations."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from gemsjax.datasets import files
from gemsjax.datasets.files import PathLike, Schema
from gemsjax.errors import require, require_count
from gemsjax.types import Array, Observation


@dataclasses.dataclass(frozen=True)
class LoggedSlates:
    """Logged users in host memory, in storage types; `unpack` turns (parts of) them into observations.

    Attributes:
      slates: [U, H, K] int16 (int32 beyond 32,768 items), the items that were shown; the reset slate is not among them.
      clicks: [U, H] uint16 for K <= 16 (uint32 for K <= 32), bit r the click on rank r; [U, H, K] bool above that.
      schema: contents of `schema.json`.
    """

    slates: np.ndarray
    clicks: np.ndarray
    schema: Schema

    @property
    def users(self) -> int:
        """U, users in memory."""
        return len(self.slates)

    @property
    def checksum(self) -> str:
        """SHA-256 (hex) of the whole data set on disk, however much of it is in memory."""
        return self.schema["checksum"]


class Split(NamedTuple):
    """The two parts of logged data: the first users, and all others."""

    validation: LoggedSlates
    training: LoggedSlates


def load(directory: PathLike, users: int | None = None, verify: bool = True) -> LoggedSlates:
    """Read a data set, or only its first `users` users.

    Args:
      directory: as given to `generate`.
      users: how many; None for all.
      verify: compare the SHA-256 of every chunk that is read, and check the item numbers.

    Raises:
      SettingError: more users than there are.
      DataError: no complete data set, an unknown format, a chunk that is missing, truncated or altered.
    """
    directory = Path(directory)
    schema = files.read_schema(directory)
    wanted = schema["config"]["users"] if users is None else users
    require_count("users", wanted, 1, schema["config"]["users"])
    data = {name: np.empty((wanted, *column["shape"]), column["dtype"]) for name, column in schema["columns"].items()}
    first = 0
    for chunk in files.read_chunks(directory, schema, wanted, verify):
        for name, column in data.items():
            column[first : first + len(chunk[name])] = chunk[name][: wanted - first]
        first += len(chunk["slates"])
    return LoggedSlates(data["slates"], _click_words(data["clicks"], data["slates"].shape[-1]), schema)


def split(data: LoggedSlates, validation_share: float = 0.1) -> Split:
    """The first users for validation (published: a tenth), all others for training. Nothing is copied.

    Raises:
      SettingError: a part would be empty.
    """
    first = round(data.users * validation_share)
    accepted = f"a share that leaves both parts some of the {data.users} users"
    require(0 < first < data.users, "validation_share", validation_share, accepted)
    parts = (slice(None, first), slice(first, None))
    return Split(*(dataclasses.replace(data, slates=data.slates[part], clicks=data.clicks[part]) for part in parts))


def returns(data: LoggedSlates) -> np.ndarray:
    """Clicks of each user over its episode: [U] int64."""
    counts = data.clicks if data.clicks.dtype == bool else np.bitwise_count(data.clicks)
    return counts.reshape(data.users, -1).sum(axis=1, dtype=np.int64)


def mean_return(data: LoggedSlates) -> float:
    """Mean clicks of a user over an episode."""
    return float(returns(data).mean())


def unpack(slates: Array, clicks: Array) -> Observation:
    """Stored slates [..., K] and clicks ([...] words or [..., K] bool) as an observation. For compiled programs too."""
    if clicks.ndim < slates.ndim:
        clicks = (clicks[..., None] >> jnp.arange(slates.shape[-1], dtype=clicks.dtype)) & 1
    return Observation(jnp.asarray(slates, jnp.int32), jnp.asarray(clicks, bool))


def _click_words(packed: np.ndarray, slate_size: int) -> np.ndarray:
    """Bytes of click bits as one word a slate, bit r the click on rank r.

    [..., ceil(K/8)] uint8 -> [...] uint16 for K <= 16, [...] uint32 for K <= 32, [..., K] bool above that.
    """
    if slate_size > 32:
        return np.unpackbits(packed, axis=-1, count=slate_size, bitorder="little").astype(bool)
    width = 2 if slate_size <= 16 else 4
    words = np.zeros((*packed.shape[:-1], width), np.uint8)
    words[..., : packed.shape[-1]] = packed
    return words.view(f"<u{width}")[..., 0].astype(f"u{width}", copy=False)
