"""Pictures of RecSim's agents, in the manner of `gemsjax.plots`. Called by experiments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gemsjax.maths.statistics import t_interval
from gemsjax.plots import _STYLE, COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def returns_by_agent(groups: Mapping[str, Mapping[str, Sequence[float]]], xlabel: str, title: str) -> Figure:
    """Return of every seed, a row an agent, with mean and Student-t interval; the axis does not start at 0.

    Args:
      groups: by kind of agent (one colour each), then by label: one return a seed.
      xlabel, title: of the picture.
    """
    import matplotlib.pyplot as plt

    names = [name for agents in groups.values() for name in agents]
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 0.34 * len(names) + 1.3))
    for number, (group, agents) in enumerate(groups.items()):
        colour = COLOURS[number % len(COLOURS)]
        for place, (name, values) in enumerate(agents.items()):
            row, mean = names.index(name), t_interval(values)
            axes.plot([mean.low, mean.high], [row, row], color=colour, lw=5, alpha=0.3, solid_capstyle="butt")
            axes.plot(values, [row] * len(values), "o", color=colour, ms=4, mec="white", mew=0.5,
                      label=None if place else group)  # fmt: skip
            axes.plot(mean.value, row, "|", color="black", ms=11, mew=1.6)
    axes.set(xlabel=xlabel, title=title)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", lw=0.4, alpha=0.5)
    axes.legend(frameon=False, fontsize=8)
    return figure
