"""A run on disk: what is written, reuse, resuming (bitwise), refusals, damage, NaN, and a process that is killed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemsjax import checkpoint, prepare, runs, tracking
from gemsjax.agents.sac import SACHypers, SACSpec
from gemsjax.errors import DataError, SettingError, TrainingError
from gemsjax.evaluate import evaluate
from gemsjax.rankers.gems import GeMSWeights
from gemsjax.settings import GeMSSettings, TrainSettings
from gemsjax.train import Plan

TINY = TrainSettings(
    steps=12,
    epoch_steps=4,
    test_users=6,
    env_settings={"num_items": 40, "slate_size": 4, "horizon": 10},
    plan=Plan(batch_size=2, replay_capacity=8, warm_up=4, validation_users=4),
    spec=SACSpec(hidden=16),
    gems=GeMSSettings(users=40, epochs=2, hidden=(16, 8), latent_dim=3, batch_size=32),
).resolved()
NAME = Path("SAC_GeMS") / "focused_topdown_KL1.0_click0.5_seed58407201"


@pytest.fixture(scope="module")
def world():
    return prepare.world_of(TINY)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def weights(world, home) -> GeMSWeights:
    return prepare.pretrained_gems(TINY, world, home, lambda: prepare.logged_data(TINY, world, home / "logs"))


@pytest.fixture(scope="module")
def whole(world, weights, home) -> runs.Outcome:
    """An uninterrupted run."""
    return runs.train(TINY, world, weights, home)


def same(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def final_state(directory: Path) -> dict[str, bytes]:
    """Every array of the newest checkpoint."""
    settings = TINY
    world = prepare.world_of(settings)
    agent = runs.make_agent(settings, world.dims)
    like = runs.Run(jax.random.key(0), prepare.as_arrays(settings.hypers), blank(world), world.params)
    training = runs.make_training(world.env, agent, settings.plan)
    tree = checkpoint.restore(directory / "checkpoints", (jax.eval_shape(training.init, like), like)).tree
    return jax.tree.map(lambda x: np.asarray(jax.random.key_data(x) if x.dtype == like.key.dtype else x), tree)


def blank(world) -> GeMSWeights:
    params = jax.jit(runs.make_pretraining(TINY.gems.spec, world.dims).init)(jax.random.key(0)).params
    return GeMSWeights(params, jnp.zeros(3), jnp.zeros(3))


def rows(directory: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in tracking.read_metrics(directory)]


class StoppedError(Exception):
    """Raised where data is asked for."""


def stop_after(step: int):
    """Ask for a stop the way a person does, once the epoch that ends at `step` is written."""

    def on_epoch(row):
        if row["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return on_epoch


# -- what is there -----------------------------------------------------------------------------------------------------


def test_what_a_run_leaves(whole, home):
    assert whole.directory == home / NAME
    for name in ("config.json", "metrics.jsonl", "metrics.csv", "checkpoints/step_00000012", "result.json"):
        assert (whole.directory / name).exists(), name
    assert [row["step"] for row in rows(whole.directory)] == [4, 8, 12]
    result = json.loads((whole.directory / "result.json").read_text())
    assert {"env", "method", "users", "mean_return", "se_return"} <= result.keys()
    assert result["mean_return"] == whole.test.mean and result["users"] == 6
    assert runs.name_of(TINY).full == "SAC_GeMS_focused_topdown_KL1.0_click0.5_seed58407201"


def test_a_pretrained_gems_is_found_again(world, weights, home):
    again = prepare.pretrained_gems(TINY, world, home, lambda: pytest.fail("it was trained again"))
    assert same(again, weights)


def test_another_setting_is_another_gems(world, weights, home):
    other = dataclasses.replace(TINY, gems=dataclasses.replace(TINY.gems, beta=0.5))
    with pytest.raises(StoppedError):
        prepare.pretrained_gems(other, world, home, lambda: (_ for _ in ()).throw(StoppedError))


def test_interrupted_pretraining_continues_to_the_same_weights(world, weights, home, tmp_path, monkeypatch):
    data = lambda: prepare.logged_data(TINY, world, home / "logs")  # noqa: E731
    monkeypatch.setattr(tracking.StopRequest, "requested", True, raising=False)
    monkeypatch.setattr(tracking.StopRequest, "__init__", lambda self: None)
    monkeypatch.setattr(tracking.StopRequest, "__enter__", lambda self: self)
    monkeypatch.setattr(tracking.StopRequest, "__exit__", lambda self, *_: None)
    with pytest.raises(KeyboardInterrupt, match="epoch 1 of GeMS"):
        prepare.pretrained_gems(TINY, world, tmp_path, data)
    monkeypatch.undo()
    assert same(prepare.pretrained_gems(TINY, world, tmp_path, data), weights)


# -- resuming ----------------------------------------------------------------------------------------------------------


def test_stopped_and_resumed_is_bitwise_the_same(world, weights, whole, tmp_path):
    stopped = runs.train(TINY, world, weights, tmp_path, on_epoch=stop_after(8))
    assert stopped.test is None and rows(stopped.directory)[-1]["step"] == 8
    resumed = runs.train(TINY, world, weights, tmp_path, resume=True)
    assert rows(resumed.directory) == rows(whole.directory)
    assert same(final_state(resumed.directory), final_state(whole.directory))
    np.testing.assert_array_equal(resumed.test.returns, whole.test.returns)


def test_a_damaged_newest_checkpoint_costs_an_epoch_and_no_more(world, weights, whole, tmp_path):
    stopped = runs.train(TINY, world, weights, tmp_path, on_epoch=stop_after(8))
    file = max((stopped.directory / "checkpoints" / "step_00000008").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="going back to the checkpoint of step 4"):
        resumed = runs.train(TINY, world, weights, tmp_path, resume=True)
    assert rows(resumed.directory) == rows(whole.directory)
    assert same(final_state(resumed.directory), final_state(whole.directory))


def test_a_run_may_be_made_longer(world, weights, whole, tmp_path):
    short = dataclasses.replace(TINY, steps=8)
    runs.train(short, world, weights, tmp_path)
    longer = runs.train(TINY, world, weights, tmp_path, resume=True)
    assert rows(longer.directory) == rows(whole.directory)


def test_an_existing_run_is_refused_without_a_flag(world, weights, whole, home):
    with pytest.raises(SettingError, match="--resume.*--overwrite"):
        runs.train(TINY, world, weights, home)
    assert (whole.directory / "result.json").exists()


def test_resuming_another_configuration_is_refused_by_name(world, weights, whole, home):
    other = dataclasses.replace(TINY, hypers=SACHypers(gamma=0.5))
    with pytest.raises(DataError, match="hypers.gamma is 0.8 there and 0.5 here"):
        runs.train(other, world, weights, home, resume=True)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_resumes_to_the_same_result(sent, whole, home, tmp_path):
    """The real command, ended from outside after its first epoch."""
    flags = ["--steps", "12", "--epoch-steps", "4", "--test-users", "6", "--batch-size", "2", "--hidden", "16"]
    flags += ["--replay-capacity", "8", "--warm-up", "4", "--validation-users", "4", "--gems.users", "40"]
    flags += ["--gems.epochs", "2", "--gems.hidden", "16", "8", "--gems.latent-dim", "3", "--gems.batch-size", "32"]
    flags += ["--env-settings", "num_items", "40", "slate_size", "4", "horizon", "10", "--data", str(home / "logs")]
    command = [sys.executable, "-m", "experiments.train", *flags, "--out", str(tmp_path)]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_NUM_CPU_DEVICES": "1",
    }
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics, deadline = tmp_path / NAME / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text().count("\n")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(sent)
    process.wait(timeout=120)
    process.stdout.close()
    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows(tmp_path / NAME) == rows(whole.directory)
    assert same(final_state(tmp_path / NAME), final_state(whole.directory))


# -- trouble -----------------------------------------------------------------------------------------------------------


def test_nan_stops_the_run_with_step_and_loss_and_keeps_the_last_checkpoint(world, weights, tmp_path):
    # Actions so large that the critics' errors overflow at the first update; the warm-up has none.
    wild = weights.replace(scale=jnp.full(3, 1e30))
    with pytest.raises(TrainingError, match=r"step 4: critic_loss is (nan|inf); the checkpoint of 4 stays"):
        runs.train(TINY, world, wild, tmp_path)
    assert checkpoint.latest_step(tmp_path / NAME / "checkpoints") == 4
    assert [row["step"] for row in rows(tmp_path / NAME)] == [4]
    assert runs.load(tmp_path / NAME).step == 4


def test_nan_in_pretraining_stops_it(world, home, tmp_path):
    wild = dataclasses.replace(TINY, gems=dataclasses.replace(TINY.gems, click_weight=1e39))
    data = lambda: prepare.logged_data(TINY, world, home / "logs")  # noqa: E731
    with pytest.raises(TrainingError, match=r"batch \d+: \w+ is (nan|inf)"):
        prepare.pretrained_gems(wild, world, tmp_path, data)


def test_a_loaded_policy_gives_the_test_result_again(whole):
    trained = runs.load(whole.directory)
    tested = evaluate(trained.world.env, trained.agent.greedy, trained.world.params, trained.acting, users=6)
    np.testing.assert_array_equal(tested.returns, whole.test.returns)


def test_a_run_cannot_end_before_what_it_has(world, weights, whole, home):
    with pytest.raises(SettingError, match="steps = 8 .* at least the 12"):
        runs.train(dataclasses.replace(TINY, steps=8), world, weights, home, resume=True)


def test_a_changed_catalogue_is_another_run(world, weights, whole, home):
    items = world.params.item_embeddings.at[0, 0].add(0.01)
    other = world._replace(params=dataclasses.replace(world.params, item_embeddings=items))
    with pytest.raises(DataError, match="items"):
        runs.train(TINY, other, weights, home, resume=True)


def test_load_names_what_is_wrong(tmp_path):
    with pytest.raises(DataError, match="config.json"):
        runs.load(tmp_path)
