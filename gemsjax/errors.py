"""The errors that a person sees: each names the setting, what it was, and what is accepted.

Raised on the host, before anything compiles. May be used by every module.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from difflib import get_close_matches
from numbers import Integral, Real
from typing import TypeGuard

import numpy as np


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
    if not isinstance(value, Hashable) or value not in choices:
        close = get_close_matches(str(value), list(choices), n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise SettingError(setting, value, f"choose one of {', '.join(sorted(choices))}{hint}")


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is one real number, of Python or NumPy; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether `value` is of an integer type, of Python or NumPy; True, False and 2.0 are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def require_count(setting: str, value: object, low: int = 1, high: int | None = None) -> None:
    """Raise `SettingError` unless `value` is a whole number (see `is_whole`) from `low` to `high`."""
    accepted = f"a whole number from {low} to {high}" if high is not None else f"a whole number of at least {low}"
    require(is_whole(value) and value >= low and (high is None or value <= high), setting, value, accepted)


def require_number(setting: str, value: object, low: float, high: float) -> None:
    """Raise `SettingError` unless `value` is a number (see `is_number`) from `low` to `high`."""
    require(is_number(value) and low <= value <= high, setting, value, f"a number from {low:g} to {high:g}")


def require_array(setting: str, value: object, accepted: str) -> np.ndarray:
    """`value` (nested lists, say) as an array of any shape.

    Raises:
      SettingError: ragged lists, or anything that does not hold real numbers (or True and False) only.
    """
    found = value if len(repr(value)) <= 100 else f"a {type(value).__name__}"
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:  # lists of unequal length
        raise SettingError(setting, found, accepted) from error
    require(array.dtype.kind in "fiub", setting, found, accepted)
    return array
