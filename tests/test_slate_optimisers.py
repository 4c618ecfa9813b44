"""Slate optimisers: recorded examples, brute force on small catalogues, masked candidates, padding."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemsjax.maths.slate_optimisers import OPTIMISERS, Candidates, slate_value

EXAMPLES = json.loads((Path(__file__).parent / "golden" / "slateq_examples.json").read_text())["slates"]
ITEMS, SIZE = 7, 3


@jax.jit
def solve(v, q, none, available):
    candidates = Candidates(v, none, available)
    slates = {name: optimiser(candidates, q, SIZE) for name, optimiser in OPTIMISERS.items()}
    return slates, {name: slate_value(candidates, q, slate) for name, slate in slates.items()}


def value(v, q, none, slate) -> float:
    """f in double precision; v_0 infinite: clicks do not compete."""
    slate = list(slate)
    weight = v[slate].astype(np.float64)
    above = (weight * q[slate]).sum()
    return above if np.isinf(none) else above / max(none + weight.sum(), 1e-300)


def arrays(draw, low, high, n=ITEMS):
    return np.array([draw(st.integers(low, high)) / 4 for _ in range(n)], np.float32)


@st.composite
def problems(draw):
    """Appeals with zeros, worths of both signs, v_0 from tiny to infinite, any number of masked items."""
    v, q = arrays(draw, 0, 12), arrays(draw, -20, 40)
    none = np.float32(draw(st.sampled_from([0.01, 0.5, 2.0, 50.0, np.inf])))
    return v, q, none, np.array(draw(st.lists(st.booleans(), min_size=ITEMS, max_size=ITEMS)))


@pytest.mark.parametrize("row", EXAMPLES["rows"], ids=lambda row: f"k{row['k']}")
def test_recorded_slates(row):
    candidates = Candidates(jnp.asarray(EXAMPLES["s"]), jnp.float32(EXAMPLES["s_no_click"]))
    q = jnp.asarray(EXAMPLES["q"], jnp.float32)
    found = {name: optimiser(candidates, q, row["k"]) for name, optimiser in OPTIMISERS.items()}
    assert found["topk"].tolist() == row["topk"]
    assert found["greedy"].tolist() == row["greedy_order"]
    assert sorted(found["exact"].tolist()) == sorted(row["optimal_set"])
    for name, key in (("topk", "value_topk"), ("greedy", "value_greedy"), ("exact", "value_optimal")):
        assert float(slate_value(candidates, q, found[name])) == pytest.approx(row[key], abs=1e-5)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_exact_is_the_best_of_all_slates(problem):
    v, q, none, available = problem
    slates, values = solve(*problem)
    valid = np.flatnonzero(available)
    scale = 1 + float(np.abs(q).max()) * (float(v.max()) if np.isinf(none) else 1)
    if len(valid) >= SIZE:
        every = [value(v, q, none, slate) for slate in itertools.combinations(valid, SIZE)]
        assert float(values["exact"]) == pytest.approx(max(every), abs=1e-5 * scale)
        if np.isinf(none):
            assert float(values["topk"]) == pytest.approx(max(every), abs=1e-5 * scale)
    shown = np.where(available, v, 0)
    for name, slate in slates.items():
        assert float(values[name]) == pytest.approx(value(shown, q, none, slate), abs=1e-5 * scale)


@settings(max_examples=100, deadline=None)
@given(problems())
def test_greedy_takes_the_best_next_item(problem):
    v, q, none, available = problem
    slate = solve(*problem)[0]["greedy"].tolist()
    for rank in range(min(SIZE, int(available.sum()))):
        taken = slate[:rank]
        left = [item for item in np.flatnonzero(available) if item not in taken]
        values = [value(v, q, none, [*taken, item]) for item in left]
        assert value(v, q, none, slate[: rank + 1]) >= max(values) - 1e-4 * (1 + np.abs(values).max())


@settings(max_examples=100, deadline=None)
@given(problems())
def test_masked_items_come_last_and_nothing_repeats(problem):
    available = problem[3]
    for slate in solve(*problem)[0].values():
        slate = np.asarray(slate)
        assert len(set(slate.tolist())) == SIZE
        enough = min(SIZE, int(available.sum()))
        assert available[slate[:enough]].all() and not available[slate[enough:]].any()


@settings(max_examples=25, deadline=None)
@given(problems(), st.integers(0, 2**31 - 1))
def test_padding_with_masked_items_changes_nothing(problem, seed):
    v, q, none, available = problem
    available[:SIZE] = True
    luck = np.random.default_rng(seed).uniform(-50, 50, (2, 4)).astype(np.float32)
    padded = [np.concatenate([x, extra]) for x, extra in ((v, np.abs(luck[0])), (q, luck[1]))]
    both = solve(v, q, none, available)[0], solve(*padded, none, np.concatenate([available, np.zeros(4, bool)]))[0]
    for name in OPTIMISERS:
        np.testing.assert_array_equal(*(slates[name] for slates in both))


def test_without_a_mask_all_are_available_and_many_users_go_at_once():
    """Enough users for the fast way of `top_items`, inside the loop of `exact` too."""
    rng = np.random.default_rng(0)
    v, q = rng.uniform(0, 2, (40, ITEMS)).astype(np.float32), rng.normal(3, 4, (40, ITEMS)).astype(np.float32)
    none = jnp.float32(1.0)
    together = jax.jit(lambda v, q: {n: jax.vmap(lambda v, q, f=f: f(Candidates(v, none), q, SIZE))(v, q) for n, f in OPTIMISERS.items()})(v, q)  # fmt: skip  # noqa: E501
    better = 0
    for user in range(40):
        alone, values = solve(v[user], q[user], none, np.ones(ITEMS, bool))
        for name in OPTIMISERS:
            np.testing.assert_array_equal(together[name][user], alone[name])
        better += float(values["exact"]) > float(values["topk"]) + 1e-4
    assert better > 5  # the rules are not the same


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_not_available(bad):
    """In places that are not available, where they are padding, and in others, where they count as padding."""
    v, q = np.array([0.5, 1.0, 2.0, 0.0], np.float32), np.array([1.0, 0.5, 4.0, 0.0], np.float32)
    none, there = jnp.float32(1.0), np.array([True, True, True, False])
    clean, values = solve(v, q, none, there)
    for place, available in ((3, there), (3, np.ones(4, bool))):
        for broken in ((v, np.where(np.arange(4) == place, bad, q)), (np.where(np.arange(4) == place, bad, v), q)):
            slates, told = solve(*broken, none, available)
            for name in OPTIMISERS:
                np.testing.assert_array_equal(slates[name], clean[name])
                assert float(told[name]) == float(values[name])
    worst, _ = solve(v, np.full(4, bad, np.float32), none, there)
    assert all(sorted(slate.tolist()) == [0, 1, 2] for slate in worst.values())


def test_products_that_overflow_are_not_available():
    slates, _ = solve(np.array([4.0, 1, 1, 1], np.float32), np.array([3e38, 1, 2, 3], np.float32), jnp.float32(1.0),
                      np.ones(4, bool))  # fmt: skip
    assert all(slate.tolist() == [3, 2, 1] for slate in slates.values())


def test_places_that_hold_nothing_are_worth_nothing():
    candidates = Candidates(jnp.array([1.0, 1.0, 3.0]), jnp.float32(1.0), jnp.array([True, True, False]))
    q = jnp.array([4.0, 2.0, jnp.nan])
    of = jax.jit(lambda slate: slate_value(candidates, q, slate))
    for slate in ([0, -1], [0, 3], [0, 2], [0, 99]):  # -1 does not count from the end
        assert float(of(jnp.array(slate))) == 2.0
    assert float(of(jnp.array([0, 1]))) == 2.0 and float(of(jnp.array([-1, -1]))) == 0.0
