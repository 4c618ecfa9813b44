"""PPO and A2C on the dot-product environment: train one, evaluate it, or compare them and what corrections are worth.

    python -m experiments.ppo_a2c --budget small --out DIR [--algo ppo|a2c|both] [--resume]
    python -m experiments.ppo_a2c train --algo ppo --total-timesteps 100000 --log-dir logs --seed 42 [--resume]
    python -m experiments.ppo_a2c evaluate --checkpoint checkpoints/ppo --episodes 10 [--greedy]

The first trains both with their documented defaults (100,000 turns a run) on item tables of several seeds, in two
worlds: the documented one (1000 items, 32 numbers each) and one of 10 items with 8 numbers, where 100,000 turns show
each item often; there also as the public code computes advantages (`published`) and, for A2C, as its documents say
(`n-step`). Judged on 500 users that no training met, next to random items, one item for everybody, and the best item
of each user (which knows the item table, and is the optimum). Writes a record of each run, a table with paired
comparisons, and a picture to DIR; stopped in any way, --resume goes on where it was.

`small` takes 223 s of processor time, compiling included (two cores shared with much other work: 18 minutes on the
clock). Returns of an episode, four seeds, 95 % intervals:

    world        policy                    greedy         drawn
    1000 items   one item for everybody    8.33 ± 0.21
                 A2C                       8.42 ± 0.21    8.42 ± 0.21
                 PPO                       8.92 ± 0.84    0.74 ± 0.10
                 best item (optimum)      18.14 ± 0.07
    10 items     one item for everybody    8.37 ± 0.16
                 A2C                      12.86 ± 4.77   12.73 ± 4.66
                 PPO, published           16.30 ± 0.74   10.86 ± 0.54
                 PPO                      17.22 ± 0.99   15.84 ± 0.99
                 best item (optimum)      18.09 ± 0.73

So with 1000 items 100,000 turns are too few for either: PPO still draws almost at random, A2C has closed on one item,
which the drift alone pays for. With 10 items PPO reaches 95.2 ± 2.0 % of the optimum, A2C 71 ± 29 %. Advantages in each
environment are worth 0.93 (0.60 to 1.26) to PPO's greedy policy and 4.97 (4.18 to 5.76) to the one that draws, paired
by seed; A2C differs from neither of its variants by more than its interval. Not corrected for how many comparisons.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.markdown import Markdown

from experiments._cli import run_cli
from experiments._ppo_a2c_report import comparisons, draw, markdown
from gemsjax import disk, plots
from gemsjax.devices import surroundings
from gemsjax.envs.dot_product import EnvConfig
from gemsjax.errors import DataError, require, require_choice, require_count
from gemsjax.on_policy import A2CConfig, Config, ModelConfig, PPOConfig, TrainConfig, check_config, driver, files
from gemsjax.on_policy.config import ALGORITHMS
from gemsjax.on_policy.evaluation import METRICS, reference_returns


@dataclasses.dataclass(frozen=True)
class Budget:
    """Turns of a run, seeds (each with its own item tables), users that judge, whether all variants in all worlds."""

    timesteps: int
    seeds: int
    episodes: int
    everything: bool = False


BUDGETS = {
    "smoke": Budget(timesteps=4_096, seeds=2, episodes=20),
    "small": Budget(timesteps=100_000, seeds=4, episodes=500),
    "full": Budget(timesteps=1_000_000, seeds=10, episodes=500, everything=True),
}
WORLDS = {
    "1000 items": EnvConfig(),
    "10 items": EnvConfig(num_items=10, state_dim=16, user_feature_dim=8, item_feature_dim=8),
}
VARIANTS = {
    "PPO": ("ppo", "gae"),
    "PPO, published": ("ppo", "interleaved"),
    "A2C": ("a2c", "gae"),
    "A2C, n-step": ("a2c", "nstep"),
    "A2C, published": ("a2c", "last_value"),
}
"""Algorithm and how it computes advantages, by name in the table."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Train both with several seeds and compare (`train --help`, `evaluate --help`: the other two commands)."""

    budget: str = "small"
    """smoke, small or full."""
    algo: str = "both"
    """ppo, a2c or both."""
    seed: int = 42
    """First seed of item tables, networks and training users."""
    out: Path = Path("runs/ppo_a2c")
    """Directory for records, table, picture, logs and checkpoints."""
    resume: bool = False
    """Keep what is there and go on."""


@dataclasses.dataclass(frozen=True)
class Train:
    """Train one algorithm; logs and a checkpoint that `evaluate` reads."""

    algo: str = "ppo"
    """ppo or a2c."""
    total_timesteps: int | None = None
    """Turns over all environments; by default those of the budget."""
    log_dir: str = "logs"
    """Directory for the log's lines and tables."""
    seed: int = 42
    """Of item table, networks, users and actions."""
    budget: str = "small"
    """smoke, small (the documented 100,000 turns) or full."""
    out: str = "checkpoints"
    """Directory of checkpoints; the algorithm's are in one of its name."""
    resume: bool = False
    """Go on from the newest checkpoint, to the same numbers as without the interruption."""
    device: str = "auto"
    """auto, cpu, gpu or tpu."""
    log_interval: int = TrainConfig.log_interval
    """Turns between lines of the log."""
    eval_interval: int = TrainConfig.eval_interval
    """Turns between evaluations, which take place at lines of the log."""
    save_interval: int = TrainConfig.save_interval
    """Turns between checkpoints, likewise."""
    env: EnvConfig = EnvConfig()
    model: ModelConfig = ModelConfig()
    ppo: PPOConfig = PPOConfig()
    a2c: A2CConfig = A2CConfig()

    def config(self) -> Config:
        """The same as a checked configuration."""
        require_choice("--budget", self.budget, BUDGETS)
        timesteps = BUDGETS[self.budget].timesteps if self.total_timesteps is None else self.total_timesteps
        names = ("log_dir", "seed", "log_interval", "eval_interval", "save_interval")
        train = TrainConfig(timesteps, checkpoint_dir=self.out, **{name: getattr(self, name) for name in names})
        config = Config(self.algo, self.device, self.env, self.model, self.ppo, self.a2c, train)
        check_config(config)
        return config


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Play whole episodes with a trained policy; it draws its items, as in training, unless --greedy."""

    checkpoint: Path
    """Directory of checkpoints, such as checkpoints/ppo."""
    algo: str | None = None
    """ppo or a2c, if it is to be checked that the checkpoint is one of it."""
    episodes: int = 10
    """How many."""
    seed: int = 0
    """Of the users; training met none of them, unless the checkpoint is of --env.fixed-users."""
    greedy: bool = False
    """Show the likeliest item instead of drawing one."""
    device: str = "auto"
    """auto, cpu, gpu or tpu."""


# -- one run -----------------------------------------------------------------------------------------------------------


def train(arguments: Train) -> None:
    """Train, with a line every `log_interval` turns."""
    config = arguments.config()
    with driver.on_device(config.device):
        outcome = driver.train(config, resume=arguments.resume)
    if not outcome.finished:
        raise KeyboardInterrupt(f"after {outcome.step:,} turns; the same command with --resume goes on")
    print(f"python -m experiments.ppo_a2c evaluate --checkpoint {files.place(config)}")


def evaluate(arguments: Evaluate) -> list[dict[str, float]]:
    """A line an episode, then the means; returns the metrics of every episode."""
    if arguments.algo is not None:
        require_choice("--algo", arguments.algo, ALGORITHMS)
    require_count("--episodes", arguments.episodes)
    require_count("--seed", arguments.seed, 0, 2**32 - 1)
    with driver.on_device(arguments.device):
        loaded = files.load(arguments.checkpoint)
        found = loaded.config.algorithm
        require(arguments.algo in (None, found), "--algo", arguments.algo, f"that of the checkpoint, {found}")
        networks, how = loaded.state.params, (arguments.episodes, arguments.greedy, arguments.seed)
        rows = driver.describe(driver.judged(loaded.config, loaded.run, networks, *how))
    for number, row in enumerate(rows, 1):
        print(f"episode {number}: total_reward={row['total_reward']:.4f}")
    way = "greedy" if arguments.greedy else "stochastic"
    print(f"{found}, {loaded.step:,} turns of training, {way}, mean over {len(rows)} episodes:")
    for name in METRICS:
        print(f"  {name}: {np.mean([row[name] for row in rows]):.4f}")
    return rows


# -- the comparison ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of the comparison."""

    world: str
    variant: str
    seed: int
    budget: Budget
    out: Path

    @property
    def name(self) -> str:
        return f"{self.variant}_{self.world}_seed{self.seed}".replace(", ", "_").replace(" ", "_")

    @property
    def record(self) -> Path:
        return self.out / "records" / f"{self.name}.json"

    def config(self) -> Config:
        """Documented defaults; only where advantages come from differs between variants."""
        algorithm, how = VARIANTS[self.variant]
        root, turns = self.out / "runs" / self.name, self.budget.timesteps
        train = TrainConfig(
            total_timesteps=turns, log_dir=str(root / "logs"), checkpoint_dir=str(root), seed=self.seed,
            eval_episodes=self.budget.episodes, eval_interval=max(turns // 20, 1), save_interval=max(turns // 4, 1),
        )  # fmt: skip
        methods: Any = {"ppo": PPOConfig(returns=how)} if algorithm == "ppo" else {"a2c": A2CConfig(returns=how)}
        return Config(algorithm=algorithm, env=WORLDS[self.world], train=train, **methods)

    def asked(self) -> dict[str, Any]:
        """What a record must have been made with to be kept."""
        return disk.plain({"config": self.config().identity(), "budget": dataclasses.asdict(self.budget)})


def jobs(arguments: Comparison) -> Iterator[Job]:
    """Every run of a budget, world by world."""
    budget = BUDGETS[arguments.budget]
    for world in WORLDS:
        for variant, (algorithm, how) in VARIANTS.items():
            wanted = budget.everything or world == "10 items" or how == "gae"
            if wanted and arguments.algo in ("both", algorithm):
                for number in range(budget.seeds):
                    yield Job(world, variant, arguments.seed + number, budget, arguments.out)


def perform(job: Job) -> dict[str, Any]:
    """Train and judge; returns the record, which it also writes."""
    started, config = time.perf_counter(), job.config()
    check_config(config)
    outcome = driver.train(config, resume=True, quiet=True)
    if not outcome.finished:
        raise KeyboardInterrupt("the same command with --resume goes on")
    run, episodes = outcome.run, job.budget.episodes
    greedy, sampled = (
        driver.judged(config, run, outcome.state.params, episodes, way).sum(axis=1).mean() for way in (True, False)
    )
    record = job.asked() | {
        "world": job.world,
        "variant": job.variant,
        "seed": job.seed,
        "turns": outcome.step,
        "greedy": float(greedy),
        "sampled": float(sampled),
        "references": references(outcome, episodes),
        "curve": curve(config),
        "seconds": time.perf_counter() - started,
        **surroundings(),
    }
    disk.write_json(job.record, record)
    return record


def references(outcome: driver.Outcome, episodes: int) -> dict[str, float]:
    """Mean returns of the references with the run's item table, on the users that judge."""
    env, params = outcome.learning.env, outcome.run.env_params
    key = driver.evaluation_key()
    found = reference_returns(env, params, key, episodes)
    return {name: float(returns.mean()) for name, returns in found.items()}


def curve(config: Config) -> list[list[float]]:
    """(turns, greedy return) of every evaluation of a run, those before it was resumed included."""
    table = Path(config.train.log_dir) / f"{config.algorithm}_eval.csv"
    rows = np.loadtxt(table, delimiter=",", skiprows=1, ndmin=2)
    return rows[:, :2].tolist()


def compare(arguments: Comparison) -> None:
    """Train what is missing, then write table and picture."""
    require_choice("--budget", arguments.budget, BUDGETS)
    require_choice("--algo", arguments.algo, (*ALGORITHMS, "both"))
    require_count("--seed", arguments.seed, 0, 2**32 - 1 - BUDGETS[arguments.budget].seeds)
    (arguments.out / "records").mkdir(parents=True, exist_ok=True)
    there = next((arguments.out / "records").iterdir(), None)
    accepted = "--resume keeps what is there and goes on; another directory starts anew"
    require(arguments.resume or there is None, "--out", str(arguments.out), accepted)
    console, records, started, budget = Console(), [], time.perf_counter(), BUDGETS[arguments.budget]
    for job in jobs(arguments):
        record = kept(job)
        if record is None:
            record = perform(job)
            found = f"{record['greedy']:.2f} greedy, {record['sampled']:.2f} sampled"
            console.print(f"{job.name}: {found}, {record['seconds']:.0f} s", highlight=False, soft_wrap=True)
        records.append(record)
    about = f"{budget.episodes} users each, budget `{arguments.budget}`"
    text = markdown(records, about)
    disk.write(arguments.out / "ppo_a2c.md", text.encode())
    picture = plots.save(draw(records), arguments.out / "learning_curves.png")
    disk.write_json(arguments.out / "comparisons.json", comparisons(records))
    console.print(Markdown(text))
    console.print(
        f"{arguments.out / 'ppo_a2c.md'} and {picture}, {time.perf_counter() - started:.0f} s", soft_wrap=True
    )


def kept(job: Job) -> dict[str, Any] | None:
    """The record of a run that was done here, None without one.

    Raises:
      DataError: one of another configuration.
    """
    if not job.record.is_file():
        return None
    record = json.loads(job.record.read_text(encoding="utf-8"))
    wrong = disk.differences({name: record.get(name) for name in job.asked()}, job.asked())
    if wrong:
        raise DataError(f"{job.record} is of another configuration: {'; '.join(wrong)}")
    return record


COMMANDS: dict[str, tuple[type, Any]] = {"train": (Train, train), "evaluate": (Evaluate, evaluate)}


def main(words: list[str]) -> None:
    """`train ...`, `evaluate ...`, or the comparison."""
    kind, act = COMMANDS.get(words[0] if words else "", (Comparison, compare))
    name = "python -m experiments.ppo_a2c"
    if kind is not Comparison:
        name, words = f"{name} {words[0]}", words[1:]
    act(tyro.cli(kind, args=words, prog=name, description=__doc__))


if __name__ == "__main__":
    run_cli(lambda: main(sys.argv[1:]))
