"""Evaluate a reference or a trained policy on the fixed test users.

    python -m experiments.evaluate --method short-term-oracle --env focused_topdown --users 1000
    python -m experiments.evaluate --run runs/SAC_GeMS/focused_topdown_KL1.0_click0.5_seed58407201 --json result.json

Takes seconds. A run is tested on the stream of users that its settings name (published variant: users that training
met too), a reference on that of `--test-stream`. With the built-in catalogue of focused_topdown: random about 34 clicks
in 100 turns, the short-term oracle about 104, the epsilon-greedy oracle (0.5) about 96. Every method meets the same
users and the same luck.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import tyro

from experiments._cli import run_cli
from gemsjax import disk, methods, prepare, runs
from gemsjax.devices import surroundings
from gemsjax.envs.registry import make, require_catalogue
from gemsjax.errors import SettingError, require, require_choice, require_count
from gemsjax.evaluate import Evaluation, evaluate
from gemsjax.types import Dims

STREAMS = ("test", "training")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Evaluate a reference (--method, --env) or a trained run (--run)."""

    method: str | None = None
    """A method that needs no training: random, best-item-per-topic, short-term-oracle, epsilon-greedy-oracle."""
    env: str | None = None
    """Name of an environment; of a run, another one than it was trained in (of the same sizes)."""
    run: Path | None = None
    """Directory of a trained run."""
    users: int = 500
    """Test users, one episode each."""
    test_stream: str | None = None
    """Population of a reference's test users: test (the default), or training as the published variant has it."""
    catalogue: str | None = None
    """File or name of item embeddings instead of the environment's own."""
    json: Path | None = None
    """Write the result to this file."""


def evaluate_reference(
    name: str, env_name: str, users: int, catalogue: str | None = None, stream: str = "test"
) -> Evaluation:
    """Returns of a method that needs no training, on the first users of a stream.

    Raises:
      SettingError: an unknown method, environment or stream, or a method that must be trained first.
    """
    require_choice("test_stream", stream, STREAMS)
    entry = methods.method(name)
    if entry.policy is None:
        raise SettingError("method", name, "it has to be trained first: python -m experiments.train, then --run DIR")
    env, params = make(env_name, catalogue=catalogue)
    require_catalogue(env)
    policy = entry.policy(Dims(env.num_items, env.slate_size, env.horizon))
    return evaluate(env, policy, params, users=users, stream=stream)


def evaluate_run(directory: Path, users: int, env_name: str | None, catalogue: str | None) -> dict[str, Any]:
    """Row of the best validated policy of a run, in its own environment or in another of the same sizes."""
    trained = runs.load(directory)
    env, params = trained.world.env, trained.world.params
    name = trained.settings.env
    if env_name is not None or catalogue is not None:
        name = env_name or name
        items = catalogue or trained.settings.catalogue
        env, params = make(name, catalogue=items, **trained.settings.env_settings)
        require_catalogue(env)
        sizes, expected = (Dims(e.num_items, e.slate_size, e.horizon) for e in (env, trained.world.env))
        require(sizes == expected, "env", name, f"an environment of the run's sizes, {expected}")
    tested = evaluate(env, trained.agent.greedy, params, trained.acting, users, trained.settings.test_stream)
    facts = runs.facts_of(trained.settings, prepare.identity_of(trained.settings, trained.world))
    row = runs.table_row(name, trained.settings.method, tested) | facts
    return row | {"interval": tested.interval, "step": trained.step}


def main(arguments: Arguments) -> None:
    require_count("users", arguments.users)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    if arguments.run is not None:
        require(arguments.method is None, "--method with --run", arguments.method, "only one of them")
        alone = "none: the run's configuration says it"
        require(arguments.test_stream is None, "--test-stream with --run", arguments.test_stream, alone)
        row = evaluate_run(arguments.run, arguments.users, arguments.env, arguments.catalogue)
    else:
        require(arguments.method is not None, "--method", None, "a method, or --run DIR")
        assert arguments.method is not None
        env, stream = arguments.env or "focused_topdown", arguments.test_stream or "test"
        tested = evaluate_reference(arguments.method, env, arguments.users, arguments.catalogue, stream)
        about = {"privileged": methods.method(arguments.method).privileged, "stream": stream}
        row = runs.table_row(env, arguments.method, tested) | about | {"interval": tested.interval}
    seconds = {"total": time.perf_counter() - started}  # with loading and compiling
    low, high = row["interval"]
    privileged = " (privileged)" if row["privileged"] else ""
    print(
        f"{row['method']}{privileged} in {row['env']}: {row['mean_return']:.1f} clicks in an episode "
        f"(95 % interval {low:.1f} to {high:.1f}, {row['users']} {row['stream']} users)"
    )
    if arguments.json is not None:
        disk.write_json(arguments.json, row | {"seconds": seconds} | surroundings())


if __name__ == "__main__":
    run_cli(lambda: main(tyro.cli(Arguments, prog="python -m experiments.evaluate", description=__doc__)))
