"""The part of `experiments.ranking` in the slate simulator: SAC through the Plackett-Luce ranker, by penalty."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from gemsjax import devices, disk, methods, prepare, runs
from gemsjax.agents.sac import SACHypers
from gemsjax.evaluate import evaluate, summarise, user_keys
from gemsjax.maths.plackett_luce import mean_pairwise_cosine
from gemsjax.maths.statistics import Estimate, t_interval
from gemsjax.rollout import Turn, rollout
from gemsjax.settings import PLSettings, TrainSettings
from gemsjax.train import Plan
from gemsjax.types import Array, Dims

ENV, METHOD = "focused_divpen", "sac-pl"
REFERENCES = ("random", "short-term-oracle")


@dataclasses.dataclass(frozen=True)
class Simulated:
    """Sizes: items, turns, training steps, random episodes at first, validation and test users; penalties; seeds."""

    items: int
    horizon: int
    steps: int
    warm_up: int
    validation_users: int
    test_users: int
    penalties: tuple[float, ...]
    seeds: int


SIMULATOR = {
    "smoke": Simulated(40, 5, 4, 2, 4, 4, (0.0, 3.0), 1),
    "small": Simulated(200, 100, 600, 50, 40, 100, (0.0, 3.0, 10.0), 3),
    "full": Simulated(1_000, 100, 20_000, 500, 200, 500, (0.0, 0.3, 1.0, 3.0, 10.0), 5),
}


def settings_of(sizes: Simulated, penalty: float, seed: int) -> TrainSettings:
    """One run; everything but penalty and seed is the same for all."""
    return TrainSettings(
        method=METHOD,
        embeddings="ideal",
        env=ENV,
        seed=seed,
        steps=sizes.steps,
        epoch_steps=max(1, sizes.steps // 4),
        test_users=sizes.test_users,
        env_settings={"num_items": sizes.items, "horizon": sizes.horizon},
        plan=Plan(warm_up=sizes.warm_up, validation_users=sizes.validation_users, batch_size=min(20, sizes.warm_up)),
        hypers=SACHypers(initial_alpha=0.01),
        pl=PLSettings(penalty=penalty),
    ).resolved()


def play_simulator(sizes: Simulated, seed: int, out: Path, console: Console) -> list[dict[str, Any]]:
    """Train a run for every penalty and seed (or continue it) and look at what it shows to the test users.

    Returns:
      A row a penalty, whose `runs` have one record a seed, and a row a reference.
    """
    rows: list[dict[str, Any]] = []
    for penalty in sizes.penalties:
        trained = [_trained(sizes, penalty, number, out) for number in range(seed, seed + sizes.seeds)]
        rows.append({"penalty": penalty, "runs": trained})
        console.print(f"penalty {penalty:g}: {np.mean([run['clicks'] for run in trained]):.1f} clicks")
    world = prepare.world_of(settings_of(sizes, sizes.penalties[0], seed))
    dims = Dims(world.env.num_items, world.env.slate_size, world.env.horizon)
    for name in REFERENCES:
        make = methods.method(name).policy
        assert make is not None
        found = evaluate(world.env, make(dims), world.params, users=sizes.test_users)
        rows.append({"reference": name, "clicks": found.mean, "standard_error": found.standard_error})
    return rows


def _trained(sizes: Simulated, penalty: float, seed: int, out: Path) -> dict[str, float]:
    """What one run found; its record, with settings, versions and device, is left in `out`."""
    settings, root = settings_of(sizes, penalty, seed), out / f"penalty_{penalty:g}-{sizes.steps}"
    world = prepare.world_of(settings)
    weights = prepare.frozen_weights(settings, world, root, root)
    outcome = runs.train(settings, world, weights, root, resume=True)
    if outcome.test is None:
        raise KeyboardInterrupt("the same command continues")
    run, test = runs.load(outcome.directory), outcome.test
    seen = _shown(world, run.agent.greedy, run.acting, sizes.test_users)
    found = {"seed": seed, "clicks": test.mean, "standard_error": test.standard_error, **seen}
    record = {"settings": disk.plain(dataclasses.asdict(settings)), "metrics": found, **devices.surroundings()}
    path = out / "records" / f"simulator_penalty_{penalty:g}_seed_{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.write_json(path, record)
    return found


def _shown(world: prepare.World, policy: Any, acting: Any, users: int) -> dict[str, float]:
    """How alike the items of a slate are, how many topics it has, and how many topics bore the user, on average."""
    embeddings, topics = world.params.item_embeddings, world.params.item_topics

    def record(turn: Turn) -> tuple[Array, Array, Array]:
        slates = turn.shown.slate
        alike = jax.vmap(lambda slate: mean_pairwise_cosine(embeddings[slate]))(slates)
        shown = jax.nn.one_hot(topics[slates], world.env.num_topics).max(axis=1).sum(axis=-1)
        return alike, shown, turn.info["bored"].sum(axis=-1).astype(jnp.float32)

    play = jax.jit(lambda acting: rollout(world.env, policy, user_keys("test", users), world.params, acting, record)[0])
    names = ("similarity", "topics", "bored_topics")
    # The mean of each user is one observation.
    means = {name: summarise(np.asarray(x).mean(axis=0)) for name, x in zip(names, play(acting), strict=True)}
    return {name: one.mean for name, one in means.items()}


def simulator_table(rows: list[dict[str, Any]], sizes: Simulated) -> str:
    """One row a penalty, then the references. The number of seeds is that of the rows."""
    seeds = len(rows[0]["runs"])
    spread = f"{seeds} seeds with 95 % intervals" if seeds > 1 else "in one run each (± standard errors over users)"
    lines = [
        f"SAC+PL ‡ in `{ENV}` with {sizes.items} items, {sizes.steps} trajectories, {spread}, {sizes.test_users} test "
        "users; references ± standard errors over these; ‡: items and oracle are privileged.",
        "",
        f"| penalty | clicks in {sizes.horizon} turns | mean cosine of pairs | topics of a slate | bored topics |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if "reference" in row:
            entry = methods.method(row["reference"])
            clicks = f"{row['clicks']:.1f} ± {row['standard_error']:.1f}"
            lines.append(f"| {entry.title}{' ‡' if entry.privileged else ''} | {clicks} | | | |")
            continue
        columns = (("clicks", 1), ("similarity", 3), ("topics", 2), ("bored_topics", 2))
        told = [_told(t_interval([run[name] for run in row["runs"]]), digits) for name, digits in columns]
        if seeds == 1:
            told[0] += f" ± {row['runs'][0]['standard_error']:.1f}"
        lines.append(f"| {row['penalty']:g} | {' | '.join(told)} |")
    return "\n".join(lines) + "\n"


def _told(estimate: Estimate, digits: int) -> str:
    interval = "" if math.isnan(estimate.half) else f" ± {estimate.half:.{digits}f}"
    return f"{estimate.value:.{digits}f}{interval}"
