"""Sweeps: many runs (seeds, environments, hyper-parameters) as one compiled program on all devices.

    from gemsjax import sweep
    from gemsjax.settings import TrainSettings

    runs = sweep.grid(TrainSettings(method="sac-gems"), {"seed": [1, 2, 3], "gamma": [0.0, 0.8]})
    outcome = sweep.run_sweep(runs, Path("sweeps/gamma"))

`axes` says which runs, `layout` where they go (mapped, vmapped, sharded: the successor of pmapped sweeps), `drive` runs
them, `export` makes an ordinary run directory of one.
"""

from gemsjax.sweep.axes import Axes, Run, grid, paired, sweepable
from gemsjax.sweep.drive import Options, Outcome, run_sweep
from gemsjax.sweep.export import export
from gemsjax.sweep.layout import Layout, make_layout

__all__ = [
    "Axes", "Layout", "Options", "Outcome", "Run", "export", "grid", "make_layout", "paired", "run_sweep", "sweepable",
]  # fmt: skip
