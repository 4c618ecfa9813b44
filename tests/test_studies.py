"""Studies: one record a run, none run twice, killed and continued, tables made from records only."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro

from experiments import _study, figure2, figure3, influence, table1, table2
from gemsjax import methods
from gemsjax.errors import DataError, SettingError

ROOT = Path(__file__).resolve().parents[1]
FEW = ("random", "sac-topk-ideal")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("study")


def asked(home, kind=table2.Arguments, **changes):
    usual = {"budget": "smoke", "envs": ("focused_topdown",), "methods": FEW}
    places = {"out": home / "results", "runs": home / "runs", "data": home / "logs"}
    return kind(**{**usual, **places, **changes})


@pytest.fixture(scope="module")
def done(home) -> list[dict]:
    """The records of a small table."""
    arguments = asked(home)
    return _study.perform(table2.jobs(arguments), arguments.places)


def test_one_record_a_run_with_what_it_was(done):
    assert [(r["method"], r["seed"]) for r in done] == [
        ("random", None), ("sac-topk-ideal", 58407201), ("sac-topk-ideal", 496912423),
    ]  # fmt: skip
    learner = done[1]
    assert learner["trajectories"] == 60 and [row["step"] for row in learner["validation"]] == [30, 60]
    assert learner["variant"] == "corrected" and learner["privileged"] and learner["test"]["users"] == 20
    assert {"python", "jax"} <= learner["versions"].keys() and learner["seconds"]["train"] > 0
    assert learner["config_hash"] != done[2]["config_hash"]


def test_nothing_is_run_twice(home, done, monkeypatch):
    monkeypatch.setattr(_study, "_train", lambda *_: pytest.fail("it was run again"))
    monkeypatch.setattr(_study, "_evaluate", lambda *_: pytest.fail("it was run again"))
    arguments = asked(home)
    assert _study.perform(table2.jobs(arguments), arguments.places) == done


def test_a_record_outlives_a_new_setting_but_not_another_value(home, done):
    arguments = asked(home)
    one = table2.jobs(arguments)[1]
    path = next(arguments.places.records.glob("SAC_TopK_ideal*seed58407201*"))
    record = json.loads(path.read_text())
    without = json.loads(path.read_text())
    del without["config"]["plan"]["stale"]  # as a version without this setting would have written it
    path.write_text(json.dumps(without))
    try:
        assert _study.find(one, arguments.places) is not None
        other = arguments.job("sac-topk-ideal", "focused_topdown", 58407201, hypers={"gamma": 0.5})
        assert _study.find(other, arguments.places) is None
    finally:
        path.write_text(json.dumps(record, indent=1))


def test_the_table_says_what_the_records_say(home, done):
    written = table2.write(done, home / "table", "table2", "A smoke.")
    text = written.read_text()
    row = next(line for line in text.splitlines() if line.startswith("| Random"))
    assert f"**{done[0]['test']['mean_return']:.1f}" in row  # the only method without privilege is the best of them
    assert "| SAC+TopK (ideal) ‡ |" in text and "[429.0]" in text
    lines = (home / "table" / "table2.csv").read_text().splitlines()
    assert len(lines) == 3 and lines[0].startswith("method,env,privileged,seeds,mean")
    assert (home / "table" / "table2.png").stat().st_size > 5_000


def test_significance_is_marked():
    def record(method, value):
        return {"method": method, "env": "e", "privileged": False, "test": {"mean_return": value, "se_return": 1.0}}

    records = [record("sac-gems", v) for v in (300, 301, 302)] + [record("sac-topk-mf", v) for v in (200, 201, 202)]
    text = table2.markdown(table2.rows(records), "")
    assert "**301.0 ± 2.5**" in text and "201.0 ± 2.5*" in text


def test_a_record_of_something_else_is_refused(home, tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(DataError, match=r"x.json: is not a record of a run: it lacks"):
        _study.read(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"budget": "smal"}, "did you mean 'small'"),
        ({"variant": "publishd"}, "did you mean 'published'"),
        ({"methods": ("sac-gem",)}, "did you mean 'sac-gems'"),
        ({"envs": ("focused",)}, "env"),
        ({"seeds": (3, 3)}, "seeds = .* each once"),
    ],
)
def test_what_is_asked_for_is_checked_first(home, changes, says):
    arguments = asked(home, **changes)
    with pytest.raises(SettingError, match=says):
        _study.perform(table2.jobs(arguments), arguments.places)


def test_a_missing_catalogue_is_named(home, tmp_path):
    with pytest.raises(DataError, match="item_embeddings_focused.npy: there is no such file"):
        table2.jobs(asked(home, catalogues=tmp_path))


def test_killed_and_started_again(tmp_path):
    """SIGTERM in the middle of a run; the same command finishes it, and the records are those of an undisturbed run."""
    arguments = asked(tmp_path, methods=("sac-topk-ideal",), seeds=(7,))
    command = [sys.executable, "-m", "experiments.table2", "--budget", "smoke", "--envs", "focused_topdown"]
    command += ["--methods", "sac-topk-ideal", "--seeds", "7"]
    command += ["--out", str(arguments.out), "--runs", str(arguments.runs), "--data", str(arguments.data)]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not list(arguments.runs.rglob("config.json")) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGTERM)
    first.communicate(timeout=300)
    assert not list(arguments.places.records.glob("*.json")) or first.returncode == 0
    again = _study.perform(table2.jobs(arguments), arguments.places)
    fresh = dataclasses.replace(arguments, out=tmp_path / "other", runs=tmp_path / "other runs")
    whole = _study.perform(table2.jobs(fresh), fresh.places)
    assert again[0]["test"] == whole[0]["test"] and len(list(arguments.places.records.glob("*.json"))) == 1


def test_figures_and_influence_at_smoke(home, done, capsys):
    figure2.main(asked(home, figure2.Arguments, methods=FEW, seeds=(58407201,)))
    influence.main(asked(home, influence.Arguments, methods=FEW, seeds=(58407201,), weights=(0.1, 0.0)))
    figure3.main(
        asked(home, figure3.Arguments, methods=("sac-gems",), seeds=(1,), betas=(1.0,), lambdas=(), widths=(4,))
    )
    says = capsys.readouterr().out
    assert "SAC+TopK (ideal), gamma 0.0: return" in says and "| Random |" in says
    assert "sac-gems,1.0,0.5,4," in says
    assert len(list((home / "results").rglob("*.png"))) >= 3


def test_table1_says_what_the_code_declares():
    rows = {row[0]: row for row in table1.rows()}
    assert len(rows) == len(methods.METHODS)
    assert rows["SAC+GeMS"][1:4] == ("yes", "yes", "") and rows["SAC+TopK (ideal)"][1:4] == ("yes", "", "yes")
    assert rows["Short-term oracle"][1:4] == ("", "", "yes")


@pytest.mark.parametrize("module", [table1, table2, figure2, figure3, influence])
def test_help_is_there(module, capsys):
    with pytest.raises(SystemExit):
        tyro.cli(module.Arguments, args=["--help"])
    assert "--out" in capsys.readouterr().out
