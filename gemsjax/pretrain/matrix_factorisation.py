"""Item embeddings from logged clicks: matrix factorisation with Bayesian personalised ranking (BPR).

A user's vector should score an item that it clicked above one drawn at random. `make_factorisation` gives pure
functions over data on the device; `prepare/mf.py` drives them. Semantics of the published implementation with two
settings, `optimiser` and `validation` (README, "Where they differ", [42]). Source: Rendle and others, "BPR", UAI 2009.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from gemsjax.datasets import LoggedSlates
from gemsjax.errors import DataError, require, require_choice, require_count
from gemsjax.maths.lazy_adam import lazy_init, lazy_read, lazy_step, lazy_values
from gemsjax.maths.optimise import adam_init, adam_step
from gemsjax.maths.shuffle import shuffled
from gemsjax.types import Array, Key

OPTIMISERS = ("lazy", "dense")
VALIDATIONS = ("clean", "training")
VALIDATION_SHARE = 0.1
_LAZY_FROM = 16
"""Rows a table must have for every row that a batch reads, before lazy steps are worth their bookkeeping."""
_BLOCK = 8_192
"""Pairs that a validation scores at once."""


@dataclasses.dataclass(frozen=True)
class MFSettings:
    """Matrix factorisation and the logged data that it learns from.

    Attributes:
      dim: width of the embeddings.
      rate: Adam's learning rate.
      batch_size: clicks of an update.
      patience: validations without a better one after which it stops.
      check_every: updates between validations.
      max_epochs: passes over the clicks after which it stops in any case.
      users: logged users; the first tenth validates.
      epsilon: share of random items in the slates of the oracle that logs.
      optimiser: `lazy` makes Adam's steps of a row when the row is next read, `dense` moves all rows in every update,
        as published. The embeddings are the same up to rounding; dense costs time in proportion to the users.
      validation: `clean` withholds the later half of the validating users' clicks; `training` is as published [42], see
        `divide` and `make_factorisation`.
    """

    dim: int = 20
    rate: float = 1e-4
    batch_size: int = 256
    patience: int = 3
    check_every: int = 1_000
    max_epochs: int = 20
    users: int = 100_000
    epsilon: float = 0.5
    optimiser: str = "lazy"
    validation: str = "clean"


def check_mf(settings: MFSettings) -> None:
    """Raise `SettingError` for a setting outside its range."""
    for name in ("dim", "batch_size", "patience", "check_every", "max_epochs"):
        require_count(f"mf.{name}", getattr(settings, name))
    require_count("mf.users", settings.users, 10)
    require(0.0 < settings.rate < 1.0, "mf.rate", settings.rate, "a number in (0, 1)")
    require(0.0 <= settings.epsilon <= 1.0, "mf.epsilon", settings.epsilon, "a probability")
    require_choice("mf.optimiser", settings.optimiser, OPTIMISERS)
    require_choice("mf.validation", settings.validation, VALIDATIONS)


# -- clicks ------------------------------------------------------------------------------------------------------------


class Clicks(NamedTuple):
    """Positives: rows of the users' table [N] int32 and clicked items [N] in the log's type, in NumPy or on the device.

    As the log has them: user by user, a user's in the order of its turns, a turn's in the order of its ranks.
    """

    users: Any
    items: Any


class ClickSplit(NamedTuple):
    """Clicks that validate, and those that train."""

    validation: Clicks
    training: Clicks


def clicked_items(data: LoggedSlates, block: int = 2_048) -> Clicks:
    """Every click of logged users, a block of users at a time."""
    users, items, ranks = [], [], np.arange(data.slates.shape[-1], dtype=np.uint32)
    for first in range(0, data.users, block):
        slates, clicks = data.slates[first : first + block], data.clicks[first : first + block]
        if clicks.ndim < slates.ndim:
            clicks = (clicks[..., None] >> ranks) & 1
        user, turn, rank = np.nonzero(clicks)
        users.append((user + first).astype(np.int32))
        items.append(slates[user, turn, rank])
    return Clicks(np.concatenate(users), np.concatenate(items))


def divide(clicks: Clicks, users: int, settings: MFSettings) -> ClickSplit:
    """Clicks for validation and training; the first tenth of the `users` logged users validates.

    `clean`: a user's vector only comes from its clicks, so somebody of whom none are known cannot validate anything.
    The validating users therefore train with the earlier half of their clicks, and their later half, which is withheld,
    asks whether those vectors rank what they will click. Nobody else's clicks are withheld.

    `training`, as published: all clicks of the validating users validate, and the tables are shared although the users
    of each part are numbered from 0, so that validating user i is scored with the vector of training user i.

    Raises:
      DataError: too few clicks for a batch, or for a validation.
    """
    first = round(users * VALIDATION_SHARE)
    validating = clicks.users < first
    if settings.validation == "clean":
        counts = np.bincount(clicks.users, minlength=users)
        number = np.arange(clicks.users.size) - (np.cumsum(counts) - counts)[clicks.users]
        withheld = validating & (number >= (counts - counts // 2)[clicks.users])
        parts = ClickSplit(*(Clicks(clicks.users[of], clicks.items[of]) for of in (withheld, ~withheld)))
    else:
        rows = clicks.users - np.where(validating, 0, first).astype(np.int32)
        parts = ClickSplit(*(Clicks(rows[of], clicks.items[of]) for of in (validating, ~validating)))
    needed = {"validation": 1 if settings.validation == "clean" else settings.batch_size}
    for name, part in zip(ClickSplit._fields, parts, strict=True):
        least = needed.get(name, settings.batch_size)
        if part.users.size < least:
            raise DataError(f"the log of {users} users leaves {part.users.size} clicks for {name}, it needs {least}")
    return parts


# -- tables ------------------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """Vectors of users or items with Adam's moments, as pure functions.

    Attributes:
      init: `(values [N, D]) -> table`.
      read: `(table, ids [n], done, rate) -> (table, rows [n, >= D])`: rows with values first, after `done` steps.
      step: `(table, ids, rows, gradients [n, D], done, rate) -> table`: the next step with what `read` gave, gradients
        of equal ids summed.
      values: `(table, done, rate) -> [N, D]`.
    """

    init: Callable[[Array], Any]
    read: Callable[..., tuple[Any, Array]]
    step: Callable[..., Any]
    values: Callable[..., Array]


def lazy_table(dim: int) -> Table:
    """Rows that a batch does not touch cost it nothing: for many rows, see `maths/lazy_adam.py`."""
    return Table(
        lazy_init,
        lambda table, ids, done, rate: lazy_read(table, ids, dim, done, rate),
        lazy_step,
        lambda table, done, rate: lazy_values(table, dim, done, rate),
    )


def dense_table() -> Table:
    """Every row moves in every step: for few rows, and as published."""

    def step(table: Any, ids: Array, _rows: Array, gradients: Array, _done: Array, rate: Array) -> Any:
        values, moments = table
        return adam_step(values, jnp.zeros_like(values).at[ids].add(gradients), moments, rate)

    return Table(
        lambda values: (values, adam_init(values)),
        lambda table, ids, _done, _rate: (table, table[0][ids]),
        step,
        lambda table, _done, _rate: table[0],
    )


# -- training ----------------------------------------------------------------------------------------------------------


@struct.dataclass
class MFState:
    """Everything that training changes.

    Attributes:
      users, items: tables.
      done: steps of the optimiser.
      best_items: [I, D], the items' vectors at the lowest validation loss so far.
      best_loss: that loss.
      waited: validations since.
    """

    users: Any
    items: Any
    done: Array
    best_items: Array
    best_loss: Array
    waited: Array


class Factorisation(NamedTuple):
    """Pure functions, sizes bound. `rate` is Adam's as float32, `key` the run's; clicks are on the device.

    Attributes:
      start: `(users [U, D], items [I, D]) -> state` from given vectors.
      init: `(key) -> state`: Xavier uniform.
      step: `(state, users [B], clicked [B], others [B], rate, whole=False) -> (state, loss)`: one update; `whole` with
        the score of every user for every item of the batch, which is what the published code does in a validation.
      updates: `(state, rate, key, clicks, batches [m]) -> (state, losses [m])`: the updates number `batches`, counted
        over all epochs. Results do not depend on how they are cut into calls.
      validate: `(state, rate, key, clicks, number) -> (state, loss)`: keeps the best. `clean` scores each click against
        one item drawn once and for all. `training` makes an update with each batch of clicks in the order of the log,
        on wrong pairs (`whole`), against items drawn anew; its loss is the mean of theirs.
      values: `(state, rate) -> (users [U, D], items [I, D])`.
    """

    start: Callable[[Array, Array], MFState]
    init: Callable[[Key], MFState]
    step: Callable[..., tuple[MFState, Array]]
    updates: Callable[..., tuple[MFState, Array]]
    validate: Callable[..., tuple[MFState, Array]]
    values: Callable[..., tuple[Array, Array]]


def make_factorisation(settings: MFSettings, users: int, items: int) -> Factorisation:
    """Bind settings and the sizes of the two tables.

    Raises:
      SettingError: see `check_mf`.
    """
    check_mf(settings)
    size, dim = settings.batch_size, settings.dim
    lazy = settings.optimiser == "lazy"
    user_table = lazy_table(dim) if lazy else dense_table()
    item_table = lazy_table(dim) if lazy and items > _LAZY_FROM * 2 * size else dense_table()

    def start(user_values: Array, item_values: Array) -> MFState:
        tables = user_table.init(user_values), item_table.init(item_values)
        return MFState(*tables, jnp.int32(0), jnp.array(item_values), jnp.float32(jnp.inf), jnp.int32(0))

    def init(key: Key) -> MFState:
        return start(*(xavier(k, rows, dim) for k, rows in zip(jax.random.split(key), (users, items), strict=True)))

    def step(
        state: MFState, user: Array, clicked: Array, other: Array, rate: Array, whole: bool = False
    ) -> tuple[MFState, Array]:
        item = jnp.concatenate([clicked, other])
        of_users, user_rows = user_table.read(state.users, user, state.done, rate)
        of_items, item_rows = item_table.read(state.items, item, state.done, rate)
        loss, gradients = jax.value_and_grad(bpr_loss, (0, 1))(user_rows[:, :dim], item_rows[:, :dim], whole)
        return dataclasses.replace(
            state,
            users=user_table.step(of_users, user, user_rows, gradients[0], state.done, rate),
            items=item_table.step(of_items, item, item_rows, gradients[1], state.done, rate),
            done=state.done + 1,
        ), loss

    def updates(state: MFState, rate: Array, key: Key, clicks: Clicks, batches: Array) -> tuple[MFState, Array]:
        return pass_over(state, rate, draw_batches(key, clicks, batches, size, items))

    def pass_over(state: MFState, rate: Array, drawn: Batches, whole: bool = False) -> tuple[MFState, Array]:
        one = lambda state, batch: step(state, batch.user, batch.clicked, batch.other, rate, whole)  # noqa: E731
        return jax.lax.scan(one, state, drawn)

    def values(state: MFState, rate: Array) -> tuple[Array, Array]:
        return user_table.values(state.users, state.done, rate), item_table.values(state.items, state.done, rate)

    def clean(state: MFState, rate: Array, key: Key, clicks: Clicks, _number: Array) -> tuple[MFState, Array]:
        user_values, item_values = values(state, rate)
        return _keep_best(state, item_values, ranking_loss(user_values, item_values, key, clicks))

    def training(state: MFState, rate: Array, key: Key, clicks: Clicks, number: Array) -> tuple[MFState, Array]:
        batches = clicks.users.shape[0] // size
        user, clicked = (column[: batches * size].reshape(batches, size) for column in clicks)
        other = jax.random.randint(jax.random.fold_in(key, number), (batches, size), 0, items)
        state, losses = pass_over(state, rate, Batches(user, clicked.astype(jnp.int32), other), whole=True)
        return _keep_best(state, values(state, rate)[1], losses.mean())

    validate = clean if settings.validation == "clean" else training
    return Factorisation(start, init, step, updates, validate, values)


class Batches(NamedTuple):
    """Batches of updates, [m, B] int32: users, the items that they clicked, and items drawn uniformly."""

    user: Array
    clicked: Array
    other: Array


def draw_batches(key: Key, clicks: Clicks, batches: Array, size: int, items: int) -> Batches:
    """The batches number `batches`, each a function of its number: an epoch's are its clicks in a random order.

    What an epoch's last whole batch leaves is left out, which is something else in each epoch.
    """
    count = clicks.users.shape[0]
    order_key, other_key = jax.random.split(key)

    def draw(batch: Array) -> Batches:
        epoch, number = batch // (count // size), batch % (count // size)
        rows = shuffled(number * size + jnp.arange(size), count, jax.random.fold_in(order_key, epoch))
        other = jax.random.randint(jax.random.fold_in(other_key, batch), (size,), 0, items)
        return Batches(clicks.users[rows], clicks.items[rows].astype(jnp.int32), other)

    return jax.vmap(draw)(batches)


def _keep_best(state: MFState, items: Array, loss: Array) -> tuple[MFState, Array]:
    better = loss < state.best_loss
    return dataclasses.replace(
        state,
        best_items=jnp.where(better, items, state.best_items),
        best_loss=jnp.minimum(loss, state.best_loss),
        waited=jnp.where(better, 0, state.waited + 1),
    ), loss


def xavier(key: Key, rows: int, dim: int) -> Array:
    """Xavier uniform vectors [rows, dim] (Glorot and Bengio, 2010)."""
    bound = math.sqrt(6.0 / (rows + dim))
    return jax.random.uniform(key, (rows, dim), minval=-bound, maxval=bound)


def bpr_loss(users: Array, items: Array, whole: bool = False) -> Array:
    """Mean of -log(sigmoid(x) + 1e-7), x by how much the clicked item scores above the other one.

    Args:
      users: [B, D].
      items: [2B, D], the clicked ones, then the others.
      whole: over every user with every clicked item and its other one, [B, B], instead of each user with its own.
    """
    clicked, other = jnp.split(items, 2)
    ahead = users @ (clicked - other).T if whole else (users * (clicked - other)).sum(axis=-1)
    return -jnp.log(jax.nn.sigmoid(ahead) + 1e-7).mean()


def ranking_loss(users: Array, items: Array, key: Key, clicks: Clicks) -> Array:
    """`bpr_loss` of all clicks, each against one item that only the key decides: vectors [U, D], [I, D] -> scalar."""
    count = clicks.users.shape[0]
    block = min(_BLOCK, count)
    others = jax.random.randint(key, (count,), 0, items.shape[0])

    def add(total: Array, first: Array) -> tuple[Array, None]:
        # The last block begins earlier, so as to be whole, and leaves out what was counted.
        rows = jnp.minimum(first, count - block) + jnp.arange(block)
        ahead = (users[clicks.users[rows]] * (items[clicks.items[rows]] - items[others[rows]])).sum(axis=-1)
        return total + jnp.where(rows >= first, -jnp.log(jax.nn.sigmoid(ahead) + 1e-7), 0.0).sum(), None

    total, _ = jax.lax.scan(add, jnp.float32(0.0), jnp.arange(0, count, block))
    return total / count
