"""Ranking policies, their agent and their users: recorded numbers, what must never happen, worlds with a known best."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import ranking as experiment
from experiments._ranking_simulator import SIMULATOR, settings_of, simulator_table
from gemsjax.errors import DataError, SettingError
from gemsjax.maths.plackett_luce import COSINE, LogitHook, Penaliser
from gemsjax.nets.scorer import CommonTowerScorer, DotProductScorer
from gemsjax.ranking import (
    Cascade,
    PositionBiasEnv,
    RankingAgentHypers,
    RankingAgentSpec,
    RankingEnv,
    RankingHypers,
    RankingObservation,
    RankingRun,
    RankingSpec,
    Slates,
    make_ranking_agent,
    make_ranking_policy,
    make_ranking_training,
    scorer_quality,
    soft_update,
)
from gemsjax.ranking.agent import bias_multipliers, check_agent_hypers, slot_weights, target_scores
from gemsjax.ranking.policy import check_hypers

CASES = json.loads((Path(__file__).parent / "golden" / "ranking_examples.json").read_text())["cases"]
GOLDEN = {case["id"]: case for case in CASES}
DOT = DotProductScorer((), ())
"""Scores are `item . user`."""
TOWER = CommonTowerScorer((3,), (4,), (5,))

# -- policies ----------------------------------------------------------------------------------------------------------

FEW = GOLDEN["num_actions_less_than_slots"]


@pytest.mark.parametrize("kind", ["cosine", "no_penalty", "descending"])
def test_fewer_items_than_slots(kind):
    policy = make_ranking_policy(RankingSpec(5, 4, kind, emit_log_probability=True), DOT)
    items = jnp.array(FEW["per_arm"])

    @jax.jit
    def serve(user, count, keys):
        observation = RankingObservation(user, items, count)
        steps = jax.vmap(lambda key: policy.action({}, RankingHypers(), observation, key))(keys)
        return steps, policy.greedy({}, RankingHypers(), observation)

    for row, user in enumerate(FEW["global_features"]):
        count = FEW["num_actions"][row]
        steps, greedy = serve(jnp.array(user), count, jax.random.split(jax.random.key(0), 64))
        padding = FEW["result"][kind]["padding_slots_always"][0][row]
        for slate in (*np.asarray(steps.action), np.asarray(greedy.action)):
            assert slate[count:].tolist() == padding
            assert sorted(slate[:count].tolist()) == list(range(count))
        assert (np.asarray(steps.valid) == (np.arange(4) < count)).all()
        np.testing.assert_allclose(greedy.predicted_rewards_mean, FEW["scores"][row])  # raw, of all items
        own = np.asarray(FEW["scores"][row])[np.asarray(greedy.action)]
        np.testing.assert_allclose(greedy.slate_scores, np.where(np.arange(4) < count, own, 0.0))
        best = sorted(range(count), key=lambda item, row=row: -FEW["scores"][row][item])
        assert kind == "cosine" or np.asarray(greedy.action)[:count].tolist() == best
        different = len({tuple(slate) for slate in np.asarray(steps.action).tolist()})
        assert (different == 1) == (kind == "descending")
        assert np.isfinite(steps.log_prob).all() and (np.asarray(steps.log_prob) < 0).any() == (kind != "descending")
    steps, _ = serve(jnp.array(user), 0, jax.random.split(jax.random.key(0), 64))
    assert not steps.valid.any() and ((steps.action >= 0) & (steps.action < 5)).all()
    assert (steps.slate_scores == 0.0).all() and (steps.log_prob == 0.0).all()


@pytest.fixture(scope="module")
def variables():
    """Of a small tower for users of 7 numbers and items of 5."""
    return jax.jit(TOWER.init)(jax.random.key(0), jnp.ones(7), jnp.ones((1, 5)))


@pytest.mark.parametrize(
    ("kind", "batch", "items", "slots"), [tuple(row) for row in GOLDEN["shape_uniqueness_grid"]["rows"]]
)
def test_shapes_and_different_items(variables, kind, batch, items, slots):
    policy = make_ranking_policy(RankingSpec(items, slots, kind), TOWER)
    keys = jax.random.split(jax.random.key(1), batch)
    seen = RankingObservation(np.ones((batch, 7)), np.random.default_rng(0).normal(size=(batch, items, 5)))
    step = jax.jit(jax.vmap(lambda one, key: policy.action(variables, RankingHypers(), one, key)))(seen, keys)
    assert step.action.shape == (batch, slots) and step.predicted_rewards_mean.shape == (batch, items)
    assert all(len(set(row)) == slots for row in step.action.tolist()) and step.valid.all() and step.log_prob is None


@pytest.mark.parametrize(
    ("kind", "batch", "items", "slots", "penalty"), [tuple(row) for row in GOLDEN["num_actions_grid"]["rows"]]
)
def test_shapes_with_a_number_of_items_that_varies(variables, kind, batch, items, slots, penalty):
    policy = make_ranking_policy(RankingSpec(items, slots, kind), TOWER)
    keys, count = jax.random.split(jax.random.key(1), batch), 1 + jnp.arange(batch) * (items - 1) // max(batch - 1, 1)
    seen = RankingObservation(np.ones((batch, 7)), np.random.default_rng(0).normal(size=(batch, items, 5)), count)
    hypers = RankingHypers(penalty=penalty)
    step = jax.jit(jax.vmap(lambda one, key: policy.action(variables, hypers, one, key)))(seen, keys)
    assert step.action.shape == (batch, slots) and step.predicted_rewards_mean.shape == (batch, items)
    for slate, valid, number in zip(step.action.tolist(), step.valid.tolist(), count.tolist(), strict=True):
        served = min(number, slots)
        assert valid == [True] * served + [False] * (slots - served)
        assert len(set(slate[:served])) == served and max(slate[:served]) < number
        assert slate[served:] == [items - 1] * (slots - served)


@pytest.mark.parametrize("kind", ["cosine", "no_penalty", "descending"])
@pytest.mark.parametrize("filling", [np.nan, np.inf, 3e38])
def test_what_is_in_absent_items_reaches_neither_scores_nor_gradients(variables, kind, filling):
    """An item beyond the count, under a network: as with zeros in its place. 3e38 is a number that overflows only in
    there."""
    policy = make_ranking_policy(RankingSpec(6, 3, kind, emit_log_probability=True), TOWER)
    items = jax.random.normal(jax.random.key(2), (6, 5))

    @jax.jit
    def of(items, user, count):
        seen = RankingObservation(user, items, count)
        step = policy.action(variables, RankingHypers(), seen, jax.random.key(3))
        value = lambda held: policy.distribution(held, RankingHypers(), seen).log_prob(jnp.array([0, 2, 1]))  # noqa: E731
        return step, *jax.value_and_grad(lambda held: jnp.maximum(value(held), -1e6))(variables)

    dirty, clean = (of(items.at[4:].set(x), jnp.ones(7), jnp.int32(4)) for x in (filling, 0.0))
    for ours, theirs in zip(jax.tree.leaves(dirty[1:]), jax.tree.leaves(clean[1:]), strict=True):
        assert np.isfinite(ours).all()
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(dirty[0].action, clean[0].action)
    assert filling == 3e38 or np.isfinite(dirty[0].predicted_rewards_mean).all()
    if filling == 3e38:
        return
    # The same among the items that there are, and in the user: not available, and no NaN anywhere.
    step, log_prob, slope = of(items.at[3].set(filling), jnp.ones(7), jnp.int32(6))
    assert 3 not in step.action[step.valid].tolist() and np.isfinite(step.predicted_rewards_mean).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((step.slate_scores, log_prob, slope)))
    step, log_prob, slope = of(items, jnp.ones(7).at[1].set(filling), jnp.int32(6))
    assert not step.valid.any() and np.isfinite(step.predicted_rewards_mean).all() and float(log_prob) == 0.0
    assert all((leaf == 0.0).all() for leaf in jax.tree.leaves(slope))


def test_ties_temperature_and_nan():
    case = GOLDEN["descending_ties"]
    scores = jnp.array(case["scores"])
    hot, user = make_ranking_policy(RankingSpec(6, 4, "no_penalty"), DOT), jnp.ones(1)
    ranked = make_ranking_policy(RankingSpec(6, case["num_slots"], "descending"), DOT)

    @jax.jit
    def serve(scores, temperature):
        seen = RankingObservation(user, scores[:, None])
        keys, hypers = jax.random.split(jax.random.key(0), 30), RankingHypers(temperature=temperature)
        told = ranked.distribution({}, hypers, seen)
        drawn = jax.vmap(lambda key: hot.action({}, hypers, seen, key))(keys)
        return ranked.action({}, hypers, seen, keys[0]), told.sample(seed=keys[0]), drawn

    step, sampled, cold = serve(scores, 0.001)
    assert step.action.tolist() == case["expected"] == sampled.tolist()
    first = [len(set(np.asarray(drawn.action[:, 0]).tolist())) for drawn in (cold, serve(scores, 1000.0)[2])]
    assert first[0] < first[1]
    broken = serve(scores.at[jnp.array([1, 2])].set(jnp.nan), 1.0)
    assert broken[0].action.tolist() == [5, 0, 4, 3]  # NaN counts as absent
    assert not np.isin(np.asarray(broken[2].action)[np.asarray(broken[2].valid)], [1, 2]).any()
    for temperature in (0.0, -1.0, np.nan):  # traced: nobody is served, nothing breaks
        drawn = serve(scores, temperature)[2]
        assert not drawn.valid.any() and np.asarray(drawn.action[0]).tolist() == [0, 1, 2, 3]


def test_the_probability_of_a_ranked_slate():
    """1 for the slate and 0 for any other; what is in slots without an item counts nothing, as in drawn slates."""
    ranked = make_ranking_policy(RankingSpec(6, 3, "descending"), DOT)
    drawn = make_ranking_policy(RankingSpec(6, 3, "no_penalty"), DOT)
    seen = RankingObservation(jnp.ones(1), jnp.array([[1.0], [2.0], [9.0], [0.0], [0.0], [0.0]]), jnp.int32(2))
    slates = jnp.array([[1, 0, 2], [1, 0, 5], [1, 0, -1], [0, 1, 2], [1, 2, 0], [1, 1, 2], [-1, 0, 2]])
    told = ranked.distribution({}, RankingHypers(), seen)
    assert told.log_prob(slates).tolist() == [0.0] * 3 + [-np.inf] * 4
    assert told.valid.tolist() == [True, True, False]
    possible = np.isfinite(drawn.distribution({}, RankingHypers(), seen).log_prob(slates))
    assert possible.tolist() == [True] * 4 + [False] * 3
    empty = ranked.distribution({}, RankingHypers(), seen._replace(num_actions=jnp.int32(0)))
    assert (empty.log_prob(slates) == 0.0).all()
    draws, own = told.sample_and_log_prob(seed=jax.random.key(0), sample_shape=(2,))
    assert draws[:, :2].tolist() == [[1, 0]] * 2 and own.tolist() == [0.0, 0.0]


def without_neighbours(slate: list[int], number: int) -> bool:
    """Whether an item beside one above it was only taken where all that were left were such."""
    for slot, item in enumerate(slate):
        near = {other + step for other in slate[:slot] for step in (-1, 1)}
        if item in near and set(range(number)) - set(slate[:slot]) - near:
            return False
    return True


APART = {
    "penaliser": Penaliser(
        lambda features: jnp.arange(features.shape[0]),
        lambda numbers, item: (1e6 * (jnp.abs(numbers - item) == 1), numbers),
    ),
    "hook": LogitHook(
        lambda logits, slots, number, given: jnp.where(
            jnp.abs(jnp.arange(6) - slots[number - 1]) == 1, logits - 1e6, logits
        )
    ),
}
"""Both forbid neighbours in the catalogue, nearly."""


@pytest.mark.parametrize("form", APART)
def test_a_penalty_of_ones_own(form):
    seen = RankingObservation(jnp.ones(1), jnp.array([[0.0], [9.0], [0.0], [8.9], [0.0], [8.8]]))
    close = seen._replace(items=seen.items[jnp.array([0, 1, 3, 5, 2, 4])])  # the best are neighbours
    policy = make_ranking_policy(RankingSpec(6, 3, "unknown"), DOT, APART[form])
    keys = jax.random.split(jax.random.key(1), 64)
    hot = RankingHypers(temperature=10.0)

    @jax.jit
    def serve(seen):
        drawn = jax.vmap(lambda key: policy.action({}, hot, seen, key).action)(keys)
        return drawn, policy.greedy({}, RankingHypers(), seen).action

    for observation, best in ((seen, [1, 3, 5]), (close, [1, 3, 5])):
        drawn, greedy = serve(observation)
        assert all(without_neighbours(slate, 6) for slate in drawn.tolist()) and greedy.tolist() == best
        assert len({tuple(slate) for slate in drawn.tolist()}) > 10
    plain = make_ranking_policy(RankingSpec(6, 3, "no_penalty"), DOT)
    slates = jax.vmap(lambda key: plain.action({}, hot, close, key).action)(keys).tolist()
    assert not all(without_neighbours(slate, 6) for slate in slates)  # what is asserted above can fail
    assert plain.greedy({}, hot, close).action.tolist() == [1, 2, 3]


def test_what_a_policy_refuses():
    for spec in (RankingSpec(3, 4), RankingSpec(0, 1), RankingSpec(4, 2, "cosin")):
        with pytest.raises(SettingError):
            make_ranking_policy(spec, DOT)
    for case in GOLDEN["validation"]["cases"][:2]:
        with pytest.raises(ValueError, match="temperature"):
            check_hypers(RankingHypers(temperature=case["logits_temperature"]))
    with pytest.raises(SettingError, match="penalty"):
        check_hypers(RankingHypers(penalty=float("inf")))
    for kind in ("no_penalty", "descending"):
        with pytest.raises(SettingError, match=f"the kind {kind} has no penalty"):
            make_ranking_policy(RankingSpec(4, 2, kind), DOT, COSINE)
    policy = make_ranking_policy(RankingSpec(4, 2), DOT)
    with pytest.raises(SettingError, match="vmap"):
        policy.greedy({}, RankingHypers(), RankingObservation(jnp.ones((3, 2)), jnp.ones((3, 4, 2))))


def test_soft_update():
    own, other = ({"params": {"a": jnp.full(2, x)}, "statistics": {"b": jnp.full(2, x)}} for x in (1.0, 3.0))
    numbers = lambda *shares: [float(x[0]) for x in jax.tree.leaves(soft_update(own, other, *shares))]  # noqa: E731
    assert numbers() == [3.0, 3.0]
    assert numbers(0.25) == [1.5, 1.5]
    assert numbers(0.25, 1.0) == [1.5, 3.0]
    assert numbers(0.0) == [1.0, 1.0]
    with pytest.raises(SettingError, match="tau = 1.5"):
        soft_update(own, other, 1.5)


def test_scorers():
    user, items = (jax.random.normal(jax.random.key(seed), shape) for seed, shape in ((1, (2, 7)), (2, (2, 4, 5))))

    @jax.jit
    def made(key):
        score = CommonTowerScorer((6, 3), (4,), (8,))
        variables = score.init(key, user, items)
        encoder = CommonTowerScorer((6,), (), (8,), output_dim=9)
        dot = DotProductScorer((6, 3), (3,))
        coded = encoder.apply(encoder.init(key, user, items), user, items)
        return variables, score.apply(variables, user, items), coded, dot.init_with_output(key, user, items)[0]

    variables, scores, coded, dots = made(jax.random.key(0))
    params = variables["params"]
    assert scores.shape == (2, 4) and dots.shape == (2, 4)
    assert coded.shape == (2, 4, 9) and (coded >= 0).all() and (coded > 0).any()
    assert params["user"]["layer1"]["kernel"].shape == (6, 3) and params["items"]["layer0"]["kernel"].shape == (5, 4)
    assert params["common"]["layer0"]["kernel"].shape == (7, 8)
    assert (params["score"]["bias"] == -0.2).all() and (jnp.abs(params["score"]["kernel"]) <= 0.03).all()
    assert jnp.abs(params["score"]["kernel"]).max() > 0.015
    np.testing.assert_allclose(DOT.apply({}, jnp.array([1.0, 2.0]), jnp.array([[3.0, 4.0]])), [11.0])
    with pytest.raises(ValueError, match="same for users and items"):
        DotProductScorer((6, 3), (4,)).init(jax.random.key(0), user, items)


# -- the agent ---------------------------------------------------------------------------------------------------------

LOSSES = [name for name in GOLDEN if name.startswith("agent_")]
POLICY = make_ranking_policy(RankingSpec(9, 4), DOT)
FIXED = (0.1, 0.2, 0.3, 0.4)


def loss_of(spec: RankingAgentSpec, severity: float, slates: Slates) -> float:
    return float(make_ranking_agent(spec, POLICY).loss({}, RankingAgentHypers(bias_severity=severity), slates))


def recorded(name: str, **change) -> tuple[RankingAgentSpec, float, Slates]:
    case = GOLDEN[name]
    bias = next(bias for bias in ("unset", "base", "exponent", "fixed") if f"_{bias}" in name)
    only = "positive_only" in name
    severity = next((float(word) for word in name.split("_") if word[0].isdigit()), 1.0)
    feedback = case["feedback"]
    kind = "cascading" if isinstance(feedback, dict) else "score_vector"
    told = Cascade(*map(jnp.array, feedback.values())) if kind == "cascading" else jnp.array(feedback)
    items = jnp.tile(jnp.array(case["slotted_item_features"]), (3, 1, 1))
    count = case["num_actions"]
    present = None if count is None else jnp.arange(4) < jnp.array(count)[:, None]
    spec = RankingAgentSpec(kind, None, bias, FIXED if bias == "fixed" else None, only, compat=only)
    slates = Slates(jnp.array(case["global_features"]), items, told, present)
    return dataclasses.replace(spec, **change), severity, slates


@pytest.mark.parametrize("name", LOSSES)
def test_recorded_losses(name):
    assert loss_of(*recorded(name)) == pytest.approx(GOLDEN[name]["expected_loss_mse"], abs=2e-6)


def test_recorded_targets_and_biases():
    for name, score in (("-1.0", None), ("-10.0", -10.0), ("0.0", 0.0)):
        case = GOLDEN[f"cascading_scores_{name}"]
        spec = RankingAgentSpec(non_click_score=score)
        told = Cascade(jnp.array(case["chosen_index"]), jnp.array(case["chosen_value"]))
        rows = jax.vmap(lambda feedback, spec=spec: target_scores(spec, feedback, 4))(told)
        np.testing.assert_array_equal(rows, case["expected"])
    case = GOLDEN["cascading_to_scorevector"]
    told = Cascade(jnp.array(case["chosen_items"]), jnp.array(case["chosen_values"], jnp.float32))
    zero = RankingAgentSpec("unknown", non_click_score=0.0)
    rows = jax.vmap(lambda feedback: target_scores(zero, feedback, case["num_slots"]))(told)
    np.testing.assert_array_equal(rows, case["expected"])
    for kind, severity, weights, expected in GOLDEN["positional_bias_second_weight"]["rows"]:
        name = {"FIXED_BIAS_WEIGHTS": "fixed"}.get(kind, kind.lower())
        spec = RankingAgentSpec(bias=name, bias_weights=None if weights is None else tuple(weights))
        slots = 11 if weights is None else len(weights)
        assert float(bias_multipliers(spec, severity or 1.0, slots)[1]) == pytest.approx(expected, abs=1e-3)


def test_positive_only_as_it_is_meant():
    """Masks stay, and the multiplier counts where the target is positive: by hand, in the recorded slates."""
    for count in ("False", "True"):
        name = f"agent_cascading_base_1.0_positive_only_na{count}"
        spec, severity, slates = recorded(name, compat=False)
        base = np.array(GOLDEN[f"agent_cascading_unset_na{count}"]["raw_weights_before_positive_only"])
        targets = np.array([[1, 0, 0, 0], [-1, -1, 2, 0], [-1, -1, -1, -1]])
        weights = base * np.where(targets > 0, np.arange(1, 5), 1)
        scores = np.asarray(DOT.apply({}, slates.user, slates.items))
        expected = (weights * (scores - targets) ** 2).sum() / weights.sum()
        assert loss_of(spec, severity, slates) == pytest.approx(expected, abs=1e-5)
        same = loss_of(dataclasses.replace(spec, bias="unset"), severity, slates)
        assert same == pytest.approx(GOLDEN[f"agent_cascading_unset_na{count}"]["expected_loss_mse"], abs=1e-5)
        # The reference acts on the weights even where no bias is set.
        slip = loss_of(dataclasses.replace(spec, bias="unset", compat=True), severity, slates)
        ones = np.where(targets > 0, base, 1.0)
        assert slip == pytest.approx((ones * (scores - targets) ** 2).sum() / ones.sum(), abs=1e-5)


@pytest.mark.parametrize("loss", ["squared", "sigmoid", "softmax"])
@pytest.mark.parametrize(("positive_only", "compat"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("bias", "severity"), [("base", 40.0), ("exponent", 1e5), ("fixed", 1.0)])
def test_any_severity_of_the_bias_has_a_loss(bias, severity, positive_only, compat, loss):
    """Weights beyond float32, against means in double precision; ordinary ones are left alone to the last bit."""
    size, rng = 10, np.random.default_rng(0)
    fixed = tuple(3e38 / 10.0**slot for slot in range(size)) if bias == "fixed" else None
    spec = RankingAgentSpec("score_vector", None, bias, fixed, positive_only, compat, loss)
    agent = make_ranking_agent(spec, make_ranking_policy(RankingSpec(size, size), DOT))
    clicks = (rng.uniform(size=(3, size)) < 0.3).astype(np.float32)
    slates = Slates(jnp.ones((3, 1)), jnp.asarray(rng.normal(size=(3, size, 1)), jnp.float32), jnp.asarray(clicks))
    found = float(agent.loss({}, RankingAgentHypers(bias_severity=severity), slates))
    slots = np.arange(size, dtype=np.float64)
    multipliers = np.array(fixed) if fixed else (slots + 1) ** severity if bias == "base" else severity**slots
    weights = np.where(clicks > 0, multipliers, 1.0) if positive_only else np.tile(multipliers, (3, 1))
    scores = np.asarray(slates.items, np.float64)[..., 0]
    if loss == "softmax":
        errors = np.log(np.exp(scores).sum(axis=1)) * clicks.sum(axis=1) - (clicks * scores).sum(axis=1)
        weights = weights[:, 0]
    else:
        cross = np.log1p(np.exp(scores)) - clicks * scores
        errors = (scores - clicks) ** 2 if loss == "squared" else cross
    assert found == pytest.approx((weights * errors).sum() / weights.sum(), rel=1e-4)
    feedback = jnp.array(clicks[0])
    plain = slot_weights(RankingAgentSpec("score_vector", bias="base"), 1.3, feedback, jnp.ones(size, bool), 1.0)
    np.testing.assert_array_equal(plain, (jnp.arange(size, dtype=jnp.float32) + 1.0) ** 1.3)


def test_other_losses_and_slate_weights():
    clicks = jnp.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]])
    _, _, slates = recorded("agent_score_vector_unset_naFalse")
    slates = slates._replace(feedback=clicks, weight=jnp.array([1.0, 2.0, 0.0]))
    scores = DOT.apply({}, slates.user, slates.items)
    row = optax.softmax_cross_entropy(scores, clicks)
    assert loss_of(RankingAgentSpec("score_vector", loss="softmax"), 1.0, slates) == pytest.approx(
        float((row[0] + 2 * row[1]) / 3), abs=1e-5
    )
    each = optax.sigmoid_binary_cross_entropy(scores, clicks)
    assert loss_of(RankingAgentSpec("score_vector", loss="sigmoid"), 1.0, slates) == pytest.approx(
        float((each[0] + 2 * each[1]).sum() / 12), abs=1e-5
    )


@pytest.fixture(scope="module")
def two_numbers():
    """Variables of the tower for users and items of two numbers."""
    return jax.jit(TOWER.init)(jax.random.key(0), jnp.ones(2), jnp.ones((1, 2)))


@pytest.mark.parametrize("loss", ["squared", "sigmoid", "softmax"])
@pytest.mark.parametrize("kind", ["cascading", "score_vector"])
def test_padding_and_what_is_not_a_number_teach_nothing(two_numbers, kind, loss):
    """Against the same slates without what should not count; values and gradients, under jit."""
    _, _, slates = recorded(f"agent_{kind}_unset_naTrue")
    dirty = slates._replace(items=jnp.where(slates.present[..., None], slates.items, jnp.nan))
    if kind == "cascading":
        more = Cascade(jnp.array([5, -1, 1]), jnp.array([1.0, 1.0, jnp.nan]))
        clean = None
    else:
        more = jnp.full((3, 4), jnp.inf)
        clean = slates.feedback
    agent = make_ranking_agent(
        RankingAgentSpec(kind, bias="base", loss=loss), make_ranking_policy(RankingSpec(9, 4), TOWER)
    )
    with_more = lambda feedback, *weights: jax.tree.map(  # noqa: E731
        lambda a, b: jnp.concatenate([a, b]), dirty, dirty._replace(feedback=feedback)
    )._replace(weight=jnp.array([1.0, 1.0, 1.0, *weights]))
    # The last slate of the cascade has one slot that is known, which would teach something.
    both = with_more(more, 1.0, 1.0, 0.0)
    dirty = with_more(dirty.feedback, 0.0, 0.0, 0.0)
    if clean is not None:
        dirty = dirty._replace(feedback=jnp.where(dirty.present, dirty.feedback, jnp.nan))

    @jax.jit
    def of(variables, slates):
        return jax.value_and_grad(agent.loss)(variables, RankingAgentHypers(), slates)

    told, again = (jax.tree.leaves(of(two_numbers, slates)) for slates in (dirty, both))
    for ours, theirs in zip(told, again, strict=True):
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    nothing = of(two_numbers, dirty._replace(present=jnp.zeros((6, 4), bool)))
    assert all((leaf == 0.0).all() for leaf in jax.tree.leaves(nothing))

    # Of six slates, the last three: an unknown user without items, one whose slate has no weight, a weight of NaN.
    unknown = dirty._replace(
        user=dirty.user.at[3:5].set(jnp.nan),
        present=dirty.present.at[3].set(False),
        weight=jnp.array([1.0, 1.0, 1.0, 1.0, 0.0, jnp.nan]),
    )
    # Each with weight 1: a user of NaN, an infinite one, and slates whose first items are NaN.
    counted = dirty._replace(user=dirty.user.at[3].set(jnp.nan).at[4, 0].set(jnp.inf), weight=jnp.ones(6),
                             items=dirty.items.at[5].set(jnp.nan))  # fmt: skip
    for broken in (unknown, counted):
        for ours, theirs in zip(told, jax.tree.leaves(of(two_numbers, broken)), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("compat", [False, True])
def test_parameters_stay_numbers(two_numbers, compat):
    """An update on users, items and weights that are NaN is one without them, the reference's weights included."""
    _, _, slates = recorded("agent_cascading_unset_naFalse")
    spec = RankingAgentSpec(bias="base", positive_only=compat, compat=compat)
    agent = make_ranking_agent(spec, make_ranking_policy(RankingSpec(9, 4), TOWER))
    state = agent.init(jax.random.key(0), RankingObservation(jnp.ones(2), jnp.ones((9, 2))))
    update = jax.jit(lambda slates: agent.update(state, RankingAgentHypers(), slates))
    slates = slates._replace(weight=jnp.ones(3), present=jnp.ones((3, 4), bool))
    without = jax.tree.map(lambda x: x.at[1].set(x[0]), slates)
    without = without._replace(weight=jnp.array([0.5, 0.5, 1.0])) if not compat else None
    for broken in (
        slates._replace(user=slates.user.at[1].set(jnp.nan)),
        slates._replace(weight=slates.weight.at[1].set(jnp.nan)),
        slates._replace(items=slates.items.at[1].set(jnp.inf)),
    ):
        after, metrics = update(broken)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after, metrics)))
        if without is not None:  # the slate before it counts twice by half: nothing was learnt from the broken one
            np.testing.assert_allclose(metrics["loss"], update(without)[1]["loss"], rtol=1e-5)
    # A slot after the click has no weight: with compat it has, and an item of NaN there still teaches nothing.
    after, metrics = update(slates._replace(items=slates.items.at[0, 1].set(jnp.nan)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after, metrics)))
    if not compat:
        np.testing.assert_allclose(metrics["loss"], update(slates)[1]["loss"], rtol=1e-6)


def test_a_scorer_without_parameters_has_nothing_to_learn():
    _, _, slates = recorded("agent_cascading_unset_naFalse")
    agent = make_ranking_agent(RankingAgentSpec(), POLICY)
    state = agent.init(jax.random.key(0), RankingObservation(jnp.ones(2), jnp.ones((9, 2))))
    after, metrics = agent.update(state, RankingAgentHypers(), slates)
    assert after.variables == {} and jax.tree.structure(after) == jax.tree.structure(state)
    assert float(metrics["loss"]) == pytest.approx(
        GOLDEN["agent_cascading_unset_naFalse"]["expected_loss_mse"], abs=2e-6
    )


def test_what_an_agent_refuses():
    make = lambda **change: make_ranking_agent(RankingAgentSpec(**change), POLICY)  # noqa: E731
    for score in (-10.0, 0.0):
        with pytest.raises(ValueError, match="non_click_score"):
            make(feedback="score_vector", non_click_score=score)
    for weights in (None, (0.1, 0.2), (0.1, 0.2, 0.3, float("nan"))):
        with pytest.raises(ValueError, match="bias_weights"):
            make(bias="fixed", bias_weights=weights)
    for change in ({"bias_weights": FIXED}, {"compat": True}, {"loss": "huber"}, {"bias": "bias"}, {"feedback": "x"}):
        with pytest.raises(SettingError):
            make(**change)
    for wrong in (RankingAgentHypers(rate=-1.0), RankingAgentHypers(bias_severity=float("nan"))):
        with pytest.raises(SettingError):
            check_agent_hypers(wrong)
    spec, severity, slates = recorded("agent_cascading_unset_naFalse")
    with pytest.raises(SettingError, match="as the spec says"):
        loss_of(dataclasses.replace(spec, feedback="score_vector"), severity, slates)
    with pytest.raises(SettingError, match="4 slotted items"):
        loss_of(spec, severity, slates._replace(items=slates.items[:, :3]))


# -- users -------------------------------------------------------------------------------------------------------------


def users_of(case: dict, **kind) -> tuple[RankingEnv, list[RankingObservation]]:
    items = jnp.array(case["slotted_items"])
    env = RankingEnv(lambda key: jnp.zeros(2), lambda key: items, 4, 4, **kind)
    return env, [RankingObservation(jnp.array(user), items) for user in case["global_features"]]


@pytest.mark.parametrize("cascade", [False, True])
def test_users_with_a_distance_threshold(cascade):
    case = GOLDEN[f"env_distance_click_real_cascade_{cascade}"]
    env, users = users_of(case, click_model="distance_based", real_cascade=cascade)
    params = env.params(jnp.array(case["weight_matrix"]), case["distance_threshold"])
    vector = dataclasses.replace(env, feedback="score_vector")
    for user, scores, index in zip(users, case["scores"], case["expected_chosen_index"], strict=True):
        np.testing.assert_allclose(env.relevance(user, params), scores, atol=1e-6)
        told = env.respond(jax.random.key(0), user, jnp.arange(4), params)
        assert int(told.feedback.chosen_index) == index and float(told.feedback.chosen_value) == (index < 4)
        clicks = [float(slot == index) for slot in range(4)]
        assert vector.respond(jax.random.key(0), user, jnp.arange(4), params).feedback.tolist() == clicks
        wrong = env.respond(jax.random.key(0), user, jnp.array([-1, 4, 99, 7]), params)
        assert wrong.invalid_action and int(wrong.feedback.chosen_index) == 4 and not wrong.clicks.any()
    nan = env.respond(jax.random.key(0), users[0]._replace(user=jnp.full(2, jnp.nan)), jnp.arange(4), params)
    assert int(nan.feedback.chosen_index) == 4


def test_users_with_ghosts():
    case = GOLDEN["env_ghost_probs_zero_noise"]
    env, users = users_of(case)
    params = env.params(jnp.array(case["weight_matrix"]))
    for user, expected in zip(users, case["expected_probs"], strict=True):
        logits = env.choice_logits(user, jnp.arange(4), params, jnp.zeros(6))
        np.testing.assert_allclose(jax.nn.softmax(logits), expected, atol=1e-6)
    few, slate = users[0]._replace(num_actions=jnp.int32(2)), jnp.array([1, 3, 0, -2])

    @jax.jit
    @jax.vmap
    def told(key):
        chosen = env.respond(key, few, slate, params).feedback.chosen_index
        noise = jax.random.normal(jax.random.fold_in(key, 9), (6,))
        return jax.nn.one_hot(chosen, 5), jax.nn.softmax(env.choice_logits(few, slate, params, noise))

    draws = 20_000
    chosen, chances = map(np.asarray, told(jax.random.split(jax.random.key(0), draws)))
    expected = np.append(chances[:, :4].mean(axis=0), chances[:, 4:].sum(axis=1).mean())
    assert (chances[:, [1, 3]] == 0.0).all() and (chosen[:, [1, 3]] == 0.0).all()
    assert (np.abs(chosen.mean(axis=0) - expected) < 4.5 * np.sqrt(0.5 / draws)).all()


def test_users_who_look_less_further_down():
    case = GOLDEN["explicit_bias_env"]
    relevance = jnp.array(case["relevance"])
    env = PositionBiasEnv(
        lambda key: jnp.zeros(1), lambda key: relevance[:, None], 4, 4, relevance_fn=lambda user, items: items[:, 0]
    )
    params = env.params(case["observation_probs"])
    _, state = env.reset(jax.random.key(0), params)
    chances = env.click_probabilities(state, jnp.arange(4), params)
    np.testing.assert_allclose(chances, case["expected_click_probs"], atol=1e-7)
    keys = jax.random.split(jax.random.key(1), 20_000)
    respond = jax.jit(jax.vmap(lambda key: env.respond(key, state, jnp.arange(4), params).feedback))
    clicks = np.asarray(respond(keys))
    assert (np.abs(clicks.mean(axis=0) - chances) <= 4.5 * np.sqrt(chances * (1 - chances) / 20_000)).all()
    assert (clicks.sum(axis=1) > 1).any()
    broken = state._replace(items=jnp.full((4, 1), jnp.nan))
    assert (env.click_probabilities(broken, jnp.arange(4), params) == 0.0).all()
    # An infinite relevance is no number, not a certain click.
    infinite = state._replace(items=relevance[:, None].at[0].set(jnp.inf).at[1].set(-jnp.inf))
    expected = chances.at[jnp.array([0, 1])].set(0.0)
    np.testing.assert_array_equal(env.click_probabilities(infinite, jnp.arange(4), params), expected)
    for wrong in ([1.0, 0.5], [1.0, 0.5, 1.2, 0.1], [float("nan")] * 4):
        with pytest.raises(ValueError, match="4 probabilities"):
            env.params(wrong)


def test_one_turn_and_a_varying_number_of_items():
    env = RankingEnv(lambda key: jax.random.normal(key, (2,)), lambda key: jax.random.normal(key, (6, 2)), 6, 3,
                     least_items=1)  # fmt: skip
    params = env.params(jnp.eye(2))

    @jax.jit
    @jax.vmap
    def play(key):
        observation, state = env.reset(key, params)
        after, _, feedback, terminated, truncated, info = env.step(key, state, jnp.array([0, 1, 5]), params)
        return observation, after, feedback, terminated, truncated, info

    observation, after, feedback, terminated, truncated, info = play(jax.random.split(jax.random.key(0), 300))
    assert terminated.all() and not truncated.any()
    assert (np.asarray(observation.user) != np.asarray(after.user)).any(axis=1).all()
    assert set(np.asarray(observation.num_actions).tolist()) == set(range(1, 7))
    # 5 is padding where there are two items or fewer, and not there while there are three to five.
    count = np.asarray(observation.num_actions)
    np.testing.assert_array_equal(info["invalid_action"], (count >= 3) & (count < 6))
    clicked = np.asarray(feedback.chosen_index)
    assert (clicked[np.asarray(observation.num_actions) == 1] != 1).all() and (clicked == 0).any()
    for wrong in ({"num_slots": 7}, {"click_model": "ghost"}, {"feedback": "clicks"}, {"least_items": 7}):
        with pytest.raises(SettingError):
            dataclasses.replace(env, **wrong)
    with pytest.raises(SettingError, match="distance_threshold"):
        dataclasses.replace(env, click_model="distance_based").params(jnp.eye(2))
    with pytest.raises(SettingError, match="distance_threshold"):
        env.params(jnp.eye(2), 1.0)
    with pytest.raises(SettingError, match="real_cascade"):
        dataclasses.replace(env, real_cascade=True)


@pytest.mark.parametrize("kind", ["cosine", "no_penalty", "descending"])
def test_no_policy_is_told_that_its_padding_is_invalid(kind):
    """Any number of items, some of them with features that are not numbers, in both environments."""

    def items(key):
        drawn = jax.random.normal(key, (6, 2))
        return drawn.at[1].set(jnp.where(drawn[0, 0] > 0.0, jnp.nan, drawn[1]))

    parts = (lambda key: jax.random.normal(key, (2,)), items, 6, 4)
    ghosts, biased = RankingEnv(*parts, least_items=0), PositionBiasEnv(*parts, least_items=0)
    policy = make_ranking_policy(RankingSpec(6, 4, kind), DOT)

    @jax.jit
    @jax.vmap
    def play(key):
        told = []
        for env, params in ((ghosts, ghosts.params(jnp.eye(2))), (biased, biased.params([1.0] * 4))):
            seen, state = env.reset(key, params)
            step = policy.action({}, RankingHypers(), seen, key)
            response = env.respond(key, state, step.action, params)
            first = env.respond(key, state, step.action.at[0].set(-1), params)  # wrong where there is an item
            told.append((response.invalid_action, first.invalid_action == step.valid[0],
                         (response.clicks & ~step.valid).any()))  # fmt: skip
        return told

    for invalid, first, padding in play(jax.random.split(jax.random.key(0), 200)):
        assert not invalid.any() and first.all() and not padding.any()


# -- learning ----------------------------------------------------------------------------------------------------------

ITEMS = jnp.eye(6)
WORTH = jnp.array([0.1, 0.9, 0.0, 0.2, 0.6, 0.1])


def test_probe_the_best_items_are_found_from_biased_clicks():
    """Six fixed items whose worth is known; slots are looked at with 1, 0.5. The two best must be ranked, in order."""
    env = PositionBiasEnv(
        lambda key: jnp.ones(1), lambda key: ITEMS, 6, 2, relevance_fn=lambda user, items: items @ WORTH, least_items=4
    )
    spec = RankingAgentSpec("score_vector", bias="base", positive_only=True)
    policy = make_ranking_policy(RankingSpec(6, 2, "cosine"), CommonTowerScorer((), (16,), (16,)))
    training = make_ranking_training(env, make_ranking_agent(spec, policy), users=64)
    hypers = jax.tree.map(jnp.float32, RankingAgentHypers(temperature=0.3, penalty=0.1, rate=1e-2))

    @jax.jit
    def learn(key):
        run = RankingRun(key, hypers, env.params([1.0, 0.5]))
        state, metrics = training.steps(run, training.init(run), jnp.arange(600))
        seen = RankingObservation(jnp.ones(1), ITEMS, jnp.int32(6))
        return (
            metrics,
            policy.greedy(state.variables, hypers, seen),
        )

    metrics, step = learn(jax.random.key(0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(metrics))
    assert step.action.tolist() == [1, 4]
    assert all(np.asarray(metrics[name])[-4:].mean() > 0.95 for name in ("recovered", "correlation"))
    assert np.asarray(metrics["clicks"])[-50:].mean() > 1.3 * np.asarray(metrics["clicks"])[:20].mean()


def test_training_refuses_what_does_not_fit():
    env = PositionBiasEnv(lambda key: jnp.ones(1), lambda key: ITEMS, 6, 2)
    agent = lambda feedback, slots: make_ranking_agent(  # noqa: E731
        RankingAgentSpec(feedback), make_ranking_policy(RankingSpec(6, slots), DOT)
    )
    with pytest.raises(SettingError, match="feedback"):
        make_ranking_training(env, agent("cascading", 2), 4)
    with pytest.raises(SettingError, match="num_slots"):
        make_ranking_training(env, agent("score_vector", 3), 4)


def test_quality_of_a_scorer():
    there = jnp.array([True] * 4 + [False])
    true = jnp.array([0.0, 1.0, 2.0, 3.0, jnp.nan])
    told = scorer_quality(jnp.array([1.0, 3.0, 5.0, 7.0, jnp.inf]), true, there, 2)
    assert [round(float(told[name]), 5) for name in ("correlation", "recovered", "error")] == [1.0, 1.0, 2.5]
    told = scorer_quality(jnp.zeros(5), true, there, 2)
    assert float(told["correlation"]) == 0.0 and float(told["recovered"]) == -1.0  # the first two are the worst
    assert all(float(value) == 0.0 for value in scorer_quality(true, true, jnp.zeros(5, bool), 2).values())
    # What is not a number does not count, on either side.
    whole = scorer_quality(jnp.array([1.0, 3.0, 6.0]), jnp.array([0.0, 1.0, 5.0]), jnp.ones(3, bool), 2)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        scores, worth = jnp.array([1.0, bad, 3.0, 6.0, 9.0]), jnp.array([0.0, 2.0, 1.0, 5.0, bad])
        told = jax.jit(scorer_quality, static_argnums=3)(scores, worth, jnp.ones(5, bool), 2)
        for name, value in whole.items():
            np.testing.assert_allclose(told[name], value, rtol=1e-6)


# -- the experiment ----------------------------------------------------------------------------------------------------


def test_tables_and_picture(tmp_path, monkeypatch, capsys):
    """With made-up numbers in place of learning: rows, paired differences, and records that are not made twice."""
    calls = []

    def made_up(name, kind, budget, seed):
        calls.append((name, kind))
        variants = experiment.VARIANTS[kind] | (experiment.UNCORRECTED[kind] if name == "position" else {})
        rows = {}
        for number, variant in enumerate(variants):
            clicks = [number + seed, number + seed + 2.0 + ("uncorrected" in variant)]
            rows[variant] = {metric: clicks if metric == "clicks" else [0.5, 0.7] for metric in experiment.METRICS}
        return rows

    monkeypatch.setattr(experiment, "play", made_up)
    arguments = experiment.Arguments("smoke", only="users", out=tmp_path, json=tmp_path / "numbers.json")
    for _ in range(2):
        experiment.main(arguments)
    assert len(calls) == len(experiment.WORLDS) * 2
    table = (tmp_path / "ranking.md").read_text()
    assert "| ghost actions | cosine 1 | 4.000 ± 12.706 | 0.600 ± 1.271 |" in table  # t = 12.706 for two seeds
    assert table.count("| descending |") == 2 * len(experiment.WORLDS) + 3
    assert "| ghost actions | cosine 1 | 2.000 ± 0.000 |" in table  # of the pairs: the seeds' spread is gone
    assert "| descending | difference | -1.500 ± 6.353 |" in table
    assert (tmp_path / "clicks_against_similarity.png").stat().st_size > 10_000
    assert set(json.loads((tmp_path / "numbers.json").read_text())["users"]) == set(experiment.WORLDS)
    # A record of other settings is neither found nor believed.
    monkeypatch.setattr(experiment, "SEVERITY", 1.0)
    experiment.main(arguments)
    assert len(calls) == len(experiment.WORLDS) * 4
    for path in (tmp_path / "records").glob("*.json"):
        path.write_text(path.read_text().replace('"slots": 5', '"slots": 4'))
    with pytest.raises(DataError, match="other settings"):
        experiment.main(arguments)
    with pytest.raises(SettingError, match="--budget"):
        experiment.main(dataclasses.replace(arguments, budget="tiny"))


def test_worlds_and_runs_of_the_experiment_can_be_made():
    for name in experiment.WORLDS:
        env, _, spec = experiment.world_of(name, experiment.BUDGETS["smoke"])
        assert (env.num_items, env.num_slots) == (12, 5) and spec.feedback == (
            "score_vector" if name == "position" else "cascading"
        )
    for sizes in SIMULATOR.values():
        runs = [settings_of(sizes, penalty, 0) for penalty in sizes.penalties]
        assert all(run.privileged for run in runs) and len({run.pl.penalty for run in runs}) == len(runs)
    seen = {"similarity": 0.1, "topics": 2.0, "bored_topics": 0.5}
    run = {"seed": 0, "clicks": 9.0, "standard_error": 1.0, **seen}
    reference = {"reference": "short-term-oracle", "clicks": 5.0, "standard_error": 0.5}
    table = simulator_table([{"penalty": 3.0, "runs": [run]}, reference], SIMULATOR["small"])
    assert "in one run each" in table and "| 3 | 9.0 ± 1.0 | 0.100 | 2.00 | 0.50 |" in table
    assert "| Short-term oracle ‡ | 5.0 ± 0.5 |" in table
    several = [{"penalty": 3.0, "runs": [run, run | {"seed": 1, "clicks": 11.0}]}, reference]
    table = simulator_table(several, SIMULATOR["small"])  # t = 12.706 for two seeds
    assert "2 seeds" in table and "| 3 | 10.0 ± 12.7 | 0.100 ± 0.000 |" in table


def test_the_results_are_told_as_they_were_recorded():
    """The table next to the records is the one that is made from them."""
    results = Path(__file__).parents[1] / "results" / "ranking"
    told = json.loads((results / "small.json").read_text())
    budget = experiment.BUDGETS[told["budget"]]
    texts = experiment.users_table(told["users"], budget), simulator_table(told["simulator"], SIMULATOR["small"])
    assert (results / "small.md").read_text() == "\n".join(texts)
