"""The part of `experiments.ranking` in the slate simulator: SAC through the Plackett-Luce ranker, by penalty."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from gemsjax import methods, prepare, runs
from gemsjax.agents.sac import SACHypers
from gemsjax.evaluate import evaluate, summarise, user_keys
from gemsjax.maths.plackett_luce import mean_pairwise_cosine
from gemsjax.rollout import Turn, rollout
from gemsjax.settings import PLSettings, TrainSettings
from gemsjax.train import Plan
from gemsjax.types import Array, Dims

ENV, METHOD = "focused_divpen", "sac-pl"
REFERENCES = ("random", "short-term-oracle")


@dataclasses.dataclass(frozen=True)
class Simulated:
    """Sizes: items, turns, training steps, random episodes at first, validation and test users; the penalties."""

    items: int
    horizon: int
    steps: int
    warm_up: int
    validation_users: int
    test_users: int
    penalties: tuple[float, ...]


SIMULATOR = {
    "smoke": Simulated(40, 5, 4, 2, 4, 4, (0.0, 3.0)),
    "small": Simulated(200, 100, 600, 50, 40, 100, (0.0, 3.0, 10.0)),
    "full": Simulated(1_000, 100, 20_000, 500, 200, 500, (0.0, 0.3, 1.0, 3.0, 10.0)),
}


def settings_of(sizes: Simulated, penalty: float, seed: int) -> TrainSettings:
    """One run; everything but the penalty is the same for all."""
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
    """Train a run for every penalty (or continue it) and look at what it shows to the test users."""
    rows: list[dict[str, Any]] = []
    for penalty in sizes.penalties:
        settings, root = settings_of(sizes, penalty, seed), out / f"penalty_{penalty:g}-{sizes.steps}"
        world = prepare.world_of(settings)
        weights = prepare.frozen_weights(settings, world, root, root)
        outcome = runs.train(settings, world, weights, root, resume=True)
        if outcome.test is None:
            raise KeyboardInterrupt("the same command continues")
        trained = runs.load(outcome.directory)
        seen = _shown(world, trained.agent.greedy, trained.acting, sizes.test_users)
        test = outcome.test
        rows.append({"penalty": penalty, "clicks": test.mean, "standard_error": test.standard_error, **seen})
        console.print(f"penalty {penalty:g}: {test.mean:.1f} clicks")
    dims = Dims(world.env.num_items, world.env.slate_size, world.env.horizon)
    for name in REFERENCES:
        make = methods.method(name).policy
        assert make is not None
        found = evaluate(world.env, make(dims), world.params, users=sizes.test_users)
        rows.append({"reference": name, "clicks": found.mean, "standard_error": found.standard_error})
    return rows


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
    """One row a penalty, then the references."""
    lines = [
        f"SAC+PL ‡ in `{ENV}` with {sizes.items} items, {sizes.steps} trajectories, one seed, {sizes.test_users} test "
        "users (standard errors are over these); ‡: items and oracle are privileged.",
        "",
        f"| penalty | clicks in {sizes.horizon} turns | mean cosine of pairs | topics of a slate | bored topics |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        clicks = f"{row['clicks']:.1f} ± {row['standard_error']:.1f}"
        if "reference" in row:
            entry = methods.method(row["reference"])
            lines.append(f"| {entry.title}{' ‡' if entry.privileged else ''} | {clicks} | | | |")
        else:
            seen = f"{row['similarity']:.3f} | {row['topics']:.2f} | {row['bored_topics']:.2f}"
            lines.append(f"| {row['penalty']:g} | {clicks} | {seen} |")
    return "\n".join(lines) + "\n"
