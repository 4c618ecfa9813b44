"""Learn to recommend from another policy's log: without correction, with the first-order, with the top-K correction.

    python -m experiments.topk_off_policy --budget small --out DIR [--seeds N] [--variants ...] [--json FILE]

First the three bandits whose limits are known. Then users of the epsilon-greedy oracle are logged, each correction
learns from the log alone with each training seed, and the policies are played online with test users: greedily (the
ten most probable items) and as they would be served (K' = 5 and five drawn). Importance weights, lambda and the
estimated behaviour are judged on users that nothing was learnt from; what the logging policy really did is found by
playing the logged users again. A record of each run, tables with differences paired by seed, and pictures go to DIR.
Stopped in any way, the same command goes on: it keeps log, records and each run's learning (a tenth of a pass is lost
at most).

Unless it says "shown items" a correction learns from clicked items, each credited with its turn's return; "shown
items" is the paper's objective, all logged actions (`actions="shown"`), each with its own click and what follows its
turn (`credit="item"`). "Logged propensities" are the true ones instead of the head's.

`small` (1,000 logged users, four passes, 200 test users, three training seeds) takes 286 s of processor time, compiling
included (31 minutes on the clock on a core shared with much other work). Clicks in 100 turns (random 32.5, logging
policy 95.4, short-term oracle 100.7) with 95 % t-intervals over the training seeds (`results/topk_off_policy/small`):

    correction                                   greedy          served
    none                                      84.4 +- 64.9    79.0 +- 36.7
    first-order                               78.7 +- 62.0    62.2 +- 22.5
    top-K                                     57.6 +- 59.9    63.0 +- 24.4
    first-order, logged propensities         109.5 +- 7.8    102.0 +- 5.7
    top-K, logged propensities               103.0 +- 8.9     95.7 +- 4.6
    none, shown items                        124.8 +- 40.9   126.2 +- 35.0
    top-K, logged propensities, shown items   39.4 +- 1.8     38.4 +- 2.3

Three seeds show little. No correction of clicked items differs from `none` by more than its interval. Of served
slates first-order beats top-K by 6.3 (3.7 to 8.9) with logged propensities, and these beat the head's estimates by 40
(17 to 63) in the first order and 33 (4 to 61) in top-K. The paper's objective with top-K correction returns 88 (55 to
121) less than the same actions and credit without it, and 57 (54 to 61) less than top-K with clicked items. One log,
224 updates a run, intervals not corrected for how many comparisons there are.

The head sees clicks, not the user that the oracle sees: with top-K it gives the oracle's items 0.07 of their
probability, random ones 1.9 times theirs, and its cross-entropy is 6.6 where the truth has 5.3 and a uniform guess
6.9. Of held-out shown items the mean weight, which must be 1, is 0.99 to 1.00 with the propensities of the log, 0.94 to
1.20 with the head's. `smoke` only shows that everything runs; `full` has not been run.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.markdown import Markdown

import gemsjax
from experiments import _topk_report as report
from experiments._cli import run_cli
from gemsjax import datasets, disk, methods, offline, plots
from gemsjax.agents.base import Acting
from gemsjax.agents.logged import LoggedEpisodes
from gemsjax.agents.topk_reinforce import Learner, TopKHypers, TopKSpec, make_topk_learner
from gemsjax.datasets.episodes import from_logs
from gemsjax.datasets.propensities import oracle_slates, propensities
from gemsjax.devices import surroundings
from gemsjax.envs.registry import require_catalogue
from gemsjax.errors import DataError, require, require_choice, require_count
from gemsjax.evaluate import Evaluation, evaluate, recommended_scores
from gemsjax.maths.off_policy import effective_share
from gemsjax.offline import OfflinePlan, OfflineTraining, make_offline_training
from gemsjax.offline.bandits import known, learn
from gemsjax.tracking import Progress
from gemsjax.types import Dims

LOGGED: Any = {"behaviour": "logged", "certain": 5}
PAPER: Any = {"actions": "shown", "credit": "item"}
VARIANTS = {
    "none": TopKSpec(correction="none", certain=5),
    "first-order": TopKSpec(correction="first_order", certain=5),
    "top-K": TopKSpec(correction="topk", certain=5),
    "first-order, logged propensities": TopKSpec(correction="first_order", **LOGGED),
    "top-K, logged propensities": TopKSpec(correction="topk", **LOGGED),
    "none, shown items": TopKSpec(correction="none", certain=5, **PAPER),
    "top-K, logged propensities, shown items": TopKSpec(correction="topk", **LOGGED, **PAPER),
    "top-K, critic": TopKSpec(correction="topk", critic="slate", **LOGGED),
}
"""What is learnt with. The last, whose rewards come from a critic, only if it is asked for."""
REFERENCES = ("random", "short-term-oracle", "epsilon-greedy-oracle")
EPSILON, PORTION = 0.5, 100


@dataclasses.dataclass(frozen=True)
class Budget:
    """Logged users (a tenth judges), passes over them, users of an update, test users, training seeds."""

    users: int
    epochs: int
    batch: int
    test_users: int
    seeds: int


BUDGETS = {
    "smoke": Budget(users=40, epochs=1, batch=6, test_users=8, seeds=1),
    "small": Budget(users=1_000, epochs=4, batch=16, test_users=200, seeds=3),
    "full": Budget(users=20_000, epochs=10, batch=32, test_users=500, seeds=5),
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What may be changed."""

    budget: Literal["smoke", "small", "full"] = "small"
    """How much of everything."""
    env: str = "focused_topdown"
    """Name of an environment."""
    seed: int = 58407201
    """The first of learning; the log and the test users are the same for all."""
    seeds: int | None = None
    """How many training seeds, counted up from `seed`; by default those of the budget."""
    variants: tuple[str, ...] = tuple(VARIANTS)[:-1]
    """Corrections to learn with."""
    out: Path = Path("runs/topk_off_policy")
    """Directory for log, records, checkpoints, tables and pictures."""
    json: Path | None = None
    """Write means, comparisons and references to this file as well."""


@dataclasses.dataclass(frozen=True)
class Logs:
    """The environment, and its log in two parts."""

    env: Any
    params: Any
    training: LoggedEpisodes
    held_out: LoggedEpisodes
    mean_return: float

    @property
    def dims(self) -> Dims:
        """Of learning: a log's first turn is only observed."""
        return Dims(self.env.num_items, self.env.slate_size, self.env.horizon - 1)


@dataclasses.dataclass(frozen=True)
class Job:
    """One run: a correction, learnt from the log with one seed."""

    variant: str
    seed: int
    env: str
    budget: Budget
    out: Path

    @property
    def name(self) -> str:
        return f"{self.variant}_seed{self.seed}".replace(", ", "_").replace(" ", "_")

    @property
    def record(self) -> Path:
        return self.out / "records" / f"{self.name}.json"

    @property
    def directory(self) -> Path:
        """Where its learning is kept."""
        return self.out / "runs" / f"{self.env}_{self.budget.users}" / self.name

    def asked(self) -> dict[str, Any]:
        """What a record must have been made with to be kept."""
        budget = {name: value for name, value in vars(self.budget).items() if name != "seeds"}
        spec, hypers = VARIANTS[self.variant], TopKHypers()
        return disk.plain({"env": self.env, "seed": self.seed, "budget": budget, "spec": spec, "hypers": hypers})


def jobs(arguments: Arguments) -> Iterator[Job]:
    """Every run, seed by seed: stopped early, whole seeds are there."""
    budget = BUDGETS[arguments.budget]
    for number in range(budget.seeds if arguments.seeds is None else arguments.seeds):
        for name in arguments.variants:
            yield Job(name, arguments.seed + number, arguments.env, budget, arguments.out)


def main(arguments: Arguments) -> None:
    check(arguments)
    budget, console, started = BUDGETS[arguments.budget], Console(), time.perf_counter()
    if arguments.json is not None:  # now, so that a wrong place is not found out at the end
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
    for job in jobs(arguments):
        kept(job)  # likewise a record that is not of this configuration
    bandits = _bandits(console)
    logs = _logs(arguments.env, budget, arguments.out)
    references = {name: _row(_reference(name, logs, budget.test_users)) for name in REFERENCES}
    records = []
    for job in jobs(arguments):
        record = kept(job)
        if record is None:
            record = perform(job, logs)
            found = f"{record['greedy']['mean']:.1f} greedy, {record['served']['mean']:.1f} served"
            console.print(f"{job.name}: {found}, {record['seconds']:.0f} s", highlight=False, soft_wrap=True)
        records.append(record)
    about = f"{budget.users} logged users, {budget.epochs} passes, {budget.test_users} test users"
    text = report.markdown(records, references, f"budget `{arguments.budget}`: {about}")
    disk.write(arguments.out / "topk_off_policy.md", text.encode())
    told: dict[str, Any] = {"budget": arguments.budget, "env": arguments.env, "bandits": bandits}
    told |= {"references": references, "logged_return": logs.mean_return, **report.summary(records)}
    for path in (arguments.out / "summary.json", *([arguments.json] if arguments.json else [])):
        disk.write_json(path, told)
    console.print(Markdown(text))
    console.print(f"table: {arguments.out / 'topk_off_policy.md'}", soft_wrap=True)
    for name, figure in report.pictures(_first_seed(arguments, logs), logs.dims.slate_size).items():
        console.print(f"picture: {plots.save(figure, arguments.out / name)}", soft_wrap=True)
    console.print(f"{time.perf_counter() - started:.0f} s", highlight=False)


def check(arguments: Arguments) -> None:
    """Refuse what is not known. Raises SettingError."""
    require_choice("budget", arguments.budget, BUDGETS)
    require(bool(arguments.variants), "variants", "none", "at least one")
    for name in arguments.variants:
        require_choice("variants", name, VARIANTS)
    if arguments.seeds is not None:
        require_count("seeds", arguments.seeds)
    require_count("seed", arguments.seed, 0, 2**31)


def kept(job: Job) -> dict[str, Any] | None:
    """The record of a run that was done here, None without one.

    Raises:
      DataError: one of another configuration.
    """
    if not job.record.is_file():
        return None
    record = json.loads(job.record.read_text(encoding="utf-8"))
    wrong = disk.differences({name: record.get(name) for name in job.asked()}, job.asked())
    if wrong:
        raise DataError(f"{job.record} is of another configuration: {'; '.join(wrong)}")
    return record


def perform(job: Job, logs: Logs) -> dict[str, Any]:
    """Learn and judge; returns the record, which it also writes.

    Raises:
      KeyboardInterrupt: stopped; started again, it continues.
    """
    started, users = time.perf_counter(), job.budget.test_users
    learner, acting = trained(job, logs)
    played = {
        serving: _row(evaluate(logs.env, policy, logs.params, acting, users))
        for serving, policy in (("greedy", learner.agent.greedy), ("served", learner.agent.explore))
    }
    bored = recommended_scores(logs.env, learner.agent.greedy, logs.params, acting, min(100, users)).bored_topics
    numbers, _ = judged(learner, acting, logs.held_out)
    record: dict[str, Any] = job.asked() | played
    record |= {"variant": job.variant, "held_out": numbers | {"bored_topics": float(bored.mean())}}
    record |= {
        "seconds": time.perf_counter() - started,
        **surroundings(),
    }
    job.record.parent.mkdir(parents=True, exist_ok=True)
    disk.write_json(job.record, record)
    return record


def _bandits(console: Console) -> dict[str, Any]:
    """Largest distance of each bandit's learnt policy from its limit."""
    errors = {name: float(np.abs(learn(bandit) - bandit.limit).max()) for name, bandit in known().items()}
    for name, error in errors.items():
        console.print(f"bandit with correction {name}: largest distance from its limit {error:.5f}")
    return errors


def _logs(env_name: str, budget: Budget, out: Path) -> Logs:
    """Logged users with the propensities of their slates, a tenth of them apart."""
    env, params = gemsjax.make(env_name)
    require_catalogue(env)
    directory = out / f"logs_{env_name}_{budget.users}"
    with Progress(budget.users, "logged data", unit="users") as progress:
        datasets.generate(env, params, directory, users=budget.users, epsilon=EPSILON, on_progress=progress.update)
    data = datasets.load(directory)
    chance = propensities(data.slates, oracle_slates(env, params, data), EPSILON, env.num_items)
    episodes, held_out = from_logs(data, chance), budget.users // 10
    parts = (jax.tree.map(lambda x, cut=cut: x[cut], episodes) for cut in (slice(held_out, None), slice(held_out)))
    training, judging = parts
    return Logs(env, params, jax.tree.map(jnp.asarray, training), judging, datasets.mean_return(data))


def _reference(name: str, logs: Logs, users: int) -> Evaluation:
    policy = methods.method(name).policy
    assert policy is not None
    dims = Dims(logs.env.num_items, logs.env.slate_size, logs.env.horizon)
    return evaluate(logs.env, policy(dims), logs.params, users=users)


class _Program(NamedTuple):
    """What the seeds of a correction share, so that they are compiled once."""

    learner: Learner
    training: OfflineTraining


@lru_cache(maxsize=16)
def _program(spec: TopKSpec, plan: OfflinePlan, dims: Dims) -> _Program:
    learner = make_topk_learner(spec, dims)
    return _Program(learner, make_offline_training(learner.agent, plan))


def trained(job: Job, logs: Logs) -> tuple[Learner, Acting]:
    """A policy that has learnt from the training part of the log, from its last checkpoint on.

    Raises:
      KeyboardInterrupt: stopped; started again, it continues.
    """
    spec, plan = VARIANTS[job.variant], OfflinePlan(job.budget.batch)
    program, hypers = _program(spec, plan, logs.dims), jax.tree.map(jnp.float32, TopKHypers())
    learnt = offline.learn(
        program.training,
        logs.training,
        jax.random.key(job.seed),
        hypers,
        epochs=job.budget.epochs,
        directory=job.directory,
        config={"env": job.env, "spec": spec, "plan": plan},
        title=job.name,
    )
    if not learnt.finished:
        raise KeyboardInterrupt("the same command goes on from here")
    return program.learner, Acting(learnt.state, hypers)


def _first_seed(arguments: Arguments, logs: Logs) -> dict[str, report.Drawn]:
    """What the pictures draw, by correction, of the first seed; its learning is finished and is only read."""
    drawn = {}
    for job in jobs(arguments):
        if job.seed == arguments.seed:
            drawn[job.variant] = judged(*trained(job, logs), logs.held_out)[1]
    return drawn


def judged(learner: Learner, acting: Acting, held_out: LoggedEpisodes) -> tuple[dict[str, float], report.Drawn]:
    """Numbers of the weights and of the estimated behaviour on users that nothing was learnt from, and what to draw."""
    inspect, users = _inspect(learner), len(held_out.reward)
    cuts = [slice(first, first + PORTION) for first in range(0, users, PORTION)]  # the softmax of all is gigabytes
    parts = [inspect(acting, jax.tree.map(lambda x, cut=cut: jnp.asarray(x[cut]), held_out)) for cut in cuts]
    seen = jax.tree.map(lambda *x: np.concatenate(x, axis=1).astype(np.float64), *parts)
    logged = np.log(np.swapaxes(np.asarray(held_out.propensity, np.float64), 0, 1))
    learnt = seen.mask > 0
    ratio, top_k = seen.weights.ratio[learnt], seen.weights.top_k[learnt]
    estimated, true = (np.exp(seen.log_pi - log_beta).mean() for log_beta in (seen.log_beta, logged))
    often, items = logged > logged.mean(), acting.state.params.policy.shape[0]
    numbers = {
        "ratio_of_shown_by_estimate": float(estimated),
        "ratio_of_shown_by_log": float(true),
        "mean_ratio": float(ratio.mean()),
        "effective_share": float(effective_share(ratio, np.ones_like(ratio))),
        "capped_share": float((ratio > TopKHypers().cap).mean()),
        "mean_lambda": float(top_k.mean()),
        "cross_entropy_estimated": float(-seen.log_beta.mean()),
        "cross_entropy_logged": float(-logged.mean()),
        "estimated_over_logged_of_oracle_items": float(np.exp(seen.log_beta[often] - logged[often]).mean()),
        "estimated_over_logged_of_random_items": float(np.exp(seen.log_beta[~often] - logged[~often]).mean()),
        "mean_inverse_estimated": float(np.exp(-seen.log_beta).mean() / items),
        "mean_inverse_logged": float(np.exp(-logged).mean() / items),
    }
    return numbers, report.Drawn(ratio, top_k, np.exp(seen.log_beta).ravel(), np.exp(logged).ravel())


@lru_cache(maxsize=16)
def _inspect(learner: Learner) -> Any:
    return jax.jit(learner.inspect)


def _row(found: Evaluation) -> dict[str, Any]:
    return {"mean": found.mean, "standard_error": found.standard_error, "users": found.returns.size}


if __name__ == "__main__":
    run_cli(lambda: main(tyro.cli(Arguments, prog="python -m experiments.topk_off_policy", description=__doc__)))
