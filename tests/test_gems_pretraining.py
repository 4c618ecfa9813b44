"""Pre-training of GeMS: the order of the slates, cuts of an epoch, validation in blocks, learning, the best epoch."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from gemsjax.errors import SettingError
from gemsjax.maths.shuffle import shuffled
from gemsjax.pretrain import gems
from gemsjax.pretrain.gems import GeMSHypers, GeMSSpec, Slates, make_pretraining, observe, vae_loss
from gemsjax.types import Dims

DIMS = Dims(num_items=30, slate_size=4, horizon=5)
SPEC = GeMSSpec(latent_dim=2, item_dim=8, hidden=(32, 16), batch_size=20)
BATCHES = 6
KEY = jax.random.key(3)
WEAK = jax.tree.map(jnp.float32, GeMSHypers(beta=0.01, click_weight=0.5, rate=0.01))
"""A KL term that is too weak to stand in the way of remembering three slates."""


# -- the order of the slates -------------------------------------------------------------------------------------------

order = jax.jit(lambda key, size: shuffled(jnp.arange(size), size, key), static_argnums=1)


@given(st.integers(1, 3_000))
@example(1)
@example(4)
@example(16)
@example(17)
@example(1_024)
@example(1_025)
@settings(max_examples=12, deadline=None)
def test_every_row_comes_exactly_once(size):
    np.testing.assert_array_equal(np.sort(order(KEY, size)), np.arange(size))


def test_any_part_of_the_order_may_be_asked_for_alone():
    positions = jnp.array([[7, 0], [99, 31]])
    np.testing.assert_array_equal(shuffled(positions, 100, KEY), order(KEY, 100)[positions])


def test_the_order_is_another_for_every_key_and_even():
    """Over many keys each row is as likely in each place as in any other, and neighbours do not stay neighbours."""
    size, keys = 100, jax.random.split(KEY, 5_000)
    orders = np.asarray(jax.jit(jax.vmap(lambda key: shuffled(jnp.arange(size), size, key)))(keys))
    assert len({row.tobytes() for row in orders}) == len(orders)
    counts = np.zeros((size, size))
    np.add.at(counts, (np.arange(size), orders), 1)
    statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert stats.chi2((size - 1) ** 2).sf(statistic) > 1e-3
    together = (np.diff(orders, axis=1) == 1).mean()
    assert together == pytest.approx(1 / size, rel=0.1)


# -- epochs ------------------------------------------------------------------------------------------------------------


class Small:
    """A tiny VAE with its compiled functions, and slates of which there are only three."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.prototypes = rng.choice(DIMS.num_items, (3, DIMS.slate_size), replace=False)
        which = rng.integers(0, 3, BATCHES * SPEC.batch_size)
        clicks = np.array([1, 6, 8])[which]  # bits of the clicked ranks
        self.data = Slates(jnp.asarray(self.prototypes[which], jnp.int16), jnp.asarray(clicks, jnp.uint16))
        self.pretraining = make_pretraining(SPEC, DIMS)
        self.start = jax.jit(self.pretraining.init)(KEY)
        self.updates = jax.jit(self.pretraining.updates)
        self.validate = jax.jit(self.pretraining.validate)

    def epoch(self, state, number: int, hypers: GeMSHypers = WEAK, first: int = 0, last: int = BATCHES):
        batches = jnp.arange(first, last, dtype=jnp.int32)
        return self.updates(state, hypers, KEY, self.data, jnp.int32(number), batches)


@pytest.fixture(scope="module")
def small() -> Small:
    return Small()


def same(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_an_epoch_cut_into_pieces_gives_bitwise_the_same_weights(small):
    whole, metrics = small.epoch(small.start, 1)
    part, first = small.epoch(small.start, 1, last=3)
    part, second = small.epoch(part, 1, first=3)
    assert same(whole, part)
    assert same(metrics, jax.tree.map(lambda *x: jnp.concatenate(x), first, second))


def test_epochs_differ_and_hyper_parameters_are_data(small):
    first, _ = small.epoch(small.start, 0)
    second, _ = small.epoch(small.start, 1)
    stronger, _ = small.epoch(small.start, 0, hypers=WEAK.replace(beta=jnp.float32(1.0)))
    assert not same(first.params, second.params) and not same(first.params, stronger.params)
    assert small.updates._cache_size() <= 2  # whole epochs, and the pieces of another test


def test_without_shuffling_a_batch_is_its_rows_in_order(small):
    """As published: batch 1 of every epoch is rows 20 to 39, whatever the others are."""
    in_order = jax.jit(make_pretraining(dataclasses.replace(SPEC, shuffle=False), DIMS).updates)
    elsewhere = jnp.arange(BATCHES * SPEC.batch_size) // SPEC.batch_size != 1
    others = small.data._replace(slates=jnp.where(elsewhere[:, None], jnp.int16(0), small.data.slates))
    batch = jnp.ones(3, jnp.int32)  # three updates with it
    for updates, unaffected in ((in_order, True), (small.updates, False)):
        one, other = (updates(small.start, WEAK, KEY, data, jnp.int32(0), batch) for data in (small.data, others))
        assert same(one, other) == unaffected


def test_it_learns_the_slates_that_there_are(small):
    state, knowing_nothing = small.start, math.log(DIMS.num_items)
    _, untrained = small.validate(state, WEAK, small.data)
    for number in range(40):
        state, metrics = small.epoch(state, number)
    _, trained = small.validate(state, WEAK, small.data)
    assert float(untrained["slate"]) > 0.5 * knowing_nothing
    assert float(trained["slate"]) < 0.1 * knowing_nothing
    assert float(metrics["slate"].mean()) < 0.2 * knowing_nothing
    assert float(trained["click"]) < 0.2 * math.log(2)
    vae, params = small.pretraining.vae, {"params": state.params}
    code, _ = vae.apply(params, observe(small.data, jnp.arange(50), DIMS), method=vae.encode)
    queries, click_logits = vae.apply(params, code, method=vae.decode)
    decoded = (queries @ state.params["item_embeddings"].T).argmax(axis=-1)
    np.testing.assert_array_equal(decoded, small.data.slates[:50])
    np.testing.assert_array_equal(click_logits > 0, observe(small.data, jnp.arange(50), DIMS).clicks)


# -- validation --------------------------------------------------------------------------------------------------------


def test_validation_is_the_mean_over_all_slates_with_the_mean_code(small):
    """1,050 slates: more than a block, and not a whole number of blocks; no noise, and the weights of the loss."""
    rows = jnp.arange(1_050) % small.data.slates.shape[0]
    many = jax.tree.map(lambda x: x[rows], small.data)
    _, validated = small.validate(small.start, WEAK, many)
    _, direct = vae_loss(
        small.pretraining.vae, small.start.params, WEAK, observe(many, jnp.arange(1_050), DIMS), None, SPEC.noise
    )
    for name, value in direct.items():
        np.testing.assert_allclose(validated[name], value, rtol=2e-6)
    terms = {name: float(value) for name, value in validated.items()}
    assert terms["loss"] == pytest.approx(terms["slate"] + 0.5 * terms["click"] + 0.01 * terms["kl"], rel=1e-5)


@pytest.mark.parametrize("size", [1, 6, 7, 8, 14, 20])
def test_means_over_blocks_count_every_row_once(size):
    values = np.random.default_rng(size).random((4, size)).astype(np.float32)

    def losses(rows):
        return {name: jnp.asarray(row)[rows].mean() for name, row in zip(gems.LOSSES, values, strict=True)}

    means = gems._mean_over_blocks(losses, size, block=7)
    np.testing.assert_allclose([means[name] for name in gems.LOSSES], values.mean(axis=1), rtol=1e-6)


def test_the_epoch_with_the_lowest_validation_loss_is_kept(small):
    """Three epochs whose loss falls and then rises again."""
    good, _ = small.epoch(small.start, 0)
    better, _ = small.epoch(good, 1)
    held, losses = small.start, []
    for state in (good, better, small.start):
        held, metrics = small.validate(held.replace(params=state.params), WEAK, small.data)
        losses.append(float(metrics["loss"]))
    assert losses[1] < losses[0] < losses[2]
    assert same(held.best_params, better.params) and float(held.best_loss) == pytest.approx(losses[1])
    assert same(held.params, small.start.params)  # training goes on from the latest, not from the best


# -- input -------------------------------------------------------------------------------------------------------------


def test_clicks_may_be_bits_or_booleans():
    bits = jnp.array([0b0001, 0b1010], jnp.uint16)
    slates = jnp.zeros((2, 4), jnp.int16)
    expected = [[True, False, False, False], [False, True, False, True]]
    rows = jnp.array([1, 0])
    for clicks in (bits, jnp.array(expected)):
        seen = observe(Slates(slates, clicks), rows, DIMS)
        np.testing.assert_array_equal(seen.clicks, expected[::-1])
        assert seen.clicks.dtype == bool and seen.slate.dtype == jnp.int32


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (GeMSSpec(latent_dim=0), "gems_latent_dim = 0 is not accepted: a whole number of at least 1"),
        (GeMSSpec(item_dim=-2), "gems_item_dim = -2"),
        (GeMSSpec(batch_size=0), "gems_batch_size = 0"),
        (GeMSSpec(batch_size=2.5), "gems_batch_size = 2.5"),
        (GeMSSpec(noise="varianc"), "gems_noise = 'varianc' is not accepted: .*did you mean 'variance'"),
    ],
)
def test_sizes_that_cannot_be_are_refused(spec, message):
    with pytest.raises(SettingError, match=f"^{message}"):
        make_pretraining(spec, DIMS)
