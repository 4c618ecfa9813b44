"""Pictures of ranking policies, in the manner of `gemsjax.plots`. Called by experiments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from gemsjax.maths.statistics import Estimate
from gemsjax.plots import _STYLE, COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKS = "osD^vP*X"


def clicks_against_similarity(worlds: Mapping[str, Mapping[str, tuple[Estimate, Estimate]]]) -> Figure:
    """Clicks of a slate against how alike its items are, a panel for each world, with 95 % intervals.

    Args:
      worlds: by the title of the panel, then by the label of the policy: similarity and clicks.
    """
    import matplotlib.pyplot as plt

    with plt.rc_context(_STYLE):
        figure, panels = plt.subplots(1, len(worlds), figsize=(3.4 * len(worlds), 3.6), squeeze=False)
    for axes, (title, policies) in zip(panels[0], worlds.items(), strict=True):
        for number, (label, (similarity, clicks)) in enumerate(policies.items()):
            style = {"color": COLOURS[number % len(COLOURS)], "marker": _MARKS[number % len(_MARKS)]}
            errors = [0.0 if one.half != one.half else one.half for one in (similarity, clicks)]
            axes.errorbar(
                similarity.value, clicks.value, xerr=errors[0], yerr=errors[1], label=label, ms=5, ls="", **style
            )
        axes.set(xlabel="mean cosine of a slate's pairs", title=title)
        axes.set_ylim(bottom=0)
    panels[0][0].set_ylabel("clicks")
    panels[0][-1].legend(frameon=False, fontsize=8)
    return figure
