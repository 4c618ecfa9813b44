"""Pictures of learning from logs: importance weights, top-K factors, estimated against logged propensities.

Called by experiments and notebooks; imports matplotlib only when drawing. Save with `plots.save`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gemsjax.plots import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE: Any = {"figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False}


def weight_histograms(
    weights: Mapping[str, tuple[np.ndarray, np.ndarray]], cap: float, set_size: int, title: str
) -> Figure:
    """Two panels: importance weights before the cap (logarithmic), and lambda_K.

    Args:
      weights: by name, ratios [n] and top-K factors [n] of the actions that were learnt from.
      cap: drawn as a vertical line.
      set_size: K, the largest lambda.
      title: of the picture.
    """
    import matplotlib.pyplot as plt

    with plt.rc_context(_STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.8), sharey=False)
    for colour, (name, (ratio, top_k)) in zip(COLOURS, weights.items(), strict=False):
        _shares_by_decade(left, ratio, (-4, 4), colour, name)
        share = np.full(top_k.size, 1.0 / max(top_k.size, 1))
        right.hist(top_k, np.linspace(0.0, set_size, 61), weights=share, histtype="step", color=colour, lw=1.4)
    _decades(left, -4, 4)
    left.axvline(np.log10(cap), color="black", ls=":", lw=1.0, label=f"cap {cap:.1f}")
    left.set(xlabel="log10 of pi / beta at what is learnt from, before the cap", ylabel="share of actions", title=title)
    right.set(xlabel=f"lambda_K, K = {set_size}", ylabel="share of actions", yscale="log", ylim=(1e-5, 2.0))
    figure.legend(*left.get_legend_handles_labels(), frameon=False, fontsize=8, ncols=3, loc="outside lower center")
    return figure


def calibration(estimated: np.ndarray, logged: np.ndarray, title: str) -> Figure:
    """Histograms of the estimated probability of shown items, one for each value that the logging policy had.

    Args:
      estimated, logged: [n] probabilities of the same shown items.
      title: of the picture.
    """
    import matplotlib.pyplot as plt

    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(5.4, 3.4))
    values = np.unique(np.round(np.log10(logged), 3))[: len(COLOURS)]
    for colour, value in zip(COLOURS, values, strict=False):
        group = estimated[np.abs(np.log10(logged) - value) < 2e-3]
        _shares_by_decade(axes, group, (-5, 0), colour, None, estimated.size)
        axes.axvline(value, color=colour, ls="--", lw=1.2, label=f"logged with {10**value:.4f}")
    _decades(axes, -5, 0)
    axes.set(xlabel="log10 of the estimated probability", ylabel="share of shown items", title=title)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _shares_by_decade(
    axes: Any, values: np.ndarray, decades: tuple[int, int], colour: str, name: str | None, of: int = 0
) -> None:
    """A histogram of log10 of [n] numbers of at least 0, in tenths of a decade, as shares of `of` (by default, n).

    What lies outside has a wide shaded bin at its side, so that no peak at an edge is taken for one of the numbers.
    """
    low, high = decades
    edges = [low - 1.0, *np.linspace(low, high, 10 * (high - low) + 1), high + 1.0]
    with np.errstate(divide="ignore"):
        logs = np.clip(np.log10(values.astype(np.float64)), edges[0], edges[-1])
    share = np.full(logs.size, 1.0 / max(of or logs.size, 1))
    axes.hist(logs, edges, weights=share, histtype="step", color=colour, lw=1.4, label=name)


def _decades(axes: Any, low: int, high: int) -> None:
    """The axis of `_shares_by_decade`, with the bins of what lies outside shaded and named."""
    ticks = range(low, high + 1)
    for first in (low - 1.0, high):
        axes.axvspan(first, first + 1.0, color="black", alpha=0.07, lw=0)
    axes.set_xticks([low - 0.5, *ticks, high + 0.5], [f"\n< {low}", *map(str, ticks), f"\n> {high}"])
    axes.set_xlim(low - 1.0, high + 1.0)
