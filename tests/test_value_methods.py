"""DQN, DDPG and TD3 find the best policy where it is known; what is particular to each of them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pair_probes import PairEnv, check, train_all
from probes import HORIZON, ITEMS, ProbeEnv, make_grid_ranker

from gemsjax.agents import ddpg, dqn, td3
from gemsjax.agents.base import Acting
from gemsjax.errors import SettingError
from gemsjax.types import Dims, Episode, Observation, time_major

SMALL = {"hidden": 32, "belief_width": 8, "item_dim": 4}
SINGLE, PAIRS = Dims(ITEMS, 1, HORIZON), Dims(ITEMS, 2, HORIZON)


def test_dqn_probes():
    hypers = dqn.DQNHypers(tau=0.02, rate=3e-3, epsilon_steps=100.0)
    check(train_all(PairEnv(), dqn.make_dqn(dqn.DQNSpec(**SMALL), PAIRS), hypers, ()))


def test_ddpg_probes():
    hypers = ddpg.DDPGHypers(tau=0.02, critic_rate=3e-3, actor_rate=3e-3, exploration=0.6, saturation_cost=0.3)
    check(train_all(ProbeEnv(), ddpg.make_ddpg(ddpg.DDPGSpec(**SMALL), SINGLE, make_grid_ranker()), hypers, ()))


def test_td3_probes():
    hypers = td3.TD3Hypers(
        tau=0.02, critic_rate=3e-3, actor_rate=3e-3, exploration=0.6, smoothing=0.1, smoothing_clip=0.2,
        saturation_cost=0.3,
    )  # fmt: skip
    check(train_all(ProbeEnv(), td3.make_td3(td3.TD3Spec(**SMALL), SINGLE, make_grid_ranker()), hypers, ()))


# -- DQN ---------------------------------------------------------------------------------------------------------------


def batch_of(key, dims: Dims, action) -> Episode:
    """Two random episodes of `dims` with these actions."""
    slates = jax.random.randint(key, (2, dims.horizon + 1, dims.slate_size), 0, dims.num_items)
    seen = Observation(slates, slates % 2 == 0)
    reward = jax.random.uniform(key, (2, dims.horizon))
    return Episode(
        jax.tree.map(lambda x: x[:, :-1], seen), action(slates[:, 1:]), reward, jax.tree.map(lambda x: x[:, -1], seen)
    )


def leaves_moved(new, old) -> list[bool]:
    """Whether each array differs."""
    return [
        bool((np.asarray(a) != np.asarray(b)).any())
        for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    ]


def test_dqn_loss_is_that_of_the_definition():
    """Against a plain loop over turns: mean value of the slate, double-network target of the online top K."""
    dims, hypers = Dims(12, 3, 4), dqn.DQNHypers(gamma=0.7)
    agent = dqn.make_dqn(dqn.DQNSpec(hidden=8, belief_width=6, item_dim=3), dims)
    state, other = (jax.jit(agent.init)(jax.random.key(seed), hypers) for seed in (0, 1))
    state = dataclasses.replace(state, target=other.params.network)  # not the online one
    batch = batch_of(jax.random.key(2), dims, lambda slates: slates)
    after, metrics = jax.jit(agent.update)(Acting(state, hypers), batch, ())

    belief = dqn.make_gru(dims, 6, 3)
    states = np.asarray(jax.jit(belief.unroll)((state.params.belief,), time_major(batch.observation))[0])
    networks = jax.tree.map(np.asarray, (state.params.network, state.target))

    def values(network, states):
        hidden = np.maximum(states @ network["layer0"]["kernel"] + network["layer0"]["bias"], 0)
        return np.asarray(hidden @ network["layer1"]["kernel"] + network["layer1"]["bias"])

    errors = []
    for user in range(2):
        for turn in range(dims.horizon):
            q = values(networks[0], states[turn, user])[np.asarray(batch.action[user, turn])].mean()
            target = float(batch.reward[user, turn])
            if turn + 1 < dims.horizon:
                best = np.argsort(-values(networks[0], states[turn + 1, user]))[:3]
                target += 0.7 * values(networks[1], states[turn + 1, user])[best].mean()
            errors.append((q - target) ** 2)
    np.testing.assert_allclose(metrics["loss"], np.mean(errors), rtol=1e-4)
    assert all(leaves_moved(after.params, state.params))


def test_dqn_explores_as_often_as_epsilon_says():
    hypers = dqn.DQNHypers(first_epsilon=0.8, last_epsilon=0.1, epsilon_steps=50.0)
    dims = Dims(40, 3, 4)
    agent = dqn.make_dqn(dqn.DQNSpec(hidden=8, belief_width=6, item_dim=3), dims)
    state = jax.jit(agent.init)(jax.random.key(0), hypers)
    seen = Observation(jnp.arange(3), jnp.zeros(3, bool))
    best = agent.greedy.act(Acting(state, hypers), agent.greedy.start(), seen, None, jnp.zeros(0))[0].slate
    uniforms = jax.random.uniform(jax.random.key(1), (4_000, agent.explore.draws))

    def slates(step, at_random):
        acting = Acting(state, hypers, (), at_random, step)
        return jax.vmap(lambda u: agent.explore.act(acting, agent.explore.start(), seen, None, u)[0].slate)(uniforms)

    run = jax.jit(slates)
    for step, at_random, epsilon in ((0, False, 0.8), (50, False, 0.1 + 0.7 / np.e), (10**6, False, 0.1), (0, True, 1)):
        shown = np.asarray(run(jnp.int32(step), jnp.bool_(at_random)))
        share = (shown != np.asarray(best)).any(axis=1).mean()
        # A random slate of 3 out of 40 in order is the best one in 1 of 59,280; four standard errors.
        assert abs(share - epsilon) <= 4 * np.sqrt(epsilon * (1 - epsilon) / 4_000) + 1e-3
        assert all(len(set(slate)) == 3 for slate in shown.tolist())


# -- DDPG and TD3 ------------------------------------------------------------------------------------------------------


def test_td3_updates_actor_and_targets_only_when_due():
    agent = td3.make_td3(td3.TD3Spec(**SMALL, delay=3), SINGLE, make_grid_ranker())
    hypers = td3.TD3Hypers()
    state = jax.jit(agent.init)(jax.random.key(0), hypers)
    batch = batch_of(jax.random.key(1), SINGLE, lambda slates: slates / 2.0 - 1.0)
    update = jax.jit(lambda state, key: agent.update(Acting(state, hypers), batch, agent.draw_update(key, 2))[0])

    def moved(new, old) -> bool:
        return any(leaves_moved(new, old))

    for number in range(1, 7):
        new, due = update(state, jax.random.key(number)), number % 3 == 0
        for part in ("critics", "critic_belief"):
            assert moved(getattr(new.params, part), getattr(state.params, part))
        for part in ("policy", "actor_belief"):
            assert moved(getattr(new.params, part), getattr(state.params, part)) == due
            assert moved(getattr(new.optimiser, part), getattr(state.optimiser, part)) == due
        assert moved(new.target_policy, state.target_policy) == due
        assert moved(new.target_critics, state.target_critics) == due
        state = new
    assert int(state.updates) == 6


def test_explored_actions_stay_inside_the_box():
    agent = ddpg.make_ddpg(ddpg.DDPGSpec(**SMALL), SINGLE, make_grid_ranker())
    hypers = ddpg.DDPGHypers(exploration=3.0)
    acting = Acting(jax.jit(agent.init)(jax.random.key(0), hypers), hypers)
    seen = Observation(jnp.zeros(1, jnp.int32), jnp.zeros(1, bool))
    uniforms = jax.random.uniform(jax.random.key(1), (500, 1))
    act = lambda u, acting: agent.explore.act(acting, agent.explore.start(), seen, None, u)[0].action  # noqa: E731
    explored = jax.vmap(lambda u: act(u, acting))(uniforms)
    assert float(jnp.abs(explored).max()) == 1.0
    np.testing.assert_allclose(jax.vmap(lambda u: act(u, acting._replace(at_random=True)))(uniforms), uniforms - 0.5)


@pytest.mark.parametrize(
    ("check_one", "value", "name"),
    [
        (dqn.validate_spec, dqn.DQNSpec(hidden=0), "hidden"),
        (dqn.validate_hypers, dqn.DQNHypers(first_epsilon=1.5), "first_epsilon"),
        (dqn.validate_hypers, dqn.DQNHypers(epsilon_steps=0.0), "epsilon_steps"),
        (dqn.validate_hypers, dqn.DQNHypers(rate=1.0), "rate"),
        (ddpg.validate_spec, ddpg.DDPGSpec(belief_width=0), "belief_width"),
        (ddpg.validate_hypers, ddpg.DDPGHypers(exploration=0.0), "exploration"),
        (ddpg.validate_hypers, ddpg.DDPGHypers(saturation_cost=-1.0), "saturation_cost"),
        (td3.validate_spec, td3.TD3Spec(delay=0), "delay"),
        (td3.validate_hypers, td3.TD3Hypers(smoothing=0.0), "smoothing"),
        (td3.validate_hypers, td3.TD3Hypers(gamma=float("nan")), "gamma"),
    ],
)
def test_settings_out_of_range_are_named(check_one, value, name):
    with pytest.raises(SettingError) as raised:
        check_one(value)
    assert raised.value.setting == name


def test_defaults_are_accepted():
    dqn.validate_spec(dqn.DQNSpec())
    dqn.validate_hypers(dqn.DQNHypers())
    ddpg.validate_spec(ddpg.DDPGSpec())
    ddpg.validate_hypers(ddpg.DDPGHypers())
    td3.validate_spec(td3.TD3Spec())
    td3.validate_hypers(td3.TD3Hypers())
    with pytest.raises(SettingError):
        dqn.make_dqn(dqn.DQNSpec(), Dims(2, 3, 4))
