"""Examination (position bias) and the click model: which slots a user looks at and clicks.

Source: paper section 4.1; the published implementation starts the exponent at 0, the paper's text at 1. Pure, one user.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from gemsjax.errors import SettingError, is_number, require, require_array, require_choice, require_count
from gemsjax.types import Array

EXAMINATIONS = ("topdown", "mix")


def examination_table(
    examination: str | np.ndarray, slate_size: int, decay: float = 0.85, first_exponent: int = 0
) -> np.ndarray:
    """The [K, K+1] table of examination probabilities: rank by rank of the latest click so far.

    The last column is "no click in this slate yet". Equal columns (all built-in tables) make clicks independent.

    Args:
      examination: `topdown` (`decay**rank`), `mix` (mean of top-down and bottom-up), or probabilities [K] or [K, K+1].
      slate_size: K.
      decay: base of the built-in tables, in (0, 1].
      first_exponent: 0 as in the published implementation, 1 as in the paper's text.

    Returns:
      [K, K+1] float32.

    Raises:
      SettingError: an unknown name, no array of numbers, a wrong shape, probabilities outside [0, 1]; a decay or an
        exponent out of range.
    """
    require(is_number(decay) and 0.0 < decay <= 1.0, "examination_decay", decay, "a number in (0, 1]")
    require_count("examination_first_exponent", first_exponent, 0)
    if isinstance(examination, str):
        require_choice("examination", examination, EXAMINATIONS)
        ranks = np.arange(slate_size)
        table = decay ** (ranks + first_exponent)
        if examination == "mix":
            table = 0.5 * table + 0.5 * table[::-1]
    else:
        accepted = f"{' or '.join(EXAMINATIONS)}, or an array [{slate_size}] or [{slate_size}, {slate_size + 1}]"
        table = require_array("examination", examination, accepted).astype(np.float64)
    if table.ndim == 1:
        table = np.repeat(table[:, None], slate_size + 1, axis=1)
    if table.shape != (slate_size, slate_size + 1):
        raise SettingError("examination", table.shape, f"shape ({slate_size},) or ({slate_size}, {slate_size + 1})")
    require(bool(np.isfinite(table).all() and (table >= 0).all() and (table <= 1).all()), "examination", "a table",
            "finite probabilities in [0, 1]")  # fmt: skip
    return table.astype(np.float32)


def clicks_are_independent(table: np.ndarray) -> bool:
    """Whether a click's probability ignores the clicks above it, i.e. all columns of the table [K, K+1] are equal."""
    return bool(np.all(table == table[:, :1]))


def click_probabilities(attractiveness: Array, table: Array, independent: bool) -> Array:
    """Marginal click probability of every rank. Source: paper section 4.1; the recursion is the user browsing model's.

    Args:
      attractiveness: [K] probability of a click once examined.
      table: [K, K+1] from `examination_table`.
      independent: static; skips the recursion over the latest click.

    Returns:
      [K] float32.
    """
    K = attractiveness.shape[0]
    if independent:
        return attractiveness * table[:, -1]
    # latest[j]: probability that the latest click so far was at rank j (column K: none), as in the user browsing model.
    latest = jnp.zeros(K + 1).at[K].set(1.0)
    marginal = []
    for rank in range(K):
        clicked = latest * table[rank] * attractiveness[rank]
        marginal.append(clicked.sum())
        latest = (latest - clicked).at[rank].set(marginal[-1])
    return jnp.stack(marginal)


def sample_clicks(uniforms: Array, attractiveness: Array, table: Array, independent: bool) -> Array:
    """Clicks of one user on one slate.

    Args:
      uniforms: [K] in [0, 1), one a rank.
      attractiveness: [K] probability of a click once examined.
      table: [K, K+1] from `examination_table`.
      independent: static; skips the recursion over the latest click.

    Returns:
      [K] bool.
    """
    if independent:
        return uniforms < click_probabilities(attractiveness, table, True)
    K = attractiveness.shape[0]

    def browse(latest: Array, rank: Array) -> tuple[Array, Array]:
        clicked = uniforms[rank] < attractiveness[rank] * table[rank, latest]
        return jnp.where(clicked, rank, latest), clicked

    return jax.lax.scan(browse, jnp.int32(K), jnp.arange(K, dtype=jnp.int32))[1]
