"""Checkpoints of a whole run's state, verified by a manifest; the only module that imports orbax.

Orbax stores the arrays; this module adds what it lacks: a manifest with a SHA-256 of every file (orbax restores a
flipped bit silently), the configuration, and a rename as the last act, so that what is called `step_*` is complete.
Arrays pass through host memory without their placement: what one set of devices saved restores on another.
One writer a directory (see the lock of `tracking.RunDirectory`). For training, evaluation and sweeps.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint._src.multihost import multihost

from gemsjax.devices import surroundings
from gemsjax.disk import PathLike, canonical, differences, digest, flush_directory
from gemsjax.errors import DataError, require_count

FORMAT = 1
"""Version of the manifest and of the layout of a checkpoint's directory."""
_MANIFEST, _ARRAYS, _DIGEST, _REPLACED = "manifest.json", "arrays", "manifest_sha256", ".replaced"
_STEP = re.compile(rf"step_(\d{{8,}})({re.escape(_REPLACED)})?")


class Restored(NamedTuple):
    """What `restore` gives back.

    Attributes:
      tree: the saved pytree, in the structure of `like`.
      step: the step that it was saved at (older than the newest one if that was damaged).
      manifest: what `verify` returns: `config`, `versions`, `device` and more.
    """

    tree: Any
    step: int
    manifest: dict[str, Any]


def save(directory: PathLike, tree: Any, *, step: int, config: dict[str, Any], keep: int = 2) -> Path:
    """Write `tree` as `directory/step_00001000/`; it appears there only once it is complete and on disk.

    Saving makes `step` the newest: then complete checkpoints beyond the `keep` newest are removed, and so are damaged
    ones and (with a warning) those of later steps, which belong to a course that the run has left.

    Args:
      directory: made if missing; holds the checkpoints of one run, written by one process at a time.
      tree: pytree of arrays (typed keys, empty and 0-d arrays included) or Python numbers; may be sharded.
      step: a whole number from 0.
      config: JSON-like settings that a later `restore` compares.
      keep: how many complete checkpoints stay, at least 1.

    Returns:
      The path of the new checkpoint.

    Raises:
      DataError: a leaf that is no array or of a type that jax would change (int64 without x64), a config beyond JSON.
      OSError: it could not be written (a full disk, say); the message names the checkpoint that stays intact.
    """
    require_count("step", step, 0)
    require_count("keep", keep)
    leaves, arrays = _to_host(tree)
    about = {"format": FORMAT, "step": step, "config": _plain(config), "leaves": leaves, **surroundings()}
    root = Path(directory).absolute()
    target = root / f"step_{step:08d}"
    temporary = root / f".{target.name}.tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _clear(root)
        temporary.mkdir()
        if arrays:
            _orbax(lambda checkpointer: checkpointer.save(temporary / _ARRAYS, args=ocp.args.PyTreeSave(arrays)))
        _write_manifest(temporary, about)
        _put_in_place(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, Exception):
            raise
        intact = latest_step(root)
        stays = "there is no earlier checkpoint" if intact is None else f"the checkpoint of step {intact} stays intact"
        raise OSError(f"the checkpoint of step {step} could not be written to {root}; {stays}: {error}") from error
    _prune(root, step, keep)
    return target


def restore(
    directory: PathLike,
    like: Any,
    *,
    config: dict[str, Any] | None = None,
    step: int | None = None,
    on_host: bool = False,
) -> Restored:
    """The newest undamaged checkpoint, bit for bit, on the default device; every leaf owns its buffer (may be donated).

    Args:
      directory: as given to `save`.
      like: pytree of arrays or `jax.ShapeDtypeStruct` with the expected structure; its values are not read.
      config: if given, the configuration that the checkpoint must have been saved with.
      step: this step and no other; by default the newest, walking back over damaged ones with a warning.
      on_host: leave arrays in host memory, as NumPy's: what several devices share may not fit one.

    Raises:
      DataError: no undamaged checkpoint, another configuration (every differing key is named), or leaves that differ
        from those of `like` (each is named).
    """
    path, manifest = newest_manifest(directory, step)
    wrong = [] if config is None else differences(manifest["config"], _plain(config))
    if wrong:
        raise DataError(f"{path} belongs to another configuration: {'; '.join(wrong)}")
    return Restored(_from_disk(path, manifest, like, on_host), manifest["step"], manifest)


def newest_manifest(directory: PathLike, step: int | None = None) -> tuple[Path, dict[str, Any]]:
    """Where the newest undamaged checkpoint is, and its manifest: for who must know `config` before the tree's shape.

    Raises:
      DataError: no undamaged checkpoint, or none of `step`.
    """
    root = Path(directory).absolute()
    found = _steps(root)
    if step is not None and step not in found:
        raise DataError(f"{root} holds no checkpoint of step {step}; it holds {sorted(found) or 'none'}")
    damaged: list[str] = []
    for number in sorted(found, reverse=True) if step is None else [step]:
        try:
            manifest = verify(found[number])
        except DataError as error:
            damaged.append(str(error))
            continue
        if damaged:
            warnings.warn(f"going back to the checkpoint of step {number}: {'; '.join(damaged)}", stacklevel=3)
        return found[number], manifest
    raise DataError(f"{root} holds no usable checkpoint: {'; '.join(damaged) or 'there is none'}")


def verify(path: PathLike) -> dict[str, Any]:
    """Check one checkpoint against its manifest (every file's size and SHA-256, the manifest's own) and return that.

    Raises:
      DataError: naming the path and the first thing that is missing, altered or of a newer format.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    for name, entry in manifest["files"].items():
        try:
            digest = _sha256(path / name)
        except OSError as error:
            raise DataError(f"{path / name} cannot be read: {error}") from error
        if digest != entry["sha256"]:
            raise DataError(f"{path / name} was altered: its SHA-256 is not the manifest's")
    return manifest


def remove(directory: PathLike) -> None:
    """Delete the checkpoints of something that is finished and kept elsewhere."""
    shutil.rmtree(Path(directory), ignore_errors=True)


def latest_step(directory: PathLike) -> int | None:
    """The newest step whose files are all there in full size, or None. `restore` also checks their contents."""
    found = _steps(Path(directory))
    return next((step for step in sorted(found, reverse=True) if _complete(found[step])), None)


def config_hash(config: dict[str, Any]) -> str:
    """Twelve hexadecimal digits of the SHA-256 of the configuration as canonical JSON (sorted keys, no spaces).

    Raises:
      DataError: the configuration holds something that JSON cannot (NaN included).
    """
    return digest(config)[:12]


def _to_host(tree: Any) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """The descriptions of all leaves, and the arrays that orbax is to store, by the leaf's number."""
    leaves, arrays = [], {}
    for number, (path, given) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
        name = _leaf_name(path)
        try:  # host arrays stay there: they may be more than a device holds
            on_host = isinstance(given, np.ndarray) and (given.dtype == bool or jnp.issubdtype(given.dtype, jnp.number))
            leaf = given if on_host else jnp.asarray(given)
        except TypeError as error:
            raise DataError(f"leaf {name} of the checkpoint is no array but {given!r}"[:300]) from error
        kept = jax.dtypes.canonicalize_dtype(leaf.dtype) if isinstance(leaf, np.ndarray) else leaf.dtype
        if kept != getattr(given, "dtype", kept):
            raise DataError(f"leaf {name} of the checkpoint is {given.dtype}, jax without x64 has only {kept}")
        about = {"name": name, "dtype": str(leaf.dtype), "shape": list(leaf.shape)}
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            about["key"] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        leaves.append(about)
        if leaf.size:  # orbax refuses empty arrays
            arrays[str(number)] = np.asarray(leaf)
    return leaves, arrays


def _from_disk(path: Path, manifest: dict[str, Any], like: Any, on_host: bool) -> Any:
    """The tree in the structure of `like`, after checking that each leaf is what `like` says."""
    expected, structure = jax.tree_util.tree_flatten_with_path(like)
    _compare_leaves(manifest["leaves"], {_leaf_name(where): leaf for where, leaf in expected}, path)
    stored = [str(number) for number, about in enumerate(manifest["leaves"]) if 0 not in about["shape"]]
    arrays: dict[str, np.ndarray] = {}
    if stored:
        as_numpy = {number: ocp.RestoreArgs(restore_type=np.ndarray) for number in stored}
        args = ocp.args.PyTreeRestore(item=dict.fromkeys(stored, 0), restore_args=as_numpy)
        try:
            arrays = _orbax(lambda checkpointer: checkpointer.restore(path / _ARRAYS, args=args))
        except Exception as error:
            versions = f"written with {manifest['versions']}, read with {surroundings()['versions']}"
            raise DataError(f"{path} is undamaged but cannot be read ({versions}): {error}") from error
    leaves = {
        about["name"]: _leaf(about, arrays.pop(str(n), None), on_host) for n, about in enumerate(manifest["leaves"])
    }
    return jax.tree.unflatten(structure, [leaves[_leaf_name(where)] for where, _ in expected])


def _leaf(about: dict[str, Any], stored: np.ndarray | None, on_host: bool) -> Any:
    """One leaf from what was stored (None: it is empty). A copy: jax does not reuse memory shared with NumPy."""
    if on_host and "key" not in about and stored is not None:
        return np.array(stored)
    if "key" not in about:
        return jnp.zeros(about["shape"], about["dtype"]) if stored is None else jnp.array(stored)
    if stored is None:
        return jax.random.split(jax.random.key(0, impl=about["key"]), about["shape"])
    return jax.random.wrap_key_data(jnp.array(stored), impl=about["key"])


def _compare_leaves(saved: list[dict[str, Any]], expected: dict[str, Any], path: Path) -> None:
    def text(dtype: Any, shape: Any) -> str:
        return f"{dtype}[{', '.join(map(str, shape))}]"

    held = {about["name"]: text(about["dtype"], about["shape"]) for about in saved}
    wanted = {}
    for name, leaf in expected.items():
        leaf = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
        wanted[name] = text(leaf.dtype, leaf.shape)
    wrong = [
        f"leaf {name}: the checkpoint has {held.get(name, 'none')}, expected is {wanted.get(name, 'none')}"
        for name in [*wanted, *(name for name in held if name not in wanted)]
        if held.get(name) != wanted.get(name)
    ]
    if wrong:
        more = f" (and {len(wrong) - 6} more)" if len(wrong) > 6 else ""
        raise DataError(f"{path} does not fit: {'; '.join(wrong[:6])}{more}")


def _leaf_name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path) or "(all)"


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return json.loads(canonical(config))


def _write_manifest(path: Path, about: dict[str, Any]) -> None:
    """Hash and flush every file below `path`, then write and flush the manifest."""
    files = {}
    for file in sorted(path.rglob("*")):
        if file.is_file():
            files[file.relative_to(path).as_posix()] = {
                "size": file.stat().st_size,
                "sha256": _sha256(file, flush=True),
            }
        else:
            flush_directory(file)
    manifest = {**about, "config_hash": config_hash(about["config"]), "files": files}
    with open(path / _MANIFEST, "x", encoding="utf-8") as stream:
        json.dump({**manifest, _DIGEST: digest(manifest)}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    flush_directory(path)


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest after a check of its own digest and of the sizes of all files."""
    file = path / _MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no complete checkpoint, its {_MANIFEST} cannot be read: {error}") from error
    number = manifest.get("format") if isinstance(manifest, dict) else None
    if number != FORMAT:
        raise DataError(f"{path} has format {number}; this version of gemsjax reads format {FORMAT}")
    if manifest.pop(_DIGEST, None) != digest(manifest):
        raise DataError(f"{file} was altered: it does not match its own SHA-256")
    for name, entry in manifest["files"].items():
        size = (path / name).stat().st_size if (path / name).is_file() else "no"
        if size != entry["size"]:
            raise DataError(f"{path / name} is incomplete: {size} bytes of {entry['size']}")
    return manifest


def _complete(path: Path) -> bool:
    with suppress(DataError):
        return bool(_read_manifest(path))
    return False


def _steps(root: Path) -> dict[int, Path]:
    """Every checkpoint that seems to be there. One that is being replaced counts until its successor is in place."""
    found: dict[int, Path] = {}
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        match = _STEP.fullmatch(path.name)
        if match and path.is_dir():
            found.setdefault(int(match[1]), path)  # sorted: the plain name comes before its .replaced
    return found


def _clear(root: Path) -> None:
    """Remove what saves that were cut short have left behind: all but complete checkpoints without a successor."""
    for stale in [*root.glob(".step_*"), *root.glob(f"step_*{_REPLACED}")]:
        if stale.name.startswith(".") or stale.with_name(stale.name.removesuffix(_REPLACED)).exists():
            shutil.rmtree(stale)


def _put_in_place(temporary: Path, target: Path) -> None:
    replaced = target.with_name(target.name + _REPLACED)
    if target.exists():
        target.rename(replaced)
    temporary.rename(target)
    flush_directory(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _prune(root: Path, step: int, keep: int) -> None:
    found = _steps(root)
    kept = [number for number in sorted(found, reverse=True) if number <= step and _complete(found[number])][:keep]
    later = sorted(number for number in found if number > step)
    if later:
        warnings.warn(
            f"removing the checkpoints of steps {later} from {root}: the run went on from before", stacklevel=3
        )
    for number in found.keys() - set(kept):
        # Renamed first: a removal that is cut short must not leave something that looks like a damaged checkpoint.
        shutil.rmtree(found[number].rename(root / f".{found[number].name}.removed"), ignore_errors=True)


def _sha256(file: Path, flush: bool = False) -> str:
    with open(file, "rb+" if flush else "rb") as stream:
        if flush:
            os.fsync(stream.fileno())
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def _orbax(work: Callable[[Any], Any]) -> Any:
    """Run `work(checkpointer)` in a thread of its own: orbax starts an event loop, which a notebook already has."""
    with (
        _quiet(),
        _alone(),
        ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer,
        ThreadPoolExecutor(1) as pool,
    ):
        return pool.submit(work, checkpointer).result()


@contextmanager
def _alone() -> Iterator[None]:
    """Of several processes each saves and restores what is its own, without the others.

    Orbax has no setting for that (with `active_processes` it waits for nobody, but host arrays are written by process 0
    only), so while it works here it is told that this is the only process.
    """
    if jax.process_count() == 1:
        yield
        return
    names: dict[str, Any] = {"process_index": lambda: 0, "process_count": lambda: 1}
    before = {name: getattr(multihost, name) for name in names}
    try:
        for name, value in names.items():
            setattr(multihost, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(multihost, name, value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep orbax's remarks off the terminal; what goes wrong is raised."""
    logger, nothing = logging.getLogger("absl"), logging.Filter("no logger has this name")
    logger.addFilter(nothing)
    try:
        yield
    finally:
        logger.removeFilter(nothing)
