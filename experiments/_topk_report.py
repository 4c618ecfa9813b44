"""What `topk_off_policy` tells of its records: tables, paired comparisons, pictures. Called by that module only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gemsjax import methods, plots_offline
from gemsjax.agents.topk_reinforce import TopKHypers
from gemsjax.maths.statistics import paired, t_interval

WAYS = ("greedy", "served")
PAIRS = (
    ("first-order", "none"), ("top-K", "none"), ("first-order, logged propensities", "none"),
    ("top-K, logged propensities", "none"), ("top-K, critic", "none"),
    ("top-K", "first-order"), ("top-K, logged propensities", "first-order, logged propensities"),
    ("first-order, logged propensities", "first-order"), ("top-K, logged propensities", "top-K"),
    ("none, shown items", "none"), ("top-K, logged propensities, shown items", "none, shown items"),
    ("top-K, logged propensities, shown items", "top-K, logged propensities"),
)  # fmt: skip
"""Which corrections are compared: one, and what is taken off it."""


class Drawn(NamedTuple):
    """Of held-out users, what pictures show.

    Attributes:
      ratio, top_k: [n] importance weights before the cap and lambda, of the actions that are learnt from.
      estimated, logged: [m] probabilities of all shown items.
    """

    ratio: np.ndarray
    top_k: np.ndarray
    estimated: np.ndarray
    logged: np.ndarray


def by_seed(records: Sequence[Mapping[str, Any]], way: str) -> dict[str, dict[int, float]]:
    """Mean return by correction and training seed."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        found.setdefault(record["variant"], {})[record["seed"]] = record[way]["mean"]
    return found


def comparisons(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Differences paired by seed (one log, the same test users, first weights and order of users): 95 % t-intervals."""
    rows = []
    for way in WAYS:
        found = by_seed(records, way)
        for one, other in PAIRS:
            seeds = sorted(found.get(one, {}).keys() & found.get(other, {}).keys())
            if seeds:
                ours, theirs = (np.array([found[name][seed] for seed in seeds]) for name in (one, other))
                gap = t_interval(ours - theirs)
                about = {"difference": gap.value, "low": gap.low, "high": gap.high, "p": paired(ours, theirs)}
                rows.append({"returns": way, "correction": one, "less": other, "seeds": len(seeds)} | about)
    # Without a second seed there is no interval; JSON has no NaN.
    return [{name: None if x != x else x for name, x in row.items()} for row in rows]


def summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and the comparisons."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(record["variant"] for record in records):
        mine = [record for record in records if record["variant"] == name]
        found[name] = {"seeds": [record["seed"] for record in mine]}
        for way in WAYS:
            means = t_interval([record[way]["mean"] for record in mine])
            half = None if math.isnan(means.half) else means.half
            found[name][way] = {"mean": means.value, "half_interval": half}
        rows = [record["held_out"] for record in mine]
        found[name]["held_out"] = {number: float(np.mean([row[number] for row in rows])) for number in rows[0]}
    return {"corrections": found, "comparisons": comparisons(records)}


def markdown(records: Sequence[Mapping[str, Any]], references: Mapping[str, Mapping[str, Any]], about: str) -> str:
    """The tables; `about` says how much there was of everything."""
    names, seeds = list(dict.fromkeys(record["variant"] for record in records)), {r["seed"] for r in records}
    lines = [
        f"Clicks in 100 turns, mean and 95 % t-interval over {len(seeds)} training seeds ({about}). All learn from one "
        "log and are judged on the same users: the intervals tell what another seed of learning would change, not "
        "another log. References: one mean and its standard error over users.",
        "",
        *_rows([("policy", *WAYS), *_played(records, references)]),
        "",
        "Differences paired by training seed. Intervals and p are of each comparison by itself, not corrected for how "
        "many there are.",
        "",
    ]
    table = [("returns", "correction", "less", "difference, 95 % interval", "p (paired t)")]
    for row in comparisons(records):
        gap = f"{row['difference']:.1f}" + ("" if row["low"] is None else f" ({row['low']:.1f} to {row['high']:.1f})")
        p = "" if row["p"] is None else format(row["p"], ".2g")
        table.append((row["returns"], row["correction"], row["less"], gap, p))
    lines += [*_rows(table), "", "Importance weights and estimated behaviour on held-out users, means over seeds.", ""]
    found = summary(records)["corrections"]
    numbers: list[tuple[str, ...]] = [("", *names)]
    for number in found[names[0]]["held_out"]:
        values = (f"{found[name]['held_out'][number]:.3g}" for name in names)
        numbers.append((number.replace("_", " "), *values))
    return "\n".join([*lines, *_rows(numbers)]) + "\n"


def _played(records: Sequence[Mapping[str, Any]], references: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, found in references.items():
        entry = methods.METHODS[name]
        title = entry.title + (" ‡" if entry.privileged else "")
        rows.append((title, f"{found['mean']:.1f} (± {found['standard_error']:.1f})", ""))
    means = {way: by_seed(records, way) for way in WAYS}
    for name in means["greedy"]:
        rows.append((name, *(_interval(list(means[way][name].values())) for way in WAYS)))
    return rows


def _interval(values: Sequence[float]) -> str:
    estimate = t_interval(values)
    return f"{estimate.value:.1f}" + ("" if math.isnan(estimate.half) else f" ± {estimate.half:.1f}")


def _rows(rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def pictures(drawn: Mapping[str, Drawn], set_size: int) -> dict[str, Any]:
    """Figures by the name of their file: weights of the corrections, and how good the estimated behaviour is."""
    figures: dict[str, Any] = {}
    corrected = {name: (found.ratio, found.top_k) for name, found in drawn.items() if not name.startswith("none")}
    if corrected:
        about = "held-out users, first seed"
        figures["weights.png"] = plots_offline.weight_histograms(corrected, TopKHypers().cap, set_size, about)
    if "top-K" in drawn:
        both = drawn["top-K"].estimated, drawn["top-K"].logged
        figures["calibration.png"] = plots_offline.calibration(*both, "behaviour head on held-out users, first seed")
    return figures
