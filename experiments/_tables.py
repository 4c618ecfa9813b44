"""What tables and pictures of a study are made from: all records that lie there, in one order, and how they are told.

Called by experiments whose runs are those of `_study`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments._study import Arguments, Job, asked_of, find, name_of, read
from gemsjax import methods
from gemsjax.envs.registry import environments
from gemsjax.errors import DataError, SettingError, require
from gemsjax.settings import PUBLISHED_SEEDS

Again = Callable[[dict[str, Any]], Job | None]
"""The job that a study makes of a record today; None if the record is of another table."""


def together(wanted: Sequence[Job], arguments: Arguments, again: Again) -> list[Job]:
    """What is asked for and, behind it, what was run before: so asking for less does not make a table smaller.

    A record that was made with other settings than today's study would use (older defaults, say) is left out; so is one
    of what there is no more (a method's old name), which is said.

    Raises:
      SettingError: records of another catalogue are there.
      DataError: a file there is not a record.
    """
    jobs, items = list(wanted), dict[str, str]()
    names = {name_of(job) for job in wanted}
    for path in sorted(arguments.places.records.glob("*.json")) if wanted else ():
        record = read(path)
        try:
            job = again(record)
        except (SettingError, DataError) as error:
            print(f"left out: {path}: {error}")
            continue
        if job is None:
            continue
        if job.settings.env not in items:
            items[job.settings.env] = asked_of(job)["items"]
        says = f"the catalogue of {path}; records of two are kept apart, name another --out"
        same = record["config"].get("items") == items[job.settings.env]
        require(same, "--catalogues", None if arguments.catalogues is None else str(arguments.catalogues), says)
        if name_of(job) not in names and find(job, arguments.places) is not None:
            names.add(name_of(job))
            jobs.append(job)
    return jobs


def place_of(arguments: Arguments) -> Callable[[Mapping[str, Any]], tuple[int, int, int, int]]:
    """The key that sorts records by environment, method and seed.

    Methods and environments stand as in the study's own table, then as in the registry. Those that are asked for in
    another order come first, as they are asked for.
    """
    kind = type(arguments)
    envs = _order(arguments.envs, (*kind.envs, *environments()))
    names = _order(arguments.methods, (*kind.methods, *methods.METHODS))
    seeds = {seed: number for number, seed in enumerate(PUBLISHED_SEEDS)}

    def key(record: Mapping[str, Any]) -> tuple[int, int, int, int]:
        seed = record["seed"] or 0
        return envs.index(record["env"]), names.index(record["method"]), seeds.get(seed, len(seeds)), seed

    return key


def _order(given: Sequence[str], usual: Sequence[str]) -> list[str]:
    usual = list(dict.fromkeys((*usual, *given)))
    kept = [one for one in usual if one in given]
    return usual if kept == list(given) else list(dict.fromkeys((*given, *usual)))


def budget_of(records: Sequence[Mapping[str, Any]], arguments: Arguments) -> str:
    """The sentence that states what a table was made of."""
    spent = sorted({record["trajectories"] for record in records if record["trajectories"]})
    each = " to ".join(f"{count:,}" for count in sorted({spent[0], spent[-1]})) if spent else "no"
    catalogues = ", ".join(sorted({record["catalogue"] for record in records}))
    seeds = len({record["seed"] for record in records if record["seed"] is not None})
    return (
        f"Budget `{arguments.budget}`, variant `{arguments.variant}`: {each} trajectories a run, "
        f"{seeds} seed{'s' if seeds != 1 else ''}, {records[0]['test']['users']} test users; catalogue: {catalogues}."
    )
