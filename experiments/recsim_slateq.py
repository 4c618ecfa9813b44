"""SlateQ in RecSim: does looking ahead pay? Random, myopic and SlateQ agents, several seeds, the paper's order tested.

    python -m experiments.recsim_slateq [--budget smoke|small|full] [--env interest_evolution] [--out DIR]

Every agent learns from the same number of turns with users of its own; then it plays test users, which are the same
for all agents and others for each seed. An agent is one program for all of its seeds and leaves one JSON record in
DIR/<budget>/records, from which table and picture are made. Agents whose record is there are not run again, so a
command that was stopped is simply repeated. Intervals are Student-t over seeds, p-values those of Welch's test, and the
order of the paper (SlateQ above the myopic agent that serves in the same way, myopic above random) counts as shown
where the difference is positive and p is below 0.05 over the number of comparisons. Rate, target period and exploration
are not RecSim's but fit a short run (Adam with 0.001, a copy every 200 updates); they are the same for all agents.

In interest exploration clicks change nothing, so there is nothing to look ahead to; --privileged tells agents there
what each user likes, which is otherwise hidden (in interest evolution nothing that matters is).
"""

from __future__ import annotations

import dataclasses
import json
import platform
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
from gemsjax.envs.knowledge import make_choice_model
from gemsjax.errors import DataError, TrainingError, require, require_choice, require_count
from gemsjax.evaluate import numbered_users
from gemsjax.maths.statistics import t_interval, welch
from gemsjax.rollout import returns
from gemsjax.train import Run
from gemsjax.transitions import TransitionPlan, make_transition_training
from gemsjax.types import Array, CandidateDims

ENVIRONMENTS = ("interest_evolution", "interest_exploration")
SETTINGS = {"horizon": 200}
"""Of both environments: no test session was seen to last longer in interest evolution, and turns cost time."""
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
    "small": Budget(5, 3_000, 400, TransitionPlan(users=8, replay_capacity=20_000, warm_up=1_000)),
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


def _asked(name: str, arguments: Arguments) -> dict[str, Any]:
    """What decides a record's numbers."""
    budget, found = BUDGETS[arguments.budget], variant(name)
    config = {
        "env": arguments.env,
        "env_settings": SETTINGS,
        "privileged": arguments.privileged,
        "agent": name,
        "spec": dataclasses.asdict(dataclasses.replace(SPEC, **found.spec)),
        "hypers": dataclasses.asdict(dataclasses.replace(budget.hypers, **found.hypers)),
        "plan": dataclasses.asdict(budget.plan),
        "steps": budget.steps if found.learns else 0,
        "first_seed": arguments.seed,
        "seeds": budget.seeds,
        "test_users": budget.test_users,
    }
    return disk.plain(config)


def _train(name: str, arguments: Arguments) -> dict[str, Any]:
    """The record of one agent."""
    budget, found, started = BUDGETS[arguments.budget], variant(name), time.perf_counter()
    env, params = gemsjax.make(arguments.env, **SETTINGS)
    # The myopic agents are SARSA with another discount, which is a number: they share its program.
    program = _program(env, name.removeprefix("myopic_"), arguments.privileged, budget)
    hypers = jax.tree.map(jnp.float32, dataclasses.replace(budget.hypers, **found.hypers))
    seeds = arguments.seed + np.arange(budget.seeds, dtype=np.uint32)
    played, metrics = jax.tree.map(np.asarray, program(seeds, hypers, params))
    if not np.isfinite(metrics["loss"]).all():
        raise TrainingError(f"{name}: the loss is no longer finite")
    return {
        "returns": played.mean(axis=1),
        "standard_errors": played.std(axis=1, ddof=1) / np.sqrt(played.shape[1]),
        "curve": _curve(metrics) if found.learns else [],
        "seconds": time.perf_counter() - started,
        "config": _asked(name, arguments),
        "device": f"{jax.devices()[0].platform}: {jax.devices()[0].device_kind}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__},
    }


def _curve(metrics: dict[str, np.ndarray]) -> list[dict[str, float]]:
    """Mean return of the training sessions, and mean loss, of spans of steps, over all seeds."""
    rows = []
    for part in np.array_split(np.arange(metrics["loss"].shape[1]), SPANS):
        done, earned = metrics["finished"][:, part].sum(), metrics["finished_return"][:, part].sum()
        mean = float(earned / done) if done else float("nan")
        rows.append({"step": int(part[-1]) + 1, "return": mean, "loss": float(metrics["loss"][:, part].mean())})
    return rows


def perform(arguments: Arguments, console: Console) -> dict[str, dict[str, Any]]:
    """The records of all agents, those that are there and those that are made now."""
    directory, records = arguments.out / arguments.budget / "records", {}
    directory.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(arguments.agents, 1):
        path = directory / f"{arguments.env}{'_privileged' if arguments.privileged else ''}_{name}.json"
        record = _read(path)
        if record is None or record.get("config") != _asked(name, arguments):
            with console.status(f"[{number}/{len(arguments.agents)}] {name}"):
                disk.write_json(path, _train(name, arguments))
            record = _read(path)
        assert record is not None
        records[name] = record
        console.print(f"{name}: {np.mean(record['returns']):.2f} ({record['seconds']:.0f} s)", highlight=False)
    return records


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
    """Every agent against what the paper puts below it, with Welch's p-value.

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
    rows = []
    for above, below in pairs:
        p = welch(returns_of[above], returns_of[below])
        gain = float(np.mean(returns_of[above]) - np.mean(returns_of[below]))
        shown = gain > 0 and p < LEVEL / len(pairs)
        rows.append({"above": above, "below": below, "gain": gain, "p": p, "shown": bool(shown)})
    return rows


def markdown(records: dict[str, dict[str, Any]], rows: list[dict[str, Any]], arguments: Arguments) -> str:
    """The table, with 95 % intervals over seeds."""
    budget = BUDGETS[arguments.budget]
    unit = "time watched" if arguments.env == "interest_evolution" else "clicks"
    told = {row["above"]: row for row in rows}
    hidden = ", privileged" if arguments.privileged else ""
    lines = [
        f"{arguments.env}{hidden}: {unit} in a session, {budget.seeds} seeds of "
        f"{budget.steps * budget.plan.users:,} training turns and {budget.test_users} test users, 95 % intervals over "
        "seeds; gain over what the paper puts below, with Welch's p.",
        "",
        "| agent | name | return | against | gain | p |",
        "|---|---|---|---|---|---|",
    ]
    for name, record in records.items():
        mean, row = t_interval(record["returns"]), told.get(name)
        end = "| | | |" if row is None else (
            f"| {variant(row['below']).title} | {row['gain']:+.2f} | {row['p']:.1g}{' *' if row['shown'] else ''} |"
        )  # fmt: skip
        lines.append(f"| {variant(name).title} | `{name}` | {mean.value:.2f} ± {mean.half:.2f} {end}")
    if rows:
        shown = sum(row["shown"] for row in rows)
        level = LEVEL / len(rows)
        lines += ["", f"\\* shown: p below {LEVEL:g} / {len(rows)} = {level:.2g}; {shown} of {len(rows)} are."]
    return "\n".join(lines) + "\n"


def main(arguments: Arguments) -> None:
    require_choice("--budget", arguments.budget, BUDGETS)
    require_choice("--env", arguments.env, ENVIRONMENTS)
    require_count("--seed", arguments.seed, 0, 2**20)
    require(len(set(arguments.agents)) == len(arguments.agents) > 0, "--agents", arguments.agents, "each once")
    for name in arguments.agents:
        variant(name)
    console = Console()
    records = perform(arguments, console)
    returns_of = {name: record["returns"] for name, record in records.items()}
    rows = comparisons(returns_of)
    text = markdown(records, rows, arguments)
    directory = arguments.out / arguments.budget
    stem = arguments.env + ("_privileged" if arguments.privileged else "")
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
