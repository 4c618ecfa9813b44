"""Pre-training of the slate VAE (paper section 3.1): loss, compiled epochs, validation, action bounds.

`make_pretraining(spec, dims)` gives pure functions; `experiments` and `prepare.py` drive them. Semantics of the
published implementation with two settings: `noise` and `shuffle` (README, "Where they differ", [35] and [38]).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from gemsjax.errors import require_choice, require_count
from gemsjax.maths.distributions import kl_to_standard_normal
from gemsjax.maths.optimise import AdamState, adam_init, adam_step
from gemsjax.maths.shuffle import shuffled
from gemsjax.nets.gems import SlateVAE
from gemsjax.rankers.gems import GeMSWeights
from gemsjax.shares import averaged, count, normal_of_rows, own
from gemsjax.types import Array, Dims, Key, Metrics, Observation, Params

NOISES = ("deviation", "variance")
LOSSES = ("loss", "slate", "click", "kl")


@dataclasses.dataclass(frozen=True)
class GeMSSpec:
    """Static choices.

    Attributes:
      latent_dim, item_dim, hidden: widths, see `SlateVAE`.
      batch_size: slates of one update.
      noise: `deviation` samples with exp(log-variance / 2), `variance` with exp(log-variance) as published [35].
      shuffle: a new random order of the slates each epoch; False walks the users in order, as published [38].
    """

    latent_dim: int = 32
    item_dim: int = 20
    hidden: tuple[int, ...] = (512, 256)
    batch_size: int = 256
    noise: str = "deviation"
    shuffle: bool = True


@struct.dataclass
class GeMSHypers:
    """Numbers that may differ between runs of one program: weights of KL and click loss, Adam's rate."""

    beta: float = 1.0
    click_weight: float = 0.5
    rate: float = 1e-3


@struct.dataclass
class GeMSState:
    """Everything that pre-training changes.

    Attributes:
      params, moments: the network and Adam's moments.
      best_params, best_loss: the epoch with the lowest validation loss so far.
    """

    params: Params
    moments: AdamState
    best_params: Params
    best_loss: Array


class Slates(NamedTuple):
    """Logged slates on the device in storage types, flat: [N, K] item numbers and [N] click bits or [N, K] clicks."""

    slates: Array
    clicks: Array


class Pretraining(NamedTuple):
    """Pure functions, sizes bound.

    Attributes:
      vae: the network.
      init: `(key) -> state`.
      updates: `(state, hypers, key, slates, epoch, batches [m]) -> (state, metrics [m])`: the updates number `batches`
        of epoch `epoch`. Results do not depend on how an epoch is cut.
      validate: `(state, hypers, slates) -> (state, metrics)`: losses over the slates with z = mean; keeps the best.
      bounds: `(params, slates) -> GeMSWeights`: parameters with centre and half range of the latent codes.
    """

    vae: SlateVAE
    init: Callable[[Key], GeMSState]
    updates: Callable[..., tuple[GeMSState, Metrics]]
    validate: Callable[[GeMSState, GeMSHypers, Slates], tuple[GeMSState, Metrics]]
    bounds: Callable[[Params, Slates], GeMSWeights]


def make_pretraining(spec: GeMSSpec, dims: Dims) -> Pretraining:
    """Bind sizes.

    Raises:
      SettingError: a count below 1 or an unknown noise convention.
    """
    for name in ("latent_dim", "item_dim", "batch_size"):
        require_count(f"gems_{name}", getattr(spec, name))
    require_choice("gems_noise", spec.noise, NOISES)
    vae = SlateVAE(dims.num_items, dims.slate_size, spec.latent_dim, spec.item_dim, spec.hidden)

    def init(key: Key) -> GeMSState:
        blank = Observation(jnp.zeros(dims.slate_size, jnp.int32), jnp.zeros(dims.slate_size, bool))
        params = vae.init(key, blank)["params"]
        return GeMSState(params, adam_init(params), jax.tree.map(jnp.copy, params), jnp.float32(jnp.inf))

    def update(state: GeMSState, hypers: GeMSHypers, batch: Observation, noise: Array) -> tuple[GeMSState, Metrics]:
        loss = lambda params: vae_loss(vae, params, hypers, batch, noise, spec.noise)  # noqa: E731
        gradients, metrics = averaged(jax.grad(loss, has_aux=True)(state.params))
        params, moments = adam_step(state.params, gradients, state.moments, hypers.rate)
        return dataclasses.replace(state, params=params, moments=moments), metrics

    def updates(
        state: GeMSState, hypers: GeMSHypers, key: Key, data: Slates, epoch: Array, batches: Array
    ) -> tuple[GeMSState, Metrics]:
        order_key, noise_key = jax.random.split(jax.random.fold_in(key, epoch))

        def one(state: GeMSState, batch: Array) -> tuple[GeMSState, Metrics]:
            rows = batch * spec.batch_size + jnp.arange(spec.batch_size)
            rows = shuffled(rows, data.slates.shape[0], order_key) if spec.shuffle else rows
            noise = normal_of_rows(jax.random.fold_in(noise_key, batch), (spec.batch_size, spec.latent_dim))
            return update(state, hypers, observe(data, own(rows), dims), noise)

        return jax.lax.scan(one, state, batches)

    def validate(state: GeMSState, hypers: GeMSHypers, data: Slates) -> tuple[GeMSState, Metrics]:
        def losses(rows: Array) -> Metrics:
            return vae_loss(vae, state.params, hypers, observe(data, rows, dims), None, spec.noise)[1]

        metrics = _mean_over_blocks(losses, data.slates.shape[0], _VALIDATION_BLOCK)
        better = metrics["loss"] < state.best_loss
        best_params = jax.tree.map(lambda new, old: jnp.where(better, new, old), state.params, state.best_params)
        return dataclasses.replace(
            state, best_params=best_params, best_loss=jnp.minimum(metrics["loss"], state.best_loss)
        ), metrics

    def bounds(params: Params, data: Slates) -> GeMSWeights:
        return action_bounds(vae, params, observe(data, jnp.arange(data.slates.shape[0]), dims))

    return Pretraining(vae, init, updates, validate, bounds)


def observe(data: Slates, rows: Array, dims: Dims) -> Observation:
    """Rows [n] of stored slates as observations [n, K] in compute types."""
    clicks = data.clicks[rows]
    if clicks.ndim == 1:
        clicks = (clicks[:, None] >> jnp.arange(dims.slate_size, dtype=clicks.dtype)) & 1
    return Observation(data.slates[rows].astype(jnp.int32), clicks.astype(bool))


def vae_loss(
    vae: SlateVAE, params: Params, hypers: GeMSHypers, batch: Observation, noise: Array | None, convention: str
) -> tuple[Array, Metrics]:
    """Loss of a batch [B, K] and its terms: slate cross-entropy + click_weight * click loss + beta * KL.

    Every term is a mean: over batch and slots, again, and over batch and latent dimensions. `noise` [B, d] is standard
    normal; None decodes the mean, as validation does.
    """
    mean, log_variance = vae.apply({"params": params}, batch, method=SlateVAE.encode)
    latent = mean
    if noise is not None:
        latent = mean + noise * jnp.exp(log_variance if convention == "variance" else 0.5 * log_variance)
    queries, click_logits = vae.apply({"params": params}, latent, method=SlateVAE.decode)
    items = jax.lax.stop_gradient(params["item_embeddings"])
    slate = slate_cross_entropy(queries, items, batch.slate).mean()
    # Log-loss in the form that neither overflows nor loses digits: softplus(x) - x * y.
    click = (jax.nn.softplus(click_logits) - click_logits * batch.clicks).mean()
    kl = kl_to_standard_normal(mean, log_variance).mean()
    loss = slate + hypers.click_weight * click + hypers.beta * kl
    return loss, dict(zip(LOSSES, (loss, slate, click, kl), strict=True))


_BLOCK = 128
"""Queries whose logits over a thousand items stay in a core's cache; accelerators take all at once."""


@jax.custom_vjp
def slate_cross_entropy(queries: Array, items: Array, slate: Array) -> Array:
    """-log softmax(query . items) at the shown item: [..., E], [I, E], [...] -> [...]. Items get no gradient.

    With a gradient it is taken beside the value, block by block, while a block's logits are in the cache. For
    reverse-mode differentiation only.
    """
    return _over_queries(queries, items, slate, gradient=False)


def _over_queries(queries: Array, items: Array, slate: Array, gradient: bool) -> Any:
    """The cross-entropies [...] and, if asked for, their gradients with respect to the queries [..., E]."""
    rows = slate.size
    block = max(1, min(_BLOCK, rows) if jax.default_backend() == "cpu" else rows)

    def blocks(x: Array) -> Array:  # [rows, ...] -> [blocks, block, ...], the last one filled up with zeros
        return jnp.pad(x, ((0, -rows % block), *((0, 0),) * (x.ndim - 1))).reshape(-1, block, *x.shape[1:])

    # With a row of ones the product with the items sums the weights too, in full float32 on accelerators as well.
    ones = jnp.ones((1, items.shape[0]), items.dtype)
    summed = jnp.concatenate([items.T, ones]) if gradient else ones

    def one(block: tuple[Array, Array]) -> Any:
        query, shown = block[0], items[block[1]]
        logits = items @ query.T  # queries last, so that they fill vectors in sums over items and dimensions
        largest = logits.max(axis=0)
        sums = jnp.matmul(summed, jnp.exp(logits - largest), precision=jax.lax.Precision.HIGHEST)
        total = sums[-1]
        loss = jnp.log(total) + largest - (query * shown).sum(axis=1)
        return (loss, (sums[:-1] / total).T - shown) if gradient else loss

    out = jax.lax.map(one, (blocks(queries.reshape(rows, queries.shape[-1])), blocks(slate.reshape(rows))))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:rows].reshape(*slate.shape, *x.shape[2:]), out)


def _cross_entropy_backward(by_query: Array, grad: Array) -> tuple[Array, None, None]:
    return grad[..., None] * by_query, None, None


slate_cross_entropy.defvjp(partial(_over_queries, gradient=True), _cross_entropy_backward)


def action_bounds(vae: SlateVAE, params: Params, logged: Observation) -> GeMSWeights:
    """The box of latent codes: per dimension from min(mean - sigma) to max(mean + sigma) over logged slates [N, K]."""
    mean, log_variance = vae.apply({"params": params}, logged, method=SlateVAE.encode)
    sigma = jnp.exp(0.5 * log_variance)
    low, high = (mean - sigma).min(axis=0), (mean + sigma).max(axis=0)
    return GeMSWeights(params, (low + high) / 2, (high - low) / 2)


_VALIDATION_BLOCK = 1_000
"""Slates of the validation at a time."""


def _mean_over_blocks(losses: Callable[[Array], Metrics], size: int, block: int) -> Metrics:
    """Mean of `losses(rows)` over all rows, block by block; the rest is a call of its own.

    Devices that go on together share the blocks; what does not divide between them is part of the rest.
    """
    shared = size // (block * count()) * count()  # blocks
    total = {name: jnp.float32(0.0) for name in LOSSES}
    add = lambda total, rows: jax.tree.map(lambda t, x: t + x * rows.size, total, losses(rows))  # noqa: E731
    if shared:
        blocks = own(jnp.arange(shared * block).reshape(shared, block))
        total, _ = jax.lax.scan(lambda total, rows: (add(total, rows), None), total, blocks)
        total = jax.tree.map(lambda x: x * count(), averaged(total))
    if size > shared * block:
        total = add(total, jnp.arange(shared * block, size))
    return jax.tree.map(lambda t: t / size, total)
