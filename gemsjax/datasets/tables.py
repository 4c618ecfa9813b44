"""Interaction tables of one's own: who was shown which item when, and what came of it. CSV, or Parquet with pyarrow.

    table = read_table("events.csv", TableSchema(user="visitor", reward="stars"))
    episodes = datasets.episodes.from_table(table, horizon=20)

Users and items are renumbered from 0 in the order of their ids; `Table.item_ids` leads back. On the host; touches the
disk to read only. `datasets.episodes` and `datasets.frames` make of a table what agents learn from.
"""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from gemsjax.disk import PathLike
from gemsjax.errors import DataError, require, require_count

CHUNK_ROWS = 500_000
"""Rows of a CSV file that are text in memory at a time."""
MOST_SLOTS = 10_000
"""Of a slate: every turn of an episode has as many as the longest one."""


@dataclasses.dataclass(frozen=True)
class TableSchema:
    """Names of the columns; None for one that the table does not have.

    Attributes:
      user, item: ids, whole numbers or text.
      time: a number, or a date as ISO 8601 writes it (in UTC, unless it ends in an offset such as +02:00). None: rows
        are in order of time.
      reward: a number that float32 holds.
      slate: id of what was shown together: rows of one user with equal ids are one turn. None: each row is a turn.
      position: rank in the slate, from 0. None: rows of a slate are in order of rank.
      propensity: probability in (0, 1] with which the logging policy shows the item.
    """

    user: str = "user"
    item: str = "item"
    time: str | None = "time"
    reward: str = "reward"
    slate: str | None = None
    position: str | None = None
    propensity: str | None = None


MOVIELENS = TableSchema(user="userId", item="movieId", time="timestamp", reward="rating")
"""`ratings.csv` of MovieLens-20M and later; read it with `ratings=True`."""


@dataclasses.dataclass(frozen=True)
class Table:
    """N events, sorted by user, then time (of the slate), then rank; equal ones as in the file.

    Attributes:
      users, items: [N] int32 numbers from 0.
      rewards: [N] float32.
      turns: [N] int64, equal for the events of one slate, ascending; no two users share one.
      positions: [N] int32 rank in the slate, 0 without slates.
      propensities: [N] float32, or None.
      user_ids, item_ids: what the numbers stand for, ascending.
    """

    users: np.ndarray
    items: np.ndarray
    rewards: np.ndarray
    turns: np.ndarray
    positions: np.ndarray
    propensities: np.ndarray | None
    user_ids: np.ndarray
    item_ids: np.ndarray

    @property
    def events(self) -> int:
        return len(self.users)


def read_table(
    path: PathLike,
    schema: TableSchema = TableSchema(),
    *,
    ratings: bool = False,
    delimiter: str = ",",
    header: Sequence[str] | None = None,
) -> Table:
    """Read `.parquet` (or `.pq`) or, whatever else it is called, delimited text.

    Args:
      path: of the file.
      schema: names of the columns.
      ratings: rewards are ratings of 0 to 5 stars, read as 2 (stars - 2.5).
      delimiter: of the text, one character.
      header: names of the columns of a text without a first line of names.

    Raises:
      DataError: naming file, row (from 1) and column of the first value that cannot be used; a missing file or column;
        Parquet without pyarrow.
      SettingError: a delimiter of several characters.
    """
    path = Path(path)
    require(len(delimiter) == 1, "delimiter", delimiter, "one character")
    wanted = {role: name for role, name in dataclasses.asdict(schema).items() if name is not None}
    if not path.is_file():
        raise DataError(f"{path} is missing")
    parquet = path.suffix.lower() in (".parquet", ".pq")
    columns = _parquet(path, wanted) if parquet else _text(path, wanted, delimiter, header)
    if not len(columns["user"]):
        raise DataError(f"{path} holds no events")
    if ratings:
        _refuse(path, schema.reward, columns["reward"], (columns["reward"] < 0) | (columns["reward"] > 5), "0 to 5")
        columns["reward"] = 2.0 * (columns["reward"] - 2.5)
    beyond = np.abs(columns["reward"]) > np.finfo(np.float32).max
    _refuse(path, schema.reward, columns["reward"], beyond, "a number that float32 holds")
    return _arranged(path, columns, wanted)


def keep_top_items(table: Table, count: int) -> Table:
    """Only events of the `count` most frequent items (ties: of the lowest number); users left with none are gone.

    Numbers, ids and events agree afterwards: an item's row in an embedding table is its number here.
    """
    require_count("count", count)
    frequency = np.bincount(table.items, minlength=len(table.item_ids))
    kept = np.sort(np.argsort(-frequency, kind="stable")[:count])
    return _select(table, np.isin(table.items, kept), kept)


def keep_active_users(table: Table, more_than: int) -> Table:
    """Only users with more than `more_than` events. Items keep their numbers."""
    events = np.bincount(table.users, minlength=len(table.user_ids))
    return _select(table, events[table.users] > more_than, None)


def drop_longest_users(table: Table, count: int = 2) -> Table:
    """Without the `count` users of the most events (ties: of the lowest number), as RecNN does to training users.

    Raises:
      SettingError: a count below 1, or one that leaves no user.
    """
    require_count("count", count, 1, len(table.user_ids) - 1)
    events = np.bincount(table.users, minlength=len(table.user_ids))
    return _select(table, ~np.isin(table.users, np.argsort(-events, kind="stable")[:count]), None)


def split_users(table: Table, test_share: float = 0.05, seed: int = 0) -> tuple[Table, Table]:
    """Training and test users, drawn at random, over the same items.

    Raises:
      SettingError: a part would be empty.
    """
    users = len(table.user_ids)
    test = round(users * test_share)
    require(0 < test < users, "test_share", test_share, f"a share that leaves both parts some of the {users} users")
    chosen = np.zeros(users, bool)
    chosen[np.random.default_rng(seed).permutation(users)[:test]] = True
    return _select(table, ~chosen[table.users], None), _select(table, chosen[table.users], None)


def _select(table: Table, rows: np.ndarray, items: np.ndarray | None) -> Table:
    """Some rows, users without any left out; `items` are the item numbers that stay, None for all."""
    users, renumbered = np.unique(table.users[rows], return_inverse=True)
    found = {name: column[rows] for name, column in vars(table).items() if isinstance(column, np.ndarray)
             and not name.endswith("_ids")}  # fmt: skip
    found["users"] = renumbered.astype(np.int32)
    if items is not None:
        found["items"] = np.searchsorted(items, found["items"]).astype(np.int32)
    ids = table.item_ids if items is None else table.item_ids[items]
    return dataclasses.replace(table, **found, user_ids=table.user_ids[users], item_ids=ids)


# -- reading -----------------------------------------------------------------------------------------------------------


def _text(path: Path, wanted: Mapping[str, str], delimiter: str, header: Sequence[str] | None) -> dict[str, np.ndarray]:
    """The wanted columns of a delimited text, by role, in chunks so that the text is never in memory as a whole."""
    parts: dict[str, list[np.ndarray]] = {role: [] for role in wanted}
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            lines = csv.reader(stream, delimiter=delimiter, strict=True)
            names = list(header) if header is not None else next(lines, [])
            places = _places(path, wanted, names)
            for first, rows in _chunks(path, lines, len(names)):
                for role, place in places.items():
                    values = np.array([row[place] for row in rows])
                    parts[role].append(_parsed(path, role, wanted[role], values, first))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as delimited text: {error}") from error
    return {role: _joined(chunks) for role, chunks in parts.items()}


def _chunks(path: Path, lines: Iterator[list[str]], width: int) -> Iterator[tuple[int, list[list[str]]]]:
    """Rows in chunks, each with the number of its first row."""
    rows: list[list[str]] = []
    first = 1
    for number, row in enumerate(lines, 1):
        if len(row) != width:
            raise DataError(f"{path}, row {number}: it has {len(row)} fields, the header has {width}")
        rows.append(row)
        if len(rows) == CHUNK_ROWS:
            yield first, rows
            rows, first = [], number + 1
    if rows:
        yield first, rows


def _places(path: Path, wanted: Mapping[str, str], names: Sequence[str]) -> dict[str, int]:
    for role, name in wanted.items():
        if list(names).count(name) > 1:
            raise DataError(f"{path} has several columns {name!r}: which one is {role}?")
        if name not in names:
            close = get_close_matches(name, names, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise DataError(f"{path} has no column {name!r} for {role}: it has {', '.join(map(repr, names))}{hint}")
    return {role: list(names).index(name) for role, name in wanted.items()}


def _parquet(path: Path, wanted: Mapping[str, str]) -> dict[str, np.ndarray]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow: pip install 'gemsjax[tables]', or save it as CSV") from error
    try:
        _places(path, wanted, parquet.read_schema(path).names)
        found = parquet.read_table(path, columns=list(dict.fromkeys(wanted.values())))
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error
    columns = {}
    for role, name in wanted.items():
        column = found.column(name)
        missing = np.asarray(column.is_null())
        if missing.any():
            raise DataError(f"{path}, row {int(missing.argmax()) + 1}, column {name!r}: it is empty")
        columns[role] = _parsed(path, role, name, np.asarray(column), 1)
    return columns


_ZONE = re.compile(r"(?P<date>.+[T ][^+-]+?) ?(?P<sign>[+-])(?P<hours>\d\d):?(?P<minutes>\d\d)?")
_IDS = ("user", "item", "slate")


def _parsed(path: Path, role: str, name: str, values: np.ndarray, first: int) -> np.ndarray:
    """A chunk of one column: ids as whole numbers or text, everything else as finite float64."""
    if role in _IDS:
        if values.dtype.kind in "iu":
            return values.astype(np.int64)
        text = values.astype(str)
        _refuse(path, name, text, text == "", "an id", first)
        try:
            whole = text.astype(np.int64)
        except (ValueError, OverflowError):
            return text
        return whole if (whole.astype(str) == text).all() else text  # 007 is not 7
    dates = role == "time" and _is_date(values)
    read = _dates if dates else _numbers
    try:
        numbers = read(values)
    except (ValueError, TypeError):
        bad = np.array([not _readable(read, values[row : row + 1]) for row in range(len(values))])
        _refuse(path, name, values, bad, "a date like those above" if dates else "a number", first)
        raise
    _refuse(path, name, values, ~np.isfinite(numbers), "a finite number", first)
    return numbers


def _is_date(values: np.ndarray) -> bool:
    return values.dtype.kind == "M" or (
        values.dtype.kind in "OU" and not _readable(_numbers, values[:1]) and _readable(_dates, values[:1])
    )


def _numbers(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float64)


def _dates(values: np.ndarray) -> np.ndarray:
    """Seconds since 1970 in UTC, which dates without a zone are taken for."""
    east: np.ndarray | float = 0.0
    if values.dtype.kind != "M":
        texts, offsets = zip(*map(_without_zone, values), strict=True)
        values, east = np.array(texts, "datetime64[ns]"), np.array(offsets)
    return np.where(np.isnat(values), np.nan, values.astype("datetime64[ns]").astype(np.int64) / 1e9 - east)


def _without_zone(value: object) -> tuple[str, float]:
    """A date as NumPy reads it, and how many seconds its zone is east of UTC (NumPy would warn, and drop support)."""
    text = str(value).removesuffix("Z")
    found = _ZONE.fullmatch(text)
    if found is None:
        return text, 0.0
    sign, hours, minutes = -1.0 if found["sign"] == "-" else 1.0, int(found["hours"]), int(found["minutes"] or 0)
    if hours > 23 or minutes > 59:
        raise ValueError(f"{value!r} has no zone that there is")
    return found["date"], sign * 60.0 * (60 * hours + minutes)


def _readable(read: Callable[[np.ndarray], np.ndarray], values: np.ndarray) -> bool:
    try:
        read(values)
    except (TypeError, ValueError):
        return False
    return True


def _joined(chunks: list[np.ndarray]) -> np.ndarray:
    if not chunks:
        return np.empty(0)
    kinds = {chunk.dtype.kind for chunk in chunks}
    return np.concatenate([chunk.astype(str) for chunk in chunks] if "U" in kinds else chunks)


def _refuse(path: Path, name: str, values: np.ndarray, bad: np.ndarray, accepted: str, first: int = 1) -> None:
    """Raise for the first bad value."""
    if bad.any():
        row = int(bad.argmax())
        value = values[row : row + 1].tolist()[0]
        raise DataError(f"{path}, row {first + row}, column {name!r}: {value!r} is not {accepted}")


def _arranged(path: Path, columns: Mapping[str, np.ndarray], wanted: Mapping[str, str]) -> Table:
    """Numbers for ids, events in order, turns; refuses ranks and propensities that make no sense."""
    events = len(columns["user"])
    user_ids, users = np.unique(columns["user"], return_inverse=True)
    item_ids, items = np.unique(columns["item"], return_inverse=True)
    times = columns.get("time", np.arange(events, dtype=np.float64))
    turns = np.arange(events)
    if "slate" in columns:
        _, slates = np.unique(columns["slate"], return_inverse=True)
        _, turns = np.unique(users.astype(np.int64) * (int(slates.max()) + 1) + slates, return_inverse=True)
        first = np.full(int(turns.max()) + 1, np.inf)
        np.minimum.at(first, turns, times)
        times = first[turns]
    if "propensity" in columns:
        chance = columns["propensity"]
        tiny = (chance > 0) & (chance < np.finfo(np.float32).tiny)
        _refuse(path, wanted["propensity"], chance, tiny, "a number that float32 holds")
        _refuse(path, wanted["propensity"], chance, (chance <= 0) | (chance > 1), "in (0, 1]")
    ranks = columns.get("position", np.zeros(events))
    if "position" in columns:
        wrong = (ranks < 0) | (ranks >= MOST_SLOTS) | (ranks != np.floor(ranks))
        _refuse(path, wanted["position"], ranks, wrong, f"a whole number from 0 to {MOST_SLOTS - 1}")
    order = np.lexsort((np.arange(events), ranks, turns, times, users))
    begins = np.r_[True, turns[order][1:] != turns[order][:-1]]
    if "position" not in columns:
        number = np.arange(events)
        ranks = np.empty(events)
        ranks[order] = number - np.maximum.accumulate(np.where(begins, number, 0))
    elif "slate" in columns:
        twice = ~begins & np.r_[False, ranks[order][1:] == ranks[order][:-1]]
        again = np.zeros(events, bool)
        again[order] = twice
        _refuse(path, wanted["position"], ranks, again, "free: the slate has an item there already")
    else:
        ranks = np.zeros(events)  # without slates a turn has one slot, wherever it was on the page
    chances = columns["propensity"].astype(np.float32)[order] if "propensity" in columns else None
    return Table(
        users=users[order].astype(np.int32),
        items=items[order].astype(np.int32),
        rewards=columns["reward"].astype(np.float32)[order],
        turns=np.cumsum(begins) - 1,
        positions=ranks[order].astype(np.int32),
        propensities=chances,
        user_ids=user_ids,
        item_ids=item_ids,
    )
