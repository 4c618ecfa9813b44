"""The Plackett-Luce ranker: slates without replacement from a softmax over items, with a penalty for similar ones.

The action is a query; an item's logit is its dot product with the query over a temperature, and every item that is
taken lowers those like it by the penalty times 1 + cosine (`maths.plackett_luce`). Exploring policies draw slates,
greedy ones take the best item of each slot; without penalty the latter is the top-k ranker. Temperature and penalty are
weights, so runs of one program may differ in them. Called by agents and prepare.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from gemsjax.errors import require_count
from gemsjax.maths.plackett_luce import COSINE, Choices, choices, draw_slate, greedy_slate
from gemsjax.rankers import Ranker
from gemsjax.rankers.items import ItemWeights
from gemsjax.types import Array, Dims


@struct.dataclass
class PlackettLuceWeights(ItemWeights):
    """Item embeddings with their box, and

    Attributes:
      temperature: [] by which dot products are divided, above 0.
      penalty: [] mixture coefficient of the cosine penalty; 0 for none.
    """

    temperature: Array
    penalty: Array


def plackett_luce_weights(items: ItemWeights, temperature: float, penalty: float) -> PlackettLuceWeights:
    """Weights from those of the items; who asks a person for the numbers checks them."""
    return PlackettLuceWeights(**vars(items), temperature=jnp.float32(temperature), penalty=jnp.float32(penalty))


def make_plackett_luce_ranker(dims: Dims, item_dim: int, drawn: bool = True) -> Ranker:
    """One query [E], K different items.

    Args:
      dims: sizes.
      item_dim: E.
      drawn: whether exploring policies draw slates; else they take the best items, too.

    Raises:
      SettingError: embeddings without a dimension, or a catalogue smaller than a slate.
    """
    require_count("item_dim", item_dim)
    require_count("slate_size", dims.slate_size, 1, dims.num_items)

    def given(weights: PlackettLuceWeights, action: Array) -> Choices:
        scores = jnp.matmul(weights.embeddings, action, precision=jax.lax.Precision.HIGHEST)
        return choices(scores, None, weights.temperature, weights.embeddings, weights.penalty)

    def decode(weights: PlackettLuceWeights, action: Array) -> Array:
        return greedy_slate(given(weights, action), COSINE, dims.slate_size)

    def draw(weights: PlackettLuceWeights, action: Array, uniforms: Array) -> Array:
        return draw_slate(given(weights, action), COSINE, uniforms)

    def box(weights: PlackettLuceWeights) -> tuple[Array, Array]:
        return weights.centre, weights.scale

    return Ranker(decode, box, item_dim, dims.slate_size if drawn else 0, draw if drawn else None)
