"""Pictures of runs, drawn without a display. Called by experiments and notebooks; imports matplotlib only when drawing.

Colours are the Okabe-Ito set, which stays readable for colour-blind people and in grey. Where a name has the mark of
privileged methods (`methods.marked`), a line below the panels says what it means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gemsjax.evaluate import Evaluation, Scores
from gemsjax.maths.statistics import Estimate, interquartile_mean
from gemsjax.methods import MARK, PRIVILEGED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")


def learning_curve(
    rows: Sequence[Mapping[str, Any]],
    title: str,
    references: Mapping[str, Evaluation] | None = None,
    users_per_step: int = 1,
) -> Figure:
    """Validation and training return against trajectories of training, references as horizontal bands.

    Args:
      rows: of `metrics.jsonl` (`step`, `return`, `validation`, `validation_se`).
      title: of the picture.
      references: evaluations by name, drawn with their 95 % intervals.
      users_per_step: trajectories of a step.
    """
    figure, axes = _figure()
    steps = users_per_step * np.array([row["step"] for row in rows])
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
    _explain_mark(figure, (title, *(references or {})))
    return figure


class Densities(NamedTuple):
    """A histogram of recommended items' scores by boredom.

    Attributes:
      edges: [B + 1] of the bins.
      density: [most bored + 1, B]; all rows together integrate to one.
      mean: of the scores.
    """

    edges: np.ndarray
    density: np.ndarray
    mean: float


def densities(recommended: Scores, high: float = 1.0, most_bored: int = 3, bins: int = 100) -> Densities:
    """Scores counted by how many topics the user is bored of (`most_bored` or more together); the last bin is open."""
    scores, bored = recommended
    scores, edges = np.clip(scores, 0.0, high), np.linspace(0.0, high, bins + 1)
    per_item = np.repeat(np.minimum(bored, most_bored)[..., None], scores.shape[-1], axis=-1)
    counts = [np.histogram(scores[per_item == count], edges)[0] for count in range(most_bored + 1)]
    return Densities(edges, np.array(counts) / (scores.size * (edges[1] - edges[0])), float(recommended.scores.mean()))


def score_densities(recommended: Mapping[str, Scores | Densities], relevance_offset: float) -> Figure:
    """Densities of recommended items' scores, coloured by how many topics the user is bored of (paper, Figure 2).

    The vertical line is where an examined item is clicked with probability one half; the triangle is the mean score.
    """
    import matplotlib.pyplot as plt

    raw = [one.scores for one in recommended.values() if isinstance(one, Scores)]
    high = max([1.5 * relevance_offset, *(float(np.quantile(scores, 0.999)) for scores in raw)])
    with plt.rc_context(_STYLE):
        figure, panels = plt.subplots(
            1, len(recommended), figsize=(4.2 * len(recommended), 3.4), sharex=True, sharey=True, squeeze=False
        )
    for axes, (name, one) in zip(panels[0], recommended.items(), strict=True):
        edges, density, mean = densities(one, high) if isinstance(one, Scores) else one
        below = np.zeros(len(edges) - 1)
        for count, part in enumerate(density):
            label = f"{count}{'+' if count == len(density) - 1 else ''} bored topics"
            axes.stairs(below + part, edges, baseline=below, fill=True, color=COLOURS[count], label=label)
            below = below + part
        axes.axvline(relevance_offset, color="black", lw=1, ls=":")
        axes.plot(mean, 0, marker="^", color="black", ms=8, clip_on=False, zorder=3)
        axes.set(xlabel="score of a recommended item", title=f"{name} (mean {mean:.3f})")
    panels[0][0].set_ylabel("density")
    panels[0][-1].legend(frameon=False, fontsize=8)
    _explain_mark(figure, recommended)
    return figure


def lines_with_intervals(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, Estimate]]]], ylabel: str, log: bool = False
) -> Figure:
    """One panel a title, one line a label: estimates against x with their intervals, of whatever the label says."""
    import matplotlib.pyplot as plt

    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.6), sharey=True, squeeze=False)
    for one, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for number, (label, points) in enumerate(lines.items()):
            colour = COLOURS[number % len(COLOURS)]
            x, estimates = [p[0] for p in points], [p[1] for p in points]
            one.plot(x, [e.value for e in estimates], marker="o", ms=4, color=colour, label=label)
            one.fill_between(x, [e.low for e in estimates], [e.high for e in estimates], color=colour, alpha=0.15, lw=0)
        one.set_title(title)
        if log:
            one.set_xscale("log")
    axes[0][0].set_ylim(bottom=0)  # shared; not before the last panel, whose lines would no longer move the top
    axes[0][0].set_ylabel(ylabel)
    axes[0][-1].legend(frameon=False, fontsize=8)
    _explain_mark(figure, [*panels, *(label for lines in panels.values() for label in lines)])
    return figure


def seed_scatter(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Returns of every seed by method, one panel an environment, with interquartile means and bootstrap intervals.

    Args:
      panels: environment -> method -> one return a seed.
    """
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    with plt.rc_context(_STYLE):
        size = (3.4 * len(panels) + 1.8, 0.34 * len(names) + 1.2)
        figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for one, (env, panel) in zip(axes[0], panels.items(), strict=True):
        for name, values in panel.items():
            row = names.index(name)
            middle = interquartile_mean(values)
            one.plot([middle.low, middle.high], [row, row], color=COLOURS[0], lw=5, alpha=0.3, solid_capstyle="butt")
            one.plot(values, [row] * len(values), "o", color=COLOURS[0], ms=4, mec="white", mew=0.5)
            one.plot(middle.value, row, "|", color="black", ms=11, mew=1.6)
        one.set(xlabel="clicks in 100 turns", title=env)
        one.set_xlim(left=0)
        one.grid(axis="x", lw=0.4, alpha=0.5)
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].set_ylim(len(names) - 0.5, -0.5)
    _explain_mark(figure, names)
    return figure


def save(figure: Figure, path: Path | str, dpi: int = 150) -> Path:
    """Write a picture and free its memory."""
    import matplotlib.pyplot as plt

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
    return path


def _explain_mark(figure: Figure, names: Iterable[str]) -> None:
    """A line below the panels that says what the mark means, if a name has it."""
    from matplotlib.lines import Line2D

    if any(MARK in name for name in names):
        line = Line2D([], [], ls="none", label=PRIVILEGED)
        figure.legend(handles=[line], loc="outside lower center", frameon=False, fontsize=8, handlelength=0)


_STYLE: Any = {"figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False}


def _figure() -> tuple[Figure, Any]:
    import matplotlib.pyplot as plt

    with plt.rc_context(_STYLE):
        return plt.subplots(figsize=(6.4, 4.0))
