"""SlateQ in RecSim: does looking ahead pay? Random, myopic and SlateQ agents, several seeds, the paper's order tested.

    python -m experiments.recsim_slateq [--budget smoke|small|full] [--env interest_evolution] [--seed N] [--out DIR]

Every agent learns from the same number of turns with users of its own; then it plays test users, which are the same
for all agents and others for each seed. A run is one program for an agent and five seeds and leaves one JSON record in
DIR/<budget>/records, from which table and picture are made, named after environment and seeds. Runs whose record is
there are not run again, so a command that was stopped is simply repeated. Intervals are Student-t over seeds. The order
of the paper (SlateQ above the myopic agent that serves in the same way, greedily where it serves exact slates; myopic
above random) counts as shown where the mean difference, paired by seed as agents of one seed meet the same test users,
is positive and its t-test's two-sided p below 0.05, corrected for their number after Holm. Rate, target period and
exploration are not RecSim's but fit a short run (Adam with 0.001, a copy every 200 updates); they are the same for all
agents.

Seeds 0 to 9 were looked at while agents, number of seeds and correction were chosen, so they only suggest. Planned
before seeds 10 to 19 were run, as the test that counts: `--budget small --seed 10`, every agent but full-slate Q (which
nothing is compared with), the nine comparisons named above, paired, Holm, level 0.05, no seed added or left out.

That test took four minutes of processor time (17 on the clock of two busy cores). Time watched out of a budget of 200:

                  0 to 9         10 to 19                        0 to 9         10 to 19
    random        154.3 +- 0.3   154.4 +- 0.6
    myopic, top K 165.9 +- 1.0   165.7 +- 0.5    myopic, greedy  166.6 +- 1.5   165.9 +- 1.7
    SARSA-TS      168.6 +- 1.0   169.0 +- 0.9    SARSA-GS        170.0 +- 1.9   172.3 +- 1.3
    QL-TT-TS      168.5 +- 1.3   168.7 +- 1.2    QL-GT-GS        172.6 +- 1.2   172.4 +- 2.2
    QL-OT-TS      168.1 +- 1.3   168.7 +- 1.1    QL-OT-GS        173.1 +- 1.9   172.5 +- 1.4
    full-slate Q  154.2 +- 0.7   not run         QL-OT-OS        173.6 +- 1.5   173.5 +- 1.2

All nine comparisons are shown. Q over whole slates learns nothing in 24,000 turns. `smoke` only shows that everything
runs; `full` has not been timed.

In interest exploration clicks change nothing, so there is nothing to look ahead to; --privileged tells agents there
what each user likes, its exact affinities, which are otherwise hidden (in interest evolution nothing that matters is).
So told and serving the top K, SARSA and the myopic agent get 78.7 +- 0.3 clicks there (seeds 0 to 9; in pairs, looking
ahead costs 0.02 +- 0.01), random ones 45.7 +- 0.3.
"""

from __future__ import annotations

import dataclasses
import json
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.markdown import Markdown

import gemsjax
from experiments._cli import run_cli
from gemsjax import disk, plots, plots_recsim
from gemsjax.agents.base import Acting
from gemsjax.agents.candidate_slateq import CandidateHypers, CandidateSpec
from gemsjax.agents.recsim import VARIANTS, make_named, variant
from gemsjax.devices import surroundings
from gemsjax.envs.knowledge import make_choice_model
from gemsjax.errors import DataError, TrainingError, require, require_choice, require_count
from gemsjax.evaluate import numbered_users
from gemsjax.maths.statistics import paired, t_interval
from gemsjax.rollout import returns
from gemsjax.train import Run
from gemsjax.transitions import TransitionPlan, make_transition_training
from gemsjax.types import Array, CandidateDims

ENVIRONMENTS = ("interest_evolution", "interest_exploration")
SETTINGS = {"horizon": 200}
"""Of both environments. How many sessions of interest evolution it cuts off has not been counted."""
SEEDS = 5
"""Seeds of a run: they share a program."""
SPANS = 20
"""Points of a learning curve."""
LEVEL = 0.05


@dataclasses.dataclass(frozen=True)
class Budget:
    """Seeds, training steps of each (one turn of every user and one update), test users of each."""

    seeds: int
    steps: int
    test_users: int
    plan: TransitionPlan

    @property
    def hypers(self) -> CandidateHypers:
        """What all agents share."""
        return CandidateHypers(rate=1e-3, epsilon_steps=self.steps / 3, target_period=200.0)


SPEC = CandidateSpec(optimiser="adam")
BUDGETS = {
    "smoke": Budget(2, 60, 8, TransitionPlan(users=4, batch_size=8, replay_capacity=200, warm_up=40)),
    "small": Budget(10, 3_000, 400, TransitionPlan(users=8, replay_capacity=20_000, warm_up=1_000)),
    "full": Budget(10, 40_000, 2_000, TransitionPlan(users=8, replay_capacity=100_000, warm_up=10_000)),
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What may be changed."""

    budget: str = "small"
    """smoke, small or full."""
    env: str = "interest_evolution"
    """interest_evolution or interest_exploration."""
    agents: tuple[str, ...] = tuple(VARIANTS)
    """Names of agents."""
    seed: int = 0
    """The first seed."""
    privileged: bool = False
    """Tell agents what is hidden of users."""
    out: Path = Path("results/recsim_slateq")
    """Root of records, table and picture."""


# -- one agent ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _program(env: Any, name: str, privileged: bool, budget: Budget) -> Any:
    """`(seeds [S], hypers, params) -> (returns [S, users], metrics [S, steps])`: training and test in one program."""
    dims = CandidateDims(env.num_items, env.slate_size, *env.features)
    agent, _ = make_named(name, dims, make_choice_model(env, privileged), SPEC)
    training = make_transition_training(env, agent, budget.plan)
    steps = budget.steps if variant(name).learns else 1

    def one(seed: Array, hypers: Any, params: Any) -> tuple[Array, Any]:
        run = Run(jax.random.key(seed), hypers, params, params)
        state, metrics = training.steps(run, training.init(run), jnp.arange(steps))
        users = numbered_users("test", seed * budget.test_users + jnp.arange(budget.test_users, dtype=jnp.uint32))
        return returns(env, agent.greedy, users, params, Acting(state.agent, hypers, params)), metrics

    def all_seeds(seeds: Array, hypers: Any, params: Any) -> Any:
        # Products of many small matrices are slow on a CPU: there one seed after the other, elsewhere side by side.
        if jax.default_backend() == "cpu":
            return jax.lax.map(lambda seed: one(seed, hypers, params), seeds)
        return jax.vmap(one, in_axes=(0, None, None))(seeds, hypers, params)

    return jax.jit(all_seeds)


@dataclasses.dataclass(frozen=True)
class Job:
    """A run: an agent and some seeds."""

    name: str
    first_seed: int
    seeds: int

    def path(self, arguments: Arguments) -> Path:
        """Of its record."""
        stem = f"{_world(arguments)}_{self.name}_{self.first_seed}.json"
        return arguments.out / arguments.budget / "records" / stem


def _world(arguments: Arguments) -> str:
    return arguments.env + ("_privileged" if arguments.privileged else "")


def _stem(arguments: Arguments) -> str:
    """Of table and picture: another set of seeds has files of its own."""
    last = arguments.seed + BUDGETS[arguments.budget].seeds - 1
    return f"{_world(arguments)}_seeds_{arguments.seed}-{last}"


def _jobs(name: str, arguments: Arguments) -> list[Job]:
    seeds = BUDGETS[arguments.budget].seeds
    return [Job(name, arguments.seed + n, min(SEEDS, seeds - n)) for n in range(0, seeds, SEEDS)]


def _asked(job: Job, arguments: Arguments) -> dict[str, Any]:
    """What decides a record's numbers."""
    budget, found = BUDGETS[arguments.budget], variant(job.name)
    config = {
        "env": arguments.env,
        "env_settings": SETTINGS,
        "privileged": arguments.privileged,
        "agent": job.name,
        "spec": dataclasses.asdict(dataclasses.replace(SPEC, **found.spec)),
        "hypers": dataclasses.asdict(dataclasses.replace(budget.hypers, **found.hypers)),
        "plan": dataclasses.asdict(budget.plan),
        "steps": budget.steps if found.learns else 0,
        "first_seed": job.first_seed,
        "seeds": job.seeds,
        "test_users": budget.test_users,
    }
    return disk.plain(config)


def _train(job: Job, arguments: Arguments) -> dict[str, Any]:
    """The record of one run."""
    budget, found, started = BUDGETS[arguments.budget], variant(job.name), time.perf_counter()
    env, params = gemsjax.make(arguments.env, **SETTINGS)
    # The myopic agents are SARSA with another discount, which is a number: they share its program.
    program = _program(env, job.name.removeprefix("myopic_"), arguments.privileged, budget)
    hypers = jax.tree.map(jnp.float32, dataclasses.replace(budget.hypers, **found.hypers))
    seeds = job.first_seed + np.arange(job.seeds, dtype=np.uint32)
    played, metrics = jax.tree.map(np.asarray, program(seeds, hypers, params))
    if not np.isfinite(metrics["loss"]).all():
        raise TrainingError(f"{job.name}: the loss is no longer finite")
    return {
        "returns": played.mean(axis=1),
        "standard_errors": played.std(axis=1, ddof=1) / np.sqrt(played.shape[1]),
        "curve": _curve(metrics) if found.learns else [],
        "seconds": time.perf_counter() - started,
        "config": _asked(job, arguments),
        **surroundings(),
    }


def _curve(metrics: dict[str, np.ndarray]) -> list[dict[str, float]]:
    """Mean return of the training sessions, and mean loss, of spans of steps, over all seeds."""
    rows = []
    for part in np.array_split(np.arange(metrics["loss"].shape[1]), SPANS):
        done, earned = metrics["finished"][:, part].sum(), metrics["finished_return"][:, part].sum()
        mean = float(earned / done) if done else float("nan")
        rows.append({"step": int(part[-1]) + 1, "return": mean, "loss": float(metrics["loss"][:, part].mean())})
    return rows


def perform(arguments: Arguments, console: Console) -> dict[str, list[float]]:
    """Returns of all agents by seed, from records that are there and those that are made now."""
    (arguments.out / arguments.budget / "records").mkdir(parents=True, exist_ok=True)
    found: dict[str, list[float]] = {}
    for number, name in enumerate(arguments.agents, 1):
        found[name], seconds = [], 0.0
        for job in _jobs(name, arguments):
            path, asked = job.path(arguments), _asked(job, arguments)
            record = _read(path)
            if record is None or record.get("config") != asked:
                with console.status(f"[{number}/{len(arguments.agents)}] {name}, seeds from {job.first_seed}"):
                    disk.write_json(path, _train(job, arguments))
                record = json.loads(path.read_text(encoding="utf-8"))
            found[name] += record["returns"]
            seconds += record["seconds"]
        console.print(f"{name}: {np.mean(found[name]):.2f} ({seconds:.0f} s)", highlight=False)
    return found


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return record
    except ValueError as error:
        raise DataError(f"{path}: is not a record of this experiment ({error}): remove it") from error


# -- what is told ------------------------------------------------------------------------------------------------------


def comparisons(returns_of: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Every agent against what the paper puts below it: the gain, paired by seed, its 95 % interval and p-value.

    A SlateQ agent is compared with the myopic one that serves in its way (the greedy one for optimal slates).
    """
    pairs = []
    for name in returns_of:
        serving = variant(name).spec.get("serving")
        if name.startswith("myopic"):
            pairs.append((name, "dp_random"))
        elif name.startswith("slate_"):
            pairs.append((name, f"myopic_slate_{'topk' if serving == 'topk' else 'greedy'}_sarsa"))
    pairs = [pair for pair in pairs if pair[1] in returns_of]
    rows: list[dict[str, Any]] = []
    for above, below in pairs:
        p = paired(returns_of[above], returns_of[below])
        gain = t_interval(np.subtract(returns_of[above], returns_of[below]))
        rows.append({"above": above, "below": below, "gain": gain.value, "half": gain.half, "p": p, "shown": False})
    for passed, row in enumerate(sorted(rows, key=lambda row: row["p"])):  # Holm: the smallest p first
        if not row["p"] < LEVEL / (len(rows) - passed):
            break
        row["shown"] = row["gain"] > 0
    return rows


def markdown(returns_of: dict[str, list[float]], rows: list[dict[str, Any]], arguments: Arguments) -> str:
    """The table, with 95 % intervals over seeds."""
    budget = BUDGETS[arguments.budget]
    unit = "time watched" if arguments.env == "interest_evolution" else "clicks"
    told = {row["above"]: row for row in rows}
    hidden = ", privileged" if arguments.privileged else ""
    seeds = f"seeds {arguments.seed} to {arguments.seed + budget.seeds - 1}"
    lines = [
        f"{arguments.env}{hidden}: {unit} in a session, {seeds} of {budget.steps * budget.plan.users:,} training turns "
        f"and {budget.test_users} test users, 95 % intervals over seeds; gain over what the paper puts below, paired "
        "by seed, with its interval and the p of the paired t-test.",
        "",
        "| agent | name | return | against | gain | p |",
        "|---|---|---|---|---|---|",
    ]
    for name, values in returns_of.items():
        mean, row = t_interval(values), told.get(name)
        end = "| | | |" if row is None else _compared(row)
        lines.append(f"| {variant(name).title} | `{name}` | {mean.value:.2f} ± {mean.half:.2f} {end}")
    if rows:
        shown = sum(row["shown"] for row in rows)
        lines += ["", f"\\* {shown} of {len(rows)} are shown at the level {LEVEL:g}, corrected after Holm."]
    return "\n".join(lines) + "\n"


def _compared(row: dict[str, Any]) -> str:
    """The last three cells of a row of the table."""
    gain, mark = f"{row['gain']:+.2f} ± {row['half']:.2f}", " *" if row["shown"] else ""
    return f"| {variant(row['below']).title} | {gain} | {row['p']:.1g}{mark} |"


def main(arguments: Arguments) -> None:
    require_choice("--budget", arguments.budget, BUDGETS)
    require_choice("--env", arguments.env, ENVIRONMENTS)
    require_count("--seed", arguments.seed, 0, 2**20)
    require(len(set(arguments.agents)) == len(arguments.agents) > 0, "--agents", arguments.agents, "each once")
    for name in arguments.agents:
        variant(name)
    console = Console()
    returns_of = perform(arguments, console)
    rows = comparisons(returns_of)
    text = markdown(returns_of, rows, arguments)
    directory = arguments.out / arguments.budget
    stem = _stem(arguments)
    disk.write(directory / f"{stem}.md", text.encode())
    disk.write_json(directory / f"{stem}.json", {"returns": returns_of, "comparisons": rows})
    groups: dict[str, dict[str, list[float]]] = {"random": {}, "myopic": {}, "SlateQ": {}, "whole slates": {}}
    for name, values in returns_of.items():
        kind = {"dp": "random", "myopic": "myopic", "slate": "SlateQ", "full": "whole slates"}[name.split("_")[0]]
        groups[kind][variant(name).title] = values
    groups = {kind: agents for kind, agents in groups.items() if agents}
    xlabel = "return of a test session, one dot a seed"
    picture = plots.save(plots_recsim.returns_by_agent(groups, xlabel, arguments.env), directory / f"{stem}.png")
    console.print(Markdown(text))
    console.print(f"table: {directory / f'{stem}.md'}", soft_wrap=True)
    console.print(f"picture: {picture}", soft_wrap=True)


if __name__ == "__main__":
    run_cli(lambda: main(tyro.cli(Arguments, prog="python -m experiments.recsim_slateq", description=__doc__)))
