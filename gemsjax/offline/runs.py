"""Learning from logs, driven from the host: told, checkpointed, and continued after a stop of any kind.

    learnt = learn(make_offline_training(agent, plan), logs, jax.random.key(0), hypers, epochs=10, directory="runs/log")

The same call continues where the last one ended, to bitwise the same state on the same machine. Files of a run:
`config.json`, `metrics.jsonl`, `metrics.csv`, `checkpoints/`. Called by experiments and by anyone with logs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemsjax import checkpoint, disk, tracking
from gemsjax.agents.base import AgentState, Hypers
from gemsjax.errors import DataError, TrainingError, require, require_count
from gemsjax.offline.training import OfflineTraining
from gemsjax.types import Key, Metrics


class Learnt(NamedTuple):
    """What `learn` leaves.

    Attributes:
      state: of the agent.
      updates: how many it has seen.
      finished: False if a signal asked to stop before the last epoch's end; the same call continues.
    """

    state: AgentState
    updates: int
    finished: bool


def learn(
    training: OfflineTraining,
    logs: Any,
    key: Key,
    hypers: Hypers,
    *,
    epochs: int,
    directory: disk.PathLike,
    weights: Any = (),
    config: Mapping[str, Any] | None = None,
    parts: int = 10,
    title: str = "learning from logs",
) -> Learnt:
    """Go through the logs `epochs` times, from the newest checkpoint in `directory` if there is one.

    Args:
      training: of `make_offline_training`.
      logs: what it learns from, a pytree of arrays [U, ...].
      key: of the run; epochs draw from it by their number.
      hypers: numbers of the agent.
      epochs: more than an earlier call had goes on from there.
      directory: of this run alone; made if missing.
      weights: what is frozen, see `Acting`.
      config: static choices (of agent and plan, say) which, like logs, key, hypers and weights, must be those that an
        earlier run in this directory had.
      parts: a checkpoint and a row of metrics (means over its updates) so many times an epoch.
      title: shown beside the progress.

    Raises:
      SettingError: a count out of range, fewer epochs than were done.
      DataError: the directory holds something else, a run of another configuration, or another process learns there.
      TrainingError: a number is no longer finite; the last good checkpoint stays.
    """
    require_count("epochs", epochs)
    require_count("parts", parts)
    batches = training.batches(jax.tree.leaves(logs)[0].shape[0])
    hypers = jax.tree.map(jnp.float32, hypers)
    identity = _identity(logs, key, hypers, weights, config or {})
    with tracking.RunDirectory(directory, identity, resume=True) as run:
        wrong = disk.differences(tracking.read_config(run.path), disk.plain(identity)) if run.resumed else []
        if wrong:
            raise DataError(f"{run.path} holds another run: {'; '.join(wrong)}")
        state, done = _start(training, key, hypers, run.path, identity)
        last = epochs * batches
        accepted = f"at least {-(-done // batches)}: so many are done or begun in {directory}"
        require(done <= last, "epochs", epochs, accepted)
        program = jax.jit(training.updates, donate_argnums=0)
        logs = jax.tree.map(jnp.asarray, logs)

        def updates(state: AgentState, epoch: int, numbers: np.ndarray) -> tuple[AgentState, Metrics]:
            return program(state, hypers, weights, key, logs, jnp.int32(epoch), numbers)

        return _drive(updates, state, (done, last), (batches, -(-batches // parts)), run.path, identity, title)


def _drive(
    updates: Callable[[AgentState, int, np.ndarray], tuple[AgentState, Metrics]],
    state: AgentState,
    span: tuple[int, int],
    lengths: tuple[int, int],
    run: Path,
    identity: dict[str, Any],
    title: str,
) -> Learnt:
    """From the first to the last update of `span`; `lengths` of an epoch and of its parts."""
    (done, last), (batches, length) = span, lengths
    log = tracking.MetricsLog(run)
    log.truncate(done + 1)
    with tracking.StopRequest() as stop, tracking.Progress(last, title, start=done, unit="updates") as progress:
        while done < last and not stop.requested:
            epoch, first = divmod(done, batches)
            numbers = np.arange(first, min(first + length, batches), dtype=np.int32)
            state, metrics = updates(state, epoch, numbers)
            done += len(numbers)
            row = {name: float(value.mean()) for name, value in metrics.items()}
            _require_finite(row, state, done, run)
            # The row first: a run that is killed in between drops it on resuming and writes it again.
            log.append({"step": done, "epoch": epoch + 1, **row})
            checkpoint.save(_checkpoints(run), state, step=done, config=identity)
            progress.update(done, {name: row[name] for name in ("policy_loss",) if name in row})
    return Learnt(state, done, done >= last)


def _start(training: OfflineTraining, key: Key, hypers: Hypers, run: Path, identity: dict) -> tuple[AgentState, int]:
    """The newest checkpoint, or a fresh state; a damaged one raises instead of starting anew."""
    if any(_checkpoints(run).glob("step_*")):
        like = jax.eval_shape(training.init, key, hypers)
        state, done, _ = checkpoint.restore(_checkpoints(run), like, config=identity)
        return state, done
    return jax.jit(training.init)(key, hypers), 0


def _checkpoints(run: Path) -> Path:
    return run / "checkpoints"


def _identity(logs: Any, key: Key, hypers: Hypers, weights: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the result depends on: arrays as digests."""
    return {
        "config": disk.plain(config),
        "hypers": {
            jax.tree_util.keystr(path): disk.plain(np.asarray(x)) for path, x in jax.tree.leaves_with_path(hypers)
        },
        "key": _digest(jax.random.key_data(key)),
        "logs": _digest(logs),
        "weights": _digest(weights),
    }


def _digest(tree: Any) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of all leaves, their names and types."""
    found = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)} {array.dtype} {np.shape(leaf)};".encode())
        found.update(array.reshape(-1).view(np.uint8).data)
    return found.hexdigest()[:16]


def _require_finite(row: Mapping[str, float], state: AgentState, done: int, run: Path) -> None:
    bad = [name for name, value in row.items() if not np.isfinite(value)]
    if not bad and not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state)):
        bad = ["a weight"]
    if bad:
        kept = checkpoint.latest_step(_checkpoints(run))
        stays = f"the checkpoint of update {kept} stays in {run}" if kept is not None else "there was no checkpoint yet"
        raise TrainingError(f"up to update {done}: {bad[0]} is no longer finite; {stays}")
