"""Rankers over item embeddings, and the embeddings with the box that actions live in. Called by agents and prepare.

The embeddings are frozen: the simulator's own ('ideal', privileged), matrix factorisation's, or random ones.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from gemsjax.errors import DataError, require_count
from gemsjax.maths.blocks import once
from gemsjax.maths.slates import FEW, best_item, top_items
from gemsjax.rankers import Ranker
from gemsjax.types import Array, Dims


@struct.dataclass
class ItemWeights:
    """Item embeddings as a ranker needs them.

    Attributes:
      embeddings: [I, E].
      centre, scale: [E] middle and half range of the embeddings in each dimension.
    """

    embeddings: Array
    centre: Array
    scale: Array


def item_weights(embeddings: Array) -> ItemWeights:
    """Weights from embeddings [I, E]: the box reaches from the least to the largest number of each dimension.

    Raises:
      DataError: not a matrix.
    """
    if jnp.ndim(embeddings) != 2:
        raise DataError(f"item embeddings of shape {jnp.shape(embeddings)}: a matrix [items, dimensions] is needed")
    embeddings = jnp.asarray(embeddings, jnp.float32)
    low, high = embeddings.min(axis=0), embeddings.max(axis=0)
    return ItemWeights(embeddings, (low + high) / 2, (high - low) / 2)


def make_topk_ranker(dims: Dims, item_dim: int) -> Ranker:
    """One query [E]: the K items with the largest dot products, best first, ties to the lowest number.

    Raises:
      SettingError: embeddings without a dimension, or a catalogue smaller than a slate.
    """
    require_count("item_dim", item_dim)
    require_count("slate_size", dims.slate_size, 1, dims.num_items)

    def decode(weights: ItemWeights, action: Array) -> Array:
        return top_items(weights.embeddings @ action, dims.slate_size)

    def box(weights: ItemWeights) -> tuple[Array, Array]:
        return weights.centre, weights.scale

    return Ranker(decode, box, item_dim)


def make_khead_ranker(dims: Dims, item_dim: int) -> Ranker:
    """A query for every slot, [K * E] with the slots outermost: per slot the item with the largest dot product.

    Duplicates are allowed. The box is that of one query, once for each slot.

    Raises:
      SettingError: embeddings without a dimension.
    """
    require_count("item_dim", item_dim)

    def decode(weights: ItemWeights, action: Array) -> Array:
        return best_item(action.reshape(dims.slate_size, item_dim) @ by_dimension(weights.embeddings))

    def box(weights: ItemWeights) -> tuple[Array, Array]:
        return jnp.tile(weights.centre, dims.slate_size), jnp.tile(weights.scale, dims.slate_size)

    return Ranker(decode, box, dims.slate_size * item_dim)


def by_dimension(embeddings: Array) -> Array:
    """Embeddings [I, E] turned to [E, I], as a CPU's product with a few queries reads them fastest.

    In a scan over turns this is done once, before it.
    """
    return once(embeddings.T)


_PORTION = 128
"""Queries that a CPU searches at once: whole vectors of them, whose scores stay in a core's cache."""


def nearest_items(embeddings: Array, queries: Array, count: int) -> Array:
    """The `count` items nearest to each query in Euclidean distance, nearest first: [I, E], [n, E] -> [n, count] int32.

    One product and a search, since |q - e|^2 orders items as |e|^2 / 2 - q.e does.
    """
    number = len(queries)
    half = 0.5 * jnp.square(embeddings).sum(axis=-1)
    if number < FEW:
        return jax.vmap(lambda scores: top_items(scores, count))(queries @ by_dimension(embeddings) - half)

    def search(queries: Array) -> Array:
        return jax.vmap(lambda scores: top_items(scores, count), in_axes=1)(embeddings @ queries.T - half[:, None])

    if jax.default_backend() != "cpu" or number <= _PORTION:
        return search(queries)
    portions = jnp.pad(queries, ((0, -number % _PORTION), (0, 0))).reshape(-1, _PORTION, queries.shape[1])
    return jax.lax.map(search, portions).reshape(-1, count)[:number]
