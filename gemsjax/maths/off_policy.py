"""Policy gradients from another policy's data: importance weights, the top-K factor, the loss, Boltzmann slates.

Pure; the equations of Chen et al., "Top-K Off-Policy Correction for a REINFORCE Recommender System" (2019), of which
the loss is `-mean sg(lambda_K * w) * advantage * log pi(a)` with w = pi(a) / beta(a). Nothing flows back through
lambda_K and w: differentiating them turns the coefficient into one of the wrong sign wherever pi < 1/e.
Called by agents and offline/.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemsjax.maths.slates import top_items
from gemsjax.types import Array

CORRECTIONS = ("none", "first_order", "topk", "set_ratio")
REDUCTIONS = ("mean", "sum")
LEAST_SET_RATIO = 1e-3
"""Below this, weights of `set_ratio` are not taken seriously."""
MOST_LOG_RATIO = 80.0
"""Weights without a cap end at e^80 = 5e34, so that thousands of them still have a finite sum in float32."""
RUNNING_SHARE = 0.01
"""Of a new batch in the running sum of weights."""


class Correction(NamedTuple):
    """How actions of another policy count; all static but `cap`.

    Attributes:
      kind: `none` (as if they were the policy's own), `first_order` (weights w), `topk` (lambda_K * w), or `set_ratio`:
        alpha / beta between `LEAST_SET_RATIO` and the cap, alpha the chance that K draws hold the item. Others found
        that to work (with a cap of 10 and `running_sum`); nobody derived it.
      set_size: K of lambda_K, how many draws of the policy make a recommendation.
      cap: weights are cut off here; None cuts nothing below e^`MOST_LOG_RATIO`.
      normalise: weights are divided by their sum over the batch, and the loss is their weighted sum.
      reduction: over the actions of a batch, `mean` or `sum`; not used with `normalise`.
    """

    kind: str = "topk"
    set_size: int = 1
    cap: Array | float | None = None
    normalise: bool = False
    reduction: str = "mean"


class Weights(NamedTuple):
    """What the actions of a batch are multiplied with, [...] each; constants for every derivative.

    Attributes:
      ratio: w (or alpha / beta), cut off and perhaps normalised; 1 without correction.
      top_k: lambda_K; 1 unless the correction is `topk`.
    """

    ratio: Array
    top_k: Array


def lambda_k(log_pi: Array, set_size: int | Array) -> Array:
    """d alpha / d pi = K (1 - pi)^(K-1), alpha the chance that K draws of the policy hold the item: [...] -> [...]."""
    return set_size * jnp.power(-jnp.expm1(jnp.minimum(log_pi, 0.0)), set_size - 1)


def log_importance_ratio(log_pi: Array, log_beta: Array, cap: Array | float | None = None) -> Array:
    """log (pi / beta), at most log `cap`: [...] -> [...]. -inf where pi is 0, whatever beta is; never NaN."""
    log_ratio = jnp.where(jnp.isneginf(log_pi), -jnp.inf, log_pi - log_beta)
    return log_ratio if cap is None else jnp.minimum(log_ratio, jnp.log(cap))


def importance_ratio(log_pi: Array, log_beta: Array, cap: Array | float | None = None) -> Array:
    """pi / beta, at most `cap`: [...] -> [...]. Cut off before the exponential, so that it cannot overflow.

    Without a cap it ends at e^`MOST_LOG_RATIO`, still finite.
    """
    return jnp.exp(jnp.minimum(log_importance_ratio(log_pi, log_beta, cap), MOST_LOG_RATIO))


def log_set_ratio(log_pi: Array, log_beta: Array, set_size: int, cap: Array | float | None = None) -> Array:
    """log (alpha / beta), between the logs of `LEAST_SET_RATIO` and `cap`: [...] -> [...]; alpha = 1 - (1 - pi)^K."""
    miss = set_size * jnp.log1p(-jnp.exp(jnp.minimum(log_pi, 0.0)))  # log (1 - pi)^K
    log_ratio = log_importance_ratio(jnp.log(-jnp.expm1(miss)), log_beta, cap)
    return jnp.maximum(log_ratio, math.log(LEAST_SET_RATIO))


def set_ratio(log_pi: Array, log_beta: Array, set_size: int, cap: Array | float | None = None) -> Array:
    """alpha / beta, at least `LEAST_SET_RATIO` and at most `cap`: [...] -> [...]. Finite as `importance_ratio` is."""
    return jnp.exp(jnp.minimum(log_set_ratio(log_pi, log_beta, set_size, cap), MOST_LOG_RATIO))


def running_sum(before: Array, total: Array) -> Array:
    """Exponential mean of batches' sums of weights, this one's included: [] -> []. 0 before the first: then it is it.

    A batch without weights leaves it as it is.
    """
    after = jnp.where(before > 0.0, before + RUNNING_SHARE * (total - before), total)
    return jnp.where(total > 0.0, after, before)


def normalised(log_ratio: Array, mask: Array) -> Array:
    """Weights that add up to 1 over the whole array where `mask` > 0, all 0 where nothing is: [...] -> [...].

    A softmax, so neither ratios that overflow nor ones that vanish together give NaN; infinite ones share all equally.
    """
    counts = mask > 0.0
    log_ratio = jnp.clip(log_ratio, None, jnp.finfo(log_ratio.dtype).max)  # inf - inf is NaN
    log_ratio = jnp.where(counts, log_ratio, -jnp.inf)
    best = log_ratio.max(initial=-jnp.inf)
    weighted = jnp.where(counts, jnp.exp(log_ratio - jnp.where(jnp.isneginf(best), 0.0, best)) * mask, 0.0)
    total = weighted.sum()
    return weighted / jnp.where(total > 0.0, total, 1.0)


def weights(log_pi: Array, log_beta: Array, mask: Array, correction: Correction) -> Weights:
    """Importance ratios and top-K factors of logged actions.

    Args:
      log_pi, log_beta: [...] log-probability of each action under the policy and under the one that logged it.
      mask: [...] how much each action counts; 0 for padding, whose log-probabilities may be anything.
      correction: which.
    """
    log_pi, log_beta = (jax.lax.stop_gradient(jnp.where(mask > 0.0, x, 0.0)) for x in (log_pi, log_beta))
    ones = jnp.ones_like(log_pi)
    if correction.kind == "none":
        log_ratio = jnp.zeros_like(log_pi)
    elif correction.kind == "set_ratio":
        log_ratio = log_set_ratio(log_pi, log_beta, correction.set_size, correction.cap)
    else:
        log_ratio = log_importance_ratio(log_pi, log_beta, correction.cap)
    ratio = jnp.exp(jnp.minimum(log_ratio, MOST_LOG_RATIO))
    top_k = lambda_k(log_pi, correction.set_size) if correction.kind == "topk" else ones
    return Weights(normalised(log_ratio, mask) if correction.normalise else ratio, top_k)


def policy_loss(
    log_pi: Array,
    advantage: Array,
    mask: Array,
    found: Weights,
    correction: Correction,
    divisor: Array | None = None,
) -> Array:
    """The loss of a batch of actions, [...] each -> []: its gradient is the corrected policy gradient.

    An action whose mask is 0 contributes nothing, whatever stands in its place; a batch without actions gives 0.
    With a `divisor` [] (of `running_sum`) the sum over the batch is divided by it, whatever the reduction.
    """
    coefficient = jax.lax.stop_gradient(found.ratio * found.top_k * advantage)
    # A masked log-probability may be infinite: leaving it out of the product keeps its derivative out as well.
    terms = jnp.where(mask > 0.0, coefficient * jnp.where(mask > 0.0, log_pi, 0.0), 0.0)
    if correction.normalise:  # the weights carry the mask already
        return -terms.sum()
    total = -(terms * mask).sum()
    if divisor is not None:
        return total / jnp.where(divisor > 0.0, divisor, 1.0)
    return total if correction.reduction == "sum" else total / jnp.maximum(mask.sum(), 1e-8)


def effective_share(ratio: Array, mask: Array) -> Array:
    """Share of the actions that count in effect, (sum w)^2 / (n sum w^2): [...] -> [], 1 if all weights are equal.

    0 where nothing counts. Weights are divided by the largest first: squares of uncapped ones overflow.
    """
    ratio = jnp.where(mask > 0.0, ratio, 0.0)
    largest = ratio.max(initial=0.0)
    scaled = ratio / jnp.where(largest > 0.0, largest, 1.0)
    return jnp.square(masked_mean(scaled, mask)) / jnp.maximum(masked_mean(jnp.square(scaled), mask), 1e-30)


def masked_mean(values: Array, mask: Array) -> Array:
    """Mean of `values` where `mask` > 0, weighted by it: [...] -> []; 0 where nothing counts."""
    return jnp.where(mask > 0.0, values * mask, 0.0).sum() / jnp.maximum(mask.sum(), 1e-8)


def standardised(values: Array) -> Array:
    """Mean 0 and standard deviation 1 (ddof 1, + 1e-4): [n] -> [n], n >= 2. RecNN does this to its returns."""
    return (values - values.mean()) / (values.std(ddof=1) + 1e-4)


def masked_standardised(values: Array, mask: Array) -> Array:
    """`standardised` over the entries whose `mask` > 0, each counted once: [...] -> [...], 0 elsewhere.

    A single entry becomes 0.
    """
    counted = (mask > 0.0).astype(values.dtype)
    number = counted.sum()
    values = jnp.where(mask > 0.0, values, 0.0)
    centred = (values - values.sum() / jnp.maximum(number, 1.0)) * counted
    deviation = jnp.sqrt(jnp.square(centred).sum() / jnp.maximum(number - 1.0, 1.0))
    return centred / (deviation + 1e-4)


# -- softmax over items ------------------------------------------------------------------------------------------------


def item_log_probs(queries: Array, items: Array, chosen: Array, log_normaliser: Array) -> Array:
    """log softmax(query . items) at chosen items: [..., d], [I, d], [..., K], [...] -> [..., K].

    Each logit is a product of its own: picking it out of [..., I] logits would make the gradient a scatter into them.
    """
    return jnp.einsum("...d,...kd->...k", queries, items[chosen]) - log_normaliser[..., None]


def sampled_log_probs(queries: Array, items: Array, chosen: Array, negatives: Array) -> Array:
    """`item_log_probs` with the sum over the catalogue estimated from some other items, for large catalogues.

    Z = e^l_a + (I - 1) / m * sum over the m negatives that are not a of e^l. Without bias for Z; exact if the negatives
    are the whole catalogue.

    Args:
      queries: [..., d].
      items: [I, d].
      chosen: [..., K] item numbers.
      negatives: [n] item numbers, drawn uniformly.

    Returns:
      [..., K].
    """
    own = jnp.einsum("...d,...kd->...k", queries, items[chosen])
    others = queries @ items[negatives].T
    different = chosen[..., None] != negatives  # [..., K, n]
    counted = jnp.maximum(different.sum(axis=-1), 1)
    logits = jnp.where(different, others[..., None, :], -jnp.inf)
    logits = jnp.concatenate([logits, jnp.full((*own.shape, 1), -1e30)], axis=-1)  # all equal to a: nothing else
    rest = jax.nn.logsumexp(logits, axis=-1) + jnp.log((items.shape[0] - 1) / counted)
    return own - jnp.logaddexp(own, rest)


def entropy_and_log_normaliser(logits: Array) -> tuple[Array, Array]:
    """Entropy of softmax(logits) and log of its sum: [..., I] -> [...], [...]."""
    log_normaliser = jax.nn.logsumexp(logits, axis=-1)
    mean_logit = (jax.nn.softmax(logits, axis=-1) * logits).sum(axis=-1)
    return log_normaliser - mean_logit, log_normaliser


def kl_divergence(old_logits: Array, new_logits: Array) -> Array:
    """KL(softmax(old) || softmax(new)): [..., I] -> [...]."""
    old, new = jax.nn.log_softmax(old_logits, axis=-1), jax.nn.log_softmax(new_logits, axis=-1)
    return (jnp.exp(old) * (old - new)).sum(axis=-1)


def boltzmann_slate(logits: Array, uniforms: Array, size: int, certain: int) -> Array:
    """The `certain` most probable items, then others drawn without repeats from the softmax over the rest of the best.

    Args:
      logits: [I] of one user.
      uniforms: [M] in [0, 1), K <= M <= I: draws are among the M most probable items.
      size: K.
      certain: K', 0 .. K.

    Returns:
      [K] int32, all different; the drawn ones in the order of drawing.
    """
    if certain == size:
        return top_items(logits, size)
    values, best = jax.lax.top_k(jax.lax.stop_gradient(logits), uniforms.shape[0])
    tiny = jnp.finfo(jnp.float32).tiny
    # Adding Gumbel noise and taking the largest is drawing one by one without repeats.
    noisy = values[certain:] - jnp.log(-jnp.log(jnp.clip(uniforms[certain:], tiny, 1.0 - 2.0**-24)))
    drawn = best[certain:][jax.lax.top_k(noisy, size - certain)[1]]
    return jnp.concatenate([best[:certain], drawn]).astype(jnp.int32)


DEFAULT_CAP = math.e**3
"""Of importance ratios, in the paper's live setting (with K = 16)."""
