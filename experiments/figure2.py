"""The paper's Figure 2: scores of what is recommended, by how many topics the user is bored of.

    python -m experiments.figure2 --budget full --catalogues DIR
    python -m experiments.figure2 --budget small

For the short-term oracle, SAC+GeMS with gamma 0.8 and with gamma 0: densities of the recommended items' scores, the
score at which an examined item is clicked with probability one half, and the mean. Expected: the oracle recommends high
scores and bores (most mass at several bored topics); a far-sighted agent recommends lower scores to users who are
hardly bored. Published returns at the full budget: 305.3 with gamma 0.8, 194.3 with gamma 0, 107.7 for the oracle. Ours
(`results/table2`): 321.7 and 135.3 with gamma 0.8 as published (two seeds), 107.1 for the oracle; gamma 0 has not been
run.

Budgets: full 100,000 trajectories, small 10,000, smoke for tests; one seed. By the speeds of the benchmark on two cores
(`results/benchmark_xeon.json`: SAC+GeMS 93 steps/s; pre-training 173 batches/s, 351,560 of them in full), not timed,
full takes about 70 minutes (one slate VAE 34, two agents 18 each) and small about 5, compiling not counted. Records,
histograms and pictures are below `OUT/<budget>-<variant>`; a picture shows all of its environment's histograms there.
Without `--catalogues` the items are the project's own.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments import _study, _tables
from experiments._cli import run_cli
from gemsjax import disk, methods, plots, prepare
from gemsjax.evaluate import recommended_scores
from gemsjax.settings import PUBLISHED_SEEDS

GAMMAS = (0.8, 0.0)


@dataclasses.dataclass(frozen=True)
class Arguments(_study.Arguments):
    """What to run and where to keep it."""

    variant: str = "published"
    """published, as the paper was made: with the published implementation's slips; or corrected."""
    seeds: tuple[int, ...] = PUBLISHED_SEEDS[:1]
    """Seeds of the agents; the picture shows the first."""
    methods: tuple[str, ...] = ("short-term-oracle", "sac-gems")
    """Methods; those that learn are shown with gamma 0.8 and 0."""
    out: Path = Path("results/figure2")
    """Root of records and pictures."""


def jobs(arguments: Arguments, env: str) -> list[_study.Job]:
    """References once, learners with both gammas and all seeds."""
    return [
        _job(arguments, name, env, seed, gamma)
        for name in arguments.methods
        for gamma in (GAMMAS if methods.method(name).learns else GAMMAS[:1])
        for seed in arguments.seeds_of(name)
    ]


def _job(arguments: Arguments, name: str, env: str, seed: int, gamma: float) -> _study.Job:
    entry = methods.method(name)
    label = f"{entry.title}, gamma {gamma}" if entry.learns else entry.title
    return arguments.job(name, env, seed, label, hypers={"gamma": gamma})


def _gamma(record: dict[str, Any]) -> float:
    return record["config"].get("hypers", {}).get("gamma", GAMMAS[0])


def _again(arguments: Arguments, env: str, record: dict[str, Any]) -> _study.Job | None:
    """The job of a record of this environment."""
    if record["env"] != env:
        return None
    return _job(arguments, record["method"], env, record["seed"] or 0, _gamma(record))


def _histogram(job: _study.Job, directory: Path) -> Path:
    return directory / "scores" / f"{_study.name_of(job)}.json"


def densities_of(job: _study.Job, places: _study.Places, directory: Path) -> plots.Densities:
    """The histogram of a job's recommendations, kept as JSON beside the records."""
    path = _histogram(job, directory)
    if not path.exists():
        settings = job.settings
        if job.learns:
            found = _study.trained(job, places)
            policy, world, acting = found.agent.greedy, found.world, found.acting
        else:
            world, acting = prepare.world_of(settings), None
            make_policy = methods.method(settings.method).policy
            assert make_policy is not None
            policy = make_policy(world.dims)
        scores = recommended_scores(world.env, policy, world.params, acting, settings.test_users, settings.test_stream)
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write_json(path, plots.densities(scores)._asdict())
    held = json.loads(path.read_text(encoding="utf-8"))
    return plots.Densities(np.array(held["edges"]), np.array(held["density"]), held["mean"])


def main(arguments: Arguments) -> None:
    directory, places, place = arguments.directory, arguments.places, _tables.place_of(arguments)
    for env in arguments.envs:
        asked = jobs(arguments, env)
        there = _tables.together(asked, arguments, functools.partial(_again, arguments, env))[len(asked) :]
        wanted = asked + [one for one in there if _histogram(one, directory).exists()]
        pairs = list(zip(wanted, _study.perform(wanted, places), strict=True))
        # The picture shows the first of each label: of those that are asked for.
        pairs.sort(key=lambda pair: (place(pair[1])[1], -_gamma(pair[1]), pair[0] not in asked, place(pair[1])))
        panels: dict[str, plots.Scores | plots.Densities] = {}
        for one, record in pairs:
            found = densities_of(one, places, directory)
            label = methods.marked(record["method"], record["privileged"], one.label)
            print(f"{label}: return {record['test']['mean_return']:.1f}, mean score {found.mean:.3f}")
            panels.setdefault(label, found)
        offset = float(prepare.world_of(wanted[0].settings).params.relevance_offset)
        print(f"picture: {plots.save(plots.score_densities(panels, offset), directory / f'figure2_{env}.png')}")


if __name__ == "__main__":
    run_cli(lambda: main(tyro.cli(Arguments, prog="python -m experiments.figure2", description=__doc__)))
