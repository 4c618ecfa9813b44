"""Pictures of runs, drawn without a display. Called by experiments and notebooks; imports matplotlib only when drawing.

Colours are the Okabe-Ito set, which stays readable for colour-blind people and in grey.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemsjax.evaluate import Evaluation, Scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")


def learning_curve(
    rows: Sequence[Mapping[str, Any]], title: str, references: Mapping[str, Evaluation] | None = None
) -> Figure:
    """Validation and training return against training steps, references as horizontal bands.

    Args:
      rows: of `metrics.jsonl` (`step`, `return`, `validation`, `validation_se`).
      title: of the picture.
      references: evaluations by name, drawn with their 95 % intervals.
    """
    figure, axes = _figure()
    steps = np.array([row["step"] for row in rows])
    validation = np.array([row["validation"] for row in rows])
    error = 1.96 * np.array([row["validation_se"] for row in rows])
    axes.plot(steps, [row["return"] for row in rows], color=COLOURS[5], lw=1.2, label="training episodes (exploring)")
    axes.plot(steps, validation, color=COLOURS[0], marker="o", ms=3, label="validation users (greedy), 95 %")
    axes.fill_between(steps, validation - error, validation + error, color=COLOURS[0], alpha=0.2, lw=0)
    for colour, (name, evaluation) in zip(COLOURS[1:4], (references or {}).items(), strict=False):
        axes.axhline(evaluation.mean, color=colour, ls="--", lw=1.2, label=f"{name}: {evaluation.mean:.0f}")
        axes.axhspan(*evaluation.interval, color=colour, alpha=0.15, lw=0)
    axes.set(xlabel="trajectories", ylabel="clicks in 100 turns", title=title)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    return figure


def score_densities(recommended: Mapping[str, Scores], relevance_offset: float, most_bored: int = 3) -> Figure:
    """Densities of recommended items' scores, coloured by how many topics the user is bored of (paper, Figure 2).

    The vertical line is where an examined item is clicked with probability one half; the triangle is the mean score.
    """
    import matplotlib.pyplot as plt

    with plt.rc_context(_STYLE):
        figure, panels = plt.subplots(
            1, len(recommended), figsize=(4.2 * len(recommended), 3.4), sharex=True, sharey=True, squeeze=False
        )
    high = max(float(np.quantile(s.scores, 0.999)) for s in recommended.values())
    edges = np.linspace(0.0, max(high, 1.5 * relevance_offset), 61)
    for axes, (name, (scores, bored)) in zip(panels[0], recommended.items(), strict=True):
        per_item = np.repeat(np.minimum(bored, most_bored)[..., None], scores.shape[-1], axis=-1)
        groups = [scores[per_item == count] for count in range(most_bored + 1)]
        weights = [np.full(group.size, 1.0 / (scores.size * (edges[1] - edges[0]))) for group in groups]
        labels = [f"{count}{'+' if count == most_bored else ''} bored topics" for count in range(most_bored + 1)]
        axes.hist(groups, edges, weights=weights, stacked=True, color=COLOURS[: most_bored + 1], label=labels)
        axes.axvline(relevance_offset, color="black", lw=1, ls=":")
        axes.plot(scores.mean(), 0, marker="^", color="black", ms=8, clip_on=False, zorder=3)
        axes.set(xlabel="score of a recommended item", title=f"{name} (mean {scores.mean():.3f})")
    panels[0][0].set_ylabel("density")
    panels[0][-1].legend(frameon=False, fontsize=8)
    return figure


def save(figure: Figure, path: Path | str, dpi: int = 150) -> Path:
    """Write a picture and free its memory."""
    import matplotlib.pyplot as plt

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
    return path


_STYLE: Any = {"figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False}


def _figure() -> tuple[Figure, Any]:
    import matplotlib.pyplot as plt

    with plt.rc_context(_STYLE):
        return plt.subplots(figsize=(6.4, 4.0))
