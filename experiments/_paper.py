"""Numbers printed by the paper (GeMS, WSDM 2023: test users, mean of ten seeds); only for putting beside ours."""

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
