"""All cores of a machine without an accelerator, as JAX devices. For entry points, before anything else uses JAX.

XLA runs a simulator mostly on one core; users (or runs) split over one virtual device a core use them all.
"""

from __future__ import annotations

import os
from contextlib import suppress

import jax


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
