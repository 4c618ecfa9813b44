"""Stateless bandits whose limits are known: what each correction converges to when the data are someone else's.

The expected gradient is exact here (every arm once, weighted by its chance in the log), so only the correction is
tested. Called by experiments and tests. The limits follow from the conditions of Karush, Kuhn and Tucker:
without correction pi is proportional to beta * r; the first-order correction maximises sum pi r; the top-K correction
maximises sum r (1 - (1 - pi)^K).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemsjax.maths import off_policy
from gemsjax.maths.off_policy import Correction
from gemsjax.maths.optimise import adam_init, adam_step
from gemsjax.types import Array

ARMS = 10


class Bandit(NamedTuple):
    """A bandit, its log and where it must end.

    Attributes:
      correction: what is learnt with.
      reward: [ARMS].
      behaviour: [ARMS] chance of each arm in the log.
      limit: [ARMS] the policy that learning converges to.
    """

    correction: Correction
    reward: np.ndarray
    behaviour: np.ndarray
    limit: np.ndarray


def known() -> dict[str, Bandit]:
    """The three bandits, by name."""
    rising = np.arange(1.0, ARMS + 1.0)
    two_good = np.array([10.0, 9.0] + [1.0] * (ARMS - 2))
    falling, uniform = rising[::-1] / rising.sum(), np.full(ARMS, 1.0 / ARMS)
    both = np.array([10.0, 9.0] + [0.0] * (ARMS - 2)) / 19.0
    return {
        "none": Bandit(Correction("none"), rising, falling, falling * rising / (falling * rising).sum()),
        "first_order": Bandit(Correction("first_order"), rising, falling, np.eye(ARMS)[-1]),
        "topk": Bandit(Correction("topk", set_size=2), two_good, uniform, both),
    }


def learn(bandit: Bandit, steps: int = 2_000, rate: float = 0.05) -> np.ndarray:
    """The policy after `steps` of Adam on the exact expected loss, from the uniform one: [ARMS]."""
    arrays = (jnp.asarray(column, jnp.float32) for column in (bandit.reward, bandit.behaviour))
    return np.asarray(_learn(bandit.correction, steps, *arrays, jnp.float32(rate)))


@partial(jax.jit, static_argnums=(0, 1))
def _learn(correction: Correction, steps: int, reward: Array, behaviour: Array, rate: Array) -> Array:
    def loss(logits: Array) -> Array:
        log_pi = jax.nn.log_softmax(logits)
        found = off_policy.weights(log_pi, jnp.log(behaviour), behaviour, correction)
        return off_policy.policy_loss(log_pi, reward, behaviour, found, correction)

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        logits, moments = carry
        return adam_step(logits, jax.grad(loss)(logits), moments, rate), None

    start = jnp.zeros_like(reward)
    (logits, _), _ = jax.lax.scan(step, (start, adam_init(start)), None, length=steps)
    return jax.nn.softmax(logits)
