"""The REINFORCE family: worlds whose best policy is known, whose action gets which credit, and its equations."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import HORIZON, ITEMS, ProbeEnv, Rules

from gemsjax.agents import reinforce, reinforce_batch, reinforce_softmax
from gemsjax.agents.actor import outcomes
from gemsjax.agents.base import Acting
from gemsjax.errors import SettingError
from gemsjax.maths.categorical import draw_items, log_hit
from gemsjax.maths.returns import return_to_go
from gemsjax.rankers import Ranker
from gemsjax.rollout import episodes, returns
from gemsjax.types import Array, Dims, Episode, Key, Observation

SIZES = {"hidden": 32, "belief_width": 8, "item_dim": 4}
QUICK = {"xla_backend_optimization_level": 0}
"""These programs are tiny: most of their time would be the compiler's."""
BAIT = 0.2

# -- worlds ------------------------------------------------------------------------------------------------------------


class Tastes(NamedTuple):
    """How much is paid for each item shown, by its group.

    Attributes:
      liked: for an item of the group that the user likes, at once; such items are clicked.
      later: for an item of group 1, a turn later; then clicks are coins, which tell and pay nothing.
      bait: for an item of group 0, at once.
    """

    liked: float = 0.0
    later: float = 0.0
    bait: float = 0.0


@dataclasses.dataclass(frozen=True)
class SlateEnv:
    """Slates of three out of seven items: three of group 0, three of group 1, one of neither.

    A user likes one group and shows it by its clicks on the first slate, which is of group 0 only.
    """

    num_items: int = 7
    slate_size: int = 3
    horizon: int = HORIZON
    draws: int = 3

    def reset(self, key: Key, tastes: Tastes) -> tuple[Observation, tuple[Array, Array]]:
        kind = jax.random.bernoulli(key).astype(jnp.int32)
        slate = jnp.arange(self.slate_size, dtype=jnp.int32)
        return Observation(slate, jnp.full(self.slate_size, kind == 0)), (kind, jnp.float32(0.0))

    def play(self, uniforms: Array, user: tuple[Array, Array], slate: Array, tastes: Tastes) -> tuple:
        kind, earned = user
        group = slate // self.slate_size
        liked = group == kind
        clicks = jnp.where(tastes.later > 0.0, uniforms < 0.5, liked)
        reward = tastes.liked * liked.sum() + tastes.bait * (group == 0).sum() + earned
        never = jnp.bool_(False)
        user = (kind, tastes.later * (group == 1).sum())
        return Observation(slate, clicks), user, reward.astype(jnp.float32), never, never, {}


def make_slot_ranker() -> Ranker:
    """One action in [-1, 1] for each slot, the nearest of the items on a grid is shown."""

    def decode(_weights: tuple, action: Array) -> Array:
        return jnp.round((action + 1) / 2 * 6).astype(jnp.int32)

    return Ranker(decode, lambda _weights: (jnp.zeros(3), jnp.ones(3)), 3)


LEARN_ONE = (Rules(left=1.0), 0.8)
LEARN_LATEST = (Rules(latest_coin=1.0), 0.0)
LEARN_EARLIER = (Rules(earlier_coin=1.0), 0.0)
LEARN_DELAYED = (Rules(left_before=1.0, bait=BAIT), 0.8)
TAKE_BAIT = (Rules(left_before=1.0, bait=BAIT), 0.0)
PROBES = (LEARN_ONE, LEARN_LATEST, LEARN_EARLIER, LEARN_DELAYED, TAKE_BAIT)
LIKED, LATER, HASTY = (Tastes(liked=1.0), 0.0), (Tastes(later=1.0, bait=BAIT), 0.8), (Tastes(later=1.0, bait=BAIT), 0.0)
SLATES = (LIKED, LATER, HASTY)
SEEDS = 4


def greedy_returns(agent, env, make_hypers, cases, users: int, steps: int) -> dict:
    """{(rules, gamma): [SEEDS] mean greedy returns after training}: one program for all cases and seeds."""

    def train(key: Key, hypers, rules) -> Array:
        def step(state, number):
            keys = jax.random.split(jax.random.fold_in(key, number), users)
            batch = episodes(env, agent.explore, keys, rules, Acting(state, hypers))
            return agent.update(Acting(state, hypers), batch, agent.draw_update(key, users))[0], None

        state = jax.lax.scan(step, agent.init(key, hypers), jnp.arange(steps))[0]
        return returns(env, agent.greedy, jax.random.split(jax.random.key(7), 50), rules, Acting(state, hypers)).mean()

    def stack(trees):
        return jax.tree.map(lambda *leaves: jnp.repeat(jnp.float32(leaves), SEEDS), *trees)

    keys = jax.vmap(jax.random.key)(jnp.tile(jnp.arange(SEEDS), len(cases)))
    runs = keys, stack([make_hypers(gamma) for _, gamma in cases]), stack([rules for rules, _ in cases])
    found = np.asarray(jax.jit(jax.vmap(train), compiler_options=QUICK)(*runs)).reshape(len(cases), SEEDS)
    return dict(zip(cases, found, strict=True))


def softmax_on_probes(credit: str) -> dict:
    spec = reinforce_softmax.SoftmaxSpec(credit=credit, **SIZES)
    agent = reinforce_softmax.make_reinforce_softmax(spec, Dims(ITEMS, 1, HORIZON))
    hypers = lambda gamma: reinforce_softmax.SoftmaxHypers(gamma=gamma, rate=1e-2)  # noqa: E731
    return greedy_returns(agent, ProbeEnv(), hypers, PROBES, users=16, steps=300)


@pytest.fixture(scope="module")
def softmax() -> dict:
    return softmax_on_probes("corrected")


@pytest.fixture(scope="module")
def published() -> dict:
    return softmax_on_probes("published")


@pytest.fixture(scope="module", params=["softmax", "batch", "gaussian"])
def slates(request) -> dict:
    """Returns in worlds of slates of three."""
    dims = Dims(7, 3, HORIZON)
    if request.param == "softmax":
        agent = reinforce_softmax.make_reinforce_softmax(reinforce_softmax.SoftmaxSpec(**SIZES), dims)
        hypers = lambda gamma: reinforce_softmax.SoftmaxHypers(gamma=gamma, rate=1e-2)  # noqa: E731
    elif request.param == "batch":
        agent = reinforce_batch.make_reinforce_batch(reinforce_batch.BatchSpec(**SIZES), dims)
        hypers = lambda gamma: reinforce_batch.BatchHypers(gamma=gamma, rate=1e-2, entropy=0.1)  # noqa: E731
    else:
        agent = reinforce.make_reinforce(reinforce.ReinforceSpec(**SIZES), dims, make_slot_ranker())
        hypers = lambda gamma: reinforce.ReinforceHypers(gamma=gamma, rate=1e-2)  # noqa: E731
    return greedy_returns(agent, SlateEnv(), hypers, SLATES, users=32, steps=200)


# -- what is learnt ----------------------------------------------------------------------------------------------------


def test_softmax_finds_the_best_item_and_looks_at_the_observation(softmax):
    assert softmax[LEARN_ONE].min() >= 0.95 * HORIZON
    assert softmax[LEARN_LATEST].min() >= 0.95 * HORIZON


def test_softmax_remembers(softmax):
    """Without memory of the turn before, half is all that there is; three of four seeds go well beyond."""
    assert np.sort(softmax[LEARN_EARLIER])[1] >= 0.75 * HORIZON


def test_softmax_credits_a_late_reward_to_the_action_before(softmax):
    best = HORIZON - 1 + BAIT
    assert softmax[LEARN_DELAYED].min() >= 0.95 * best
    assert softmax[TAKE_BAIT].max() <= 1.05 * BAIT * HORIZON


def test_published_credit_repeats_what_it_saw(softmax, published):
    """The return from turn t on goes to the item in o_t, so the policy learns to show again what it was shown, in every
    seed the worthless first item, where corrected credit is nearly perfect. Looking no further than a turn (gamma 0)
    it learns what pays a turn later, of which the corrected one must know nothing."""
    for case in (LEARN_ONE, LEARN_LATEST):
        assert published[case].max() <= 0.05 * HORIZON < 0.95 * HORIZON <= softmax[case].min()
    assert np.median(published[TAKE_BAIT]) >= 0.95 * (HORIZON - 1) > 3 * softmax[TAKE_BAIT].max()


def test_slates_of_three_for_users_of_two_kinds(slates):
    """One slate for all users gets at most half of it."""
    assert slates[LIKED].mean() >= 0.9 * 3 * HORIZON
    assert slates[LIKED].min() >= 0.75 * 3 * HORIZON


def test_slates_of_three_that_pay_later(slates):
    best, bait = 3 * (HORIZON - 1), 3 * BAIT * HORIZON
    assert slates[LATER].mean() >= 0.9 * best
    assert slates[LATER].min() >= 2 * bait
    assert slates[HASTY].max() <= 1.05 * bait


# -- whose action gets which credit, exactly ---------------------------------------------------------------------------


def recorded_episodes(rewards: list[list[float]]) -> Episode:
    """Slates of two without repeats within an episode, every item clicked: item 2t and 2t+1 are in o_t."""
    reward = jnp.asarray(rewards)
    users, turns = reward.shape
    slates = jnp.broadcast_to(jnp.arange(2 * turns + 2, dtype=jnp.int32).reshape(-1, 2), (users, turns + 1, 2))
    seen = Observation(slates, jnp.ones_like(slates, bool))
    before, final = jax.tree.map(lambda x: x[:, :-1], seen), jax.tree.map(lambda x: x[:, -1], seen)
    return Episode(before, slates[:, 1:], reward, final)


@pytest.mark.parametrize(("credit", "turn"), [("corrected", 2), ("published", 1)])
def test_which_item_a_reward_reinforces(credit, turn):
    """The only reward, r_1, belongs to the slate of o_2; its topmost clicked item is the only one that gains."""
    dims = Dims(8, 2, 3)
    spec = reinforce_softmax.SoftmaxSpec(hidden=4, belief_width=2, item_dim=2, credit=credit)
    agent = reinforce_softmax.make_reinforce_softmax(spec, dims)
    hypers = reinforce_softmax.SoftmaxHypers(gamma=0.0, rate=1e-2)
    batch = recorded_episodes([[0.0, 1.0, 0.0]])
    np.testing.assert_array_equal(outcomes(batch).slate[:, 0], batch.action[0])
    before = agent.init(jax.random.key(0), hypers)
    after, metrics = jax.jit(agent.update, compiler_options=QUICK)(Acting(before, hypers), batch, ())
    biases = [np.asarray(state.params.policy["layer1"]["bias"]) for state in (before, after)]
    np.testing.assert_array_equal(np.flatnonzero(biases[1] > biases[0]), [2 * turn])
    assert float(metrics["loss"]) > 0.0


def test_advantages_by_hand():
    """Each item: its own click (one) and half of what follows; less the mean of the batch's two users."""
    batch = recorded_episodes([[2.0, 2.0], [2.0, 2.0]])
    clicks = batch.final.clicks.at[1].set(jnp.array([False, True]))  # user 1, last turn: the upper item is not clicked
    batch = dataclasses.replace(
        batch, reward=batch.reward.at[1, 1].set(1.0), final=Observation(batch.final.slate, clicks)
    )
    credit = np.array([[[1 + 0.5 * 2, 1 + 0.5 * 2], [1 + 0.5 * 1, 1 + 0.5 * 1]], [[1, 1], [0, 1]]])  # [H, B, K]
    expected = credit - credit.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(reinforce_batch.advantages(batch, 0.5), expected, atol=1e-6)


# -- equations ---------------------------------------------------------------------------------------------------------


def test_returns_to_go_equal_a_double_loop():
    reward = np.random.default_rng(0).poisson(2.0, (100, 3)).astype(np.float32)
    both = jax.jit(lambda gamma: [return_to_go(jnp.asarray(reward), gamma, how) for how in ("recursive", "divided")])
    for gamma in (0.0, 0.8, 1.0):
        expected = np.zeros((101, 3))
        for t in reversed(range(100)):
            expected[t] = reward[t] + gamma * expected[t + 1]
        for ours in both(gamma):
            np.testing.assert_allclose(ours, expected[:-1], rtol=1e-5)


def test_division_loses_precision_where_the_recursion_does_not():
    """0.3^t leaves float32 after some 70 turns; from there on the published sums know one reward only."""
    reward = jnp.ones(100)
    np.testing.assert_allclose(return_to_go(reward, 0.3)[:80], 1 / 0.7, rtol=1e-6)
    divided = np.asarray(return_to_go(reward, 0.3, "divided"))
    np.testing.assert_allclose(divided[:60], 1 / 0.7, rtol=1e-4)
    assert np.isfinite(divided).all()
    np.testing.assert_array_equal(divided[90:], 1.0)


@pytest.mark.parametrize("items", [1, 7, 60, 1000])
def test_draws_follow_the_distribution(items):
    """Evenly spread uniform numbers hit each item in proportion to its probability, to a few of the 40,000."""
    logits = 2.0 * np.random.default_rng(items).normal(size=items).astype(np.float32)
    uniforms = (np.arange(40_000) + 0.5) / 40_000
    drawn = np.asarray(jax.jit(draw_items)(jnp.asarray(logits), jnp.asarray(uniforms, jnp.float32)))
    probability = np.exp(logits.astype(np.float64))
    probability /= probability.sum()
    assert drawn.dtype == np.int32
    assert (np.diff(drawn) >= 0).all()  # an inverse distribution function
    assert np.abs(np.bincount(drawn, minlength=items) - 40_000 * probability).max() <= 3


def test_draws_at_the_ends_and_from_extreme_logits():
    uniforms = jnp.array([0.0, 0.5, 1.0 - 2.0**-24])
    for items in (5, 1000):
        certain = jnp.full(items, -200.0).at[3].set(200.0)
        np.testing.assert_array_equal(draw_items(certain, uniforms), 3)
        flat = np.asarray(draw_items(jnp.full(items, -1e4), uniforms))
        np.testing.assert_array_equal(flat, [0, items // 2, items - 1])


@pytest.mark.parametrize("draws", [1, 10])
def test_probability_of_a_hit(draws):
    """Against double precision; a naive (1 - pi)^n in float32 loses pi below 1e-7 and has no gradient at 1."""
    pi = np.array([1e-12, 1e-6, 1e-3, 0.1, 0.9, 0.999, 1.0])
    logs = jnp.asarray(np.log(pi), jnp.float32)
    expected = np.log(1e-6 - np.expm1(draws * np.log1p(-np.minimum(pi, 1 - 1e-12))))
    np.testing.assert_allclose(log_hit(logs, draws), expected, rtol=1e-5, atol=3e-6)
    slopes = jax.jit(jax.grad(lambda logs: log_hit(logs, draws).sum()))(logs)
    slope = pi * draws * (1 - pi) ** (draws - 1) / np.exp(expected)
    np.testing.assert_allclose(slopes[:-1], slope[:-1], rtol=1e-4, atol=1e-6)
    assert np.isfinite(slopes[-1])


def test_log_probability_of_actions():
    """Against the formula in double precision, and finite, gradient too, for actions on the edge of the box."""
    rng = np.random.default_rng(0)
    mean, raw = rng.normal(size=(2, 50, 3))
    squashed, sigma = np.tanh(raw), 0.29
    expected = -0.5 * ((raw - mean) / sigma) ** 2 - np.log(sigma * np.sqrt(2 * np.pi))
    expected = (expected - np.log(1 - squashed**2 + 1e-6)).sum(axis=-1)

    def ours(mean, action):
        return reinforce.log_probability(mean, sigma, action).sum(), reinforce.log_probability(mean, sigma, action)

    program = jax.jit(jax.grad(ours, has_aux=True))
    slope, value = program(jnp.asarray(mean, jnp.float32), jnp.asarray(squashed, jnp.float32))
    np.testing.assert_allclose(value, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(slope, (raw - mean) / sigma**2, rtol=1e-2, atol=1e-2)
    edge = jnp.broadcast_to(jnp.array([1.0, -1.0, 0.0]), (50, 3))
    for found in program(jnp.zeros((50, 3)), edge):
        assert np.isfinite(found).all()


def test_slates_at_random_are_uniform_whatever_was_learnt():
    dims = Dims(20, 5, HORIZON)
    agent = reinforce_softmax.make_reinforce_softmax(reinforce_softmax.SoftmaxSpec(**SIZES), dims)
    state = agent.init(jax.random.key(0), reinforce_softmax.SoftmaxHypers())
    bias = state.params.policy["layer1"]["bias"].at[4].set(50.0)
    state.params.policy["layer1"]["bias"] = bias
    seen = Observation(jnp.zeros(5, jnp.int32), jnp.zeros(5, bool))
    uniforms = (jnp.arange(500.0).reshape(100, 5) + 0.5) / 500

    @jax.jit
    def choose(at_random):
        acting = Acting(state, (), (), at_random)
        return jax.vmap(lambda u: agent.explore.act(acting, agent.explore.start(), seen, None, u)[0])(uniforms)

    for at_random, counts in ((False, np.eye(20)[4] * 500), (True, np.full(20, 25))):
        choice = choose(at_random)
        np.testing.assert_array_equal(np.bincount(np.ravel(choice.slate), minlength=20), counts)
        np.testing.assert_array_equal(choice.slate, choice.action)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "setting"),
    [
        (lambda: reinforce_softmax.validate_spec(reinforce_softmax.SoftmaxSpec(credit="correct")), "credit"),
        (lambda: reinforce_softmax.validate_spec(reinforce_softmax.SoftmaxSpec(return_to_go="sum")), "return_to_go"),
        (lambda: reinforce_softmax.validate_spec(reinforce_softmax.SoftmaxSpec(hidden=0)), "hidden"),
        (lambda: reinforce_softmax.validate_hypers(reinforce_softmax.SoftmaxHypers(gamma=1.5)), "gamma"),
        (lambda: reinforce_batch.validate_spec(reinforce_batch.BatchSpec(item_dim=0)), "item_dim"),
        (lambda: reinforce_batch.validate_hypers(reinforce_batch.BatchHypers(entropy=-1.0)), "entropy"),
        (lambda: reinforce_batch.validate_hypers(reinforce_batch.BatchHypers(rate=float("nan"))), "rate"),
        (lambda: reinforce.validate_spec(reinforce.ReinforceSpec(return_to_go="sum")), "return_to_go"),
        (lambda: reinforce.validate_hypers(reinforce.ReinforceHypers(sigma=0.0)), "sigma"),
    ],
)
def test_settings_out_of_range_are_named(call, setting):
    with pytest.raises(SettingError, match=setting):
        call()


def test_defaults_are_in_range():
    for module, spec, hypers in (
        (reinforce_softmax, reinforce_softmax.SoftmaxSpec(), reinforce_softmax.SoftmaxHypers()),
        (reinforce_batch, reinforce_batch.BatchSpec(), reinforce_batch.BatchHypers()),
        (reinforce, reinforce.ReinforceSpec(), reinforce.ReinforceHypers()),
    ):
        assert module.validate_spec(spec) is None and module.validate_hypers(hypers) is None
