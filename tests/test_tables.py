"""Tables of one's own: reading, refusals by row and column, frames, episodes; propensities of the simulator's logs."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

import gemsjax
from gemsjax import datasets
from gemsjax.agents.logged import actions, to_episodes
from gemsjax.datasets.episodes import dims_of, from_frames, from_logs, from_table
from gemsjax.datasets.frames import make_frames, transitions
from gemsjax.datasets.propensities import oracle_slates, propensities
from gemsjax.datasets.tables import (
    MOVIELENS,
    TableSchema,
    drop_longest_users,
    keep_active_users,
    keep_top_items,
    read_table,
    split_users,
)
from gemsjax.errors import DataError, SettingError

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((Path(__file__).parent / "golden" / "recnn_examples.json").read_text())["frames"]
SLATES = TableSchema("visitor", "article", "shown_at", "clicked", "page", "rank", "chance")


@pytest.fixture(scope="module")
def slates():
    return read_table(DATA / "slates.csv", SLATES)


@pytest.fixture(scope="module")
def ratings():
    return read_table(DATA / "ratings.csv", MOVIELENS, ratings=True)


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# -- reading -----------------------------------------------------------------------------------------------------------


def test_slates_are_read_in_order(slates):
    assert slates.events == 31 and slates.user_ids.tolist() == ["ann", "bo", "cy"]
    assert slates.item_ids.tolist() == [f"a{n}" for n in range(1, 8)]
    ann = slates.users == 0
    assert (np.diff(slates.users) >= 0).all() and (np.diff(slates.turns) >= 0).all()
    assert np.bincount(slates.turns[ann]).tolist() == [3, 2, 3, 3]
    assert slates.positions[ann].tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 0, 1, 2]
    lines = [line.split(",") for line in (DATA / "slates.csv").read_text().splitlines()]
    (article, clicked, chance) = next((w[2], w[3], w[6]) for w in lines if w[0] == "ann" and w[4:6] == ["1", "1"])
    event = np.flatnonzero(ann)[4]  # the second of the second slate
    assert slates.item_ids[slates.items[event]] == article and slates.rewards[event] == float(clicked)
    assert slates.propensities[event] == np.float32(chance)


def test_ratings_are_read_in_order_of_time(ratings):
    assert ratings.user_ids.tolist() == [3, 7, 11, 20, 42]
    assert ratings.item_ids.tolist() == [10, 31, 50, 296, 318, 527]
    first = ratings.users == 0
    assert ratings.item_ids[ratings.items[first]].tolist() == [296, 31, 318, 527, 10, 50]
    assert ratings.rewards[first].tolist() == [4.0, -1.0, 5.0, 1.0, 1.0, 3.0]


@pytest.mark.parametrize(("stars", "reward"), GOLDEN["rating_map"])
def test_the_map_of_ratings(tmp_path, stars, reward):
    path = written(tmp_path / "one.csv", f"userId,movieId,rating,timestamp\n1,1,{stars},0\n")
    assert read_table(path, MOVIELENS, ratings=True).rewards.tolist() == [reward]


def test_a_table_without_header_time_or_plain_ids(tmp_path):
    path = written(tmp_path / "bare.tsv", "x\t007\t1\nx\t7\t0\nw\t7\t2.5\n")
    table = read_table(path, TableSchema(time=None), delimiter="\t", header=["user", "item", "reward"])
    assert table.item_ids.tolist() == ["007", "7"] and table.user_ids.tolist() == ["w", "x"]
    assert table.items.tolist() == [1, 0, 1] and table.rewards.tolist() == [2.5, 1.0, 0.0]


HEADER = "user,item,time,reward\n"


def test_dates_with_and_without_a_zone_are_in_order(tmp_path):
    """Without one they are UTC. Nothing is left to NumPy, which warns and will no longer read offsets."""
    dates = [
        "2024-01-05T10:00:00+02:00", "2024-01-05T08:30:00Z", "2024-01-05 09:00:00.25", "2024-01-05T03:45-0530",
        "2024-01-05T22:00:00.5+12", "2024-01-05", "2024-01-04 23:59:59 +00:00",
    ]  # fmt: skip
    seconds = [8.0, 8.5, 9 + 0.25 / 3600, 9.25, 10 + 0.5 / 3600, 0.0, -1 / 3600]
    path = written(tmp_path / "dates.csv", HEADER + "".join(f"u,{n},{date},1\n" for n, date in enumerate(dates)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = read_table(path)
    assert table.item_ids[table.items].tolist() == np.argsort(seconds).tolist()
    path = written(tmp_path / "wrong.csv", HEADER + "u,1,2024-01-05T10:00+02:00,1\nu,1,2024-01-05T10:00+25:00,1\n")
    with pytest.raises(DataError, match=r"row 2, column 'time': '2024-01-05T10:00\+25:00' is not a date"):
        read_table(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (HEADER + "a,b,1,2\na,b,2,lots\n", "row 2, column 'reward': 'lots' is not a number"),
        (HEADER + "a,b,1,nan\n", "row 1, column 'reward': 'nan' is not a finite number"),
        (HEADER + "a,b,2024-01-01,1\na,b,soon,1\n", "row 2, column 'time': 'soon' is not a date"),
        (HEADER + "a,b,soon,1\n", "row 1, column 'time': 'soon' is not a number"),
        (HEADER + "a,b,1,1\na,,1,1\n", "row 2, column 'item': '' is not an id"),
        (HEADER + "a,b,1,1\na,b,1\n", "row 2: it has 3 fields, the header has 4"),
        ("user,item,time,rewards\na,b,1,1\n", r"no column 'reward' for reward.*did you mean 'rewards'"),
        (HEADER + "a,b,1,1\na,b,2,1e300\n", "row 2, column 'reward': 1e\\+300 is not a number that float32 holds"),
        (HEADER + "a,b,1,1\na,b,inf,1\n", "row 2, column 'time': 'inf' is not a finite number"),
        (HEADER + "a,b,1,1\n\na,b,1,1\n", "row 2: it has 0 fields"),
        ("user,item,time,reward,item\na,b,1,1,c\n", "several columns 'item': which one is item"),
        (HEADER, "holds no events"),
        ("", "no column 'user'"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, text, says):
    with pytest.raises(DataError, match=says):
        read_table(written(tmp_path / "wrong.csv", text))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("a,y,1,0,s,0,0.5", "row 3, column 'position': 0.0 is not free"),
        ("a,y,1,0,s,1.5,0.5", "row 3, column 'position': 1.5 is not a whole number"),
        ("a,y,1,0,s,-1,0.5", "row 3, column 'position': -1.0 is not a whole number from 0"),
        ("a,y,1,0,s,10000,0.5", "row 3, column 'position': 10000.0 is not a whole number from 0 to 9999"),
        ("a,y,1,0,s,,0.5", "row 3, column 'position': '' is not a number"),
        ("a,y,1,0,s,2,", "row 3, column 'propensity': '' is not a number"),
        ("a,y,1,0,s,2,1e-60", "row 3, column 'propensity': 1e-60 is not a number that float32 holds"),
        ("a,y,1,0,,2,1", "row 3, column 'slate': '' is not an id"),
        ("a,y,1,0,s,2,0", "row 3, column 'propensity': 0.0 is not in"),
        ("a,y,1,0,s,2,1.01", "row 3, column 'propensity': 1.01 is not in"),
    ],
)
def test_ranks_and_propensities_that_make_no_sense(tmp_path, row, says):
    text = "user,item,time,reward,slate,position,propensity\na,x,1,0,s,0,0.5\na,z,1,0,s,1,1\n"
    schema = TableSchema(slate="slate", position="position", propensity="propensity")
    assert read_table(written(tmp_path / "right.csv", text), schema).events == 2
    with pytest.raises(DataError, match=says):
        read_table(written(tmp_path / "wrong.csv", text + row + "\n"), schema)


def test_long_texts_are_read_in_chunks_and_rows_keep_their_numbers(tmp_path, slates, monkeypatch):
    from gemsjax.datasets import tables

    monkeypatch.setattr(tables, "CHUNK_ROWS", 4)
    for name, column in vars(read_table(DATA / "slates.csv", SLATES)).items():
        np.testing.assert_array_equal(getattr(slates, name), column)
    rows = [f"u{n},{n},{n},1" for n in range(9)]
    mixed = read_table(written(tmp_path / "mixed.csv", HEADER + "\n".join([*rows, "u9,x9,9,1"]) + "\n"))
    assert mixed.item_ids.tolist() == sorted(["x9", *map(str, range(9))])  # some chunks had numbers only
    with pytest.raises(DataError, match="row 10, column 'reward': 'lots' is not a number"):
        read_table(written(tmp_path / "wrong.csv", HEADER + "\n".join([*rows, "u9,9,9,lots"]) + "\n"))
    with pytest.raises(DataError, match="row 10: it has 3 fields"):
        read_table(written(tmp_path / "short.csv", HEADER + "\n".join([*rows, "u9,9,9"]) + "\n"))


def test_stars_beyond_five_a_missing_file_and_a_long_delimiter(tmp_path):
    path = written(tmp_path / "r.csv", "userId,movieId,rating,timestamp\n1,1,4,0\n1,2,10,1\n")
    with pytest.raises(DataError, match="row 2, column 'rating': 10.0 is not 0 to 5"):
        read_table(path, MOVIELENS, ratings=True)
    with pytest.raises(DataError, match="is missing"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(SettingError, match="delimiter"):
        read_table(path, MOVIELENS, delimiter="::")


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"gemsjax\[tables\]"):
        read_table(written(tmp_path / "t.parquet", "PAR1"))


def test_parquet_is_read_as_csv_is(tmp_path, slates):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import csv, parquet

    text = csv.read_csv(DATA / "slates.csv")
    parquet.write_table(text, tmp_path / "slates.parquet")
    table = read_table(tmp_path / "slates.parquet", SLATES)
    for name, column in vars(slates).items():
        np.testing.assert_array_equal(getattr(table, name), column)
    holes = pyarrow.table({"user": [1, 2], "item": [1, None], "time": [0, 1], "reward": [0.0, 1.0]})
    parquet.write_table(holes, tmp_path / "holes.parquet")
    with pytest.raises(DataError, match="row 2, column 'item': it is empty"):
        read_table(tmp_path / "holes.parquet")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_table(written(tmp_path / "not.parquet", "a,b"))


# -- parts of tables ---------------------------------------------------------------------------------------------------


def test_the_most_frequent_items_keep_their_ids(ratings):
    frequency = dict(zip(*np.unique(ratings.item_ids[ratings.items], return_counts=True), strict=True))
    kept = keep_top_items(ratings, 3)
    best = sorted(sorted(frequency, key=lambda item: (-frequency[item], item))[:3])
    assert kept.item_ids.tolist() == best
    before = [(u, i, r) for u, i, r in _told(ratings) if i in best]
    assert _told(kept) == before and set(kept.items.tolist()) == {0, 1, 2}
    logged = from_table(kept)
    learnt = kept.rewards[_after_the_first(kept)]
    assert sorted(logged.item_reward[logged.taken]) == sorted(learnt) and logged.turns.slate.max() == 2
    assert set(kept.users.tolist()) == set(range(len(kept.user_ids)))


def test_parts_of_users(ratings):
    active = keep_active_users(ratings, 4)
    assert active.user_ids.tolist() == [3, 11] and len(active.item_ids) == 6
    training, test = split_users(ratings, 0.4, seed=1)
    assert sorted(_told(training) + _told(test)) == sorted(_told(ratings))
    assert not set(training.user_ids.tolist()) & set(test.user_ids.tolist()) and len(test.user_ids) == 2
    with pytest.raises(SettingError, match="test_share"):
        split_users(ratings, 0.0)


def test_the_longest_users_are_dropped(ratings):
    assert sorted(drop_longest_users(ratings).user_ids) == [7, 20, 42]
    assert sorted(drop_longest_users(ratings, 1).user_ids) == [7, 11, 20, 42]
    for wrong in (0, 5):
        with pytest.raises(SettingError, match="count"):
            drop_longest_users(ratings, wrong)


def _told(table):
    ids = zip(table.user_ids[table.users], table.item_ids[table.items], table.rewards, strict=True)
    return [(int(user), int(item), float(reward)) for user, item, reward in ids]


# -- frames and episodes -----------------------------------------------------------------------------------------------


def recorded_users(tmp_path):
    rows = [f"{u},{i},{t},{10 * u + t}" for u, items in enumerate(GOLDEN["users"]) for t, i in enumerate(items)]
    return read_table(written(tmp_path / "users.csv", HEADER + "\n".join(rows) + "\n"))


def test_frames(tmp_path):
    table = recorded_users(tmp_path)
    frames = make_frames(table, GOLDEN["frame_size"])
    assert table.item_ids[frames.items].tolist() == GOLDEN["windows"]
    assert np.flatnonzero(frames.done).tolist() == GOLDEN["done_rows"]
    assert frames.users.tolist() == [0, 0, 0, 1, 1] and frames.rewards[3].tolist() == [10.0, 11.0, 12.0]
    assert make_frames(table, 4).items.shape == (1, 5) and not make_frames(table, 5).items.size


def test_transitions_of_frames(tmp_path):
    frames = make_frames(recorded_users(tmp_path), 2)
    embeddings = np.arange(30.0).reshape(10, 3)
    found = transitions(frames, embeddings)
    assert found.state.shape == (5, 2 * 3 + 2)
    row = frames.items[1]
    np.testing.assert_array_equal(found.state[1], np.r_[embeddings[row[0]], embeddings[row[1]], 1.0, 2.0])
    np.testing.assert_array_equal(found.next_state[0], found.state[1])
    assert found.action[1] == row[2] and found.reward[1] == 3.0


def test_slates_as_episodes(slates):
    """Turn 0 is observed only; padding is -1, not taken, without reward."""
    logged = from_table(slates)
    assert dims_of(logged, slates) == (7, 3, 4)
    assert logged.turns.slate.shape == (3, 5, 3)
    bo = logged.turns.slate[1]
    assert (bo[2:] == -1).all() and (bo[:2] >= 0).all() and not logged.taken[1, 1:].any()
    assert logged.turns.slate[0, 1, 2] == -1 and logged.taken[0, 0].tolist() == [True, True, False]
    assert logged.reward.sum() == slates.rewards[_after_the_first(slates)].sum()
    np.testing.assert_array_equal(logged.item_reward.sum(-1), logged.reward)
    np.testing.assert_array_equal(logged.turns.clicks[:, 1:], logged.item_reward > 0)
    assert sorted(logged.propensity[logged.taken]) == sorted(slates.propensities[_after_the_first(slates)])


def _after_the_first(table):
    first = np.r_[True, table.users[1:] != table.users[:-1]]
    return table.turns != table.turns[first][table.users]


def test_long_histories_are_cut_and_every_turn_is_learnt_once(ratings):
    logged = from_table(ratings, horizon=2)
    assert logged.turns.slate.shape == (3 + 1 + 2 + 2, 3, 1)  # of 6, 2, 5 and 4 ratings; a single one gives nothing
    assert logged.taken.sum() == 5 + 1 + 4 + 3
    assert sorted(logged.item_reward[logged.taken]) == sorted(ratings.rewards[_after_the_first(ratings)])
    np.testing.assert_array_equal(logged.turns.slate[1, 0], logged.turns.slate[0, 2])
    whole = from_table(ratings, horizon=2, partial="drop")
    assert whole.taken.all() and whole.turns.slate.shape == (2 + 2 + 1, 3, 1)
    plain = to_episodes(whole)
    np.testing.assert_array_equal(plain.action, whole.turns.slate[:, 1:])
    np.testing.assert_array_equal(plain.final.slate, whole.turns.slate[:, -1])
    assert plain.observation.slate.shape == (5, 2, 1)
    with pytest.raises(DataError, match="longest history"):
        from_table(ratings, horizon=9, partial="drop")
    with pytest.raises(SettingError, match="horizon"):
        from_table(ratings, horizon=0)


def test_a_burn_in_is_seen_but_not_learnt_from_again(ratings):
    logged = from_table(ratings, horizon=3, burn_in=1)
    assert logged.turns.slate.shape == (2 + 1 + 2 + 1, 4, 1)  # of 6, 2, 5 and 4 ratings
    assert logged.taken[:, :, 0].sum(axis=1).tolist() == [3, 2, 1, 3, 1, 3]
    assert sorted(logged.item_reward[logged.taken]) == sorted(ratings.rewards[_after_the_first(ratings)])
    np.testing.assert_array_equal(logged.turns.slate[1, :2], logged.turns.slate[0, 2:])
    assert not logged.taken[1, 0] and logged.taken[1, 1]
    for wrong in (-1, 3):
        with pytest.raises(SettingError, match="burn_in"):
            from_table(ratings, horizon=3, burn_in=wrong)
    with pytest.raises(DataError, match="episode 1, turn 1, slot 0 is not taken"):
        to_episodes(from_table(ratings, horizon=3, burn_in=1, partial="drop"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"reward": np.nan}, "episode 2, turn 2 has a reward that is no finite number"),
        ({"reward": -np.inf}, "episode 2, turn 2 has a reward that is no finite number"),
        ({"taken": False}, "episode 2, turn 2, slot 0 is not taken"),
    ],
    ids=str,
)
def test_other_agents_are_not_given_what_cannot_be_learnt_from(ratings, change, says):
    logged = from_table(ratings, horizon=2, partial="drop")
    ((name, value),) = change.items()
    column = np.array(getattr(logged, name))
    column[2, 1] = value
    with pytest.raises(DataError, match=says):
        to_episodes(dataclasses.replace(logged, **{name: column}))


def test_frames_bring_their_propensities(slates):
    """So that an agent can use probabilities that were logged; none where the table has none."""
    frames = make_frames(slates, 2)
    assert frames.propensities.shape == frames.items.shape
    logged = from_frames(frames)
    np.testing.assert_array_equal(logged.propensity[..., 0], frames.propensities[:, 1:])
    np.testing.assert_array_equal(frames.propensities[0], slates.propensities[:3])
    np.testing.assert_array_equal(actions(logged, 7).propensity[..., 0].T, frames.propensities[:, 1:])
    assert from_frames(frames._replace(propensities=None)).propensity == ()


def test_frames_as_episodes(ratings):
    frames = make_frames(ratings, 3)
    logged = from_frames(frames)
    seen = actions(jax.tree.map(np.asarray, logged))
    assert seen.items.shape == (3, len(frames.items), 1)
    np.testing.assert_array_equal(seen.items[-1, :, 0], frames.items[:, -1])
    np.testing.assert_array_equal(seen.reward.T, frames.rewards[:, 1:])
    np.testing.assert_array_equal(seen.clicks[..., 0].T, frames.rewards[:, 1:] > 0)


# -- logs of the simulator ---------------------------------------------------------------------------------------------


def test_propensities_of_the_logging_policy(tmp_path):
    """Frequencies in a log agree with the probabilities, which are found by playing the users again."""
    env, params = gemsjax.make("focused_topdown", num_items=30, slate_size=4, horizon=8)
    datasets.generate(env, params, tmp_path, users=120, epsilon=0.4, seed=3)
    data = datasets.load(tmp_path)
    oracle = oracle_slates(env, params, data)
    own, mean = (propensities(data.slates, oracle, 0.4, 30, ranks) for ranks in ("own", "any"))
    kept = data.slates == oracle
    np.testing.assert_allclose(np.unique(own), [0.4 / 30, 0.6 + 0.4 / 30], rtol=1e-5)
    expected, draws = 0.6 + 0.4 / 30, kept.size
    assert abs(kept.mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / draws)
    # The mean of 1 / probability over what was shown counts the items that could be: an identity of importance weights.
    assert abs((1.0 / own).mean() / 30 - 1) < 0.1 and abs((1.0 / mean).mean() / 30 - 1) < 0.1
    logged = from_logs(data, mean)
    np.testing.assert_array_equal(logged.propensity, mean[:, 1:])
    assert logged.reward.sum(axis=1).tolist() == (datasets.returns(data) - logged.turns.clicks[:, 0].sum(-1)).tolist()
    with pytest.raises(SettingError, match="propensity"):
        from_logs(data, mean[:, 1:])
    with pytest.raises(DataError, match="was this environment logged"):
        oracle_slates(env, params.replace(influence=params.influence * 3), data)
