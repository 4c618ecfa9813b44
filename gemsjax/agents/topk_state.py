"""What an update of top-K REINFORCE changes: parameters by part, and gradients that wait. For `topk_reinforce`."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from gemsjax.types import Array


@struct.dataclass
class TopKParams:
    """One field for each part that is updated on its own (or Adam's moments of it).

    Attributes:
      belief: of the recurrent state.
      policy: [I, d] the v_a, apart from the embeddings u_a that the belief reads.
      behaviour: [I, d+1] the same of the behaviour head, with a bias in the last column.
      critic: of the reward simulator, () without `spec.critic`.
    """

    belief: Any
    policy: Any
    behaviour: Any
    critic: Any = ()


class Window(NamedTuple):
    """What has come together since policy and state were last updated.

    Attributes:
      gradients: of belief and policy, summed.
      batches: [] float32, how many.
      updates: [] int32, updates so far.
    """

    gradients: Any
    batches: Array
    updates: Array


@struct.dataclass
class TopKState:
    """Everything that an update changes.

    Attributes:
      params, optimiser: see `TopKParams`.
      old: belief and policy of the old policy, () without `spec.kl`.
      targets: `topk_critic.Targets`, () without `spec.critic`.
      window: `Window`, () where every update is one of the policy.
      weight_sum: [] running sum of weights, () without `spec.running`.
    """

    params: TopKParams
    optimiser: TopKParams
    old: Any = ()
    targets: Any = ()
    window: Any = ()
    weight_sum: Any = ()


@struct.dataclass
class TopKNoise:
    """Of one update: `negatives` [n] item numbers, `uniforms` [2, H, B, K] of policy and head; () where not needed."""

    negatives: Any
    uniforms: Any


def parts(params: TopKParams) -> dict[str, Any]:
    """The parts by name."""
    return {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}


def new_window(like: Any) -> Window:
    """Before the first update; `like`: belief and policy."""
    return Window(jax.tree.map(jnp.zeros_like, like), jnp.float32(0.0), jnp.int32(0))


def gathered(window: Any, gradients: Any, policy_step: int, mean: bool) -> tuple[Array | float, Any, Any]:
    """Gradients of belief and policy, one more batch of them.

    As RecNN counts, those of update n are used with all since the last time if n > 0 is a multiple of `policy_step`
    (n from 0, so the first time one batch more comes together); of a step of 1, always.

    Args:
      window: () with a step of 1.
      gradients: of this update.
      policy_step: see `TopKSpec`.
      mean: over the batches that came together, instead of their sum.

    Returns:
      [] 1 if they are used now, else 0; what to use then; what waits.
    """
    if policy_step == 1:
        return 1.0, gradients, ()
    summed, batches = jax.tree.map(jnp.add, window.gradients, gradients), window.batches + 1.0
    due = (window.updates > 0) & (window.updates % policy_step == 0)
    used = jax.tree.map(lambda x: x / batches, summed) if mean else summed
    kept, waiting = jax.tree.map(lambda x: jnp.where(due, 0.0, x), (summed, batches))
    return due.astype(jnp.float32), used, Window(kept, waiting, window.updates + 1)
