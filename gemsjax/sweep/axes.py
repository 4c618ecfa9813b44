"""What a sweep runs: settings of many runs from a grid or from lists, checked before anything is prepared.

What may differ between the runs of one program is data: seed, environment, constants and item embeddings of the
environment, hyper-parameters, weights of GeMS's losses. Widths and counts are part of the program. Host code; called by
`experiments.sweep` and notebooks.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gemsjax import methods
from gemsjax.envs.catalogue import KEYWORDS
from gemsjax.envs.registry import CONSTANTS
from gemsjax.errors import SettingError, require, require_choice
from gemsjax.pretrain.matrix_factorisation import MFSettings
from gemsjax.settings import GeMSSettings, PLSettings, TrainSettings, defaults

Axes = Mapping[str, Sequence[Any]]
"""Values by the name of a setting, `{"seed": [1, 2], "gamma": [0.0, 0.8], "gems.beta": [0.5, 1.0]}`."""

_PLAIN = ("seed", "env", "catalogue")
_KINDS: dict[str, Any] = {"gems": GeMSSettings, "mf": MFSettings, "pl": PLSettings}
DATA = {
    "gems": ("beta", "click_weight", "rate"),
    "mf": tuple(field.name for field in dataclasses.fields(MFSettings) if field.name != "dim"),
    "pl": ("temperature", "penalty"),
}
"""Of the settings of a ranker, and of its embeddings, those that are data. Embeddings are factorised run by run, so all
that they need is one width."""
SIZES = ("num_items", "slate_size", "num_topics", "topic_size", "horizon", "memory", "user_norm")
"""Sizes and rules of an environment that are part of the program: one value for all runs of a sweep."""
WORLD = (*CONSTANTS, "user_clip", *KEYWORDS, "examination", "examination_decay", "examination_first_exponent")


class Run(NamedTuple):
    """One run of a sweep.

    Attributes:
      values: what distinguishes it, by axis.
      settings: resolved.
    """

    values: dict[str, Any]
    settings: TrainSettings


def sweepable(method: str) -> tuple[str, ...]:
    """Names of the axes that a method's runs may differ in.

    Raises:
      SettingError: an unknown method, or one that does not learn.
    """
    entry = methods.method(method)
    require(entry.learns, "method", method, f"one that learns: {', '.join(methods.learners())}")
    parts = [str(entry.ranker), *(["mf"] if "mf" in entry.embeddings else [])]
    weights = tuple(f"{part}.{name}" for part in parts for name in DATA.get(part, ()))
    embeddings = ("embeddings",) if entry.embeddings else ()
    world = tuple(f"env_settings.{name}" for name in WORLD)
    return (*_PLAIN, *embeddings, *_hypers(method), *weights, *world)


def grid(base: TrainSettings, axes: Axes) -> list[Run]:
    """Every combination of the axes' values, the first axis slowest.

    Raises:
      SettingError: an axis that is unknown or static, or empty; a value that is refused or given twice.
    """
    _check(base, axes)
    return [_run(base, dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]


def paired(base: TrainSettings, axes: Axes) -> list[Run]:
    """One run for each position of the lists: the first values of all axes, the second ones, and so on.

    Raises:
      SettingError: as `grid`, and for lists of unequal length.
    """
    _check(base, axes, distinct=False)
    lengths = {name: len(values) for name, values in axes.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise SettingError("lists of a paired sweep", told, "lists of equal length, one value of each for a run")
    runs = [_run(base, dict(zip(axes, values, strict=True))) for values in zip(*axes.values(), strict=True)]
    for run in runs:
        twice = sum(other.values == run.values for other in runs)
        require(twice == 1, "runs of a paired sweep", run.values, "each once")
    return runs


def _hypers(method: str) -> tuple[str, ...]:
    kind: Any = methods.method(method).hypers
    return tuple(field.name for field in dataclasses.fields(kind))


def _statics(base: TrainSettings) -> set[str]:
    """Settings that exist but are part of the program, by the names that an axis would have."""
    usual = defaults(base.method, base.variant)
    parts = {field.name for part in ("plan", "spec") for field in dataclasses.fields(usual[part])}
    rankers = {f"{part}.{field.name}" for part, kind in _KINDS.items() for field in dataclasses.fields(kind)}
    sizes = {f"env_settings.{name}" for name in SIZES}
    return parts | rankers | sizes | {field.name for field in dataclasses.fields(TrainSettings)}


def _check(base: TrainSettings, axes: Axes, distinct: bool = True) -> None:
    accepted = sweepable(base.method)
    require(bool(axes), "axes of a sweep", "none", f"at least one of {', '.join(accepted)}")
    statics = _statics(base)
    for name, values in axes.items():
        if name in statics and name not in accepted:
            static = f"one value for all runs: it is part of the program. What may differ: {', '.join(accepted)}"
            raise SettingError(name, list(values), static)
        require_choice("axis of a sweep", name, accepted)
        several = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
        require(several, name, values, "a list of at least one value")
        plain = all(isinstance(value, str | int | float | list | tuple | None) for value in values)
        require(plain, name, list(values), "a list of numbers, words, or lists of numbers")
        # Compared one by one: a value may be a list (an examination table), which has no hash.
        once = all(value not in values[:place] for place, value in enumerate(values))
        require(not distinct or once, name, list(values), "each value once")


def _run(base: TrainSettings, values: dict[str, Any]) -> Run:
    plain = {name: value for name, value in values.items() if name in (*_PLAIN, "embeddings")}
    hypers = {name: value for name, value in values.items() if name in _hypers(base.method)}
    base = base.resolved()
    parts = {name: getattr(base, name) for name in DATA if getattr(base, name) is not None}
    made = dataclasses.replace(
        base,
        **plain,
        **{name: dataclasses.replace(part, **_below(name, values)) for name, part in parts.items()},
        hypers=dataclasses.replace(base.hypers, **hypers),
        env_settings={**base.env_settings, **_below("env_settings", values)},
    )
    return Run(values, made.resolved())


def _below(part: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(f"{part}."): value for name, value in values.items() if name.startswith(f"{part}.")}
