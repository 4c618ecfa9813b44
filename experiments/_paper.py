"""Numbers printed by the paper (GeMS, WSDM 2023: test users, mean of ten seeds), and some recorded from its published
implementation; only for putting beside ours."""

from __future__ import annotations

PUBLISHED: dict[tuple[str, str], str] = {
    ("sac-topk-ideal", "focused_topdown"): "429.0",
    ("sac-topk-ideal", "focused_mix"): "384.1",
    ("sac-topk-ideal", "focused_divpen"): "386.3",
    ("sac-gems", "focused_topdown"): "305.3",
    ("sac-gems", "focused_mix"): "242.6",
    ("sac-gems", "focused_divpen"): "254.1",
    ("sac-topk-mf", "focused_topdown"): "254.4",
    ("sac-topk-mf", "focused_mix"): "232.7",
    ("sac-topk-mf", "focused_divpen"): "242.2",
    ("reinforce-softmax", "focused_topdown"): "248.1",
    ("reinforce-softmax", "focused_mix"): "233.5",
    ("reinforce-softmax", "focused_divpen"): "249.1",
    ("sac-wknn", "focused_topdown"): "95 to 107",
    ("sac-wknn", "focused_mix"): "95 to 107",
    ("sac-wknn", "focused_divpen"): "95 to 107",
    ("short-term-oracle", "focused_topdown"): "107.7",
}
"""Return by method and environment."""

PAPER_METHODS = (
    "random", "short-term-oracle", "sac-topk-ideal", "sac-gems", "sac-topk-mf", "reinforce-softmax", "slateq",
    "sac-wknn",
)  # fmt: skip
"""The eight methods of the paper's table."""
ENVIRONMENTS = tuple(f"{items}_{clicks}" for items in ("focused", "diffuse") for clicks in ("topdown", "mix", "divpen"))
"""The six environments of the paper."""

EARLY: dict[str, tuple[tuple[float, float], ...]] = {
    "sac-gems": ((69.38, 0.38), (69.92, 0.41), (70.83, 0.38), (71.02, 0.41), (72.17, 0.41), (73.78, 0.42)),
    "sac-topk-ideal": ((98.05, 0.53), (85.55, 0.46), (93.37, 0.48), (102.06, 0.49), (113.09, 0.52), (124.11, 0.59)),
    "sac-topk-mf": ((50.51, 0.54), (81.91, 0.70), (90.63, 0.72), (92.64, 0.73), (94.02, 0.78), (92.28, 0.78)),
    "reinforce-softmax": (
        (108.80, 1.39), (151.19, 1.05), (146.02, 1.11), (146.77, 1.08), (139.65, 0.93), (143.14, 1.01),
    ),
}  # fmt: skip
"""Recorded from one run a method of the published implementation (seed 58407201, a plain loop around it): clicks of its
training trajectories on focused TopDown, mean of each 500 and the standard error of that mean, from those of its five
hundreds. The first 200 were random; the slate VAE had 5 epochs on 1,800 users; embeddings for `mf` are the authors'."""
EARLY_GREEDY: dict[str, tuple[float, float]] = {
    "sac-gems": (102.15, 1.48),
    "sac-topk-ideal": (188.87, 2.09),
    "sac-topk-mf": (91.03, 1.48),
    "reinforce-softmax": (206.39, 3.02),
}
"""The same runs after their 3,000 trajectories: return of the greedy policy, mean and standard error over 200 users."""
EARLY_STEP = 500
"""Trajectories of each number in `EARLY`."""
