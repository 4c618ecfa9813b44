"""Networks that score items for a user from features of both. Used by `gemsjax.ranking`.

Shapes follow TF-Agents' networks over global and per-arm features: a tower of ReLU layers for the user, one that all
items share, and either a common tower on both or their dot product.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from gemsjax.errors import require
from gemsjax.nets.mlp import uniform
from gemsjax.types import Array

_HIDDEN = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")


class Tower(nn.Module):
    """Linear layers, each followed by ReLU; without layers the identity: [..., n] -> [..., features[-1]]."""

    features: Sequence[int]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i, width in enumerate(self.features):
            x = nn.relu(nn.Dense(width, kernel_init=_HIDDEN, name=f"layer{i}")(x))
        return x


class CommonTowerScorer(nn.Module):
    """A tower on the user's and the item's towers side by side: [..., G], [..., N, D] -> [..., N].

    Attributes:
      user_layers, item_layers, common_layers: widths.
      output_dim: 1 for a score; more for an encoder, whose last layer has this width and ReLU: [..., N, output_dim].
    """

    user_layers: Sequence[int] = (40, 10)
    item_layers: Sequence[int] = (40, 10)
    common_layers: Sequence[int] = (20, 10)
    output_dim: int = 1

    @nn.compact
    def __call__(self, user: Array, items: Array) -> Array:
        user = Tower(self.user_layers, name="user")(user)
        items = Tower(self.item_layers, name="items")(items)
        user = jnp.broadcast_to(user[..., None, :], (*items.shape[:-1], user.shape[-1]))
        both = jnp.concatenate([user, items], axis=-1)
        if self.output_dim > 1:
            return Tower((*self.common_layers, self.output_dim), name="common")(both)
        hidden = Tower(self.common_layers, name="common")(both)
        start = nn.initializers.constant(-0.2)
        return nn.Dense(1, kernel_init=uniform(0.03), bias_init=start, name="score")(hidden)[..., 0]


class DotProductScorer(nn.Module):
    """The dot product of the user's and the item's towers: [..., G], [..., N, D] -> [..., N].

    Raises (when it is initialised or applied):
      SettingError: the towers end in different widths.
    """

    user_layers: Sequence[int] = (40, 10)
    item_layers: Sequence[int] = (40, 10)

    @nn.compact
    def __call__(self, user: Array, items: Array) -> Array:
        user = Tower(self.user_layers, name="user")(user)
        items = Tower(self.item_layers, name="items")(items)
        ends = user.shape[-1], items.shape[-1]
        require(ends[0] == ends[1], "last widths of the towers", ends, "the same for users and items")
        # In full float32 on accelerators too, which otherwise round to ten bits.
        return jnp.einsum("...nd,...d->...n", items, user, precision=jax.lax.Precision.HIGHEST)
