"""A sweep as a Slurm job that survives preemption and time limits: submitit queues it again, and it resumes.

    pip install 'gemsjax[slurm]'
    python -m experiments.sweep_slurm --nodes 2 --gpus 4 --partition PARTITION --line \\
        "--method sac-gems --env focused_topdown diffuse_topdown --seed 1 2 3 4 5 --out sweeps/seeds"

`--line` is a command line of `experiments.sweep`. One process a node, each with all of its GPUs; the processes find
each other through Slurm, and each drives its shards of the sweep. Directories must be on a disk that all nodes share.
Use one shard a node or more, so that the sweep can be continued with another number of nodes.

Before its time limit (and at preemption, where Slurm is told to send it) a job gets submitit's signal and queues itself
again at once: it loses what it did since its last checkpoint (`--checkpoint-minutes`, 5 by default). Preempted with
SIGTERM it ends its epoch, writes a checkpoint and then queues itself again, if Slurm's grace time is long enough for
that. `scancel` sends SIGTERM too; so a job asks `squeue` first, and ends for good unless it still counts as running.
Written from Slurm's and submitit's documentation and tested with stand-ins for both: no cluster was at hand.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import tyro

from experiments import sweep
from experiments._cli import run_cli, use_compile_cache
from gemsjax.devices import use_all_cores
from gemsjax.errors import SettingError, require, require_choice, require_count


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
            given = shlex.split(line)
            sweep.command([*given, *([] if "--resume" in given else ["--resume"])], stopped=queue_again)

    # Refused here, on the machine where a person reads it, rather than hours later on a node.
    _, how = sweep.parse(shlex.split(line))
    for flag in ("overwrite", "dry_run"):
        given = "a line without it: the job adds --resume, so that it goes on after a requeue"
        require(not getattr(how, flag), f"--{flag.replace('_', '-')}", True, given)
    return Job()


def queue_again() -> None:
    """Put this job, whose sweep was stopped by a signal, back into the queue as submitit does at its own signal.

    Does not return where submitit ends the process; returns if the job was cancelled, or cannot say.
    """
    import submitit

    if still_running(os.environ.get("SLURM_JOB_ID", "")):
        signal.raise_signal(getattr(signal, f"SIG{submitit.JobEnvironment.USR_SIG}"))


def still_running(job: str) -> bool:
    """Whether Slurm counts the job as running: not if it was cancelled, nor where there is no Slurm to ask."""
    ask = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
    try:
        told = subprocess.run(ask, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return bool(job) and told.returncode == 0 and told.stdout.split()[:1] == ["RUNNING"]


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
