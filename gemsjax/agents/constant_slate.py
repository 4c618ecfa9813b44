"""One slate for every user and every turn, found by a black-box search that sees returns only: not personalised.

`make_constant_slate(spec, dims)` gives an `Agent`, so the ordinary loop trains, validates and resumes it. Each training
user is shown one candidate slate all episode long; a step updates on (slate, return) pairs and nothing else. It belongs
in every table: where clicks pull users' tastes, a slate that never changes creates the taste that it serves.

It goes in rounds, each of two stages:
1. a search by distribution. Slot k's items are drawn independently from p_k; after each batch p_k moves towards the
   items of the better slates, weighted by how far their returns lie above a threshold near the mean. (To keep just the
   best tenth is to prefer slates that a few users love to what is good on average.)
2. races. Changes of the incumbent (one item, half of them drawn from p_k, or two places) are shown until they fall
   behind and another change takes their place, or lead beyond doubt and become the incumbent.
The first round is hasty and has no races, so that small budgets end with something. Each later one starts from nothing,
is `growth` times as long, and so ends higher; its incumbent is shown to nobody outside training before it has beaten
the champion, the best slate of the rounds before. So there is no budget to be set: training may stop at any time.

Methods of this kind: PBIL (Baluja 1994) and UMDA (Muehlenbein and Paass 1996); races after Maron and Moore (1994).
Lengths and thresholds were chosen on focused TopDown with the published catalogue. Test returns there: about 300 after
10,000 trajectories, 360 to 395 after 100,000 (six seeds), 406 and 417 after 2 million (two seeds); plain hill climbing
had 349 and 390 after 96,000 and 1.6 million.
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
      trial: trajectories of the hasty first round; 0 leaves it out.
      search, races: trajectories of both stages of the second round.
      growth: how much longer each round is than the one before.
      speed: how often such a search replaces its whole distribution on its way, so its rate is speed / trajectories.
      threshold: a search learns from the returns that lie more than this many standard deviations above the mean, in
        proportion to what they have above that.
      control: share of a race's users that see the incumbent.
      doubt: a challenger is out when the incumbent's mean lies this many standard errors above its own ...
      gain: ... or would, if the incumbent were better by this many standard deviations of a return (so that changes
        without effect do not race for ever).
      proof: standard errors by which a challenger must lie above the incumbent to replace it.
      tries, least: trajectories before a challenger may be out, and before it may win.
      exchange: share of changes that exchange two places; the others put another item in a random place.
      learnt: share of such items that are drawn from what the search has learnt, not from the whole catalogue.
    """

    trial: float = 10_000.0
    search: float = 40_000.0
    races: float = 50_000.0
    growth: float = 4.0
    speed: float = 15.0
    threshold: float = 0.3
    control: float = 0.125
    doubt: float = 1.0
    gain: float = 0.02
    proof: float = 2.0
    tries: float = 8.0
    least: float = 64.0
    exchange: float = 0.2
    learnt: float = 0.5


@struct.dataclass
class Race:
    """The incumbent (row 0), its C challengers, the champion (last row), and what they returned.

    Attributes:
      slates: [C+2, K] int32.
      count, total, squares: [C+2] trajectories, the sum of their returns and of the returns' squares.
    """

    slates: Array
    count: Array
    total: Array
    squares: Array


@struct.dataclass
class ConstantSlateState:
    """Everything that an update changes.

    Attributes:
      round: [] int32, 0 is the hasty one.
      seen: [] int32, trajectories of this round that were learnt from.
      leads: [] bool, whether this round's incumbent is the champion.
      shares: [K, I] the distribution p_k of each slot's item.
      race: incumbent, challengers, champion and their evidence.
      candidates: [M, K] int32, what exploring users are shown in the next step.
    """

    round: Array
    seen: Array
    leads: Array
    shares: Array
    race: Race
    candidates: Array


@struct.dataclass
class ConstantSlateNoise:
    """Uniform numbers of one update: `items` [M, K] for the next candidates, `changes` [C+2, 5] for new challengers."""

    items: Array
    changes: Array


def validate_spec(spec: ConstantSlateSpec) -> None:
    """Raise `SettingError` for counts below 1 or too few candidates."""
    require_count("challengers", spec.challengers)
    require_count("candidates", spec.candidates, 2 * spec.challengers)


def validate_hypers(hypers: ConstantSlateHypers) -> None:
    """Raise `SettingError` for a hyper-parameter outside its range (host-side numbers only)."""
    for name, value in vars(hypers).items():
        sign = name == "threshold" or value >= 0.0
        require(
            math.isfinite(value) and sign, name, value, "a finite number" + " of at least 0" * (name != "threshold")
        )
    require(hypers.growth >= 1.0, "growth", hypers.growth, "a number of at least 1")
    require(hypers.search + hypers.races >= 1.0, "search", hypers.search, "with races, at least one trajectory")
    require(hypers.speed > 0.0, "speed", hypers.speed, "a positive number")
    require(0.0 < hypers.control < 1.0, "control", hypers.control, "a number between 0 and 1")
    for name in ("exchange", "learnt"):
        require(getattr(hypers, name) <= 1.0, name, getattr(hypers, name), "a number in [0, 1]")
    require(hypers.tries >= 1.0, "tries", hypers.tries, "a number of at least 1")


def make_constant_slate(spec: ConstantSlateSpec, dims: Dims, _means: None = None) -> Agent:
    """The search as an agent. Its updates should see each trajectory once: capacity == batch == users of a step.

    Raises:
      SettingError: see `validate_spec`.
    """
    validate_spec(spec)

    def init(key: Key, hypers: ConstantSlateHypers) -> ConstantSlateState:
        return _init(spec, dims, key, hypers)

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
        slate = acting.state.race.slates[-1]
        return Choice(slate, slate), memory

    def draw_update(key: Key, _batch: int) -> ConstantSlateNoise:
        items, changes = jax.random.split(key)
        return ConstantSlateNoise(
            jax.random.uniform(items, (spec.candidates, dims.slate_size)),
            jax.random.uniform(changes, (spec.challengers + 2, 5)),
        )

    def update(acting: Acting, batch: Episode, noise: ConstantSlateNoise) -> tuple[ConstantSlateState, Metrics]:
        slates, returns = batch.action[:, 0], batch.reward.sum(axis=1)
        return _update(acting.state, acting.hypers, slates, returns, noise)

    return Agent(init, Policy(start, explore, draws=1), Policy(start, greedy), draw_update, update)


def _init(spec: ConstantSlateSpec, dims: Dims, key: Key, hypers: Any) -> ConstantSlateState:
    racing, drawn = jax.random.split(key)
    rows = spec.challengers + 2
    slates = jax.random.randint(racing, (rows, dims.slate_size), 0, dims.num_items)
    nothing = [jnp.zeros(rows) for _ in range(3)]
    return ConstantSlateState(
        round=jnp.where(jnp.asarray(hypers.trial) > 0.0, 0, 1).astype(jnp.int32),
        seen=jnp.int32(0),
        leads=jnp.bool_(True),
        shares=jnp.full((dims.slate_size, dims.num_items), 1.0 / dims.num_items),
        race=Race(slates, *nothing),
        candidates=jax.random.randint(drawn, (spec.candidates, dims.slate_size), 0, dims.num_items),
    )


def _update(
    state: ConstantSlateState, hypers: Any, slates: Array, returns: Array, noise: ConstantSlateNoise
) -> tuple[ConstantSlateState, Metrics]:
    """Learn from slates [B, K] and their returns [B]."""
    search, races = _lengths(state.round, hypers)
    seen = state.seen + returns.shape[0]
    searching = state.seen < search
    moved = _search(state.shares, hypers, search, slates, returns)
    mode = moved.argmax(axis=1).astype(jnp.int32)
    lined_up = _line_up(state.race, mode, _changes(mode, noise.changes, hypers, moved))
    changes = _changes(state.race.slates[0], noise.changes, hypers, state.shares)
    raced = _race(state.race, hypers, slates, returns, changes)
    race = jax.tree.map(lambda one, other: jnp.where(searching, one, other), lined_up, raced)
    race, leads = _crown(race, state.leads, hypers)

    over = seen >= search + races
    following = jnp.where(over, state.round + 1, state.round)
    seen = jnp.where(over, 0, seen)
    searches = seen < _lengths(following, hypers)[0]
    shares = jnp.where(over, 1.0 / moved.shape[1], jnp.where(searching, moved, state.shares))
    candidates = jnp.where(searches, _draw(shares, noise.items), _shown(race, hypers.control, noise.items.shape[0]))
    metrics = {
        "round": state.round.astype(jnp.float32),
        "searching": searching.astype(jnp.float32),
        "concentration": moved.max(axis=1).mean(),
        "champion_return": race.total[-1] / jnp.maximum(race.count[-1], 1.0),
        "champion_trajectories": race.count[-1],
    }
    # A new round's incumbent has to beat the champion first (there is none without a search).
    return ConstantSlateState(following, seen, leads & ~(over & searches), shares, race, candidates), metrics


def _lengths(number: Array, hypers: Any) -> tuple[Array, Array]:
    """Trajectories of the two stages of a round."""
    longer = hypers.growth ** jnp.maximum(number - 1, 0)
    return jnp.where(number > 0, hypers.search * longer, hypers.trial), jnp.where(
        number > 0, hypers.races * longer, 0.0
    )


def _crown(race: Race, leads: Array, hypers: Any) -> tuple[Race, Array]:
    """The race with its champion: the incumbent, from when it has beaten the champion of the rounds before."""
    lead, error, _ = _leads(race, -1)
    known = jnp.minimum(race.count[0], race.count[-1]) >= hypers.least
    leads = leads | (known & (lead[0] > hypers.proof * error[0]))
    return jax.tree.map(lambda x: x.at[-1].set(jnp.where(leads, x[0], x[-1])), race), leads


def _shown(race: Race, control: Array, size: int) -> Array:
    """Candidates [size, K] of a race: the incumbent in its share, the others evenly."""
    rows = jnp.arange(size)
    return race.slates[jnp.where(rows < control * size, 0, 1 + rows % (race.count.size - 1))]


# -- search by distribution --------------------------------------------------------------------------------------------


def _search(shares: Array, hypers: Any, length: Array, slates: Array, returns: Array) -> Array:
    """The distribution after a batch of a search of this length."""
    step = jnp.minimum(1.0, hypers.speed * returns.shape[0] / jnp.maximum(length, 1.0))
    return (1.0 - step) * shares + step * _favoured(shares, hypers.threshold, slates, returns)


def _favoured(shares: Array, threshold: Array, slates: Array, returns: Array) -> Array:
    """Frequencies of the items in each slot, weighted by what the returns have above the threshold: [K, I]."""
    score = (returns - returns.mean()) / jnp.maximum(returns.std(), 1e-6)
    weight = jnp.maximum(0.0, score - threshold)
    weight = jnp.where(weight.sum() > 0.0, weight, 1.0)  # there may be none above
    slots = jnp.broadcast_to(jnp.arange(slates.shape[1]), slates.shape)
    return jnp.zeros_like(shares).at[slots, slates].add((weight / weight.sum())[:, None])


def _draw(shares: Array, uniforms: Array) -> Array:
    """Slates whose slot k holds item i with probability shares[k, i]: uniforms [M, K] -> [M, K] int32."""
    edges = jnp.cumsum(shares, axis=1)
    find = jax.vmap(lambda edges, uniforms: jnp.searchsorted(edges, uniforms * edges[-1], side="right"), (0, 1), 1)
    return jnp.minimum(find(edges, uniforms), shares.shape[1] - 1).astype(jnp.int32)


# -- races -------------------------------------------------------------------------------------------------------------


def _line_up(race: Race, incumbent: Array, changes: Array) -> Race:
    """A race of `incumbent` [K] against `changes` of it [C+2, K]; only the champion keeps its evidence."""
    champion = jnp.arange(race.count.size) == race.count.size - 1
    slates = jnp.where(champion[:, None], race.slates, changes.at[0].set(incumbent))
    return Race(slates, *(jnp.where(champion, x, 0.0) for x in (race.count, race.total, race.squares)))


def _leads(race: Race, row: int) -> tuple[Array, Array, Array]:
    """Each mean less that of `row` [C+2], the standard error of that [C+2], and the deviation of a return []."""
    mean = race.total / jnp.maximum(race.count, 1.0)
    # One variance for all: a few returns of a challenger would not tell its own.
    everyone = jnp.maximum(race.count.sum(), 1.0)
    variance = race.squares.sum() / everyone - jnp.square(race.total.sum() / everyone)
    deviation = jnp.sqrt(jnp.maximum(variance, 0.0))
    some = jnp.maximum(race.count, 1e-6)
    return mean - mean[row], deviation * jnp.sqrt(1.0 / some + 1.0 / some[row]), deviation


def _race(race: Race, hypers: Any, slates: Array, returns: Array, changes: Array) -> Race:
    """Add the evidence, let at most one challenger win, and replace those that are out by `changes` [C+2, K]."""
    shown = (slates[:, None] == race.slates).all(axis=-1).astype(jnp.float32)
    race = Race(
        race.slates, race.count + shown.sum(axis=0), race.total + returns @ shown, race.squares + returns**2 @ shown
    )
    lead, error, deviation = _leads(race, 0)
    rows = jnp.arange(race.count.size)
    racing = (rows > 0) & (rows < rows.size - 1) & (race.count[0] > 0)
    out = racing & (race.count >= hypers.tries) & (lead + hypers.doubt * error <= hypers.gain * deviation)
    wins = racing & (race.count >= hypers.least) & (lead > hypers.proof * error)
    best = jnp.argmax(jnp.where(wins, lead, 0.0))  # 0, the incumbent, if there is no winner
    # A winner was chosen for its luck too: as incumbent it starts without evidence. The old one keeps its own and
    # races against it, so that a wrong step is taken back.
    swapped = jax.tree.map(lambda x: x.at[0].set(x[best]).at[best].set(x[0]), race)
    replaced = out & (rows != best)
    kept = 1.0 - (replaced | ((rows == 0) & (best > 0)))
    return Race(
        jnp.where(replaced[:, None], changes, swapped.slates),
        swapped.count * kept,
        swapped.total * kept,
        swapped.squares * kept,
    )


def _changes(slate: Array, uniforms: Array, hypers: Any, shares: Array) -> Array:
    """`slate` [K] with two places exchanged or one item replaced, from 5 uniform numbers each: [n, 5] -> [n, K]."""
    size, num_items = shares.shape
    edges = jnp.cumsum(shares, axis=1)

    def change(uniforms: Array) -> Array:
        place, item = whole_number(uniforms[1], size), whole_number(uniforms[2], num_items)
        of_place = edges[place]
        likely = jnp.minimum(jnp.searchsorted(of_place, uniforms[2] * of_place[-1], side="right"), num_items - 1)
        use = (uniforms[4] < hypers.learnt) & (likely != slate[place])
        other = (place + 1 + whole_number(uniforms[3], max(size - 1, 1))) % size
        exchanged = slate.at[place].set(slate[other]).at[other].set(slate[place])
        replaced = slate.at[place].set(jnp.where(use, likely, item).astype(jnp.int32))
        return jnp.where(uniforms[0] < hypers.exchange, exchanged, replaced)

    return jax.vmap(change)(uniforms)
