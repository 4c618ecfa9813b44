"""A run of PPO or A2C from the host: iterations are driven, logged, evaluated, checkpointed, resumed.

Logs: `{algorithm}` (losses, returns, and the last whole episode of each environment under `env_i/`) and
`{algorithm}_eval` (greedy and sampled returns on users that stay the same). Called by experiments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemsjax.envs.dot_product import DotProductParams
from gemsjax.errors import SettingError, TrainingError, require, require_choice
from gemsjax.on_policy import files
from gemsjax.on_policy.config import DEVICES, Config, TrainConfig
from gemsjax.on_policy.evaluation import compute_metrics, play
from gemsjax.on_policy.training import Learning, LearnState, Networks, Run, make_learning
from gemsjax.tracking import StopRequest
from gemsjax.types import Array, Key

EVALUATION_SEED = 7_345_604
"""Of the users that policies are judged on; those of training come from the run's own key.

With `fixed_users` both are drawn from the one table of users, so that training has met those that judge.
"""


class Outcome(NamedTuple):
    """What `train` leaves.

    Attributes:
      learning, run, state: see `training`.
      step: turns played, over all environments.
      finished: whether all turns were; False if somebody asked to stop.
      evaluations: (step, greedy mean return, sampled mean return) of each evaluation of this call.
    """

    learning: Learning
    run: Run
    state: LearnState
    step: int
    finished: bool
    evaluations: list[tuple[int, float, float]]


def train(
    config: Config, *, resume: bool = False, params: DotProductParams | None = None, quiet: bool = False
) -> Outcome:
    """Train until `total_timesteps`, from the newest checkpoint where `resume`.

    Args:
      config: see `Config`.
      resume: go on; to bitwise the same numbers as without the interruption.
      params: tables in place of those that the seed draws; of a resumed run the same again (or None, they are stored).
      quiet: nothing on the terminal.

    Raises:
      SettingError: see `check_config`; checkpoints or lines of a log without `resume` (with it, and no checkpoint, the
        run begins anew); fewer turns than there have been; other `params` than those of the checkpoint.
      DataError: checkpoints that are damaged or of another configuration.
      TrainingError: a weight is no longer finite; the last checkpoint stays.
    """
    learning = make_learning(config, params)
    programs = programs_of(config)
    found = files.resume(config, learning)
    accepted = "--resume goes on with it; another directory starts anew"
    require(found is None or resume, "checkpoints", str(files.place(config)), accepted)
    if not resume:
        files.require_no_logs(config)
    if found is None:
        run = learning.start(jax.random.key(config.train.seed))
        state, step = programs.init(run), 0
    else:
        run, state, step = found
        same = params is None or _equal(params, run.env_params)
        require(same, "params", "other tables", "None, or those of the checkpoint, with which the run goes on")
    driver = _Driver(config, programs, run, state, step, quiet)
    with StopRequest() as stop:
        while driver.step < driver.last and not stop.requested:
            driver.advance()
    if driver.step != driver.saved:
        driver.save()
    return Outcome(learning, run, driver.state, driver.step, driver.step >= driver.last, driver.evaluations)


class Programs(NamedTuple):
    """Compiled when first called; the same for all runs that differ in their seed or in how long they go on."""

    init: Callable[[Run], LearnState]
    iterate: Callable[[Run, LearnState, Any], tuple[LearnState, dict[str, Array]]]
    judge: Callable[..., Array]


def programs_of(config: Config) -> Programs:
    """The programs of a configuration."""
    return _programs(dataclasses.replace(config, device="auto", train=TrainConfig()))


@lru_cache(maxsize=16)
def _programs(config: Config) -> Programs:
    learning = make_learning(config)

    @partial(jax.jit, static_argnums=3)
    def judge(run: Run, networks: Networks, key: Key, episodes: int, greedy: Array) -> Array:
        return play(learning.env, learning.act(networks, greedy), run.env_params, key, episodes)

    return Programs(jax.jit(learning.init), jax.jit(learning.iterate, donate_argnums=1), judge)


@contextmanager
def on_device(name: str) -> Iterator[None]:
    """Within it JAX works on the first `cpu`, `gpu` or `tpu`; `auto` leaves it as it is.

    Raises:
      SettingError: there is no such device here.
    """
    require_choice("device", name, DEVICES)
    if name == "auto":
        yield
        return
    try:
        device = jax.devices(name)[0]
    except RuntimeError as error:
        raise SettingError("device", name, f"a device of this machine, which has {jax.devices()}") from error
    with jax.default_device(device):
        yield


def judged(config: Config, run: Run, networks: Networks, episodes: int, greedy: bool, seed: int = 0) -> np.ndarray:
    """Rewards of whole episodes of a trained policy: [episodes, horizon]. The same users for every policy and run."""
    return np.asarray(programs_of(config).judge(run, networks, evaluation_key(seed), episodes, greedy))


def evaluation_key(seed: int = 0) -> Key:
    """Of the users that judge (see `EVALUATION_SEED`)."""
    return jax.random.fold_in(jax.random.key(EVALUATION_SEED), seed)


class _Driver:
    """The state of one call of `train`; steps are turns over all environments."""

    def __init__(self, config: Config, programs: Programs, run: Run, state: LearnState, step: int, quiet: bool) -> None:
        self.config, self.programs, self.run, self.state = config, programs, run, state
        turns, envs = config.rollout
        self.size, self.step, self.saved, self.last = turns * envs, step, step, config.iterations * turns * envs
        accepted = f"at least the {step} that the run already has"
        require(step <= self.last, "total_timesteps", config.train.total_timesteps, accepted)
        self.evaluations: list[tuple[int, float, float]] = []
        train = config.train
        loggers = (files.Logger(train.log_dir, tag, after=step, quiet=quiet) for tag in files.tags(config))
        self.log, self.eval_log = loggers

    def advance(self) -> None:
        """Iterations up to the next line of the log; then what is due."""
        train, before = self.config.train, self.step
        count = max(1, train.log_interval // self.size)
        first, last = before // self.size, min(before // self.size + count, self.last // self.size)
        numbers = np.arange(first, last, dtype=np.int32)
        state, metrics = self.programs.iterate(self.run, self.state, numbers)
        found = jax.tree.map(np.asarray, metrics)
        if not found.pop("finite").all():
            raise TrainingError(f"a weight is no longer finite by step {last * self.size}; the last checkpoint stays")
        self.state, self.step = state, last * self.size
        self.log.log(self.step, _told(found, state))
        for interval, act in ((train.eval_interval, self.evaluate), (train.save_interval, self.save)):
            if self.step // interval > before // interval or self.step == self.last:
                act()

    def evaluate(self) -> None:
        """Mean returns on the evaluation's users, greedy and sampled."""
        ways = (True, False)
        episodes = self.config.train.eval_episodes
        played = (judged(self.config, self.run, self.state.params, episodes, greedy) for greedy in ways)
        greedy, sampled = (float(rewards.sum(axis=1).mean()) for rewards in played)
        self.evaluations.append((self.step, greedy, sampled))
        self.eval_log.log(self.step, {"greedy_return": greedy, "sampled_return": sampled})

    def save(self) -> None:
        files.save(self.config, self.run, self.state, self.step)
        self.saved = self.step


def _equal(given: DotProductParams, stored: DotProductParams) -> bool:
    """Whether these are the same tables, shapes included."""
    pairs = zip(jax.tree.leaves(given), jax.tree.leaves(stored), strict=True)
    return all(np.array_equal(np.asarray(one), np.asarray(other)) for one, other in pairs)


def _told(metrics: dict[str, np.ndarray], state: LearnState) -> dict[str, float | None]:
    """A row of the log: means over iterations, the mean return of the episodes that ended, each environment's last."""
    episodes, totals = metrics.pop("episodes"), metrics.pop("return")
    row: dict[str, float | None] = {name: float(value.mean()) for name, value in sorted(metrics.items())}
    row["episodes"] = float(episodes.sum())
    row["return"] = float((totals * episodes).sum() / episodes.sum()) if episodes.sum() else None
    latest, whole = jax.tree.map(np.asarray, (state.latest, state.episodes))
    for number in range(len(whole)):
        for name, values in latest.items():
            row[f"env_{number}/{name}"] = float(values[number]) if whole[number] else None
    return row


def describe(rewards: np.ndarray) -> list[dict[str, float]]:
    """`compute_metrics` of every episode: rewards [episodes, n] -> a row each."""
    found = jax.tree.map(np.asarray, compute_metrics(jnp.asarray(rewards)))
    return [{name: float(values[number]) for name, values in found.items()} for number in range(len(rewards))]
