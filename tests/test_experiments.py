"""Commands as a person calls them: the quickstart at its smallest, evaluation, and what wrong settings are told."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import benchmark, evaluate, quickstart, train
from gemsjax import tracking
from gemsjax.clock import compile_clock
from gemsjax.envs.catalogue import draw_catalogue
from gemsjax.errors import DataError, SettingError
from gemsjax.prepare import world_of

REFERENCES = ["random", "short-term-oracle", "epsilon-greedy-oracle"]


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    words = [sys.executable, "-m", *arguments]
    return subprocess.run(words, env=environment, cwd=cwd, capture_output=True, text=True)


# -- quickstart --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    home = tmp_path_factory.mktemp("quickstart")
    done = command("experiments.quickstart", "--smoke", "--json", "table.json", cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    return home, done


def test_quickstart_writes_the_table_and_the_seconds_of_each_stage(smoke):
    home, _ = smoke
    written = json.loads((home / "table.json").read_text())
    assert [row["method"] for row in written["table"]] == [*REFERENCES, "sac-gems"]
    for row in written["table"]:
        assert row.keys() == {"env", "method", "users", "mean_return", "se_return"}
        assert row["env"] == "focused_topdown" and row["users"] == 50
        assert 0 < row["mean_return"] < 1000 and row["se_return"] > 0
    assert {"references", "logged_data", "gems_pretraining", "training"} <= written["seconds"].keys()
    assert written["table"][0]["mean_return"] < written["table"][2]["mean_return"]  # random below the logging policy


def test_quickstart_shows_what_it_made(smoke):
    home, done = smoke
    pictures = re.findall(r"picture: (\S+\.png)", done.stdout)
    assert len(pictures) == 2
    for picture in pictures:
        assert (home / picture).read_bytes().startswith(b"\x89PNG")
    assert (home / re.search(r"checkpoint: (\S+)", done.stdout).group(1)).is_dir()
    for word in ("Random", "Short-term oracle *", "SAC+GeMS", "95 % interval", "temperature started low"):
        assert word in done.stdout


def test_a_second_quickstart_leaves_the_first_alone(smoke):
    home, _ = smoke
    free = quickstart._free(home / "runs" / "quickstart")
    assert (home / "runs" / "quickstart").is_dir() and free == home / "runs" / "quickstart-2"


def test_a_trained_run_is_evaluated_by_the_command(smoke, capsys):
    home, _ = smoke
    run = next((home / "runs" / "quickstart" / "SAC_GeMS").iterdir())
    out = home / "evaluated.json"
    evaluate.main(evaluate.Arguments(run=run, users=50, json=out))
    row, result = json.loads(out.read_text()), json.loads((run / "result.json").read_text())
    assert {"env", "method", "users", "mean_return", "se_return"} <= row.keys()
    assert row["mean_return"] == pytest.approx(result["mean_return"])
    assert "sac-gems in focused_topdown" in capsys.readouterr().out


# -- evaluate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", REFERENCES)
def test_references_are_evaluated(method, tmp_path, capsys):
    np.save(tmp_path / "items.npy", draw_catalogue(1, num_items=50))
    arguments = evaluate.Arguments(
        method=method, env="diffuse_divpen", users=3, catalogue=str(tmp_path / "items.npy"), json=tmp_path / "r.json"
    )
    evaluate.main(arguments)
    row = json.loads((tmp_path / "r.json").read_text())
    assert (row["env"], row["method"], row["users"]) == ("diffuse_divpen", method, 3)
    assert ("(privileged)" in capsys.readouterr().out) == (method != "random")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"method": "randon"}, "did you mean 'random'"),
        ({"method": "random", "env": "focused_topdow"}, "did you mean 'focused_topdown'"),
        ({"method": "sac-gems"}, "has to be trained first"),
        ({"method": "random", "users": 0}, "users = 0 .* at least 1"),
        ({}, "--run DIR"),
        ({"method": "random", "run": Path("x")}, "only one of them"),
        ({"run": Path("nowhere")}, "nowhere"),
        ({"method": "random", "catalogue": "nowhere.npy"}, "nowhere.npy"),
    ],
)
def test_evaluate_refuses_before_compiling(arguments, says):
    with compile_clock() as clock, pytest.raises((SettingError, DataError), match=says):
        evaluate.main(evaluate.Arguments(**arguments))
    assert clock.programs == 0


def test_errors_are_one_line_on_the_terminal(tmp_path):
    done = command("experiments.evaluate", "--method", "random", "--env", "focussed_mix", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: environment = 'focussed_mix'") and done.stderr.count("\n") == 1


# -- train -------------------------------------------------------------------------------------------------------------


def test_flags_reach_the_settings():
    flags = "--seed 7 --gamma 0.5 --warm-up 30 --hidden 32 --gems.beta 0.2 --gems.noise variance --gems.no-shuffle"
    settings, where = train.parse([*flags.split(), "--resume", "--env-settings", "influence", "0.05"])
    assert (settings.seed, settings.hypers.gamma, settings.plan.warm_up, settings.spec.hidden) == (7, 0.5, 30, 32)
    assert (settings.gems.beta, settings.gems.noise, settings.gems.shuffle) == (0.2, "variance", False)
    assert settings.env_settings == {"influence": 0.05} and where.resume
    assert float(world_of(settings).params.influence) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--gamma 1.5", r"gamma = 1.5 .*\[0, 1\]"),
        ("--gems.beta -1", "gems.beta = -1"),
        ("--steps 0", "steps = 0 .* at least 1"),
        ("--batch-size 20 --replay-capacity 10", "batch_size = 20 .* from 1 to 10"),
        ("--warm-up 5", "warm_up = 5 .* batch"),
        ("--initial-alpha 0", "initial_alpha = 0.0 .* positive"),
        ("--gems.noise varianz", "did you mean 'variance'"),
        ("--env focused_topdwn", "did you mean 'focused_topdown'"),
        ("--method sac-gem", "did you mean 'sac-gems'"),
        ("--method random", "one that learns"),
        ("--env-settings slate_size 2000", "slate_size = 2000 .* 1000"),
        ("--env-settings influense 0.1", "did you mean 'influence'"),
        ("--env-settings num_items -5", "num_items = -5"),
        ("--users-per-step 3", "replay_capacity = 10000 .* multiple of users_per_step = 3"),
        ("--hidden 0", "hidden = 0 .* at least 1"),
        ("--entropy-target nan", "entropy_target = nan .* finite"),
        ("--gems.click-weight inf", "gems.click_weight = inf .* finite"),
        ("--gems.hidden 0", "gems.hidden"),
        ("--env-settings horizon 5 --gems.users 10", "gems.users = 10 .* one batch"),
        ("--track tensorbord", "did you mean 'tensorboard'"),
    ],
)
def test_train_refuses_before_compiling(flags, says):
    with compile_clock() as clock, pytest.raises(SettingError, match=says):
        settings, where = train.parse(flags.split())
        tracking.check_tracker(where.track)
        world_of(settings)
    assert clock.programs == 0


def test_a_misspelt_flag_is_told_the_right_one(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--gama", "0.5"])
    assert "--gamma" in capsys.readouterr().err


# -- benchmark ---------------------------------------------------------------------------------------------------------


def test_the_benchmark_knows_every_figure():
    names = {*benchmark.available(), "compile_cold", "compile_warm"}
    assert {"simulator_random", "simulator_oracle", "logged_users", "gems_pretraining", "train_sac-gems"} <= names
    with pytest.raises(SettingError, match="did you mean 'logged_users'"):
        benchmark.main(benchmark.Arguments(only=("logged_user",)))


def test_the_benchmark_writes_its_json(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "USERS", 200)
    monkeypatch.setattr(benchmark, "REPEATS", 2)
    benchmark.main(benchmark.Arguments(only=("simulator_random",), json=tmp_path / "b.json"))
    written = json.loads((tmp_path / "b.json").read_text())
    assert {"device", "gemm_gflops"} <= written["machine"].keys()
    (figure,) = written["figures"]
    assert {"name", "value", "unit", "floor_fraction"} <= figure.keys()
    assert figure["name"] == "simulator_random" and figure["value"] > 0 and 0 < figure["floor_fraction"] < 1
