"""A run on disk: what is written, reuse, resuming (bitwise), refusals, damage, NaN, and a process that is killed."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import train
from gemsjax import checkpoint, datasets, prepare, runs, tracking
from gemsjax.agents.sac import SACHypers, SACSpec
from gemsjax.clock import compile_clock
from gemsjax.errors import DataError, SettingError, TrainingError
from gemsjax.evaluate import evaluate
from gemsjax.pretrain.gems import make_pretraining
from gemsjax.rankers.gems import GeMSWeights
from gemsjax.settings import GeMSSettings, TrainSettings, from_config
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
    agent = runs.make_agent(settings, world)
    like = runs.Run(jax.random.key(0), prepare.as_arrays(settings.hypers), blank(world), world.params)
    training = runs.make_training(world.env, agent, settings.plan)
    tree = checkpoint.restore(directory / "checkpoints", (jax.eval_shape(training.init, like), like)).tree
    return jax.tree.map(lambda x: np.asarray(jax.random.key_data(x) if x.dtype == like.key.dtype else x), tree)


def blank(world) -> GeMSWeights:
    params = jax.jit(make_pretraining(TINY.gems.spec, world.dims).init)(jax.random.key(0)).params
    return GeMSWeights(params, jnp.zeros(3), jnp.zeros(3))


def rows(directory: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in tracking.read_metrics(directory)]


def result(directory: Path) -> dict:
    """The test's, without how long it all took."""
    return {k: v for k, v in json.loads((directory / "result.json").read_text()).items() if k != "seconds"}


def assert_same_run(one: Path, other: Path) -> None:
    """The same metrics, weights, replay, optimisers and keys, and the same test."""
    assert rows(one) == rows(other)
    assert same(final_state(one), final_state(other))
    assert result(one) == result(other)


def copied(whole: runs.Outcome, root: Path) -> Path:
    """A copy of the uninterrupted run below `root`, to be continued or damaged."""
    shutil.copytree(whole.directory, root / NAME)
    return root / NAME


def gems_directory(root: Path) -> Path:
    return next((root / "GeMS").iterdir())


@pytest.mark.slow
def test_more_epochs_compile_nothing_more(whole, world, weights, tmp_path):
    """Of pre-training, training with its validations, checkpoints and the test: each program once, however long."""
    counts = []
    for epochs in (1, 3):
        gems = dataclasses.replace(TINY.gems, epochs=epochs)
        settings, root = dataclasses.replace(TINY, steps=4 * epochs, gems=gems), tmp_path / str(epochs)
        logged = prepare.logged_data(settings, world, tmp_path / "logs")
        with compile_clock() as clock:
            fresh = prepare.pretrained_gems(settings, world, root, lambda logged=logged: logged)
            outcome = runs.train(settings, world, fresh, root)
        assert outcome.test is not None
        counts.append(clock.programs)
    assert counts[0] == counts[1] > 0


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
    tested = json.loads((whole.directory / "result.json").read_text())
    assert {"env", "method", "users", "mean_return", "se_return"} <= tested.keys()
    assert tested["mean_return"] == whole.test.mean and tested["users"] == 6
    assert (tested["variant"], tested["seed"], tested["stream"]) == ("corrected", TINY.seed, "test")
    assert not tested["privileged"] and {"python", "gemsjax", "jax", "jaxlib"} <= tested["versions"].keys()
    assert tested["device"]["count"] == jax.local_device_count() and tested["precision"] == "default"
    assert all(tested["seconds"][part] > 0 for part in ("compile", "train", "test"))
    manifest = checkpoint.newest_manifest(whole.directory / "checkpoints")[1]
    assert tested["config_hash"] == manifest["config_hash"]
    assert runs.name_of(TINY).full == "SAC_GeMS_focused_topdown_KL1.0_click0.5_seed58407201"
    assert from_config(tracking.read_config(whole.directory)) == TINY


def test_metrics_have_a_row_an_epoch(whole):
    written = rows(whole.directory)
    assert "critic_loss" not in written[0]  # the first four episodes are the warm-up
    for name in ("return", "validation", "validation_se", "best_validation", "critic_loss", "policy_loss", "alpha"):
        assert np.isfinite(written[-1][name])
    best = np.maximum.accumulate([row["validation"] for row in written])
    np.testing.assert_allclose([row["best_validation"] for row in written], best)
    with open(whole.directory / "metrics.csv", newline="") as table:
        assert [int(row["step"]) for row in csv.DictReader(table)] == [4, 8, 12]


def test_a_pretrained_gems_is_found_again(world, weights, home):
    again = prepare.pretrained_gems(TINY, world, home, lambda: pytest.fail("it was trained again"))
    assert same(again, weights)


def test_gems_is_what_its_epochs_give(world, weights, home):
    """Nothing is left out between the compiled pieces: all batches of both epochs, then the bounds of the codes."""
    pretraining = make_pretraining(TINY.gems.spec, world.dims)
    logged = prepare.logged_data(TINY, world, home / "logs")
    everyone, validation, training = map(prepare.on_device, (logged, *datasets.split(logged)))
    key = jax.random.fold_in(jax.random.key(TINY.seed), prepare.PRETRAINING)
    hypers = prepare.as_arrays(TINY.gems.hypers)
    updates, validate = jax.jit(pretraining.updates, donate_argnums=0), jax.jit(pretraining.validate, donate_argnums=0)
    state = jax.jit(pretraining.init)(jax.random.fold_in(key, prepare.PRETRAINING))
    for epoch in range(2):
        batches = np.arange(36 * 10 // 32, dtype=np.int32)
        state, _ = updates(state, hypers, key, training, jnp.int32(epoch), batches)
        state, _ = validate(state, hypers, validation)
    assert same(jax.jit(pretraining.bounds)(state.best_params, everyone), weights)


def worse_in_epoch_2(spec, dims):
    """GeMS whose validation loss rises in its second epoch."""
    pretraining = make_pretraining(spec, dims)

    def validate(state, hypers, slates):
        times = jnp.where(jnp.isfinite(state.best_loss), 3.0, 1.0)
        return pretraining.validate(
            state.replace(params=jax.tree.map(lambda x: times * x, state.params)), hypers, slates
        )

    return pretraining._replace(validate=validate)


def test_the_epoch_that_validates_best_is_taken(world, home, tmp_path, monkeypatch):
    data = lambda: prepare.logged_data(TINY, world, home / "logs")  # noqa: E731
    monkeypatch.setattr(prepare.gems, "make_pretraining", worse_in_epoch_2)
    once = dataclasses.replace(TINY, gems=dataclasses.replace(TINY.gems, epochs=1))
    best = prepare.pretrained_gems(once, world, tmp_path / "one epoch", data)
    both = prepare.pretrained_gems(TINY, world, tmp_path / "two epochs", data)
    losses = [row["validation_loss"] for row in tracking.read_metrics(gems_directory(tmp_path / "two epochs"))]
    assert losses[0] < losses[1]
    assert same(both, best)


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


def test_a_stop_in_the_last_epoch_of_pretraining_is_not_forgotten(world, home, tmp_path, monkeypatch):
    """What was asked to stop must not go on to train for hours; but GeMS is finished, and kept."""
    once = dataclasses.replace(TINY, gems=dataclasses.replace(TINY.gems, epochs=1))

    def stopped_while_validating(spec, dims):
        pretraining = make_pretraining(spec, dims)

        def validate(*arguments):  # is called once, to be compiled, when all batches are done
            os.kill(os.getpid(), signal.SIGTERM)
            return pretraining.validate(*arguments)

        return pretraining._replace(validate=validate)

    monkeypatch.setattr(prepare.gems, "make_pretraining", stopped_while_validating)
    with pytest.raises(KeyboardInterrupt, match="GeMS is pre-trained and kept"):
        prepare.pretrained_gems(once, world, tmp_path, lambda: prepare.logged_data(TINY, world, home / "logs"))
    prepare.pretrained_gems(once, world, tmp_path, lambda: pytest.fail("GeMS was finished"))


def test_pretraining_killed_in_its_first_checkpoint_starts_anew(world, weights, home, tmp_path):
    directory = tmp_path / gems_directory(home).relative_to(home)
    (directory / "checkpoints" / ".step_00000001.tmp" / "arrays").mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl"):  # its row is written before its checkpoint
        shutil.copy(gems_directory(home) / name, directory)
    data = lambda: prepare.logged_data(TINY, world, home / "logs")  # noqa: E731
    assert same(prepare.pretrained_gems(TINY, world, tmp_path, data), weights)
    assert rows(directory) == rows(gems_directory(home))


def test_too_little_logged_data_for_a_batch_is_refused_before_any_is_made():
    """Nine of ten users train, ten turns each: 90 slates."""
    for batch_size in (90, 91):
        few = dataclasses.replace(TINY, gems=dataclasses.replace(TINY.gems, users=10, batch_size=batch_size))
        with pytest.raises(SettingError, match="gems.users = 10 .* batch of 91") if batch_size > 90 else nullcontext():
            prepare.world_of(few)


# -- resuming ----------------------------------------------------------------------------------------------------------


def test_stopped_and_resumed_is_bitwise_the_same(world, weights, whole, tmp_path):
    stopped = runs.train(TINY, world, weights, tmp_path, on_epoch=stop_after(8))
    assert stopped.test is None and rows(stopped.directory)[-1]["step"] == 8
    resumed = runs.train(TINY, world, weights, tmp_path, resume=True)
    assert_same_run(resumed.directory, whole.directory)
    np.testing.assert_array_equal(resumed.test.returns, whole.test.returns)


def test_a_damaged_newest_checkpoint_costs_an_epoch_and_no_more(world, weights, whole, tmp_path):
    directory = copied(whole, tmp_path)
    file = max((directory / "checkpoints" / "step_00000012").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="going back to the checkpoint of step 8"):
        runs.train(TINY, world, weights, tmp_path, resume=True)
    assert_same_run(directory, whole.directory)


def test_a_run_without_an_undamaged_checkpoint_is_not_started_anew(world, weights, whole, tmp_path):
    directory = copied(whole, tmp_path)
    for manifest in (directory / "checkpoints").rglob("manifest.json"):
        manifest.unlink()
    with pytest.raises(DataError, match="holds no usable checkpoint"):
        runs.train(TINY, world, weights, tmp_path, resume=True)
    assert len(rows(directory)) == 3


def test_a_run_killed_in_its_first_checkpoint_resumes(world, weights, whole, tmp_path):
    directory = copied(whole, tmp_path)
    (directory / "result.json").unlink()
    shutil.rmtree(directory / "checkpoints")
    (directory / "checkpoints" / ".step_00000004.tmp" / "arrays").mkdir(parents=True)
    runs.train(TINY, world, weights, tmp_path, resume=True)
    assert_same_run(directory, whole.directory)


def test_a_run_may_be_made_longer(world, weights, whole, tmp_path):
    short = dataclasses.replace(TINY, steps=8)
    runs.train(short, world, weights, tmp_path)
    longer = runs.train(TINY, world, weights, tmp_path, resume=True)
    assert_same_run(longer.directory, whole.directory)
    assert from_config(tracking.read_config(longer.directory)).steps == 12


def test_overwriting_begins_anew(world, weights, whole, tmp_path):
    directory = copied(whole, tmp_path)
    stopped = runs.train(TINY, world, weights, tmp_path, overwrite=True, on_epoch=stop_after(4))
    assert stopped.test is None and not (directory / "result.json").exists()
    assert [row["step"] for row in rows(directory)] == [4]
    assert checkpoint.latest_step(directory / "checkpoints") == 4


def test_an_existing_run_is_refused_without_a_flag(world, weights, whole, home):
    with pytest.raises(SettingError, match="--resume.*--overwrite"):
        runs.train(TINY, world, weights, home)
    assert (whole.directory / "result.json").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hypers": SACHypers(gamma=0.5)}, "hypers.gamma is 0.8 there and 0.5 here"),
        ({"epoch_steps": 6}, "epoch_steps is 4 there and 6 here"),
        ({"plan": dataclasses.replace(TINY.plan, warm_up=5)}, "plan.warm_up is 4 there and 5 here"),
        (
            {"env_settings": TINY.env_settings | {"influence": 0.2}},
            "env_settings.influence is absent there and 0.2 here",
        ),
    ],
)
def test_resuming_another_configuration_is_refused_by_name(world, weights, whole, home, change, says):
    config = (whole.directory / "config.json").read_text()
    with pytest.raises(DataError, match=f"another configuration: {says}$"):
        runs.train(dataclasses.replace(TINY, **change), world, weights, home, resume=True)
    assert (whole.directory / "config.json").read_text() == config


@pytest.mark.parametrize("sent", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_killed_process_resumes_to_the_same_result(sent, whole, home, tmp_path):
    """The real command, ended from outside after its first epoch. Its flags name the GeMS of the uninterrupted run."""
    shutil.copytree(home / "GeMS", tmp_path / "GeMS")
    flags = ["--steps", "12", "--epoch-steps", "4", "--test-users", "6", "--batch-size", "2", "--hidden", "16"]
    flags += ["--replay-capacity", "8", "--warm-up", "4", "--validation-users", "4", "--gems.users", "40"]
    flags += ["--gems.epochs", "2", "--gems.hidden", "16", "8", "--gems.latent-dim", "3", "--gems.batch-size", "32"]
    flags += [
        "--env-settings",
        "num_items",
        "40",
        "slate_size",
        "4",
        "horizon",
        "10",
        "--data",
        str(tmp_path / "no logs"),
    ]
    command = [sys.executable, "-m", "experiments.train", *flags, "--out", str(tmp_path)]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_NUM_CPU_DEVICES": str(jax.local_device_count()),
    }
    here = Path(__file__).parents[1]
    process = subprocess.Popen(
        command, cwd=here, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    metrics, deadline = tmp_path / NAME / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text().count("\n")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(sent)
    said = process.communicate(timeout=120)[0]
    assert not (tmp_path / NAME / "result.json").exists(), "it was finished before the signal"
    if sent == signal.SIGINT:
        assert process.returncode == 130 and "the same command with --resume continues" in said
    done = subprocess.run([*command, "--resume"], cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "no logs").exists()
    assert (tmp_path / NAME / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert_same_run(tmp_path / NAME, whole.directory)


# -- trouble -----------------------------------------------------------------------------------------------------------


def test_nan_stops_the_run_with_step_and_loss_and_keeps_the_last_checkpoint(world, weights, tmp_path):
    # Actions so large that the critics' errors overflow at the first update; the warm-up has none.
    wild = weights.replace(scale=jnp.full(3, 1e30, jnp.float32))  # a weak type would compile again
    with pytest.raises(TrainingError, match=r"step 4: critic_loss is (nan|inf); the checkpoint of 4 stays"):
        runs.train(TINY, world, wild, tmp_path)
    assert checkpoint.latest_step(tmp_path / NAME / "checkpoints") == 4
    assert [row["step"] for row in rows(tmp_path / NAME)] == [4]
    assert runs.load(tmp_path / NAME).step == 4


def test_nan_in_pretraining_stops_it(world, home, tmp_path, monkeypatch):
    hypers = TINY.gems.hypers.replace(beta=float("inf"))
    monkeypatch.setattr(GeMSSettings, "hypers", property(lambda self: hypers))
    data = lambda: prepare.logged_data(TINY, world, home / "logs")  # noqa: E731
    with pytest.raises(TrainingError, match=r"^batch 0: loss is inf; there was no checkpoint yet"):
        prepare.pretrained_gems(TINY, world, tmp_path, data)


def test_gems_that_is_not_finite_is_not_saved(world, home, tmp_path, monkeypatch):
    """The last update of an epoch may spoil the weights although all losses were finite."""

    def spoiled(spec, dims):
        pretraining = make_pretraining(spec, dims)

        def validate(state, hypers, slates):
            params = jax.tree.map(lambda x: x * jnp.nan, state.params)
            return pretraining.validate(state.replace(params=params), hypers, slates)

        return pretraining._replace(validate=validate)

    monkeypatch.setattr(prepare.gems, "make_pretraining", spoiled)
    data = lambda: prepare.logged_data(TINY, world, home / "logs")  # noqa: E731
    with pytest.raises(TrainingError, match=r"^epoch 1: \w+ is nan; there was no checkpoint yet"):
        prepare.pretrained_gems(TINY, world, tmp_path, data)


def test_weights_that_are_not_finite_are_not_saved(world, weights, tmp_path, monkeypatch):
    """As above: only the next loss would show it, and then the checkpoint would be worthless.

    Spoiled before the warm-up, in which nothing is computed from this one.
    """
    compiled = runs._Driver._compile

    def spoiled(driver, length):
        program = compiled(driver, length)

        def epoch(run, state, numbers):
            params = state.agent.params.replace(log_alpha=jnp.float32(jnp.nan))
            return program(run, state.replace(agent=state.agent.replace(params=params)), numbers)

        return epoch

    monkeypatch.setattr(runs._Driver, "_compile", spoiled)
    with pytest.raises(TrainingError, match="^step 3: a weight is nan; there was no checkpoint yet"):
        runs.train(TINY, world, weights, tmp_path)
    assert rows(tmp_path / NAME) == [] and not prepare.has_checkpoints(tmp_path / NAME)


def test_the_first_value_that_is_not_finite_is_named(tmp_path):
    good, late, early = np.zeros(5), np.zeros(5), np.zeros(5)
    late[3], early[1:] = np.inf, np.nan
    prepare.require_finite({"a": good}, 100, "step", tmp_path)
    with pytest.raises(TrainingError, match="^step 101: c is nan; there was no checkpoint yet"):
        prepare.require_finite({"a": good, "b": late, "c": early}, 100, "step", tmp_path)


def test_a_loaded_policy_gives_the_test_result_again(whole):
    trained = runs.load(whole.directory)
    tested = evaluate(trained.world.env, trained.agent.greedy, trained.world.params, trained.acting, users=6)
    np.testing.assert_array_equal(tested.returns, whole.test.returns)
    assert trained.step == 12 and trained.settings == TINY


def test_the_best_validated_policy_is_tested_and_loaded(world, weights, tmp_path, monkeypatch):
    """Not the latest one, which is changed here so that the two differ."""
    compiled, tested = runs._Driver._compile, []

    def changed(driver, length):
        program = compiled(driver, length)

        def epoch(run, state, numbers):
            state, metrics = program(run, state, numbers)
            params = jax.tree.map(lambda x: x + 1, state.agent.params)
            return state.replace(agent=state.agent.replace(params=params)), metrics

        return epoch

    def spy(env, policy, params, acting, users, stream):
        tested.append(acting.state)
        return evaluate(env, policy, params, acting, users, stream)

    monkeypatch.setattr(runs._Driver, "_compile", changed)
    monkeypatch.setattr(runs, "evaluate", spy)
    outcome = runs.train(dataclasses.replace(TINY, steps=4), world, weights, tmp_path)
    state, run = final_state(outcome.directory)
    trained = runs.load(outcome.directory)
    assert same(tested[0], state.best_agent) and not same(tested[0], state.agent)
    assert same(trained.acting.state, state.best_agent) and same(trained.acting.weights, run.weights)


def test_a_run_cannot_end_before_what_it_has(world, weights, whole, home):
    with pytest.raises(SettingError, match="steps = 8 .* at least the 12"):
        runs.train(dataclasses.replace(TINY, steps=8), world, weights, home, resume=True)
    assert from_config(tracking.read_config(whole.directory)) == TINY


def test_a_refused_command_prepares_nothing_and_deletes_nothing(world, weights, whole, home, monkeypatch):
    """Pre-training may take an hour: what can be refused is refused before it."""
    monkeypatch.setattr(prepare, "pretrained_gems", lambda *_: pytest.fail("GeMS was asked for"))
    wider = dataclasses.replace(TINY, gems=dataclasses.replace(TINY.gems, latent_dim=4))
    with pytest.raises(DataError, match="gems.latent_dim is 3 there and 4 here"):
        train.main(wider, train.Where(out=home, resume=True))
    with pytest.raises(SettingError, match="--resume continues it, --overwrite deletes"):
        train.main(TINY, train.Where(out=home))
    with pytest.raises(SettingError, match="did you mean 'tensorboard'"):
        runs.train(TINY, world, weights, home, overwrite=True, track="tensorbord")
    assert (whole.directory / "result.json").exists()


def test_a_changed_catalogue_is_another_run(world, weights, whole, home):
    items = world.params.item_embeddings.at[0, 0].add(0.01)
    other = world._replace(params=dataclasses.replace(world.params, item_embeddings=items))
    with pytest.raises(DataError, match="items"):
        runs.train(TINY, other, weights, home, resume=True)


def test_load_names_what_is_wrong(weights, home, tmp_path):
    with pytest.raises(DataError, match="config.json"):
        runs.load(tmp_path)
    with pytest.raises(DataError, match="does not describe a training run"):
        runs.load(gems_directory(home))
