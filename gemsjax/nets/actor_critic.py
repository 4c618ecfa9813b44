"""Networks of on-policy actor-critics: actors over items or over continuous actions, and a critic, each a trunk apart.

Called by `on_policy/` and by the on-policy agents.
"""

from __future__ import annotations

from collections.abc import Sequence

from flax import linen as nn

from gemsjax.nets.mlp import MLP
from gemsjax.types import Array


class DiscreteActor(nn.Module):
    """Logits of `actions` items: [..., n] -> [..., actions]."""

    hidden: Sequence[int]
    actions: int
    activation: str = "tanh"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return MLP((*self.hidden, self.actions), self.activation, name="trunk")(x)


class GaussianActor(nn.Module):
    """Mean [..., actions] of a Gaussian and its log standard deviation [actions]: 0 at first, one for all inputs."""

    hidden: Sequence[int]
    actions: int
    activation: str = "tanh"

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        log_std = self.param("log_std", nn.initializers.zeros_init(), (self.actions,))
        return MLP((*self.hidden, self.actions), self.activation, name="trunk")(x), log_std


class ValueCritic(nn.Module):
    """Value of a state: [..., n] -> [...]."""

    hidden: Sequence[int]
    activation: str = "tanh"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return MLP((*self.hidden, 1), self.activation, name="trunk")(x)[..., 0]
