"""What `ppo_a2c` tells of its records: tables with paired comparisons, learning curves. Called by that module only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemsjax import plots
from gemsjax.maths.statistics import paired, t_interval
from gemsjax.on_policy.evaluation import REFERENCES

TITLES = {"random": "random items", "same-item": "one item for everybody", "best-item": "best item ‡"}
WAYS = {"greedy": "greedy", "drawn": "sampled"}
PAIRS = (
    ("PPO", "random"), ("A2C", "random"), ("PPO", "same-item"), ("A2C", "same-item"), ("PPO", "A2C"),
    ("PPO", "PPO, published"), ("A2C", "A2C, published"), ("A2C", "A2C, n-step"), ("best-item", "PPO"),
)  # fmt: skip


def by_seed(records: Sequence[Mapping[str, Any]], world: str, how: str = "greedy") -> dict[str, dict[int, float]]:
    """Mean return by policy and seed, in one world: of variants `greedy` or `sampled`, of references the only one."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        if record["world"] == world:
            found.setdefault(record["variant"], {})[record["seed"]] = record[how]
            for name, value in record["references"].items():
                found.setdefault(name, {})[record["seed"]] = value
    return found


def comparisons(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Differences of greedy and of drawn returns, paired by seed (one item table, the same users): 95 % t-intervals."""
    rows = []
    for world in dict.fromkeys(record["world"] for record in records):
        for way, how in WAYS.items():
            found = by_seed(records, world, how)
            for one, other in PAIRS:
                if one in found and other in found:
                    seeds = sorted(found[one].keys() & found[other].keys())
                    ours, theirs = (np.array([found[name][seed] for seed in seeds]) for name in (one, other))
                    gap = t_interval(ours - theirs)
                    about = {"difference": gap.value, "low": gap.low, "high": gap.high, "p": paired(ours, theirs)}
                    names = {"world": world, "returns": way, "policy": one, "less": other}
                    rows.append(names | {"seeds": len(seeds)} | about)
    return rows


def markdown(records: Sequence[Mapping[str, Any]], about: str) -> str:
    """Both tables; `about` says how many users judged, and the budget."""
    seeds, turns = len({record["seed"] for record in records}), [record["turns"] for record in records]
    horizon = records[0]["config"]["env"]["max_episode_steps"]
    lines = [
        f"Return of an episode of {horizon} turns after {min(turns):,} turns of "
        f"training, rounded up to whole rollouts (to {max(turns):,} at most): mean and 95 % t-interval over {seeds} "
        f"seeds, each with an item table of its own; {about}.",
        "",
        "| world | policy | greedy | drawn | share of the optimum (greedy) |",
        "|---|---|---|---|---|",
    ]
    for world in dict.fromkeys(record["world"] for record in records):
        greedy, sampled = by_seed(records, world), by_seed(records, world, "sampled")
        for name in sorted(greedy, key=lambda name: np.mean(list(greedy[name].values()))):
            reference = name in REFERENCES
            shares = [100.0 * greedy[name][seed] / greedy["best-item"][seed] for seed in greedy[name]]
            drawn = "" if reference else _interval(list(sampled[name].values()))
            share = f"{_interval(shares, 1)} %"
            cells = (world, TITLES.get(name, name), _interval(list(greedy[name].values())), drawn, share)
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "‡ knows the item table; no policy is better.",
        "",
        "Differences of returns, paired by seed (item table and users are the same). Intervals and p are of each "
        "comparison by itself, not corrected for how many there are.",
        "",
        "| world | returns | policy | less | difference, 95 % interval | p (paired t) |",
        "|---|---|---|---|---|---|",
    ]
    for row in comparisons(records):
        gap = f"{row['difference']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        names = (TITLES.get(row[part], row[part]) for part in ("policy", "less"))
        lines.append(f"| {' | '.join((row['world'], row['returns'], *names, gap, format(row['p'], '.2g')))} |")
    return "\n".join(lines) + "\n"


def _interval(values: Sequence[float], digits: int = 2) -> str:
    estimate = t_interval(values)
    return f"{estimate.value:.{digits}f}" + ("" if math.isnan(estimate.half) else f" ± {estimate.half:.{digits}f}")


def draw(records: Sequence[Mapping[str, Any]]) -> Any:
    """Greedy return against turns of training, a panel a world, references as lines across."""
    panels: dict[str, dict[str, list]] = {}
    variants = dict.fromkeys(record["variant"] for record in records)
    for world in dict.fromkeys(record["world"] for record in records):
        mine = [record for record in records if record["world"] == world]
        # The same names in every panel (without points where they were not run): colours go by their place.
        lines = panels.setdefault(world, {name: [] for name in (*variants, *TITLES.values())})
        for variant in dict.fromkeys(record["variant"] for record in mine):
            curves = np.array([record["curve"] for record in mine if record["variant"] == variant])
            lines[variant] = [(float(c[0, 0]), t_interval(c[:, 1])) for c in np.moveaxis(curves, 1, 0)]
        ends = sorted({point[0] for line in lines.values() if line for point in (line[0], line[-1])})
        for name, values in by_seed(records, world).items():
            if name in REFERENCES:
                lines[TITLES[name]] = [(x, t_interval(list(values.values()))) for x in (ends[0], ends[-1])]
    figure = plots.lines_with_intervals(panels, "greedy return of an episode")
    for axes in figure.axes:
        axes.set_xlabel("turns of training")
    return figure
