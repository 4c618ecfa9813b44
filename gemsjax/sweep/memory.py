"""What a sweep needs of each device, before it begins: bytes a run by part, and what XLA plans for the whole program.

Called by `experiments.sweep --dry-run`, and by every sweep before it pre-trains and before it trains.
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
from jax.sharding import NamedSharding, PartitionSpec

from gemsjax import datasets, prepare
from gemsjax.errors import SettingError
from gemsjax.prepare import gems as single
from gemsjax.pretrain.gems import Slates
from gemsjax.settings import TrainSettings
from gemsjax.sweep import pretraining
from gemsjax.sweep.bundle import Bundle, program
from gemsjax.sweep.layout import Layout, going, make_layout
from gemsjax.train import Run as RunData
from gemsjax.types import Dims


class Need(NamedTuple):
    """Bytes.

    Attributes:
      parts: of one run: `replay`, `networks` and `optimiser` of its agent, `best_agent`, `data` (weights, environment);
        of a slate VAE's pre-training: `state`.
      arguments: of a device, before the program starts: all parts of its runs, as XLA counts them, and what they share.
      temporary: that the program takes besides, of a device.
      limit: what a device has; None if unknown.
      output: what the program returns, of a device.
      alias: as much of that as lies where arguments were, since the runs are changed in place.
      shared: what every device holds once for all of its runs, the logged data of a pre-training.
      task: what needs it, a key of `_SMALLER`.
    """

    parts: dict[str, int]
    arguments: int
    temporary: int
    limit: int | None
    output: int = 0
    alias: int = 0
    shared: int = 0
    task: str = "training"

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
    limit = device_limit(layout) if limit is None else limit
    return _planned(compiled, Need(parts, sum(parts.values()) * share, 0, limit)), compiled


def _planned(compiled: Any, counted: Need) -> Need:
    """`counted` with XLA's numbers in place of its own; as it is where the backend does not say."""
    planned = compiled.memory_analysis()
    if planned is None:
        return counted
    arguments, temporary, output, alias = (
        int(getattr(planned, f"{kind}_size_in_bytes")) for kind in ("argument", "temp", "output", "alias")
    )
    return counted._replace(arguments=arguments, temporary=temporary, output=output, alias=alias)


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


PRETRAINING = "pre-training of GeMS"
_SMALLER = {
    "training": "fewer runs, or a smaller replay",
    PRETRAINING: "fewer runs, or less logged data (--gems.users)",
}
"""What may help where no group fits."""


def pretraining_need(
    made: Bundle, root: Path, layout: Layout, limit: int | None = None
) -> tuple[Need, pretraining.Together] | None:
    """What pre-training the GeMS that are missing needs, before any run trains, and the programs that say so.

    None if all are kept below `root`, or the method has none. Learning and validation take turns, beside the logged
    data of both: the larger of the two counts.

    Args:
      made, layout: of the sweep.
      root: of pre-trained weights.
      limit: see `need`.
    """
    ones = pretraining.missing(made, root)
    if not ones:
        return None
    of = pretraining.together(ones, layout)
    layout, settings = of.layout, ones[0].settings
    limit = device_limit(layout) if limit is None else limit
    logs = [prepare.log_directory(one.settings, one.world, Path()) for one in ones]
    sets = sorted(set(logs))
    validation, training, bound = _logged(settings, ones[0].world.dims, len(sets), layout)
    data = pretraining.data_of(layout, [one.settings for one in ones], [sets.index(log) for log in logs])
    state = jax.eval_shape(of.make, data, going(layout))
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.sharding), state)
    parts, shared = {"state": _bytes(state) // layout.places}, _bytes((validation, training)) + bound
    piece = single.pieces_of(training.slates.shape[1] // settings.gems.batch_size)[0]
    found = []
    for call, read, rest in ((of.update, training, (jnp.int32(0), piece)), (of.validate, validation, ())):
        compiled = call.lower(data, state, going(layout), read, *rest).compile()
        arguments = _bytes(state) // len(layout.devices) + _bytes(read)
        told = _planned(compiled, Need(parts, arguments, 0, limit, 0, 0, shared, PRETRAINING))
        found.append(told._replace(arguments=told.arguments + shared - _bytes(read)))
    return max(found, key=lambda one: one.total), of


def _logged(settings: TrainSettings, dims: Dims, sets: int, layout: Layout) -> tuple[Slates, Slates, int]:
    """Shapes of the logged data that each device holds, validation and training; bytes of what spans action boxes."""
    users = settings.gems.users
    items: Any = np.int16 if dims.num_items <= 2**15 else np.int32
    clicks: Any = np.uint16 if dims.slate_size <= 16 else np.uint32 if dims.slate_size <= 32 else np.bool_
    everywhere = NamedSharding(layout.mesh, PartitionSpec())

    def blank(kind: Any, *shape: int) -> np.ndarray:  # [users, H, ...] that is one number in memory
        return np.broadcast_to(np.zeros((), kind), (users, dims.horizon, *shape))

    def flat(column: np.ndarray) -> Any:
        shape = (sets, column.shape[0] * column.shape[1], *column.shape[2:])
        return jax.ShapeDtypeStruct(shape, column.dtype, sharding=everywhere)

    clicked = () if dims.slate_size <= 32 else (dims.slate_size,)
    logged = datasets.LoggedSlates(blank(items, dims.slate_size), blank(clicks, *clicked), {})
    validation, training = (Slates(flat(part.slates), flat(part.clicks)) for part in datasets.split(logged))
    turns = sets * min(users, single.BOUND_USERS) * dims.horizon
    return validation, training, turns * (logged.slates[0, 0].nbytes + logged.clicks[0, 0].nbytes)


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
      layout: as asked for (of a pre-training: of its slate VAEs).
      smaller: measures another layout.

    Raises:
      SettingError: with what to ask for instead.
    """
    if found.fits:
        return
    assert found.limit is not None
    told = f"{found.total / 2**20:,.0f} MiB a device for {layout.places // len(layout.devices)} runs"
    told = told if found.task == "training" else f"{found.task}: {told}"
    if found.arguments > found.limit:
        most = max(found.limit - found.shared, 0) // max(sum(found.parts.values()), 1)
        most_told = f"at most {most} of this size" if most else _SMALLER[found.task]
        raise SettingError("runs of a device", told, f"{most_told}, in {found.limit / 2**20:,.0f} MiB")
    fits, too_many = 0, layout.group
    while too_many - fits > 1:  # what is needed grows with the group
        group = (fits + too_many) // 2
        if smaller(make_layout(layout.runs, "auto", group, layout.devices)).fits:
            fits = group
        else:
            too_many = group
    wanted = f"at most {fits}" if fits else _SMALLER[found.task]
    raise SettingError("group", layout.group, f"{wanted}: {told}, of {found.limit / 2**20:,.0f} MiB")
