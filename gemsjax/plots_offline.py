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
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.4), sharey=False)
    edges: Any = np.linspace(-4.0, 4.0, 81)
    for colour, (name, (ratio, top_k)) in zip(COLOURS, weights.items(), strict=False):
        logs = np.clip(np.log10(np.maximum(ratio, 1e-30)), edges[0], edges[-1])
        left.hist(logs, edges, density=True, histtype="step", color=colour, lw=1.4, label=name)
        right.hist(top_k, np.linspace(0.0, set_size, 61), density=True, histtype="step", color=colour, lw=1.4)
    left.axvline(np.log10(cap), color="black", ls=":", lw=1.0, label=f"cap {cap:.1f}")
    left.set(xlabel="log10 of pi / beta at clicked items, before the cap", ylabel="density", title=title)
    right.set(xlabel=f"lambda_K, K = {set_size}", yscale="log")
    left.legend(frameon=False, fontsize=8)
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
    edges: Any = np.linspace(-5.0, 0.0, 81)
    values = np.unique(np.round(np.log10(logged), 3))[: len(COLOURS)]
    for colour, value in zip(COLOURS, values, strict=False):
        group = np.log10(estimated[np.abs(np.log10(logged) - value) < 2e-3])
        share = np.full(group.size, 1.0 / max(estimated.size, 1))
        axes.hist(np.clip(group, edges[0], 0.0), edges, weights=share, histtype="step", color=colour, lw=1.4)
        axes.axvline(value, color=colour, ls="--", lw=1.2, label=f"logged with {10**value:.4f}")
    axes.set(xlabel="log10 of the estimated probability", ylabel="share of shown items", title=title)
    axes.legend(frameon=False, fontsize=8)
    return figure
