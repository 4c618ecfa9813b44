"""What a sweep needs of each device, before it begins: bytes a run by part, and what XLA plans for the whole program.

Called by `experiments.sweep --dry-run`, and by every sweep before it trains.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemsjax.errors import SettingError
from gemsjax.sweep.bundle import Bundle, program
from gemsjax.sweep.layout import Layout, going
from gemsjax.train import Run as RunData


class Need(NamedTuple):
    """Bytes.

    Attributes:
      parts: of one run: `replay`, `agent` (networks and optimisers), `best_agent`, `data` (weights, environment).
      arguments: of a device, before the program starts: all parts of its runs.
      temporary: that the program takes besides, of a device.
      limit: what a device has; None if unknown.
    """

    parts: dict[str, int]
    arguments: int
    temporary: int
    limit: int | None

    @property
    def total(self) -> int:
        return self.arguments + self.temporary

    @property
    def fits(self) -> bool:
        return self.limit is None or self.total <= self.limit


def need(made: Bundle, data: RunData, layout: Layout, limit: int | None = None) -> tuple[Need, Any]:
    """What one epoch of the sweep needs, and the compiled program that says so.

    Args:
      made, data: of the sweep; the data's values are not read.
      layout: where runs go.
      limit: bytes of a device; by default what it reports (CPU devices share the machine's memory).
    """
    settings = made.settings
    call = program(made, layout)
    like = _like(data, layout)
    state = jax.eval_shape(call.make, like, going(layout))
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.sharding), state)
    numbers = jax.ShapeDtypeStruct((min(settings.epoch_steps, settings.steps),), jnp.int32)
    compiled = jax.jit(call.call, donate_argnums=1).lower(like, state, going(layout), numbers).compile()
    share = layout.places // len(layout.devices)
    parts = {name: _bytes(getattr(state, name)) // layout.places for name in ("replay", "agent", "best_agent")}
    parts["data"] = _bytes(like) // layout.places
    planned = compiled.memory_analysis()
    temporary = int(planned.temp_size_in_bytes) if planned is not None else 0
    limit = device_limit(layout) if limit is None else limit
    return Need(parts, sum(parts.values()) * share, temporary, limit), compiled


def _like(data: RunData, layout: Layout) -> RunData:
    shape = lambda x: jax.ShapeDtypeStruct((layout.places, *np.shape(x)[1:]), x.dtype, sharding=layout.sharding)  # noqa: E731
    return jax.tree.map(shape, data)


def _bytes(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def device_limit(layout: Layout) -> int | None:
    """Bytes of one device; CPU devices get equal shares of the machine's memory."""
    device = layout.devices[0]
    if device.platform == "cpu":
        if not hasattr(os, "sysconf"):
            return None
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return min(machine, *_container_limits()) // len(layout.devices)
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit")


def _container_limits() -> list[int]:
    """What a container may use, where the system says so."""
    found = [1 << 62]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        file = Path("/sys/fs/cgroup") / name
        with suppress(OSError, ValueError):
            found.append(int(file.read_text()))
    return found


def refuse_unless_fits(found: Need, layout: Layout, smaller: Callable[[Layout], Need]) -> None:
    """Raise before anything trains if a device has too little, naming the largest group that fits.

    Args:
      found: of `layout`.
      layout: as asked for.
      smaller: measures another layout.

    Raises:
      SettingError: with what to ask for instead.
    """
    if found.fits:
        return
    assert found.limit is not None
    told = f"{found.total / 2**20:,.0f} MiB a device for {layout.places // len(layout.devices)} runs"
    if found.arguments > found.limit:
        most = found.limit // max(sum(found.parts.values()), 1)
        raise SettingError("runs of a device", told, f"at most {most} of this size, in {found.limit / 2**20:,.0f} MiB")
    share = -(-layout.runs // len(layout.devices))
    fits, too_many = 0, layout.group
    while too_many - fits > 1:  # what is needed grows with the group
        group = (fits + too_many) // 2
        if smaller(dataclasses.replace(layout, group=group, groups=-(-share // group))).fits:
            fits = group
        else:
            too_many = group
    wanted = f"at most {fits}" if fits else "fewer runs, or a smaller replay"
    raise SettingError("group", layout.group, f"{wanted}: {told}, of {found.limit / 2**20:,.0f} MiB")
