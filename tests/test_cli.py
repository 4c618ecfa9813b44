"""What every experiment has around it: exit statuses, one-line errors, cores, a compilation cache that is private."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import _cli
from gemsjax.devices import available_cores
from gemsjax.errors import DataError, SettingError, TrainingError


@pytest.fixture
def jax_settings(monkeypatch):
    """A stand-in for `jax.config`, so that these tests change nothing for others."""
    config = SimpleNamespace(jax_compilation_cache_dir=None)
    config.update = lambda name, value: setattr(config, name, value)
    monkeypatch.setattr(_cli, "jax", SimpleNamespace(config=config))
    monkeypatch.setattr(_cli, "use_all_cores", lambda: None)
    monkeypatch.delenv(_cli.CACHE_VARIABLE, raising=False)
    return config


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (SettingError("users", 0, "more"), 2, "error: users = 0 is not accepted: more"),
        (DataError("data/x is missing"), 2, "error: data/x is missing"),
        (TrainingError("the loss is nan"), 1, "error: the loss is nan"),
        (OSError("disk full"), 1, "error: disk full"),
        (KeyboardInterrupt(), 130, "stopped"),
        (KeyboardInterrupt("go on with --resume"), 130, "stopped: go on with --resume"),
    ],
)
def test_errors_are_one_line_and_a_status(jax_settings, monkeypatch, capsys, error, status, says):
    monkeypatch.setenv(_cli.CACHE_VARIABLE, "off")

    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        _cli.run_cli(main)
    assert (ended.value.code, capsys.readouterr().err) == (status, says + "\n")


def test_mistakes_in_the_program_keep_their_traceback(jax_settings, monkeypatch):
    monkeypatch.setenv(_cli.CACHE_VARIABLE, "off")
    with pytest.raises(ZeroDivisionError):
        _cli.run_cli(lambda: 1 // 0)
    assert jax_settings.jax_compilation_cache_dir is None


def test_the_cache_is_made_private(jax_settings, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _cli.use_compile_cache() == tmp_path / "gemsjax" / "xla"
    assert jax_settings.jax_compilation_cache_dir == str(tmp_path / "gemsjax" / "xla")
    assert (tmp_path / "gemsjax" / "xla").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(("theirs", "kept"), [(None, 0.0), ("1", None)])
def test_small_programs_are_kept_too_unless_somebody_says_otherwise(jax_settings, monkeypatch, tmp_path, theirs, kept):
    name = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
    monkeypatch.delenv(name, raising=False) if theirs is None else monkeypatch.setenv(name, theirs)
    monkeypatch.setenv(_cli.CACHE_VARIABLE, str(tmp_path / "programs"))
    assert _cli.use_compile_cache() == tmp_path / "programs"
    assert getattr(jax_settings, name.lower(), None) == kept


def test_a_cache_that_others_may_write_to_is_not_used(jax_settings, monkeypatch, tmp_path, capsys):
    tmp_path.chmod(0o770)
    monkeypatch.setenv(_cli.CACHE_VARIABLE, str(tmp_path))
    assert _cli.use_compile_cache() is None
    assert "others may write to it" in capsys.readouterr().err
    monkeypatch.setenv(_cli.CACHE_VARIABLE, str(tmp_path / "a file" / "b"))
    (tmp_path / "a file").touch()
    assert _cli.use_compile_cache() is None
    assert "no compilation cache" in capsys.readouterr().err


def test_a_cache_chosen_by_jax_settings_stays(jax_settings, monkeypatch, tmp_path):
    jax_settings.jax_compilation_cache_dir = "chosen"
    monkeypatch.setenv(_cli.CACHE_VARIABLE, str(tmp_path))
    assert _cli.use_compile_cache() is None
    assert jax_settings.jax_compilation_cache_dir == "chosen"


@pytest.mark.parametrize(
    ("environment", "before", "expected"),
    [
        ({}, "", available_cores()),
        ({"JAX_NUM_CPU_DEVICES": "3"}, "", 3),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, "", 3),
        ({}, "jax.devices();", 1),
    ],
)
def test_all_cores_unless_the_user_or_jax_has_decided(environment, before, expected):
    script = (
        f"import jax; {before} from gemsjax.devices import use_all_cores; use_all_cores(); print(len(jax.devices()))"
    )
    surroundings = {
        name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    }
    surroundings |= {"JAX_PLATFORMS": "cpu"} | environment
    root = Path(__file__).resolve().parents[1]
    printed = subprocess.run([sys.executable, "-c", script], cwd=root, env=surroundings, capture_output=True, text=True)
    assert printed.stdout == f"{expected}\n", printed.stderr
