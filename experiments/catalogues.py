"""Is the published 'focused' catalogue peaked? Topic shares, returns and a test of which recipe it was drawn by.

    python -m experiments.catalogues --budget small --published DIR --json results/catalogues.json --markdown table.md

The paper says that its 'focused' items are squared and renormalised; its code raises them to the power 1.5. The more
peaked the items, the less the short-term oracle can earn: its slates hold fewer second topics and bore sooner. Expected
(TopDown, 100 turns): a largest topic share of 0.634, 0.721 and 0.778 for the powers 1, 1.5 and 2, and oracle returns of
about 102, 70 and 68, random ones of about 34, 33 and 36. The published files have shares of 0.633 (focused) and 0.636
(diffuse) and oracle returns of 103 to 107 and 97: two draws of the same process, with power 1. Kolmogorov-Smirnov tests
find no difference from power 1 and exclude 1.5 (p < 1e-60). The paper's oracle returns 107.7. DIR is a directory with
`item_embeddings_focused.npy` and `item_embeddings_diffuse.npy` (or `.pt`); without it the table has our own catalogues.

A recipe's row is the mean over independent draws of the catalogue, the same draws for every power, and its standard
error is that over draws; a single catalogue's is that over users. All rows meet the same users. Components of one item
depend on each other a little (they share a norm), so p-values of components are approximate. Budgets: smoke for tests,
small 4 draws and 500 users, full 10 draws and 2,000 users; not timed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from scipy import stats

from experiments._cli import run_cli
from gemsjax import disk
from gemsjax.agents import references
from gemsjax.agents.base import Policy
from gemsjax.envs.catalogue import RECIPES, draw_catalogue, load_catalogue, named_catalogue
from gemsjax.envs.registry import make
from gemsjax.errors import DataError, require_choice, require_count
from gemsjax.evaluate import evaluate
from gemsjax.types import Dims

POWERS = (1.0, 1.5, 2.0)
TOPICS = 10
ENV = "focused_topdown"
PUBLISHED = ("focused", "diffuse")


@dataclasses.dataclass(frozen=True)
class Budget:
    """How many draws of each recipe, and how many test users each catalogue meets."""

    draws: int
    users: int


BUDGETS = {"smoke": Budget(2, 16), "small": Budget(4, 500), "full": Budget(10, 2000)}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure and where to write it."""

    published: Path | None = None
    """Directory with the published item embeddings."""
    budget: str = "small"
    """smoke, small or full."""
    users: int | None = None
    """Test users of every catalogue instead of the budget's."""
    json: Path | None = None
    """Write rows and tests to this file."""
    markdown: Path | None = None
    """Write the tables to this file too."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A catalogue, or the mean over draws of one recipe.

    Attributes:
      name: of the recipe, of our own catalogue or of the published file.
      power: that its components are raised to; None if unknown.
      draws: catalogues behind the row.
      users: that each of them met.
      share, random, oracle: mean largest topic norm of an item; mean returns of the two references.
      *_error: standard errors of these.
    """

    name: str
    power: float | None
    draws: int
    users: int
    share: float
    share_error: float
    random: float
    random_error: float
    oracle: float
    oracle_error: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Kolmogorov-Smirnov test of a published file against a recipe.

    Attributes:
      name: of the file.
      power: of the recipe.
      share_p, component_p: p-values for the items' largest topic norms and for all components.
    """

    name: str
    power: float
    share_p: float
    component_p: float


def topic_shares(items: np.ndarray) -> np.ndarray:
    """Largest topic norm of each item: [I, D] -> [I]. Rows have unit norm, so 1 means one topic only."""
    return np.linalg.norm(np.asarray(items, np.float64).reshape(len(items), TOPICS, -1), axis=2).max(axis=1)


def find_published(directory: Path) -> dict[str, np.ndarray]:
    """The published catalogues by name.

    Raises:
      DataError: a file is missing or does not hold numbers.
    """
    found = {}
    for name in PUBLISHED:
        paths = [directory / f"item_embeddings_{name}{ending}" for ending in (".npy", ".npz", ".pt")]
        there = [path for path in paths if path.is_file()]
        if not there:
            raise DataError(f"{directory}: there is no {' or '.join(path.name for path in paths)}")
        found[name] = load_catalogue(there[0])
    return found


def measure(name: str, power: float | None, catalogues: list[np.ndarray], users: int) -> Row:
    """Topic share and returns of one catalogue, or their means over several draws."""
    shares = [topic_shares(items) for items in catalogues]
    figures = {"share": [(float(share.mean()), float(stats.sem(share))) for share in shares]}
    for label, make_policy in (("random", references.make_random), ("oracle", references.make_short_term_oracle)):
        figures[label] = [_return(make_policy(Dims(len(items), 10, 100)), items, users) for items in catalogues]
    columns: dict[str, float] = {}
    for label, pairs in figures.items():
        means = [mean for mean, _ in pairs]
        columns[label] = float(np.mean(means))
        columns[f"{label}_error"] = float(stats.sem(means)) if len(means) > 1 else pairs[0][1]
    return Row(name, power, len(catalogues), users, **columns)


def _return(policy: Policy, items: np.ndarray, users: int) -> tuple[float, float]:
    env, params = make(ENV, catalogue=items)
    tested = evaluate(env, policy, params, users=users)
    return tested.mean, tested.standard_error


def compare(name: str, items: np.ndarray, power: float, draws: list[np.ndarray]) -> Comparison:
    """Test a file's items against those of all draws of a recipe."""
    recipe = np.concatenate(draws)
    share = stats.ks_2samp(topic_shares(items), topic_shares(recipe))
    component = stats.ks_2samp(items.ravel(), recipe.ravel())
    return Comparison(name, power, float(share.pvalue), float(component.pvalue))


def study(budget: Budget, published: dict[str, np.ndarray]) -> tuple[list[Row], list[Comparison]]:
    """All rows and tests: recipes, our own catalogues, published files."""
    drawn = {power: [draw_catalogue(seed, power=power) for seed in range(budget.draws)] for power in POWERS}
    rows = [measure(f"drawn, power {power:g}", power, draws, budget.users) for power, draws in drawn.items()]
    rows += [measure(f"ours: {name}", RECIPES[name].power, [named_catalogue(name)], budget.users) for name in RECIPES]
    rows += [measure(f"published: {name}", None, [items], budget.users) for name, items in published.items()]
    tests = [compare(name, items, power, drawn[power]) for name, items in published.items() for power in POWERS]
    return rows, tests


def tables(rows: list[Row], tests: list[Comparison]) -> str:
    """Markdown of both tables."""
    lines = [
        f"Catalogues on {ENV}: means ± standard errors (over draws where there are several, else over users or items).",
        "",
        "| catalogue | power | draws | largest topic share | random | short-term oracle ‡ |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        power = "?" if row.power is None else f"{row.power:g}"
        cells = (
            f"{row.share:.3f} ± {row.share_error:.3f}",
            f"{row.random:.1f} ± {row.random_error:.1f}",
            f"{row.oracle:.1f} ± {row.oracle_error:.1f}",
        )
        lines.append(f"| {row.name} | {power} | {row.draws} | {' | '.join(cells)} |")
    lines += ["", f"‡: sees privileged information. {rows[0].users} test users, the same for every catalogue.", ""]
    if tests:
        lines += [
            "Kolmogorov-Smirnov tests of the published files against the recipes (p-values):",
            "",
            "| file | power of the recipe | largest topic share | components |",
            "|---|---|---|---|",
        ]
        for test in tests:
            p_values = f"{_p_value(test.share_p)} | {_p_value(test.component_p)}"
            lines.append(f"| {test.name} | {test.power:g} | {p_values} |")
        lines.append("")
    return "\n".join(lines)


def _p_value(p: float) -> str:
    return f"{p:.2g}" if p > 1e-300 else "< 1e-300"


def main(arguments: Arguments) -> dict[str, Any]:
    """Measure, print and write; returns what the JSON file holds."""
    require_choice("--budget", arguments.budget, BUDGETS)
    budget = BUDGETS[arguments.budget]
    if arguments.users is not None:
        require_count("--users", arguments.users, 2)
        budget = dataclasses.replace(budget, users=arguments.users)
    published = {} if arguments.published is None else find_published(arguments.published)
    for path in (arguments.json, arguments.markdown):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    rows, tests = study(budget, published)
    text = tables(rows, tests)
    print(text)
    if arguments.markdown is not None:
        disk.write(arguments.markdown, text.encode())
    record = {
        "budget": dataclasses.asdict(budget),
        "env": ENV,
        "catalogues": [dataclasses.asdict(row) for row in rows],
        "tests": [dataclasses.asdict(test) for test in tests],
    }
    if arguments.json is not None:
        disk.write_json(arguments.json, record)
    return record


if __name__ == "__main__":
    run_cli(lambda: main(tyro.cli(Arguments, prog="python -m experiments.catalogues", description=__doc__)))
