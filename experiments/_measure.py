"""How a speed is measured: median of repetitions, beside the matrix rate of the machine at that moment.

Shared by `experiments.benchmark` and its part about sweeps.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from gemsjax.agents.base import Acting, Policy
from gemsjax.rollout import turn_numbers
from gemsjax.types import Key

REPEATS = 7
MATRIX = 1_024
"""Side of the matrices whose product gives the machine's rate."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measurement.

    Attributes:
      value: median, in `unit`.
      floor_fraction: share of the machine's matrix rate that it reached (None where there is no operation count).
      gemm_gflops: that rate, measured around this figure.
      low, high: slowest and fastest repetition.
    """

    name: str
    value: float
    unit: str
    floor_fraction: float | None
    gemm_gflops: float
    low: float
    high: float


def matrix_rate() -> float:
    """GFLOP/s of a float32 product of two MATRIX x MATRIX matrices: the median of eight."""
    a = jax.random.normal(jax.random.key(0), (MATRIX, MATRIX))
    product = jax.jit(lambda a: a @ a)
    seconds = times(lambda: product(a), 8)
    return 2 * MATRIX**3 / statistics.median(seconds) / 1e9


def times(call: Callable[[], Any], repeats: int = REPEATS) -> list[float]:
    """Seconds of each of `repeats` calls, after one that warms up."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - started)
    return seconds


def figure_of(
    name: str, unit: str, amount: float, flops: float | None, call: Callable[[], Any], repeats: int = REPEATS
) -> Figure:
    """Measure `call`, which does `amount` units of work and `flops` operations each time."""
    before = matrix_rate()
    seconds = times(call, repeats)
    rate = (before + matrix_rate()) / 2
    median = statistics.median(seconds)
    fraction = flops / (rate * 1e9) / median if flops else None
    return Figure(name, amount / median, unit, fraction, rate, amount / max(seconds), amount / min(seconds))


def flops_of(compiled: Any) -> float | None:
    """Operations of one execution by XLA's count; None where the backend does not count.

    A scan's body counts once whatever its length: callers multiply by the length of the outermost one, and what inner
    scans do again and again is left out, which makes the floor a little too low (by a twelfth for a step of SAC+GeMS,
    almost all of it the rollout, see `turn_flops`).
    """
    analysis = compiled.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    return float(analysis["flops"]) if analysis and "flops" in analysis else None


def one_turn(env: Any, policy: Policy, env_params: Any, acting: Acting, key: Key, seen: Any, state: Any) -> Any:
    """One turn of one user at the beginning of an episode, whose operations are counted: those of a rollout are in a
    scan, which XLA counts once whatever its length."""
    luck, uniforms = turn_numbers(env, policy, key)
    hidden = (state, env_params) if policy.privileged else None
    choice, memory = policy.act(acting, policy.start(), seen, hidden, uniforms)
    slate = env.resolve(state, choice.slate, env_params) if policy.asks_oracle else choice.slate
    return choice.action, memory, env.play(luck, state, slate, env_params)


def turn_flops(env: Any, policy: Policy, env_params: Any, acting: Any) -> float | None:
    """Operations of `one_turn`; `acting` may be of shapes."""
    seen, state = jax.eval_shape(env.reset, jax.random.key(0), env_params)
    turn = lambda acting, seen, state: one_turn(env, policy, env_params, acting, jax.random.key(0), seen, state)  # noqa: E731
    return flops_of(jax.jit(turn).lower(acting, seen, state).compile())
