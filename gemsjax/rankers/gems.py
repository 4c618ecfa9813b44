"""The GeMS ranker: the frozen decoder of a pre-trained slate VAE (paper section 3.1). Called by agents."""

from __future__ import annotations

import jax
from flax import struct

from gemsjax.maths.categorical import draw_items
from gemsjax.maths.slates import best_item
from gemsjax.nets.gems import SlateVAE
from gemsjax.rankers import Ranker
from gemsjax.rankers.items import by_dimension
from gemsjax.types import Array, Params


@struct.dataclass
class GeMSWeights:
    """What acting in the latent space needs of a pre-trained GeMS.

    Attributes:
      params: the VAE's parameters.
      centre, scale: [d] middle and half range of the latent codes of logged slates.
    """

    params: Params
    centre: Array
    scale: Array


def make_gems_ranker(vae: SlateVAE, drawn: bool = False) -> Ranker:
    """Decode a latent action: per slot the item with the largest logit. Duplicates are allowed, as published.

    `drawn`: exploring slates have each slot drawn from the softmax of its logits (an option of the published code).
    """

    def logits(weights: GeMSWeights, action: Array) -> Array:
        queries, _ = vae.apply({"params": weights.params}, action, method=SlateVAE.decode)
        return queries @ by_dimension(weights.params["item_embeddings"])

    def decode(weights: GeMSWeights, action: Array) -> Array:
        return best_item(logits(weights, action))

    def draw(weights: GeMSWeights, action: Array, uniforms: Array) -> Array:
        return jax.vmap(lambda of_slot, luck: draw_items(of_slot, luck[None])[0])(logits(weights, action), uniforms)

    def box(weights: GeMSWeights) -> tuple[Array, Array]:
        return weights.centre, weights.scale

    if drawn:
        return Ranker(decode, box, vae.latent_dim, vae.slate_size, draw)
    return Ranker(decode, box, vae.latent_dim)
