"""A small vector of tastes for every user, learnt from its own rewards by REINFORCE on top of any ranker's scores.

A user has a slow vector, a fast one that forgets, and a running mean of rewards as baseline. The ranker's candidates
get `base + vector . (beta_long slow + beta_short fast)`; a softmax with temperature tau serves them, and the gradient
of the served items' log-probability, times the advantage, moves both vectors. Source: Williams 1992, and the behaviour
of a published re-ranker that `tests/golden/personalization_examples.json` records.

Pure functions of ONE user: `jit` them, `vmap` them over users (a leading axis on every argument), `scan` them over
interactions (`replay`). Whatever is not an update changes nothing at all. May be called by everything above; imports
neither environments nor networks. Letters: K candidates, k dimensions, C chosen entries.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from gemsjax.errors import require
from gemsjax.types import Array

LEAST_ADVANTAGE = 1e-6
"""Advantages below this (in absolute value, strictly) are no news: the user stays as it is."""


@struct.dataclass
class PersonalisationConfig:
    """Numbers of the rule, all traced: users of one program may differ in them.

    Attributes:
      beta_long, beta_short: weights of the two vectors in a score.
      tau: temperature of the softmax, above 0.
      eta_long, eta_short: learning rates of the two vectors, at least 0.
      short_decay: share of the fast vector that an update forgets, 0 to 1.
      ema_alpha: weight of the newest reward in the baseline, 0 to 1.
    """

    beta_long: Array | float = 1.0
    beta_short: Array | float = 0.5
    tau: Array | float = 1.0
    eta_long: Array | float = 0.05
    eta_short: Array | float = 0.2
    short_decay: Array | float = 0.3
    ema_alpha: Array | float = 0.1


class UserState(NamedTuple):
    """What is kept of a user.

    Attributes:
      z_long: [..., k] float32, slow tastes.
      z_short: [..., k] float32, fast tastes.
      reward_ma: [...] float32, exponential mean of its rewards.
    """

    z_long: Array
    z_short: Array
    reward_ma: Array


class Interaction(NamedTuple):
    """One serving and what came of it, of one user.

    Attributes:
      base: [..., K] scores of the ranker.
      items: [..., K, k] vectors of the candidates.
      mask: [..., K] which candidates there are (the others are padding and may hold anything).
      chosen: [..., C] places of the served (or clicked) candidates, whole numbers, or floats that are cut off.
      chosen_mask: [..., C] which of these entries count.
      reward: [...] what the user returned.
      gate: [...] factor of the advantage; 0 leaves the user as it is.
    """

    base: Array
    items: Array
    mask: Array
    chosen: Array
    chosen_mask: Array
    reward: Array
    gate: Array


def new_user(dim: int) -> UserState:
    """A user of whom nothing is known: zeros, so that the ranker's own scores serve it."""
    return UserState(jnp.zeros(dim), jnp.zeros(dim), jnp.float32(0.0))


def check_config(config: PersonalisationConfig) -> None:
    """Refuse numbers out of range. Traced ones cannot be looked at: under them, `policy_scores` and `update` see to it
    that a temperature that is not above 0 serves nobody and updates nobody.

    Raises:
      SettingError: naming the number.
    """
    positive, shares = ("tau",), ("short_decay", "ema_alpha")
    for name, value in vars(config).items():
        if isinstance(value, jax.core.Tracer):
            continue
        numbers = np.asarray(value)
        require(bool(np.isfinite(numbers).all()), name, value, "a finite number")
        if name in positive:
            require(bool((numbers > 0).all()), name, value, "a number above 0")
        elif name in shares:
            require(bool(((numbers >= 0) & (numbers <= 1)).all()), name, value, "a number from 0 to 1")
        elif name.startswith("eta"):
            require(bool((numbers >= 0).all()), name, value, "a number of at least 0")


def policy_scores(
    base: Array, state: UserState, items: Array, mask: Array, config: PersonalisationConfig
) -> tuple[Array, Array]:
    """Scores and probabilities of one user's candidates.

    Args:
      base: [K] scores of the ranker.
      state: of the user, vectors of k numbers.
      items: [K, k].
      mask: [K] which candidates there are.
      config: see `PersonalisationConfig`.

    Returns:
      scores: [K], not divided by tau; -inf where there is no candidate, so that no ranking shows one. A candidate whose
        score is not finite (a broken vector or base score) counts as absent.
      probs: [K], softmax(scores / tau), exactly 0 where there is no candidate; all 0 if there is none.

    Raises:
      SettingError: shapes that do not belong together, or a known number out of range.
    """
    base, items, mask = jnp.asarray(base), jnp.asarray(items), jnp.asarray(mask, bool)
    _check_candidates(state, items, mask, base=base)
    check_config(config)
    tastes = config.beta_long * state.z_long + config.beta_short * state.z_short
    raw = base + jnp.matmul(items, tastes, precision=jax.lax.Precision.HIGHEST)
    mask = mask & jnp.isfinite(raw)
    scores = jnp.where(mask, raw, -jnp.inf)
    best = jnp.max(raw, initial=-jnp.inf, where=mask)
    weights = jnp.where(mask & _is_temperature(config.tau), jnp.exp((raw - best) / config.tau), 0.0)
    total = weights.sum()
    return scores, weights / jnp.where(total > 0, total, 1.0)


def update(
    state: UserState,
    items: Array,
    mask: Array,
    chosen: Array,
    chosen_mask: Array,
    probs: Array,
    reward: Array | float,
    gate: Array | float,
    config: PersonalisationConfig,
) -> tuple[UserState, Array]:
    """One step of REINFORCE for one user: towards the chosen candidates if the reward was above its mean, else away.

    The step is (A / tau) (mean of the chosen vectors - mean under `probs`), the gradient with respect to what the items
    are multiplied with; A = gate (reward - reward_ma) with the baseline before this reward, which itself is not gated.

    Args:
      state: of the user.
      items: [K, k].
      mask: [K] which candidates there are.
      chosen: [C] their places. Entries outside 0 .. K-1 or at masked places are ignored (negative ones do not count
        from the end), floats are cut off towards 0, an item counts once however often it is named.
      chosen_mask: [C] which entries count at all.
      probs: [K] of `policy_scores`, from this state and this tau.
      reward, gate: [] numbers.
      config: see `PersonalisationConfig`.

    Returns:
      The new state, and whether it is one: [] bool. If not (nothing chosen, no advantage, or any number that is not
      finite), the state is the old one, the baseline and the fast vector included.

    Raises:
      SettingError: shapes that do not belong together, or a known number out of range.
    """
    items, mask, probs = jnp.asarray(items), jnp.asarray(mask, bool), jnp.asarray(probs)
    _check_candidates(state, items, mask, probs=probs)
    check_config(config)
    named = _named(jnp.asarray(chosen), jnp.asarray(chosen_mask, bool), mask)
    count = named.sum()
    advantage = gate * (reward - state.reward_ma)
    weights = named / jnp.maximum(count, 1) - jnp.where(mask, probs, 0.0)
    step = advantage / config.tau * _weighted_sum(weights, items)
    moved = UserState(
        state.z_long + config.eta_long * step,
        (1.0 - config.short_decay) * state.z_short + config.eta_short * step,
        (1.0 - config.ema_alpha) * state.reward_ma + config.ema_alpha * reward,
    )
    updated = (count > 0) & (jnp.abs(advantage) >= LEAST_ADVANTAGE) & _is_temperature(config.tau)
    for leaf in moved:
        updated &= jnp.isfinite(leaf).all()
    return jax.tree.map(lambda new, old: jnp.where(updated, new, old), moved, state), updated


def learn(
    state: UserState, interaction: Interaction, config: PersonalisationConfig, probs: Array | None = None
) -> tuple[UserState, Array]:
    """`update` of one user with one interaction; probabilities are those of the state as it is, unless given: [K].

    A candidate that `policy_scores` counts as absent cannot have been served: naming it as chosen does not count. Of
    given probabilities one above 0 says that it was there.
    """
    base, items, mask, chosen, chosen_mask, reward, gate = interaction
    scores, own = policy_scores(base, state, items, mask, config)
    there = jnp.isfinite(scores)
    if probs is None:
        probs = own
    else:
        there |= jnp.asarray(probs) > 0
    mask = jnp.asarray(mask, bool) & there
    return update(state, items, mask, chosen, chosen_mask, probs, reward, gate, config)


def replay(state: UserState, interactions: Interaction, config: PersonalisationConfig) -> tuple[UserState, Array]:
    """One user's interactions one after another: leaves [H, ...] -> the last state, and which were updates, [H]."""
    return jax.lax.scan(lambda state, interaction: learn(state, interaction, config), state, interactions)


@jax.custom_batching.custom_vmap
def _weighted_sum(weights: Array, items: Array) -> Array:
    """Sum of rows: [..., K] and [..., K, k] -> [..., k].

    Rows of weight zero are padding, or candidates that `policy_scores` refused: not even their NaN gets through.
    Looking for it only where the plain sum is not finite saves a third of an update.
    """
    plain = _sum(weights, items)
    careful = lambda: _sum(weights, jnp.where((weights != 0)[..., None], items, 0.0))  # noqa: E731
    return jax.lax.cond(jnp.isfinite(plain).all(), lambda: plain, careful)


@_weighted_sum.def_vmap
def _weighted_sums(users: int, batched: list[bool], weights: Array, items: Array) -> tuple[Array, bool]:
    """One look at all users: under a plain `vmap` both ways would be gone for every one."""
    weights, items = (
        x if there else jnp.broadcast_to(x, (users, *x.shape))
        for x, there in zip((weights, items), batched, strict=True)
    )
    return _weighted_sum(weights, items), True


def _sum(weights: Array, items: Array) -> Array:
    return jnp.einsum("...m,...mi->...i", weights, items, precision=jax.lax.Precision.HIGHEST)


def _named(chosen: Array, chosen_mask: Array, mask: Array) -> Array:
    """[K] which candidates the entries name."""
    require(chosen.ndim == 1, "chosen", chosen.shape, "one axis of places")
    require(chosen_mask.shape == chosen.shape, "chosen_mask", chosen_mask.shape, f"the shape of chosen, {chosen.shape}")
    if jnp.issubdtype(chosen.dtype, jnp.floating):
        chosen = jnp.trunc(chosen.astype(jnp.promote_types(chosen.dtype, jnp.float32)))
    hits = (chosen[:, None] == jnp.arange(mask.shape[0])) & chosen_mask[:, None]
    return hits.any(axis=0) & mask


def _is_temperature(tau: Array | float) -> Array:
    return (jnp.asarray(tau) > 0) & jnp.isfinite(tau)


def _check_candidates(state: UserState, items: Array, mask: Array, **others: Array) -> None:
    size, dim = mask.shape[0] if mask.ndim else -1, state.z_long.shape
    require(items.shape == (size, *dim), "items", items.shape, f"[K, k] = {(size, *dim)}, of the mask and the user")
    for name, value in others.items():
        require(value.shape == (size,), name, value.shape, f"[K] = {(size,)}, of the mask")
