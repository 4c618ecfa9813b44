"""Personalisation of one user: recorded examples, what must never happen, and users whose best item is known."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import personalisation as experiment
from gemsjax.errors import SettingError
from gemsjax.personalisation import (
    Interaction,
    PersonalisationConfig,
    UserState,
    check_config,
    learn,
    new_user,
    policy_scores,
    replay,
    update,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "personalization_examples.json").read_text())
EXAMPLES = {example["id"]: example for example in GOLDEN["examples"]}
EDGES = {case["id"]: case for case in GOLDEN["edge_cases"]}
NUMBERS = ("beta_long", "beta_short", "tau", "eta_long", "eta_short", "ema_alpha", "short_decay")
K, DIM, C = 6, 3, 4
scores_of, update_of = jax.jit(policy_scores), jax.jit(update)
learn_of = jax.jit(learn)
learn_all = jax.jit(jax.vmap(learn, in_axes=(0, 0, None)))


def state_of(written: dict) -> UserState:
    return UserState(*(jnp.asarray(written[name], jnp.float32) for name in UserState._fields))


def assert_close(state: UserState, written: dict) -> None:
    for name, leaf in state._asdict().items():
        np.testing.assert_allclose(leaf, written[name], rtol=0, atol=1e-5, err_msg=name)


def same_bits(state: UserState, other: UserState) -> bool:
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(state, other, strict=True))


def padded_choice(chosen: list) -> tuple[jnp.ndarray, jnp.ndarray]:
    """Choices as six entries, so that the examples share a program; what is beyond them would count."""
    room = 6 - len(chosen)
    return jnp.asarray([*chosen, *[0] * room], jnp.float32), jnp.asarray([True] * len(chosen) + [False] * room)


# -- recorded behaviour ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
def test_recorded_examples(name):
    example = EXAMPLES[name]
    config = PersonalisationConfig(**{number: example[number] for number in NUMBERS})
    state = state_of(example["initial_state"])
    base, items = jnp.asarray(example["base_scores"]), jnp.asarray(example["item_vectors"])
    mask = jnp.ones(base.shape, bool)
    for step in example["steps"]:
        scores, probs = scores_of(base, state, items, mask, config)
        np.testing.assert_allclose(scores, step["scores"], atol=1e-5)
        np.testing.assert_allclose(probs, step["probs"], atol=1e-5)
        before = state
        chosen, counts = padded_choice(step["chosen_indices"])
        state, updated = update_of(
            state, items, mask, chosen, counts, probs, step["reward_hat"], step["gating"], config
        )
        assert bool(updated) == step["updated"]
        assert_close(state, step["state_after"])
        assert step["updated"] or same_bits(state, before)


@pytest.mark.parametrize("name", [name for name, case in EDGES.items() if "chosen" in case])
def test_recorded_edge_cases(name):
    """Two orthogonal items without base scores, temperature and weights of the vectors 1."""
    case = EDGES[name]
    config = PersonalisationConfig(beta_short=1.0)
    state = UserState(jnp.array([0.1, 0.2]), jnp.array([0.3, 0.4]), jnp.float32(case["reward_ma0"]))
    items, mask = jnp.eye(2), jnp.ones(2, bool)
    probs = scores_of(jnp.zeros(2), state, items, mask, config)[1]
    chosen, counts = padded_choice(case["chosen"])
    after, updated = update_of(state, items, mask, chosen, counts, probs, case["reward_hat"], case["gating"], config)
    assert bool(updated) == case["updated"]
    assert_close(after, case["state_after"])
    assert case["updated"] or same_bits(after, state)


def test_recorded_edge_cases_side_by_side():
    """The same in one program, a user each: what changes nothing for one leaves the others alone."""
    cases = [case for case in EDGES.values() if "chosen" in case]
    states = [UserState(jnp.array([0.1, 0.2]), jnp.array([0.3, 0.4]), jnp.float32(c["reward_ma0"])) for c in cases]
    choices = [padded_choice(case["chosen"]) for case in cases]
    users, (chosen, counts) = (jax.tree.map(lambda *x: jnp.stack(x), *rows) for rows in (states, choices))
    rewards, gates = (jnp.array([case[name] for case in cases]) for name in ("reward_hat", "gating"))
    size = len(cases)
    items = jnp.tile(jnp.eye(2), (size, 1, 1))
    batch = Interaction(jnp.zeros((size, 2)), items, jnp.ones((size, 2), bool), chosen, counts, rewards, gates)
    after, updated = learn_all(users, batch, PersonalisationConfig(beta_short=1.0))
    assert updated.tolist() == [case["updated"] for case in cases] and 0 < sum(updated) < size
    for number, case in enumerate(cases):
        state = jax.tree.map(lambda x, n=number: x[n], after)
        assert_close(state, case["state_after"])
        assert case["updated"] or same_bits(state, states[number])


def test_nobody_has_candidates_side_by_side():
    """No places at all, and places that are all masked: the same for every user, and nothing is NaN."""
    users = jax.tree.map(lambda x: jnp.stack([x, x + 1.0, x - 1.0]), new_user(DIM))
    scores_all = jax.jit(jax.vmap(policy_scores, in_axes=(0, 0, 0, 0, None)))
    for places in (0, K):
        junk = jnp.full((3, places), jnp.nan), jnp.full((3, places, DIM), jnp.nan), jnp.zeros((3, places), bool)
        scores, probs = scores_all(junk[0], users, *junk[1:], PersonalisationConfig())
        assert scores.shape == probs.shape == (3, places) and (probs == 0).all() and (scores == -jnp.inf).all()
        batch = Interaction(*junk, jnp.zeros((3, C), int), jnp.ones((3, C), bool), jnp.ones(3), jnp.ones(3))
        after, updated = learn_all(users, batch, PersonalisationConfig())
        assert not updated.any() and same_bits(after, users)


def test_no_candidates_are_two_empty_arrays_and_no_update():
    config, state = PersonalisationConfig(), new_user(DIM)
    empty = jnp.zeros((0, DIM)), jnp.zeros(0, bool)
    scores, probs = scores_of(jnp.zeros(0), state, *empty, config)
    assert scores.shape == probs.shape == (0,) == tuple(np.shape(EDGES["empty_candidates"]["scores"]))
    after, updated = update_of(state, *empty, jnp.array([0]), jnp.array([True]), probs, 1.0, 1.0, config)
    assert not updated and same_bits(after, state)
    after, updated = update_of(state, *empty, jnp.zeros(0, int), jnp.zeros(0, bool), probs, 1.0, 1.0, config)
    assert not updated and same_bits(after, state)


def test_huge_scores_do_not_overflow():
    base = jnp.array([1e30, 0.0, -1e30])
    probs = scores_of(base, new_user(DIM), jnp.eye(3), jnp.ones(3, bool), PersonalisationConfig())[1]
    np.testing.assert_array_equal(probs, EDGES["huge_scores_no_overflow"]["probs"])


# -- what must hold ----------------------------------------------------------------------------------------------------


def random_case(seed: int, masked: float = 0.3) -> tuple[UserState, Interaction]:
    """A user and an interaction with masked candidates, duplicates, and choices out of range."""
    rng = np.random.default_rng(seed)
    state = UserState(*(jnp.asarray(rng.normal(size=size), jnp.float32) for size in (DIM, DIM, ())))
    return state, Interaction(
        *(jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((K,), (K, DIM))),
        jnp.asarray(rng.random(K) > masked),
        jnp.asarray(rng.integers(-2, K + 2, C), jnp.int32),
        jnp.asarray(rng.random(C) < 0.7),
        *(jnp.asarray(rng.normal(size=()), jnp.float32) for _ in range(2)),
    )


def pad(interaction: Interaction, candidates: int, choices: int, junk: float) -> Interaction:
    """More of both: masked candidates that hold `junk`, choices that do not count or name a masked candidate."""
    base, items, mask, chosen, counts, *rest = interaction
    where = jnp.arange(choices) % 2 == 0
    return Interaction(
        jnp.concatenate([base, jnp.full(candidates, junk)]),
        jnp.concatenate([items, jnp.full((candidates, DIM), junk)]),
        jnp.concatenate([mask, jnp.zeros(candidates, bool)]),
        jnp.concatenate([chosen, jnp.where(where, 0, K + candidates - 1)]),
        jnp.concatenate([counts, ~where]),
        *rest,
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 5.0, 1e38, float("inf"), float("nan")]))
def test_padding_changes_nothing(seed, junk):
    state, interaction = random_case(seed)
    more = pad(interaction, 3, 2, junk)
    config = PersonalisationConfig(tau=0.7)
    scores, probs = scores_of(interaction.base, state, interaction.items, interaction.mask, config)
    more_scores, more_probs = scores_of(more.base, state, more.items, more.mask, config)
    np.testing.assert_allclose(more_scores[:K], scores, rtol=0, atol=1e-6)
    np.testing.assert_allclose(more_probs[:K], probs, rtol=0, atol=1e-6)
    assert (more_probs[K:] == 0).all() and (more_scores[K:] == -jnp.inf).all()
    assert (np.asarray(probs)[~np.asarray(interaction.mask)] == 0).all()
    (after, updated), (more_after, more_updated) = learn_of(state, interaction, config), learn_of(state, more, config)
    assert updated == more_updated
    for leaf, other in zip(after, more_after, strict=True):
        np.testing.assert_allclose(other, leaf, rtol=0, atol=1e-6)


BROKEN = [float("nan"), float("inf"), -float("inf"), 3e38]


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["reward", "gate", "base", "items", "chosen", "probs", "none", "mask", "tau"]),
    st.sampled_from(BROKEN),
)
def test_nothing_returns_nan(seed, where, value):
    state, interaction = random_case(seed, masked=1.0 if where == "mask" else 0.3)
    interaction = interaction._replace(chosen=interaction.chosen.astype(jnp.float32))
    if where in ("reward", "gate"):
        interaction = interaction._replace(**{where: jnp.float32(value)})
    elif where in ("base", "items", "chosen"):
        interaction = interaction._replace(**{where: getattr(interaction, where).at[1].set(value)})
    # A traced temperature cannot be refused, so it must do no harm.
    config = PersonalisationConfig(tau=jnp.float32(-value if where == "tau" else 0.5))
    scores, probs = scores_of(interaction.base, state, interaction.items, interaction.mask, config)
    assert not jnp.isnan(scores).any() and jnp.isfinite(probs).all()
    assert jnp.isclose(probs.sum(), 1.0, atol=1e-6) or (probs == 0).all()
    if where == "probs":
        probs = probs.at[1].set(value)
    base, items, mask, chosen, counts, reward, gate = interaction
    after, updated = update_of(state, items, mask, chosen, counts, probs, reward, gate, config)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in after)
    assert updated or same_bits(after, state)
    if where in ("mask", "tau") or (where in ("reward", "gate") and not np.isfinite(value)):
        assert not updated and (where not in ("mask", "tau") or (probs == 0).all())


def test_a_candidate_with_a_broken_vector_is_absent_and_the_others_go_on():
    state, interaction = random_case(3, masked=0.0)
    interaction = interaction._replace(chosen=jnp.array([2, 2, 2, 2]), chosen_mask=jnp.ones(C, bool))
    broken = interaction._replace(items=interaction.items.at[1].set(jnp.nan))
    absent = interaction._replace(mask=interaction.mask.at[1].set(False))
    config = PersonalisationConfig()
    (after, updated), (expected, _) = learn_of(state, broken, config), learn_of(state, absent, config)
    assert updated
    for leaf, other in zip(after, expected, strict=True):
        np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-6)
    of_broken = broken._replace(chosen=jnp.array([1, 1, 1, 1]))
    assert not learn_of(state, of_broken, config)[1]


@pytest.mark.parametrize("where", ["base", "items"])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_candidate_that_could_not_be_served_was_not_chosen(where, given, value):
    """Learning and serving agree on who is there, also where the probabilities are those of the serving."""
    config, (state, interaction) = PersonalisationConfig(), random_case(3, masked=0.0)
    interaction = interaction._replace(chosen=jnp.array([1, 2, 2, 2]), chosen_mask=jnp.ones(C, bool))
    broken = interaction._replace(**{where: getattr(interaction, where).at[1].set(value)})
    absent = interaction._replace(mask=interaction.mask.at[1].set(False))
    base, items, mask, *_ = broken
    probs = scores_of(base, state, items, mask, config)[1]
    assert probs[1] == 0.0
    more = (probs,) if given else ()
    (after, updated), (expected, _) = learn_of(state, broken, config, *more), learn_of(state, absent, config)
    assert updated
    for leaf, other in zip(after, expected, strict=True):
        np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-6)
    alone = broken._replace(chosen=jnp.array([1, 1, 1, 1]))
    after, updated = learn_of(state, alone, config, *more)
    assert not updated and same_bits(after, state)


def test_probabilities_that_were_given_do_not_need_scores():
    """Served by another program that kept no base scores: what it gave a probability was there."""
    config, (state, interaction) = PersonalisationConfig(), random_case(3, masked=0.0)
    interaction = interaction._replace(chosen=jnp.array([1, 2, 2, 2]), chosen_mask=jnp.ones(C, bool))
    probs = scores_of(interaction.base, state, interaction.items, interaction.mask, config)[1]
    (after, updated), (expected, _) = (
        learn_of(state, case, config, probs) for case in (interaction._replace(base=jnp.full(K, jnp.nan)), interaction)
    )
    assert updated
    for leaf, other in zip(after, expected, strict=True):
        np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-7)


def test_whole_and_cut_off_numbers_name_the_same_candidates():
    state, interaction = random_case(5, masked=0.0)
    config, everything = PersonalisationConfig(), jnp.ones(C, bool)
    whole = interaction._replace(chosen=jnp.array([1, 1, 4, -1]), chosen_mask=everything)
    for chosen in (jnp.array([1.9, 1.0, 4.2, -1.0]), jnp.array([1, 4, 4, 200], jnp.uint8), jnp.array([1, 4, -4, 6])):
        for leaf, other in zip(
            learn_of(state, whole._replace(chosen=chosen), config)[0], learn_of(state, whole, config)[0], strict=True
        ):
            np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-7)


def test_many_users_at_once_are_each_user_alone():
    cases = [random_case(seed) for seed in range(40)]
    users, interactions = jax.tree.map(lambda *x: jnp.stack(x), *cases)
    config = PersonalisationConfig(tau=0.6)
    together, updated = learn_all(users, interactions, config)
    alone = [learn_of(*case, config) for case in cases]
    assert [bool(u) for _, u in alone] == updated.tolist() and 5 < updated.sum() < 40
    for number, (state, _) in enumerate(alone):
        for leaf, other in zip(jax.tree.map(lambda x, n=number: x[n], together), state, strict=True):
            np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-6)


def test_a_broken_user_in_a_batch_does_not_touch_the_others():
    cases = [random_case(seed, masked=0.0) for seed in range(8)]
    users, interactions = jax.tree.map(lambda *x: jnp.stack(x), *cases)
    config = PersonalisationConfig()
    clean, _ = learn_all(users, interactions, config)
    broken, updated = learn_all(users, interactions._replace(items=interactions.items.at[0].set(jnp.nan)), config)
    assert not updated[0] and updated[1:].any()
    assert same_bits(jax.tree.map(lambda x: x[0], broken), cases[0][0])
    for leaf, other in zip(clean, broken, strict=True):
        np.testing.assert_allclose(leaf[1:], other[1:], rtol=0, atol=1e-6)


def test_a_scan_over_interactions_is_a_loop_and_takes_users_side_by_side():
    users, horizon, config = 3, 7, PersonalisationConfig(tau=0.8)
    cases = [[random_case(100 * user + turn)[1] for turn in range(horizon)] for user in range(users)]
    rows = [jax.tree.map(lambda *x: jnp.stack(x), *row) for row in cases]
    start = jax.tree.map(lambda x: jnp.broadcast_to(x, (users, *x.shape)), new_user(DIM))
    interactions = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    last, updated = jax.jit(jax.vmap(replay, in_axes=(0, 0, None)))(start, interactions, config)
    assert updated.shape == (users, horizon)
    for user, row in enumerate(cases):
        state = new_user(DIM)
        for interaction in row:
            state, _ = learn_of(state, interaction, config)
        for leaf, other in zip(last, state, strict=True):
            np.testing.assert_allclose(leaf[user], other, rtol=0, atol=1e-5)


def test_the_step_is_the_gradient_of_the_log_probability():
    """Independently of the formula: eta (reward - mean) d log p / d z, averaged over the chosen items."""
    state, interaction = random_case(11, masked=0.0)
    base, items, mask, *_ = interaction
    config = PersonalisationConfig(tau=0.6, beta_long=1.0, beta_short=0.0, short_decay=0.0)

    def log_probability(z_long):
        scores, _ = policy_scores(base, state._replace(z_long=z_long), items, mask, config)
        return jax.nn.log_softmax(scores / config.tau)[jnp.array([0, 3])].mean()

    one = interaction._replace(chosen=jnp.array([0, 3, 3, 0]), chosen_mask=jnp.ones(C, bool), gate=jnp.float32(0.7))
    after, _ = learn_of(state, one, config)
    step = 0.7 * (one.reward - state.reward_ma) * jax.grad(log_probability)(state.z_long)
    np.testing.assert_allclose(after.z_long, state.z_long + config.eta_long * step, atol=1e-6)
    np.testing.assert_allclose(after.z_short, state.z_short + config.eta_short * step, atol=1e-6)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("tau", 0.0), ("tau", -1.0), ("tau", float("nan")), ("eta_long", -0.1), ("eta_short", float("inf"))]
    + [("short_decay", 1.1), ("short_decay", -0.1), ("ema_alpha", 2.0), ("beta_long", float("nan"))],
)
def test_numbers_out_of_range_are_refused(name, value):
    config = PersonalisationConfig(**{name: value})
    state, interaction = random_case(0)
    for refuse in (
        lambda: check_config(config),
        lambda: policy_scores(interaction.base, state, interaction.items, interaction.mask, config),
        lambda: learn(state, interaction, config),
        lambda: jax.jit(partial(learn, config=config))(state, interaction),  # known while it is traced
    ):
        with pytest.raises(SettingError, match=name):
            refuse()


def test_users_of_one_program_may_differ_in_their_numbers():
    check_config(PersonalisationConfig(tau=jnp.array([0.5, 1.0])))
    with pytest.raises(SettingError, match="tau"):
        check_config(PersonalisationConfig(tau=jnp.array([0.5, 0.0])))


@pytest.mark.parametrize("name", ["base", "items", "mask", "chosen", "chosen_mask"])
def test_shapes_that_do_not_belong_together_are_refused(name):
    state, interaction = random_case(0)
    wrong = jnp.zeros((K + 1, DIM + 1)) if name in ("items", "chosen") else jnp.zeros(K + 1)
    with pytest.raises(SettingError, match="items|base|mask|chosen"):
        learn(state, interaction._replace(**{name: wrong}), PersonalisationConfig())


# -- probe -------------------------------------------------------------------------------------------------------------


@jax.jit
def served(key: jax.Array, likes: jax.Array, config: PersonalisationConfig) -> jax.Array:
    """Probabilities of K orthogonal items in 400 sampled servings of 50 users who like one: [users, turns, K]."""
    items, base, mask = jnp.eye(K), jnp.zeros(K), jnp.ones(K, bool)

    def turn(state, key):
        probs = policy_scores(base, state, items, mask, config)[1]
        item = jax.random.choice(key, K, p=probs)
        reward = (item == likes).astype(jnp.float32)
        return update(state, items, mask, item[None], jnp.array([True]), probs, reward, 1.0, config)[0], probs

    return jax.vmap(lambda key: jax.lax.scan(turn, new_user(K), jax.random.split(key, 400))[1])(
        jax.random.split(key, 50)
    )


@pytest.mark.parametrize("likes", [0, 4])
def test_who_likes_one_item_is_served_it(likes):
    probs = np.asarray(served(jax.random.key(likes), likes, PersonalisationConfig(eta_long=0.3, beta_short=0.0)))
    assert probs[:, -1, likes].min() > 0.5 and probs[:, -1, likes].mean() > 0.9
    np.testing.assert_allclose(probs[:, 0], 1 / K, atol=1e-6)  # nothing was known at the start


# -- the experiment ----------------------------------------------------------------------------------------------------


def test_the_experiment_tells_regret_against_the_static_ranker(tmp_path, capsys):
    out, written = tmp_path / "out", tmp_path / "new" / "numbers.json"
    experiment.main(experiment.Arguments(budget="smoke", out=out, json=written))
    rows = {(row["world"], row["policy"]): row for row in json.loads(written.read_text())["table"]}
    assert len(rows) == len(experiment.WORLDS) * len(experiment.POLICIES)
    for (world, policy), row in rows.items():
        saved = rows[world, "static-first"]["regret"] - row["regret"]
        assert row["saved_against_static"] == pytest.approx(saved, abs=1e-3) and row["seeds"] == 2
        assert row["regret_interval"][0] < row["regret"] < row["regret_interval"][1]
        assert (saved > 1) == policy.startswith("long")  # learning pays within 50 turns, sampling alone costs
    text = (out / "personalisation.md").read_text()
    assert text.count("\n|") == 2 + len(rows) and "slow and fast vector" in text
    assert (out / "cumulative_regret.png").read_bytes().startswith(b"\x89PNG")
    assert "picture:" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [{"budget": "tiny"}, {"seed": -1}])
def test_the_experiment_refuses_what_it_does_not_know(wrong, tmp_path):
    with pytest.raises(SettingError):
        experiment.main(experiment.Arguments(out=tmp_path / "out", **wrong))
    assert not (tmp_path / "out").exists()
