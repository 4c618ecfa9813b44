"""Ranking policies: what do penalties for similar items cost and gain, and does correcting for the position pay?

    python -m experiments.ranking [--budget smoke|small|full] [--only users|simulator] [--out DIR] [--json FILE]

Scorers learn from the clicks of TF-Agents' ranking users: ghost actions, a distance threshold, the same as a real
cascade, and users who look at slot j with probability (j + 1)^-1.3. Slates are drawn without penalty, with cosine
penalties of several mixtures, or ranked by score; all meet the same users. The users of the last steps, whom nothing
has been learnt from yet, tell the clicks of a slate, the mean cosine of its pairs, and what the scorer has learnt: its
correlation with the true worth of all items, and `recovered`, the worth of its best items between that of all (0) and
of the truly best (1). Users with position bias also tell what learning loses if it does not correct for it: the mean
error of the learnt relevance, P(click | looked at), for one. TF-Agents' weights correct only in part: where slots are
looked at with probability o, an item of relevance r is learnt as r / (1 + r (1 - o)) with them, as r o without.

Then SAC acts through the Plackett-Luce ranker in the slate simulator whose users punish slates of one topic, under
penalties of several sizes (items are the simulator's own: privileged).

`small` took five minutes of processor time when it had one run a penalty in the simulator. It now has three, and
they alone take five (16 on the clock of two busy cores). Expected with ranking users (4 seeds, 95 % intervals; all the
tables are in results/ranking/small.md):

    | users with position bias | clicks of a slate | mean cosine | correlation | error of the relevance |
    |--------------------------|-------------------|-------------|-------------|------------------------|
    | no penalty               |       1.06 ± 0.03 |        0.02 | 0.65 ± 0.02 |            0.16 ± 0.01 |
    | cosine 3                 |       1.07 ± 0.04 |       -0.10 | 0.65 ± 0.01 |                        |
    | descending               |       1.40 ± 0.03 |        0.25 | 0.58 ± 0.03 |            0.28 ± 0.01 |
    | descending, uncorrected  |       1.39 ± 0.04 |             | 0.32 ± 0.12 |            0.47 ± 0.01 |

In pairs of one seed, against drawn slates without penalty: ranking by score gets more clicks from ghosts (+0.052 ±
0.008), real cascades (+0.014 ± 0.011) and under position bias (+0.337 ± 0.011); with the distance threshold seed 3
collapsed (0.46 clicks, the others 0.85 to 0.90), and nothing can be said. Cosine 3 spreads drawn slates in all worlds;
it costs clicks with the distance threshold (-0.035 ± 0.022) and the real cascade (-0.024 ± 0.013), while no cost shows
with ghosts and position bias, and none of cosine 1 anywhere. The correction does more for what ranks by score than for
drawn slates in correlation (+0.260 ± 0.123 against -0.006 ± 0.018) and error of the relevance (-0.191 ± 0.017 against
-0.153 ± 0.002), but not in clicks (+0.009 ± 0.008 against +0.019 ± 0.017).
In the simulator (200 items, 600 trajectories, 3 seeds) clicks were 194 ± 31 without penalty, 164 ± 33 under 3, 69 ± 12
under 10 (random 37, oracle 94): the largest penalty costs more than half of them; of 3 nothing can be said.

`full` has the sizes of TF-Agents' demo (1001 items of 40 numbers, 128 users a step, 4000 steps, Adam 0.05) and asks
for an accelerator; with unit-length items the demo's distance threshold of 10 is never reached, so it is 1.5 there.
Finished worlds and runs in --out are not run again.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.markdown import Markdown

from experiments._cli import run_cli
from experiments._ranking_simulator import SIMULATOR, play_simulator, simulator_table
from gemsjax import devices, disk, plots, plots_ranking
from gemsjax.errors import DataError, TrainingError, require_choice, require_count
from gemsjax.maths.statistics import Estimate, t_interval
from gemsjax.ranking import (
    CommonTowerScorer,
    PositionBiasEnv,
    RankingAgentHypers,
    RankingAgentSpec,
    RankingEnv,
    RankingRun,
    RankingSpec,
    RankingState,
    make_ranking_agent,
    make_ranking_policy,
    make_ranking_training,
)
from gemsjax.ranking.agent import check_agent_hypers
from gemsjax.ranking.envs import demo_items, demo_relevance, demo_user


@dataclasses.dataclass(frozen=True)
class Budget:
    """Sizes of the users' worlds: items, numbers of users and items, users a step, steps, Adam's rate, seeds; the
    distance threshold; and the last steps whose (new) users tell how good a policy has become."""

    items: int
    user_dim: int
    item_dim: int
    users: int
    steps: int
    rate: float
    seeds: int
    threshold: float
    judging: int


BUDGETS = {
    "smoke": Budget(12, 6, 5, 8, 10, 0.01, 2, 1.0, 2),
    "small": Budget(101, 20, 16, 32, 600, 0.01, 4, 1.0, 50),
    "full": Budget(1_001, 50, 40, 128, 4_000, 0.05, 5, 1.5, 50),
}
SLOTS, SEVERITY = 5, 1.3
WORLDS = {
    "ghost": "ghost actions",
    "distance": "distance threshold",
    "cascade": "distance threshold, real cascade",
    "position": "position bias",
}
TEMPERATURE = 0.1
"""Of drawn slates but one: at TF-Agents' 1, scores of this size hardly matter."""


def _drawn(temperature: float = TEMPERATURE, penalty: float = 0.0, severity: float = SEVERITY) -> RankingAgentHypers:
    return RankingAgentHypers(temperature=temperature, penalty=penalty, bias_severity=severity)


VARIANTS = {
    "cosine": {
        "no penalty, temperature 1": _drawn(1.0),
        "no penalty": _drawn(),
        "cosine 0.3": _drawn(penalty=0.3),
        "cosine 1": _drawn(penalty=1.0),
        "cosine 3": _drawn(penalty=3.0),
    },
    "descending": {"descending": _drawn()},
}
"""By kind of policy: no penalty is a cosine penalty of which nothing counts."""
UNCORRECTED = {
    "cosine": {"no penalty, uncorrected": _drawn(severity=0.0)},
    "descending": {"descending, uncorrected": _drawn(severity=0.0)},
}
METRICS = ("clicks", "similarity", "correlation", "recovered", "error")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """How much, and where to."""

    budget: Literal["smoke", "small", "full"] = "small"
    """How much of everything."""
    only: Literal["all", "users", "simulator"] = "all"
    """Ranking users, the slate simulator, or both."""
    seed: int = 0
    """First seed, of the ranking users and of the runs in the simulator."""
    out: Path = Path("runs/ranking")
    """Directory for records, runs, table and picture."""
    json: Path | None = None
    """Write all numbers to this file."""


# -- ranking users -----------------------------------------------------------------------------------------------------


def world_of(name: str, budget: Budget) -> tuple[Any, Any, RankingAgentSpec]:
    """Environment, its parameters, and how an agent learns there."""
    user, items = demo_user(budget.user_dim), demo_items(budget.items, budget.item_dim)
    if name == "position":
        biased = PositionBiasEnv(user, items, budget.items, SLOTS, relevance_fn=demo_relevance)
        looked = [float(slot) ** -SEVERITY for slot in range(1, SLOTS + 1)]
        return biased, biased.params(looked), RankingAgentSpec("score_vector", bias="base", positive_only=True)
    model = "ghost_actions" if name == "ghost" else "distance_based"
    env = RankingEnv(user, items, budget.items, SLOTS, click_model=model, real_cascade=name == "cascade")
    threshold = None if name == "ghost" else budget.threshold
    return env, env.params(jnp.eye(budget.item_dim, budget.user_dim), threshold), RankingAgentSpec()


def play(name: str, kind: str, budget: Budget, seed: int) -> dict[str, dict[str, list[float]]]:
    """Learn and judge all variants of a kind in a world, side by side: by variant and metric, one number a seed."""
    env, params, spec = world_of(name, budget)
    policy = make_ranking_policy(RankingSpec(budget.items, SLOTS, kind), CommonTowerScorer())
    training = make_ranking_training(env, make_ranking_agent(spec, policy), budget.users)
    variants = VARIANTS[kind] | (UNCORRECTED[kind] if name == "position" else {})
    chosen = [dataclasses.replace(hypers, rate=budget.rate) for hypers in variants.values()]
    for hypers in chosen:
        check_agent_hypers(hypers)
    stacked = jax.tree.map(lambda *x: jnp.array(x, jnp.float32), *chosen)

    seeds, numbers = jnp.arange(seed, seed + budget.seeds), jnp.arange(budget.steps)
    keys = jax.vmap(jax.random.key)(seeds)
    states = jax.jit(jax.vmap(lambda key: training.init(RankingRun(key, chosen[0], params))))(keys)

    @jax.jit
    def all_of(keys: jax.Array, states: RankingState, hypers: RankingAgentHypers) -> dict[str, jax.Array]:
        """Metrics [seeds, variants] of the last steps."""

        def one(key: jax.Array, state: RankingState, hypers: RankingAgentHypers) -> dict[str, jax.Array]:
            metrics = training.steps(RankingRun(key, hypers, params), state, numbers)[1]
            return jax.tree.map(lambda x: x[-budget.judging :].mean(), metrics)

        return jax.vmap(jax.vmap(one, in_axes=(None, None, 0)), in_axes=(0, 0, None))(keys, states, hypers)

    told = jax.tree.map(np.asarray, all_of(keys, states, stacked))
    for metric, values in told.items():
        if not np.isfinite(values).all():
            raise TrainingError(f"{WORLDS[name]}, {kind}: {metric} is not finite")
    return {
        variant: {metric: told[metric][:, number].tolist() for metric in METRICS}
        for number, variant in enumerate(variants)
    }


def identity_of(name: str, budget: Budget, seed: int) -> dict[str, Any]:
    """All that the record of a world depends on, the constants of this module included; numbers and names, as JSON."""
    kinds = VARIANTS if name != "position" else {kind: VARIANTS[kind] | UNCORRECTED[kind] for kind in VARIANTS}
    variants = {
        kind: {name: dataclasses.asdict(hypers) for name, hypers in rows.items()} for kind, rows in kinds.items()
    }
    constants = {"world": name, "slots": SLOTS, "severity": SEVERITY, "variants": variants}
    return {"seed": seed, **dataclasses.asdict(budget), **constants}


def play_users(budget: Budget, seed: int, out: Path, console: Console) -> dict[str, dict[str, dict[str, list[float]]]]:
    """`play` for every world and kind; what an earlier call with the same settings left in `out` is read."""
    worlds = {}
    for name in WORLDS:
        identity = identity_of(name, budget, seed)
        path = out / "records" / f"{name}-{disk.digest(identity)[:8]}.json"
        if not path.is_file():
            with console.status(f"{WORLDS[name]}: {budget.seeds} seeds of {budget.steps} steps"):
                found = {k: v for kind in VARIANTS for k, v in play(name, kind, budget, seed).items()}
            path.parent.mkdir(parents=True, exist_ok=True)
            disk.write_json(path, {"settings": identity, "metrics": found, **devices.surroundings()})
        record = json.loads(path.read_bytes())
        if record["settings"] != identity:
            raise DataError(f"{path} was made with other settings; remove it")
        worlds[name] = record["metrics"]
        console.print(f"{WORLDS[name]}: done")
    return worlds


# -- what is told ------------------------------------------------------------------------------------------------------


def users_table(worlds: dict[str, dict[str, dict[str, list[float]]]], budget: Budget) -> str:
    """All worlds and variants, then what penalty and correction do; 95 % Student-t intervals over seeds."""
    lines = [
        f"{budget.items} items, {SLOTS} slots, {budget.steps} steps of {budget.users} users, {budget.seeds} seeds with "
        "95 % intervals; drawn slates have temperature 0.1 unless said otherwise.",
        "",
        "| users | policy | clicks of a slate | mean cosine of pairs | correlation | recovered |",
        "|---|---|---|---|---|---|",
    ]
    for name, variants in worlds.items():
        for variant, metrics in variants.items():
            if "uncorrected" not in variant:
                told = " | ".join(_told(t_interval(metrics[metric])) for metric in METRICS[:4])
                lines.append(f"| {WORLDS[name]} | {variant} | {told} |")
    return "\n".join([*lines, "", *_penalty_lines(worlds), "", *_correction_lines(worlds["position"])]) + "\n"


def _penalty_lines(worlds: dict[str, dict[str, dict[str, list[float]]]]) -> list[str]:
    """What every penalty, and ranking by score, change against drawing without penalty."""
    columns = METRICS[:4]
    lines = [
        "Differences of the same seeds (so of the same users) from `no penalty`.",
        "",
        "| users | policy | clicks of a slate | mean cosine of pairs | correlation | recovered |",
        "|---|---|---|---|---|---|",
    ]
    for name, variants in worlds.items():
        for variant in ("cosine 0.3", "cosine 1", "cosine 3", "descending"):
            told = " | ".join(_told(t_interval(_less(variants, variant, "no penalty")[metric])) for metric in columns)
            lines.append(f"| {WORLDS[name]} | {variant} | {told} |")
    return lines


def _correction_lines(biased: dict[str, dict[str, list[float]]]) -> list[str]:
    """What the correction for position does to learning."""
    columns = ("clicks", "correlation", "recovered", "error")
    lines = [
        "Learning from users with position bias; differences are of the same seeds, corrected less uncorrected. The "
        "relevance is r = P(click | looked at), slots are looked at with probability o: learning aims at "
        "r / (1 + r (1 - o)) corrected and at r o uncorrected.",
        "",
        "| policy | learning | clicks of a slate | correlation | recovered | error of the relevance |",
        "|---|---|---|---|---|---|",
    ]
    for variant in ("no penalty", "descending"):
        plain = f"{variant}, uncorrected"
        rows = (("corrected", biased[variant]), ("uncorrected", biased[plain]))
        for label, metrics in (*rows, ("difference", _less(biased, variant, plain))):
            told = " | ".join(_told(t_interval(metrics[metric])) for metric in columns)
            lines.append(f"| {variant} | {label} | {told} |")
    return lines


def _less(variants: dict[str, dict[str, list[float]]], one: str, other: str) -> dict[str, list[float]]:
    """Differences of two variants, seed by seed."""
    return {name: np.subtract(variants[one][name], variants[other][name]).tolist() for name in METRICS}


def _told(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ± {estimate.half:.3f}"


def _picture(worlds: dict[str, dict[str, dict[str, list[float]]]], out: Path) -> Path:
    panels = {
        WORLDS[name]: {
            variant: (t_interval(metrics["similarity"]), t_interval(metrics["clicks"]))
            for variant, metrics in variants.items()
            if "uncorrected" not in variant
        }
        for name, variants in worlds.items()
    }
    return plots.save(plots_ranking.clicks_against_similarity(panels), out / "clicks_against_similarity.png")


def main(arguments: Arguments) -> None:
    require_choice("--budget", arguments.budget, BUDGETS)
    require_count("--seed", arguments.seed, 0, 2**32 - 1 - 100)
    budget, console = BUDGETS[arguments.budget], Console()
    for directory in (arguments.out, *([arguments.json.parent] if arguments.json else [])):
        directory.mkdir(parents=True, exist_ok=True)  # now, so that a wrong place is not found out at the end
    report: dict[str, Any] = {"budget": arguments.budget, "seed": arguments.seed}
    texts = []
    if arguments.only != "simulator":
        report["users"] = play_users(budget, arguments.seed, arguments.out, console)
        texts.append(users_table(report["users"], budget))
        console.print(f"picture: {_picture(report['users'], arguments.out)}", soft_wrap=True)
    if arguments.only != "users":
        report["simulator"] = play_simulator(SIMULATOR[arguments.budget], arguments.seed, arguments.out, console)
        texts.append(simulator_table(report["simulator"], SIMULATOR[arguments.budget]))
    text = "\n".join(texts)
    disk.write(arguments.out / "ranking.md", text.encode())
    console.print(Markdown(text))
    console.print(f"table: {arguments.out / 'ranking.md'}", soft_wrap=True)
    if arguments.json is not None:
        disk.write_json(arguments.json, report)


if __name__ == "__main__":
    run_cli(lambda: main(tyro.cli(Arguments, prog="python -m experiments.ranking", description=__doc__)))
