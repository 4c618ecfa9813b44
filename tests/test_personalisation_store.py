"""The store of users' states: equal to a loop over interactions, ids out of range, and what the disk gives back."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemsjax.errors import DataError, SettingError
from gemsjax.personalisation import (
    Interaction,
    PersonalisationConfig,
    learn,
    load,
    make_store,
    policy_scores,
    save,
    store,
)

USERS, DIM, K, C, B = 300, 3, 5, 2, 170
CONFIG = PersonalisationConfig(tau=0.7)
STORE = make_store(USERS, DIM)
learn_one = jax.jit(learn)


def interactions(seed: int, size: int = B) -> Interaction:
    rng = np.random.default_rng(seed)
    return Interaction(
        *(rng.normal(size=(size, *shape)).astype(np.float32) for shape in ((K,), (K, DIM))),
        rng.random((size, K)) > 0.2,
        rng.integers(-1, K + 1, (size, C)),
        rng.random((size, C)) < 0.8,
        *(rng.normal(size=size).astype(np.float32) for _ in range(2)),
    )


def filled(seed: int = 0) -> jax.Array:
    rows = np.random.default_rng(seed).normal(size=(USERS, 2 * DIM + 1)).astype(np.float32)
    return STORE.place(rows)


def one_by_one(table, ids, batch, probs=None) -> tuple[np.ndarray, list[bool]]:
    """The same without a store: each interaction on its user as it is by then."""
    rows, updated = np.array(table), []
    for number, user in enumerate(ids):
        interaction = jax.tree.map(lambda x, n=number: x[n], batch)
        given = None if probs is None else probs[number]
        state, done = learn_one(store.unpack(jnp.asarray(rows[user])), interaction, CONFIG, given)
        rows[user] = store.pack(state)
        updated.append(bool(done))
    return rows, updated


def ids_of(kind: str) -> np.ndarray:
    rng = np.random.default_rng(7)
    return {
        "distinct": rng.permutation(USERS)[:B],
        "some twice": rng.integers(0, USERS, B),
        "few users": rng.integers(0, 4, B) * 99,
        "one user": np.full(B, USERS - 1),
    }[kind]


@pytest.mark.parametrize("kind", ["distinct", "some twice", "few users", "one user"])
def test_a_batch_is_a_loop_in_its_order(kind):
    ids, batch, before = ids_of(kind), interactions(1), np.asarray(filled())
    expected, updated = one_by_one(before, ids, batch)
    learnt = STORE.update(filled(), ids, batch, CONFIG)
    np.testing.assert_allclose(learnt.table, expected, rtol=0, atol=1e-5)
    assert learnt.updated.tolist() == updated and 0 < sum(updated) < B
    assert learnt.known.all()
    untouched = np.setdiff1d(np.arange(USERS), ids[np.asarray(learnt.updated)])
    np.testing.assert_array_equal(np.asarray(learnt.table)[untouched], before[untouched])


def test_probabilities_that_were_served_are_used_as_they_are():
    ids, batch = ids_of("some twice"), interactions(2)
    states, _ = STORE.states(filled(), ids)
    probs = jax.vmap(lambda b, s, i, m: policy_scores(b, s, i, m, CONFIG)[1])(
        batch.base, states, batch.items, batch.mask
    )
    expected, updated = one_by_one(filled(), ids, batch, probs)
    learnt = STORE.update(filled(), ids, batch, CONFIG, probs)
    np.testing.assert_allclose(learnt.table, expected, rtol=0, atol=1e-5)
    assert learnt.updated.tolist() == updated
    assert not np.allclose(learnt.table, STORE.update(filled(), ids, batch, CONFIG).table, atol=1e-4)


def test_states_are_the_rows_of_their_ids():
    rows, ids = np.asarray(filled()), np.array([299, 0, 5, 0])
    states, known = STORE.states(filled(), ids)
    np.testing.assert_array_equal(store.pack(states), rows[ids])
    assert known.all()
    fresh, _ = STORE.states(STORE.init(), ids)
    assert all((leaf == 0).all() for leaf in fresh)


@pytest.mark.parametrize(("wrong", "says"), [(USERS, r"ids\[3\] = 300"), (-1, r"ids\[3\] = -1"), (2**40, r"ids\[3\]")])
def test_ids_out_of_range_are_refused_on_the_host(wrong, says):
    ids = np.arange(B)
    ids[3] = wrong
    for call in (lambda: STORE.states(filled(), ids), lambda: STORE.update(filled(), ids, interactions(0), CONFIG)):
        with pytest.raises(SettingError, match=says + ".*from 0 to 299"):
            call()


@pytest.mark.parametrize("ids", [np.zeros(B), np.zeros((B, 1), int), np.zeros(B - 1, int), np.int64(3)])
def test_ids_of_another_form_are_refused(ids):
    with pytest.raises(SettingError):
        STORE.update(filled(), ids, interactions(0), CONFIG)


def test_ids_out_of_range_are_flagged_in_a_compiled_program():
    """They neither raise (nothing can, there) nor touch a user: not the last one, not one counted from the end."""
    ids = np.resize(np.array([5, -1, USERS, 2**31 - 1, -(2**31), 5, USERS - 1]), B).astype(np.int32)
    fine = (ids >= 0) & (ids < USERS)
    batch = interactions(3)
    program = jax.jit(lambda table, ids: (STORE.update(table, ids, batch, CONFIG), STORE.states(table, ids)))
    learnt, (states, known) = program(filled(), ids)
    np.testing.assert_array_equal(learnt.known, fine)
    np.testing.assert_array_equal(known, fine)
    assert not learnt.updated[~fine].any() and learnt.updated[fine].any()
    assert (np.asarray(store.pack(states))[~fine] == 0).all()
    expected, _ = one_by_one(filled(), ids[fine], jax.tree.map(lambda x: x[fine], batch))
    np.testing.assert_allclose(learnt.table, expected, rtol=0, atol=1e-5)


def test_interactions_that_cannot_be_leave_their_user_to_the_next():
    """Among duplicates: broken numbers, choices out of range and masked rows are skipped, in order, user by user."""
    ids, batch = ids_of("few users"), interactions(5)
    kind = np.arange(B) % 7
    broken = batch._replace(
        reward=np.where(kind == 0, np.nan, np.where(kind == 1, np.inf, batch.reward)).astype(np.float32),
        gate=np.where(kind == 2, np.nan, batch.gate).astype(np.float32),
        chosen=np.where((kind == 3)[:, None], [[K, -1]], batch.chosen),
        mask=batch.mask & (kind != 4)[:, None],
        items=np.where((kind == 5)[:, None, None], np.float32(np.nan), batch.items),
    )
    expected, updated = one_by_one(filled(), ids, broken)
    learnt = STORE.update(filled(), ids, broken, CONFIG)
    assert np.isfinite(learnt.table).all() and learnt.updated.tolist() == updated
    np.testing.assert_allclose(learnt.table, expected, rtol=0, atol=1e-5)
    assert not learnt.updated[kind < 6].any() and learnt.updated[kind == 6].any()
    whole = kind == 6
    kept = jax.tree.map(lambda x: x[whole], batch)
    np.testing.assert_allclose(STORE.update(filled(), ids[whole], kept, CONFIG).table, expected, rtol=0, atol=1e-5)


def test_interactions_without_candidates_change_nobody():
    batch = interactions(6)._replace(
        base=np.zeros((B, 0), np.float32), items=np.zeros((B, 0, DIM), np.float32), mask=np.zeros((B, 0), bool)
    )
    learnt = STORE.update(filled(), ids_of("some twice"), batch, CONFIG)
    np.testing.assert_array_equal(learnt.table, filled())
    assert not learnt.updated.any() and learnt.known.all()


def test_an_empty_batch_and_one_of_gates_of_zero_change_nothing():
    before = np.asarray(filled())
    empty = STORE.update(filled(), np.zeros(0, int), interactions(0, 0), CONFIG)
    np.testing.assert_array_equal(empty.table, before)
    assert empty.updated.shape == empty.known.shape == (0,)
    filler = interactions(4)._replace(gate=np.zeros(B, np.float32))
    learnt = STORE.update(filled(), ids_of("some twice"), filler, CONFIG)
    np.testing.assert_array_equal(learnt.table, before)
    assert not learnt.updated.any()


@pytest.mark.parametrize(("users", "dim"), [(0, 3), (-5, 3), (2**31, 3), (10, 0), (2.5, 3)])
def test_sizes_out_of_range_are_refused(users, dim):
    with pytest.raises(SettingError, match="users|dim"):
        make_store(users, dim)


def test_vectors_of_another_length_and_numbers_out_of_range_are_refused():
    batch = interactions(0)
    with pytest.raises(SettingError, match="items"):
        STORE.update(filled(), ids_of("distinct"), batch._replace(items=batch.items[..., :2]), CONFIG)
    with pytest.raises(SettingError, match="tau"):
        STORE.update(filled(), ids_of("distinct"), batch, PersonalisationConfig(tau=0.0))


def test_several_devices_give_the_numbers_of_one():
    """In a process of its own: 301 users on three devices, so that their parts are padded."""
    program = """
import numpy as np, jax
from test_personalisation_store import *
many = make_store(301, DIM)
assert len(many.init().sharding.device_set) == 3 and len(many.init()) == 303
rows = np.asarray(filled())
table = many.place(np.concatenate([rows, rows[:1]]))
learnt = many.update(table, ids_of("some twice"), interactions(1), CONFIG)
states, known = many.states(learnt.table, np.arange(301))
assert known.all() and learnt.known.all()
expected, updated = one_by_one(rows, ids_of("some twice"), interactions(1))
np.testing.assert_allclose(store.pack(states)[:300], expected, rtol=0, atol=1e-5)
np.testing.assert_array_equal(store.pack(states)[300], rows[0])
assert learnt.updated.tolist() == updated
"""
    paths = os.pathsep.join([os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))])
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "3", "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- the disk ----------------------------------------------------------------------------------------------------------


def test_a_table_comes_back_bit_for_bit_and_goes_on_alike(tmp_path):
    table = filled()
    assert save(STORE, table, tmp_path / "new" / "users", users_per_chunk=128) == tmp_path / "new" / "users"
    other, loaded = load(tmp_path / "new" / "users")
    assert (other.users, other.dim) == (USERS, DIM)
    np.testing.assert_array_equal(loaded, table)
    ids, batch = ids_of("some twice"), interactions(1)
    np.testing.assert_array_equal(
        other.update(loaded, ids, batch, CONFIG).table, STORE.update(filled(), ids, batch, CONFIG).table
    )


@pytest.mark.parametrize("size", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_store_of_many_users_comes_back(tmp_path, size):
    """In several chunks, after a batch in which users repeat."""
    many, dim = make_store(size, 32), 32
    rng = np.random.default_rng(3)
    ids = np.concatenate([rng.integers(0, size, 200), [0, size - 1, size - 1]])
    batch = interactions(9, len(ids))
    batch = batch._replace(items=rng.normal(size=(len(ids), K, dim)).astype(np.float32))
    table = many.update(many.place(rng.standard_normal((size, 2 * dim + 1), np.float32)), ids, batch, CONFIG).table
    save(many, table, tmp_path, users_per_chunk=size // 3)
    assert len(list(tmp_path.glob("states_*.npy"))) == 4
    other, loaded = load(tmp_path)
    assert (other.users, other.dim) == (size, dim)
    np.testing.assert_array_equal(loaded, table)


def test_a_table_of_another_store_does_not_replace_the_good_one(tmp_path):
    save(STORE, filled(), tmp_path, users_per_chunk=128)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    fewer = make_store(USERS - 1, DIM).init()
    for wrong in (make_store(USERS, DIM + 1).init(), make_store(USERS, DIM - 1).init(), fewer, filled()[0]):
        with pytest.raises(SettingError, match=f"table = .*a table of this store .{USERS} users with vectors of {DIM}"):
            save(STORE, wrong, tmp_path, users_per_chunk=128)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(SettingError, match="table"):
        save(STORE, fewer, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_saving_again_writes_what_changed_and_leaves_nothing_behind(tmp_path):
    save(STORE, filled(), tmp_path, users_per_chunk=128)
    first = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")}
    table = filled().at[299, 0].set(0.25)
    (tmp_path / ".states_00000.npy.123.tmp").write_bytes(b"left by a process that was killed")
    save(STORE, table, tmp_path, users_per_chunk=128)
    second = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")}
    assert len(first) == len(second) == 3 and len(first.items() & second.items()) == 2
    assert {path.name for path in tmp_path.iterdir()} == {*second, "store.json", ".lock"}
    np.testing.assert_array_equal(load(tmp_path)[1], table)


def test_a_save_that_is_interrupted_leaves_the_old_table(tmp_path, monkeypatch):
    save(STORE, filled(), tmp_path, users_per_chunk=128)

    def stop(*_):
        raise KeyboardInterrupt

    from gemsjax.personalisation import files

    monkeypatch.setattr(files, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        save(STORE, filled(1), tmp_path, users_per_chunk=128)
    np.testing.assert_array_equal(load(tmp_path)[1], filled())


@pytest.mark.parametrize("name", ["states", "store.json"])
@pytest.mark.parametrize("harm", ["truncated", "one bit", "longer", "empty", "missing"])
def test_a_damaged_file_is_named(tmp_path, name, harm):
    save(STORE, filled(), tmp_path, users_per_chunk=128)
    path = sorted(tmp_path.glob(f"{name}*"))[-1]
    content = path.read_bytes()
    harmed = {
        "truncated": content[:-7],
        "one bit": content[:200] + bytes([content[200] ^ 1]) + content[201:],
        "longer": content + b"1",
        "empty": b"",
    }
    path.unlink() if harm == "missing" else path.write_bytes(harmed[harm])
    with pytest.raises(DataError, match=path.name):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "something"}, "format 'something'"),
        ({"format_version": 2}, "version 2"),
        ({"users": 299}, "altered"),
        ({"dim": 4}, "altered"),
        ({"users_per_chunk": 0}, "altered"),
    ],
)
def test_an_altered_index_is_refused(tmp_path, change, says):
    save(STORE, filled(), tmp_path)
    path = tmp_path / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=f"store.json .*{says}"):
        load(tmp_path)


def test_a_serialised_object_is_not_loaded(tmp_path):
    """Even where every checksum fits: `.npy` files that hold Python objects are refused."""
    import hashlib

    from gemsjax.disk import digest, write_json

    save(STORE, filled(), tmp_path)
    path = next(tmp_path.glob("states*"))
    np.save(path, np.array([{"a": 1}] * USERS, object), allow_pickle=True)
    index = json.loads((tmp_path / "store.json").read_text())
    content = path.read_bytes()
    index["chunks"][0] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    del index["checksum"]
    write_json(tmp_path / "store.json", index | {"checksum": digest(index)})
    with pytest.raises(DataError, match=f"{path.name} cannot be read"):
        load(tmp_path)


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(DataError, match=r"letter\.txt"):
        save(STORE, filled(), tmp_path)
    with pytest.raises(DataError, match="no user states"):
        load(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
