"""Checks of settings that learners share: widths of networks, finite numbers, discounts and rates. Called by agents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gemsjax.errors import require, require_count


def check_widths(spec: Any) -> None:
    """Raise `SettingError` unless `hidden`, `belief_width` and `item_dim` are at least 1."""
    for name in ("hidden", "belief_width", "item_dim"):
        require_count(name, getattr(spec, name))


def check_hypers(
    hypers: Any, rates: Sequence[str], shares: Sequence[str] = ("gamma",), positive: Sequence[str] = ()
) -> None:
    """Raise `SettingError` unless all numbers are finite, `rates` learning rates, `shares` in [0, 1] and `positive`
    above zero (host-side numbers only)."""
    for name, value in vars(hypers).items():
        require(math.isfinite(value), name, value, "a finite number")
    for name in shares:
        require(0.0 <= getattr(hypers, name) <= 1.0, name, getattr(hypers, name), "a number in [0, 1]")
    for name in rates:
        require(0.0 <= getattr(hypers, name) < 1.0, name, getattr(hypers, name), "a number in [0, 1)")
    for name in positive:
        require(getattr(hypers, name) > 0.0, name, getattr(hypers, name), "a positive number")
