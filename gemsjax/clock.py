"""How long JAX traced, lowered and compiled, and how many programs: for quickstart, benchmark and tests."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax

_PREFIX = "/jax/core/compile/"
_COMPILED = _PREFIX + "backend_compile_duration"


class CompileClock:
    """Totals since it was made.

    Attributes:
      programs: XLA compilations, those answered by the persistent cache included.
    """

    def __init__(self) -> None:
        self.programs = 0
        self._spans: list[tuple[float, float]] = []

    def heard(self, event: str, seconds: float) -> None:
        """Listener of `jax.monitoring`: called at the end of each piece of compiling."""
        if event.startswith(_PREFIX):
            now = time.perf_counter()
            self._spans.append((now - seconds, now))
            self.programs += event == _COMPILED

    @property
    def seconds(self) -> float:
        """Seconds in which something was traced, lowered or compiled; pieces within pieces count once."""
        total, end = 0.0, float("-inf")
        for start, stop in sorted(self._spans):
            total += max(0.0, stop - max(start, end))
            end = max(end, stop)
        return total


@contextmanager
def compile_clock() -> Iterator[CompileClock]:
    """A `CompileClock` that runs within the `with`."""
    clock = CompileClock()

    def listener(event: str, duration_secs: float, **_: str | int) -> None:
        clock.heard(event, duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield clock
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
