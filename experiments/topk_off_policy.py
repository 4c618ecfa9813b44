"""Learn to recommend from another policy's log: without correction, with the first-order, with the top-K correction.

    python -m experiments.topk_off_policy [--budget smoke|small|full] [--variants ...] [--json FILE] [--out DIR]

First the three bandits whose limits are known (the largest error of each must be below 0.002). Then users of the
epsilon-greedy oracle are logged, each correction learns from the log alone, and the policies are played online with
test users: greedily (the ten most probable items) and as they would be served (K' = 5 and five drawn). Importance
weights, lambda and the estimated behaviour are judged on users that nothing was learnt from; what the logging policy
really did is found by playing the logged users again. Table, pictures and checkpoints go to DIR. Stopped in any way,
the same command goes on: it keeps the log and each correction's learning (a tenth of a pass is lost at most), and plays
and judges anew, which takes a minute.

Two shared CPU cores need two to six minutes for `small` (1,000 logged users, four passes, 200 test users) and get, in
clicks in 100 turns (random 32, logging policy 95, short-term oracle 101),

    correction                    greedy         served
    none                          114 +- 4        96 +- 3
    first-order                    74 +- 3        58 +- 2
    top-K                          37 +- 2        65 +- 3
    top-K, logged propensities    100 +- 1        95 +- 1

so here a correction is worth what is known of the logging policy. With the probabilities that the log had, importance
weights of held-out shown items have mean 1.00 under every policy, as they must; with the estimated ones 1.17 (top-K)
and 1.20 (first-order), 3.4 and 3.6 at clicked ones: the policies move to where the head is wrong, and playing them
tells. The head sees clicks, not the user that the oracle sees: it gives the oracle's items 0.07 of their probability,
random ones 1.9 times theirs, and its cross-entropy is 6.6 where the truth has 5.3 and a uniform guess 6.9. `smoke`
only shows that everything runs.

`full` (20,000 logged users, ten passes, 500 test users) has not been run to its end: its 4 x 5,620 updates took 0.074 s
each where they were measured on two cores, so expect half an hour, and over an hour beside other work (there 342 of
them, with `nice`, took 0.25 s each). The log takes half a minute.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.markdown import Markdown

import gemsjax
from experiments._cli import run_cli
from gemsjax import datasets, disk, methods, offline, plots, plots_offline
from gemsjax.agents.base import Acting
from gemsjax.agents.logged import LoggedEpisodes
from gemsjax.agents.topk_reinforce import Learner, TopKHypers, TopKSpec, make_topk_learner
from gemsjax.datasets.episodes import from_logs
from gemsjax.datasets.propensities import oracle_slates, propensities
from gemsjax.envs.registry import require_catalogue
from gemsjax.errors import require, require_choice
from gemsjax.evaluate import Evaluation, evaluate, recommended_scores
from gemsjax.offline import OfflinePlan, make_offline_training
from gemsjax.offline.bandits import known, learn
from gemsjax.tracking import Progress
from gemsjax.types import Dims

VARIANTS = {
    "none": TopKSpec(correction="none", certain=5),
    "first-order": TopKSpec(correction="first_order", certain=5),
    "top-K": TopKSpec(correction="topk", certain=5),
    "top-K, logged propensities": TopKSpec(correction="topk", behaviour="logged", certain=5),
    "top-K, critic": TopKSpec(correction="topk", behaviour="logged", certain=5, critic="slate"),
}
"""What is learnt with. The last, whose rewards come from a critic, only if it is asked for."""
REFERENCES = ("random", "short-term-oracle", "epsilon-greedy-oracle")
EPSILON, PORTION = 0.5, 100


@dataclasses.dataclass(frozen=True)
class Budget:
    """Logged users (a tenth judges), passes over them, users of an update, test users."""

    users: int
    epochs: int
    batch: int
    test_users: int


BUDGETS = {
    "smoke": Budget(users=40, epochs=1, batch=6, test_users=8),
    "small": Budget(users=1_000, epochs=4, batch=16, test_users=200),
    "full": Budget(users=20_000, epochs=10, batch=32, test_users=500),
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What may be changed."""

    budget: Literal["smoke", "small", "full"] = "small"
    """How much of everything."""
    env: str = "focused_topdown"
    """Name of an environment."""
    seed: int = 58407201
    """Of learning; the log and the test users are the same for all."""
    variants: tuple[str, ...] = tuple(VARIANTS)[:4]
    """Corrections to learn with."""
    out: Path = Path("runs/topk_off_policy")
    """Directory for log, checkpoints, table and pictures."""
    json: Path | None = None
    """Write all numbers to this file."""


@dataclasses.dataclass(frozen=True)
class Logs:
    """The environment, and its log in two parts."""

    env: Any
    params: Any
    training: LoggedEpisodes
    held_out: LoggedEpisodes
    mean_return: float

    @property
    def dims(self) -> Dims:
        """Of learning: a log's first turn is only observed."""
        return Dims(self.env.num_items, self.env.slate_size, self.env.horizon - 1)


def main(arguments: Arguments) -> None:
    require_choice("budget", arguments.budget, BUDGETS)
    require(bool(arguments.variants), "variants", "none", "at least one")
    for name in arguments.variants:
        require_choice("variants", name, VARIANTS)
    budget, console, started = BUDGETS[arguments.budget], Console(), time.perf_counter()
    if arguments.json is not None:  # now, so that a wrong place is not found out at the end
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"budget": arguments.budget, "env": arguments.env, "bandits": _bandits(console)}
    logs = _logs(arguments.env, budget, arguments.out)
    table = {name: _reference(name, logs, budget.test_users) for name in REFERENCES}
    weights: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    pictures = []
    for name in arguments.variants:
        learner, acting = _trained(name, logs, budget, arguments)
        for serving, policy in (("greedy", learner.agent.greedy), ("served", learner.agent.explore)):
            table[f"{name}, {serving}"] = evaluate(logs.env, policy, logs.params, acting, budget.test_users)
        judged, shown = _judged(learner, acting, logs.held_out)
        few = min(100, budget.test_users)
        bored = recommended_scores(logs.env, learner.agent.greedy, logs.params, acting, few).bored_topics
        report[name] = judged | {"bored_topics": float(bored.mean())}
        if VARIANTS[name].correction != "none":
            weights[name] = shown[:2]
        if name == "top-K":
            picture = plots_offline.calibration(*shown[2:], "behaviour head on held-out users")
            pictures.append(plots.save(picture, arguments.out / "calibration.png"))
    if weights:
        drawn = plots_offline.weight_histograms(weights, TopKHypers().cap, logs.dims.slate_size, "held-out users")
        pictures.append(plots.save(drawn, arguments.out / "weights.png"))
    report |= {"returns": {name: _row(found) for name, found in table.items()}, "logged_return": logs.mean_return}
    report["seconds"] = time.perf_counter() - started
    _show(console, table, report, arguments)
    for path in pictures:
        console.print(f"picture: {path}", soft_wrap=True)
    if arguments.json is not None:
        disk.write_json(arguments.json, report)


def _bandits(console: Console) -> dict[str, Any]:
    """Largest distance of each bandit's learnt policy from its limit."""
    errors = {name: float(np.abs(learn(bandit) - bandit.limit).max()) for name, bandit in known().items()}
    for name, error in errors.items():
        console.print(f"bandit with correction {name}: largest distance from its limit {error:.5f}")
    return errors


def _logs(env_name: str, budget: Budget, out: Path) -> Logs:
    """Logged users with the propensities of their slates, a tenth of them apart."""
    env, params = gemsjax.make(env_name)
    require_catalogue(env)
    directory = out / f"logs_{env_name}_{budget.users}"
    with Progress(budget.users, "logged data", unit="users") as progress:
        datasets.generate(env, params, directory, users=budget.users, epsilon=EPSILON, on_progress=progress.update)
    data = datasets.load(directory)
    chance = propensities(data.slates, oracle_slates(env, params, data), EPSILON, env.num_items)
    episodes, held_out = from_logs(data, chance), budget.users // 10
    parts = (jax.tree.map(lambda x, cut=cut: x[cut], episodes) for cut in (slice(held_out, None), slice(held_out)))
    training, judging = parts
    return Logs(env, params, jax.tree.map(jnp.asarray, training), judging, datasets.mean_return(data))


def _reference(name: str, logs: Logs, users: int) -> Evaluation:
    policy = methods.method(name).policy
    assert policy is not None
    dims = Dims(logs.env.num_items, logs.env.slate_size, logs.env.horizon)
    return evaluate(logs.env, policy(dims), logs.params, users=users)


def _trained(name: str, logs: Logs, budget: Budget, arguments: Arguments) -> tuple[Learner, Acting]:
    """A policy that has learnt from the training part of the log, from its last checkpoint on.

    Raises:
      KeyboardInterrupt: stopped; started again, it continues.
    """
    spec, plan = VARIANTS[name], OfflinePlan(budget.batch)
    learner = make_topk_learner(spec, logs.dims)
    hypers = jax.tree.map(jnp.float32, TopKHypers())
    learnt = offline.learn(
        make_offline_training(learner.agent, plan),
        logs.training,
        jax.random.key(arguments.seed),
        hypers,
        epochs=budget.epochs,
        directory=run_directory(name, arguments),
        config={"env": arguments.env, "spec": spec, "plan": plan},
        title=f"correction: {name}",
    )
    if not learnt.finished:
        raise KeyboardInterrupt("the same command goes on from here")
    return learner, Acting(learnt.state, hypers)


def run_directory(name: str, arguments: Arguments) -> Path:
    """Where a correction's learning is kept."""
    world = f"{arguments.env}_{arguments.budget}_seed{arguments.seed}"
    return arguments.out / world / name.replace(", ", "_").replace(" ", "_")


def _judged(
    learner: Learner, acting: Acting, held_out: LoggedEpisodes
) -> tuple[dict[str, float], tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Numbers of the weights and of the estimated behaviour, and (ratios, lambdas, estimated, logged) to draw."""
    inspect, users = jax.jit(learner.inspect), len(held_out.reward)
    cuts = [slice(first, first + PORTION) for first in range(0, users, PORTION)]  # the softmax of all is gigabytes
    parts = [inspect(acting, jax.tree.map(lambda x, cut=cut: jnp.asarray(x[cut]), held_out)) for cut in cuts]
    seen = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *parts)
    logged = np.log(np.swapaxes(np.asarray(held_out.propensity), 0, 1))
    learnt = seen.mask > 0
    ratio, top_k = seen.weights.ratio[learnt], seen.weights.top_k[learnt]
    estimated, true = (np.exp(seen.log_pi - log_beta).mean() for log_beta in (seen.log_beta, logged))
    often, items = logged > logged.mean(), acting.state.params.policy.shape[0]
    numbers = {
        "ratio_of_shown_by_estimate": float(estimated),
        "ratio_of_shown_by_log": float(true),
        "mean_ratio": float(ratio.mean()),
        "effective_share": float(ratio.mean() ** 2 / np.square(ratio).mean()),
        "capped_share": float((ratio > TopKHypers().cap).mean()),
        "mean_lambda": float(top_k.mean()),
        "cross_entropy_estimated": float(-seen.log_beta.mean()),
        "cross_entropy_logged": float(-logged.mean()),
        "estimated_over_logged_of_oracle_items": float(np.exp(seen.log_beta[often] - logged[often]).mean()),
        "estimated_over_logged_of_random_items": float(np.exp(seen.log_beta[~often] - logged[~often]).mean()),
        "mean_inverse_estimated": float(np.exp(-seen.log_beta).mean() / items),
        "mean_inverse_logged": float(np.exp(-logged).mean() / items),
    }
    return numbers, (ratio, top_k, np.exp(seen.log_beta).ravel(), np.exp(logged).ravel())


def _row(found: Evaluation) -> dict[str, Any]:
    return {"mean": found.mean, "standard_error": found.standard_error, "users": found.returns.size}


def _show(console: Console, table: dict[str, Evaluation], report: dict[str, Any], arguments: Arguments) -> None:
    """Both tables on the terminal, and in a file."""
    results = [("policy", "clicks in 100 turns", "standard error")]
    for name, found in table.items():
        entry = methods.METHODS.get(name)
        title = name if entry is None else entry.title + (" (privileged)" if entry.privileged else "")
        results.append((title, f"{found.mean:.1f}", f"{found.standard_error:.1f}"))
    names = arguments.variants
    numbers: list[tuple[str, ...]] = [("on held-out users", *names)]
    for number in report[names[0]]:
        numbers.append((number.replace("_", " "), *(f"{report[name][number]:.3f}" for name in names)))
    text = "# Played online with test users\n\n" + _rows(results)
    text += "\n# Importance weights and estimated behaviour\n\n" + _rows(numbers)
    path = arguments.out / "topk_off_policy.md"
    disk.write(path, text.encode())
    console.print(Markdown(text))
    console.print(f"table: {path}", soft_wrap=True)


def _rows(rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


if __name__ == "__main__":
    run_cli(lambda: main(tyro.cli(Arguments, prog="python -m experiments.topk_off_policy", description=__doc__)))
