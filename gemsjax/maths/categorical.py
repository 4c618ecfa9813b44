"""Drawing items from a softmax over the catalogue, and the probability that a slate of draws holds an item.

Pure and unbatched (`draw_items`) or elementwise (`log_hit`). Used by agents whose policy is a softmax over items.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from gemsjax.types import Array

FLOOR = 1e-6
"""Added inside the logarithm of a hit, as published: an item that is never drawn has a finite loss."""
LARGEST = 1.0 - 2.0**-20
"""Probabilities are cut off here, where 1 - pi is still a number of its own in float32."""


def draw_items(logits: Array, uniforms: Array) -> Array:
    """One item for each uniform number, independently, with replacement: logits [I], uniforms [K] -> [K] int32.

    The distribution function is inverted in two stages: first over sums of about sqrt(I) blocks of items, then inside
    the block that was hit. No cumulative sum runs over the whole catalogue and no uniform number is compared with more
    than 2 * sqrt(I) others; for a Gumbel draw each of the K would need I numbers of its own.

    A uniform number has 23 bits, so an item of probability below 1e-7 may be drawn a little too often or never.
    """
    items = logits.shape[0]
    width = math.ceil(math.sqrt(items))
    blocks = -(-items // width)
    weights = jnp.exp(logits - logits.max())
    table = jnp.pad(weights, (0, blocks * width - items)).reshape(blocks, width)
    sums = table.sum(axis=1)
    ends = jnp.cumsum(sums)
    aims = uniforms * ends[-1]
    block = jnp.minimum((ends <= aims[:, None]).sum(axis=1), blocks - 1)
    inside = jnp.cumsum(table[block], axis=1)
    # What rounding leaves beyond the block's last item belongs to that item.
    aims = aims - (ends - sums)[block]
    place = jnp.minimum((inside <= aims[:, None]).sum(axis=1), width - 1)
    return jnp.minimum(block * width + place, items - 1).astype(jnp.int32)


def log_hit(log_probability: Array, draws: int) -> Array:
    """log(1 - (1 - pi)^draws + 1e-6), pi = exp(log_probability): that an item is in a slate of so many draws. [...].

    Value and gradient stay finite for pi from 0 to 1: 1 - (1 - pi)^n is taken through log1p and expm1, which neither
    lose a small pi beside the 1 nor divide by 1 - pi = 0. Source: the loss of the published REINFORCE+SoftMax.
    """
    probability = jnp.minimum(jnp.exp(log_probability), LARGEST)
    return jnp.log(FLOOR - jnp.expm1(draws * jnp.log1p(-probability)))


def log_probability_and_entropy(logits: Array, items: Array) -> tuple[Array, Array]:
    """log pi of one item each and the softmax's entropy in nats: logits [..., I], items [...] -> [...], [...].

    A logit of minus infinity (an item that is not there) adds nothing to the entropy.
    """
    log_policy = jax.nn.log_softmax(logits)
    # Set aside before the product: 0 * -inf is no number, nor is its gradient.
    finite = jnp.where(jnp.isfinite(log_policy), log_policy, 0.0)
    entropy = -(jnp.exp(log_policy) * finite).sum(axis=-1)
    return jnp.take_along_axis(log_policy, items[..., None], axis=-1)[..., 0], entropy
