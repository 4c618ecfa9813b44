"""The catalogue study at its smallest: shares and tests tell the recipes apart; tables, JSON, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from experiments import catalogues
from gemsjax.envs.catalogue import draw_catalogue
from gemsjax.errors import DataError, SettingError


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The study with two stand-ins for the published files: powers 1 and 1.5, of seeds that the recipes do not use."""
    home = tmp_path_factory.mktemp("catalogues")
    np.save(home / "item_embeddings_focused.npy", draw_catalogue(71))
    np.save(home / "item_embeddings_diffuse.npy", draw_catalogue(72, power=1.5))
    arguments = catalogues.Arguments(published=home, budget="smoke", users=8, out=home / "new")
    (record,) = catalogues.main(arguments)
    written = [(home / "new" / f"smoke.{ending}").read_text(encoding="utf-8") for ending in ("json", "md")]
    return record, *written, arguments


@pytest.mark.slow
def test_rows(smoke):
    record, written, *_ = smoke
    assert json.loads(written) == record
    rows = {row["name"]: row for row in record["catalogues"]}
    assert list(rows) == [
        "drawn, power 1", "drawn, power 1.5", "drawn, power 2", "ours: focused", "ours: diffuse", "ours: peaked",
        "published: focused", "published: diffuse",
    ]  # fmt: skip
    for row in rows.values():
        assert row["users"] == 8
        assert all(row[name] > 0 for name in ("share", "share_error", "random", "oracle"))


@pytest.mark.slow
def test_shares_are_those_of_the_recipes(smoke):
    """1000 items, standard error 0.003; the numbers are those of the authors' generator."""
    rows = {row["name"]: row["share"] for row in smoke[0]["catalogues"]}
    for name, share in [("drawn, power 1", 0.633), ("drawn, power 1.5", 0.720), ("drawn, power 2", 0.778)]:
        assert rows[name] == pytest.approx(share, abs=0.012)
    assert rows["published: focused"] == pytest.approx(0.633, abs=0.015)
    assert rows["published: diffuse"] == pytest.approx(0.720, abs=0.015)


@pytest.mark.slow
def test_the_recipe_of_a_file_is_recognised(smoke):
    p_values = {(test["name"], test["power"]): (test["share_p"], test["component_p"]) for test in smoke[0]["tests"]}
    for name, true_power in [("focused", 1.0), ("diffuse", 1.5)]:
        for power in catalogues.POWERS:
            if power == true_power:
                assert min(p_values[name, power]) > 1e-3
            else:
                assert max(p_values[name, power]) < 1e-10


@pytest.mark.slow
def test_tables_hold_every_row_and_test(smoke):
    record, _, text, _ = smoke
    for row in record["catalogues"]:
        assert f"| {row['name']} |" in text and f"{row['oracle']:.1f} ± {row['oracle_error']:.1f}" in text
    assert text.count("\n| focused |") == len(catalogues.POWERS)


@pytest.mark.slow
def test_what_was_measured_is_not_measured_again(smoke, monkeypatch):
    record, *_, arguments = smoke
    assert len(list((arguments.out / "records").glob("focused_topdown_8_users_*.json"))) == 3 * 2 + 3 + 2
    monkeypatch.setattr(catalogues, "evaluate", lambda *_, **__: pytest.fail("it was measured again"))
    assert catalogues.main(arguments) == [record]


@pytest.mark.slow
def test_a_table_of_something_else_is_not_written_over(smoke):
    *_, arguments = smoke
    for changes, says in (
        ({"users": 9}, "other draws"),
        ({"seeds": (7, 8)}, "other draws"),
        ({"published": None}, "published files"),
    ):
        with pytest.raises(SettingError, match=f"--out = .* has {says}"):
            catalogues.main(dataclasses.replace(arguments, **changes))


def test_records_by_environment_users_and_items(tmp_path, monkeypatch):
    """The same items in another environment, or with other users, are measured anew."""
    calls = []
    monkeypatch.setattr(catalogues, "_return", lambda policy, items, place: calls.append(place.env) or [1.0, 0.1])
    items = draw_catalogue(3)
    for env, users in (("focused_topdown", 8), ("focused_topdown", 8), ("focused_mix", 8), ("focused_mix", 9)):
        found = catalogues.figures(items, catalogues.Place(env, users, tmp_path))
        assert found["oracle"] == [1.0, 0.1]
    assert calls == ["focused_topdown"] * 2 + ["focused_mix"] * 4 and len(list(tmp_path.iterdir())) == 3
    arguments = catalogues.Arguments(budget="smoke", envs=("focused_topdown", "focused_mix"), out=tmp_path)
    assert [record["env"] for record in catalogues.main(arguments)] == list(arguments.envs)
    assert {path.name for path in tmp_path.glob("smoke*")} == {
        "smoke.json", "smoke.md", "smoke_focused_mix.json", "smoke_focused_mix.md",
    }  # fmt: skip


def test_topic_shares():
    one_topic, two_topics = np.zeros((2, 20))
    one_topic[4:6] = 0.6, 0.8
    two_topics[[0, 10]] = 0.8, 0.6
    np.testing.assert_allclose(catalogues.topic_shares(np.stack([one_topic, two_topics])), [1.0, 0.8])


def test_what_is_refused(tmp_path):
    with pytest.raises(DataError, match="item_embeddings_focused"):
        catalogues.main(catalogues.Arguments(published=tmp_path, budget="smoke"))
    with pytest.raises(SettingError, match="small"):
        catalogues.main(catalogues.Arguments(budget="smal"))
    with pytest.raises(SettingError, match="users"):
        catalogues.main(catalogues.Arguments(budget="smoke", users=1))
    with pytest.raises(SettingError, match="did you mean 'focused_mix'"):
        catalogues.main(catalogues.Arguments(budget="smoke", envs=("focused_mx",), out=tmp_path))
    (tmp_path / "smoke.json").write_text("{}")
    with pytest.raises(DataError, match=r"smoke.json: was not written by this study"):
        catalogues.main(catalogues.Arguments(budget="smoke", out=tmp_path))
