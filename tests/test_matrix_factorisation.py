"""Matrix factorisation: recorded numbers, lazy against dense steps, cuts, splits, a probe, what is kept and found."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import load

from experiments import train_mf
from gemsjax import prepare, tracking
from gemsjax.datasets import LoggedSlates
from gemsjax.errors import DataError, SettingError, TrainingError
from gemsjax.maths import lazy_adam
from gemsjax.maths.shuffle import shuffled
from gemsjax.prepare import mf as kept
from gemsjax.prepare.common import World
from gemsjax.pretrain import matrix_factorisation as mf
from gemsjax.pretrain.matrix_factorisation import Clicks, MFSettings, clicked_items, divide, make_factorisation
from gemsjax.settings import TrainSettings
from gemsjax.types import Dims

KEY = jax.random.key(4)


@pytest.fixture(scope="module")
def golden():
    return {name.removeprefix("bpr/"): array for name, array in load("bpr.npz").items()}


@pytest.mark.parametrize("optimiser", mf.OPTIMISERS)
@pytest.mark.parametrize("validating", [False, True])
def test_a_step_is_the_recorded_one(golden, optimiser, validating):
    """Thirty users in 64 pairs: most rows are there more than once. Embeddings move by 1e-4, so they agree to 2e-7."""
    settings = MFSettings(optimiser=optimiser, batch_size=64)
    factorisation = make_factorisation(settings, 30, 60)

    @jax.jit
    def step(users, items, *ids):
        state, loss = factorisation.step(factorisation.start(users, items), *ids, jnp.float32(1e-4), whole=validating)
        return *factorisation.values(state, jnp.float32(1e-4)), loss

    users, items, loss = step(*(golden[name] for name in ("user_emb", "item_emb", "user_ids", "item_ids", "neg_ids")))
    assert float(loss) == pytest.approx(float(golden["loss_eval" if validating else "loss_train"]), abs=1e-6)
    if validating:  # its step is on wrong pairs, and is not recorded
        assert np.abs(users - golden["user_emb_after"]).max() > 1e-5
    else:
        np.testing.assert_allclose(users, golden["user_emb_after"], atol=2e-7)
        np.testing.assert_allclose(items, golden["item_emb_after"], atol=2e-7)


# -- lazy steps --------------------------------------------------------------------------------------------------------


def test_lazy_and_dense_steps_lead_to_the_same_vectors():
    """Batches of two of ninety users and eighty items; some rows wait for hundreds of steps, some never come."""
    rng, steps = np.random.default_rng(0), 600
    user = np.concatenate([rng.integers(0, 9, (steps // 2, 2)), rng.integers(0, 80, (steps // 2, 2))])
    drawn = [
        jnp.asarray(ids, jnp.int32) for ids in (user, rng.integers(0, 8, (steps, 2)), rng.integers(0, 70, (steps, 2)))
    ]
    rate, found = jnp.float32(1e-3), []
    for optimiser in mf.OPTIMISERS:
        factorisation = make_factorisation(MFSettings(dim=3, batch_size=2, optimiser=optimiser), 90, 80)

        @jax.jit
        def train(key, drawn, f=factorisation):
            start = f.init(key)
            state, losses = jax.lax.scan(lambda state, ids: f.step(state, *ids, rate), start, drawn)
            return *f.values(state, rate), losses, *f.values(start, rate)

        found.append(train(KEY, drawn))
    for lazy, dense in zip(*found, strict=True):
        np.testing.assert_allclose(lazy, dense, atol=2e-5)
    moved = np.abs(found[0][0] - found[0][3]).max(axis=1)
    assert moved[:9].min() > 0.02 and moved[80:].max() == 0.0


caught_up = jax.jit(lambda row, done: lazy_adam._caught_up(row, 1, done, 0.1))


@pytest.mark.parametrize(("latest", "missed"), [(1, 1), (1, 500), (7, 3), (300, 40), (19_990, 30), (60_000, 1_000)])
def test_missed_steps_are_made_up_for(latest, missed):
    """Against Adam's recursion in float64, with gradients of zero."""
    value, first, second = 0.5, 3e-4, 2e-6
    row = jnp.array([[value, first, second, latest, 0.0]], jnp.float32)
    caught = caught_up(row, jnp.int32(latest + missed))[0]
    for step in range(latest + 1, latest + missed + 1):
        first, second = 0.9 * first, 0.999 * second
        value -= 0.1 * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    np.testing.assert_allclose(caught[:3], [value, first, second], rtol=3e-5, atol=1e-30)


# -- updates and validation --------------------------------------------------------------------------------------------

SMALL = MFSettings(dim=4, rate=3e-2, batch_size=8, check_every=10, max_epochs=6, users=40, patience=40)
ITEMS, RATE = 20, jnp.float32(3e-2)


def two_tastes() -> LoggedSlates:
    """Even users click even items only, and click all of them."""
    slates = np.random.default_rng(3).integers(0, ITEMS, (40, 6, 4)).astype(np.int16)
    clicked = slates % 2 == np.arange(40)[:, None, None] % 2
    return LoggedSlates(slates, (clicked << np.arange(4)).sum(axis=-1).astype(np.uint16), {"checksum": "c0ffee" * 10})


class Small:
    """Compiled functions for two tastes, the same that `prepare` uses, and the clicks on the device."""

    def __init__(self) -> None:
        static = MFSettings(dim=SMALL.dim, batch_size=SMALL.batch_size)
        self.start, self.updates, self.validate = kept._programs(static, 40, ITEMS)
        self.factorisation = make_factorisation(static, 40, ITEMS)
        self.step = jax.jit(self.factorisation.step, static_argnames="whole")
        parts = divide(clicked_items(two_tastes()), 40, SMALL)
        self.validation, self.clicks = (Clicks(*map(jnp.asarray, part)) for part in parts)
        self.count = self.clicks.users.size

    def other(self, key, shape):
        return jax.random.randint(key, shape, 0, ITEMS)


@pytest.fixture(scope="module")
def small() -> Small:
    return Small()


def same(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_updates_do_not_depend_on_how_they_are_cut(small):
    """Of 58 batches an epoch; the cuts fall within the first epoch and across its end."""
    assert small.count // 8 == 58
    whole, losses = small.updates(small.start(KEY), RATE, KEY, small.clicks, np.arange(44, 64))
    part, first = small.updates(small.start(KEY), RATE, KEY, small.clicks, np.arange(44, 54))
    part, second = small.updates(part, RATE, KEY, small.clicks, np.arange(54, 64))
    assert same(whole, part) and same(losses, jnp.concatenate([first, second]))
    assert np.unique(losses).size == 20


def test_a_batch_is_the_next_clicks_of_the_epochs_order_against_items_drawn_anew(small):
    state, found = small.start(KEY), []
    order_key, other_key = jax.random.split(KEY)
    for batch in range(54, 64):
        epoch, number = divmod(batch, 58)
        rows = shuffled(jnp.arange(small.count), small.count, jax.random.fold_in(order_key, epoch))[8 * number :][:8]
        other = small.other(jax.random.fold_in(other_key, batch), (8,))
        clicked = small.clicks.items[rows].astype(jnp.int32)
        state, loss = small.step(state, small.clicks.users[rows], clicked, other, RATE)
        found.append(loss)
    _, losses = small.updates(small.start(KEY), RATE, KEY, small.clicks, np.arange(54, 64))
    np.testing.assert_allclose(losses, found, rtol=1e-5)


def test_a_clean_validation_changes_no_vector_and_keeps_the_best(small):
    start = small.start(KEY)
    users, items = map(np.asarray, small.factorisation.values(start, RATE))
    before = jax.tree.map(np.asarray, (start.users, start.items, start.done))
    state, loss = small.validate(start, RATE, KEY, small.validation, 1)
    assert same((state.users, state.items, state.done), before) and int(state.waited) == 0
    other = items[small.other(KEY, small.validation.users.shape)]
    ahead = (users[small.validation.users] * (items[small.validation.items] - other)).sum(axis=1)
    assert float(loss) == pytest.approx(-np.log(1 / (1 + np.exp(-ahead)) + 1e-7).mean(), rel=1e-5)
    state, again = small.validate(state, RATE, KEY, small.validation, 2)
    assert float(again) == float(loss) and int(state.waited) == 1  # the same items each time; not better
    worse = dataclasses.replace(state, items=jax.tree.map(lambda x: (100 * x).astype(x.dtype), state.items))
    worse, higher = small.validate(worse, RATE, KEY, small.validation, 3)
    assert float(higher) > float(loss) and int(worse.waited) == 2
    assert same(worse.best_items, items) and float(worse.best_loss) == float(loss)


@pytest.mark.parametrize("count", [29, 75])
def test_validation_counts_every_click_once(count, monkeypatch):
    """Blocks of thirty."""
    monkeypatch.setattr(mf, "_BLOCK", 30)
    rng = np.random.default_rng(count)
    users, items = rng.normal(size=(9, 2)).astype(np.float32), rng.normal(size=(11, 2)).astype(np.float32)
    clicks = Clicks(jnp.asarray(rng.integers(0, 9, count)), jnp.asarray(rng.integers(0, 11, count)))
    loss = jax.jit(mf.ranking_loss)(users, items, KEY, clicks)
    other = items[jax.random.randint(KEY, (count,), 0, 11)]
    direct = mf.bpr_loss(users[clicks.users], np.concatenate([items[clicks.items], other]))
    assert float(loss) == pytest.approx(float(direct), rel=1e-5)


def test_the_published_validation_trains_on_wrong_pairs(small):
    published = make_factorisation(dataclasses.replace(SMALL, validation="training"), 40, ITEMS)
    clicks, before = Clicks(*(column[:20] for column in small.clicks)), small.start(KEY)
    state, loss = jax.jit(published.validate)(before, RATE, KEY, clicks, 1)
    assert int(state.done) == 2 and not same(state.items, before.items)
    others, losses, by_hand = small.other(jax.random.fold_in(KEY, 1), (2, 8)), [], before
    for batch in range(2):
        user, clicked = (column[8 * batch : 8 * batch + 8] for column in clicks)
        by_hand, one = small.step(by_hand, user, clicked.astype(jnp.int32), others[batch], RATE, whole=True)
        losses.append(float(one))
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-5)
    for one, other in zip(published.values(state, RATE), published.values(by_hand, RATE), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


# -- clicks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_every_click_is_found_in_the_order_of_the_log(packed):
    rng = np.random.default_rng(2)
    slates, shown = rng.integers(0, 50, (7, 3, 4)).astype(np.int16), rng.random((7, 3, 4)) < 0.4
    bits = (shown << np.arange(4)).sum(axis=-1).astype(np.uint16) if packed else shown
    found = clicked_items(LoggedSlates(slates, bits, {}), block=3)
    expected = [(u, slates[u, t, r]) for u in range(7) for t in range(3) for r in range(4) if shown[u, t, r]]
    assert list(zip(found.users, found.items, strict=True)) == expected
    assert found.users.dtype == np.int32 and found.items.dtype == np.int16


def test_clean_validation_withholds_the_later_half_of_the_first_users():
    """Twenty users of whom two validate: user 0 has three clicks, user 1 one, user 2 four."""
    users = np.array([0, 0, 0, 1, 2, 2, 2, 2], np.int32)
    log = Clicks(users, np.arange(8, dtype=np.int16))
    parts = divide(log, 20, dataclasses.replace(SMALL, batch_size=2))
    assert list(parts.validation.items) == [2] and list(parts.training.items) == [0, 1, 3, 4, 5, 6, 7]
    assert list(parts.training.users) == [0, 0, 0 + 1, 2, 2, 2, 2]


def test_published_validation_shares_the_vectors_of_other_users():
    log = Clicks(np.array([0, 1, 2, 3, 3], np.int32), np.arange(5, dtype=np.int16))
    parts = divide(log, 20, dataclasses.replace(SMALL, batch_size=2, validation="training"))
    assert list(parts.validation.users) == [0, 1] and list(parts.training.users) == [0, 1, 1]
    assert list(parts.training.items) == [2, 3, 4]


def test_too_few_clicks_are_refused():
    log = Clicks(np.array([0, 0, 5], np.int32), np.zeros(3, np.int16))
    with pytest.raises(DataError, match="leaves 2 clicks for training, it needs 8"):
        divide(log, 40, SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 0}, "mf.dim = 0 is not accepted: a whole number of at least 1"),
        ({"users": 5}, "mf.users = 5"),
        ({"rate": 1.0}, "mf.rate = 1.0"),
        ({"optimiser": "laxy"}, "mf.optimiser = 'laxy' is not accepted: .*did you mean 'lazy'"),
        ({"validation": "none"}, "mf.validation = 'none'"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(SettingError, match=f"^{message}"):
        make_factorisation(dataclasses.replace(SMALL, **change), 40, 30)


# -- what is kept ------------------------------------------------------------------------------------------------------

WORLD = World(None, SimpleNamespace(item_embeddings=np.zeros((ITEMS, 2))), Dims(ITEMS, 4, 6))


class Data:
    """The log, and how often it was asked for."""

    def __init__(self) -> None:
        self.log, self.asked = two_tastes(), 0

    def __call__(self) -> LoggedSlates:
        self.asked += 1
        return self.log


def separation(items: np.ndarray) -> float:
    """Mean cosine within the groups of items less that between them."""
    unit = items / np.linalg.norm(items, axis=1, keepdims=True)
    even = np.arange(ITEMS) % 2 == 0
    cosines, alike = unit @ unit.T, even[:, None] == even
    return float(cosines[alike & ~np.eye(ITEMS, dtype=bool)].mean() - cosines[~alike].mean())


def make(root, data: Data, settings: MFSettings = SMALL, **other):
    return kept.kept_embeddings(TrainSettings(env="made_up", seed=7, mf=settings), WORLD, root, data, **other)


def test_items_that_the_same_users_click_come_together_and_are_kept(tmp_path):
    data = Data()
    made = make(tmp_path, data)
    start = mf.xavier(KEY, ITEMS, SMALL.dim)
    assert separation(np.asarray(start)) < 0.3 and separation(made.embeddings) > 0.8
    assert made.directory.parent == tmp_path / "MF" and made.embeddings.shape == (ITEMS, SMALL.dim)
    again = kept.mf_embeddings(TrainSettings(env="made_up", seed=7, mf=SMALL), WORLD, tmp_path, data)
    assert data.asked == 1 and np.array_equal(again, made.embeddings)
    assert np.array_equal(make(tmp_path, data, checksum=data.log.checksum).embeddings, made.embeddings)
    assert data.asked == 1
    data.log = dataclasses.replace(data.log, schema={"checksum": "decade" * 10})
    assert make(tmp_path, data, checksum=data.log.checksum).directory != made.directory
    rows = tracking.read_metrics(made.directory)
    assert [row["step"] for row in rows] == list(range(10, rows[-1]["step"], 10)) + [rows[-1]["step"]]


def test_a_killed_run_goes_on_to_the_same_embeddings(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "CHECKS_PER_CHECKPOINT", 2)
    whole = make(tmp_path / "whole", Data())
    append, calls = tracking.MetricsLog.append, []

    def dies_in_time(log, row):
        calls.append(row)
        if len(calls) == 6:
            raise KeyboardInterrupt
        append(log, row)

    with monkeypatch.context() as patched:
        patched.setattr(tracking.MetricsLog, "append", dies_in_time)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "cut", Data())
    resumed = make(tmp_path / "cut", Data())
    assert np.array_equal(resumed.embeddings, whole.embeddings)
    assert tracking.read_metrics(resumed.directory) == tracking.read_metrics(whole.directory)


def test_two_who_ask_at_once_train_once(tmp_path, monkeypatch):
    trained = []
    train = kept._train
    monkeypatch.setattr(kept, "_train", lambda *args: trained.append(1) or train(*args))
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda data: make(tmp_path, data), (Data(), Data()))
    assert len(trained) == 1 and np.array_equal(one.embeddings, other.embeddings)


def test_it_stops_when_patience_is_at_its_end(tmp_path):
    made = make(tmp_path, Data(), dataclasses.replace(SMALL, patience=2, max_epochs=1_000, rate=0.1))
    losses = [row["validation_loss"] for row in tracking.read_metrics(made.directory)]
    assert np.argmin(losses) == len(losses) - 3


def test_a_loss_that_is_not_finite_ends_it(tmp_path, small, monkeypatch):
    def broken(key):
        state = small.start(key)
        return dataclasses.replace(state, items=jax.tree.map(lambda x: x * np.nan, state.items))

    monkeypatch.setattr(kept, "_programs", lambda *_: (broken, small.updates, small.validate))
    with pytest.raises(TrainingError, match="^batch 0: loss is nan; there was no checkpoint yet"):
        make(tmp_path, Data())


def test_the_command_trains_or_finds_and_says_where(tmp_path, capsys, monkeypatch):
    data = Data()
    monkeypatch.setattr(prepare, "logged_data", lambda settings, world, root: data())
    settings = MFSettings(users=40, batch_size=16, check_every=20, max_epochs=1)
    arguments = train_mf.Arguments(mf=settings, out=tmp_path, seed=3)
    with pytest.raises(SettingError, match="mf.patience"):
        train_mf.main(dataclasses.replace(arguments, mf=dataclasses.replace(settings, patience=0)))
    with pytest.raises(SettingError, match="seed = -1"):
        train_mf.main(dataclasses.replace(arguments, seed=-1))
    said = []
    for _ in range(2):
        train_mf.main(arguments)
        said.append(capsys.readouterr().out.splitlines()[-4:])
    assert said[0] == said[1] and data.asked == 1
    losses = [row["validation_loss"] for row in tracking.read_metrics(said[0][3].split()[1])]
    assert said[0][0] == f"validation   {losses[0]:.4f}  {losses[1]:.4f}  (of 2)"
    assert said[0][2] == "embeddings   1,000 items, 20 dimensions"
    assert said[0][3].startswith(f"path         {tmp_path}/MF/focused_topdown_seed3-")
