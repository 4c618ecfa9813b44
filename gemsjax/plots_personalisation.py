"""Pictures of personalised serving, in the manner of `gemsjax.plots`. Called by experiments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from gemsjax.evaluate import summarise
from gemsjax.plots import _STYLE, COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINES = ("-", "--", "-.", ":")


def cumulative_regret(worlds: Mapping[str, Mapping[str, np.ndarray]], most_turns: int = 400) -> Figure:
    """Regret so far against turns, a panel for each world, with 95 % intervals over seeds.

    Args:
      worlds: by the title of the panel, then by the label of the policy: [seeds, turns] mean regret of each turn.
      most_turns: turns of which intervals are drawn; of more, every n-th.
    """
    import matplotlib.pyplot as plt

    with plt.rc_context(_STYLE):
        figure, panels = plt.subplots(
            1, len(worlds), figsize=(3.6 * len(worlds), 3.6), sharex=True, sharey=True, squeeze=False
        )
    for axes, (title, policies) in zip(panels[0], worlds.items(), strict=True):
        for number, (label, regret) in enumerate(policies.items()):
            every = -(-regret.shape[1] // most_turns)
            turns = np.arange(1, regret.shape[1] + 1)[::every]
            so_far = [summarise(seeds) for seeds in np.cumsum(regret, axis=1)[:, ::every].T]
            low, high = np.array([one.interval for one in so_far]).T
            colour, line = COLOURS[number % len(COLOURS)], _LINES[number % len(_LINES)]
            axes.plot(turns, [one.mean for one in so_far], color=colour, ls=line, lw=1.5, label=label)
            axes.fill_between(turns, low, high, color=colour, alpha=0.2, lw=0)
        axes.set(xlabel="interactions of a user", title=title)
        axes.set_ylim(bottom=0)
    panels[0][0].set_ylabel("cumulative regret (clicks)")
    panels[0][0].legend(frameon=False, fontsize=8, loc="upper left")
    return figure
