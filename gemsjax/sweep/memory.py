"""What a sweep needs of each device, before it begins: bytes a run by part, and what XLA plans for the whole program.

Called by `experiments.sweep --dry-run`, and by every sweep before it trains.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gemsjax import methods, prepare
from gemsjax.errors import SettingError
from gemsjax.pretrain.gems import make_pretraining
from gemsjax.sweep.bundle import Bundle, program
from gemsjax.sweep.layout import Layout, going, make_layout
from gemsjax.train import Run as RunData
from gemsjax.types import Dims


class Need(NamedTuple):
    """Bytes.

    Attributes:
      parts: of one run: `replay`, `networks` and `optimiser` of its agent, `best_agent`, `data` (weights, environment).
      arguments: of a device, before the program starts: all parts of its runs, as XLA counts them.
      temporary: that the program takes besides, of a device.
      limit: what a device has; None if unknown.
      output: what the program returns, of a device.
      alias: as much of that as lies where arguments were, since the runs are changed in place.
    """

    parts: dict[str, int]
    arguments: int
    temporary: int
    limit: int | None
    output: int = 0
    alias: int = 0

    @property
    def total(self) -> int:
        return self.arguments + self.output - self.alias + self.temporary

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
    # Inputs that no run reads are held all the same, so they count; some versions of JAX would leave them out.
    kept = jax.jit(call.call, donate_argnums=1, keep_unused=True)
    compiled = kept.lower(like, state, going(layout), numbers).compile()
    share = layout.places // len(layout.devices)
    parts = {name: size // layout.places for name, size in _parts(state, like).items()}
    planned = compiled.memory_analysis()
    limit = device_limit(layout) if limit is None else limit
    if planned is None:  # a backend that does not say
        return Need(parts, sum(parts.values()) * share, 0, limit), compiled
    kinds = ("argument", "temp", "output", "alias")
    arguments, temporary, output, alias = (int(getattr(planned, f"{kind}_size_in_bytes")) for kind in kinds)
    return Need(parts, arguments, temporary, limit, output, alias), compiled


def _parts(state: Any, data: RunData) -> dict[str, int]:
    is_moments = lambda x: isinstance(x, optax.ScaleByAdamState)  # noqa: E731
    moments = [x for x in jax.tree.leaves(state.agent, is_leaf=is_moments) if is_moments(x)]
    return {
        "replay": _bytes(state.replay),
        "networks": _bytes(state.agent) - _bytes(moments),
        "optimiser": _bytes(moments),
        "best_agent": _bytes(state.best_agent),
        "data": _bytes(data),
    }


class Pretraining(NamedTuple):
    """Bytes of a device while slate VAEs are pre-trained together, before any run trains; the program's own left out.

    Attributes:
      logged: the logged data of all environments.
      state: of one run: the network, its moments, and the best network so far.
      total: `logged`, and the states of a device's runs.
    """

    logged: int
    state: int
    total: int


def pretraining_need(made: Bundle, layout: Layout) -> Pretraining | None:
    """What the pre-training of all runs' GeMS needs of a device, if nothing is kept of it; None without GeMS."""
    if methods.method(made.settings.method).ranker != "gems":
        return None
    logs = {
        prepare.log_directory(run.settings, world, Path()): (run.settings.gems.users, world.dims)
        for run, world in zip(made.runs, made.worlds, strict=True)
    }
    logged = sum(users * dims.horizon * _slate_bytes(dims) for users, dims in logs.values())
    state = jax.eval_shape(make_pretraining(made.settings.gems.spec, made.worlds[0].dims).init, jax.random.key(0))
    share = layout.places // len(layout.devices)
    return Pretraining(logged, _bytes(state), logged + share * _bytes(state))


def _slate_bytes(dims: Dims) -> int:
    """Of a logged slate and its clicks, in the types of `datasets.LoggedSlates`."""
    clicks = 2 if dims.slate_size <= 16 else 4 if dims.slate_size <= 32 else dims.slate_size
    return dims.slate_size * (2 if dims.num_items <= 2**15 else 4) + clicks


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
    fits, too_many = 0, layout.group
    while too_many - fits > 1:  # what is needed grows with the group
        group = (fits + too_many) // 2
        if smaller(make_layout(layout.runs, "auto", group, layout.devices)).fits:
            fits = group
        else:
            too_many = group
    wanted = f"at most {fits}" if fits else "fewer runs, or a smaller replay"
    raise SettingError("group", layout.group, f"{wanted}: {told}, of {found.limit / 2**20:,.0f} MiB")
