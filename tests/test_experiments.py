"""Commands as a person calls them: the quickstart at its smallest, evaluation, and what wrong settings are told."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest
import tyro

from experiments import benchmark, evaluate, generate_dataset, quickstart, train
from gemsjax import methods, plots, prepare
from gemsjax.agents.references import make_random
from gemsjax.clock import compile_clock
from gemsjax.envs.catalogue import draw_catalogue
from gemsjax.envs.registry import make
from gemsjax.errors import DataError, SettingError
from gemsjax.evaluate import evaluate as play
from gemsjax.evaluate import summarise
from gemsjax.prepare import world_of
from gemsjax.types import Dims

REFERENCES = ["random", "short-term-oracle", "epsilon-greedy-oracle"]


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run a module of this checkout, whichever is installed, in another directory."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    }
    words = [sys.executable, "-m", *arguments]
    return subprocess.run(words, env=environment, cwd=cwd, capture_output=True, text=True)


# -- quickstart --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    home = tmp_path_factory.mktemp("quickstart")
    done = command("experiments.quickstart", "--smoke", "--json", "new/table.json", cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    return home, done


def test_quickstart_writes_the_table_and_the_seconds_of_each_stage(smoke):
    home, _ = smoke
    written = json.loads((home / "new" / "table.json").read_text())
    assert [row["method"] for row in written["table"]] == [*REFERENCES, "sac-gems"]
    for row in written["table"]:
        assert row.keys() == {"env", "method", "users", "mean_return", "se_return"}
        assert row["env"] == "focused_topdown" and row["users"] == 50
        assert 0 < row["mean_return"] < 1000 and row["se_return"] > 0
    assert {"references", "logged_data", "gems_pretraining", "training"} <= written["seconds"].keys()
    assert written["table"][0]["mean_return"] < written["table"][2]["mean_return"]  # random below the logging policy
    assert (written["variant"], written["seed"], written["stream"]) == ("corrected", 58407201, "test")
    assert written["privileged_methods"] == REFERENCES[1:] and written["privileged"] is False
    assert written["versions"]["jax"] == jax.__version__ and written["device"]["count"] >= 1
    run = next((home / "runs" / "quickstart" / "SAC_GeMS").iterdir())
    assert written["config_hash"] == json.loads((run / "result.json").read_text())["config_hash"]


def test_quickstart_shows_what_it_made(smoke):
    home, done = smoke
    pictures = re.findall(r"picture: (\S+\.png)", done.stdout)
    assert len(pictures) == 2
    for picture in pictures:
        assert (home / picture).read_bytes().startswith(b"\x89PNG")
    assert (home / re.search(r"checkpoint: (\S+)", done.stdout).group(1)).is_dir()
    marked = ("Short-term oracle ‡", "Epsilon-greedy oracle ‡", methods.PRIVILEGED)
    for word in ("Random", *marked, "SAC+GeMS", "95 % interval", "temperature started low"):
        assert word in done.stdout


def test_quickstart_marks_privileged_methods_in_its_pictures(smoke, monkeypatch):
    home, _ = smoke
    root, settings = home / "runs" / "quickstart", quickstart.preset(quickstart.Arguments(smoke=True))
    table = dict.fromkeys([*REFERENCES, "sac-gems"], summarise(np.arange(5.0)))
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    quickstart._draw(settings, world_of(settings), next((root / "SAC_GeMS").iterdir()), root, table)
    curve, scores = drawn
    names = [text.get_text().partition(":")[0] for text in curve.axes[0].get_legend().get_texts()[2:]]
    assert names == ["Random", "Short-term oracle ‡", "Epsilon-greedy oracle ‡"]
    assert curve.axes[0].get_title() == "SAC+GeMS in focused_topdown"
    panels = [axes.get_title().partition(" (mean")[0] for axes in scores.axes]
    assert panels == ["Short-term oracle ‡", "SAC+GeMS"]
    for figure in drawn:
        assert [text.get_text() for text in figure.legends[0].get_texts()] == [methods.PRIVILEGED]
        plt.close(figure)


def test_a_second_quickstart_leaves_the_first_alone(smoke):
    home, _ = smoke
    free = quickstart._free(home / "runs" / "quickstart")
    assert (home / "runs" / "quickstart").is_dir() and free == home / "runs" / "quickstart-2"


def test_a_directory_that_is_not_empty_is_refused_at_once(smoke, monkeypatch):
    home, _ = smoke
    monkeypatch.setattr(quickstart, "evaluate", lambda *_, **__: pytest.fail("it was not refused"))
    with pytest.raises(SettingError, match="run directory .* not empty"):
        quickstart.main(quickstart.Arguments(smoke=True, out=home / "runs" / "quickstart"))


def test_a_trained_run_is_evaluated_by_the_command(smoke, capsys):
    home, _ = smoke
    run = next((home / "runs" / "quickstart" / "SAC_GeMS").iterdir())
    out = home / "evaluated.json"
    evaluate.main(evaluate.Arguments(run=run, users=50, json=out))
    row, result = json.loads(out.read_text()), json.loads((run / "result.json").read_text())
    assert {"env", "method", "users", "mean_return", "se_return"} <= row.keys()
    assert row["mean_return"] == pytest.approx(result["mean_return"])
    for fact in ("variant", "privileged", "seed", "config_hash", "stream", "versions"):
        assert row[fact] == result[fact], fact
    assert row["device"]["platform"] == result["device"]["platform"] and row["seconds"]["total"] > 0
    assert "sac-gems in focused_topdown" in capsys.readouterr().out
    with pytest.raises(SettingError, match="--test-stream with --run = 'training' .* configuration says it"):
        evaluate.main(evaluate.Arguments(run=run, test_stream="training"))


# -- evaluate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", REFERENCES)
def test_references_are_evaluated(method, tmp_path, capsys):
    np.save(tmp_path / "items.npy", draw_catalogue(1, num_items=50))
    arguments = evaluate.Arguments(
        method=method,
        env="diffuse_divpen",
        users=3,
        catalogue=str(tmp_path / "items.npy"),
        json=tmp_path / "new" / "r.json",
    )
    evaluate.main(arguments)
    row = json.loads((tmp_path / "new" / "r.json").read_text())
    assert (row["env"], row["method"], row["users"]) == ("diffuse_divpen", method, 3)
    assert row["stream"] == "test" and row["privileged"] == (method != "random") and "variant" not in row
    assert row["versions"]["jax"] == jax.__version__ and row["device"]["count"] >= 1 and row["seconds"]["total"] > 0
    assert ("(privileged)" in capsys.readouterr().out) == (method != "random")


def test_a_reference_is_evaluated_on_the_users_of_a_published_run_if_asked(tmp_path):
    rows = {}
    for stream in (None, "test", "training"):
        evaluate.main(evaluate.Arguments(method="random", users=20, test_stream=stream, json=tmp_path / "r.json"))
        rows[stream] = json.loads((tmp_path / "r.json").read_text())
    assert [row["stream"] for row in rows.values()] == ["test", "test", "training"]
    assert rows[None]["mean_return"] == rows["test"]["mean_return"] != rows["training"]["mean_return"]
    env, params = make("focused_topdown")
    policy = make_random(Dims(env.num_items, env.slate_size, env.horizon))
    assert rows["training"]["mean_return"] == play(env, policy, params, users=20, stream="training").mean


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"method": "randon"}, "did you mean 'random'"),
        ({"method": "random", "env": "focused_topdow"}, "did you mean 'focused_topdown'"),
        ({"method": "sac-gems"}, "has to be trained first"),
        ({"method": "random", "users": 0}, "users = 0 .* at least 1"),
        ({"method": "random", "test_stream": "tests"}, "test_stream = 'tests' .*did you mean 'test'"),
        ({"method": "random", "test_stream": "validation"}, "choose one of test, training"),
        ({}, "--run DIR"),
        ({"method": "random", "run": Path("x")}, "only one of them"),
        ({"run": Path("x"), "test_stream": "test"}, "--test-stream with --run"),
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


def test_every_method_trains_on_as_many_trajectories_as_the_paper():
    """128 users a step: fewer steps, of which the last may go a little beyond."""
    assert [(train.parse(words)[0].steps, train.parse(words)[0].epoch_steps) for words in (
        [], ["--method", "constant-slate"], ["--method", "constant-slate", "--steps", "5", "--epoch-steps", "2"],
    )] == [(100_000, 1_000), (782, 8), (5, 2)]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--gamma 1.5", r"gamma = 1.5 .*\[0, 1\]"),
        ("--gems.beta -1", "gems.beta = -1"),
        ("--steps 0", "steps = 0 .* at least 1"),
        ("--batch-size 20 --replay-capacity 10", "batch_size = 20 .* from 1 to 10"),
        ("--warm-up -5", "warm_up = -5 .* at least 0"),
        ("--variant publishd", "did you mean 'published'"),
        ("--embeddings mf", "embeddings = '?mf.* nothing: SAC.GeMS has none"),
        ("--method sac-topk-mf --embeddings ideal", "embeddings = '?ideal.* one of mf, or a file"),
        ("--test-stream tests", "did you mean 'test'"),
        ("--initial-alpha 0", "initial_alpha = 0.0 .* positive"),
        ("--gems.noise varianz", "did you mean 'variance'"),
        ("--env focused_topdwn", "did you mean 'focused_topdown'"),
        ("--method sac-gem", "did you mean 'sac-gems'"),
        ("--method random", "one that learns"),
        ("--method random --gamma 0.5", "one that learns"),
        ("--seed -1", "seed = -1 .* from 0 to 4294967295"),
        ("--env-settings catalogue 3", "env_settings.catalogue = 3 .* set by --catalogue"),
        ("--catalogue focussed", "one of focused, diffuse, peaked"),
        ("--resume --overwrite", "only one of them"),
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
def test_train_refuses_before_compiling(flags, says, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "pretrained_gems", lambda *_: pytest.fail("it was not refused"))
    world_of(train.parse([])[0])  # what every environment compiles to convert its numbers
    with compile_clock() as clock, pytest.raises(SettingError, match=says):
        train.main(*train.parse(["--out", str(tmp_path), *flags.split()]))
    assert clock.programs == 0
    assert not list(tmp_path.iterdir())


def test_a_misspelt_flag_is_told_the_right_one(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--gama", "0.5"])
    assert "--gamma" in capsys.readouterr().err


@pytest.mark.parametrize("module", [quickstart, evaluate, benchmark, generate_dataset, train])
def test_every_flag_has_its_line_of_help(module, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # one column of boxes
    with pytest.raises(SystemExit) as ended:
        train.parse(["--help"]) if module is train else tyro.cli(module.Arguments, args=["--help"])
    assert not ended.value.code
    says: dict[str, str] = {}
    for line in capsys.readouterr().out.splitlines():
        line = line.strip(" │|")
        if re.match("--[a-z]", line):  # a flag, then (here or below) what it does
            flag, _, text = line.partition("  ")
            says[flag] = text
        elif says and not line.startswith(("─", "╭", "╰")):
            says[flag] += line
    assert len(says) >= (30 if module is train else 3)
    bare = [
        flag for flag, text in says.items() if not text.strip() or text.strip().startswith(("(default", "(required"))
    ]
    assert not bare


# -- benchmark ---------------------------------------------------------------------------------------------------------


def test_the_benchmark_knows_every_figure():
    names = {*benchmark.available(), "compile_cold", "compile_warm"}
    assert {"simulator_random", "simulator_oracle", "logged_users", "gems_pretraining", "train_sac-gems"} <= names
    with pytest.raises(SettingError, match="did you mean 'logged_users'"):
        benchmark.main(benchmark.Arguments(only=("logged_user",)))


def test_the_benchmark_writes_its_json(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "USERS", 200)
    benchmark.main(benchmark.Arguments(only=("simulator_random",), json=tmp_path / "b.json"))
    written = json.loads((tmp_path / "b.json").read_text())
    assert {"device", "gemm_gflops"} <= written["machine"].keys()
    (figure,) = written["figures"]
    assert {"name", "value", "unit", "floor_fraction"} <= figure.keys()
    assert figure["name"] == "simulator_random" and figure["value"] > 0 and 0 < figure["floor_fraction"] < 1
