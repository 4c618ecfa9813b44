"""Users spread over all devices, and all cores of a machine without an accelerator as devices.

XLA runs a simulator mostly on one core; users split over one virtual device a core use them all. `use_all_cores` is for
entry points, before anything else uses JAX; `spread` for whatever plays many users (datasets, evaluation).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, PartitionSpec

from gemsjax.errors import require_choice, require_count


def use_all_cores() -> None:
    """Make one CPU device of every core this process may use.

    Does nothing if the number is already set (`JAX_NUM_CPU_DEVICES`, or XLA's flag) or if JAX has already looked for
    devices. Where there is an accelerator, `jax.devices()` stays the accelerator: only `jax.devices("cpu")` grows.
    """
    chosen = jax.config.jax_num_cpu_devices > 0  # type: ignore[attr-defined]
    if chosen or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    with suppress(RuntimeError):  # JAX has been used: its devices are what they are
        jax.config.update("jax_num_cpu_devices", available_cores())


def available_cores() -> int:
    """Cores that this process may run on, which a batch system may have restricted."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def processor() -> str:
    """The processor's name where the system tells it, else its kind."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


PORTION = 128
"""Users that one CPU core plays side by side: few enough for its cache, a multiple of every vector width."""


class Spread(NamedTuple):
    """A program over users.

    Attributes:
      program: `(split, *shared) -> out`, compiled at its first call: leaves of `split` and `out` are [users, ...].
      users: how many it takes: the number asked for, rounded up to whole portions on every device.
    """

    program: Callable[..., Any]
    users: int


def spread(play: Callable[..., Any], users: int) -> Spread:
    """`play(split, *shared)` for many users: split over the local devices, and on CPUs into portions that fit a cache.

    Portions are of one size, so that on CPUs a user's numbers do not depend on how many more are played. Keys must
    travel as plain numbers (`jax.random.key_data`): arrays of keys cannot be split by every version of JAX.
    """
    devices = jax.local_devices()[: -(-users // PORTION)]
    share = -(-users // len(devices))
    portion = PORTION if devices[0].platform == "cpu" else share
    padded = -(-share // portion) * portion

    def play_share(split: Any, *shared: Any) -> Any:
        portions = jax.tree.map(lambda x: x.reshape(-1, portion, *x.shape[1:]), split)
        out = jax.lax.map(lambda some: play(some, *shared), portions)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)

    mesh = jax.make_mesh((len(devices),), ("users",), axis_types=(AxisType.Auto,), devices=devices)

    def program(split: Any, *shared: Any) -> Any:
        specs = (PartitionSpec("users"), *(PartitionSpec() for _ in shared))
        return jax.shard_map(play_share, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("users"), check_vma=False)(
            split, *shared
        )

    return Spread(jax.jit(program), padded * len(devices))


PRECISIONS = ("default", "high", "highest")


def use_precision(precision: str) -> None:
    """How accelerators multiply float32 matrices in every program that is built from here on.

    On CPUs all are the same. GPUs that have TF32 round factors to it under `default` and `high`, TPUs to bfloat16 under
    `default`; `highest` is float32 (see `jax.lax.Precision`). For entry points, before anything is compiled.

    Args:
      precision: one of `PRECISIONS`; `default` leaves JAX's own setting (`JAX_DEFAULT_MATMUL_PRECISION`) as it is.

    Raises:
      SettingError: another one.
    """
    require_choice("--precision", precision, PRECISIONS)
    if precision != "default":
        jax.config.update("jax_default_matmul_precision", precision)


MOST_UNROLLED = 100
"""Turns that `use_unroll` takes at most: an episode of the paper's. A program grows with them, and with it the time of
its compilation."""
_unrolled = 1


def use_unroll(turns: int) -> None:
    """How many turns each pass of the beliefs' scans over trajectories makes, forward and back.

    A turn of a belief is so little work that on a GPU the passes of the loop may cost more than what they compute; what
    fewer of them gain is to be measured there (`experiments.benchmark --only sweep --unroll N`). CPUs gain nothing
    (docs/performance.md). It holds for what is traced from here on, and changes last digits at most. For entry points,
    before anything is compiled.

    Args:
      turns: 1 (as if this were never called) to `MOST_UNROLLED`; episodes that are shorter are unrolled as a whole.

    Raises:
      SettingError: out of that range.
    """
    global _unrolled
    require_count("--unroll", turns, 1, MOST_UNROLLED)
    _unrolled = turns


def unroll_of(turns: int) -> int:
    """What a scan over so many turns should be given as `unroll`. Read while a program is traced, by `nets` only."""
    return max(1, min(_unrolled, turns))


_PACKAGES = ("gemsjax", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy")


def surroundings() -> dict[str, Any]:
    """`versions` of what matters, `device`, matmul `precision` and `unroll`: what to read results with.

    `device` is its `platform`, its `kind` (of a CPU the processor's name), the `count` of local ones and, of CPUs, the
    `cores` that this process may use. Results of runs and records of studies hold it, and checkpoints do.
    """

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    device = jax.devices()[0]
    versions = {"python": platform.python_version()} | {package: version(package) for package in _PACKAGES}
    precision = jax.config.jax_default_matmul_precision or "default"  # type: ignore[attr-defined]
    about = {"platform": device.platform, "kind": device.device_kind, "count": jax.local_device_count()}
    if device.platform == "cpu":
        about |= {"kind": processor(), "cores": available_cores()}
    return {"versions": versions, "device": about, "precision": precision, "unroll": _unrolled}
