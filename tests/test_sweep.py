"""Sweeps: which runs, how they are laid out, that a run's numbers are its own, frozen runs, resuming, exporting."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _measure, benchmark
from experiments import _sweep_benchmark as benchmarks
from experiments._measure import Figure
from experiments.sweep import arguments_of_sweep, command, dry_run, parse
from gemsjax import datasets, prepare, runs, sweep, tracking
from gemsjax.devices import surroundings, use_precision, use_unroll
from gemsjax.errors import DataError, SettingError
from gemsjax.prepare import gems as single
from gemsjax.pretrain.gems import make_pretraining
from gemsjax.settings import GeMSSettings, TrainSettings
from gemsjax.sweep import files, memory, processes
from gemsjax.sweep.bundle import bundle, stacked, weights_of
from gemsjax.sweep.cadence import Cadence
from gemsjax.sweep.layout import gather, going, make_layout, over_runs, place
from gemsjax.sweep.pretraining import data_of, pretrain, programs, share_sets
from gemsjax.train import Plan
from gemsjax.types import Dims

WORLD = {"num_items": 40, "slate_size": 4, "horizon": 8}
PLAN = Plan(batch_size=3, replay_capacity=8, warm_up=4, validation_users=4)


def tiny(method: str = "sac-gems", **changes) -> TrainSettings:
    """A run of SAC+GeMS that takes a second."""
    settings = TrainSettings(method, env="focused_topdown", steps=12, epoch_steps=6, test_users=8, env_settings=WORLD)
    spec = dataclasses.replace(settings.resolved().spec, hidden=16, item_dim=4, belief_width=8)
    gems = GeMSSettings(latent_dim=3, item_dim=4, hidden=(8,), users=40, epochs=2, batch_size=32)
    return dataclasses.replace(settings, plan=PLAN, spec=spec, gems=gems, **changes).resolved()


def values_of(outcome: sweep.Outcome) -> list[tuple]:
    return [(row["run"], row["status"], row.get("best_validation"), row.get("test")) for row in outcome.rows]


# -- which runs --------------------------------------------------------------------------------------------------------


def test_a_grid_has_every_combination_and_a_paired_sweep_one_run_a_position():
    axes = {"seed": [1, 2], "gamma": [0.0, 0.8], "gems.beta": [0.5, 1.0, 2.0]}
    runs_ = sweep.grid(tiny(), axes)
    assert len({tuple(run.values.items()) for run in runs_}) == len(runs_) == 12
    assert runs_[0].values == {"seed": 1, "gamma": 0.0, "gems.beta": 0.5}
    for run in runs_:
        settings = run.settings
        assert (settings.seed, settings.hypers.gamma, settings.gems.beta) == tuple(run.values.values())
    paired = sweep.paired(tiny(), {"seed": [1, 2], "env_settings.influence": [0.1, 0.0]})
    assert [(run.settings.seed, run.settings.env_settings["influence"]) for run in paired] == [(1, 0.1), (2, 0.0)]
    assert paired[0].settings.env_settings["num_items"] == 40


@pytest.mark.parametrize(
    ("axes", "says"),
    [
        ({"gama": [0.1]}, "did you mean 'gamma'"),
        ({"gems.bta": [0.1]}, "did you mean 'gems.beta'"),
        ({"hidden": [16, 32]}, "part of the program"),
        ({"mf.dim": [8, 16]}, "part of the program"),
        ({"gems.latent_dim": [2, 3]}, "part of the program"),
        ({"env_settings.slate_size": [4, 5]}, "part of the program"),
        ({"batch_size": [4, 5]}, "What may differ: seed, env"),
        ({"seed": []}, "at least one value"),
        ({"seed": 3}, "a list of at least one value"),
        ({"seed": [1, 1]}, "each value once"),
        ({"env_settings.examination": [[0.9, 0.8, 0.7, 0.6]] * 2}, "each value once"),
        ({"env_settings.examination": [[0.9, 0.8]]}, "examination"),
        ({"env_settings.examination": [{"a": 1}]}, "numbers, words, or lists"),
        ({"gamma": [2.0]}, "gamma"),
        ({"env": ["focussed_topdown"]}, "focused_topdown"),
        ({}, "at least one of"),
    ],
)
def test_a_wrong_axis_is_named_with_what_may_be_swept(axes, says):
    with pytest.raises(SettingError) as caught:
        bundle(sweep.grid(tiny(), axes))
    assert says in str(caught.value)


def test_a_table_of_examination_is_a_value_like_others():
    tables = [[0.9, 0.8, 0.7, 0.6], [0.6, 0.7, 0.8, 0.9]]
    made = bundle(sweep.grid(tiny(), {"env_settings.examination": tables}))
    assert [world.params.examination[:, 0].tolist() for world in made.worlds] == [pytest.approx(t) for t in tables]


def test_embeddings_of_one_width_may_differ_and_of_several_are_refused():
    base = TrainSettings("sac-wknn", env_settings={**WORLD, "num_topics": 4}).resolved()
    base = dataclasses.replace(base, mf=dataclasses.replace(base.mf, dim=8))  # 4 topics of 2 numbers
    runs_ = sweep.grid(base, {"embeddings": ["mf", "random"], "mf.rate": [1e-3, 1e-4]})
    assert [run.settings.embeddings for run in bundle(runs_).runs] == ["mf", "mf", "random", "random"]
    assert runs_[0].settings.mf.rate == 1e-3
    wide = dataclasses.replace(base, mf=dataclasses.replace(base.mf, dim=9))
    with pytest.raises(SettingError, match="embeddings of one width"):
        bundle(sweep.grid(wide, {"embeddings": ["mf", "random"]}))
    with pytest.raises(SettingError, match="axis of a sweep"):
        sweep.grid(tiny(), {"mf_rate": [0.1]})


def test_paired_lists_must_be_of_one_length_and_runs_distinct():
    with pytest.raises(SettingError, match="seed has 2, gamma has 1"):
        sweep.paired(tiny(), {"seed": [1, 2], "gamma": [0.5]})
    with pytest.raises(SettingError, match="each once"):
        sweep.paired(tiny(), {"seed": [1, 1], "gamma": [0.5, 0.5]})


def test_runs_of_different_programs_are_refused():
    wider = dataclasses.replace(tiny(), spec=dataclasses.replace(tiny().spec, hidden=32))
    mixed = [*sweep.grid(tiny(), {"seed": [1]}), *sweep.grid(wider, {"seed": [2]})]
    with pytest.raises(SettingError, match="part of the program"):
        bundle(mixed)


def test_the_command_line_makes_the_same_runs_as_the_library():
    line = "--method sac-gems --env focused_topdown focused_mix --seed 1 2 --gamma 0 0.8 --gems.beta 0.5 --hidden 16"
    found, how = parse([*line.split(), "--env-settings.influence", "0.1", "0.05", "--layout", "mapped"])
    assert len(found) == 16 and how.layout == "mapped"
    assert {run.settings.gems.beta for run in found} == {0.5} and {run.settings.spec.hidden for run in found} == {16}
    assert {run.settings.env_settings["influence"] for run in found} == {0.1, 0.05}
    with pytest.raises(SettingError, match="part of the program"):
        parse(["--method", "sac-gems", "--hidden", "16", "32"])
    penalties, _ = parse(["--method", "sac-pl", "--pl.penalty", "0", "3", "10", "--embeddings", "ideal"])
    assert [run.settings.pl.penalty for run in penalties] == [0.0, 3.0, 10.0]
    with pytest.raises(SettingError, match="each method is a program of its own"):
        parse(["--method", "sac-gems", "dqn"])
    for wrong, says in (
        (["--gama", "0.1", "0.2"], "--gama = '0.1 0.2' is not accepted: did you mean '--gamma'"),
        (["--gems.bta=0.5"], "--gems.bta = '0.5' is not accepted: did you mean '--gems.beta'"),
        (["--env-settings.influenc", "0.1"], "did you mean '--env-settings.influence'"),
        (["--check-minutes", "1"], "did you mean '--checkpoint-minutes'"),
        (["--xyzzy", "1"], "there is no such flag, see --help. What may differ between runs: seed, env, "),
        (["--layout", "maped"], "--layout = 'maped' is not accepted"),
        (["--precision", "hihgest"], "did you mean 'highest'"),
    ):
        with pytest.raises(SettingError) as caught:
            parse(["--method", "sac-gems", *wrong])
        assert says in str(caught.value)
    with pytest.raises(SystemExit):
        parse(["--method", "sac-gems", "--help"])
    assert {"seed", "hypers", "how"} <= {
        field.name for field in dataclasses.fields(arguments_of_sweep("dqn", "published"))
    }


def test_precision_is_recorded_and_misspelt_ones_are_refused():
    with pytest.raises(SettingError, match="did you mean 'highest'"):
        use_precision("hihgest")
    try:
        use_precision("highest")
        assert surroundings()["precision"] == "highest"
    finally:
        jax.config.update("jax_default_matmul_precision", None)


def test_settings_of_the_machine_are_no_part_of_a_run():
    line = ["--method", "sac-gems", "--seed", "1", "2"]
    plain, how = parse(line)
    other, chosen = parse([*line, "--unroll", "4", "--precision", "highest"])
    assert (how.unroll, how.precision, chosen.unroll, chosen.precision) == (1, "default", 4, "highest")
    assert other == plain and [run.settings.identity() for run in other] == [run.settings.identity() for run in plain]
    for wrong in ("0", "101"):
        with pytest.raises(SettingError, match=f"--unroll = {wrong} is not accepted: a whole number from 1 to 100"):
            command([*line, "--unroll", wrong])
    asked = benchmark.Arguments(only=("compile_cold",), unroll=2)
    try:
        with pytest.raises(SettingError, match="has no --precision or --unroll"):
            benchmark.main(asked)
    finally:
        use_unroll(1)


def test_a_series_of_figures_ends_where_memory_does_and_counts_include_the_sixty(capsys):
    assert benchmarks.counts(8) == [1, 2, 4, 8] and benchmarks.counts(65) == [1, 2, 4, 8, 16, 32, 60, 64, 65]

    def fails(says: str):
        def measure():
            raise jax.errors.JaxRuntimeError(says)

        return measure

    assert list(benchmarks.unless_out_of_memory("n", fails("RESOURCE_EXHAUSTED: Out of memory"))) == []
    assert "n: out of memory" in capsys.readouterr().out
    with pytest.raises(jax.errors.JaxRuntimeError):
        list(benchmarks.unless_out_of_memory("n", fails("INTERNAL")))


def test_the_parts_of_an_epoch_are_told_with_their_share_of_the_floor(monkeypatch):
    monkeypatch.setattr(_measure, "MATRIX", 256)  # 64 times less work around each figure
    monkeypatch.setattr(benchmarks, "STEPS", 3)
    plan = dataclasses.replace(PLAN, replay_capacity=20)
    found = {figure.name: figure for figure in benchmarks.parts(dataclasses.replace(tiny(), plan=plan), 2)}
    names = [f"epoch_{part}_2_runs" for part in ("collect", "store_and_sample", "update", "validate")]
    assert list(found) == names and all(0 < found[name].value < 1e4 for name in names)
    assert [name for name in names if found[name].floor_fraction is None] == ["epoch_store_and_sample_2_runs"]
    assert all(0 < figure.floor_fraction < 1 for figure in found.values() if figure.floor_fraction is not None)
    # Of one turn of one user: XLA would count a rollout of any length as one turn.
    made = benchmarks._made(tiny(), 1)
    simulated, validation = benchmarks._simulated(made), plan.validation_users
    assert simulated["validate"] > simulated["collect"] * validation / 2 > 8 * made.settings.spec.hidden * 40
    assert benchmarks._step_flops(made, made.training.steps) > 0


def test_sixty_runs_and_vaes_have_a_floor_too(monkeypatch):
    monkeypatch.setattr(_measure, "MATRIX", 256)
    monkeypatch.setattr(benchmarks, "published", lambda base: bundle(sweep.grid(tiny(), {"seed": [1, 2]})))
    for measure in (benchmarks.sixty_runs, benchmarks.sixty_vaes):
        figure = measure(TrainSettings())
        assert figure.value > 0 and 0 < figure.floor_fraction < 1


def test_benchmarks_add_to_a_file_of_the_same_machine_only(tmp_path):
    about, path = {"device": "cpu: x", "devices": 2, "jax": "1", "gemm_gflops": 3.0}, tmp_path / "figures.json"
    old, new = (Figure("a", value, "s", None, 3.0, value, value) for value in (1.0, 2.0))
    benchmark.write(path, about, [], [old, dataclasses.replace(old, name="b")])
    kept = benchmark.earlier(path, about)
    benchmark.write(path, about, kept, [new])
    assert [(f.name, f.value) for f in benchmark.earlier(path, about)] == [("b", 1.0), ("a", 2.0)]
    with pytest.raises(SettingError, match="devices is 2 there and 1 here"):
        benchmark.earlier(path, about | {"devices": 1})
    with pytest.raises(SettingError, match="unroll is 1 there and 4 here"):
        benchmark.earlier(path, about | {"unroll": 4})


# -- the run axis ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "group"), [(1, 1), (5, 1), (5, 2), (7, 3), (4, 4)])
def test_every_layout_computes_every_run_once_and_skips_what_is_not_active(count, group):
    layout = make_layout(count, "vmapped", group)
    program = over_runs(
        layout,
        lambda data: {"sum": data * 0.0},
        lambda data, state, active, add: ({"sum": state["sum"] + data + add}, (data, active)),
    )
    data = np.arange(1.0, count + 1.0, dtype=np.float32)
    placed = place(layout, data)
    state = jax.jit(program.make)(placed, going(layout))
    call = jax.jit(program.call)
    state, out = call(placed, state, going(layout), jnp.float32(10.0))
    np.testing.assert_array_equal(gather(layout, state)["sum"], data + 10.0)
    np.testing.assert_array_equal(gather(layout, out)[0], data)
    # A group without an active run is not computed.
    state, out = call(placed, state, going(layout, np.zeros(count, bool)), jnp.float32(10.0))
    np.testing.assert_array_equal(gather(layout, state)["sum"], data + 10.0)
    assert not gather(layout, out)[1].any()


@pytest.mark.parametrize(("kind", "group"), [("mapped", 1), ("vmapped", 2)])
def test_the_runs_of_a_device_are_changed_in_place(kind, group):
    layout = make_layout(8, kind, group, devices=jax.local_devices()[:1])
    big = np.zeros((8, 500, 500), np.float32)

    def step(data, state, active, rows):
        return jax.lax.scan(lambda state, row: (state.at[row].add(data), row), state, rows)

    program = over_runs(layout, lambda data: jnp.zeros(big.shape[1:]) + data, step)
    data, state = place(layout, np.ones(8, np.float32)), place(layout, big)
    lowered = jax.jit(program.call, donate_argnums=1).lower(data, state, going(layout), jnp.arange(5))
    planned = lowered.compile().memory_analysis()
    assert planned.temp_size_in_bytes < (group + 1) * big[0].nbytes and planned.alias_size_in_bytes >= big.nbytes


def test_a_group_is_as_large_as_asked_on_any_number_of_devices():
    device = jax.local_devices()[0]
    for devices in (1, 2, 8):
        layout = make_layout(12, "vmapped", 5, devices=[device] * devices)
        assert (layout.group, layout.places * 1) == (5, 5 * -(-3 // min(devices, 3)) * min(devices, 3))
    assert make_layout(2, "vmapped", 4).describe()["empty_places"] == 2


def test_layouts_say_what_they_are_and_refuse_what_makes_no_sense():
    device = jax.local_devices()[0]
    assert make_layout(5, devices=[device] * 2, kind="mapped").describe()["groups_per_device"] == 3
    assert make_layout(12, "mapped", devices=[device] * 8).places == 16
    assert make_layout(12, "vmapped", devices=[device] * 8).describe()["devices"] == 6
    assert make_layout(3, devices=[device] * 8).places == 3
    for kind, group in (("pmapped", None), ("mapped", 2), ("vmapped", 0)):
        with pytest.raises(SettingError):
            make_layout(4, kind, group)


def test_checkpoints_take_a_tenth_of_the_time_at_most():
    cadence = Cadence(minutes=1.0, now=100.0)
    assert not cadence.due(159.0) and cadence.due(160.0)
    cadence.saved(160.0, 200.0)  # 40 s: the next one 400 s later
    assert not cadence.due(300.0) and not cadence.due(599.0) and cadence.due(600.0)
    cadence.saved(600.0, 601.0)
    assert not cadence.due(660.0) and cadence.due(661.0)


# -- sweeps ------------------------------------------------------------------------------------------------------------


class Done:
    """A sweep of SAC+GeMS in two environments, and where it lies."""

    def __init__(self, root: Path) -> None:
        self.root = root
        axes = {"env": ["focused_topdown", "focused_mix"], "seed": [1, 2]}
        self.runs = sweep.grid(tiny(), axes)
        self.options = sweep.Options(
            pretrained=root / "runs", data=root / "logs", checkpoint_minutes=0.0, command=("--as", "asked")
        )
        self.outcome = self.run("whole")

    def run(self, name: str, of=None, **changes) -> sweep.Outcome:
        chosen = self.runs if of is None else of
        on_epoch = changes.pop("on_epoch", lambda shard, rows: None)
        return sweep.run_sweep(
            chosen, self.root / name, dataclasses.replace(self.options, **changes), on_epoch=on_epoch
        )

    @functools.cached_property
    def vmapped(self) -> sweep.Outcome:
        return self.run("vmapped", layout="vmapped", group=2)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Done:
    return Done(tmp_path_factory.mktemp("sweep"))


def table(directory: Path) -> list[dict]:
    """Of `runs.csv`: run, status, steps and best validation."""
    with open(directory / "runs.csv", newline="") as stream:
        rows = [{name: row.get(name) for name in ("run", "status", "steps", "best_validation", "test")}
                for row in csv.DictReader(stream)]  # fmt: skip
    return [row | {"run": int(row["run"]), "steps": int(row["steps"])} for row in rows]


def test_a_sweep_directory_tells_the_whole_story(done):
    directory = done.root / "whole"
    told = json.loads((directory / "sweep.json").read_text())
    assert [run["values"] for run in told["runs"]] == [run.values for run in done.runs]
    (began,) = told["starts"]
    assert {"at", "device", "layout_of_a_shard"} <= began.keys() and began["versions"]["jax"] == jax.__version__
    assert told["axes"] == {"env": ["focused_topdown", "focused_mix"], "seed": [1, 2]}
    assert began["command"] == ["--as", "asked"] and (began["precision"], began["unroll"]) == ("default", 1)
    with open(directory / "runs.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["env"] for row in rows] == ["focused_topdown"] * 2 + ["focused_mix"] * 2
    assert all(row["status"] == "finished" and float(row["test"]) > 0 for row in rows)
    with open(directory / "metrics.csv", newline="") as stream:
        assert len(list(csv.DictReader(stream))) == 2 * 4
    assert len({(row["test"], row["best_validation"]) for row in done.outcome.rows}) == 4


def test_a_run_does_not_depend_on_its_neighbours(done):
    fewer = done.run("fewer", of=[done.runs[3], done.runs[0]])
    for new, old in zip(values_of(fewer), (values_of(done.outcome)[3], values_of(done.outcome)[0]), strict=True):
        assert new[1:] == old[1:]


def test_a_stopped_sweep_continues_to_the_same_numbers_without_loss(done):
    seen = []

    def stop(shard, rows):
        seen.append((rows, table(done.root / "stopped")))
        if rows[0]["step"] == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = done.run("stopped", on_epoch=stop)
    assert stopped.stopped and not stopped.rows
    # What a kill would have left, and what the signal did.
    ((rows, told),) = seen
    left, untested = table(done.root / "stopped"), {"steps": 6, "test": None}
    for row, running, now in zip(rows, told, left, strict=True):
        plain = {"run": row["run"], "best_validation": str(row["best_validation"])} | untested
        assert running == plain | {"status": "running"} and now == plain | {"status": "stopped"}
    index = json.loads((done.root / "stopped" / "sweep.json").read_text())
    with pytest.raises(SettingError, match="--resume"):
        done.run("stopped")
    with pytest.raises(
        DataError, match="run 0: env is .*focused_topdown.* there and .*focused_mix.* here; seed is 1 there and 7 here"
    ):
        done.run(
            "stopped", of=sweep.grid(tiny(), {"env": ["focused_mix", "focused_topdown"], "seed": [7, 2]}), resume=True
        )
    assert table(done.root / "stopped") == left  # what was refused has changed nothing
    assert values_of(done.run("stopped", resume=True)) == values_of(done.outcome)
    # The same bytes as those of a sweep that was never stopped; the index has one more start.
    runs_csv = [(done.root / name / "runs.csv").read_text() for name in ("stopped", "whole")]
    assert runs_csv[0] == runs_csv[1]
    after = json.loads((done.root / "stopped" / "sweep.json").read_text())
    assert len(after["starts"]) == 2 and after | {"starts": after["starts"][:1]} == index
    # What an earlier version wrote says nothing of a setting that came later.
    told = done.root / "stopped" / "sweep.json"
    index = json.loads(told.read_text())
    for run in index["runs"]:
        run["settings"]["gems"].pop("drawn")
    told.write_text(json.dumps(index))
    assert values_of(done.run("stopped", resume=True)) == values_of(done.outcome)  # nothing is left to do
    assert (done.root / "stopped" / "runs.csv").read_text() == runs_csv[1]


def test_shards_change_nothing_but_where_things_lie(done):
    told = []
    whole = done.run("shards", shards=2, on_epoch=lambda shard, rows: told.append(table(done.root / "shards")))
    assert values_of(whole) == values_of(done.outcome)
    assert [[(row["status"], row["steps"]) for row in rows] for rows in told] == [
        [("running", 6)] * 2 + [("waiting", 0)] * 2,
        [("running", 12)] * 2 + [("waiting", 0)] * 2,
        [("finished", 12)] * 2 + [("running", 6)] * 2,
        [("finished", 12)] * 2 + [("running", 12)] * 2,
    ]
    for shards in (0, 5):
        with pytest.raises(SettingError, match="from 1 to 4"):
            done.run("too many", shards=shards)


def test_a_run_that_is_no_longer_finite_freezes_alone(done, capsys):
    bad = done.runs[1]._replace(
        settings=dataclasses.replace(
            done.runs[1].settings, hypers=dataclasses.replace(done.runs[1].settings.hypers, gamma=1e38)
        )
    )
    told = []
    keep = lambda shard, rows: told.append([row["status"] for row in table(done.root / "frozen")])  # noqa: E731
    outcome = done.run("frozen", of=[done.runs[0], bad, *done.runs[2:]], on_epoch=keep)
    rows = values_of(outcome)
    assert told == [["running", rows[1][1], "running", "running"]] * 2
    assert rows[1][1].startswith("frozen: ") and "at step" in rows[1][1]
    assert [rows[i] for i in (0, 2, 3)] == [values_of(done.outcome)[i] for i in (0, 2, 3)]
    assert "run 1 is frozen" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_may_freeze_after_a_resume_and_is_not_exported(done):
    plan = dataclasses.replace(PLAN, warm_up=8)  # no update in the first epoch, so nothing can go wrong in it
    runs_ = [run._replace(settings=dataclasses.replace(run.settings, plan=plan)) for run in done.runs[:2]]
    hypers = dataclasses.replace(runs_[1].settings.hypers, gamma=1e38)
    runs_[1] = runs_[1]._replace(settings=dataclasses.replace(runs_[1].settings, hypers=hypers))
    short = [run._replace(settings=dataclasses.replace(run.settings, steps=6)) for run in runs_]
    assert [row["status"] for row in done.run("late", of=short).rows] == ["finished"] * 2
    rows = done.run("late", of=runs_, resume=True).rows
    assert rows[0]["status"] == "finished" and rows[1]["status"].startswith("frozen: ")
    told = json.loads((done.root / "late" / "sweep.json").read_text())
    assert len(told["starts"]) == 2 and {run["settings"]["steps"] for run in told["runs"]} == {12}
    with pytest.raises(DataError, match=r"run 1 of .* was frozen"):
        sweep.export(done.root / "late", 1, done.root / "late single")
    with pytest.raises(SettingError, match="steps = 6"):
        done.run("late", of=short, resume=True)


@pytest.mark.slow
def test_results_are_of_the_test_that_was_asked_for_and_overwriting_leaves_nothing(done):
    done.run("again", shards=2)
    more = [run._replace(settings=dataclasses.replace(run.settings, test_users=9)) for run in done.runs]
    assert [row["test_users"] for row in done.run("again", of=more, resume=True).rows] == [9] * 4
    (done.root / "again" / "runs.csv").write_text("of the sweep before")
    done.run("again", overwrite=True)
    assert not (done.root / "again" / "shards" / "01" / "config.json").exists()
    assert (done.root / "again" / "runs.csv").read_text() != "of the sweep before"


def test_waiting_for_another_process_ends_when_asked_to(done):
    target = {"steps": 12, "test_users": 10**6, "test_stream": "test"}  # which nobody will ever make
    waits = functools.partial(files.wait_for_results, done.outcome.directory, 0, target, 60.0)
    assert not waits(lambda: True)
    with pytest.raises(DataError, match="did not finish shard 0"):
        files.wait_for_results(done.outcome.directory, 0, target, 0.0)


def test_vmapped_groups_freeze_one_run_of_a_group(done):
    hypers = dataclasses.replace(done.runs[1].settings.hypers, gamma=1e38)
    bad = done.runs[1]._replace(settings=dataclasses.replace(done.runs[1].settings, hypers=hypers))
    frozen_one = done.run("vmapped frozen", of=[done.runs[0], bad, *done.runs[2:]], layout="vmapped", group=2)
    rows, whole = values_of(frozen_one), values_of(done.vmapped)
    assert rows[1][1].startswith("frozen") and [rows[i] for i in (0, 2, 3)] == [whole[i] for i in (0, 2, 3)]


def test_a_sweep_goes_on_in_the_groups_that_it_began_with(done, capsys):
    layout = {"layout": "vmapped", "group": 2}
    short = [run._replace(settings=dataclasses.replace(run.settings, steps=6)) for run in done.runs]
    done.run("groups", of=short, **layout)
    assert values_of(done.run("groups", resume=True)) == values_of(done.vmapped)
    assert "note: groups of 2, as the sweep began" in capsys.readouterr().out
    done.run("groups", resume=True, layout="mapped")
    assert "groups of 1 from here on, 2 until now" in capsys.readouterr().out
    starts = json.loads((done.root / "groups" / "sweep.json").read_text())["starts"]
    assert [start["layout_of_a_shard"]["group"] for start in starts] == [2, 2, 1]


def test_runs_that_differ_in_what_a_name_does_not_tell_are_exported_side_by_side(done):
    base, epoch = tiny(steps=6), {"pretrained": done.options.pretrained}
    runs_ = sweep.grid(base, {"seed": [1], "gamma": [0.0, 0.8]})
    done.run("gammas", of=runs_, **epoch)
    places = [sweep.export(done.root / "gammas", number, done.root / "exported") for number in (0, 1)]
    assert places[0] != places[1] and all(place.name.startswith("focused_topdown_KL") for place in places)
    assert [tracking.read_config(place)["hypers"]["gamma"] for place in places] == [0.0, 0.8]
    assert [runs.directory_of(run.settings, done.root / "exported") for run in runs_] == places
    # Nor are two sweeps in each other's way.
    first = sweep.export(done.root / "whole", 0, done.root / "plain")
    second = sweep.export(done.root / "gammas", 0, done.root / "plain")
    assert first == done.root / "plain" / runs.name_of(runs_[0].settings).directory != second
    with pytest.raises(SettingError, match="--overwrite"):
        sweep.export(done.root / "gammas", 0, done.root / "plain")


def test_a_run_exported_is_an_ordinary_run(done):
    directory = sweep.export(done.root / "whole", 2, done.root / "single")
    trained = runs.load(directory)
    assert trained.settings == done.runs[2].settings and trained.step == 12
    result = json.loads((directory / "result.json").read_text())
    assert result["mean_return"] == done.outcome.rows[2]["test"]
    settings = dataclasses.replace(done.runs[2].settings, steps=18)
    world = prepare.world_of(settings)
    weights = single.kept_weights(settings, world, done.options.pretrained)
    longer = runs.train(settings, world, weights, done.root / "single", resume=True)
    assert longer.test is not None
    with pytest.raises(SettingError, match="run = 9"):
        sweep.export(done.root / "whole", 9, done.root / "single")
    with pytest.raises(DataError, match="holds no sweep"):
        sweep.export(done.root / "single", 0, done.root / "single")


def test_weights_pretrained_together_are_those_of_a_single_run(done, tmp_path):
    run = done.runs[2]
    world = prepare.world_of(run.settings)
    kept = single.kept_weights(run.settings, world, done.options.pretrained)
    alone = single.pretrained_gems(
        run.settings, world, tmp_path, lambda: prepare.logged_data(run.settings, world, done.options.data)
    )
    for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)


def test_weights_do_not_depend_on_which_are_there_already(done, tmp_path):
    layout = make_layout(4, "vmapped", 4)
    made, stop = bundle(done.runs), tracking.StopRequest()
    kept = lambda root: [single.kept_weights(r.settings, w, root) for r, w in zip(made.runs, made.worlds, strict=True)]  # noqa: E731
    pretrain(made, tmp_path / "all", done.options.data, layout, stop)
    pretrain(bundle(done.runs[:3]), tmp_path / "part", done.options.data, layout, stop)
    pretrain(made, tmp_path / "part", done.options.data, layout, stop)  # only the last one is missing
    for one, other in zip(
        jax.tree.leaves(kept(tmp_path / "all")), jax.tree.leaves(kept(tmp_path / "part")), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_no_run_of_a_group_gets_a_copy_of_its_data_set():
    layout = make_layout(4, "vmapped", 4, devices=jax.local_devices()[:1])
    spec = tiny().gems.spec
    sets = [datasets.LoggedSlates(np.zeros((5_000, 8, 4), np.int16), np.zeros((5_000, 8), np.uint16), {})] * 2
    pretraining = make_pretraining(spec, Dims(40, 4, 8))
    updates, _ = programs(pretraining, layout)
    data = data_of(layout, [tiny()] * 4, [0, 1, 0, 1])
    shared = share_sets(layout, sets)
    assert shared.slates.shape == (2, 40_000, 4)
    state = jax.eval_shape(updates.make, data, going(layout))
    lowered = jax.jit(updates.call).lower(data, state, going(layout), shared, jnp.int32(0), jnp.arange(3))
    assert lowered.compile().memory_analysis().temp_size_in_bytes < shared.slates.nbytes


def test_a_method_without_gems_sweeps_too(tmp_path):
    small = TrainSettings("reinforce-softmax", steps=4, epoch_steps=2, test_users=4, env_settings=WORLD)
    plan = dataclasses.replace(small.resolved().plan, validation_users=3)
    found = sweep.grid(dataclasses.replace(small, plan=plan), {"seed": [1, 2, 3]})
    outcome = sweep.run_sweep(found, tmp_path / "sweep", sweep.Options(pretrained=tmp_path, data=tmp_path))
    assert [row["status"] for row in outcome.rows] == ["finished"] * 3


# -- memory ------------------------------------------------------------------------------------------------------------


def test_memory_is_counted_by_part_and_too_much_is_refused_with_what_would_fit(done):
    made = bundle(done.runs)
    data = stacked(made, weights_of(done.options.pretrained, done.options.data))
    found, _ = memory.need(made, data, make_layout(4, "mapped"))
    replay = jax.eval_shape(made.training.init, runs._blank_run(done.runs[0].settings, made.worlds[0])).replay
    assert found.parts["replay"] == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(replay))
    assert 0 <= found.arguments - 4 * sum(found.parts.values()) < 4_096 and found.temporary > 0 and found.fits
    state = jax.eval_shape(made.training.init, runs._blank_run(done.runs[0].settings, made.worlds[0])).agent
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert found.parts["networks"] + found.parts["optimiser"] == size(state)
    assert found.parts["optimiser"] == size(state.optimiser)
    # The runs' state is changed in place: what is returned besides it are the metrics.
    assert found.total < found.arguments + found.temporary + 0.1 * found.output + 4_096

    def pretend(group: int) -> memory.Need:  # a temporary that grows with the group
        return found._replace(temporary=group * found.arguments, limit=4 * found.arguments, output=0, alias=0)

    layout = make_layout(4, "vmapped", 4)
    with pytest.raises(SettingError, match="at most 3"):
        memory.refuse_unless_fits(pretend(4), layout, lambda smaller: pretend(smaller.group))
    with pytest.raises(SettingError, match="at most 1 of this size"):
        memory.refuse_unless_fits(found._replace(limit=found.arguments // 3), layout, lambda smaller: found)


def test_a_dry_run_prints_and_trains_nothing(done, tmp_path, capsys):
    _, how = parse(["--method", "sac-gems", "--out", str(tmp_path / "none")])
    dry_run(done.runs, how)
    printed = capsys.readouterr().out
    assert "4 runs, 4 at a time on" in printed and "replay" in printed and not (tmp_path / "none").exists()
    assert "optimiser" in printed and "by XLA's plan" in printed
    assert "to pre-train 4 GeMS" in printed and "of logged data" in printed.replace("\n", " ")
    need, _ = memory.pretraining_need(bundle(done.runs), tmp_path, make_layout(4, "mapped"))
    # Environments, users (all of them span the action boxes too), turns; items and click bits.
    assert need.shared == 2 * (40 + 40) * 8 * (4 * 2 + 2)
    dry_run(done.runs, how, processes.Process(0, 2))
    assert "4 runs, 2 at a time on" in capsys.readouterr().out
    with pytest.raises(SettingError, match="--shards = 0"):
        dry_run(done.runs, dataclasses.replace(how, shards=0))


def test_a_pretraining_that_does_not_fit_is_refused_with_what_would_and_what_is_kept_needs_nothing(
    done, tmp_path, monkeypatch
):
    made, device = bundle(done.runs), jax.local_devices()[:1]
    assert memory.pretraining_need(made, done.options.pretrained, make_layout(4, "vmapped", 4, device)) is None
    needs = {
        group: memory.pretraining_need(made, tmp_path, make_layout(4, "vmapped", group, device))[0]
        for group in (1, 2, 4)
    }
    assert needs[1].total < needs[2].total < needs[4].total
    for found in needs.values():
        assert 0 <= found.arguments - found.shared - 4 * found.parts["state"] < 4_096 and found.temporary > 0

    def sweep_in(limit: int, **changes):
        monkeypatch.setattr(memory, "device_limit", lambda layout: limit)
        options = {"layout": "vmapped", "group": 4, "pretrained": tmp_path / "runs", "data": tmp_path / "logs"}
        chosen = dataclasses.replace(done.options, **(options | changes))
        return sweep.run_sweep(done.runs, tmp_path / "sweep", chosen, devices=device)

    compiled = []
    with monkeypatch.context() as patched:
        patched.setattr(memory, "need", lambda *_: compiled.append(1))
        with pytest.raises(SettingError, match=r"group = 4 .* at most 2: pre-training of GeMS: .* a device for 4 runs"):
            sweep_in(needs[2].total)
        room = needs[4].shared + 3 * needs[4].parts["state"]
        with pytest.raises(SettingError, match=r"runs of a device = 'pre-training of GeMS: .* at most 3 of this size"):
            sweep_in(room, resume=True)
        with pytest.raises(SettingError, match=r"--gems\.users"):
            sweep_in(needs[4].shared, resume=True)
    assert not compiled and not (tmp_path / "logs").exists()
    _, how = parse(["--method", "sac-gems", "--runs", str(tmp_path), "--layout", "vmapped", "--group", "4"])
    monkeypatch.setattr(jax, "local_devices", lambda: device)
    monkeypatch.setattr(memory, "device_limit", lambda layout: needs[2].total)
    monkeypatch.setattr(memory, "need", lambda *_: (needs[4]._replace(limit=None), None))  # that of training fits
    with pytest.raises(SettingError, match="at most 2: pre-training of GeMS"):
        dry_run(done.runs, how)
