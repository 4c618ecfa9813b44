"""Checkpoints: what comes back is what was saved, or an error or an older checkpoint; nothing in between."""

import asyncio
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

import gemsjax
from gemsjax import checkpoint
from gemsjax.errors import DataError, SettingError

CONFIG = {"method": "sac-gems", "agent": {"gamma": 0.8, "widths": [256, 256], "bound": True}, "data": None}


class Pair(NamedTuple):
    a: jax.Array
    b: jax.Array


@struct.dataclass
class State:
    params: dict
    pair: Pair
    key: tuple[jax.Array, jax.Array]


def make_state(seed: int = 0, width: int = 4) -> Any:
    key = jax.random.key(seed)
    params = {
        "w": jax.random.normal(key, (3, width)),
        "half": jax.random.normal(key, (5,)).astype(jnp.bfloat16),
        "slates": jnp.arange(60, dtype=jnp.int16).reshape(2, 3, 10),
        "clicks": jax.random.uniform(key, (2, 30)) < 0.2,
        "odd values": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-42]),
        "nothing": (),
        "empty": jnp.zeros((0, 3), jnp.int32),
        "no keys": jax.random.split(key, 2)[:0],
        "none": None,
    }
    keys = (key, jax.random.split(jax.random.key(1, impl="rbg"), 3))
    return State(params, Pair(jnp.int32(seed), jnp.bool_(True)), keys)  # type: ignore[call-arg]


def numpy_of(leaf: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


def assert_same(got: object, wanted: object) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(wanted)  # type: ignore[operator]
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        assert isinstance(a, jax.Array) and a.dtype == b.dtype and a.shape == b.shape, path
        assert numpy_of(a).tobytes() == numpy_of(b).tobytes(), path


def save(directory: Path, step: int, keep: int = 2) -> Path:
    return checkpoint.save(directory, make_state(step), step=step, config=CONFIG, keep=keep)


def largest_file(path: Path) -> Path:
    return max((file for file in path.rglob("*") if file.is_file() and file.name != "manifest.json"),
               key=lambda file: file.stat().st_size)  # fmt: skip


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(bytes(content))


def test_round_trip_is_bitwise_and_quiet(tmp_path, capfd, caplog):
    caplog.set_level(logging.INFO, logger="absl")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = save(tmp_path / "deep" / "run", 7)
        restored = checkpoint.restore(tmp_path / "deep" / "run", make_state(1), config=CONFIG)
        from_shapes = checkpoint.restore(tmp_path / "deep" / "run", jax.eval_shape(make_state), step=7)
    assert path.name == "step_00000007" and restored.step == 7
    assert_same(restored.tree, make_state(7))
    assert_same(from_shapes.tree, make_state(7))
    assert restored.manifest["config"] == CONFIG
    assert restored.manifest["config_hash"] == checkpoint.config_hash(CONFIG)
    assert restored.manifest["versions"]["jax"] == jax.__version__
    assert capfd.readouterr() == ("", "") and not [each for each in caplog.records if each.name == "absl"]


def test_within_a_running_event_loop_as_in_a_notebook(tmp_path):
    async def cell() -> object:
        save(tmp_path, 1)
        tree = checkpoint.restore(tmp_path, make_state()).tree
        assert asyncio.get_running_loop() is asyncio.get_event_loop()
        await asyncio.sleep(0)
        return tree

    assert_same(asyncio.run(cell()), make_state(1))


def test_draws_go_on_as_before(tmp_path):
    save(tmp_path, 3)
    key = checkpoint.restore(tmp_path, make_state()).tree.key[0]
    assert jnp.array_equal(jax.random.normal(key, (5,)), jax.random.normal(make_state(3).key[0], (5,)))


def test_restored_leaves_can_be_donated(tmp_path):
    tree = {"a": jnp.arange(4096.0), "b": jnp.arange(4096.0)}
    checkpoint.save(tmp_path, tree, step=0, config={})
    restored = checkpoint.restore(tmp_path, tree).tree
    places = {leaf.unsafe_buffer_pointer() for leaf in restored.values()}
    result = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)(restored)
    assert len(places) == 2 and all(leaf.is_deleted() for leaf in restored.values())
    assert {leaf.unsafe_buffer_pointer() for leaf in result.values()} == places


def test_numbers_and_numpy_leaves(tmp_path):
    tree = {"n": 3, "x": np.float32(0.5), "y": np.arange(3, dtype=np.int32)}
    checkpoint.save(tmp_path, tree, step=0, config={})
    assert_same(checkpoint.restore(tmp_path, tree).tree, jax.tree.map(jnp.asarray, tree))


@pytest.mark.parametrize("leaf", [np.arange(3), "text", np.array(["text"]), np.array([None]), jnp.sin])
def test_leaves_that_would_not_come_back_are_refused(tmp_path, leaf):
    with pytest.raises(DataError, match=r"\['bad'\]"):
        checkpoint.save(tmp_path, {"good": jnp.ones(2), "bad": leaf}, step=0, config={})
    assert not any(tmp_path.iterdir())


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{step:08d}" for step in (2, 3, 4)]
    with pytest.raises(SettingError, match="keep"):
        save(tmp_path, 5, keep=0)


def test_damaged_ones_do_not_count_as_kept(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "step_00000002" / "manifest.json").unlink()
    (tmp_path / "step_00000003").mkdir()
    save(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000004"]


def test_going_on_from_an_older_step_leaves_the_later_ones_behind(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    assert_same(checkpoint.restore(tmp_path, make_state(), step=1).tree, make_state(1))
    with pytest.warns(UserWarning, match=r"steps \[3\]"):
        checkpoint.save(tmp_path, make_state(20), step=2, config=CONFIG)
    assert checkpoint.latest_step(tmp_path) == 2
    assert_same(checkpoint.restore(tmp_path, make_state()).tree, make_state(20))


def damage_bit(path: Path) -> str:
    file = largest_file(path)
    flip(file, file.stat().st_size // 2)
    return "altered"


def damage_manifest_bit(path: Path) -> str:
    manifest = path / "manifest.json"
    flip(manifest, manifest.read_bytes().index(b"0.8"))
    return "altered|cannot be read"


def damage_missing_file(path: Path) -> str:
    largest_file(path).unlink()
    return "incomplete: no bytes"


def damage_length(path: Path) -> str:
    file = largest_file(path)
    os.truncate(file, file.stat().st_size - 1)
    return "incomplete"


def damage_manifest_missing(path: Path) -> str:
    (path / "manifest.json").unlink()
    return "no complete checkpoint"


def damage_emptied(path: Path) -> str:
    shutil.rmtree(path)
    path.mkdir()
    return "no complete checkpoint"


def damage_format(path: Path) -> str:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    return "format 99"


DAMAGES = [value for name, value in list(globals().items()) if name.startswith("damage_")]


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    save(directory, 1)
    save(directory, 2)
    return directory


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_walked_back_over(tmp_path, two_steps, damage):
    root = tmp_path / "run"
    shutil.copytree(two_steps, root)
    assert checkpoint.verify(root / "step_00000002")["step"] == 2
    reason = damage(root / "step_00000002")
    with pytest.raises(DataError, match=reason):
        checkpoint.verify(root / "step_00000002")
    with pytest.warns(UserWarning, match=f"going back to the checkpoint of step 1.*({reason})"):
        restored = checkpoint.restore(root, make_state(), config=CONFIG)
    assert restored.step == 1
    assert_same(restored.tree, make_state(1))
    with pytest.raises(DataError, match=reason):
        checkpoint.restore(root, make_state(), step=2)
    damage(root / "step_00000001")
    with pytest.raises(DataError, match="no usable checkpoint"):
        checkpoint.restore(root, make_state())


def test_every_byte_of_the_arrays_is_guarded(tmp_path, two_steps):
    root = tmp_path / "run"
    shutil.copytree(two_steps, root)
    for file in sorted((root / "step_00000002").rglob("*")):
        for at in range(0, file.stat().st_size if file.is_file() else 0, 97):
            flip(file, at)
            if file.name != "manifest.json" or json_changed(file, two_steps):
                with pytest.raises(DataError):
                    checkpoint.verify(root / "step_00000002")
            flip(file, at)
    assert checkpoint.verify(root / "step_00000002")["step"] == 2


def json_changed(file: Path, original: Path) -> bool:
    """Whether the manifest says something else: a flip from one blank to another does not matter."""
    try:
        return json.loads(file.read_text()) != json.loads((original / "step_00000002" / file.name).read_text())
    except ValueError:
        return True


def test_no_checkpoint_at_all(tmp_path):
    assert checkpoint.latest_step(tmp_path / "missing") is None
    (tmp_path / "step_00000006").mkdir()
    (tmp_path / "step_00000007").touch()
    (tmp_path / "step_8").mkdir()
    assert checkpoint.latest_step(tmp_path) is None
    with pytest.raises(DataError, match="no usable checkpoint: .*step_00000006"):
        checkpoint.restore(tmp_path, make_state())
    with pytest.raises(DataError, match="no checkpoint of step 5"):
        checkpoint.restore(tmp_path, make_state(), step=5)


def test_another_configuration_is_refused_key_by_key(tmp_path, two_steps):
    other = {"method": "sac-gems", "agent": {"gamma": 0.9, "widths": [256, 256], "bound": 1}, "users": 10}
    with pytest.raises(DataError) as caught:
        checkpoint.restore(two_steps, make_state(), config=other)
    message = str(caught.value)
    for part in ("agent.gamma is 0.8 there and 0.9 here", "agent.bound is true there and 1 here",
                 "data is null there and absent here", "users is absent there and 10 here"):  # fmt: skip
        assert part in message
    assert "widths" not in message and "method" not in message


def test_configurations_equal_but_for_how_they_are_written(two_steps):
    agent = {"widths": (256, 256), "bound": True, "gamma": 0.8}
    same = {"data": None, "agent": agent, "method": "sac-gems"}
    assert checkpoint.config_hash(same) == checkpoint.config_hash(CONFIG)
    assert len(checkpoint.config_hash(CONFIG)) == 12
    assert checkpoint.config_hash({**CONFIG, "data": 1}) != checkpoint.config_hash(CONFIG)
    assert checkpoint.restore(two_steps, make_state(), config=same).step == 2
    with pytest.raises(DataError, match="JSON"):
        checkpoint.config_hash({"x": float("nan")})


def test_other_leaves_are_refused_by_name(two_steps):
    with pytest.raises(
        DataError, match=r"leaf \.params\['w'\]: the checkpoint has float32\[3, 4\], .* float32\[3, 5\]"
    ):
        checkpoint.restore(two_steps, make_state(width=5))
    state = make_state()
    with pytest.raises(DataError, match=r"leaf \.pair\.a: the checkpoint has int32\[\], expected is float32\[\]"):
        checkpoint.restore(two_steps, replace(state, pair=Pair(jnp.float32(0), state.pair.b)))
    fewer = {name: leaf for name, leaf in state.params.items() if name != "w"}
    with pytest.raises(DataError, match=r"\['more'\]: the checkpoint has none.*\['w'\]: .*expected is none"):
        checkpoint.restore(two_steps, replace(state, params={**fewer, "more": jnp.ones(2)}))
    with pytest.raises(
        DataError, match=r"leaf \.key\[1\]: the checkpoint has key<rbg>\[3\], expected is key<fry>\[3\]"
    ):
        checkpoint.restore(two_steps, replace(state, key=(state.key[0], jax.random.split(state.key[0], 3))))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's event loop is closed early
def test_a_disk_that_is_full(tmp_path):
    """A limit on the size of files stands in for it: the write fails inside orbax in the same way."""
    save(tmp_path, 1)
    tree = {"noise": jax.random.normal(jax.random.key(0), (200_000,))}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"step 2 could not be written.*step 1 stays intact.*File too large"):
            checkpoint.save(tmp_path, tree, step=2, config=CONFIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert_same(checkpoint.restore(tmp_path, make_state()).tree, make_state(1))
    checkpoint.save(tmp_path, tree, step=2, config=CONFIG)
    assert_same(checkpoint.restore(tmp_path, tree).tree, tree)


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "the same step again"])
def test_whenever_a_save_is_cut_short_a_checkpoint_is_there(tmp_path, monkeypatch, again):
    """Copies the directory before every act on the file system, as a kill would leave it, and restores each copy."""
    root = tmp_path / "run"
    copies: list[Path] = []
    save(root, 5, keep=1)

    def copying(act):
        def wrapped(*args, **kwargs):
            copies.append(tmp_path / f"copy{len(copies)}")
            shutil.copytree(root, copies[-1])
            return act(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        acts = [(shutil, "rmtree"), (Path, "rename"), (checkpoint, "flush_directory"), (checkpoint, "_write_manifest")]
        for owner, name in acts:
            patch.setattr(owner, name, copying(getattr(owner, name)))
        checkpoint.save(root, make_state(6), step=5 if again else 6, config=CONFIG, keep=1)
    assert len(copies) >= 8
    seen = []
    for copy in copies:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            restored = checkpoint.restore(copy, make_state())
        seed = int(restored.tree.pair.a)
        assert restored.step == checkpoint.latest_step(copy) == (5 if again else seed)
        assert_same(restored.tree, make_state(seed))
        seen.append(seed)
        checkpoint.save(copy, make_state(7), step=7, config=CONFIG, keep=1)
        assert [path.name for path in copy.iterdir()] == ["step_00000007"]
    assert seen == sorted(seen) and set(seen) == {5, 6}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_save_leaves_nothing_behind(tmp_path, monkeypatch, error):
    def interrupted(*_):
        raise error("cut short")

    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_manifest", interrupted)
        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else OSError, match="cut short"):
            save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


KILLED = """
import sys
import jax.numpy as jnp
from gemsjax import checkpoint
for step in range(1, 10_000):
    tree = {"a": jnp.full((300, 1000), step), "b": jnp.int32(step)}
    checkpoint.save(sys.argv[1], tree, step=step, config={}, keep=2)
    print(step, flush=True)
"""


def test_killed_while_saving(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(gemsjax.__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, env=environment)
    assert process.stdout and process.stdout.readline() == b"1\n" and process.stdout.readline() == b"2\n"
    time.sleep(0.05)
    process.kill()
    done = [2, *map(int, process.stdout.read().split())]
    process.wait()
    like = {"a": jnp.zeros((300, 1000), int), "b": jnp.int32(0)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restored = checkpoint.restore(tmp_path, like)
    assert restored.step in (done[-1], done[-1] + 1)
    assert_same(restored.tree, {"a": jnp.full((300, 1000), restored.step), "b": jnp.int32(restored.step)})
