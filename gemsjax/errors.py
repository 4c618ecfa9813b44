"""The errors that a person sees: each names the setting, what it was, and what is accepted.

Raised on the host, before anything compiles. May be used by every module.
"""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches
from numbers import Real


class SettingError(ValueError):
    """A setting is outside what is accepted."""

    def __init__(self, setting: str, value: object, accepted: str) -> None:
        super().__init__(f"{setting} = {value!r} is not accepted: {accepted}")
        self.setting = setting


class DataError(ValueError):
    """A file is missing, incomplete, altered or not of the expected form."""


class TrainingError(RuntimeError):
    """Training cannot go on (a loss is no longer finite, for example)."""


def require(condition: bool, setting: str, value: object, accepted: str) -> None:
    """Raise `SettingError` unless `condition` holds; `accepted` says what would have been accepted."""
    if not condition:
        raise SettingError(setting, value, accepted)


def require_choice(setting: str, value: str, choices: Collection[str]) -> None:
    """Raise `SettingError` unless `value` is one of `choices`; the message names the closest one."""
    if value not in choices:
        close = get_close_matches(str(value), list(choices), n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise SettingError(setting, value, f"choose one of {', '.join(sorted(choices))}{hint}")


def require_count(setting: str, value: object, low: int = 1, high: int | None = None) -> None:
    """Raise `SettingError` unless `value` is a whole number from `low` to `high`."""
    accepted = f"a whole number from {low} to {high}" if high is not None else f"a whole number of at least {low}"
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole and value >= low and (high is None or value <= high), setting, value, accepted)  # type: ignore[operator]


def require_number(setting: str, value: object, low: float, high: float) -> None:
    """Raise `SettingError` unless `value` is a number from `low` to `high`."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    require(number and low <= float(value) <= high, setting, value, f"a number from {low:g} to {high:g}")  # type: ignore[arg-type]
