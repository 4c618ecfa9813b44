"""One slate for every user and every turn, found by a black-box search that sees returns only: not personalised.

`make_constant_slate(spec, dims)` gives an `Agent`, so the ordinary loop trains, validates and resumes it. Each training
user is shown one candidate slate all episode long; a step updates on (slate, return) pairs and nothing else. It belongs
in every table: where clicks pull users' tastes, a slate that never changes creates the taste that it serves.

Three stages, by the trajectories seen so far:
1. a hasty search by distribution (`trial` trajectories), so that small budgets end with something;
2. the same from scratch, thoroughly (`search` trajectories). Slot k's items are drawn independently from p_k; after each
   batch p_k moves towards the drawn items, weighted by how far their returns lie above the mean. Returns weigh linearly:
   taking the best tenth instead prefers slates of high variance, which a few users love;
3. races, until training stops: changes of the incumbent, one item or two places each, are shown until they are worse than
   it beyond doubt (and replaced by other changes) or better (and it becomes the challenger).

Methods of this kind: PBIL (Baluja 1994) and UMDA (Muehlenbein 1996) with linear weights; racing as in Maron and Moore
1994. Stage lengths and thresholds were chosen by experiment on the published focused catalogue.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gemsjax.agents.base import Acting, Agent, Choice, Policy
from gemsjax.errors import require, require_count
from gemsjax.maths.randomness import whole_number
from gemsjax.types import Array, Dims, Episode, Key, Metrics, Observation


@dataclasses.dataclass(frozen=True)
class ConstantSlateSpec:
    """Static choices: changing one makes another program.

    Attributes:
      challengers: changes of the incumbent that race at the same time.
      candidates: slates drawn for a step, of which each user gets one at random.
    """

    challengers: int = 32
    candidates: int = 1024


@struct.dataclass
class ConstantSlateHypers:
    """Numbers that may differ between runs of one program.

    Attributes:
      trial, search: trajectories of the first and of the second search by distribution; 0 leaves one out.
      speed: how often such a search replaces its whole distribution on its way, so its rate is speed / trajectories.
      selection: extra weight of a return one standard deviation above the mean.
      control: share of a race's users that see the incumbent.
      doubt: a challenger is out when the incumbent's mean lies this many standard errors above its own ...
      gain: ... or would, if the incumbent were better by this many standard deviations of a return (so that changes
        without effect do not race for ever).
      proof: standard errors by which a challenger must lie above the incumbent to replace it.
      tries, least: trajectories before a challenger may be out, and before it may win.
      exchange: share of changes that exchange two places; the others put a random item in a random place.
    """

    trial: float = 10_000.0
    search: float = 60_000.0
    speed: float = 55.0
    selection: float = 2.0
    control: float = 0.125
    doubt: float = 1.0
    gain: float = 0.02
    proof: float = 2.0
    tries: float = 8.0
    least: float = 64.0
    exchange: float = 0.2


@struct.dataclass
class Race:
    """The incumbent (row 0) and its C challengers, with what they returned.

    Attributes:
      slates: [C+1, K] int32.
      count, total, squares: [C+1] trajectories, the sum of their returns and of the returns' squares.
    """

    slates: Array
    count: Array
    total: Array
    squares: Array


@struct.dataclass
class ConstantSlateState:
    """Everything that an update changes.

    Attributes:
      seen: [] int32, trajectories that were learnt from.
      shares: [K, I] the distribution p_k of each slot's item.
      race: the incumbent, its challengers and their evidence.
      candidates: [M, K] int32, what exploring users are shown in the next step.
    """

    seen: Array
    shares: Array
    race: Race
    candidates: Array


@struct.dataclass
class ConstantSlateNoise:
    """Uniform numbers of one update: `items` [M, K] for the next candidates, `changes` [C+1, 4] for new challengers."""

    items: Array
    changes: Array


def validate_spec(spec: ConstantSlateSpec) -> None:
    """Raise `SettingError` for counts below 1 or too few candidates."""
    require_count("challengers", spec.challengers)
    require_count("candidates", spec.candidates, 2 * spec.challengers)


def validate_hypers(hypers: ConstantSlateHypers) -> None:
    """Raise `SettingError` for a hyper-parameter outside its range (host-side numbers only)."""
    for name, value in vars(hypers).items():
        require(math.isfinite(value) and value >= 0.0, name, value, "a finite number of at least 0")
    require(hypers.speed > 0.0, "speed", hypers.speed, "a positive number")
    require(0.0 < hypers.control < 1.0, "control", hypers.control, "a number between 0 and 1")
    require(hypers.exchange <= 1.0, "exchange", hypers.exchange, "a number in [0, 1]")
    require(hypers.tries >= 1.0, "tries", hypers.tries, "a number of at least 1")


def make_constant_slate(spec: ConstantSlateSpec, dims: Dims, _means: None = None) -> Agent:
    """The search as an agent. Its updates should see each trajectory once: capacity == batch == users of a step.

    Raises:
      SettingError: see `validate_spec`.
    """
    validate_spec(spec)

    def init(key: Key, _hypers: ConstantSlateHypers) -> ConstantSlateState:
        return _init(spec, dims, key)

    def start() -> Array:
        return jnp.full(dims.slate_size, -1, jnp.int32)

    def explore(
        acting: Acting, memory: Array, _seen: Observation, _hidden: None, uniforms: Array
    ) -> tuple[Choice, Array]:
        drawn = acting.state.candidates[whole_number(uniforms[0], spec.candidates)]
        slate = jnp.where(memory < 0, drawn, memory)  # drawn at the first turn, kept from then on
        return Choice(slate, slate), slate

    def greedy(
        acting: Acting, memory: Array, _seen: Observation, _hidden: None, _uniforms: Array
    ) -> tuple[Choice, Array]:
        slate = acting.state.race.slates[0]
        return Choice(slate, slate), memory

    def draw_update(key: Key, _batch: int) -> ConstantSlateNoise:
        items, changes = jax.random.split(key)
        return ConstantSlateNoise(
            jax.random.uniform(items, (spec.candidates, dims.slate_size)),
            jax.random.uniform(changes, (spec.challengers + 1, 4)),
        )

    def update(acting: Acting, batch: Episode, noise: ConstantSlateNoise) -> tuple[ConstantSlateState, Metrics]:
        slates, returns = batch.action[:, 0], batch.reward.sum(axis=1)
        return _update(acting.state, acting.hypers, slates, returns, noise)

    return Agent(init, Policy(start, explore, draws=1), Policy(start, greedy), draw_update, update)


def _init(spec: ConstantSlateSpec, dims: Dims, key: Key) -> ConstantSlateState:
    racing, drawn = jax.random.split(key)
    rows = spec.challengers + 1
    slates = jax.random.randint(racing, (rows, dims.slate_size), 0, dims.num_items)
    nothing = [jnp.zeros(rows) for _ in range(3)]
    return ConstantSlateState(
        seen=jnp.int32(0),
        shares=jnp.full((dims.slate_size, dims.num_items), 1.0 / dims.num_items),
        race=Race(slates, *nothing),
        candidates=jax.random.randint(drawn, (spec.candidates, dims.slate_size), 0, dims.num_items),
    )


def _update(
    state: ConstantSlateState, hypers: Any, slates: Array, returns: Array, noise: ConstantSlateNoise
) -> tuple[ConstantSlateState, Metrics]:
    """Learn from slates [B, K] and their returns [B]."""
    seen = state.seen + returns.shape[0]
    searching = state.seen < hypers.trial + hypers.search
    searched, shares = _search(state, hypers, slates, returns, noise.changes)
    raced = _race(state.race, hypers, slates, returns, noise.changes, state.shares.shape[1])
    race = jax.tree.map(lambda one, other: jnp.where(searching, one, other), searched, raced)
    shares = jnp.where(searching, shares, state.shares)
    drawn = _draw(shares, noise.items)
    rows = jnp.arange(drawn.shape[0])
    challenger = 1 + rows % (race.slates.shape[0] - 1)
    line_up = race.slates[jnp.where(rows < hypers.control * rows.size, 0, challenger)]
    still_searching = seen < hypers.trial + hypers.search
    metrics = {
        "searching": searching.astype(jnp.float32),
        "concentration": shares.max(axis=1).mean(),
        "incumbent_trajectories": race.count[0],
        "incumbent_return": race.total[0] / jnp.maximum(race.count[0], 1.0),
    }
    return ConstantSlateState(seen, shares, race, jnp.where(still_searching, drawn, line_up)), metrics


# -- search by distribution --------------------------------------------------------------------------------------------


def _search(
    state: ConstantSlateState, hypers: Any, slates: Array, returns: Array, uniforms: Array
) -> tuple[Race, Array]:
    """Move the distribution; at the end of the trial start again, at the end of the search line up for the races."""
    on_trial = state.seen < hypers.trial
    seen = state.seen + returns.shape[0]
    length = jnp.where(on_trial, hypers.trial, hypers.search)
    step = jnp.minimum(1.0, hypers.speed * returns.shape[0] / jnp.maximum(length, 1.0))
    shares = (1.0 - step) * state.shares + step * _favoured(state.shares, hypers.selection, slates, returns)
    mode = shares.argmax(axis=1).astype(jnp.int32)
    over = seen >= hypers.trial + hypers.search
    # The trial's incumbent is its latest mode. The thorough search's mode takes over only at its end: until then, its
    # distribution is wider than what the trial has found.
    old = state.race.slates[0]
    incumbent = jnp.where(on_trial | over | (hypers.trial < 1.0), mode, old)
    line_up = jax.vmap(_change, (None, 0, None, None))(incumbent, uniforms, hypers.exchange, shares.shape[1])
    line_up = line_up.at[0].set(incumbent).at[1].set(old)  # the first challenger is what the trial has found
    race = dataclasses.replace(state.race, slates=line_up)
    restart = on_trial & (seen >= hypers.trial) & ~over
    return race, jnp.where(restart, 1.0 / shares.shape[1], shares)


def _favoured(shares: Array, selection: Array, slates: Array, returns: Array) -> Array:
    """Frequencies of the items in each slot, weighted by `1 + selection * standardised return`, at least 0: [K, I]."""
    score = (returns - returns.mean()) / jnp.maximum(returns.std(), 1e-6)
    weight = jnp.maximum(0.0, 1.0 + selection * score)
    slots = jnp.broadcast_to(jnp.arange(slates.shape[1]), slates.shape)
    return jnp.zeros_like(shares).at[slots, slates].add((weight / weight.sum())[:, None])


def _draw(shares: Array, uniforms: Array) -> Array:
    """Slates whose slot k holds item i with probability shares[k, i]: uniforms [M, K] -> [M, K] int32."""
    edges = jnp.cumsum(shares, axis=1)
    find = jax.vmap(lambda edges, uniforms: jnp.searchsorted(edges, uniforms * edges[-1], side="right"), (0, 1), 1)
    return jnp.minimum(find(edges, uniforms), shares.shape[1] - 1).astype(jnp.int32)


# -- races -------------------------------------------------------------------------------------------------------------


def _race(race: Race, hypers: Any, slates: Array, returns: Array, uniforms: Array, num_items: int) -> Race:
    """Add the evidence, let at most one challenger win, and replace those that are out."""
    shown = (slates[:, None] == race.slates).all(axis=-1).astype(jnp.float32)
    race = Race(
        race.slates, race.count + shown.sum(axis=0), race.total + returns @ shown, race.squares + returns**2 @ shown
    )
    mean = race.total / jnp.maximum(race.count, 1.0)
    everyone = jnp.maximum(race.count.sum(), 1.0)
    # One variance for all: a few returns of a challenger would not tell its own.
    variance = race.squares.sum() / everyone - jnp.square(race.total.sum() / everyone)
    deviation = jnp.sqrt(jnp.maximum(variance, 0.0))
    error = deviation * jnp.sqrt(1.0 / jnp.maximum(race.count, 1e-6) + 1.0 / jnp.maximum(race.count[0], 1e-6))
    lead = mean - mean[0]
    rows = jnp.arange(mean.size)
    racing = (rows > 0) & (race.count[0] > 0)
    out = racing & (race.count >= hypers.tries) & (lead + hypers.doubt * error <= hypers.gain * deviation)
    wins = racing & (race.count >= hypers.least) & (lead > hypers.proof * error)
    fresh = jax.vmap(_change, (None, 0, None, None))(race.slates[0], uniforms, hypers.exchange, num_items)
    best = jnp.argmax(jnp.where(wins, lead, 0.0))  # 0, the incumbent, if there is no winner
    # A winner was chosen for its luck too: as incumbent it starts without evidence. The old one keeps its own and
    # races against it, so that a wrong step is taken back.
    swapped = jax.tree.map(lambda x: x.at[0].set(x[best]).at[best].set(x[0]), race)
    replaced = out & (rows != best)
    kept = 1.0 - (replaced | ((rows == 0) & (best > 0)))
    return Race(
        jnp.where(replaced[:, None], fresh, swapped.slates),
        swapped.count * kept,
        swapped.total * kept,
        swapped.squares * kept,
    )


def _change(slate: Array, uniforms: Array, exchange: Array, num_items: int) -> Array:
    """`slate` [K] with two places exchanged, or with a random item in a random place, from 4 uniform numbers."""
    size = slate.shape[0]
    place, item = whole_number(uniforms[1], size), whole_number(uniforms[2], num_items)
    other = (place + 1 + whole_number(uniforms[3], max(size - 1, 1))) % size
    exchanged = slate.at[place].set(slate[other]).at[other].set(slate[place])
    return jnp.where(uniforms[0] < exchange, exchanged, slate.at[place].set(item))
