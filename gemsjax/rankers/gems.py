"""The GeMS ranker: the frozen decoder of a pre-trained slate VAE (paper section 3.1). Called by agents."""

from __future__ import annotations

from flax import struct

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


def make_gems_ranker(vae: SlateVAE) -> Ranker:
    """Decode a latent action: per slot the item with the largest logit. Duplicates are allowed, as published."""

    def decode(weights: GeMSWeights, action: Array) -> Array:
        queries, _ = vae.apply({"params": weights.params}, action, method=SlateVAE.decode)
        return best_item(queries @ by_dimension(weights.params["item_embeddings"]))

    def box(weights: GeMSWeights) -> tuple[Array, Array]:
        return weights.centre, weights.scale

    return Ranker(decode, box, vae.latent_dim)
