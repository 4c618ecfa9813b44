"""Many runs as one program: seeds, environments and hyper-parameters of one method, on all devices.

    python -m experiments.sweep --method sac-gems --env focused_topdown focused_mix --seed 1 2 3 --gamma 0 0.8

Every setting of `experiments.train` is a flag here; those that are data (seed, env, catalogue, hyper-parameters, the
weights of GeMS's losses, constants of the environment) may have several values, and all combinations are run (with
`--paired`: the first values together, the second values, and so on). What is missing of pre-trained GeMS is trained
first, together too. `--dry-run` says what it would need of the devices, and trains nothing.

Stopped or killed, the same command with --resume continues, also on other devices. On several machines, start the same
command on each: under Slurm and in indexed Kubernetes jobs the processes find each other (experiments/sweep_slurm.py),
elsewhere --coordinator HOST:PORT --processes N --process I. `--export N --out DIR` makes an ordinary run of run N.

Results: `runs.csv` (a row a run, up to date), `metrics.csv` (a row a run and epoch), `sweep.json` (what was asked).
Speed: `python -m experiments.benchmark --only sweep`.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import types
import typing
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from experiments._cli import outcome_of, run_cli
from experiments.train import Method, arguments_of
from gemsjax import sweep
from gemsjax.devices import MOST_UNROLLED, PRECISIONS, use_precision, use_unroll
from gemsjax.envs.registry import CONSTANTS
from gemsjax.errors import SettingError, require, require_choice, require_count
from gemsjax.settings import TrainSettings
from gemsjax.sweep import memory
from gemsjax.sweep.axes import SIZES, WORLD
from gemsjax.sweep.bundle import bundle, saved_like
from gemsjax.sweep.layout import KINDS
from gemsjax.sweep.processes import Process, start


@dataclasses.dataclass(frozen=True)
class How:
    """How a sweep is run, and where it goes."""

    out: Path = Path("sweeps/sweep")
    """Directory of the sweep (with --export: root of the exported run)."""
    runs: Path = Path("runs")
    """Root of pre-trained weights."""
    data: Path = Path("logs")
    """Root of logged data."""
    paired: bool = False
    """Lists of equal length, one value of each for a run, instead of all combinations; a single value is for all."""
    layout: str = "auto"
    """mapped (runs one after another), vmapped (side by side), or auto: what is faster on this kind of device."""
    group: int | None = None
    """Vmapped runs of a device at a time; by default all. The last digits of their numbers depend on it."""
    shards: int | None = None
    """Parts with a checkpoint each; by default one a process."""
    checkpoint_minutes: float = 5.0
    """At least between checkpoints, as is ten times what the latest one took: they take a tenth of the time at most."""
    resume: bool = False
    """Continue a sweep."""
    overwrite: bool = False
    """Delete an earlier sweep first."""
    precision: str = "default"
    """Of float32 matrix products on accelerators: default (JAX's own), high or highest."""
    unroll: int = 1
    """Turns that a pass of the beliefs' scans makes, up to 100: fewer passes on a GPU, a larger program to compile."""
    dry_run: bool = False
    """Say what the sweep needs, and end."""
    coordinator: str | None = None
    """HOST:PORT of the first of several processes."""
    processes: int | None = None
    """How many processes."""
    process: int | None = None
    """Which of them this is, from 0."""
    heartbeat: int = 100
    """Seconds of silence after which a process counts as dead and all end."""


@dataclasses.dataclass(frozen=True)
class Export:
    """An ordinary run directory of one run of a sweep."""

    export: int
    """Number of the run."""
    sweep: Path = Path("sweeps/sweep")
    """Directory of the sweep."""
    out: Path = Path("runs")
    """Root of single runs."""
    overwrite: bool = False
    """Replace an earlier run of the same name."""


STOPPED, PATIENCE = 130, 20.0
"""Exit status of a sweep that was told to stop, and seconds that its first process then waits for the others."""
_UNPREFIXED, _PREFIXED = ("plan", "hypers", "spec"), ("gems", "mf", "pl")
"""Parts of the settings: flags of the first are called by their own name, of the others `--gems.beta`."""
_APART = (*_PREFIXED, "env_settings")
"""All parts whose flags have its name in front."""
_WORLD: tuple[str, ...] = (*SIZES, *WORLD)


def arguments_of_sweep(method: str, variant: str) -> type:
    """The command line of a sweep of one method: plain settings of `experiments.train`, each a list."""
    fields: list[Any] = []
    for field in dataclasses.fields(arguments_of(method, variant)):
        if field.name in ("where", "env_settings"):
            continue
        default = None if field.default is dataclasses.MISSING else field.default
        if field.name in (*_UNPREFIXED, *_PREFIXED):
            kind: Any = _listed(type(default), default)
            fields.append(
                (field.name, kind if field.name in _PREFIXED else Annotated[kind, tyro.conf.OmitArgPrefixes], kind())
            )
        else:
            fields.append((field.name, *_list_of(field.type, default)))
    words = dict.fromkeys(("examination", "user_norm"), tuple[str, ...])
    kinds: dict[str, Any] = dict.fromkeys(_WORLD, tuple[float, ...]) | words
    world = dataclasses.make_dataclass("World", [(name, kinds[name], ()) for name in _WORLD], frozen=True)
    world.__doc__ = "Constants of the environment instead of its own."
    fields.append(("env_settings", world, world()))
    fields.append(("how", tyro.conf.OmitArgPrefixes[How], How()))
    made = dataclasses.make_dataclass("Arguments", fields, frozen=True)
    made.__doc__ = TrainSettings.__doc__
    return made


def _listed(kind: Any, default: Any) -> type:
    """A class of settings in which every single value has become a list of values."""
    hints = typing.get_type_hints(kind)
    fields = []
    for field in dataclasses.fields(kind):
        type_, value = _list_of(hints[field.name], getattr(default, field.name))
        fields.append((field.name, type_, dataclasses.field(default=value)))
    made = dataclasses.make_dataclass(kind.__name__, fields, frozen=True)
    made.__doc__ = kind.__doc__
    return made


def _list_of(type_: Any, default: Any) -> tuple[Any, Any]:
    """A field of type T as one of `tuple[T, ...]`; flags, and what is a list already, stay what they are."""
    if isinstance(type_, str):  # of modules with postponed annotations
        type_ = {"str": str, "int": int, "float": float}.get(type_, str)
    if type_ is bool or typing.get_origin(type_) is tuple or isinstance(default, tuple):
        return type_, default
    if isinstance(type_, types.UnionType):
        type_ = next(inner for inner in typing.get_args(type_) if inner is not type(None))
    return tuple[type_, ...], () if default is None else (default,)


def parse(arguments: list[str]) -> tuple[list[sweep.Run], How]:
    """Runs from a command line; the method decides which flags there are.

    Raises:
      SettingError: an unknown flag, a setting of the machine out of its range; see also `sweep.grid`, `sweep.paired`.
    """
    chosen, _ = tyro.cli(Method, args=arguments, return_unknown_args=True, add_help=False)
    accepted, known = sweep.sweepable(chosen.method), arguments_of_sweep(chosen.method, chosen.variant)
    parsed: Any
    parsed, unknown = tyro.cli(
        known, args=arguments, prog="python -m experiments.sweep", description=__doc__, return_unknown_args=True
    )
    _refuse(unknown, known, accepted)
    _check(parsed.how)
    for name in ("method", "variant"):
        one = getattr(parsed, name)
        require(len(one) == 1, f"--{name}", " ".join(one), "one: each method is a program of its own")
    axes: dict[str, tuple] = {}
    base = TrainSettings(chosen.method, chosen.variant).resolved()

    def take(settings: Any, given: Any, prefix: str = "") -> Any:
        """`settings` with what has one value; what has several becomes an axis."""
        changes = {}
        for field in dataclasses.fields(given):
            value, name = getattr(given, field.name), prefix + field.name
            is_list = isinstance(value, tuple) and not isinstance(getattr(settings, field.name, None), tuple)
            if not is_list or len(value) == 1:
                changes[field.name] = value[0] if is_list else value
            elif len(value) > 1:
                axes[name] = value
        return dataclasses.replace(settings, **changes)

    parts = {part: take(getattr(base, part), getattr(parsed, part)) for part in _UNPREFIXED}
    for part in _PREFIXED:
        if hasattr(parsed, part):
            parts[part] = take(getattr(base, part), getattr(parsed, part), f"{part}.")
    plain = {}
    for name in ("env", "seed", "steps", "epoch_steps", "test_users", "test_stream", "catalogue", "embeddings"):
        values = getattr(parsed, name)
        if len(values) > 1:
            axes[name] = values
        elif values:
            plain[name] = values[0]
    constants = {}
    for name in _WORLD:
        values = tuple(_whole(name, value) for value in getattr(parsed.env_settings, name))
        if len(values) > 1:
            axes[f"env_settings.{name}"] = values
        elif values:
            constants[name] = values[0]
    base = dataclasses.replace(base, env_settings=constants, **plain, **parts)
    if not axes:
        axes["seed"] = (base.seed,)  # one run is a sweep too
    ordered = {name: axes[name] for name in (*accepted, *axes) if name in axes}
    return (sweep.paired if parsed.how.paired else sweep.grid)(base, ordered), parsed.how


def _refuse(unknown: list[str], known: type, accepted: Sequence[str]) -> None:
    """Name the first word that no flag takes, the flag that is closest to it, and what may be swept."""
    if not unknown:
        return
    flags, blank = [], known()
    for field in dataclasses.fields(blank):
        value, prefix = getattr(blank, field.name), f"{field.name}." if field.name in _APART else ""
        inner = [one.name for one in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else [field.name]
        flags += [f"--{prefix}{name}".replace("_", "-") for name in inner]
    place = next((place for place, word in enumerate(unknown) if word.startswith("--")), 0)
    flag, _, value = unknown[place].partition("=")
    close = get_close_matches(flag, flags, n=1)
    hint = f"did you mean {close[0]!r}? " if close else "there is no such flag, see --help. "
    differ = f"What may differ between runs: {', '.join(accepted)}"
    after = unknown[place + 1 :]
    own = after[: next((n for n, word in enumerate(after) if word.startswith("--")), len(after))]
    raise SettingError(flag, value or " ".join(own), hint + differ)


def _check(how: How) -> None:
    """Refuse settings of the machine where the line is typed, which may be long before a batch system runs it."""
    require_choice("--layout", how.layout, KINDS)
    require_choice("--precision", how.precision, PRECISIONS)
    require_count("--unroll", how.unroll, 1, MOST_UNROLLED)


def _whole(name: str, value: Any) -> Any:
    """A constant that is a whole number as one."""
    counts = (*SIZES, "examination_first_exponent", "catalogue_seed")
    whole = name in counts or (name in CONSTANTS and CONSTANTS[name].whole)
    return int(value) if whole and not isinstance(value, str) and float(value).is_integer() else value


def options(how: How, arguments: Sequence[str] = ()) -> sweep.Options:
    """What the library takes of a command line; `arguments` is all of it, for the record."""
    return sweep.Options(
        layout=how.layout,
        group=how.group,
        shards=how.shards,
        checkpoint_minutes=how.checkpoint_minutes,
        resume=how.resume,
        overwrite=how.overwrite,
        pretrained=how.runs,
        data=how.data,
        command=tuple(arguments),
    )


def dry_run(runs: list[sweep.Run], how: How, process: Process = Process()) -> None:  # noqa: B008 - frozen
    """Print what the sweep needs of each device of one of the processes.

    Raises:
      SettingError: it would not fit; the message names what would.
    """
    shards = min(process.total, len(runs)) if how.shards is None else how.shards
    require_count("--shards", shards, 1, len(runs))
    most = -(-len(runs) // shards)
    made = bundle(runs[:most])
    layout = sweep.make_layout(most, how.layout, how.group)
    data = saved_like(made)[1]
    found, _ = memory.need(made, data, layout)
    table = Table("part", "MiB a run")
    for name, size in found.parts.items():
        table.add_row(name.replace("_", " "), f"{size / 2**20:,.1f}")
    console = Console()
    told = layout.describe()
    console.print(
        f"{len(runs)} runs, {most} at a time on {told['devices']} x {told['device']}: {told['layout']}, "
        f"groups of {told['group']}, "
        f"{told['groups_per_device']} a device, {told['empty_places']} empty places"
    )
    console.print(table)
    console.print(
        f"total of a device, by XLA's plan: {_mib(found.total)} = {_mib(found.arguments)} of arguments (its runs) + "
        f"{_mib(found.output)} of output - {_mib(found.alias)} of it in place + {_mib(found.temporary)} temporary; "
        f"there are {'unknown' if found.limit is None else _mib(found.limit)}"
    )
    planned = memory.pretraining_need(made, how.runs, layout)
    if planned is not None:
        before, together = planned
        console.print(
            f"before that, to pre-train {together.layout.runs} GeMS that are not in {how.runs}: "
            f"{_mib(before.total)} of a device = {_mib(before.shared)} of logged data + "
            f"{_mib(before.parts['state'])} a GeMS + {_mib(before.temporary)} temporary, and what they return"
        )
        memory.refuse_unless_fits(
            before,
            together.layout,
            lambda other: memory.pretraining_need(made, how.runs, other)[0],  # type: ignore[index]
        )
    memory.refuse_unless_fits(found, layout, lambda other: memory.need(made, data, other)[0])


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def main(runs: list[sweep.Run], how: How, process: Process, arguments: Sequence[str] = ()) -> None:
    """Run a sweep and print its table; `arguments` are kept in its `sweep.json`."""
    if how.dry_run:
        return dry_run(runs, how, process) if process.rank == 0 else None
    outcome = sweep.run_sweep(runs, how.out, options(how, arguments), process)
    if outcome.stopped:
        print("stopped; the same command with --resume continues")
        sys.exit(STOPPED)
    if outcome.rows:
        _print(outcome.rows, list(runs[0].values))
        print(f"everything is in {outcome.directory}")


def _print(rows: list[dict[str, Any]], axes: list[str]) -> None:
    table = Table("run", *axes, "status", "best validation", "test return")
    for row in rows:
        returned = f"{row['test']:.1f} ± {row['test_se']:.1f} s.e." if "test" in row else ""
        best = f"{row['best_validation']:.1f}" if "best_validation" in row else ""
        table.add_row(str(row["run"]), *(str(row[axis]) for axis in axes), row["status"], best, returned)
    Console().print(table)


def export(arguments: Export) -> None:
    """Make an ordinary run of one run."""
    print(sweep.export(arguments.sweep, arguments.export, arguments.out, overwrite=arguments.overwrite))


def command(arguments: list[str], stopped: Callable[[], object] | None = None) -> None:
    """Whatever the command line asks for.

    Args:
      arguments: of the command line.
      stopped: called by the first process once a signal has stopped the sweep and its checkpoints are written, for who
        can put it back into a queue. If it returns, the process ends as it would without.
    """
    if any(argument.split("=")[0] == "--export" for argument in arguments):
        return export(tyro.cli(Export, args=arguments, prog="python -m experiments.sweep"))
    runs, how = parse(arguments)
    use_precision(how.precision)
    use_unroll(how.unroll)
    process = Process()
    try:
        process = _join(how)
        main(runs, how, process, arguments)
    except BaseException as error:
        if process.total > 1 and not how.dry_run:
            end_all(process, error, stopped)
        if stopped is not None and outcome_of(error)[0] == STOPPED:
            stopped()
        raise


def _join(how: How) -> Process:
    """Which process this is. A dry run that is only told how many there will be waits for none of them."""
    if how.dry_run and how.coordinator is None and how.processes is not None:
        require_count("--processes", how.processes)
        return Process(0, how.processes)
    return start(how.coordinator, how.processes, how.process, how.heartbeat)


def end_all(process: Process, error: BaseException, stopped: Callable[[], object] | None = None) -> None:
    """End one of several processes, and so all of them.

    A process that ends in good order would wait for the others, and they for its results: this one just ends, and
    jax.distributed ends them, so that whoever started the sweep sees it fail and can start it again.
    """
    status, says = outcome_of(error)
    print(f"process {process.rank}: {says}", file=sys.stderr, flush=True)
    if process.rank == 0 and status == STOPPED:
        time.sleep(PATIENCE)  # with the first one all end at once: let those who were told to stop write checkpoints
        if stopped is not None:
            stopped()
    elif status == STOPPED and stopped is not None:
        time.sleep(4 * PATIENCE)  # with any one all end: let the first one put the sweep back into its queue
    os._exit(status)


if __name__ == "__main__":
    run_cli(lambda: command(sys.argv[1:]))
