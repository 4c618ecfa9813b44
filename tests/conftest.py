"""Settings of every test: programs that compile fast, and a compilation cache that survives between runs.

Most of the suite's time is compiling programs that run for a moment, so XLA is told to optimise little: a third of the
time. What must be true of programs as users get them (the same bits however runs are laid out) is marked `optimised`,
and `.ci/run` runs it, and the slow tests, with `GEMSJAX_TEST_OPTIMISED=1`.
"""

import os
import subprocess
import sys
from pathlib import Path

_FAST = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_use_fusion_emitters=false",
)
_PROBE = "import jax; jax.devices('cpu')"


def _flags_that_xla_knows() -> str:
    """The flags of `_FAST` that this XLA accepts; at one that it does not know it aborts, hence processes for that."""
    before = os.environ.get("XLA_FLAGS", "")

    def accepts(flags: str) -> bool:
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        return not subprocess.run([sys.executable, "-c", _PROBE], env=environment, capture_output=True).returncode

    together = " ".join((before, *_FAST)).strip()
    if accepts(together):
        return together
    known = before
    for flag in _FAST:
        known = f"{known} {flag}" if accepts(f"{known} {flag}") else known
    return known.strip()


# Worker processes inherit the variable of the process that starts them.
if not os.environ.get("GEMSJAX_TEST_OPTIMISED") and _FAST[0] not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = _flags_that_xla_knows()

import jax  # noqa: E402

jax.config.update("jax_compilation_cache_dir", str(Path(__file__).resolve().parents[1] / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

_LONGEST = ("test_sweep.py", "test_runs.py", "test_experiments.py", "test_studies.py")
"""Files that no worker should begin last; a file's tests stay with one worker."""


def pytest_collection_modifyitems(items: list) -> None:
    """Begin with the longest files."""
    items.sort(key=lambda item: item.path.name not in _LONGEST)
