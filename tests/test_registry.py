"""Environments by name: defaults, overrides, registering one's own, and settings that are refused before compiling."""

import copy
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemsjax
from experiments import train
from gemsjax.datasets.generation import _describe
from gemsjax.envs import registry
from gemsjax.envs.catalogue import KEYWORDS, draw_catalogue, named_catalogue
from gemsjax.envs.registry import CONSTANTS, check_slate
from gemsjax.errors import DataError, SettingError
from gemsjax.settings import make_world

RECSIM = ("interest_evolution", "interest_exploration")
"""Without a catalogue: see test_recsim_environments.py."""


@pytest.fixture(autouse=True)
def own_names(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))


def test_names():
    items, clicks = ("focused", "diffuse", "peaked", "steady"), ("topdown", "mix", "divpen")
    assert gemsjax.environments() == (*(f"{i}_{c}" for i in items for c in clicks), *RECSIM)


@pytest.mark.parametrize("name", [name for name in gemsjax.environments() if name not in RECSIM])
def test_each_name_has_its_settings(name):
    env, params = gemsjax.make(name)
    items, clicks = name.split("_")
    assert (env.name, env.num_items, env.slate_size, env.num_topics, env.topic_size, env.horizon) == (
        name, 1000, 10, 10, 2, 100
    )  # fmt: skip
    assert env.independent_clicks
    np.testing.assert_array_equal(params.item_embeddings, named_catalogue("focused" if items == "steady" else items))
    assert params.influence == np.float32(0.0 if items == "steady" else 0.1)
    assert params.diversity_penalty == (3.0 if clicks == "divpen" else 1.0)
    decays = 0.85 ** np.arange(10)
    expected = decays if clicks == "topdown" else (decays + decays[::-1]) / 2
    np.testing.assert_allclose(params.examination, np.repeat(expected[:, None], 11, axis=1), rtol=1e-6)


def test_every_constant_is_a_keyword_and_an_array():
    values = {name: constant.default + 1.0 for name, constant in CONSTANTS.items() if name != "influence"}
    values["influence"] = 0.5
    _, params = gemsjax.make("focused_topdown", num_items=20, **values)
    for name, value in values.items():
        leaf = getattr(params, name)
        assert leaf.dtype == jnp.float32 and leaf.shape == () and leaf == np.float32(value)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))


def test_settings_of_the_drawn_catalogue():
    settings = {"catalogue_seed": 5, "catalogue_power": 1.5, "item_noise": 0.8, "item_clip": 0.5}
    _, params = gemsjax.make("focused_mix", num_items=40, **settings)
    np.testing.assert_array_equal(params.item_embeddings, draw_catalogue(5, 40, power=1.5, noise=0.8, clip=0.5))
    for setting, value in settings.items():  # each alone, beside the environment's own
        _, params = gemsjax.make("peaked_mix", num_items=40, **{setting: value})
        recipe = {"seed": 41, "power": 2.0} | {KEYWORDS[setting]: value}
        np.testing.assert_array_equal(params.item_embeddings, draw_catalogue(num_items=40, **recipe))


@pytest.mark.parametrize("setting", KEYWORDS)
def test_settings_of_drawing_are_refused_with_given_items(tmp_path, setting):
    np.save(tmp_path / "items.npy", draw_catalogue(9, num_items=40))
    for catalogue in (tmp_path / "items.npy", draw_catalogue(9, num_items=40)):
        with pytest.raises(SettingError, match=f"{setting} = 1 .*only with a catalogue that is drawn.*focused"):
            gemsjax.make("focused_topdown", catalogue=catalogue, **{setting: 1})


def test_static_settings_and_the_published_ones():
    env, _ = gemsjax.make("focused_topdown", num_items=20, memory=3, user_norm="unit")
    assert (env.memory, env.user_norm) == (3, "unit")
    assert env != dataclasses.replace(env, memory=4) and env != dataclasses.replace(env, user_norm="topics")
    usual, _ = gemsjax.make("focused_topdown", num_items=20)
    assert (usual.memory, usual.user_norm) == (10, "topics")
    assert dataclasses.replace(env, memory=10, user_norm="topics") == usual != env
    assert hash(usual) == hash(copy.deepcopy(usual)) and usual == copy.deepcopy(usual)
    # What logged data are described by is what it was before these settings existed, unless they are changed.
    told, told_of_usual = (_describe(*gemsjax.make("focused_topdown", num_items=20, **changes))["environment"]
                           for changes in ({"user_norm": "unit", "memory": 4}, {}))  # fmt: skip
    assert (told["memory"], told["user_norm"]) == (4, "unit") and not {"memory", "user_norm"} & told_of_usual.keys()


def test_words_and_numbers_of_the_command_line_reach_the_environment():
    flags = "--env-settings user_norm unit memory 5 user_clip 0.5 catalogue_power 1.5 num_items 40"
    settings, _ = train.parse(flags.split())
    env, params, _ = make_world(settings)
    assert (env.user_norm, env.memory, params.user_noise) == ("unit", 5, np.float32(0.8))
    np.testing.assert_array_equal(params.item_embeddings, draw_catalogue(41, 40, power=1.5))


def test_integers_of_numpy_are_sizes():
    env, _ = gemsjax.make("focused_topdown", num_items=np.int64(20), slate_size=np.int32(4), memory=np.uint8(5))
    assert env == gemsjax.make("focused_topdown", num_items=20, slate_size=4, memory=5)[0]
    assert all(type(value) in (int, str, bool) for value in vars(env).values())


def test_other_sizes_draw_a_catalogue_of_that_size_with_the_environments_seed():
    env, params = gemsjax.make("diffuse_mix", num_items=50, num_topics=4, topic_size=3, slate_size=6, horizon=7)
    assert (env.num_items, env.slate_size, env.num_topics, env.topic_size, env.horizon) == (50, 6, 4, 3, 7)
    np.testing.assert_array_equal(params.item_embeddings, named_catalogue("diffuse", 50, 4, 3))
    assert params.horizon == 7 and params.examination.shape == (6, 7)


def test_a_catalogue_is_a_name_a_file_or_an_array(tmp_path):
    items = draw_catalogue(9, num_items=40)
    np.save(tmp_path / "items.npy", items)
    for catalogue in (items, tmp_path / "items.npy", str(tmp_path / "items.npy"), jnp.asarray(items)):
        env, params = gemsjax.make("focused_topdown", catalogue=catalogue)
        assert env.num_items == 40
        np.testing.assert_array_equal(params.item_embeddings, items)
    np.testing.assert_array_equal(
        gemsjax.make("focused_topdown", catalogue="diffuse")[1].item_embeddings, named_catalogue("diffuse")
    )
    assert gemsjax.make("focused_topdown", catalogue=None, examination=None)[0].num_items == 1000


def test_item_topics_and_greatest_norm():
    items = np.zeros((3, 4), np.float32)
    items[0, :2], items[1, 3], items[2] = (3, 4), 2.0, (1, 1, 0, 1.2)
    _, params = gemsjax.make("focused_topdown", catalogue=items, num_topics=2, slate_size=2)
    assert params.item_topics.tolist() == [0, 1, 0] and params.max_score == 5.0


@pytest.mark.parametrize(("num_topics", "slate_size", "counts"), [
    (10, 10, [1] * 10), (10, 4, [1, 1, 1, 1]), (5, 10, [2] * 5), (4, 10, [3, 3, 2, 2]), (1, 3, [3]),
])  # fmt: skip
def test_the_first_slate_takes_the_strongest_items_of_each_topic(num_topics, slate_size, counts):
    _, params = gemsjax.make("focused_topdown", num_items=80, num_topics=num_topics, slate_size=slate_size)
    norms = np.linalg.norm(np.asarray(params.item_embeddings).reshape(80, num_topics, 2), axis=2)
    expected = []
    for topic, count in enumerate(counts):
        expected += sorted(range(80), key=lambda item: -norms[item, topic])[:count]  # noqa: B023
    assert params.first_slate.tolist() == expected and params.first_slate.dtype == jnp.int32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"influnce": 0.2}, "keyword = 'influnce'.*did you mean 'influence'"),
        ({"slate_size": 0}, "slate_size = 0"),
        ({"slate_size": 21}, "slate_size = 21.*from 1 to 20"),
        ({"slate_size": "10"}, "slate_size = '10'"),
        ({"horizon": 0}, "horizon = 0"),
        ({"horizon": 2.5}, "horizon = 2.5"),
        ({"num_items": -3}, "num_items = -3"),
        ({"num_items": 9}, "at least as many items as topics"),
        ({"num_topics": 0}, "num_topics = 0"),
        ({"topic_size": -2}, "topic_size = -2"),
        ({"catalogue": np.ones((30, 20))}, "num_items = 20.*30"),
        ({"catalogue": np.ones((20, 20)), "topic_size": 3}, r"\(20, 20\).*10 \* 3"),
        ({"catalogue": "focussed"}, "catalogue = 'focussed'.*focused"),
        ({"examination": "bottomup"}, "examination = 'bottomup'"),
        ({"examination": np.ones(3)}, "examination"),
        ({"examination": np.full(10, 1.5)}, "examination"),
        ({"examination": [[1.0] * 11] * 9 + [[1.0] * 10]}, r"examination = 'a list'.*\[10\] or \[10, 11\]"),
        ({"examination": ["a"] * 10}, "examination.*topdown or mix, or an array"),
        ({"examination": {"a": 1}}, "examination"),
        ({"examination_decay": "x"}, r"examination_decay = 'x'.*\(0, 1\]"),
        ({"examination_decay": float("nan")}, "examination_decay = nan"),
        ({"catalogue": [[1.0] * 20] * 19 + [[1.0]]}, "catalogue = 'rows of unequal length'.*10 \\* 2"),
        ({"catalogue": 5}, r"catalogue = 'an array of shape \(\)'"),
        ({"catalogue_power": "2"}, "catalogue_power = '2'.*from 0.001 to 50"),
        ({"catalogue_power": 1000}, "catalogue_power = 1000"),
        ({"catalogue_seed": 1.5}, "catalogue_seed = 1.5"),
        ({"item_noise": 0.0}, "item_noise = 0.0"),
        ({"item_clip": -1.0}, "item_clip = -1.0"),
        ({"memory": 0}, "memory = 0.*from 1 to 1000"),
        ({"memory": 2.5}, "memory = 2.5"),
        ({"user_norm": "units"}, "user_norm = 'units'.*did you mean 'unit'"),
        ({"user_norm": 1}, "user_norm = 1.*topics, unit"),
        ({"user_clip": 0.0}, "user_clip = 0.0"),
        ({"user_clip": "1"}, "user_clip = '1'"),
        ({"influence": 10**400}, "influence = 1000.*from 0 to 1"),
        ({"slate_size": np.float32(4.0)}, "slate_size"),
        ({"slate_size": np.bool_(True)}, "slate_size"),
        ({"examination_decay": 0.0}, "examination_decay"),
        ({"examination_first_exponent": -1}, "examination_first_exponent"),
        ({"influence": 1.5}, "influence = 1.5.*from 0 to 1"),
        ({"influence": float("nan")}, "influence = nan"),
        ({"influence": "0.1"}, "influence = '0.1'"),
        ({"influence": True}, "influence = True"),
        ({"diversity_penalty": 0.5}, "diversity_penalty"),
        ({"diversity_threshold": 0}, "diversity_threshold"),
        ({"boredom_threshold": 2.5}, "boredom_threshold = 2.5.*whole number"),
        ({"boredom_duration": 0}, "boredom_duration"),
        ({"memory_window": -1}, "memory_window"),
        ({"relevance_slope": float("inf")}, "relevance_slope"),
        ({"relevance_offset": float("-inf")}, "relevance_offset"),
        ({"short_term_boost": -1.0}, "short_term_boost"),
        ({"user_noise": 0.0}, "user_noise"),
        ({"user_focus": 21.0}, "user_focus"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        gemsjax.make("focused_topdown", **{"num_items": 20, **settings})


def test_unknown_names_and_files():
    with pytest.raises(SettingError, match="did you mean 'focused_topdown'"):
        gemsjax.make("focused_topdwon")
    with pytest.raises(SettingError, match=r"environment = \['focused_topdown'\]"):
        gemsjax.make(["focused_topdown"])
    with pytest.raises(DataError, match="no such file"):
        gemsjax.make("focused_topdown", catalogue="missing.npy")


# -- one's own ---------------------------------------------------------------------------------------------------------


def test_registering_changed_settings():
    gemsjax.register("calm", "diffuse_mix", influence=0.02, num_items=30)
    gemsjax.register("calmer", "calm", influence=0.01)
    env, params = gemsjax.make("calmer", slate_size=3)
    assert (env.name, env.num_items, env.slate_size) == ("calmer", 30, 3)
    assert params.influence == np.float32(0.01)
    assert gemsjax.make("calm")[1].influence == np.float32(0.02)
    np.testing.assert_array_equal(params.item_embeddings, named_catalogue("diffuse", 30))
    assert gemsjax.environments()[-2:] == ("calm", "calmer")
    gemsjax.register("calm", "diffuse_mix", influence=0.03)
    assert gemsjax.make("calm")[1].influence == np.float32(0.03)


def test_registering_a_function():
    def build(name, *, size=3):
        return f"{name} of {size}", size

    gemsjax.register("mine", build, size=4)
    assert gemsjax.make("mine") == ("mine of 4", 4)
    assert gemsjax.make("mine", size=5) == ("mine of 5", 5)
    with pytest.raises(SettingError, match="keyword = 'sise'.*'size'"):
        gemsjax.make("mine", sise=5)
    gemsjax.register("any", lambda name, **settings: (name, settings))
    assert gemsjax.make("any", sise=5) == ("any", {"sise": 5})


def test_registrations_that_are_refused():
    with pytest.raises(SettingError, match="not built in"):
        gemsjax.register("focused_mix", "diffuse_mix")
    with pytest.raises(SettingError, match="base = 'diffuse'"):
        gemsjax.register("mine", "diffuse")
    with pytest.raises(SettingError, match="'influence'"):
        gemsjax.register("mine", "diffuse_mix", influenc=1)
    assert "mine" not in gemsjax.environments()


# -- slates ------------------------------------------------------------------------------------------------------------


def test_good_slates_come_back_as_int32():
    env, _ = gemsjax.make("focused_topdown", num_items=20, slate_size=3)
    for slate in ([0, -1, 19], np.zeros((2, 5, 3), np.uint8), jnp.zeros((2, 3), jnp.int32)):
        checked = check_slate(slate, env)
        assert checked.dtype == np.int32
        np.testing.assert_array_equal(checked, np.asarray(slate))


@pytest.mark.parametrize(
    ("slate", "message"),
    [
        ([0, 20, 1], "slate: 20 at position (1,); item numbers go from 0 to 19"),
        ([[0, 1, 2], [3, 4, -2]], "-2 at position (1, 2)"),
        (np.array([2**32, 0, 0]), "4294967296 at position (0,)"),
        ([0, 1], "shape (2,); its last axis must be slate_size = 3"),
        (3, "shape ()"),
        ([0.0, 1.0, 2.0], "float64"),
        ([True, False, True], "bool"),
        ([[0, 1, 2], [3]], "rows of unequal length"),
    ],
    ids=str,
)
def test_bad_slates_are_refused(slate, message):
    env, _ = gemsjax.make("focused_topdown", num_items=20, slate_size=3)
    with pytest.raises(DataError, match=re.escape(message)):
        check_slate(slate, env)
