"""Catalogues: the drawing process, files (hostile ones included), and what is refused with which message."""

import io
import time
import zipfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemsjax
from gemsjax.envs.catalogue import (
    NORMS,
    RECIPES,
    check_catalogue,
    draw_catalogue,
    load_catalogue,
    named_catalogue,
    peak,
)
from gemsjax.errors import DataError, SettingError

GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "tiny_tensor.pt"
"""`torch.save(torch.rand(7, 6).t()[1:5, ::2], ...)` by PyTorch 2.13: an offset, and strides unlike the shape's."""


# -- drawing -----------------------------------------------------------------------------------------------------------


def test_drawn_items_are_non_negative_unit_vectors():
    items = draw_catalogue(3, num_items=50, num_topics=4, topic_size=3)
    assert items.shape == (50, 12) and items.dtype == np.float32 and (items >= 0).all()
    np.testing.assert_allclose(np.linalg.norm(items, axis=1), 1.0, rtol=1e-6)


def test_a_seed_means_the_same_items_for_ever():
    np.testing.assert_array_equal(draw_catalogue(3), draw_catalogue(3))
    assert not np.array_equal(draw_catalogue(3), draw_catalogue(4))
    recorded = [0.195003837, 0.151387170, 0.152521178, 0.0366053805]
    np.testing.assert_allclose(draw_catalogue(0)[0, :4], recorded, rtol=1e-6)


@pytest.mark.parametrize(("power", "share"), [(1.0, 0.633), (1.5, 0.719), (2.0, 0.777)])
def test_the_main_topics_share_is_that_of_the_published_process(power, share):
    """Mean share of the largest topic norm, as measured on the published recipe for three powers."""
    norms = np.linalg.norm(draw_catalogue(11, num_items=20_000, power=power).reshape(-1, 10, 2), axis=2)
    # Standard error of the mean over 20,000 items: 0.001.
    assert abs(norms.max(axis=1).mean() - share) < 0.004


def test_peaking_is_drawing_with_that_power():
    np.testing.assert_allclose(peak(draw_catalogue(5), 2.0), draw_catalogue(5, power=2.0), atol=1e-6)
    np.testing.assert_allclose(peak(named_catalogue("focused"), 2.0), named_catalogue("peaked"), atol=1e-6)


def test_noise_and_clip_are_those_of_the_components():
    """Against the process as it is written down, in the same stream."""
    stream = np.random.RandomState(7)
    weights = stream.random_sample((30, 4, 1))
    components = np.abs(np.clip(0.9 * stream.standard_normal((30, 4, 3)), -0.6, 0.6))
    expected = (components * weights / weights.sum(axis=1, keepdims=True)).reshape(30, 12)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(draw_catalogue(7, 30, 4, 3, noise=0.9, clip=0.6), expected, rtol=1e-6)
    np.testing.assert_array_equal(draw_catalogue(7, noise=0.4, clip=1.0), draw_catalogue(7))
    # All components are clipped: only the topics' weights are left.
    flat = draw_catalogue(7, 30, 4, 3, noise=1e6).reshape(30, 4, 3)
    np.testing.assert_allclose(flat, np.broadcast_to(flat[:, :, :1], flat.shape), rtol=1e-6)


def test_named_catalogues_with_other_numbers():
    changed = named_catalogue("peaked", 30, catalogue_seed=3, item_noise=0.9, item_clip=0.6)
    np.testing.assert_array_equal(changed, draw_catalogue(3, 30, power=2.0, noise=0.9, clip=0.6))
    for changes, message in (({"catalogue_seed": -1}, "catalogue_seed = -1"), ({"seed": 1}, "keyword = 'seed'")):
        with pytest.raises(SettingError, match=message):
            named_catalogue("focused", **changes)
    with pytest.raises(SettingError, match="did you mean 'focused'"):
        named_catalogue("focussed")


def test_a_power_that_leaves_nothing_of_a_row_is_refused():
    with pytest.raises(DataError, match="row 1: the norm 0 with its entries to the power of 40"):
        peak(np.array([[0.5, 0.5], [1e-10, 1e-9]]), 40)


def test_drawing_is_quick():
    def seconds():
        start = time.perf_counter()
        draw_catalogue(0)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 0.05


def test_the_default_catalogues_differ():
    drawn = [named_catalogue(name) for name in RECIPES]
    assert all(items.shape == (1000, 20) for items in drawn)
    assert len({items.tobytes() for items in drawn}) == len(drawn)


@pytest.mark.parametrize(
    ("settings", "names"),
    [({"seed": -1}, "seed"), ({"num_items": 0}, "num_items"), ({"num_topics": 2.5}, "num_topics"),
     ({"topic_size": True}, "topic_size"), ({"power": 0.0}, "power"), ({"power": float("inf")}, "power"),
     ({"power": "2"}, "power = '2'"), ({"noise": 0.0}, "noise = 0.0.*from 0.001"), ({"clip": "1"}, "clip = '1'")],
)  # fmt: skip
def test_settings_out_of_range_are_named(settings, names):
    with pytest.raises(SettingError, match=names):
        draw_catalogue(**{"seed": 0, **settings})


# -- files -------------------------------------------------------------------------------------------------------------


def test_numpy_files(tmp_path):
    items = draw_catalogue(1, num_items=5)
    np.save(tmp_path / "items.npy", items.astype(np.float64))
    np.savez(tmp_path / "one.npz", anything=items)
    np.savez_compressed(tmp_path / "several.npz", other=np.zeros(3), item_embeddings=items)
    for name in ("items.npy", "one.npz", "several.npz"):
        loaded = load_catalogue(tmp_path / name)
        np.testing.assert_array_equal(loaded, items)
        assert loaded.dtype == np.float32


def test_tensor_file_with_strides_and_offset():
    np.testing.assert_array_equal(load_catalogue(TINY), np.load(GOLDEN / "tiny_tensor.npy"))


def archive_with(path, program=None, numbers=None, compression=zipfile.ZIP_STORED, **entries):
    """A copy of the tiny tensor's file with some entries replaced."""
    replaced = {"data.pkl": program, "data/0": numbers, **entries}
    with zipfile.ZipFile(TINY) as old, zipfile.ZipFile(path, "w", compression) as new:
        for name in old.namelist():
            contents = replaced.get(name.removeprefix("tiny_tensor/"))
            new.writestr(name, old.read(name) if contents is None else contents)
    return path


def program():
    with zipfile.ZipFile(TINY) as archive:
        return archive.read("tiny_tensor/data.pkl")


def test_big_endian_numbers(tmp_path):
    with zipfile.ZipFile(TINY) as archive:
        numbers = np.frombuffer(archive.read("tiny_tensor/data/0"), "<f4").astype(">f4").tobytes()
    path = archive_with(tmp_path / "big.pt", numbers=numbers, byteorder=b"big")
    np.testing.assert_array_equal(load_catalogue(path), np.load(GOLDEN / "tiny_tensor.npy"))


# Hand-written programs; the first is what makes ordinary loading dangerous.
RUNS_A_COMMAND = b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R."
TUPLE_BOMB = b"\x80\x02)" + b"q\x00h\x00h\x00\x87" * 60 + b"."


@pytest.mark.parametrize(
    ("contents", "found"),
    [
        (RUNS_A_COMMAND, "posix system"),
        (b"\x80\x02}.", "EMPTY_DICT"),
        (b"\x80\x02cbuiltins\neval\n.", "builtins eval"),
        (b"\x80\x02K\x01.", "something else than a tensor"),
        (b"\x80\x02.", "something else than a tensor"),
        (TUPLE_BOMB, "something else than a tensor"),
        (TUPLE_BOMB[:-1] + b"Q.", "storage"),
        (TUPLE_BOMB[:-1] + TUPLE_BOMB[2:-1] + b"R.", "not a function"),
        (b"\x80\x02h\x05.", "tensor"),
        (b"\x80\x02R.", "incomplete"),
        (b"\x80\x04\x95", "tensor"),
        (b"", "tensor"),
        (b"\x80\x02" + b")" * 5000 + b".", "5003 bytes"),
    ],
    ids=str,
)
def test_programs_of_anything_but_a_tensor_are_refused(tmp_path, contents, found):
    with pytest.raises(DataError, match=found):
        load_catalogue(archive_with(tmp_path / "hostile.pt", program=contents))


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        (b"FloatStorage", b"LongStorage", "LongStorage"),
        (b"_rebuild_tensor_v2", b"_rebuild_parameter", "_rebuild_parameter"),
        (b"K\x04K\x04\x86", b"K\x04K\x05\x86", "position 52 out of 42"),  # one column too many for the strides
        (b"K\x04K\x04\x86", b"M\xff\xffM\xff\xff\x86", "shape"),
        (b"K\x04K\x04\x86", b"K\x00M\xff\xff\x86", "shape"),
        (b"K\x04K\x04\x86", b"K\x04K\x04K\x01\x87", "tensor"),  # three sizes, two strides
        (b"K\x01K\x0c\x86", b"J\xff\xff\xff\xffK\x0c\x86", "at least 0"),
        (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x00/", "storage"),  # would be a path
        (b"K\x2a", b"K\x2b", "168 bytes"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_their_numbers_are_refused(tmp_path, old, new, found):
    assert old in program()
    with pytest.raises(DataError, match=found):
        load_catalogue(archive_with(tmp_path / "wrong.pt", program=program().replace(old, new)))


def test_compressed_and_incomplete_archives_are_refused(tmp_path):
    with pytest.raises(DataError, match="compressed"):
        load_catalogue(archive_with(tmp_path / "squeezed.pt", compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(DataError, match="byte order 'middle'"):
        load_catalogue(archive_with(tmp_path / "order.pt", byteorder=b"middle"))
    with zipfile.ZipFile(tmp_path / "empty.pt", "w") as archive:
        archive.writestr("nothing", b"")
    with pytest.raises(DataError, match="0 entries named data.pkl"):
        load_catalogue(tmp_path / "empty.pt")


def test_damaged_files_never_fail_in_another_way(tmp_path):
    """Random bytes replaced: either the numbers come out in some shape, or DataError."""
    random, contents, refused = np.random.default_rng(0), np.fromfile(TINY, np.uint8), 0
    for _ in range(200):
        damaged = contents.copy()
        damaged[random.integers(0, len(damaged), 3)] = random.integers(0, 256, 3)
        damaged.tofile(tmp_path / "damaged.pt")
        try:
            assert load_catalogue(tmp_path / "damaged.pt").size <= 42
        except DataError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    ("name", "write", "found"),
    [
        ("items.csv", lambda path: path.write_text("1,2"), "'.csv'"),
        ("missing.npy", lambda path: None, "no such file"),
        ("objects.npy", lambda path: np.save(path, np.array([{}], object)), "plain numbers"),
        ("text.npy", lambda path: np.save(path, np.array(["a"])), "real numbers"),
        ("complex.npy", lambda path: np.save(path, np.array([1j])), "real numbers"),
        ("cut.npy", lambda path: path.write_bytes(b"\x93NUMPY\x01"), "plain numbers"),
        ("two.npz", lambda path: np.savez(path, a=np.zeros(1), b=np.zeros(1)), "'item_embeddings'"),
        ("objects.npz", lambda path: np.savez(path, a=np.array([{}], object)), "plain numbers"),
        ("cut.npz", lambda path: path.write_bytes(b"PK"), "plain numbers"),
        ("old.pt", lambda path: path.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."), "not a zip file"),
    ],
)
def test_other_files_are_refused_with_their_name(tmp_path, name, write, found):
    write(tmp_path / name)
    with pytest.raises(DataError, match=found) as error:
        load_catalogue(tmp_path / name)
    assert name in str(error.value)


def test_an_npz_with_code_inside_is_refused(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], object))
    with zipfile.ZipFile(tmp_path / "code.npz", "w") as archive:
        archive.writestr("item_embeddings.npy", buffer.getvalue())
    with pytest.raises(DataError, match="plain numbers"):
        load_catalogue(tmp_path / "code.npz")


# -- checking ----------------------------------------------------------------------------------------------------------


def altered(row, column, value):
    items = draw_catalogue(0, num_items=30).astype(np.float64)
    items[row, column] = value
    return items


@pytest.mark.parametrize(
    ("catalogue", "error", "found"),
    [
        (altered(3, 2, np.nan), DataError, "row 3, column 2: nan"),
        (altered(4, 19, -np.inf), DataError, "row 4, column 19: -inf"),
        (altered(5, 0, 1e300), DataError, "row 5, column 0: inf"),
        (altered(6, 1, -0.5), DataError, "row 6, column 1: -0.5"),
        (altered(7, slice(None), 0.0), DataError, r"row 7: all zero \(1 such"),
        (np.ones((30, 21)), SettingError, r"\(30, 21\).*10 \* 2"),
        (np.ones(20), SettingError, r"shape \(20,\)"),
        (np.ones((9, 20)), SettingError, r"topics \(10\)"),
        (np.full((30, 20), "a"), DataError, "real numbers"),
        ([[0.5] * 20] * 29 + [[0.5] * 19], SettingError, "unequal length.*10 \\* 2"),
        (altered(8, slice(None), 1e30), DataError, r"row 8: norm 4.47e\+30 \(1 such.*from 1e-15 to 1e\+15"),
        (altered(9, slice(None), 1e-30), DataError, r"row 9: norm 4.47e-30 \(1 such.*from 1e-15 to 1e\+15"),
    ],
    ids=["nan", "inf", "overflow", "negative", "zero", "width", "rank", "few", "text", "ragged", "long", "short"],
)
def test_unusable_catalogues_are_refused(catalogue, error, found):
    with pytest.raises(error, match=found):
        check_catalogue(catalogue, 10, 2)


@pytest.mark.parametrize("length", NORMS)
def test_items_of_extreme_but_accepted_norms_are_scored_as_others(length):
    items = draw_catalogue(0, num_items=30)
    slate, key = jnp.arange(10), jax.random.key(0)
    found = []
    for catalogue in (items, items * np.float32(length * (1.0001 if length < 1 else 0.9999))):
        env, params = gemsjax.make("focused_topdown", catalogue=catalogue, influence=0.0)
        _, state = env.reset(key, params)
        found.append((state.user_embedding, *env.step(key, state, slate, params)[-1].values()))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), *found)


def test_usable_catalogues_come_back_as_float32():
    items = check_catalogue(draw_catalogue(0, num_items=30).astype(np.float64), 10, 2)
    assert items.dtype == np.float32
    np.testing.assert_array_equal(items, draw_catalogue(0, num_items=30))
    assert check_catalogue(np.ones((30, 20), int), 10, 2).dtype == np.float32
