"""Run directories, metrics, progress and requests to stop, including what happens when they are interrupted."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import types
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import gemsjax
from gemsjax import disk, tracking
from gemsjax.errors import DataError, SettingError
from gemsjax.tracking import MetricsLog, Progress, RunDirectory, StopRequest, read_config, read_metrics, run_name

CONFIG = {"method": "sac-gems", "gamma": 0.8, "widths": (256, 256)}


def table(directory: Path) -> list[dict[str, str]]:
    with open(directory / "metrics.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def steps(directory: Path) -> list[int]:
    return [row["step"] for row in read_metrics(directory)]


# JSON


@dataclass
class Settings:
    seed: int
    where: Path


def test_json_of_everything_that_results_hold(tmp_path):
    value = {
        "settings": Settings(3, Path("a/b")),
        "numpy": np.arange(4).reshape(2, 2),
        "jax": jnp.float32(0.5),
        "half": jnp.ones(2, jnp.bfloat16),
        "nan": [float("nan"), np.float32("inf"), jnp.array([1.0, jnp.nan])],
        3: (True, None, "ä"),
    }
    disk.write_json(tmp_path / "result.json", value)
    assert json.loads((tmp_path / "result.json").read_text()) == {
        "settings": {"seed": 3, "where": "a/b"},
        "numpy": [[0, 1], [2, 3]],
        "jax": 0.5,
        "half": [1.0, 1.0],
        "nan": [None, None, [1.0, None]],
        "3": [True, None, "ä"],
    }


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_json_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, failing):
    path = tmp_path / "result.json"
    disk.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        disk.write_json(path, {"a": object()})

    def full(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, full)
        with pytest.raises(OSError, match="No space"):
            disk.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


# Run directories


def test_names_are_the_published_ones():
    name = run_name("focused_topdown", 58407201, beta=1, click_weight=0.5, method="SAC_GeMS")
    assert name.directory == "SAC_GeMS/focused_topdown_KL1.0_click0.5_seed58407201"
    assert name.full == "SAC_GeMS_focused_topdown_KL1.0_click0.5_seed58407201"
    assert run_name("diffuse-mix", 3, method="SlateQ").directory == "SlateQ/diffuse_mix_seed3"
    for env, method in (("../x", "SAC"), ("x", ".."), ("x", "a/b"), ("x", "")):
        with pytest.raises(SettingError, match="plain name"):
            run_name(env, 1, method=method)


def test_a_new_directory_holds_its_configuration(tmp_path):
    with RunDirectory(tmp_path / "runs" / "SAC" / "x", CONFIG) as run:
        assert not run.resumed
        assert read_config(run.path) == {**CONFIG, "widths": [256, 256]}


def test_an_existing_directory_is_refused_unless_a_flag_says_how(tmp_path):
    path = tmp_path / "run"
    for resume in (False, True):  # nothing to resume yet: starts anew
        with RunDirectory(path, CONFIG, resume=resume) as run:
            assert not run.resumed
            (path / "step_00000001").mkdir()
            (path / "step_00000001" / "data").write_text("x")
        with pytest.raises(SettingError, match=r"--resume.*--overwrite"):
            RunDirectory(path, CONFIG)
        if not resume:
            with RunDirectory(path, {"other": 1}, overwrite=True) as run:
                assert not run.resumed and read_config(path) == {"other": 1}
                assert {entry.name for entry in path.iterdir()} == {"config.json", ".lock"}
            (path / "config.json").unlink()
    with RunDirectory(path, {"other": 2}, resume=True) as run:
        assert run.resumed and (path / "step_00000001" / "data").exists()
        assert read_config(path)["method"] == "sac-gems"
        run.write_config({"other": 2})
        assert read_config(path) == {"other": 2}
    with pytest.raises(SettingError, match="only one"):
        RunDirectory(path, CONFIG, resume=True, overwrite=True)


@pytest.mark.parametrize("content", [None, "{", '{"format": "of something else"}', "[]"])
@pytest.mark.parametrize("flag", ["resume", "overwrite"])
def test_what_is_no_run_directory_is_left_alone(tmp_path, content, flag):
    (tmp_path / "thesis.tex").write_text("years of work")
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match="no run directory"):
        RunDirectory(tmp_path, CONFIG, **{flag: True})
    assert sorted(tmp_path.iterdir()) == before


def test_overwriting_follows_no_links(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    RunDirectory(tmp_path / "run", CONFIG).close()
    (tmp_path / "run" / "link").symlink_to(outside, target_is_directory=True)
    RunDirectory(tmp_path / "run", CONFIG, overwrite=True).close()
    assert (outside / "precious").exists() and not (tmp_path / "run" / "link").exists()


def test_a_second_run_in_the_same_directory_is_refused(tmp_path):
    path = tmp_path / "run"
    with RunDirectory(path, CONFIG):
        (path / "precious").touch()
        for flag in ("resume", "overwrite"):
            with pytest.raises(DataError, match=rf"another run is going on.*process {os.getpid()}\b"):
                RunDirectory(path, CONFIG, **{flag: True})
        assert (path / "precious").exists()
    RunDirectory(path, CONFIG, resume=True).close()


HOLDER = """
import sys, time
from gemsjax.tracking import RunDirectory
run = RunDirectory(sys.argv[1], {})
print("locked", flush=True)
time.sleep(60)
"""


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(gemsjax.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, env=environment)
    try:
        assert process.stdout and process.stdout.readline() == b"locked\n"
        with pytest.raises(DataError, match=f"process {process.pid}"):
            RunDirectory(tmp_path, CONFIG, resume=True)
    finally:
        process.kill()
        process.communicate()
    with RunDirectory(tmp_path, CONFIG, resume=True) as run:
        assert run.resumed
        assert f"process {os.getpid()}," in (tmp_path / ".lock").read_text()


# Metrics


def test_rows_arrive_in_both_files_at_once(tmp_path):
    assert read_metrics(tmp_path) == []
    log = MetricsLog(tmp_path)
    log.append({"step": 10, "loss": jnp.float32(0.5)})
    assert read_metrics(tmp_path) == [{"step": 10, "loss": 0.5}]
    log.append({"step": np.int64(20), "loss": float("nan")})
    log.append({"step": 30, "loss": 2, "return, validation": 1.5})
    log.append({"step": 40, "return, validation": np.float32(2.5)})
    assert read_metrics(tmp_path)[1:] == [
        {"step": 20, "loss": None},
        {"step": 30, "loss": 2, "return, validation": 1.5},
        {"step": 40, "return, validation": 2.5},
    ]
    assert table(tmp_path) == [
        {"step": "10", "loss": "0.5", "return, validation": ""},
        {"step": "20", "loss": "", "return, validation": ""},
        {"step": "30", "loss": "2", "return, validation": "1.5"},
        {"step": "40", "loss": "", "return, validation": "2.5"},
    ]
    with pytest.raises(SettingError, match="step"):
        log.append({"loss": 1.0})


def test_several_rows_arrive_together_or_not_at_all(tmp_path):
    log = MetricsLog(tmp_path)
    log.extend([{"step": 10, "run": 0}, {"step": 10, "run": 1}])
    log.extend([{"step": 20, "run": 0}, {"step": 20, "run": 1, "frozen": "nan"}])
    with pytest.raises(SettingError, match="step"):
        log.extend([{"step": 30, "run": 0}, {"run": 1}])
    assert [(row["step"], row["run"]) for row in read_metrics(tmp_path)] == [(10, 0), (10, 1), (20, 0), (20, 1)]
    assert [row["frozen"] for row in table(tmp_path)] == ["", "", "", "nan"]


def test_resuming_drops_what_will_be_written_again(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (10, 20, 30):
        log.append({"step": step, **({"late": 1} if step == 30 else {})})
    resumed = MetricsLog(tmp_path)
    resumed.truncate(20)
    assert steps(tmp_path) == [10] and table(tmp_path) == [{"step": "10"}]
    resumed.append({"step": 20, "x": 1})
    assert steps(tmp_path) == [10, 20] and table(tmp_path)[1] == {"step": "20", "x": "1"}
    resumed.truncate(0)
    assert steps(tmp_path) == [] and table(tmp_path) == []


@pytest.mark.parametrize("tail", ['{"step": 30, "lo', '{"step": 30}', "\x00\x00\x00", "3", "null\n"])
def test_a_half_written_last_row_is_dropped(tmp_path, tail):
    log = MetricsLog(tmp_path)
    for step in (10, 20):
        log.append({"step": step})
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write(tail)
    with open(tmp_path / "metrics.csv", "a") as stream:
        stream.write("3")
    whole = [10, 20, 30] if tail.endswith("}") else [10, 20]
    assert steps(tmp_path) == whole
    MetricsLog(tmp_path).append({"step": 40})
    assert steps(tmp_path) == [*whole, 40]
    assert [int(row["step"]) for row in table(tmp_path)] == [*whole, 40]


def test_damage_further_up_is_not_passed_over(tmp_path):
    log = MetricsLog(tmp_path)
    log.append({"step": 10})
    log.append({"step": 20})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('{"step": 10}', '{"step": 1'))
    with pytest.raises(DataError, match="line 1"):
        read_metrics(tmp_path)
    with pytest.raises(DataError, match="line 1"):
        MetricsLog(tmp_path)
    assert '{"step": 20}' in path.read_text()


# Progress


def test_plain_lines_are_few_and_the_last_one_is_there(capsys):
    with Progress(100, "focused", start=40, every=60.0) as progress:
        for done in range(50, 101, 10):
            progress.update(done, {"return": jnp.float32(103.25), "loss": 0.1})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"focused 50/100 steps  [\d.e+,]+/s  0:00:\d\d left  return 103.2  loss 0.1", lines[0])
    assert lines[1].startswith("focused 100/100 steps")


def test_rate_and_time_left(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(tracking.time, "monotonic", lambda: now[0])
    with Progress(2000, start=1000, every=0.0) as progress:
        now[0] += 10
        progress.update(1000)
        progress.update(1100)
        now[0] += 10
        progress.update(1200)
    lines = capsys.readouterr().out.splitlines()
    # Nothing is said before something is done.
    assert [line.split("  ")[1:3] for line in lines] == [["10/s", "0:01:30 left"], ["10/s", "0:01:20 left"]]


def test_a_terminal_gets_a_live_bar():
    pty = pytest.importorskip("pty")
    code = """
from gemsjax.tracking import Progress
with Progress(10, "focused", unit="epochs") as progress:
    for done in range(1, 11):
        progress.update(done, {"return": 1.5})
"""
    main, side = pty.openpty()
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(gemsjax.__file__).parents[1]),
        "TERM": "xterm",
        "COLUMNS": "120",
    }
    subprocess.run([sys.executable, "-c", code], stdout=side, env=environment, check=True)
    os.close(side)
    shown = os.read(main, 100_000).decode()
    os.close(main)
    assert "━" in shown and "10/10 epochs" in shown and "return 1.5" in shown


# Trackers


def test_trackers_that_are_not_installed_or_unknown(tmp_path, monkeypatch):
    for track, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(SettingError, match=r"pip install 'gemsjax\[tracking\]'"):
            tracking.open_tracker(track, tmp_path, "name", {})
    with pytest.raises(SettingError, match="did you mean 'wandb'"):
        tracking.open_tracker("wandv", tmp_path, "name", {})
    none = tracking.open_tracker("none", tmp_path, "name", {})
    none.log({"step": 1})
    none.close()


def test_trackers_get_the_numbers(tmp_path, monkeypatch):
    calls: list = []

    class SummaryWriter:
        def __init__(self, *args, **kwargs):
            calls.append(("open", args, kwargs))

        def add_scalar(self, *args):
            calls.append(args)

        def close(self):
            calls.append("close")

    class Run:
        def log(self, row, step):
            calls.append((row, step))

        def finish(self):
            calls.append("finish")

    def init(**given):
        calls.append(given)
        return Run()

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    row = {"step": np.int64(5), "loss": jnp.float32(0.5), "bad": float("nan"), "env": "x"}
    for track in ("tensorboard", "wandb"):
        tracker = tracking.open_tracker(track, tmp_path, "name", CONFIG, resumed_step=4)
        tracker.log(row)
        tracker.close()
    config = {**CONFIG, "widths": [256, 256]}
    assert calls == [
        ("open", (str(tmp_path / "tensorboard"),), {"purge_step": 4}),
        ("loss", 0.5, 5),
        "close",
        {"project": "gemsjax", "name": "name", "dir": str(tmp_path), "config": config},
        ({"loss": 0.5}, 5),
        "finish",
    ]


# Requests to stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_to_stop_and_handlers_come_back(number, capfd):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert "stopping after this epoch" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), StopRequest():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is before


def test_elsewhere_than_in_the_main_thread_nothing_is_installed():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with StopRequest() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
