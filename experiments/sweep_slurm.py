"""A sweep as a Slurm job that survives preemption and time limits: submitit queues it again, and it resumes.

    pip install 'gemsjax[slurm]'
    python -m experiments.sweep_slurm --nodes 2 --gpus 4 --partition PARTITION --line \\
        "--method sac-gems --env focused_topdown diffuse_topdown --seed 1 2 3 4 5 --out sweeps/seeds"

`--line` is a command line of `experiments.sweep`. One process a node, each with all of its GPUs; the processes find
each other through Slurm, and each drives its shards of the sweep. Directories must be on a disk that all nodes share. A
job that is signalled before its limit loses what it did since its last checkpoint (`--checkpoint-minutes`, 5 by
default). Use one shard a node or more, so that the sweep can be continued with another number of nodes.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

import tyro

from experiments import sweep
from experiments._cli import run_cli, use_compile_cache
from gemsjax.devices import use_all_cores
from gemsjax.errors import SettingError, require_choice, require_count


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to run, and on what."""

    line: str
    """Command line of `experiments.sweep`, in quotes."""
    nodes: int = 1
    """Machines."""
    gpus: int = 0
    """GPUs of each."""
    cpus: int = 4
    """Cores of each."""
    minutes: int = 24 * 60
    """Time limit of a job; it is put back into the queue until the sweep is done, at most `requeues` times."""
    requeues: int = 100
    """How often a job that reached its limit is started again."""
    partition: str | None = None
    """Slurm's partition."""
    cluster: str | None = None
    """slurm (found by itself), local (a process of this machine) or debug (this process)."""
    logs: Path = Path("sweeps/slurm")
    """Where submitit keeps its logs, on a shared disk."""


def make_job(line: str) -> Any:
    """What each process of a job does; submitit calls it, and again with the same line after a requeue."""
    import submitit

    class Job(submitit.helpers.Checkpointable):  # what it is called with says all that there is to continue from
        """`experiments.sweep --resume`, which begins what is not there yet."""

        def __call__(self, line: str) -> None:
            use_all_cores()
            use_compile_cache()
            sweep.command([*shlex.split(line), "--resume"])

    # Refused here, on the machine where a person reads it, rather than hours later on a node.
    sweep.parse(shlex.split(line))
    return Job()


def submit(arguments: Arguments) -> Any:
    """Submit the sweep; returns submitit's job.

    Raises:
      SettingError: a count below 1, an unknown cluster, a line that `experiments.sweep` refuses, or no submitit.
    """
    try:
        import submitit
    except ImportError as error:
        needs = f"its package is not installed: pip install 'gemsjax[slurm]' ({error})"
        raise SettingError("experiments.sweep_slurm", "submitit", needs) from error
    for name in ("nodes", "cpus", "minutes"):
        require_count(f"--{name}", getattr(arguments, name))
    if arguments.cluster is not None:
        require_choice("--cluster", arguments.cluster, ("slurm", "local", "debug"))
    job = make_job(arguments.line)
    executor = submitit.AutoExecutor(
        folder=arguments.logs / "%j", cluster=arguments.cluster, slurm_max_num_timeout=arguments.requeues
    )
    executor.update_parameters(
        name="gemsjax-sweep",
        nodes=arguments.nodes,
        tasks_per_node=1,
        gpus_per_node=arguments.gpus,
        cpus_per_task=arguments.cpus,
        timeout_min=arguments.minutes,
        slurm_signal_delay_s=300,
        **({} if arguments.partition is None else {"slurm_partition": arguments.partition}),
    )
    return executor.submit(job, arguments.line)


def main(arguments: Arguments) -> None:
    """Submit, and say where the logs are."""
    job = submit(arguments)
    print(f"job {job.job_id}; its logs are in {arguments.logs / str(job.job_id)}")
    if arguments.cluster in ("local", "debug"):
        job.result()


if __name__ == "__main__":
    run_cli(lambda: main(tyro.cli(Arguments, args=sys.argv[1:], description=__doc__)))
