"""Many runs as one program: how the run axis is laid out over devices, and on each device.

Runs are split over the devices with `NamedSharding` on a mesh (what `pmap` was used for: people who look for "pmapped
sweeps" find them here). Each device takes its runs in groups: the runs of a group side by side (`vmapped`), the groups
one after another (`mapped`, if a group is one run). No device talks to another, so a run's numbers depend on the size
of its group only. Called by the other files of `gemsjax.sweep`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gemsjax.errors import require, require_choice, require_count
from gemsjax.maths.blocks import one_core
from gemsjax.types import Array

KINDS = ("auto", "mapped", "vmapped")
_AXIS = "runs"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each of N runs goes: device, group of that device, place in the group.

    Attributes:
      runs: N.
      group: runs side by side on a device; 1 is one after another.
      groups: groups of each device.
      devices: as many as there is work for.
    """

    runs: int
    group: int
    groups: int
    devices: tuple[jax.Device, ...]

    @property
    def places(self) -> int:
        """Runs that would fit; those beyond `runs` are empty: padded, and masked."""
        return len(self.devices) * self.groups * self.group

    @property
    def mesh(self) -> Mesh:
        """The devices, along the one axis of runs."""
        return jax.make_mesh((len(self.devices),), (_AXIS,), axis_types=(AxisType.Auto,), devices=self.devices)

    @property
    def sharding(self) -> NamedSharding:
        """Of an array whose first axis is the run axis."""
        return NamedSharding(self.mesh, PartitionSpec(_AXIS))

    def describe(self) -> dict[str, Any]:
        """For people and `sweep.json`."""
        platform = self.devices[0].platform
        return {
            "layout": "mapped" if self.group == 1 else "vmapped",
            "group": self.group,
            "groups_per_device": self.groups,
            "devices": len(self.devices),
            "device": f"{platform}: {self.devices[0].device_kind}",
            "empty_places": self.places - self.runs,
        }


def make_layout(
    runs: int, kind: str = "auto", group: int | None = None, devices: Sequence[jax.Device] | None = None
) -> Layout:
    """Lay `runs` out over the local devices.

    A group is as large as asked, whatever the number of devices: numbers depend on its size. Places that are left over
    are padded, and devices without any group are left out.

    Args:
      runs: N.
      kind: `mapped`, `vmapped`, or `auto`: mapped on CPUs, where the batched small products of vmapped runs were slower
        than single ones on quiet cores (docs/performance.md), vmapped on accelerators, which one small network leaves
        idle (not measured: none was at hand).
      group: runs of a group; by default one if mapped, and all of a device's if vmapped.
      devices: by default all local ones.

    Raises:
      SettingError: an unknown kind, a count below 1, or a group of several mapped runs.
    """
    require_choice("layout", kind, KINDS)
    require_count("runs", runs)
    devices = tuple(jax.local_devices() if devices is None else devices)
    share = -(-runs // len(devices))
    if group is None:
        usual = "mapped" if devices[0].platform == "cpu" else "vmapped"
        group = 1 if (usual if kind == "auto" else kind) == "mapped" else share
    require_count("group", group)
    require(kind != "mapped" or group == 1, "group", group, "1: mapped runs go one after another (layout vmapped)")
    groups = -(-runs // group)
    devices = devices[:groups]
    return Layout(runs, group, -(-groups // len(devices)), devices)


class Going(NamedTuple):
    """Which runs go on.

    Attributes:
      runs: [places] bool.
      groups: [2] int32, number of the first group and of the one after the last. Data, so that XLA knows nothing of the
        loop over groups: one that turns once would be taken apart, or the first turn of several compiled on its own, to
        other last digits.
    """

    runs: Array
    groups: Array


class Program(NamedTuple):
    """A function of one run, over all of them; every leaf below is [places, ...] and lies on the runs' devices.

    Attributes:
      call: `(data, state, going, *shared) -> (state, out)`, not yet compiled; `state` may be donated.
      make: `(data, going) -> state`, the same of a function that begins a run.
    """

    call: Callable[..., tuple[Any, Any]]
    make: Callable[..., Any]


def over_runs(layout: Layout, begin: Callable[[Any], Any], step: Callable[..., tuple[Any, Any]]) -> Program:
    """`begin(data) -> state` and `step(data, state, active, *shared) -> (state, out)` of one run, over all runs.

    `active` [] says whether the run still goes on; `step` freezes it if not. A group without any active run is not
    computed at all: its state stays and its `out` is zero.
    """

    def at(tree: Any, number: Array | int) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, number * layout.group, layout.group), tree)

    def put(tree: Any, new: Any, number: Array) -> Any:
        update = jax.lax.dynamic_update_slice_in_dim
        return jax.tree.map(lambda x, y: update(x, y, number * layout.group, 0), tree, new)

    def zeros(shapes: Any, times: int = 1) -> Any:
        return jax.tree.map(lambda x: jnp.zeros((times * x.shape[0], *x.shape[1:]), x.dtype), shapes)

    # Both loops change arrays of all the device's runs in place. A reshape to [groups, group, ...] would be simpler to
    # read, and XLA would copy them all.
    def call_share(data: Any, state: Any, going: Going, *shared: Any) -> tuple[Any, Any]:
        work = _of_group(step, 3, layout.group)
        shapes = jax.eval_shape(lambda: work(*at((data, state, going.runs), 0), *shared))[1]

        def group(number: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            state, out = carry
            mine, runs, on = at((state, data, going.runs), number)
            rest = lambda mine: (mine, zeros(shapes))  # noqa: E731
            mine, told = jax.lax.cond(on.any(), lambda mine: work(runs, mine, on, *shared), rest, mine)
            return put(state, mine, number), put(out, told, number)

        first, end = going.groups
        return jax.lax.fori_loop(first, end, group, (state, zeros(shapes, layout.groups)))

    def make_share(data: Any, going: Going) -> Any:
        work = _of_group(begin, 1, layout.group)
        shapes = jax.eval_shape(lambda: work(at(data, 0)))
        # The barrier keeps random numbers from being drawn in place, where their last digits depend on the place.
        one = lambda number: jax.lax.optimization_barrier(work(at(data, number)))  # noqa: E731
        made = lambda number, state: put(state, one(number), number)  # noqa: E731
        first, end = going.groups
        return jax.lax.fori_loop(first, end, made, zeros(shapes, layout.groups))

    split = PartitionSpec(_AXIS)
    spread = partial(jax.shard_map, mesh=layout.mesh, check_vma=False, out_specs=split)
    turns = Going(split, PartitionSpec())  # type: ignore[arg-type]

    def call(data: Any, state: Any, going: Going, *shared: Any) -> tuple[Any, Any]:
        specs = (split, split, turns, *(PartitionSpec() for _ in shared))
        return spread(call_share, in_specs=specs)(data, state, going, *shared)

    return Program(call, lambda data, going: spread(make_share, in_specs=(split, turns))(data, going))


def _of_group(function: Callable[..., Any], split_arguments: int, group: int) -> Callable[..., Any]:
    """`function` of a run, of a group [group, ...]: vmapped, or of its only run without an axis."""

    def side_by_side(*given: Any) -> Any:
        axes = (0,) * split_arguments + (None,) * (len(given) - split_arguments)
        return jax.vmap(function, axes)(*given)

    def single(*given: Any) -> Any:
        inner = [jax.tree.map(lambda x: x[0], tree) for tree in given[:split_arguments]]
        return jax.tree.map(lambda x: x[None], function(*inner, *given[split_arguments:]))

    def on_its_core(*given: Any) -> Any:
        with one_core():  # whatever the number of devices, on which no number may depend
            return (single if group == 1 else side_by_side)(*given)

    return on_its_core


def place(layout: Layout, tree: Any) -> Any:
    """[N, ...] host arrays, padded with copies of the last run, on the devices of their runs."""
    missing = layout.places - layout.runs

    def padded(x: Any) -> Array:
        x = np.asarray(x)
        return jax.device_put(np.concatenate([x, np.repeat(x[-1:], missing, axis=0)]), layout.sharding)

    return jax.tree.map(padded, tree)


def going(layout: Layout, runs: np.ndarray | None = None) -> Going:
    """Which of the N runs go on (all, by default), on the devices; the empty places never do."""
    runs = np.ones(layout.runs, bool) if runs is None else runs
    placed = np.concatenate([runs, np.zeros(layout.places - layout.runs, bool)])
    everywhere = NamedSharding(layout.mesh, PartitionSpec())
    return Going(
        jax.device_put(placed, layout.sharding), jax.device_put(np.array([0, layout.groups], np.int32), everywhere)
    )


def gather(layout: Layout, tree: Any) -> Any:
    """[places, ...] on the devices -> [N, ...] NumPy arrays."""
    return jax.tree.map(lambda x: np.asarray(x)[: layout.runs], tree)


def of_run(tree: Any, number: int) -> Any:
    """One run's part of [places, ...] arrays, on the default device."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x[number])), tree)
