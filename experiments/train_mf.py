"""Item embeddings by matrix factorisation (BPR) of logged clicks; the logged data is made first, and both are kept.

    python -m experiments.train_mf --env focused_topdown --seed 58407201

As in the paper: 100,000 logged users, 20 dimensions, a validation every 1000 batches, patience 3. About a minute on two
quiet CPU cores, besides half a minute for the logged data; with these settings it stops after 189,000 batches (5.4
passes) at a validation loss of 0.2833, and of an item's ten nearest items six or seven share its topic (one by chance).
Asked again it prints what is kept; stopped or killed, the same command goes on. Methods on such embeddings
(`sac-topk-mf`, say) find them by themselves if --out and the settings are the same.
The published validation, which trains on wrong pairs: --mf.validation training.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from experiments._cli import run_cli
from gemsjax import prepare, tracking
from gemsjax.errors import require_count
from gemsjax.prepare.mf import kept_embeddings
from gemsjax.pretrain.matrix_factorisation import MFSettings, check_mf
from gemsjax.settings import PUBLISHED_SEEDS, TrainSettings

METHOD = "sac-topk-mf"
"""A method on such embeddings: what is made here is what its runs look for."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to factorise, and where to keep it."""

    env: str = "focused_topdown"
    """Name of an environment."""
    seed: int = PUBLISHED_SEEDS[0]
    """Of the start, the order of the clicks and the items that were not clicked."""
    catalogue: str | None = None
    """File (.npy, .npz, .pt) or name of item embeddings instead of the environment's own, for its users to judge by."""
    env_settings: dict[str, int | float | str] = dataclasses.field(default_factory=dict)
    """Constants of the environment to change, such as `influence 0.05` or `slate_size 5`."""
    mf: MFSettings = MFSettings()
    """Training."""
    data: Path = Path("logs")
    """Root of logged data."""
    out: Path = Path("runs")
    """Root of all runs; the embeddings are kept below its MF."""


def main(arguments: Arguments) -> None:
    check_mf(arguments.mf)
    require_count("seed", arguments.seed, 0, 2**32 - 1)
    settings = TrainSettings(
        method=METHOD,
        env=arguments.env,
        seed=arguments.seed,
        catalogue=arguments.catalogue,
        env_settings=arguments.env_settings,
        mf=arguments.mf,
    )
    world = prepare.world_of(settings)
    data = lambda: prepare.logged_data(settings, world, arguments.data)  # noqa: E731
    checksum = prepare.known_checksum(settings, world, arguments.data)
    embeddings, directory = kept_embeddings(settings, world, arguments.out, data, checksum)
    rows = tracking.read_metrics(directory)
    best = min(rows, key=lambda row: row["validation_loss"])
    print("validation   " + "  ".join(f"{row['validation_loss']:.4f}" for row in rows[-5:]) + f"  (of {len(rows)})")
    print(f"best         {best['validation_loss']:.4f} after {best['step']:,} batches")
    print(f"embeddings   {embeddings.shape[0]:,} items, {embeddings.shape[1]} dimensions")
    print(f"path         {directory}")


if __name__ == "__main__":
    run_cli(lambda: main(tyro.cli(Arguments, prog="python -m experiments.train_mf", description=__doc__)))
