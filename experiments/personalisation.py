"""Users with drifting tastes, re-ranked for each of them: what do a slow and a fast vector save?

    python -m experiments.personalisation
    python -m experiments.personalisation --budget full --json personalisation.json

Writes a table (Markdown) and a picture of cumulative regret.

A static ranker knows what is popular; a user's taste is part popular, part its own, part a mood that changes with
probability 1/period a turn. Every turn 20 new candidates come up, one is served, and clicked with a probability that
rises with its match to the taste. Regret of a turn is the click probability of the best candidate less the expected one
of the policy; users, candidates and moods are the same for every policy. Intervals are Student-t over seeds of
different users. "Saved" compares with the static ranker at its best, which serves its first item; the personalised
ones sample, and pay for it.

Regret after 400 turns at the full budget, with 95 % intervals (`results/personalisation/full.md`):

    | world                   | static, first item | slow vector only | slow and fast vector | saved by the fast |
    |-------------------------|--------------------|------------------|----------------------|-------------------|
    | tastes stand still      |        183.5 ± 1.1 |       48.2 ± 0.3 |           51.6 ± 0.3 |        -3.5 ± 0.2 |
    | a new mood in 100 turns |        183.3 ± 0.8 |      112.3 ± 0.6 |          107.2 ± 0.5 |         5.1 ± 0.4 |
    | a new mood in 20 turns  |        183.0 ± 0.6 |      151.8 ± 0.4 |          146.2 ± 0.5 |         5.6 ± 0.4 |

So personalisation saves most of the regret where tastes keep still and a fifth where they hardly do; the fast vector
costs a little in the former and earns its keep in the latter. The numbers of `POLICIES` were chosen by hand for these
worlds and no record is kept of others: what the fast vector saves is that of this choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.markdown import Markdown

from experiments._cli import run_cli
from gemsjax import disk, plots, plots_personalisation
from gemsjax.devices import spread
from gemsjax.errors import require_choice, require_count
from gemsjax.evaluate import Evaluation, summarise
from gemsjax.personalisation import PersonalisationConfig, UserState, check_config, new_user, policy_scores, update
from gemsjax.types import Array, Key


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much of it: seeds, users of each, turns of each user."""

    seeds: int
    users: int
    turns: int


BUDGETS = {"smoke": Budget(2, 20, 50), "small": Budget(5, 100, 400), "full": Budget(20, 500, 400)}

CANDIDATES, DIM = 20, 8
SLOPE, OFFSET = 6.0, 2.0
"""A candidate with match m to the taste (both of length one) is clicked with probability sigmoid(SLOPE m - OFFSET)."""
POPULAR, MOOD = 0.7, 0.7
"""Weight of the popular taste in a user's own, and share of the mood in what a user wants (of the squared length)."""
BASE = 2.0
"""Score of the static ranker for a perfect match with the popular taste."""

WORLDS = {"tastes stand still": 1e9, "a new mood in 100 turns": 100.0, "a new mood in 20 turns": 20.0}
"""Mean turns between moods."""


@dataclasses.dataclass(frozen=True)
class Served:
    """A policy: numbers of the rule, and whether it learns (gate 1 or 0)."""

    label: str
    config: PersonalisationConfig
    gate: float = 1.0


TAU = 0.3
POLICIES = {
    "static-first": Served("static, first item", PersonalisationConfig(tau=1e-3), 0.0),
    "static-sampled": Served("static, sampled", PersonalisationConfig(tau=TAU), 0.0),
    "long": Served(
        "slow vector only",
        PersonalisationConfig(tau=TAU, beta_short=0.0, eta_long=0.3, ema_alpha=0.05),
    ),
    "long-and-short": Served(
        "slow and fast vector",
        PersonalisationConfig(tau=TAU, beta_short=1.0, eta_long=0.3, eta_short=0.3, short_decay=0.05, ema_alpha=0.05),
    ),
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """How much, and where to."""

    budget: str = "small"
    """smoke, small or full."""
    seed: int = 0
    """First seed; each has users of its own."""
    out: Path = Path("runs/personalisation")
    """Directory for table and picture."""
    json: Path | None = None
    """Write the numbers to this file."""


# -- the users ---------------------------------------------------------------------------------------------------------


def _unit(vectors: Array) -> Array:
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def _popular() -> Array:
    return _unit(jax.random.normal(jax.random.key(1_000_003), (DIM,)))


def play_user(key: Key, period: Array, config: PersonalisationConfig, gate: Array, turns: int) -> Array:
    """Regret of every turn of one user under one policy: [turns]."""
    own_key, mood_key, turn_key = jax.random.split(key, 3)
    own = _unit(POPULAR * _popular() + _unit(jax.random.normal(own_key, (DIM,))))
    present, target = jnp.ones(CANDIDATES, bool), jnp.array([True])

    def turn(carry: tuple[UserState, Array], key: Key) -> tuple[tuple[UserState, Array], Array]:
        state, mood = carry
        change_key, mood_key, items_key, serve_key, click_key = jax.random.split(key, 5)
        change = jax.random.uniform(change_key) < 1.0 / period
        mood = jnp.where(change, _unit(jax.random.normal(mood_key, (DIM,))), mood)
        taste = _unit(jnp.sqrt(1.0 - MOOD) * own + jnp.sqrt(MOOD) * mood)
        items = _unit(jax.random.normal(items_key, (CANDIDATES, DIM)))
        clicks = jax.nn.sigmoid(SLOPE * items @ taste - OFFSET)
        _, probs = policy_scores(BASE * items @ _popular(), state, items, present, config)
        served = jax.random.categorical(serve_key, jnp.log(probs))
        reward = (jax.random.uniform(click_key) < clicks[served]).astype(jnp.float32)
        state, _ = update(state, items, present, served[None], target, probs, reward, gate, config)
        return (state, mood), clicks.max() - probs @ clicks

    start = new_user(DIM), _unit(jax.random.normal(mood_key, (DIM,)))
    return jax.lax.scan(turn, start, jax.random.split(turn_key, turns))[1]


def play(budget: Budget, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Mean regret over a seed's users by world and policy: [seeds, turns] each."""
    users = budget.seeds * budget.users
    chosen = [(served.config, served.gate) for served in POLICIES.values()]
    configs, gates = jax.tree.map(lambda *x: jnp.array(x, jnp.float32), *chosen)

    def side_by_side(numbers: Array, seed: Array, period: Array, configs: Any, gates: Array) -> Array:
        def one(number: Array) -> Array:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number // budget.users), number)
            return jax.vmap(lambda config, gate: play_user(key, period, config, gate, budget.turns))(configs, gates)

        return jax.vmap(one)(numbers)

    played = spread(side_by_side, users)
    numbers = np.arange(played.users, dtype=np.uint32)
    worlds = {}
    for title, period in WORLDS.items():
        regret = np.asarray(played.program(numbers, jnp.uint32(seed), jnp.float32(period), configs, gates))[:users]
        means = regret.reshape(budget.seeds, budget.users, *regret.shape[1:]).mean(axis=1)
        worlds[title] = {name: means[:, number] for number, name in enumerate(POLICIES)}
    return worlds


# -- what is told ------------------------------------------------------------------------------------------------------


def table(worlds: Mapping[str, Mapping[str, np.ndarray]]) -> list[dict[str, Any]]:
    """A row for each world and policy: regret over all turns, and what it saves against the first two static ones."""
    rows = []
    for title, policies in worlds.items():
        totals = {name: regret.sum(axis=1) for name, regret in policies.items()}
        for name, total in totals.items():
            saved = summarise(totals["static-first"] - total)  # of the same users: paired
            fast = summarise(totals["long"] - total)
            rows.append(
                {"world": title, "period": WORLDS[title], "policy": name, "seeds": len(total)}
                | _columns("regret", summarise(total))
                | _columns("saved_against_static", saved)
                | _columns("saved_against_long", fast)
            )
    return rows


def _columns(name: str, evaluation: Evaluation) -> dict[str, Any]:
    return {name: evaluation.mean, f"{name}_interval": evaluation.interval}


def markdown(rows: list[dict[str, Any]], budget: Budget) -> str:
    """The table, with 95 % intervals over seeds."""
    lines = [
        f"Regret of a user over {budget.turns} turns in clicks: {budget.seeds} seeds of {budget.users} users, 95 % "
        "intervals over seeds.",
        "",
        "| world | policy | regret | saved against static | saved by the fast vector |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        static, is_both = row["policy"] == "static-first", row["policy"] == "long-and-short"
        saved = "" if static else _interval(row, "saved_against_static")
        fast = _interval(row, "saved_against_long") if is_both else ""
        label = POLICIES[row["policy"]].label
        lines.append(f"| {row['world']} | {label} | {_interval(row, 'regret')} | {saved} | {fast} |")
    return "\n".join(lines) + "\n"


def _interval(row: Mapping[str, Any], name: str) -> str:
    return f"{row[name]:.1f} ± {row[f'{name}_interval'][1] - row[name]:.1f}"


def main(arguments: Arguments) -> None:
    require_choice("--budget", arguments.budget, BUDGETS)
    require_count("--seed", arguments.seed, 0, 2**32 - 1)
    for served in POLICIES.values():
        check_config(served.config)
    budget, console = BUDGETS[arguments.budget], Console()
    for directory in (arguments.out, *([arguments.json.parent] if arguments.json else [])):
        directory.mkdir(parents=True, exist_ok=True)  # now, so that a wrong place is not found out at the end
    with console.status(f"{budget.seeds * budget.users:,} users, {len(WORLDS)} worlds, {len(POLICIES)} policies"):
        worlds = play(budget, arguments.seed)
    rows = table(worlds)
    text = markdown(rows, budget)
    disk.write(arguments.out / "personalisation.md", text.encode())
    labelled = {
        title: {POLICIES[name].label: regret for name, regret in policies.items()} for title, policies in worlds.items()
    }
    picture = plots.save(plots_personalisation.cumulative_regret(labelled), arguments.out / "cumulative_regret.png")
    console.print(Markdown(text))
    console.print(f"table: {arguments.out / 'personalisation.md'}", soft_wrap=True)
    console.print(f"picture: {picture}", soft_wrap=True)
    if arguments.json is not None:
        disk.write_json(arguments.json, {"budget": arguments.budget, "seed": arguments.seed, "table": rows})


if __name__ == "__main__":
    run_cli(lambda: main(tyro.cli(Arguments, prog="python -m experiments.personalisation", description=__doc__)))
