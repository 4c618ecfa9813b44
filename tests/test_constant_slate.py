"""The constant slate: the best one is found where it is known, from returns alone, and everybody sees it."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemsjax.agents import constant_slate
from gemsjax.agents.base import Acting
from gemsjax.agents.constant_slate import ConstantSlateHypers, ConstantSlateSpec, Race
from gemsjax.errors import SettingError
from gemsjax.rollout import episodes
from gemsjax.train import Plan, Run, make_training
from gemsjax.types import Array, Dims, Episode, Key, Observation

ITEMS, SLOTS, HORIZON, USERS, STEPS = 12, 3, 4, 64, 240
SPEC = ConstantSlateSpec(challengers=8, candidates=64)


class Worth(NamedTuple):
    """What a turn pays: `sure` [K, I] by slot and item, and `lucky` [K, I] more to one user in four."""

    sure: Array
    lucky: Array


class Customer(NamedTuple):
    """A user: whether it is one of the lucky ones."""

    lucky: Array


@dataclasses.dataclass(frozen=True)
class SlotWorld:
    """Slots pay on their own, plus noise, so the best constant slate has each slot's best item on average."""

    num_items: int = ITEMS
    slate_size: int = SLOTS
    horizon: int = HORIZON
    draws: int = 1

    def reset(self, key: Key, worth: Worth) -> tuple[Observation, Customer]:
        return Observation(jnp.arange(SLOTS), jnp.zeros(SLOTS, bool)), Customer(jax.random.uniform(key) < 0.25)

    def play(self, uniforms: Array, user: Customer, slate: Array, worth: Worth) -> tuple:
        slots = jnp.arange(SLOTS)
        reward = worth.sure[slots, slate].sum() + user.lucky * worth.lucky[slots, slate].sum() + uniforms[0] - 0.5
        seen = Observation(slate, uniforms[0] < jnp.linspace(0.2, 0.8, SLOTS))
        return seen, user, reward, jnp.bool_(False), jnp.bool_(False), {}


WORLD, DIMS = SlotWorld(), Dims(ITEMS, SLOTS, HORIZON)
AGENT = constant_slate.make_constant_slate(SPEC, DIMS)
HYPERS = ConstantSlateHypers(trial=500.0, search=1000.0, races=1000.0, growth=2.0, speed=40.0)
RACES_ONLY = ConstantSlateHypers(trial=0.0, search=0.0, races=1e9)


def as_arrays(tree):
    return jax.tree.map(jnp.float32, tree)


def worth_of(best: list[int], gamble: int | None = None) -> Worth:
    """A random world of worths below 0.7, in which `best` pays 1 a slot; `gamble` in slot 0 pays 2.4 to the lucky."""
    sure = np.random.default_rng(0).uniform(0.0, 0.7, (SLOTS, ITEMS))
    lucky = np.zeros((SLOTS, ITEMS))
    sure[range(SLOTS), best] = 1.0
    if gamble is not None:
        sure[0, gamble], lucky[0, gamble] = 0.0, 2.4
    return as_arrays(Worth(sure, lucky))


@pytest.fixture(scope="module")
def trained():
    """`(worth, hypers, seed) -> agent's state`: one program for the probes."""
    plan = Plan(users_per_step=USERS, batch_size=USERS, replay_capacity=USERS, warm_up=0)
    training = make_training(WORLD, AGENT, plan)

    @jax.jit
    def train(run: Run):
        return training.steps(run, training.init(run), jnp.arange(STEPS))[0].agent

    return lambda worth, hypers=HYPERS, seed=0: train(Run(jax.random.key(seed), as_arrays(hypers), (), worth))


@pytest.mark.parametrize("hypers", [HYPERS, RACES_ONLY], ids=["search and races", "races only"])
@pytest.mark.parametrize("best, seed", [([3, 3, 7], 0), ([0, 11, 5], 1)])
def test_the_best_slate_is_found(trained, best, seed, hypers):
    found = trained(worth_of(best), hypers, seed)
    assert found.race.slates[-1].tolist() == best


@pytest.mark.parametrize("hypers", [HYPERS, RACES_ONLY], ids=["search and races", "races only"])
def test_what_pays_on_average_beats_what_pays_a_few_a_lot(trained, hypers):
    """The gamble pays 0.6 on average; the best returns all come from it."""
    assert trained(worth_of([3, 3, 7], gamble=5), hypers).race.slates[-1].tolist() == [3, 3, 7]


# -- what is shown -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def state():
    return AGENT.init(jax.random.key(5), HYPERS)


def test_a_user_keeps_the_candidate_that_it_drew(state):
    play = jax.jit(partial(episodes, WORLD, AGENT.explore))
    keys = jax.random.split(jax.random.key(0), USERS)
    shown = np.asarray(play(keys, worth_of([0, 0, 0]), Acting(state)).action)
    assert (shown == shown[:, :1]).all()
    first = {tuple(slate) for slate in shown[:, 0].tolist()}
    assert first <= {tuple(slate) for slate in state.candidates.tolist()}
    assert len(first) > USERS / 3  # of 64 draws from 64 candidates, 40 differ on average


def test_everybody_is_shown_the_champion(state):
    play = jax.jit(partial(episodes, WORLD, AGENT.greedy))
    keys = jax.random.split(jax.random.key(0), USERS)
    shown = np.asarray(play(keys, worth_of([0, 0, 0]), Acting(state)).action)
    assert (shown == np.asarray(state.race.slates[-1])).all()


# -- what is learnt from -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def update():
    return jax.jit(AGENT.update)


def batch_of(slates: Array, reward: Array, key: Key) -> Episode:
    """Episodes [B, H] of constant slates [B, K] with random clicks."""
    shown = jnp.repeat(slates[:, None], HORIZON, axis=1)
    clicks = jax.random.bernoulli(key, 0.5, (*shown.shape[:2], SLOTS))
    return Episode(Observation(shown, clicks), shown, reward, Observation(slates, clicks[:, 0]))


@pytest.mark.parametrize("hypers", [HYPERS, RACES_ONLY], ids=["search", "races"])
def test_only_returns_are_seen(state, update, hypers):
    keys = jax.random.split(jax.random.key(2), 4)
    noise = AGENT.draw_update(keys[0], USERS)
    reward = jax.random.randint(keys[1], (USERS, HORIZON), 0, 4).astype(jnp.float32)
    acting = Acting(state, as_arrays(hypers))
    slates = state.race.slates[jnp.arange(USERS) % (SPEC.challengers + 2)]
    batch = batch_of(slates, reward, keys[2])
    other = batch_of(slates, reward[:, ::-1], keys[3])  # other clicks, other turns, the same returns
    one, two = update(acting, batch, noise)[0], update(acting, other, noise)[0]
    jax.tree.map(np.testing.assert_array_equal, one, two)
    third = update(acting, dataclasses.replace(batch, reward=reward.at[0].add(9.0)), noise)[0]
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(third), strict=True))


def race_with(state, counts: list[float], means: list[float]):
    """A state in the middle of races whose first rows have this evidence, with a deviation of 1."""
    rows = state.race.slates.shape[0]
    count, mean = (jnp.zeros(rows).at[: len(x)].set(jnp.array(x)) for x in (counts, means))
    slates = (jnp.arange(rows)[:, None] + jnp.arange(SLOTS)) % ITEMS
    race = Race(slates, count, count * mean, count * (mean**2 + 1.0))
    return dataclasses.replace(state, race=race, round=jnp.int32(1), leads=jnp.bool_(False))


def test_a_winner_starts_without_evidence_and_the_loser_may_come_back(state, update):
    before = race_with(state, [400.0, 400.0, 400.0, 400.0], [5.0, 5.5, 5.02, 3.0])
    nobody = jnp.zeros((USERS, SLOTS), jnp.int32)  # a slate that is not in the race
    batch = batch_of(nobody, jnp.zeros((USERS, HORIZON)), jax.random.key(0))
    noise = AGENT.draw_update(jax.random.key(1), USERS)
    after = update(Acting(before, as_arrays(RACES_ONLY)), batch, noise)[0].race
    slates = before.race.slates
    assert (after.slates[0] == slates[1]).all() and after.count[0] == 0  # won
    assert (after.slates[1] == slates[0]).all() and after.total[1] == 2000.0  # was the incumbent
    assert (after.slates[2] == slates[2]).all() and after.count[2] == 400  # undecided
    assert after.count[3] == 0  # out: replaced by a change of the incumbent of that moment
    assert 0 < int((after.slates[3] != slates[0]).sum()) <= 2 or (after.slates[3] == slates[0]).all()


def test_races_show_the_incumbent_to_its_share_and_the_challengers_evenly(state, update):
    before = race_with(state, [400.0, 100.0], [5.0, 5.0])
    batch = batch_of(before.race.slates[:1].repeat(USERS, 0), jnp.ones((USERS, HORIZON)), jax.random.key(0))
    noise = AGENT.draw_update(jax.random.key(1), USERS)
    after = update(Acting(before, as_arrays(RACES_ONLY)), batch, noise)[0]
    match = (after.candidates[:, None] == after.race.slates).all(axis=-1)
    assert match.any(axis=1).all()
    assert match[:, 0].sum() == 8  # an eighth of 64
    assert after.race.count[0] == 400 + USERS


def test_a_round_starts_from_nothing_and_its_incumbent_has_to_beat_the_champion(state, update):
    hypers = as_arrays(ConstantSlateHypers(trial=0.0, search=10.0, races=10.0, growth=1e6))
    before = dataclasses.replace(race_with(state, [400.0], [5.0]), leads=jnp.bool_(True))
    slates = before.race.slates[:1].repeat(USERS, 0)
    batch = batch_of(slates, jnp.full((USERS, HORIZON), 1.0), jax.random.key(0))
    noise = AGENT.draw_update(jax.random.key(1), USERS)
    after = update(Acting(before, hypers), batch, noise)[0]  # one batch is both of its stages
    assert int(after.round) == 2 and int(after.seen) == 0 and not bool(after.leads)
    np.testing.assert_allclose(after.shares, 1 / ITEMS, rtol=1e-6)
    champion = [9, 9, 9]

    def crowned(mean: float) -> list[int]:
        """Whom everybody is shown when the new incumbent has this mean, the champion 5, each after 400 trajectories."""
        race = race_with(state, [400.0], [mean]).race
        race = jax.tree.map(lambda x, value: x.at[-1].set(value), race, Race(jnp.array(champion), 400.0, 2e3, 1.04e4))
        raced = dataclasses.replace(after, race=race, seen=jnp.int32(10**8))
        nobody = batch_of(jnp.zeros((USERS, SLOTS), jnp.int32), jnp.zeros((USERS, HORIZON)), jax.random.key(0))
        return update(Acting(raced, hypers), nobody, noise)[0].race.slates[-1].tolist()

    assert crowned(5.05) == champion
    assert crowned(5.5) == before.race.slates[0].tolist()


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [{"trial": -1.0}, {"speed": 0.0}, {"control": 1.0}, {"exchange": 1.5}, {"tries": 0.5}, {"proof": float("nan")}],
)
def test_hypers_out_of_range_are_refused(wrong):
    with pytest.raises(SettingError, match=next(iter(wrong))):
        constant_slate.validate_hypers(ConstantSlateHypers(**wrong))


@pytest.mark.parametrize("wrong", [{"challengers": 0}, {"challengers": 40, "candidates": 64}])
def test_specs_out_of_range_are_refused(wrong):
    with pytest.raises(SettingError, match="challengers|candidates"):
        constant_slate.make_constant_slate(ConstantSlateSpec(**wrong), DIMS)


def test_the_defaults_are_accepted():
    assert constant_slate.validate_hypers(ConstantSlateHypers()) is None
    assert constant_slate.validate_spec(ConstantSlateSpec()) is None
