"""Compiled training: compile counts, independence of cuts, seeds, warm-up, credit, the best policy, refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemsjax
from gemsjax.agents import sac
from gemsjax.agents.base import Acting
from gemsjax.errors import SettingError
from gemsjax.pretrain.gems import GeMSSpec, make_pretraining
from gemsjax.rankers.gems import GeMSWeights, make_gems_ranker
from gemsjax.rollout import returns
from gemsjax.train import Plan, Run, make_training
from gemsjax.types import Dims

PLAN = Plan(batch_size=3, replay_capacity=8, warm_up=4, validation_users=3)


class Small:
    """A small environment with an untrained GeMS, and one compiled `epoch`."""

    def __init__(self) -> None:
        self.env, self.params = gemsjax.make("focused_mix", num_items=40, slate_size=4, horizon=12)
        self.dims = Dims(40, 4, 12)
        pretraining = make_pretraining(GeMSSpec(latent_dim=3, hidden=(16, 8)), self.dims)
        vae = pretraining.init(jax.random.key(9)).params
        self.weights = GeMSWeights(vae, jnp.zeros(3), jnp.full(3, 2.0))
        self.agent = sac.make_sac(sac.SACSpec(hidden=16), self.dims, make_gems_ranker(pretraining.vae))
        self.training = make_training(self.env, self.agent, PLAN)
        self.traces = 0
        self.init = jax.jit(self.training.init)
        self.steps = jax.jit(self.training.steps)  # called with five or ten steps only: another length, another program
        self.epoch = jax.jit(self._epoch)

    def _epoch(self, run, state, steps):
        self.traces += 1
        return self.training.epoch(run, state, steps)

    def run(self, seed: int, **hypers: float) -> Run:
        values = jax.tree.map(jnp.float32, sac.SACHypers(**hypers))
        return Run(jax.random.key(seed), values, self.weights, self.params)


@pytest.fixture(scope="module")
def small() -> Small:
    return Small()


def steps(first: int, last: int):
    return jnp.arange(first, last, dtype=jnp.int32)


def same(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_one_compilation_for_a_whole_run_whatever_its_hyper_parameters(small):
    state, before = small.init(small.run(1)), small.traces
    for hypers in ({}, {"gamma": 0.5, "actor_rate": 1e-2}):
        for epoch in range(3):
            state, _ = small.epoch(small.run(1, **hypers), state, steps(5 * epoch, 5 * epoch + 5))
    assert small.traces - before <= 1
    assert small.epoch._cache_size() == 1


def test_an_epoch_cut_in_two_gives_bitwise_the_same_state(small):
    run = small.run(2)
    state = small.init(run)
    whole, _ = small.steps(run, state, steps(0, 10))
    part, _ = small.steps(run, state, steps(0, 5))
    part, _ = small.steps(run, part, steps(5, 10))
    assert same(whole, part)


def test_two_seeds_differ_in_every_random_leaf(small):
    states = []
    for seed in (1, 2):
        state = small.init(small.run(seed))
        states.append(
            small.epoch(small.run(seed), small.epoch(small.run(seed), state, steps(0, 5))[0], steps(5, 10))[0]
        )
    equal = []
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(states[0]), jax.tree.leaves(states[1]), strict=True
    ):
        if np.array_equal(one, other):
            equal.append(jax.tree_util.keystr(path))
    # Counters are no random leaves, and the reset slate is the same for every user.
    # The temperature's first steps are as long as its rate, whatever the gradient.
    same_for_all = ("count", "added", "best_agent.alpha", "best_agent.params.log_alpha")
    unexpected = [name for name in equal if not any(part in name for part in same_for_all)]
    assert not unexpected


def test_no_update_during_warm_up_and_random_actions_cover_half_of_the_box(small):
    run = small.run(3)
    state = small.init(run)
    after, metrics = small.steps(run, state, jnp.array([0, 1, 2, 3, 0]))
    assert not metrics["updated"].any()
    assert same(after.agent, state.agent)
    actions = after.replay.episodes.action[:4]
    assert np.abs(actions).max() <= 0.5 * 2.0 and np.abs(actions).max() > 0.9
    later, metrics = small.steps(run, after, steps(4, 9))
    assert metrics["updated"].all()
    assert not same(later.agent.params, state.agent.params)


def test_the_stored_action_is_what_the_next_slate_was_decoded_from(small):
    """Credit: reward t is the clicks on observation t + 1, which shows the slate of action t."""
    run = small.run(4)
    state, _ = small.steps(run, small.init(run), steps(0, 5))
    ranker = make_gems_ranker(make_pretraining(GeMSSpec(latent_dim=3, hidden=(16, 8)), small.dims).vae)
    episode = jax.tree.map(lambda x: x[1], state.replay.episodes)
    decoded = jax.vmap(lambda action: ranker.decode(small.weights, action))(episode.action)
    shown = np.concatenate([episode.observation.slate[1:], episode.final.slate[None]])
    clicks = np.concatenate([episode.observation.clicks[1:], episode.final.clicks[None]])
    np.testing.assert_array_equal(decoded, shown)
    np.testing.assert_array_equal(clicks.sum(axis=1), episode.reward)


def test_the_best_validated_agent_is_kept(small):
    run = small.run(5)
    state, best, kept = small.init(run), -np.inf, None
    for epoch in range(4):
        state, metrics = small.epoch(run, state, steps(5 * epoch, 5 * epoch + 5))
        mean = float(metrics.validation.mean())
        if mean > best:
            best, kept = mean, state.agent
        assert float(state.best_return) == pytest.approx(best)
        assert same(state.best_agent, kept)


def test_several_users_and_updates_a_step(small):
    plan = Plan(users_per_step=2, updates_per_step=3, batch_size=3, replay_capacity=8, warm_up=4, validation_users=3)
    training = make_training(small.env, small.agent, plan)
    run = small.run(6)
    state, metrics = jax.jit(training.steps)(run, training.init(run), steps(0, 5))
    assert int(state.replay.added) == 10
    np.testing.assert_array_equal(metrics["updated"], [False, False, True, True, True])
    assert int(state.agent.optimiser.policy.count) == 9


def test_runs_of_one_program_may_differ_in_seed_environment_and_hyper_parameters(small):
    """A run axis by vmap; a lane may differ from a run alone by rounding, never by more."""
    other = gemsjax.make("diffuse_divpen", num_items=40, slate_size=4, horizon=12)[1]
    runs = [small.run(7), small.run(8, gamma=0.3).replace(env_params=other)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *runs)
    states = jax.jit(jax.vmap(small.training.init))(stacked)
    states, metrics = jax.jit(jax.vmap(small.training.steps, in_axes=(0, 0, None)))(stacked, states, steps(0, 5))
    for lane, run in enumerate(runs):
        _, alone = small.steps(run, small.init(run), steps(0, 5))
        np.testing.assert_array_equal(metrics["return"][lane][:4], alone["return"][:4])
        np.testing.assert_allclose(metrics["critic_loss"][lane], alone["critic_loss"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("plan", "setting"),
    [
        (Plan(batch_size=0), "batch_size"),
        (Plan(batch_size=30, replay_capacity=20), "batch_size"),
        (Plan(warm_up=-1), "warm_up"),
        (Plan(users_per_step=3, replay_capacity=100), "replay_capacity"),
        (Plan(validation_users=-1), "validation_users"),
    ],
)
def test_counts_that_do_not_fit_are_refused(small, plan, setting):
    with pytest.raises(SettingError, match=setting):
        make_training(small.env, small.agent, plan)


def test_an_agent_without_privilege_gets_nothing_hidden(small):
    seen = []
    spy = small.agent.greedy._replace(
        act=lambda acting, memory, observation, hidden, noise: (
            seen.append(hidden),
            small.agent.greedy.act(acting, memory, observation, hidden, noise),
        )[1]
    )
    run = small.run(1)
    acting = Acting(small.init(run).agent, run.hypers, run.weights)
    returns(small.env, spy, jax.random.split(jax.random.key(0), 2), small.params, acting)
    assert seen == [None]
