"""When a sweep writes a checkpoint: no oftener than asked, and never so often that writing takes much of its time.

Called by `drive.py`.
"""

from __future__ import annotations

import time

SHARE = 0.1
"""The most of a sweep's time that its checkpoints may take. Sixty runs at the paper's sizes are some 9 GiB, gathered,
written and hashed while the devices wait."""


class Cadence:
    """Whether it is time for a checkpoint.

    Attributes:
      cost: seconds that the latest checkpoint took.
      since: when it ended, or when this began.
    """

    def __init__(self, minutes: float, now: float | None = None) -> None:
        """`minutes`: at least between checkpoints; `now`: seconds of `time.monotonic`, by default as it is."""
        self.minutes, self.cost = minutes, 0.0
        self.since = time.monotonic() if now is None else now

    def due(self, now: float | None = None) -> bool:
        """Whether both have passed since the latest one: the minutes, and ten times the seconds that it took."""
        now = time.monotonic() if now is None else now
        return now - self.since >= max(60.0 * self.minutes, self.cost / SHARE)

    def saved(self, started: float, ended: float | None = None) -> None:
        """A checkpoint was written from `started` to `ended` (by default now)."""
        self.since = time.monotonic() if ended is None else ended
        self.cost = self.since - started
