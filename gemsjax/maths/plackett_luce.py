"""Slates drawn without replacement from a softmax over items (Plackett-Luce), with penalties for similar items.

Slot after slot an item is drawn from the softmax over those that are left; then a penaliser may lower the logits of the
others, and what it lowers stays lowered. Everything is in log space: no temperature overflows. Pure, one user; `vmap`
it. Used by `distributions`, rankers and ranking policies. Sources: Plackett (1975), Luce (1959); the cosine penalty is
that of TF-Agents' ranking policies.

Letters: N items, D features, S slots. There must be at least as many items as slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemsjax.maths.categorical import draw_items
from gemsjax.maths.slates import best_item
from gemsjax.types import Array

LOWEST = -1e30
"""No logit of an available item falls below this."""
ABSENT = -1e35
"""Logit of an item that is not available; an item that was taken has -inf."""


class Penaliser(NamedTuple):
    """How items that were taken lower the logits of the others.

    Attributes:
      start: `(features [N, D]) -> state` before the first slot.
      penalty: `(state, item []) -> (penalty [N], state)` once `item` was taken; it is multiplied with the mixture
        coefficient and subtracted. An item whose penalty is NaN comes last; it cannot be taken away.
    """

    start: Callable[[Array], Any]
    penalty: Callable[[Any, Array], tuple[Array, Any]]


class LogitHook(NamedTuple):
    """The general form of a penalty: anything that changes the logits of what is left after every slot.

    Attributes:
      adjust: `(logits [N], slots [S] int32, num_slotted [] int32, given) -> logits [N]`. The first `num_slotted` of the
        slots hold the items taken so far, the others -1; logits of what was taken or is not available are -inf, and
        stay so. `given` are the `Choices`, with features and mixture, which are the hook's to use or not. NaN and -inf
        for what is left count as `LOWEST`: a hook can put an item last, but cannot take it away.
    """

    adjust: Callable[[Array, Array, Array, Choices], Array]


Penalty = Penaliser | LogitHook
"""What may stand between two slots."""


class Choices(NamedTuple):
    """What one user's slate is drawn from; make it with `choices`.

    Attributes:
      logits: [N]; at least `LOWEST` for what is available, `ABSENT` for the rest.
      features: [N, D] what a penaliser compares, or None.
      mixture: [] how much of the penalty counts.
    """

    logits: Array
    features: Array | None = None
    mixture: Array | float = 1.0


def choices(
    scores: Array,
    available: Array | None = None,
    temperature: Array | float = 1.0,
    features: Array | None = None,
    mixture: Array | float = 1.0,
) -> Choices:
    """Choices from raw scores.

    An item whose score or features are not finite counts as not available. So does every item under a temperature that
    is not above 0, or a mixture that is not finite: where these numbers are known they should be refused before.

    Args:
      scores: [N].
      available: [N] bool, or None if all items are.
      temperature: [] by which the scores, but not the penalties, are divided.
      features: [N, D] or None.
      mixture: [].
    """
    usable = (temperature > 0.0) & jnp.isfinite(temperature) & jnp.isfinite(mixture)
    there = jnp.isfinite(scores) & usable
    there = there if available is None else there & available
    if features is not None:
        there &= jnp.isfinite(features).all(axis=-1)
        features = jnp.where(there[:, None], features, 0.0)
    known = jnp.where(there, scores, 0.0)
    # A shift of all logits changes nothing, and after it a small temperature can only make small ones smaller.
    best = jax.lax.stop_gradient(jnp.where(there, scores, -jnp.inf).max())
    shifted = (known - jnp.where(there.any(), best, 0.0)) / jnp.where(usable, temperature, 1.0)
    logits = jnp.where(there, jnp.maximum(shifted, LOWEST), ABSENT)
    return Choices(logits, features, jnp.where(usable, mixture, 0.0))


def valid_slots(logits: Array, size: int) -> Array:
    """Which slots hold an item that is available, the first ones: [N] -> [size] bool."""
    return jnp.arange(size) < (logits >= LOWEST).sum()


# -- penalties ---------------------------------------------------------------------------------------------------------


def unit_rows(features: Array) -> Array:
    """Rows of length 1; a row of zeros stays: [..., D] -> [..., D]."""
    # Numbers above 2^64 would be infinite once squared. A power of two rounds nothing, and no row comes near the 1e-12.
    longest = jnp.abs(features).max(axis=-1, keepdims=True, initial=0.0)
    features = features * jnp.where(longest > 2.0**58, 2.0**-75, 1.0)
    return features / jnp.sqrt(jnp.maximum(jnp.square(features).sum(axis=-1, keepdims=True), 1e-12))


def _nearness(state: tuple[Array, Array], item: Array) -> tuple[Array, tuple[Array, Array]]:
    directions, nearest = state
    near = jnp.matmul(directions, directions[item], precision=jax.lax.Precision.HIGHEST)
    nearest = jnp.maximum(nearest, near)
    return 1.0 + nearest, (directions, nearest)


COSINE = Penaliser(lambda features: (unit_rows(features), jnp.full(features.shape[0], -1.0)), _nearness)
"""1 + the cosine with the most similar item taken so far: 0 for an opposite item, 1 for an orthogonal one, 2 for the
same direction. A row of zeros has cosine 0 with everything."""


def mean_pairwise_cosine(features: Array, counted: Array | None = None) -> Array:
    """Mean cosine of the pairs of different slots: features [S, D], counted [S] bool -> []; 0 without a pair.

    Slots with features that are not finite do not count.
    """
    whole = jnp.isfinite(features).all(axis=-1)
    counted = whole if counted is None else counted & whole
    directions = unit_rows(jnp.where(counted[:, None], features, 0.0))
    total, number = directions.sum(axis=0), counted.sum()
    alone = jnp.square(directions).sum()
    return (jnp.square(total).sum() - alone) / jnp.maximum(number * (number - 1), 1)


# -- slates ------------------------------------------------------------------------------------------------------------


def draw_slate(given: Choices, penaliser: Penalty | None, uniforms: Array) -> Array:
    """A slate from one uniform number in [0, 1) a slot: [S] -> [S] int32 of different items.

    Slots that are not valid hold items that are not available, in their order. More items that are not available
    change nothing.
    """

    def pick(logits: Array, uniform: Array) -> Array:
        item = draw_items(logits, uniform[None])[0]
        # What rounding may hit beside an item, and what is left when nothing is available.
        return jnp.where(logits[item] >= LOWEST, item, best_item(logits))

    return _fill(given, penaliser, pick, uniforms)[0]


def greedy_slate(given: Choices, penaliser: Penalty | None, size: int) -> Array:
    """In every slot the item with the highest logit of those left, ties to the lowest number: [size] int32."""
    return _fill(given, penaliser, lambda logits, _: best_item(logits), jnp.zeros(size))[0]


def log_prob(given: Choices, penaliser: Penalty | None, slate: Array) -> Array:
    """Log-probability of an ordered slate, [S] -> []; slots that are not valid count nothing, whatever they hold.

    -inf for items that are not available, that there are not, or that come twice.
    """
    last = given.logits.shape[0] - 1
    terms = _fill(given, penaliser, lambda _, item: jnp.clip(item, 0, last), slate)[1]
    terms = jnp.where((slate >= 0) & (slate <= last), terms, -jnp.inf)
    return jnp.where(valid_slots(given.logits, slate.shape[0]), terms, 0.0).sum()


def logits_after(given: Choices, penaliser: Penalty | None, slate: Array) -> Array:
    """The logits after every slot of a slate, -inf for what was taken or is not available: [S] -> [S, N]."""
    logits = _fill(given, penaliser, lambda _, item: item, slate)[2]
    return jnp.where(logits >= LOWEST, logits, -jnp.inf)


def _fill(
    given: Choices, penaliser: Penalty | None, pick: Callable[[Array, Array], Array], inputs: Array
) -> tuple[Array, Array, Array]:
    """Items [S], their log-probabilities [S] where they were available, and the logits after each, [S, N].

    `pick(logits, input) -> item`, once for every one of `inputs` [S].
    """
    numbers = jnp.arange(given.logits.shape[0], dtype=jnp.int32)
    start, after = _between(given, penaliser, inputs.shape[0])

    def slot(carry: tuple[Array, Any], given_input: Array) -> tuple[tuple[Array, Any], tuple[Array, Array, Array]]:
        logits, state = carry
        item = pick(logits, given_input)
        term = _log_softmax_at(logits, item)
        left = jnp.where(numbers == item, -jnp.inf, logits)
        changed, state = after(left, state, item)
        logits = jnp.where(left >= LOWEST, jnp.maximum(changed, LOWEST), left)
        return (logits, state), (item, term, logits)

    return jax.lax.scan(slot, (given.logits, start), inputs)[1]


def _between(given: Choices, penaliser: Penalty | None, size: int) -> tuple[Any, Callable]:
    """What is known before the first of `size` slots, and `(logits, known, item) -> (logits, known)` after each."""
    if isinstance(penaliser, LogitHook):
        adjust = penaliser.adjust

        def hooked(logits: Array, taken: tuple[Array, Array], item: Array) -> tuple[Array, tuple[Array, Array]]:
            slots, number = taken[0].at[taken[1]].set(item.astype(jnp.int32)), taken[1] + 1
            told = adjust(jnp.where(logits >= LOWEST, logits, -jnp.inf), slots, number, given)
            return _bounded(told), (slots, number)

        return (jnp.full(size, -1, jnp.int32), jnp.int32(0)), hooked
    if penaliser is None or given.features is None:
        return None, lambda logits, known, item: (logits, known)

    def penalised(logits: Array, state: Any, item: Array) -> tuple[Array, Any]:
        penalty, state = penaliser.penalty(state, item)
        # What is no number is set aside before the product too: the mixture's gradient would multiply it.
        known = ~jnp.isnan(penalty)
        lowered = logits - given.mixture * jnp.clip(jnp.where(known, penalty, 0.0), LOWEST, -LOWEST)
        return _bounded(jnp.where(known, lowered, jnp.nan)), state

    return penaliser.start(given.features), penalised


def _bounded(logits: Array) -> Array:
    """What a penalty made of logits, as numbers that a softmax can take: NaN counts as `LOWEST`."""
    return jnp.clip(jnp.where(jnp.isnan(logits), LOWEST, logits), LOWEST, -LOWEST)


def _log_softmax_at(logits: Array, item: Array) -> Array:
    """log softmax over what is available, -inf for an item that is not; values and gradients are never NaN."""
    there = logits >= LOWEST
    total = jax.nn.logsumexp(jnp.where(there.any(), jnp.where(there, logits, -jnp.inf), 0.0))
    own = jnp.where(there[item], logits[item], 0.0)
    return jnp.where(there[item], own - total, -jnp.inf)
