"""One update by several devices, each with a share of the batch: cores of a CPU that one small update leaves idle.

Every device holds everything and runs the same program on its share of the rows; what is a mean over the batch is then
averaged over the devices, so all go on with the same numbers. Drivers of single runs use `sharers`, `everywhere` and
`together`, and `on_one` for what comes after; agents, pretrain/ and training loops `own`, `averaged`, `gathered`,
`normal_of_episodes` and `normal_of_rows`, which are of everything outside `together`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial, wraps
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gemsjax.devices import available_cores
from gemsjax.maths.blocks import one_core
from gemsjax.maths.randomness import in_registers, normal_row
from gemsjax.types import Array, Key

Tree = TypeVar("Tree")
AXIS = "shares"
_count: ContextVar[int] = ContextVar("shares", default=1)


def sharers(batch: int, least: int = 1) -> tuple[jax.Device, ...]:
    """Who shares each update on `batch` rows: on CPUs as many devices as divide it into shares of at least `least`
    rows, else the default one alone."""
    devices = jax.local_devices()
    if devices[0].platform != "cpu":
        return (devices[0],)
    fair = (n for n in range(1, len(devices) + 1) if batch % n == 0 and batch // n >= least)
    return tuple(devices[: max(fair, default=1)])


def together(
    devices: Sequence[jax.Device],
    function: Callable[..., Any],
    donate_argnums: int | tuple[int, ...] = (),
    wide: bool = False,
) -> Any:
    """`jax.jit` of a function that all devices run on the same inputs, which lie on each of them (`everywhere`).

    What each core has for itself it does block by block (`one_core`), the only core of a machine too. `wide`: with
    `wide_vectors`.
    """
    options = wide_vectors(devices[0].platform) if wide else None
    compiled = partial(jax.jit, donate_argnums=donate_argnums, compiler_options=options)

    @wraps(function)
    def in_blocks(*inputs: Any) -> Any:
        with one_core():
            return function(*inputs)

    if len(devices) == 1:
        return compiled(in_blocks if available_cores() == 1 else function)

    def program(*inputs: Any) -> Any:
        # Arrays of keys cannot be handed over by every version of JAX, plain numbers can.
        is_key = jax.tree.map(lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key), inputs)
        plain = jax.tree.map(lambda x, key: jax.random.key_data(x) if key else x, inputs, is_key)

        def of_one(plain: Any) -> Any:
            token = _count.set(len(devices))
            try:
                return in_blocks(*jax.tree.map(_with_key, plain, is_key))
            finally:
                _count.reset(token)

        same = PartitionSpec()
        return jax.shard_map(of_one, mesh=_mesh(devices), in_specs=same, out_specs=same, check_vma=False)(plain)

    return compiled(program)


def wide_vectors(platform: str) -> dict[str, Any] | None:
    """`jax.jit`'s compiler options for vectors of 512 bits on CPUs that have them, where XLA takes 256.

    Worth it where much time goes into exponentials. A function compiled so is not called inside another `jit`.
    """
    return {"xla_cpu_prefer_vector_width": 512} if platform == "cpu" else None


def everywhere(devices: Sequence[jax.Device], tree: Tree) -> Tree:
    """Arrays on each of the devices that go on together; of one device alone, as they are."""
    return tree if len(devices) == 1 else jax.device_put(tree, NamedSharding(_mesh(devices), PartitionSpec()))


def on_one(devices: Sequence[jax.Device], tree: Tree) -> Tree:
    """Arrays of `everywhere` on the default device alone, for what other devices than these go on with."""
    return tree if len(devices) == 1 else jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), tree)


def _mesh(devices: Sequence[jax.Device]) -> Mesh:
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def _with_key(x: Array, key: bool) -> Array:
    return jax.random.wrap_key_data(x) if key else x


def count() -> int:
    """How many devices share what is being traced; 1 outside."""
    return _count.get()


def own(tree: Tree) -> Tree:
    """This device's equal share of every leaf's first axis, whose length the number of devices divides."""
    shares = count()
    if shares == 1:
        return tree
    number = jax.lax.axis_index(AXIS)

    def cut(x: Array) -> Array:
        size = x.shape[0] // shares
        return jax.lax.dynamic_slice_in_dim(x, number * size, size)

    return jax.tree.map(cut, tree)


def averaged(tree: Tree) -> Tree:
    """The mean over the devices: of means over equal shares it is the mean over the batch."""
    if count() == 1:
        return tree
    flat, shaped = ravel_pytree(tree)  # devices meet once for each array
    return shaped(jax.lax.pmean(flat, AXIS))


def gathered(values: Array) -> Array:
    """All devices' shares of the first axis, in order."""
    return values if count() == 1 else jax.lax.all_gather(values, AXIS, tiled=True)


def normal_of_episodes(key: Key, batch: int, shape: tuple[int, int]) -> Array:
    """Standard normal numbers, time-major: [H, batch, A] for `shape` [H, A], or this device's share of the batch."""
    keys, draw = own(jax.random.split(key, batch)), partial(normal_row, size=math.prod(shape))
    # One episode's after another's: a loop leaves them in rows, where XLA would draw them in the order asked for,
    # number by number.
    rows = jax.lax.map(draw, keys) if in_registers(key) else jax.vmap(draw)(keys)
    return jnp.swapaxes(rows.reshape(len(keys), *shape), 0, 1)


def normal_of_rows(key: Key, shape: tuple[int, int]) -> Array:
    """`own(jax.random.normal(key, shape, float32))`, of which only the share is drawn `in_registers`.

    `shape` is [n, width], and the number of devices divides n: [n / count(), width].
    """
    rows, width = shape[0] // count(), shape[1]
    first = 0 if count() == 1 else jax.lax.axis_index(AXIS) * rows * width
    return normal_row(key, math.prod(shape), first, rows * width).reshape(rows, width)
