"""Logged data: what is stored is what a user by hand would leave, and nothing damaged or mixed up is ever read."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemsjax
from gemsjax import datasets
from gemsjax.agents.base import Acting
from gemsjax.agents.references import make_epsilon_greedy_oracle
from gemsjax.clock import compile_clock
from gemsjax.datasets import files
from gemsjax.datasets.loading import _click_words
from gemsjax.errors import DataError, SettingError
from gemsjax.rollout import RESET, turn_key, turn_numbers
from gemsjax.types import Dims

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"num_items": 60, "slate_size": 5, "horizon": 12}
USERS, SEED = 50, 7


def small(**changes):
    return gemsjax.make("focused_topdown", **SMALL, **changes)


def generate(directory, **changes):
    env, params = small()
    return datasets.generate(env, params, directory, **{"users": USERS, "chunk_users": 20, "seed": SEED, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made.directory, tmp_path / "copy")


def python(*arguments, **environment):
    surroundings = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"), "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | surroundings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


# -- contents ----------------------------------------------------------------------------------------------------------


def test_files_and_types(made):
    data = datasets.load(made.directory)
    assert sorted(path.name for path in made.directory.iterdir()) == [
        "chunk_00000.npz",
        "chunk_00001.npz",
        "chunk_00002.npz",
        "schema.json",
    ]
    assert data.slates.shape == (USERS, 12, 5) and data.slates.dtype == np.int16
    assert data.clicks.shape == (USERS, 12) and data.clicks.dtype == np.uint16
    assert data.checksum == made.schema["checksum"] and made.generated == USERS
    with np.load(made.directory / "chunk_00002.npz", allow_pickle=False) as chunk:
        assert {name: (chunk[name].dtype, chunk[name].shape) for name in chunk} == {
            "slates": (np.int16, (10, 12, 5)),
            "clicks": (np.uint8, (10, 12, 1)),
        }


def test_users_are_what_stepping_by_hand_gives(made):
    env, params = small()
    policy = make_epsilon_greedy_oracle(Dims(env.num_items, env.slate_size, env.horizon), 0.5)
    data = datasets.load(made.directory)

    @jax.jit
    def turn(user_key, t, observation, state):
        key = turn_key(user_key, t)
        choice, _ = policy.act(Acting(), (), observation, (state, params), turn_numbers(env, policy, key)[1])
        return env.step(key, state, choice.slate, params)[:2]

    for user in (0, 23):
        user_key = jax.random.fold_in(jax.random.key(SEED), user)
        observation, state = jax.jit(env.reset)(turn_key(user_key, RESET), params)
        for t in range(env.horizon):
            observation, state = turn(user_key, t, observation, state)
            stored = datasets.unpack(data.slates[user, t], data.clicks[user, t])
            np.testing.assert_array_equal(stored.slate, observation.slate)
            np.testing.assert_array_equal(stored.clicks, observation.clicks)


def test_users_do_not_depend_on_how_they_are_cut(made, tmp_path):
    data = datasets.load(made.directory)
    for users, chunk_users in ((USERS, 50), (30, 7), (300, 150)):
        other = datasets.load(generate(tmp_path / f"{users}", users=users, chunk_users=chunk_users).directory)
        same = min(users, USERS)
        np.testing.assert_array_equal(other.slates[:same], data.slates[:same])
        np.testing.assert_array_equal(other.clicks[:same], data.clicks[:same])


def test_seed_and_epsilon_matter(made, tmp_path):
    data = datasets.load(made.directory)
    assert (datasets.load(generate(tmp_path / "seed", seed=8).directory).slates != data.slates).mean() > 0.5
    pure = datasets.load(generate(tmp_path / "epsilon", epsilon=0.0).directory)
    assert datasets.mean_return(pure) > datasets.mean_return(data)


def test_some_of_the_users(made):
    data, some = datasets.load(made.directory), datasets.load(made.directory, users=25, verify=False)
    np.testing.assert_array_equal(some.slates, data.slates[:25])
    assert some.checksum == data.checksum
    with pytest.raises(SettingError, match="users = 51 .*from 1 to 50"):
        datasets.load(made.directory, users=51)


def test_returns_and_summary_agree(made):
    data, facts = datasets.load(made.directory), datasets.summary(made)
    clicks = np.asarray(datasets.unpack(data.slates, data.clicks).clicks)
    np.testing.assert_array_equal(datasets.returns(data), clicks.sum(axis=(1, 2)))
    assert facts["mean_return"] == pytest.approx(datasets.mean_return(data))
    assert facts["standard_error"] == pytest.approx(clicks.sum(axis=(1, 2)).std(ddof=1) / USERS**0.5)
    assert facts["bytes"] == sum(path.stat().st_size for path in made.directory.glob("*.npz"))


@pytest.mark.parametrize(("size", "dtype"), [(3, np.uint16), (10, np.uint16), (20, np.uint32), (40, np.bool_)])
def test_unpacking_in_a_compiled_program(size, dtype):
    rng = np.random.default_rng(size)
    slates, clicks = rng.integers(0, 1000, (4, 6, size), np.int16), rng.random((4, 6, size)) < 0.3
    words = _click_words(np.packbits(clicks, axis=-1, bitorder="little"), size)
    assert words.dtype == dtype
    seen = jax.jit(datasets.unpack)(slates, words)
    assert (seen.slate.dtype, seen.clicks.dtype) == (jnp.int32, jnp.bool_)
    np.testing.assert_array_equal(seen.slate, slates)
    np.testing.assert_array_equal(seen.clicks, clicks)


def test_the_first_tenth_validates(made):
    data = datasets.load(made.directory)
    validation, training = datasets.split(data)
    assert (validation.users, training.users) == (5, 45) and training.checksum == data.checksum
    np.testing.assert_array_equal(validation.slates, data.slates[:5])
    np.testing.assert_array_equal(training.clicks, data.clicks[5:])
    with pytest.raises(SettingError, match="validation_share = 0.001 .* 50 users"):
        datasets.split(data, 0.001)


# -- generating --------------------------------------------------------------------------------------------------------


def test_one_compilation_for_all_chunks(made, tmp_path):
    with compile_clock() as clock:
        generate(tmp_path / "again", seed=9)
    assert clock.programs == 1


def test_progress_counts_users(tmp_path):
    seen = []
    generate(tmp_path / "set", on_progress=seen.append)
    assert seen == [0, 20, 40, 50]
    assert generate(tmp_path / "set", on_progress=seen.append).generated == 0
    assert seen[4:] == [50]


def test_killed_in_the_middle_it_continues_to_the_same_data(tmp_path):
    """The killed process splits its users over two devices, this one does not."""
    sizes = {"users": 290, "chunk_users": 150}
    script = (
        "import sys, time; sys.path.insert(0, 'tests'); import test_datasets as t\n"
        "stall = lambda done: done and (print(done, flush=True), time.sleep(60))\n"
        f"t.generate(sys.argv[1], on_progress=stall, **{sizes})"
    )
    process = python("-c", script, str(tmp_path / "set"), JAX_NUM_CPU_DEVICES="2")
    assert process.stdout.readline() == "150\n", process.communicate()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with pytest.raises(DataError, match="unfinished"):
        datasets.load(tmp_path / "set")
    with pytest.raises(DataError, match="seed is 7 there and 8 here"):
        generate(tmp_path / "set", seed=8, **sizes)
    (tmp_path / "set" / ".chunk_00001.npz.1.tmp").write_bytes(b"half a chu")
    continued = generate(tmp_path / "set", **sizes)
    assert continued.generated == 140
    assert continued.schema["checksum"] == generate(tmp_path / "uninterrupted", **sizes).schema["checksum"]
    assert len(list(continued.directory.iterdir())) == 3


def test_a_full_disk_leaves_nothing_that_looks_complete(made, tmp_path, monkeypatch):
    flush, count = os.fsync, iter(range(100))

    def full(descriptor):
        if next(count) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device .*the same call goes on"):
        generate(tmp_path / "set")
    with pytest.raises(DataError, match="unfinished"):
        datasets.load(tmp_path / "set")
    assert generate(tmp_path / "set").schema["checksum"] == made.schema["checksum"]


def test_a_damaged_chunk_of_an_unfinished_set_is_made_again(made, tmp_path):
    directory = tmp_path / "set"
    shutil.copytree(made.directory, directory)
    draft = json.loads((directory / "schema.json").read_text())
    del draft["checksum"]
    (directory / "partial.json").write_text(json.dumps(draft))
    (directory / "schema.json").unlink()
    flip(directory / "chunk_00001.npz")
    again = generate(directory)
    assert (again.generated, again.schema["checksum"]) == (20, made.schema["checksum"])


def test_another_configuration_is_refused_by_name(copy):
    with pytest.raises(DataError, match="users is 50 there and 60 here; epsilon is 0.5 there and 0.25 here"):
        generate(copy, users=60, epsilon=0.25)
    env, params = small(influence=0.05)
    with pytest.raises(DataError, match="constants.influence is 0.1.* there and 0.05.* here"):
        datasets.generate(env, params, copy, users=USERS, chunk_users=20, seed=SEED)
    with pytest.raises(DataError, match='catalogue is absent there and "mine.npy" here'):
        generate(copy, config_extra={"catalogue": "mine.npy"})


def test_other_peoples_files_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(DataError, match="not empty and holds no data set"):
        generate(tmp_path)
    with pytest.raises(DataError, match=r"thesis.tex cannot be used"):
        generate(tmp_path / "thesis.tex")


@pytest.mark.parametrize(
    ("setting", "value"), [("users", 0), ("seed", -1), ("seed", 2**32), ("chunk_users", 1.5), ("epsilon", 1.1)]
)
def test_settings_out_of_range(tmp_path, setting, value):
    with pytest.raises(SettingError, match=f"{setting} = {value}"):
        generate(tmp_path / "set", **{setting: value})
    assert not (tmp_path / "set").exists()


# -- damage ------------------------------------------------------------------------------------------------------------


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE = {
    "altered byte": (lambda d: flip(d / "chunk_00001.npz"), r"chunk_00001.npz was altered: its SHA-256"),
    "truncated": (lambda d: os.truncate(d / "chunk_00002.npz", 100), r"chunk_00002.npz is truncated .* has 100 bytes"),
    "missing": (lambda d: (d / "chunk_00000.npz").unlink(), r"chunk_00000.npz is missing"),
    "newer": (
        lambda d: change(d / "schema.json", format_version=2),
        r"format version 2, this gemsjax reads 1: a newer",
    ),
    "other format": (lambda d: change(d / "schema.json", format="parquet"), r"format 'parquet'"),
    "checksum": (lambda d: change(d / "schema.json", checksum="0"), r"schema.json was altered: its checksum"),
    "no chunks": (lambda d: change(d / "schema.json", chunks=None), r"schema.json was altered: it is not a schema"),
    "no config": (lambda d: change(d / "schema.json", config={}), r"schema.json was altered: it is not a schema"),
    "no schema": (lambda d: (d / "schema.json").unlink(), r"not a data set: it has no schema.json"),
    "not JSON": (lambda d: (d / "schema.json").write_text("{"), r"schema.json cannot be read"),
    "JSON of something": (lambda d: (d / "schema.json").write_text("[1]"), r"schema.json cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(copy, kind):
    damage, says = DAMAGE[kind]
    damage(copy)
    with pytest.raises(DataError, match=says):
        datasets.load(copy)


def test_a_complete_set_is_verified_before_it_is_taken_for_good(copy):
    flip(copy / "chunk_00000.npz")
    with pytest.raises(DataError, match="chunk_00000.npz was altered"):
        generate(copy)


def test_a_chunk_outside_the_directory_is_refused(copy):
    chunks = json.loads((copy / "schema.json").read_text())["chunks"]
    change(copy / "schema.json", chunks=[chunks[0] | {"file": "../secret.npz"}, *chunks[1:]])
    with pytest.raises(DataError, match="not a schema"):
        datasets.load(copy)


def replace_chunk(directory, **columns):
    """A chunk that agrees with its checksum but not with the rest of the schema."""
    schema = json.loads((directory / "schema.json").read_text())
    with np.load(directory / "chunk_00000.npz") as chunk:
        np.savez(directory / "chunk_00000.npz", **{**chunk, **columns})
    content = (directory / "chunk_00000.npz").read_bytes()
    schema["chunks"][0] |= {"bytes": len(content), "sha256": files.digest(content)}
    schema["checksum"] = files._checksum(schema["chunks"])
    (directory / "schema.json").write_text(json.dumps(schema))


def test_foreign_chunks_are_checked(copy):
    replace_chunk(copy, slates=np.full((20, 12, 5), 60, np.int16))
    with pytest.raises(DataError, match="item numbers outside the catalogue of 60"):
        datasets.load(copy)
    replace_chunk(copy, slates=np.zeros((20, 12, 4), np.int16))
    with pytest.raises(DataError, match=r"its slates are int16 \[20, 12, 4\], schema.json says int16 \[20, 12, 5\]"):
        datasets.load(copy)
    replace_chunk(copy, slates=np.array([None]))
    with pytest.raises(DataError, match="chunk_00000.npz cannot be read"):
        datasets.load(copy)


# -- command line ------------------------------------------------------------------------------------------------------


def test_command_line(tmp_path):
    out = tmp_path / "set"
    arguments = ["--users", "150", "--chunk-users", "100", "--seed", "3", "--out", str(out)]
    process = python("-m", "experiments.generate_dataset", *arguments)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    data = datasets.load(out)
    assert data.checksum in printed and str(out) in printed and "150 users in" in printed
    assert f"{datasets.mean_return(data):.2f} clicks" in printed and 85 < datasets.mean_return(data) < 105


def test_a_misspelt_environment_is_one_line(tmp_path):
    process = python("-m", "experiments.generate_dataset", "--env", "focused_topdwn", "--out", str(tmp_path / "x"))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert errors.startswith("error: environment = 'focused_topdwn'") and "did you mean 'focused_topdown'" in errors
    assert len(errors.splitlines()) == 1
