"""The catalogue study at its smallest: shares and tests tell the recipes apart; tables, JSON, and what is refused."""

from __future__ import annotations

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
    paths = home / "new" / "result.json", home / "other" / "table.md"
    arguments = catalogues.Arguments(published=home, budget="smoke", users=8, json=paths[0], markdown=paths[1])
    record = catalogues.main(arguments)
    return record, *(path.read_text(encoding="utf-8") for path in paths)


@pytest.mark.slow
def test_rows(smoke):
    record, written, _ = smoke
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
    record, _, text = smoke
    for row in record["catalogues"]:
        assert f"| {row['name']} |" in text and f"{row['oracle']:.1f} ± {row['oracle_error']:.1f}" in text
    assert text.count("\n| focused |") == len(catalogues.POWERS)


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
