"""The paper's Figure 2: scores of what is recommended, by how many topics the user is bored of.

    python -m experiments.figure2 --budget small

For the short-term oracle, SAC+GeMS with gamma 0.8 and with gamma 0: densities of the recommended items' scores, the
score at which an examined item is clicked with probability one half, and the mean. Expected: the oracle recommends high
scores and bores (most mass at several bored topics); a far-sighted agent recommends lower scores to users who are
hardly bored. Published returns at the full budget: 305.3 with gamma 0.8, 194.3 with gamma 0, 107.7 for the oracle.
Budgets: full 100,000 trajectories (not yet run), small 10,000, smoke for tests. Records,
histograms and picture are below `OUT/<budget>-<variant>`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import tyro

from experiments import _study
from experiments._cli import run_cli
from gemsjax import disk, methods, plots, prepare
from gemsjax.evaluate import recommended_scores
from gemsjax.settings import PUBLISHED_SEEDS

GAMMAS = (0.8, 0.0)


@dataclasses.dataclass(frozen=True)
class Arguments(_study.Arguments):
    """What to run and where to keep it."""

    seeds: tuple[int, ...] = PUBLISHED_SEEDS[:1]
    """Seeds of the agents; the picture shows the first."""
    methods: tuple[str, ...] = ("short-term-oracle", "sac-gems")
    """Methods; those that learn are shown with gamma 0.8 and 0."""
    out: Path = Path("results/figure2")
    """Root of records and pictures."""


def jobs(arguments: Arguments, env: str) -> list[_study.Job]:
    """References once, learners with both gammas and all seeds."""
    made = []
    for name in arguments.methods:
        title, learns = methods.method(name).title, methods.method(name).learns
        made += [
            arguments.job(name, env, seed, f"{title}, gamma {gamma}" if learns else title, hypers={"gamma": gamma})
            for gamma in (GAMMAS if learns else GAMMAS[:1])
            for seed in arguments.seeds_of(name)
        ]
    return made


def densities_of(job: _study.Job, places: _study.Places, directory: Path) -> plots.Densities:
    """The histogram of a job's recommendations, kept as JSON beside the records."""
    path = directory / "scores" / f"{_study.name_of(job)}.json"
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
    directory, places = arguments.directory, arguments.places
    for env in arguments.envs:
        wanted = jobs(arguments, env)
        records = _study.perform(wanted, places)
        panels: dict[str, plots.Scores | plots.Densities] = {}
        for one, record in zip(wanted, records, strict=True):
            found = densities_of(one, places, directory)
            label = methods.marked(record["method"], record["privileged"], one.label)
            print(f"{label}: return {record['test']['mean_return']:.1f}, mean score {found.mean:.3f}")
            panels.setdefault(label, found)
        offset = float(prepare.world_of(wanted[0].settings).params.relevance_offset)
        print(f"picture: {plots.save(plots.score_densities(panels, offset), directory / f'figure2_{env}.png')}")


if __name__ == "__main__":
    run_cli(lambda: main(tyro.cli(Arguments, prog="python -m experiments.figure2", description=__doc__)))
