"""GeMS, the slate variational auto-encoder (paper section 3.1). The network; its loss and training are in pretrain/.

Called by `rankers/gems.py` (decoding) and `pretrain/gems.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn

from gemsjax.nets.mlp import MLP, Linear
from gemsjax.types import Array, Observation


class SlateVAE(nn.Module):
    """Encoder and decoder between a slate with its clicks and a latent vector.

    Attributes:
      num_items, slate_size: I, K.
      latent_dim: d.
      item_dim: width of the item embeddings, drawn from N(0, 1) and trained through the encoder only.
      hidden: widths of the encoder's hidden layers; the decoder has them in reverse.
    """

    num_items: int
    slate_size: int
    latent_dim: int = 32
    item_dim: int = 20
    hidden: Sequence[int] = (512, 256)

    def setup(self) -> None:
        self.item_embeddings = self.param(
            "item_embeddings", nn.initializers.normal(1.0), (self.num_items, self.item_dim)
        )
        self.encoder = MLP((*self.hidden, 2 * self.latent_dim))
        self.decoder = MLP(tuple(reversed(self.hidden)))
        self.slate_head = Linear(self.slate_size * self.item_dim)
        self.click_head = Linear(self.slate_size)

    def __call__(self, observation: Observation) -> tuple[Array, Array]:
        """Encode, then decode the mean (used to initialise every parameter)."""
        return self.decode(self.encode(observation)[0])

    def encode(self, observation: Observation) -> tuple[Array, Array]:
        """[..., K] -> posterior mean and log-variance, [..., d] each."""
        items = self.item_embeddings[observation.slate].reshape(*observation.slate.shape[:-1], -1)
        out = self.encoder(jnp.concatenate([items, observation.clicks.astype(items.dtype)], axis=-1))
        return out[..., : self.latent_dim], out[..., self.latent_dim :]

    def decode(self, latent: Array) -> tuple[Array, Array]:
        """[..., d] -> a query per slot [..., K, item_dim] and click logits [..., K]."""
        hidden = nn.relu(self.decoder(latent))
        queries = self.slate_head(hidden).reshape(*latent.shape[:-1], self.slate_size, self.item_dim)
        return queries, self.click_head(hidden)
