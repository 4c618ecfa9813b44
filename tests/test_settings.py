"""Errors of settings: what counts as a number, and settings of a run that are refused by name."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import gemsjax
from gemsjax import datasets, disk
from gemsjax.envs.dot_product import EnvConfig, check_env
from gemsjax.errors import SettingError, require_array, require_choice, require_count, require_number
from gemsjax.settings import GeMSSettings, PLSettings, TrainSettings, check_gems


@pytest.mark.parametrize("value", [5, np.int64(5), np.uint8(5), np.int32(5)], ids=repr)
def test_whole_numbers(value):
    require_count("users", value, 1, 5)
    with pytest.raises(SettingError, match="users = .*5.* from 1 to 4"):
        require_count("users", value, 1, 4)


@pytest.mark.parametrize(
    "value", [True, np.bool_(True), 5.0, np.float64(5.0), "5", None, [5], np.array([5]), 5j], ids=repr
)
def test_what_is_no_whole_number(value):
    with pytest.raises(SettingError, match="users = .* a whole number of at least 1"):
        require_count("users", value)


def test_numbers():
    for value in (1, 0.5, np.float32(0.5), np.int64(1)):
        require_number("share", value, 0.0, 1.0)
    for value in (True, "0.5", None, float("nan"), 10**400, 1j):
        with pytest.raises(SettingError, match="share = .* from 0 to 1"):
            require_number("share", value, 0.0, 1.0)


def test_arrays():
    np.testing.assert_array_equal(require_array("table", [[1, 2.5]], "numbers"), [[1.0, 2.5]])
    for value in ([[1, 2], [3]], ["a"], [1j], [None], "text"):
        with pytest.raises(SettingError, match="table = .* numbers"):
            require_array("table", value, "numbers")


def test_values_that_cannot_be_looked_up():
    with pytest.raises(SettingError, match=r"colour = \['red'\]"):
        require_choice("colour", ["red"], {"red": 1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": ("a",)}, r"gems.hidden = \('a',\).*whole number of at least 1"),
        ({"hidden": (2.5,)}, "gems.hidden"),
        ({"hidden": 5}, "gems.hidden = 5"),
        ({"hidden": ()}, "gems.hidden"),
        ({"hidden": (0,)}, "gems.hidden"),
        ({"hidden": [32]}, "gems.hidden.*a tuple"),
        ({"beta": "1"}, "gems.beta = '1'"),
        ({"rate": "fast"}, "gems.rate = 'fast'"),
        ({"epsilon": None}, "gems.epsilon = None"),
        ({"users": 100.0}, "gems.users = 100.0"),
    ],
    ids=str,
)
def test_settings_of_gems_that_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        check_gems(GeMSSettings(**settings))
    with pytest.raises(SettingError, match=message):
        TrainSettings(gems=GeMSSettings(**settings)).resolved()


def test_other_settings_that_are_no_numbers():
    for name in ("temperature", "penalty"):
        with pytest.raises(SettingError, match=f"pl.{name} = 'x'"):
            TrainSettings("sac-pl", pl=PLSettings(**{name: "x"})).resolved()
    for name in ("reward_decay", "drift"):
        with pytest.raises(SettingError, match=f"{name} = 'x'"):
            check_env(dataclasses.replace(EnvConfig(), **{name: "x"}))
    for name in ("type_shares", "topic_shares"):
        with pytest.raises(SettingError, match=f"{name} = .*sum 1"):
            gemsjax.make("interest_exploration", **{name: ["a", "b"]})


def test_a_run_with_numbers_of_numpy_is_the_run_with_those_of_python():
    ours = TrainSettings(
        steps=np.int64(5),
        env_settings={"slate_size": np.int64(4), "influence": np.float32(0.5)},
        gems=GeMSSettings(hidden=(np.int32(8),), users=np.int64(100), beta=np.float64(0.5)),
    ).resolved()
    usual = TrainSettings(
        steps=5,
        env_settings={"slate_size": 4, "influence": 0.5},
        gems=GeMSSettings(hidden=(8,), users=100, beta=0.5),
    ).resolved()
    assert ours == usual
    assert json.dumps(dataclasses.asdict(ours)) == json.dumps(dataclasses.asdict(usual))
    assert disk.digest(ours.identity()) == disk.digest(usual.identity())


def test_logged_data_of_numpy_counts_are_those_of_python_counts(tmp_path):
    env, params = gemsjax.make("focused_topdown", num_items=30, slate_size=3, horizon=2)
    users = 128 * len(jax.local_devices())
    datasets.generate(env, params, tmp_path / "data", users=np.int64(users), seed=np.uint32(3))
    assert datasets.generate(env, params, tmp_path / "data", users=users, seed=3).generated == 0
