"""Ranking policies: score the items of one observation, then draw or rank a slate of them. Pure, one user.

`make_ranking_policy(spec, scorer)` binds the sizes and a network of `nets.scorer`; `vmap` what it returns over users.
The number of available items may vary: `num_actions` tells how many of the first items there are, and every slate comes
with `valid`, which tells its items from padding. Follows TF-Agents' ranking policies, which lack log-probabilities,
`valid` and the scores of the slate. May be called by `ranking.training`, experiments and whoever serves slates.

Left out of TF-Agents' public surface by design: `get_initial_state` and policy states (there is none), time steps,
specs and `validate_args` (shapes are bound by `RankingSpec`, actions never leave [0, N-1]), and
`observation_and_action_constraint_splitter` (`num_actions` says what there is). Where it takes a sampler class from the
caller (`item_sampler`), here a penaliser or a `LogitHook` changes logits between slots; drawing itself stays the same.

Letters: G numbers of a user, N items of D numbers each, S slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from gemsjax.errors import require, require_choice, require_count
from gemsjax.maths.distributions import CertainSlate, PlackettLuce, require_temperature
from gemsjax.maths.plackett_luce import COSINE, Penalty, choices, greedy_slate, valid_slots
from gemsjax.types import Array, Key, Params

KINDS = ("cosine", "no_penalty", "descending", "unknown")
"""`cosine` draws items with a penalty for those like the ones above them, `no_penalty` without, `descending` ranks by
score; `unknown` is `cosine`, as in TF-Agents."""


SlateDistribution = PlackettLuce | CertainSlate


class RankingObservation(NamedTuple):
    """What a policy knows of one user and the items for it (TF-Agents: `global`, `per_arm`, `num_actions`).

    Attributes:
      user: [..., G] features of the user.
      items: [..., N, D] features of the items.
      num_actions: [...] int32, how many of the first items there are; None if all are.
    """

    user: Array
    items: Array
    num_actions: Array | None = None


@struct.dataclass
class RankingHypers:
    """Numbers of a policy, all traced.

    Attributes:
      temperature: scores are divided by it, above 0.
      penalty: mixture coefficient, by which penalties are multiplied; they are not divided by the temperature.
    """

    temperature: Array | float = 1.0
    penalty: Array | float = 1.0


@dataclasses.dataclass(frozen=True)
class RankingSpec:
    """Static choices.

    Attributes:
      num_items: N.
      num_slots: S, at most N.
      kind: one of `KINDS`.
      emit_log_probability: whether slates come with their log-probability (TF-Agents never does).
    """

    num_items: int
    num_slots: int
    kind: str = "cosine"
    emit_log_probability: bool = False


class RankingStep(NamedTuple):
    """A slate and what is told with it.

    Attributes:
      action: [S] int32 in [0, N-1], different items where `valid`. Padding is N-1 under a penalty, else the items that
        are not available, in their order (as TF-Agents pads).
      valid: [S] bool, which slots hold an item that is available.
      predicted_rewards_mean: [N] what the network says of all items, untempered and unmasked; users and items that are
        not finite reach it as zeros, so this is finite for them too.
      slate_scores: [S] the same of the slate's items, 0 where there is none.
      log_prob: [] of the ordered slate; None unless the spec asks for it.
    """

    action: Array
    valid: Array
    predicted_rewards_mean: Array
    slate_scores: Array
    log_prob: Array | None = None


class RankingPolicy(NamedTuple):
    """Pure functions of one user, sizes bound.

    Attributes:
      spec: what it was made from.
      init: `(key, observation) -> variables` of the scorer.
      scores: `(variables, observation) -> [N]`, raw; leading axes are welcome. What is not finite counts as zeros.
      distribution: `(variables, hypers, observation) -> ` a distrax distribution over ordered slates.
      action: `(variables, hypers, observation, key) -> step`; a descending policy needs no key.
      greedy: `(variables, hypers, observation) -> step`: the best item of every slot, penalties included.
    """

    spec: RankingSpec
    init: Callable[[Key, RankingObservation], Params]
    scores: Callable[[Params, RankingObservation], Array]
    distribution: Callable[[Params, RankingHypers, RankingObservation], SlateDistribution]
    action: Callable[[Params, RankingHypers, RankingObservation, Key], RankingStep]
    greedy: Callable[[Params, RankingHypers, RankingObservation], RankingStep]


def check_spec(spec: RankingSpec) -> None:
    """Raise `SettingError` for more slots than items, a count below 1 or an unknown kind."""
    require_count("num_items", spec.num_items)
    require_count("num_slots", spec.num_slots, 1, spec.num_items)
    require_choice("kind", spec.kind, KINDS)


def check_hypers(hypers: RankingHypers) -> None:
    """Raise `SettingError` for a temperature that is not above 0 or a number that is not finite (host-side only).

    Traced ones cannot be looked at: under them, such a policy serves nothing but padding.
    """
    require_temperature(hypers.temperature)
    if not isinstance(hypers.penalty, jax.core.Tracer):
        finite = bool(np.isfinite(np.asarray(hypers.penalty)).all())
        require(finite, "penalty", hypers.penalty, "a finite number")


def make_ranking_policy(spec: RankingSpec, scorer: Any, penaliser: Penalty | None = None) -> RankingPolicy:
    """Bind the sizes, a scorer and, for the kind `cosine`, what it does to the items that are left after every slot.

    Args:
      spec: static choices.
      scorer: a network `(user [..., G], items [..., N, D]) -> [..., N]`, see `nets.scorer`.
      penaliser: how items lower the scores of those like them, or any `LogitHook`; None for the cosine penalty.

    Raises:
      SettingError: see `check_spec`; or a penaliser for a kind that has none.
    """
    check_spec(spec)
    penalised = spec.kind in ("cosine", "unknown")
    require(penalised or penaliser is None, "penaliser", penaliser, f"None, as the kind {spec.kind} has no penalty")
    return _Ranked(spec, scorer, (penaliser or COSINE) if penalised else None).policy()


def available_items(observation: RankingObservation) -> Array | None:
    """[..., N] bool, which items there are; None if all are."""
    if observation.num_actions is None:
        return None
    return jnp.arange(observation.items.shape[-2]) < jnp.asarray(observation.num_actions)[..., None]


def usable_items(observation: RankingObservation) -> Array:
    """[..., N] bool, which items there are with finite features; none for a user whose features are not finite."""
    known = jnp.isfinite(observation.items).all(axis=-1) & jnp.isfinite(observation.user).all(axis=-1)[..., None]
    available = available_items(observation)
    return known if available is None else known & available


def soft_update(own: Params, other: Params, tau: float = 1.0, tau_non_trainable: float | None = None) -> Params:
    """A policy's variables moved towards another's: (1 - tau) own + tau other.

    Args:
      own, other: variables of the same scorer.
      tau: share of the other's parameters; 1 copies them.
      tau_non_trainable: share of its other collections; None for `tau`.

    Raises:
      SettingError: a share outside [0, 1].
    """
    rest = tau if tau_non_trainable is None else tau_non_trainable
    for name, share in (("tau", tau), ("tau_non_trainable", rest)):
        require(0.0 <= share <= 1.0, name, share, "a number from 0 to 1")
    shares = {name: tau if name == "params" else rest for name in own}
    return {name: optax.incremental_update(other[name], value, shares[name]) for name, value in own.items()}


@dataclasses.dataclass(frozen=True)
class _Ranked:
    """A policy with its parts bound; `penaliser` is None for plain Plackett-Luce and for descending scores."""

    spec: RankingSpec
    scorer: Any
    penaliser: Penalty | None

    def policy(self) -> RankingPolicy:
        return RankingPolicy(self.spec, self.init, self.scores, self.distribution, self.action, self.greedy)

    def init(self, key: Key, observation: RankingObservation) -> Params:
        return self.scorer.init(key, observation.user, observation.items)

    def scores(self, variables: Params, observation: RankingObservation) -> Array:
        # Numbers that are not finite must not reach the network, not even where its score counts nothing: the
        # parameters' gradient would multiply them by zero, which is NaN.
        user, items = (jnp.where(jnp.isfinite(x), x, 0.0) for x in (observation.user, observation.items))
        return self.scorer.apply(variables, user, items)

    def distribution(
        self, variables: Params, hypers: RankingHypers, observation: RankingObservation
    ) -> SlateDistribution:
        there = usable_items(observation)
        # Padding may hold anything, numbers that overflow inside of the network included.
        items = jnp.where(there[..., None], observation.items, 0.0)
        return self._slates(self.scores(variables, observation._replace(items=items)), hypers, observation)

    def action(
        self, variables: Params, hypers: RankingHypers, observation: RankingObservation, key: Key
    ) -> RankingStep:
        if self.spec.kind == "descending":
            return self.greedy(variables, hypers, observation)
        return self._step(variables, hypers, observation, lambda slates: slates.sample(seed=key))

    def greedy(self, variables: Params, hypers: RankingHypers, observation: RankingObservation) -> RankingStep:
        return self._step(variables, hypers, observation, lambda slates: slates.mode())

    def _slates(self, scores: Array, hypers: RankingHypers, observation: RankingObservation) -> SlateDistribution:
        """The distribution over slates for scores [N]."""
        self._check(observation)
        available, size = usable_items(observation), self.spec.num_slots
        if self.spec.kind == "descending":
            given = choices(scores, available)
            return CertainSlate(greedy_slate(given, None, size), valid_slots(given.logits, size))
        check_hypers(hypers)
        return PlackettLuce(
            scores,
            size,
            temperature=hypers.temperature,
            available=available,
            features=observation.items,
            mixture=hypers.penalty,
            penaliser=self.penaliser,
        )

    def _check(self, observation: RankingObservation) -> None:
        found = observation.items.shape
        fits = len(found) == 2 and found[0] == self.spec.num_items
        require(fits, "items", found, f"one user's [{self.spec.num_items}, features]; vmap over users")

    def _step(
        self,
        variables: Params,
        hypers: RankingHypers,
        observation: RankingObservation,
        pick: Callable[[SlateDistribution], Array],
    ) -> RankingStep:
        scores = self.scores(variables, observation)
        slates = self._slates(scores, hypers, observation)
        slate, valid = pick(slates), slates.valid
        log_prob = slates.log_prob(slate) if self.spec.emit_log_probability else None
        own = jnp.where(valid, scores[slate], 0.0)
        if self.penaliser is not None:
            slate = jnp.where(valid, slate, self.spec.num_items - 1)
        return RankingStep(slate, valid, scores, own, log_prob)
