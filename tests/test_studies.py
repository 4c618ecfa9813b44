"""Studies: one record a run, none run twice, killed and continued, tables made from records only."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tyro

from experiments import _study, _tables, early_curves, figure2, figure3, influence, table1, table2
from gemsjax import methods, plots
from gemsjax.envs.catalogue import draw_catalogue
from gemsjax.errors import DataError, SettingError
from gemsjax.maths.statistics import Estimate

ROOT = Path(__file__).resolve().parents[1]
FEW = ("random", "sac-topk-ideal")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("study")


def asked(home, kind=table2.Arguments, **changes):
    usual = {"budget": "smoke", "variant": "corrected", "envs": ("focused_topdown",), "methods": FEW}
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
    assert learner["seconds"]["train"] > 0 and done[0]["seconds"]["test"] > 0
    for record in done:
        assert {"python", "gemsjax", "jax", "jaxlib", "numpy"} <= record["versions"].keys()
        assert record["device"]["kind"] not in ("", "cpu") and record["device"]["count"] == jax.local_device_count()
        assert jax.devices()[0].platform != "cpu" or record["device"]["cores"] >= 1
    assert learner["config_hash"] != done[2]["config_hash"]


def test_nothing_is_run_twice(home, done, monkeypatch):
    monkeypatch.setattr(_study, "_train", lambda *_: pytest.fail("it was run again"))
    monkeypatch.setattr(_study, "_evaluate", lambda *_: pytest.fail("it was run again"))
    arguments = asked(home)
    assert _study.perform(table2.jobs(arguments), arguments.places) == done


def test_a_record_outlives_a_new_setting_but_not_another_value(home, done):
    """What a record does not say is today's default, and asking for anything else is another run."""
    arguments = asked(home)
    one = table2.jobs(arguments)[1]
    path = next(arguments.places.records.glob("SAC_TopK_ideal*seed58407201*"))
    record = path.read_text()
    without = json.loads(record)
    del without["config"]["plan"]["stale"]  # as a version without this setting would have written it
    path.write_text(json.dumps(without))
    try:
        assert _study.find(one, arguments.places) is not None
        for changes in ({"plan": {"stale": True}}, {"hypers": {"gamma": 0.5}}, {"env_settings": {"influence": 0.0}}):
            other = arguments.job("sac-topk-ideal", "focused_topdown", 58407201, **changes)
            assert _study.find(other, arguments.places) is None
    finally:
        path.write_text(record)


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


@pytest.mark.parametrize("name", ["small-corrected", "small-published"])
def test_records_of_earlier_versions_are_still_read(name):
    """The stored ones; some say `device` in a word, and those of references nothing about seconds."""
    records = [_study.read(path) for path in sorted((ROOT / "results" / "table2" / name / "records").glob("*.json"))]
    assert "| SlateQ ‡ |" in table2.markdown(table2.rows(records), "")


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


STOP_AFTER_AN_EPOCH = """
import os, runpy, signal, sys
from gemsjax import tracking
log = tracking.MetricsLog.append
def append(self, row):
    log(self, row)
    os.kill(os.getpid(), signal.SIGTERM)
tracking.MetricsLog.append = append
runpy.run_module("experiments.table2", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_killed_and_started_again(done, tmp_path):
    """SIGTERM after the first epoch: the same command goes on from there, to the record of an undisturbed run."""
    arguments = asked(tmp_path, methods=("sac-topk-ideal",), seeds=(58407201,))
    flags = ["--budget", "smoke", "--variant", "corrected", "--envs", "focused_topdown", "--methods", "sac-topk-ideal"]
    flags += ["--seeds", "58407201"]
    flags += ["--out", str(arguments.out), "--runs", str(arguments.runs), "--data", str(arguments.data)]
    run = lambda *start: subprocess.run(  # noqa: E731
        [sys.executable, *start, *flags], cwd=ROOT, capture_output=True, text=True
    )
    first = run("-c", STOP_AFTER_AN_EPOCH)
    assert first.returncode == 130 and "continues" in first.stderr
    assert not list(arguments.places.records.glob("*.json"))
    rows = next(arguments.runs.rglob("metrics.jsonl"))
    before = rows.read_text().splitlines()
    second = run("-m", "experiments.table2")
    assert second.returncode == 0, second.stderr
    assert len(before) == 1 and rows.read_text().splitlines()[:1] == before
    (path,) = arguments.places.records.glob("*.json")
    again = _study.read(path)
    assert again["test"] == done[1]["test"] and again["config"] == done[1]["config"]
    assert [row["validation"] for row in again["validation"]] == [row["validation"] for row in done[1]["validation"]]


def test_a_stop_in_the_last_epoch_ends_the_study_after_its_record(home, done, tmp_path, monkeypatch):
    arguments = asked(home, out=tmp_path, methods=("sac-topk-ideal",))
    record, asks = dict(done[1]), []

    def stopped(job, places):
        asks.append(job)
        return record, True

    monkeypatch.setattr(_study, "_train", stopped)
    with pytest.raises(KeyboardInterrupt, match="continues with the next"):
        _study.perform(table2.jobs(arguments), arguments.places)
    assert len(asks) == 1 and len(list(arguments.places.records.glob("*.json"))) == 1


@pytest.mark.slow
def test_figures_and_influence_at_smoke(home, done, capsys):
    figure2.main(asked(home, figure2.Arguments, methods=FEW, seeds=(58407201,)))
    says = capsys.readouterr().out
    assert "SAC+TopK (ideal), gamma 0.0 ‡: return" in says and "Random: return" in says
    held = [json.loads(path.read_text()) for path in (home / "results").rglob("scores/*.json")]
    assert len(held) == 3
    for one in held:
        width = one["edges"][1] - one["edges"][0]
        assert sum(map(sum, one["density"])) * width == pytest.approx(1.0)
    influence.main(asked(home, influence.Arguments, methods=("random",), weights=(0.1, 0.0)))
    influence.main(asked(home, influence.Arguments, methods=("short-term-oracle",), weights=(0.1,)))
    says = capsys.readouterr().out
    assert says.count("| Random |") == 2 and "| Short-term oracle ‡ | " in says and " |  |" in says
    assert "Budget `smoke`, variant `corrected`" in says
    small = {"seeds": (1,), "betas": (1.0,), "lambdas": (), "widths": (4,)}
    figure3.main(asked(home, figure3.Arguments, methods=("sac-gems",), **small))
    assert "sac-gems,1.0,0.5,4," in capsys.readouterr().out
    figure3.main(asked(home, figure3.Arguments, methods=("sac-gems",), **{**small, "seeds": (2,)}))
    assert "2 seeds" in (home / "results" / "smoke-corrected" / "figure3_focused_topdown.md").read_text()
    drawn = {path.stem for path in (home / "results").rglob("*.png")}
    assert drawn >= {f"{name}_focused_topdown" for name in ("figure2", "figure3", "influence")}


def recorded_run(method: str, returns: list[float], greedy: float = 0.0, privileged: bool = False) -> dict:
    rows = [{"step": 500 * (n + 1), "return": value, "validation": greedy} for n, value in enumerate(returns)]
    return {"method": method, "privileged": privileged, "validation": rows}


def test_early_curves_tell_what_lies_outside():
    """Recorded: 98.05 and 85.55 for the ideal top-K at 500 and 1,000; three values 1 apart reach 4.97 either way."""
    runs = [recorded_run("sac-topk-ideal", [92.0 + n, 80.0 + n], 150.0, privileged=True) for n in (0, 1, 2)]
    first, second, greedy = early_curves.points(runs)
    assert (first.step, first.recorded[0], first.ours.value) == (500, 98.05, 93.0)
    assert first.ours.high == pytest.approx(97.97, abs=0.01) and first.outside
    assert second.ours.high == pytest.approx(85.97, abs=0.01) and not second.outside
    assert greedy.greedy and greedy.recorded is None and not greedy.outside
    text = early_curves.markdown([first, second, greedy], "A smoke.")
    assert "| method | 500 | 1,000 | greedy, after 1,000 |" in text
    assert "| SAC+TopK (ideal) ‡ | 98.0° / 93.0 (88.0 to 98.0) | 85.5 / 81.0 (76.0 to 86.0) |  / 150.0 " in text
    assert early_curves.comma_separated([first]).splitlines()[1].startswith("sac-topk-ideal,True,500,False,98.05,0.53,")


def test_every_panel_shows_all_of_its_lines():
    """Panels share their axis: one that comes later may reach higher."""
    line = [(1.0, Estimate(5.0, 4.0, 6.0))], [(1.0, Estimate(50.0, 40.0, 60.0))]
    figure = plots.lines_with_intervals({"low": {"a": line[0]}, "high ‡": {"a": line[1]}}, "clicks")
    assert all(axes.get_ylim()[0] == 0.0 and axes.get_ylim()[1] >= 60.0 for axes in figure.axes)
    assert methods.PRIVILEGED in [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_early_curves_of_one_seed_have_no_interval():
    full = [0.0] * len(early_curves.EARLY["sac-gems"])
    *_, greedy = early_curves.points([recorded_run("sac-gems", full, 100.0)])
    assert greedy.recorded == (102.15, 1.48) and not greedy.outside
    assert early_curves.markdown([greedy], "").splitlines()[-1] == "| SAC+GeMS | 102.2 / 100.0 |"


def test_early_curves_are_of_what_was_recorded(home):
    for changes, says in (
        ({"envs": ("focused_mix",)}, "--envs = 'focused_mix'.*focused_topdown"),
        ({"methods": ("slateq",)}, "--methods = 'slateq'"),
        ({"budget": "small"}, "--budget = 'small'.*recorded, smoke"),
        ({}, "--catalogues.*published embeddings"),
    ):
        with pytest.raises(SettingError, match=says):
            early_curves.jobs(early_curves.Arguments(**changes))
    budget = early_curves.BUDGETS["recorded"]
    assert all(len(means) * budget.epoch == budget.trajectories for means in early_curves.EARLY.values())
    assert early_curves.EARLY.keys() == early_curves.EARLY_GREEDY.keys()


@pytest.mark.parametrize(("variant", "warm_up"), [("published", 20), ("corrected", 0)])
def test_a_budgets_warm_up_is_for_methods_that_have_one(home, variant, warm_up):
    """REINFORCE learns on policy: as published it has random trajectories at first, corrected none."""
    arguments = asked(home, early_curves.Arguments, variant=variant, methods=("reinforce-softmax",))
    plan = early_curves.jobs(arguments)[0].settings.plan
    assert (plan.warm_up, plan.replay_capacity) == (warm_up, 1)


@pytest.mark.slow
def test_early_curves_at_smoke(home, done, capsys):
    """Runs of 60 trajectories, validated at 30 and 60, where nothing was recorded."""
    early_curves.main(asked(home, early_curves.Arguments, variant="published", methods=("reinforce-softmax",)))
    assert "| REINFORCE+SoftMax |  / " in capsys.readouterr().out
    assert len((home / "results" / "smoke-published" / "early_curves.csv").read_text().splitlines()) == 4


def test_items_that_were_never_published_are_not_asked_for(home, tmp_path):
    (tmp_path / "item_embeddings_focused.npy").touch()
    with pytest.raises(SettingError, match="no peaked environment"):
        table2.jobs(asked(home, catalogues=tmp_path, envs=("peaked_topdown",)))


COMMITTED = {
    "small-published": {"methods": ("reinforce-softmax",), "seeds": (58407201,)},
}


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_tables_are_what_their_records_say(name, tmp_path, monkeypatch):
    """Asked for in part, and nothing is run: a table has every record of its directory, in the same order."""
    budget, variant = name.split("-")
    committed = ROOT / "results" / "table2" / name
    shutil.copytree(committed / "records", tmp_path / name / "records")
    usual = {"envs": ("focused_topdown",), "out": tmp_path, "budget": budget, "variant": variant}
    arguments = table2.Arguments(**{**usual, **COMMITTED[name]})
    monkeypatch.setattr(_study, "_train", lambda *_: pytest.fail("it was run again"))
    monkeypatch.setattr(_study, "_evaluate", lambda *_: pytest.fail("it was run again"))
    table2.main(arguments)
    assert (tmp_path / name / "table2.md").read_bytes() == (committed / "table2.md").read_bytes()


def test_records_of_two_catalogues_are_kept_apart(home, done, tmp_path):
    np.save(tmp_path / "item_embeddings_focused.npy", draw_catalogue(71))
    with pytest.raises(SettingError, match="--catalogues = .*records of two are kept apart, name another --out"):
        table2.main(asked(home, catalogues=tmp_path))


def test_records_and_directories_keep_their_names():
    """A setting that is added changes neither the name of a record nor where a run that was stopped goes on."""
    job = table2.Arguments(budget="full", variant="published").job("sac-gems", "focused_topdown", 58407201)
    assert _study.name_of(job) == "SAC_GeMS_focused_topdown_KL1.0_click0.5_seed58407201-9d81f8"


def test_the_order_of_a_table():
    """As in the study's own; only what is asked for in another order is moved."""
    usual = ("a", "b", "c")
    assert _tables._order(("c",), usual) == _tables._order(("a", "c"), usual) == list(usual)
    assert _tables._order(("c", "a"), usual) == ["c", "a", "b"]


def test_figure3_wants_methods_through_gems(home):
    with pytest.raises(SettingError, match="act through GeMS"):
        figure3.jobs(asked(home, figure3.Arguments), "focused_topdown")


def test_who_reproduces_the_paper_does_so_as_published():
    variants = [module.Arguments().variant for module in (table2, figure2, figure3, influence)]
    assert variants == ["published", "published", "published", "corrected"]


def test_a_long_search_is_a_budget():
    (one,) = table2.jobs(table2.Arguments(budget="long", envs=("focused_topdown",), methods=("constant-slate",)))
    assert (one.settings.seed, one.settings.steps, one.settings.epoch_steps) == (58407201, 15625, 1563)


def test_the_default_studies_can_be_made():
    """Every method that a study names by default is there."""
    assert len(table2.jobs(table2.Arguments())) == 6 * (2 + 3 * 7)  # two references once, seven learners, three seeds
    assert influence.jobs(influence.Arguments(), "focused_topdown")
    assert figure2.jobs(figure2.Arguments(), "focused_topdown")
    with pytest.raises(SettingError, match="at least one method"):
        _study.perform([], table2.Arguments().places)


def test_the_committed_table1_is_what_the_code_makes():
    assert (ROOT / "results" / "table1.md").read_text(encoding="utf-8") == table1.markdown()


def test_table1_of_some_methods(tmp_path, capsys):
    table1.main(table1.Arguments(methods=("slateq", "random"), out=tmp_path / "new"))
    lines = (tmp_path / "new" / "table1.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| SlateQ", "| Random"]
    with pytest.raises(SettingError, match="did you mean 'slateq'"):
        table1.main(table1.Arguments(methods=("slatq",), out=tmp_path))


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
