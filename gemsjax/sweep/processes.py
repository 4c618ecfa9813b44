"""The same command on several machines: which process this is, and `jax.distributed` where there is more than one.

Runs need nothing of each other, so processes share no arrays: each drives its shards on its own devices, and the first
one makes the tables. `jax.distributed` tells them apart and ends all of them when one dies, so that a batch system may
start the sweep again. Called by `experiments.sweep`, before anything else uses JAX.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils

from gemsjax.errors import SettingError, require_count

WAIT = 7 * 24 * 3600
"""Seconds that processes wait for each other at the end."""


class Process(NamedTuple):
    """Which of how many."""

    rank: int = 0
    total: int = 1


def start(
    coordinator: str | None = None, count: int | None = None, number: int | None = None, heartbeat: int = 100
) -> Process:
    """Join the other processes, if there are any.

    Args:
      coordinator: `HOST:PORT` of the first process; with `count` and `number`. Without them, Slurm (more than one task)
        and Kubernetes (an indexed job) are asked; else this is the only process.
      count, number: how many processes, and which this is.
      heartbeat: seconds of silence after which a process counts as dead, and all others end.

    Raises:
      SettingError: only some of the three are given, a number out of range, or no package that can ask Kubernetes.
      OSError: the others were not found, or did not answer.
    """
    # Who is done first waits for the others, however long they take: else all would be ended after five minutes.
    patience: dict[str, Any] = {"heartbeat_timeout_seconds": heartbeat, "shutdown_timeout_seconds": WAIT}
    given = [value is not None for value in (coordinator, count, number)]
    if any(given) and not all(given):
        raise SettingError("--coordinator, --processes, --process", (coordinator, count, number), "all three, or none")
    require_count("heartbeat", heartbeat)
    if coordinator is not None and count is not None and number is not None:
        require_count("--processes", count)
        require_count("--process", number, 0, count - 1)
        if count == 1:
            return Process()
        if ":" not in coordinator:
            raise SettingError("--coordinator", coordinator, "HOST:PORT of the first process")
        _join(coordinator, count, number, **patience)
    elif under_slurm() or under_kubernetes():
        if not under_slurm() and find_spec("kubernetes") is None:  # JAX would go on alone, with a warning
            needs = "its package is not installed: pip install 'gemsjax[kubernetes]' (or give --coordinator)"
            raise SettingError("an indexed job", "kubernetes", needs)
        _join(**patience)
        _take_all_devices()
    else:
        return Process()
    return Process(jax.process_index(), jax.process_count())


def _join(*where: Any, **patience: Any) -> None:
    try:
        jax.distributed.initialize(*where, **patience)
    except (RuntimeError, ValueError) as error:  # what JAX raises where an address, an API or a process does not answer
        raise OSError(f"jax.distributed did not find the other processes: {error}") from error


def _take_all_devices() -> None:
    """Under Slurm JAX leaves each process one device, even where it is the only one of its machine."""
    if under_slurm() and os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0] == "1":
        for kind in ("cuda", "rocm"):
            jax.config.update(f"jax_{kind}_visible_devices", "all")


def wait_for_all(name: str, process: Process) -> None:
    """Wait until all processes have come here."""
    if process.total > 1:
        multihost_utils.sync_global_devices(name)


def under_slurm() -> bool:
    """Whether this is one of several tasks of a Slurm step."""
    return int(os.environ.get("SLURM_NTASKS", "1") or 1) > 1 and "SLURM_PROCID" in os.environ


def under_kubernetes() -> bool:
    """Whether this is a pod of an indexed Kubernetes job (JAX asks its API for the others)."""
    return "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ


def share(shards: int, process: Process) -> list[int]:
    """The shards that a process drives, one after another; any number of processes may continue a sweep."""
    return list(range(process.rank, shards, process.total))
