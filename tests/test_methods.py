"""The registry: every method is what it declares, in both variants; the published training loops, slips and all; and
whose users validation and test meet."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import HORIZON, ITEMS, LEFT, ProbeEnv, Rules

from gemsjax import methods, prepare, runs
from gemsjax.agents import references
from gemsjax.agents.base import Acting, Agent, Choice
from gemsjax.errors import SettingError
from gemsjax.evaluate import evaluate, user_keys
from gemsjax.pretrain.gems import GeMSSpec, make_pretraining
from gemsjax.pretrain.matrix_factorisation import MFSettings, make_factorisation
from gemsjax.rollout import episodes
from gemsjax.settings import PUBLISHED_SEEDS, TrainSettings, defaults, from_config
from gemsjax.train import Plan, Run, make_training
from gemsjax.types import Dims

SMALL = {"num_items": 40, "slate_size": 4, "horizon": 6}


@pytest.mark.parametrize("variant", ["corrected", "published"])
@pytest.mark.parametrize("name", methods.learners())
def test_every_learner_is_what_it_declares(name, variant):
    settings = TrainSettings(method=name, variant=variant, env_settings=SMALL).resolved()
    world = prepare.world_of(settings)
    agent = runs.make_agent(settings, world, prepare.untrained_weights(settings, world))
    entry = methods.method(name)
    declared = agent.greedy.privileged or agent.explore.privileged or settings.embeddings == "ideal"
    assert settings.privileged == declared == entry.privileged
    assert agent.explore.remember is None or entry.privileged
    assert from_config(dataclasses.asdict(settings)) == settings


def random_leaves(one, other) -> dict[str, bool]:
    """Whether two trees differ, by the names of the leaves that are not filled with one number."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True)
    return {
        jax.tree_util.keystr(path): not np.array_equal(first, second)
        for (path, first), second in pairs
        if len(np.unique(first)) > 1
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", methods.learners())
def test_two_seeds_begin_with_other_numbers(name):
    settings = TrainSettings(method=name, env_settings=SMALL).resolved()
    world = prepare.world_of(settings)
    agent = runs.make_agent(settings, world, prepare.untrained_weights(settings, world))
    begun = random_leaves(*(agent.init(jax.random.key(seed), settings.hypers) for seed in (1, 2)))
    assert all(begun.values()), begun
    assert begun or name == "constant-slate"  # whose distribution begins even


def test_two_seeds_pre_train_from_other_numbers():
    dims = Dims(40, 4, 6)
    vae = make_pretraining(GeMSSpec(latent_dim=3, hidden=(16, 8)), dims)
    factors = make_factorisation(MFSettings(dim=4), 30, 40)
    for init in (vae.init, factors.init):
        begun = random_leaves(*(init(jax.random.key(seed)) for seed in (1, 2)))
        assert begun and all(begun.values()), begun


@pytest.mark.parametrize("name", [name for name in methods.METHODS if name not in methods.learners()])
def test_every_reference_is_what_it_declares(name):
    entry = methods.method(name)
    assert entry.policy(Dims(40, 4, 6)).privileged == entry.privileged


def test_learners_on_policy_keep_their_own_episodes_only():
    off = Plan(batch_size=20, replay_capacity=100)
    with pytest.raises(SettingError, match="batch_size = 20 .* episodes of its own step"):
        TrainSettings(method="reinforce-softmax", plan=off).resolved()
    with pytest.raises(SettingError, match="batch_size = 1 .* at least 2"):
        TrainSettings(method="reinforce-batch", plan=methods.method("reinforce-softmax").plan).resolved()


def test_embeddings_of_a_file_are_not_the_simulators_and_part_of_what_a_run_is(tmp_path):
    make = lambda name: TrainSettings(method="sac-topk-mf", embeddings=str(tmp_path / name), env_settings=SMALL)  # noqa: E731
    world = prepare.world_of(TrainSettings(env_settings=SMALL).resolved())
    np.save(tmp_path / "own.npy", np.asarray(world.params.item_embeddings))
    np.save(tmp_path / "a.npy", np.ones((40, 7), np.float32))
    np.save(tmp_path / "b.npy", np.full((40, 7), 2.0, np.float32))
    with pytest.raises(SettingError, match="own.npy.* privileged"):
        prepare.frozen_weights(make("own.npy").resolved(), world, tmp_path, tmp_path)
    one, other = (prepare.identity_of(make(name).resolved(), world) for name in ("a.npy", "b.npy"))
    assert one["embeddings"] != other["embeddings"] and "a.npy" not in str(one)
    assert prepare.untrained_weights(make("a.npy").resolved(), world).embeddings.shape == (40, 7)
    narrow = TrainSettings(method="sac-topk-mf", mf=MFSettings(dim=7), env_settings=SMALL).resolved()
    assert prepare.untrained_weights(narrow, world).embeddings.shape == (40, 7)


def test_names_of_directories_are_plain_and_differ():
    names = [entry.directory for entry in methods.METHODS.values()]
    assert len(set(names)) == len(names) and all(set(name) <= set(name) - set(" +()/") for name in names)
    assert methods.method("sac-gems").directory == "SAC_GeMS"


def test_privileged_methods_are_marked_by_title_or_label():
    assert methods.marked("short-term-oracle", True) == "Short-term oracle ‡"
    assert methods.marked("sac-khead", True, "k-head, ideal") == "k-head, ideal ‡"
    assert methods.marked("sac-khead", False) == "SAC+k-head" and methods.PRIVILEGED.startswith("‡ ")


def test_the_published_variant_differs_where_the_table_says():
    corrected, published = (defaults("reinforce-softmax", variant) for variant in ("corrected", "published"))
    plan = published["plan"]
    assert (plan.stale, plan.update_in_warm_up, plan.warm_up, plan.common_users) == (True, True, 2_000, True)
    assert not any((corrected["plan"].stale, corrected["plan"].update_in_warm_up, corrected["plan"].common_users))
    assert (published["spec"].credit, published["spec"].return_to_go) == ("published", "divided")
    assert (published["gems"].noise, published["gems"].shuffle) == ("variance", False)
    assert (corrected["gems"].noise, corrected["gems"].shuffle) == ("deviation", True)
    assert (published["test_stream"], corrected["test_stream"]) == ("training", "test")
    assert defaults("sac-gems", "published")["hypers"].initial_alpha == 1.0
    assert defaults("sac-gems", "published")["hypers"].first_alpha == 0.2
    corrected = defaults("sac-gems", "corrected")["hypers"]
    assert (corrected.initial_alpha, corrected.first_alpha) == (0.2, 0.0)  # 0: as the initial one
    assert defaults("sac-wknn", "published")["embeddings"] == "random"
    with pytest.raises(SettingError, match="did you mean 'published'"):
        defaults("sac-gems", "publishd")


# -- the loop ----------------------------------------------------------------------------------------------------------


def spy_agent() -> Agent:
    """Acts at random and reports the return of the first episode of its batch, and which step it was told."""
    policy = references.make_random(Dims(ITEMS, 1, HORIZON))

    def update(acting, batch, _noise):
        return acting.state + 1, {"sampled": batch.reward[0].sum(), "told": jnp.float32(acting.step)}

    return Agent(lambda key, hypers: jnp.float32(0.0), policy, policy, lambda key, batch: (), update)


def steps(plan: Plan, seed: int = 0, count: int = 8):
    training = make_training(ProbeEnv(), spy_agent(), plan)
    rules = jax.tree.map(jnp.float32, Rules(left=1.0, latest_coin=0.1, bait=0.01))
    run = Run(jax.random.key(seed), (), (), rules)
    state, metrics = jax.jit(training.steps)(run, training.init(run), jnp.arange(count))
    return state, jax.tree.map(np.asarray, metrics)


ON_POLICY = Plan(batch_size=1, replay_capacity=1, warm_up=3)


def test_on_policy_learns_from_the_episode_just_collected():
    _, metrics = steps(ON_POLICY)
    np.testing.assert_array_equal(metrics["updated"], [False] * 3 + [True] * 5)
    np.testing.assert_allclose(metrics["sampled"][3:], metrics["return"][3:])
    np.testing.assert_array_equal(metrics["told"][3:], np.arange(3, 8))
    assert len(set(metrics["return"])) > 4  # the episodes can be told apart


def test_stale_learns_from_the_one_before_and_in_the_warm_up():
    """[22] and [23]: steps 0, 1, 2, ... learn from nothing, 0, 1, ..."""
    state, metrics = steps(dataclasses.replace(ON_POLICY, stale=True, update_in_warm_up=True))
    np.testing.assert_array_equal(metrics["updated"], [False] + [True] * 7)
    np.testing.assert_allclose(metrics["sampled"][1:], metrics["return"][:-1])
    assert float(state.agent) == 7.0


def test_no_update_before_there_is_a_batch():
    _, metrics = steps(Plan(batch_size=5, replay_capacity=8, warm_up=0))
    np.testing.assert_array_equal(metrics["updated"], [False] * 4 + [True] * 4)


def test_common_users_are_met_by_every_seed_but_not_with_the_same_luck():
    """[19]: the users of a stream, in order; what the policy draws is the run's own."""
    plan = dataclasses.replace(ON_POLICY, common_users=True)
    (one, _), (other, _) = steps(plan, seed=0), steps(plan, seed=1)
    own = steps(ON_POLICY, seed=0)[0]
    first = lambda state: state.replay.episodes.observation.clicks[0, 0]  # noqa: E731
    coins = lambda state: np.asarray(state.replay.episodes.observation.clicks[0, :, 0])  # noqa: E731
    assert first(one) == first(other)
    np.testing.assert_array_equal(coins(one), coins(other))
    assert not np.array_equal(one.replay.episodes.action, other.replay.episodes.action)
    assert not np.array_equal(coins(one), coins(own))
    rules = jax.tree.map(jnp.float32, Rules())
    policy = references.make_random(Dims(ITEMS, 1, HORIZON))
    met = episodes(ProbeEnv(), policy, user_keys("training", 8)[-1:], rules, Acting())
    np.testing.assert_array_equal(met.observation.clicks[0], one.replay.episodes.observation.clicks[0])


def test_only_the_privileged_may_remember():
    policy = references.make_random(Dims(ITEMS, 1, HORIZON))
    nosy = policy._replace(remember=lambda user: user.latest)
    with pytest.raises(SettingError, match="only a privileged policy"):
        episodes(ProbeEnv(), nosy, user_keys("test", 2), Rules(), Acting())
    seen = episodes(ProbeEnv(), nosy._replace(privileged=True), user_keys("test", 2), Rules(), Acting())
    np.testing.assert_array_equal(seen.hidden[:, :-1], seen.observation.clicks[:, 1:, 0])
    assert (
        policy.remember is None and episodes(ProbeEnv(), policy, user_keys("test", 2), Rules(), Acting()).hidden == ()
    )


# -- users of validation and test --------------------------------------------------------------------------------------


class LuckEnv(ProbeEnv):
    """Pays a user's luck of each turn whatever is shown: a return says which user it was."""

    def play(self, uniforms, user, slate, rules):
        seen, user, _, *rest = super().play(uniforms, user, slate, rules)
        return seen, user, uniforms[0], *rest


def told(keys) -> set[bytes]:
    return {key.tobytes() for key in np.asarray(jax.random.key_data(keys))}


def test_every_method_and_seed_meets_the_same_test_users_and_validation_has_others():
    users, rules = 50, jax.tree.map(jnp.float32, Rules())
    env, dims, agent = LuckEnv(), Dims(ITEMS, 1, HORIZON), spy_agent()
    always_left = references.make_random(dims)._replace(
        draws=0, act=lambda acting, memory, *_: (Choice(jnp.array([LEFT]), jnp.array([LEFT])), memory)
    )
    assert always_left.draws != agent.greedy.draws  # how much a method draws of its own changes nothing
    training = make_training(env, agent, dataclasses.replace(ON_POLICY, validation_users=users))
    validated, tested = [], [evaluate(env, always_left, rules, users=users).returns]
    for seed in (0, 1):
        run = Run(jax.random.key(seed), (), (), rules)
        state, metrics = jax.jit(training.epoch)(run, training.init(run), jnp.arange(4))
        validated.append(np.asarray(metrics.validation))
        acting = Acting(state.best_agent, run.hypers, run.weights)
        tested.append(evaluate(env, agent.greedy, rules, acting, users).returns)
    for returns in tested[1:]:
        np.testing.assert_allclose(returns, tested[0], rtol=1e-6)
    np.testing.assert_array_equal(*validated)
    assert len(set(tested[0])) == users and not set(tested[0]) & set(validated[0])


def test_populations_have_no_user_in_common():
    test, validation, training = (told(user_keys(stream, 5_000)) for stream in ("test", "validation", "training"))
    assert len(test | validation | training) == 3 * 5_000
    first = lambda key, step: jax.random.split(jax.random.fold_in(key, step), 3)[0]  # noqa: E731, as `_Loop._step`
    for seed in PUBLISHED_SEEDS:
        own = jax.vmap(first, (None, 0))(jax.random.key(seed), jnp.arange(5_000))
        assert not told(own) & (test | validation), "nor do runs with users of their own meet them"
    assert told(user_keys("test", 10)) == told(user_keys("test", 5_000)[:10]), "more users extend a population"
