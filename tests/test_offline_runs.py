"""Learning from logs on the host: killed, stopped or damaged, a run goes on; and the experiment."""

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

from experiments import _topk_report
from experiments import topk_off_policy as experiment
from gemsjax import checkpoint, plots_offline
from gemsjax.agents.base import Agent, Policy
from gemsjax.errors import DataError, SettingError, TrainingError
from gemsjax.offline import OfflinePlan, learn, make_offline_training
from gemsjax.tracking import read_metrics

USERS, BATCH = 50, 4
KEY = jax.random.key(3)
NOBODY = Policy(lambda: (), lambda *_: None)


def toy() -> Agent:
    """A running mean of what it sees, blurred by noise: any lost or repeated update shows."""

    def update(acting, batch, noise):
        state = 0.9 * acting.state + acting.hypers * (batch["x"].mean(axis=0) + acting.weights) + 0.1 * noise
        return state, {"policy_loss": jnp.square(state).mean()}

    return Agent(
        lambda key, hypers: jax.random.normal(key, (3,)),
        NOBODY,
        NOBODY,
        lambda key, batch: jax.random.normal(key, (3,)),
        update,
    )


LOGS = {"x": np.random.default_rng(0).normal(size=(USERS, 3)).astype(np.float32)}


def run(directory, logs=LOGS, key=KEY, hypers=0.3, epochs=4, batch=BATCH, **others):
    training = make_offline_training(toy(), OfflinePlan(batch))
    settings = {"parts": 5, "weights": np.float32(0.1), "config": {"batch": batch}} | others
    return learn(training, logs, key, hypers, epochs=epochs, directory=directory, **settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted: its directory and what it has learnt."""
    directory = tmp_path_factory.mktemp("whole")
    return directory, run(directory)


def told(directory):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_metrics(directory)]


def assert_same(directory, learnt, whole):
    assert learnt.finished and learnt.updates == whole[1].updates == 4 * (USERS // BATCH)
    assert np.asarray(learnt.state).tobytes() == np.asarray(whole[1].state).tobytes()
    assert told(directory) == told(whole[0])


def test_a_run_is_its_epochs_one_after_another(whole):
    training = make_offline_training(toy(), OfflinePlan(BATCH))
    hypers, state = jnp.float32(0.3), training.init(KEY, jnp.float32(0.3))
    for epoch in range(4):
        state, metrics = jax.jit(training.updates)(state, hypers, np.float32(0.1), KEY, LOGS, epoch, np.arange(12))
    np.testing.assert_allclose(whole[1].state, state, rtol=1e-5)
    rows = told(whole[0])
    assert [row["step"] for row in rows] == [12 * epoch + n for epoch in range(4) for n in (3, 6, 9, 12)]
    np.testing.assert_allclose(rows[-1]["policy_loss"], metrics["policy_loss"][-3:].mean(), rtol=1e-5)


@pytest.mark.parametrize("number", [1, 4, 7])
def test_a_signal_stops_it_and_the_same_call_goes_on(number, whole, tmp_path, monkeypatch):
    saved, real = [], checkpoint.save

    def save(*arguments, **settings):
        real(*arguments, **settings)
        saved.append(settings["step"])
        if len(saved) == number:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("gemsjax.offline.runs.checkpoint.save", save)
    learnt = run(tmp_path)
    monkeypatch.undo()
    assert not learnt.finished and learnt.updates == saved[-1] == 3 * number
    assert_same(tmp_path, run(tmp_path), whole)


@pytest.mark.parametrize("where", ["before", "within", "after"])
def test_a_run_that_breaks_off_around_a_checkpoint_goes_on(where, whole, tmp_path, monkeypatch):
    save, calls = checkpoint.save, []

    def breaks(*arguments, **settings):
        calls.append(0)
        if len(calls) == 3 and where == "before":
            raise KeyboardInterrupt
        path = save(*arguments, **settings)
        if len(calls) == 3:
            if where == "within":  # the newest checkpoint is only half there: the one before it counts
                next(file for file in sorted((path / "arrays").rglob("*")) if file.is_file()).write_bytes(b"")
            raise KeyboardInterrupt
        return path

    monkeypatch.setattr("gemsjax.offline.runs.checkpoint.save", breaks)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    monkeypatch.undo()
    if where == "within":
        with pytest.warns(UserWarning, match="going back"):
            learnt = run(tmp_path)
    else:
        learnt = run(tmp_path)
    assert_same(tmp_path, learnt, whole)


def test_a_killed_process_loses_nothing_but_a_part(whole, tmp_path):
    """In a process of its own, killed without warning after its first checkpoint."""
    program = "import sys; from test_offline_runs import run; run(sys.argv[1])"
    paths = os.pathsep.join([os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))])
    environment = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env=environment)
    limit = time.monotonic() + 120
    while not any((tmp_path / "checkpoints").glob("step_*")) and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it was not killed on the way"
    assert_same(tmp_path, run(tmp_path), whole)


def test_more_epochs_go_on_and_fewer_are_refused(whole, tmp_path):
    short = run(tmp_path, epochs=2)
    assert short.updates == 24 and run(tmp_path, epochs=2).updates == 24
    with pytest.raises(SettingError, match="epochs = 1 .*at least 2"):
        run(tmp_path, epochs=1)
    assert_same(tmp_path, run(tmp_path), whole)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hypers": 0.2}, "hypers"),
        ({"key": jax.random.key(4)}, "key"),
        ({"logs": {"x": LOGS["x"] * 1.0001}}, "logs"),
        ({"weights": np.float32(0.2)}, "weights"),
        ({"config": {"batch": 5}}, "config.batch is 4 there and 5 here"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_run_s_directory_is_refused(change, says, whole):
    with pytest.raises(DataError, match=says):
        run(whole[0], **change)


def test_counts_out_of_range_are_refused(tmp_path):
    for wrong in ({"epochs": 0}, {"parts": 0}, {"batch": USERS + 1}):
        with pytest.raises(SettingError):
            run(tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()


def test_numbers_that_are_no_longer_finite_end_it_and_the_last_checkpoint_stays(tmp_path):
    logs = {"x": np.where(np.arange(USERS)[:, None] == 0, np.float32(np.inf), LOGS["x"])}
    with pytest.raises(TrainingError, match=r"policy_loss is no longer finite; (the checkpoint|there was no)"):
        run(tmp_path, logs=logs)
    assert all(np.isfinite(row["policy_loss"]) for row in told(tmp_path))


# -- the experiment ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_experiment_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    out, written = tmp_path / "out", tmp_path / "new" / "numbers.json"
    arguments = experiment.Arguments(budget="smoke", variants=("top-K",), out=out, json=written)
    real = experiment.offline.learn
    with monkeypatch.context() as patch:
        patch.setattr(experiment.offline, "learn", lambda *x, **y: real(*x, **y)._replace(finished=False))
        with pytest.raises(KeyboardInterrupt, match="the same command"):
            experiment.main(arguments)
    (job,) = experiment.jobs(arguments)
    directory = job.directory
    first = {path.name: path.stat().st_mtime_ns for path in (directory / "checkpoints").iterdir()}
    capsys.readouterr()
    experiment.main(arguments)
    assert {path.name: path.stat().st_mtime_ns for path in (directory / "checkpoints").iterdir()} == first
    told, record = json.loads(written.read_text()), json.loads(job.record.read_text())
    assert told == json.loads((out / "summary.json").read_text()) and told["comparisons"] == []
    found = told["corrections"]["top-K"]
    assert set(told["references"]) == set(experiment.REFERENCES) and found["held_out"] == record["held_out"]
    assert max(told["bandits"].values()) < 2e-3 and 0 < found["held_out"]["mean_ratio"] < 100
    assert told["references"]["random"]["mean"] < told["references"]["epsilon-greedy-oracle"]["mean"]
    assert found["greedy"] == {"mean": record["greedy"]["mean"], "half_interval": None}
    assert (out / "topk_off_policy.md").read_text().count("\n|") == 3 * 2 + 4 + len(record["held_out"])
    for picture in ("weights.png", "calibration.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert Path(capsys.readouterr().out.split("table: ")[1].splitlines()[0]).is_file()


def test_a_record_is_kept_and_one_of_another_configuration_refused(tmp_path, monkeypatch):
    arguments = experiment.Arguments(budget="smoke", variants=("none",), seeds=2, out=tmp_path)
    made = list(experiment.jobs(arguments))
    assert [job.seed for job in made] == [arguments.seed, arguments.seed + 1]
    assert experiment.kept(made[0]) is None
    made[0].record.parent.mkdir(parents=True)
    made[0].record.write_text(json.dumps(made[0].asked() | {"greedy": 1}))
    assert experiment.kept(made[0])["greedy"] == 1
    more = dataclasses.replace(experiment.BUDGETS["smoke"], seeds=3)  # more seeds are no other configuration
    assert experiment.kept(dataclasses.replace(made[0], budget=more)) is not None
    monkeypatch.setattr(experiment, "_bandits", lambda _: pytest.fail("it had begun to work"))
    monkeypatch.setitem(experiment.BUDGETS, "smoke", dataclasses.replace(more, epochs=2))
    with pytest.raises(DataError, match="another configuration: budget.epochs is 1 there and 2 here"):
        experiment.main(arguments)


def test_differences_are_paired_by_seed():
    rows = [("none", 1, 10.0), ("none", 2, 20.0), ("none", 3, 30.0), ("top-K", 1, 12.0), ("top-K", 2, 23.0)]
    rows.append(("top-K", 3, 34.0))
    mean = lambda value: {"mean": value}  # noqa: E731
    records = [
        {"variant": name, "seed": seed, "greedy": mean(value), "served": mean(2 * value), "held_out": {"x": value}}
        for name, seed, value in rows
    ]
    greedy, served = _topk_report.comparisons(records)
    assert (greedy["correction"], greedy["less"], greedy["seeds"]) == ("top-K", "none", 3)
    assert greedy["difference"] == 3.0 and served["difference"] == 6.0
    np.testing.assert_allclose(greedy["high"] - 3.0, 4.302653 / np.sqrt(3), rtol=1e-5)
    text = _topk_report.markdown(records, {"random": {"mean": 1.0, "standard_error": 0.5}}, "made up")
    assert "| top-K | 23.0 ± " in text and "| greedy | top-K | none | 3.0 (0.5 to 5.5) | 0.035 |" in text


def test_what_lies_outside_a_histogram_has_bins_of_its_own():
    ratio = np.array([0.0, 1e-9, 1e-3, 1.0, 1.0, 1e7, np.inf, 1e-4])
    figure = plots_offline.weight_histograms({"x": (ratio, np.ones(8))}, 20.0, 10, "title")
    axes = figure.axes[0]
    labels = [label.get_text().strip() for label in axes.get_xticklabels()]
    assert labels[0] == "< -4" and labels[-1] == "> 4"
    corners = np.asarray(axes.patches[0].get_xy())
    below, above = (corners[(corners[:, 0] > low) & (corners[:, 0] <= low + 1), 1].max() for low in (-5.0, 4.0))
    np.testing.assert_allclose([below, above], 2 / 8)


@pytest.mark.parametrize("wrong", [{"seeds": 0}, {"budget": "tiny"}, {"variants": ("second-order",)}, {"variants": ()}])
def test_the_experiment_refuses_what_it_does_not_know(wrong, tmp_path):
    with pytest.raises(SettingError):
        experiment.main(experiment.Arguments(out=tmp_path / "out", **wrong))
    assert not (tmp_path / "out").exists()
