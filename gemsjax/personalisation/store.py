"""The states of all users as one array on the devices, and batches of interactions applied to it by user id.

A row of the table is a user: slow vector, fast vector, baseline. Every device (every core of a CPU, see
`gemsjax.devices`) holds a range of the users and works off a portion of each batch; rows travel between them, and the
candidates, thirty times as large, stay where they are. Interactions of one user are applied in their order in the
batch: the users' first ones side by side, then their second ones, and so on. So a batch without duplicates is one
round. May be called by whatever serves users; `personalisation.files` keeps tables on the disk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gemsjax.devices import PORTION
from gemsjax.errors import require, require_count
from gemsjax.personalisation.policy import Interaction, PersonalisationConfig, UserState, check_config, learn
from gemsjax.types import Array

Table = Array
"""[rows, 2k + 1] float32, split over the devices by rows; those beyond the users only make the parts equal."""

MOST_USERS, MOST_DIMENSIONS = 2**30, 2**16
_FEW = 16
"""Interactions at a time in the rounds after the first."""


class Learnt(NamedTuple):
    """What a batch of B interactions did.

    Attributes:
      table: the new one.
      updated: [B] bool, which interactions changed their user.
      known: [B] bool, which ids are users of the store; the others were ignored.
    """

    table: Table
    updated: Array
    known: Array


class Store(NamedTuple):
    """Sizes and devices bound at construction; with traced ids the functions are pure, for programs of one's own.

    Attributes:
      users: U; ids are 0 .. U-1.
      dim: k, numbers of a taste vector.
      init: `() -> table` of users of whom nothing is known.
      place: `(numbers [U, 2k+1]) -> table`, on the devices.
      share: `(Interaction [B, ...]) -> the same`, split over the devices as `update` wants it (where B allows it): for
        batches that are used again.
      states: `(table, ids [B]) -> (UserState [B, ...], known [B])`; zeros for ids that are not known.
      update: `(table, ids [B], Interaction [B, ...], config, probs [B, K] or None) -> Learnt`. Without probabilities
        each interaction's are computed from its user as it is by then; given ones are used as they are. The table
        given is donated: use the returned one. Compiled anew for every B: fill batches up with gates of 0.

    `states` and `update` raise SettingError for ids that can be looked at (outside `jit`) and are out of range.
    """

    users: int
    dim: int
    init: Callable[[], Table]
    place: Callable[[np.ndarray], Table]
    share: Callable[[Interaction], Interaction]
    states: Callable[[Table, Any], tuple[UserState, Array]]
    update: Callable[..., Learnt]


def make_store(users: int, dim: int) -> Store:
    """A store of `users` users with vectors of `dim` numbers, spread over the local devices.

    Raises:
      SettingError: a size out of range.
    """
    require_count("users", users, 1, MOST_USERS)
    require_count("dim", dim, 1, MOST_DIMENSIONS)
    devices = jax.local_devices()[:users]
    mesh = jax.make_mesh((len(devices),), ("users",), axis_types=(AxisType.Auto,), devices=devices)
    rows, split = -(-users // len(devices)) * len(devices), NamedSharding(mesh, PartitionSpec("users"))
    run_states, run_update = _programs(mesh, users, dim)

    def init() -> Table:
        return jax.jit(lambda: jnp.zeros((rows, 2 * dim + 1)), out_shardings=split)()

    def place(numbers: np.ndarray) -> Table:
        accepted = f"[U, 2k + 1] = {(users, 2 * dim + 1)}"
        require(numbers.shape == (users, 2 * dim + 1), "numbers", numbers.shape, accepted)
        return jax.device_put(np.pad(numbers.astype(np.float32, copy=False), ((0, rows - users), (0, 0))), split)

    def share(batch: Interaction) -> Interaction:
        return jax.device_put(
            batch, NamedSharding(mesh, PartitionSpec(None if len(batch.reward) % mesh.size else "users"))
        )

    def states(table: Table, ids: Any) -> tuple[UserState, Array]:
        check_user_ids(ids, users)
        return run_states(table, jnp.asarray(ids))

    def update(
        table: Table, ids: Any, batch: Interaction, config: PersonalisationConfig, probs: Array | None = None
    ) -> Learnt:
        check_user_ids(ids, users)
        check_config(config)
        for name, leaf in {**batch._asdict(), **({} if probs is None else {"probs": probs})}.items():
            require(jnp.shape(leaf)[:1] == jnp.shape(ids), name, jnp.shape(leaf), f"{jnp.shape(ids)[0]} rows, as ids")
        return run_update(table, jnp.asarray(ids), batch, config, probs)

    return Store(users, dim, init, place, share, states, update)


def check_user_ids(ids: Any, users: int) -> None:
    """Refuse ids that are not whole numbers 0 .. users-1 (of traced ones only the type).

    Raises:
      SettingError: naming the first wrong one and its place.
    """
    traced = isinstance(ids, jax.core.Tracer)
    numbers = ids if traced else np.asarray(ids)
    require(numbers.ndim == 1, "ids", numbers.shape, "one axis of user ids")
    whole = jnp.issubdtype(numbers.dtype, jnp.integer)
    require(whole, "ids", str(numbers.dtype), f"whole numbers from 0 to {users - 1}")
    if not traced:
        wrong = np.flatnonzero((numbers < 0) | (numbers >= users))
        first = int(wrong[0]) if wrong.size else 0
        accepted = (
            f"user ids of this store are whole numbers from 0 to {users - 1} ({wrong.size} of {numbers.size} are not)"
        )
        require(not wrong.size, f"ids[{first}]", int(numbers[first]) if wrong.size else None, accepted)


def pack(state: UserState) -> Array:
    """Rows of a table: [..., 2k + 1]."""
    return jnp.concatenate([state.z_long, state.z_short, state.reward_ma[..., None]], axis=-1)


def unpack(rows: Array) -> UserState:
    """The users of rows [..., 2k + 1]."""
    dim = (rows.shape[-1] - 1) // 2
    return UserState(rows[..., :dim], rows[..., dim : 2 * dim], rows[..., -1])


# -- the programs ------------------------------------------------------------------------------------------------------


def _programs(mesh: Any, users: int, dim: int) -> tuple[Callable[..., Any], Callable[..., Learnt]]:
    """`states` and `update`, compiled at their first call for each size of batch."""
    ours, all_, split = PartitionSpec("users"), PartitionSpec(), partial(jax.shard_map, mesh=mesh, check_vma=False)

    def is_known(ids: Array) -> Array:
        return (ids >= 0) & (ids < users)

    def local(part: Array, ids: Array) -> Array:
        """Rows of this device's part, one beyond them for the users of others and for unknown ids."""
        rows = part.shape[0]
        place = jnp.where(is_known(ids), ids, 0).astype(jnp.int32) - jax.lax.axis_index("users") * rows
        return jnp.where(is_known(ids) & (place >= 0) & (place < rows), place, rows)

    def read(part: Array, ids: Array) -> tuple[UserState, Array]:
        return unpack(jax.lax.psum(_rows(part, local(part, ids)), "users")), is_known(ids)

    def work(part: Array, ids: Array, *rest: Any) -> tuple[Array, Array]:
        order, rounds = _rounds(jnp.where(is_known(ids), ids, users).astype(jnp.int32), users)
        return _work_off(part, local(part, ids), order, rounds, *rest)

    @jax.jit
    def states(table: Table, ids: Array) -> tuple[UserState, Array]:
        return split(read, in_specs=(ours, all_), out_specs=(all_, all_))(table, ids)

    @partial(jax.jit, donate_argnums=0)
    def update(
        table: Table, ids: Array, batch: Interaction, config: PersonalisationConfig, probs: Array | None
    ) -> Learnt:
        require(batch.items.shape[-1] == dim, "items", batch.items.shape, f"vectors of {dim} numbers")
        size = ids.shape[0]
        if size == 0:
            return Learnt(table, is_known(ids), is_known(ids))
        filler = -size % mesh.size
        if filler:  # of users that there are not
            batch, probs = jax.tree.map(lambda x: jnp.pad(x, ((0, filler), *[(0, 0)] * (x.ndim - 1))), (batch, probs))
        filled = jnp.pad(ids, (0, filler), constant_values=-1)
        run = split(work, in_specs=(ours, all_, ours, all_, ours), out_specs=(ours, all_))
        table, updated = run(table, filled, batch, config, probs)
        return Learnt(table, updated[:size], is_known(ids))

    return states, update


def _work_off(
    part: Array,
    places: Array,
    order: Array,
    rounds: Array,
    batch: Interaction,
    config: PersonalisationConfig,
    probs: Array | None,
) -> tuple[Array, Array]:
    """One device's share: its part of the table [n, 2k+1] afterwards, and which of all interactions updated, [B].

    Args:
      part: the rows of this device's users.
      places: [B] their rows, n where the user is another device's.
      order, rounds: of `_rounds`, the same on all devices.
      batch, probs: this device's portion of the interactions, B / devices of them, whoever their users are.
      config: see `PersonalisationConfig`.
    """
    size, share = places.shape[0], batch.reward.shape[0]
    first = jax.lax.axis_index("users") * share
    learn_all = jax.vmap(lambda state, interaction, probs: learn(state, interaction, config, probs))

    # The first round: rows travel to where the interactions are, are learnt on, and travel back.
    rows = jax.lax.psum_scatter(_rows(part, places), "users", tiled=True)
    state, done = _in_portions(learn_all, (unpack(rows), batch, probs))
    done &= jax.lax.dynamic_slice(rounds, (first,), (share,)) == 0
    rows, updated = jax.lax.all_gather((pack(state), done), "users", tiled=True)
    part = part.at[jnp.where(updated, places, part.shape[0])].set(rows, mode="drop")

    # The other rounds are short, but as many as the busiest user has interactions: a few at a time, on every device.
    in_order = jnp.pad(rounds[order], (0, _FEW), constant_values=size)
    order = jnp.pad(order, (0, _FEW))

    def next_few(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        part, updated, start = carry
        some = jax.lax.dynamic_slice(order, (start,), (_FEW,))
        theirs = jax.lax.dynamic_slice(in_order, (start,), (_FEW,))
        now = theirs == theirs[0]  # never into the next round: these users differ
        interactions, given = jax.tree.map(lambda x: _collect(x, some - first), (batch, probs))
        state, done = learn_all(unpack(jax.lax.psum(_rows(part, places[some]), "users")), interactions, given)
        done &= now
        part = part.at[jnp.where(done, places[some], part.shape[0])].set(pack(state), mode="drop")
        updated = updated.at[jnp.where(now, some, size)].set(done, mode="drop")
        return part, updated, start + now.sum()

    carry = part, updated, (in_order == 0).sum()
    return jax.lax.while_loop(lambda carry: in_order[carry[2]] < size, next_few, carry)[:2]


def _in_portions(learn_all: Callable[..., Any], split: Any) -> Any:
    """`learn_all(*split)` for [share, ...], on CPUs in portions that fit a cache (and what is left over)."""
    whole = split[1].reward.shape[0] // PORTION * PORTION
    if jax.default_backend() != "cpu" or not whole:
        return learn_all(*split)
    portions = jax.tree.map(lambda x: x[:whole].reshape(whole // PORTION, PORTION, *x.shape[1:]), split)
    out = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), jax.lax.map(lambda some: learn_all(*some), portions))
    if whole == split[1].reward.shape[0]:
        return out
    rest = learn_all(*jax.tree.map(lambda x: x[whole:], split))
    return jax.tree.map(lambda *x: jnp.concatenate(x), out, rest)


def _rows(part: Array, places: Array) -> Array:
    """Rows of a part, zeros beyond it: [n, 2k+1] and [B] -> [B, 2k+1]."""
    return part.at[places].get(mode="fill", fill_value=0.0)


def _collect(mine: Array, places: Array) -> Array:
    """Entries of an array that is split over the devices, from whichever has them, counted from this one's first."""
    here = (places >= 0) & (places < mine.shape[0])
    found = jnp.where(here.reshape(-1, *[1] * (mine.ndim - 1)), mine.at[places].get(mode="clip"), 0)
    return jax.lax.psum(found.astype(jnp.promote_types(mine.dtype, jnp.int8)), "users").astype(mine.dtype)


def _rounds(ids: Array, absent: int) -> tuple[Array, Array]:
    """In which order to go through [B] ids, and which round each is of, [B] each.

    A user's first entry is of round 0, its second of round 1 ...; entries of the id `absent` come last, as round B.
    Within a round the batch's order stays.
    """
    size = ids.shape[0]
    position = jnp.arange(size, dtype=jnp.int32)
    by_user = jnp.argsort(ids, stable=True)
    ordered = ids[by_user]
    begins = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    first = jax.lax.cummax(jnp.where(begins, position, 0))
    rounds = jnp.where(ordered == absent, size, position - first)
    rounds = jnp.zeros(size, jnp.int32).at[by_user].set(rounds, unique_indices=True)
    # One round of users that all are known, the usual case, needs no second sort.
    return jax.lax.cond(rounds.any(), lambda: jnp.argsort(rounds, stable=True), lambda: position), rounds
