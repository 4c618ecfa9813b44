"""What every experiment does around its work: all cores, a compilation cache, errors as one line without a traceback.

Exit status: 0 done, 1 failed on the way, 2 refused (a setting or a file), 130 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import logging
import os
import stat
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import jax

from gemsjax.devices import use_all_cores
from gemsjax.errors import DataError, SettingError, TrainingError

CACHE_VARIABLE = "GEMSJAX_COMPILE_CACHE"
"""A directory for compiled programs instead of `~/.cache/gemsjax/xla`; `off` for none."""


def run_cli(main: Callable[[], object]) -> None:
    """Prepare JAX, call `main` and end the process as the head of this file says. Call it last, and once.

    if __name__ == "__main__":
        run_cli(lambda: main(tyro.cli(Arguments, description=__doc__)))
    """
    if "JAX_LOGGING_LEVEL" not in os.environ:
        logging.getLogger("jax").setLevel(logging.ERROR)
    use_all_cores()
    use_compile_cache()
    try:
        main()
    except (SettingError, DataError, TrainingError, OSError, KeyboardInterrupt) as error:
        _end(*outcome_of(error))


def outcome_of(error: BaseException) -> tuple[int, str]:
    """Exit status and what to say: one line for what a person can mend, a traceback for what only we can."""
    if isinstance(error, SettingError | DataError):
        return 2, f"error: {error}"
    if isinstance(error, TrainingError | OSError):
        return 1, f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return 130, f"stopped{': ' if str(error) else ''}{error}"
    if isinstance(error, SystemExit):
        return (error.code, "") if isinstance(error.code, int) else (1, str(error.code or ""))
    return 1, "".join(traceback.format_exception(error))


def use_compile_cache() -> Path | None:
    """Keep compiled programs between runs; returns where, None if they are not kept.

    Whoever can write to the directory can make this process run code, so one that others may write to is not used.
    Where JAX's own settings name a cache (`JAX_COMPILATION_CACHE_DIR`), that one stays.
    """
    wanted = os.environ.get(CACHE_VARIABLE, "")
    if wanted.lower() in ("off", "none", "0") or jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return None
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = Path(wanted) if wanted else base / "gemsjax" / "xla"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_private(directory):
            print(f"note: {directory} is not used as compilation cache: others may write to it", file=sys.stderr)
            return None
    except OSError as error:
        print(f"note: no compilation cache: {error}", file=sys.stderr)
        return None
    jax.config.update("jax_compilation_cache_dir", str(directory))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # A hundred small programs of 10 to 100 ms are a third of what a warm start would compile.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return directory


def _is_private(directory: Path) -> bool:
    if not hasattr(os, "getuid"):
        return True
    found = directory.stat()
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _end(status: int, says: str) -> None:
    print(says, file=sys.stderr, flush=True)
    sys.exit(status)
