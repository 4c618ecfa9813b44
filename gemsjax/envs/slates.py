"""Slates that come from outside: checking them on the host, and asking the oracle for the items that they leave open.

Called by the topic simulator; `check_slate` also by whoever takes slates from a person or a file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemsjax.errors import DataError
from gemsjax.types import Array


def check_slate(slate: Any, env: Any) -> np.ndarray:
    """Check slates that come from outside, on the host.

    Inside compiled programs no check can raise; there `info["invalid_action"]` of a step tells.

    Args:
      slate: [..., K] whole numbers -1 .. I-1; -1 stands for the oracle's item of that rank.
      env: a `TopicEnv`, for its `num_items` and `slate_size`.

    Returns:
      [..., K] int32.

    Raises:
      DataError: another shape or type, or a number outside the catalogue; the message says where.
    """
    try:
        array = np.asarray(slate)
    except (TypeError, ValueError) as error:
        raise DataError("slate: has rows of unequal length") from error
    if array.dtype.kind not in "iu":
        raise DataError(f"slate: holds {array.dtype} values; it must hold whole numbers")
    if array.ndim == 0 or array.shape[-1] != env.slate_size:
        raise DataError(f"slate: has shape {array.shape}; its last axis must be slate_size = {env.slate_size}")
    outside = (array < -1) | (array >= env.num_items)
    if outside.any():
        where = tuple(int(index) for index in np.argwhere(outside)[0])
        accepted = f"from 0 to {env.num_items - 1}, or -1 for the oracle's item"
        raise DataError(f"slate: {array[where]} at position {where}; item numbers go {accepted}")
    return array.astype(np.int32)


def check_if_known(slate: Any, env: Any) -> Array:
    """`check_slate` outside of traced programs; inside, where values are unknown, the slate as it is: [..., K]."""
    return slate if isinstance(slate, jax.core.Tracer) else jnp.asarray(check_slate(slate, env))


def only_if_asked(substitute: Callable[..., Array]) -> Callable[..., Array]:
    """`substitute(state, slate, params) -> slate`, skipped while no slate holds -1, whatever vmaps are on top of it.

    A plain `cond` under vmap becomes a select that runs both branches for every user; this asks once for the batch.
    """

    @jax.custom_batching.custom_vmap
    def ask(state: Any, slate: Array, params: Any) -> Array:
        return jax.lax.cond((slate == -1).any(), substitute, lambda _state, slate, _params: slate, state, slate, params)

    @ask.def_vmap
    def ask_batch(size: int, batched: Any, state: Any, slate: Any, params: Any) -> tuple[Array, bool]:
        axes = jax.tree.map(lambda b: 0 if b else None, tuple(batched))
        if not batched[1]:
            slate, axes = jnp.broadcast_to(slate, (size, *slate.shape)), (axes[0], 0, axes[2])
        return only_if_asked(jax.vmap(substitute, in_axes=axes))(state, slate, params), True

    return ask
