"""Is the published 'focused' catalogue peaked? Topic shares, returns and a test of which recipe it was drawn by.

    python -m experiments.catalogues --budget small --published DIR

The paper says that its 'focused' items are squared and renormalised; its code raises them to the power 1.5. The more
peaked the items, the less the short-term oracle can earn: its slates hold fewer second topics and bore sooner. Expected
(TopDown, 100 turns): a largest topic share of 0.634, 0.721 and 0.778 for the powers 1, 1.5 and 2, and oracle returns of
about 102, 70 and 68, random ones of about 34, 33 and 36. The published files have shares of 0.633 (focused) and 0.636
(diffuse) and oracle returns of 103 to 107 and 97: two draws of the same process, with power 1. Kolmogorov-Smirnov tests
find no difference from power 1 and exclude 1.5 (p < 1e-60). The paper's oracle returns 107.7. DIR is a directory with
`item_embeddings_focused.npy` and `item_embeddings_diffuse.npy` (or `.pt`); without it the table has our own catalogues.

A recipe's row is the mean over independent draws of the catalogue, the same draws for every power, and its standard
error is that over draws; a single catalogue's is that over users. All rows meet the same users. Components of one item
depend on each other a little (they share a norm), so p-values of components are approximate.

Written are `OUT/<budget>.json` and `<budget>.md` (of environments other than focused TopDown, `<budget>_<env>`), and
one record a catalogue below `OUT/records`, so that a study that was stopped continues; tables of other rows, draws or
users are not written over. Both policies are references without training: there are no methods or variants to ask for.
Budgets: smoke for tests, small 4 draws and 500 users (3 minutes beside other work, 28 s of
processor time), full 10 draws and 2,000 users (not timed).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from scipy import stats

from experiments._cli import run_cli
from gemsjax import disk
from gemsjax.agents import references
from gemsjax.agents.base import Policy
from gemsjax.devices import surroundings
from gemsjax.envs.catalogue import RECIPES, draw_catalogue, load_catalogue, named_catalogue
from gemsjax.envs.registry import environments, make
from gemsjax.errors import DataError, require, require_choice, require_count
from gemsjax.evaluate import evaluate
from gemsjax.types import Dims

POWERS = (1.0, 1.5, 2.0)
TOPICS = 10
ENV = "focused_topdown"
PUBLISHED = ("focused", "diffuse")
CLICK_MODELS = ("_topdown", "_mix", "_divpen")


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
    seeds: tuple[int, ...] = ()
    """Seeds of the draws of each recipe; by default 0, 1, ..., as many as the budget has."""
    envs: tuple[str, ...] = (ENV,)
    """Environments whose users meet the catalogues; each has a table of its own."""
    users: int | None = None
    """Test users of every catalogue instead of the budget's."""
    out: Path = Path("results/catalogues")
    """Directory of records and tables."""


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


@dataclasses.dataclass(frozen=True)
class Place:
    """Where catalogues are measured, and where that is kept.

    Attributes:
      env: whose users meet them.
      users: how many.
      records: directory of one JSON a catalogue; None keeps nothing.
    """

    env: str
    users: int
    records: Path | None = None


def measure(name: str, power: float | None, catalogues: list[np.ndarray], place: Place) -> Row:
    """Topic share and returns of one catalogue, or their means over several draws."""
    found = [figures(items, place) for items in catalogues]
    columns: dict[str, float] = {}
    for label in ("share", "random", "oracle"):
        means = [one[label][0] for one in found]
        columns[label] = float(np.mean(means))
        columns[f"{label}_error"] = float(stats.sem(means)) if len(means) > 1 else found[0][label][1]
    return Row(name, power, len(catalogues), place.users, **columns)


def figures(items: np.ndarray, place: Place) -> dict[str, list[float]]:
    """Mean and standard error of a catalogue's topic share and returns, from its record if there is one."""
    asked = {"env": place.env, "users": place.users, "items": disk.digest(np.asarray(items).tolist())[:12]}
    path = None
    if place.records is not None:
        path = place.records / f"{place.env}_{place.users}_users_{asked['items']}.json"
        if path.exists():
            return _read(path)["figures"]
    share, dims = topic_shares(items), Dims(len(items), 10, 100)
    found = {
        "share": [float(share.mean()), float(stats.sem(share))],
        "random": _return(references.make_random(dims), items, place),
        "oracle": _return(references.make_short_term_oracle(dims), items, place),
    }
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write_json(path, asked | {"figures": found, **surroundings()})
    return found


def _read(path: Path) -> dict[str, Any]:
    """What a file of this study holds.

    Raises:
      DataError: it is not one.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: is not a JSON file ({error})") from error
    if not isinstance(held, dict) or not held.keys() & {"figures", "catalogues"}:
        raise DataError(f"{path}: was not written by this study")
    return held


def _return(policy: Policy, items: np.ndarray, place: Place) -> list[float]:
    env, params = make(place.env, catalogue=items)
    tested = evaluate(env, policy, params, users=place.users)
    return [tested.mean, tested.standard_error]


def compare(name: str, items: np.ndarray, power: float, draws: list[np.ndarray]) -> Comparison:
    """Test a file's items against those of all draws of a recipe."""
    recipe = np.concatenate(draws)
    share = stats.ks_2samp(topic_shares(items), topic_shares(recipe))
    component = stats.ks_2samp(items.ravel(), recipe.ravel())
    return Comparison(name, power, float(share.pvalue), float(component.pvalue))


def study(seeds: Sequence[int], published: dict[str, np.ndarray], place: Place) -> tuple[list[Row], list[Comparison]]:
    """All rows and tests: recipes drawn with each of the seeds, our own catalogues, published files."""
    drawn = {power: [draw_catalogue(seed, power=power) for seed in seeds] for power in POWERS}
    rows = [measure(f"drawn, power {power:g}", power, draws, place) for power, draws in drawn.items()]
    rows += [measure(f"ours: {name}", RECIPES[name].power, [named_catalogue(name)], place) for name in RECIPES]
    rows += [measure(f"published: {name}", None, [items], place) for name, items in published.items()]
    tests = [compare(name, items, power, drawn[power]) for name, items in published.items() for power in POWERS]
    return rows, tests


def tables(rows: list[Row], tests: list[Comparison], env: str = ENV) -> str:
    """Markdown of both tables."""
    lines = [
        f"Catalogues on {env}: means ± standard errors (over draws where there are several, else over users or items).",
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


def main(arguments: Arguments) -> list[dict[str, Any]]:
    """Measure, print and write; returns what the JSON files hold, one an environment.

    Raises:
      SettingError: an unknown budget or environment, no draws, or a table of something else is there.
      DataError: a published file is missing, or a file below `--out` is not of this study.
    """
    require_choice("--budget", arguments.budget, BUDGETS)
    seeds = arguments.seeds or tuple(range(BUDGETS[arguments.budget].draws))
    require(len(set(seeds)) == len(seeds), "--seeds", seeds, "each once")
    users = BUDGETS[arguments.budget].users if arguments.users is None else arguments.users
    require_count("--users", users, 2)
    published = {} if arguments.published is None else find_published(arguments.published)
    for env in arguments.envs:
        require_choice("--envs", env, [name for name in environments() if name.endswith(CLICK_MODELS)])
        _keep(_stem(arguments, env), seeds, users, published)
    return [_measured(arguments, env, seeds, users, published) for env in arguments.envs]


def _measured(
    arguments: Arguments, env: str, seeds: tuple[int, ...], users: int, published: dict[str, np.ndarray]
) -> dict[str, Any]:
    """One environment: what its JSON file holds."""
    rows, tests = study(seeds, published, Place(env, users, arguments.out / "records"))
    text, stem = tables(rows, tests, env), _stem(arguments, env)
    print(text)
    record = {
        "budget": dataclasses.asdict(Budget(len(seeds), users)),
        "env": env,
        "seeds": list(seeds),
        "catalogues": [dataclasses.asdict(row) for row in rows],
        "tests": [dataclasses.asdict(test) for test in tests],
        **surroundings(),
    }
    disk.write(Path(f"{stem}.md"), text.encode())
    disk.write_json(f"{stem}.json", record)
    print(f"written: {stem}.md, {stem}.json")
    return record


def _stem(arguments: Arguments, env: str) -> Path:
    return arguments.out / (arguments.budget if env == ENV else f"{arguments.budget}_{env}")


def _keep(stem: Path, seeds: tuple[int, ...], users: int, published: dict[str, np.ndarray]) -> None:
    """Refuse to write over a table that has other draws or users, or rows of files that are not given now."""
    path = Path(f"{stem}.json")
    if not path.exists():
        return
    there = _read(path)
    draws, met = (there["budget"][name] for name in ("draws", "users"))
    same = (there.get("seeds", list(range(draws))), met) == (list(seeds), users)
    accepted = f"name another, since the table in {path} has"
    require(same, "--out", str(stem.parent), f"{accepted} other draws or users")
    files = {row["name"] for row in there["catalogues"] if row["power"] is None}
    missing = files - {f"published: {name}" for name in published}
    require(not missing, "--out", str(stem.parent), f"{accepted} published files (or name them by --published)")


if __name__ == "__main__":
    run_cli(lambda: main(tyro.cli(Arguments, prog="python -m experiments.catalogues", description=__doc__)))
