"""Environments by name: `make` builds one, `register` adds one of your own. On the host, before anything compiles.

Called by everything that needs an environment; imports no networks. To change the published environments a little, pass
keywords to `make`; to give the change a name, `register("calm", "focused_topdown", influence=0.02)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from gemsjax.envs.catalogue import KEYWORDS, RECIPES, check_catalogue, load_catalogue, named_catalogue
from gemsjax.envs.clicks import clicks_are_independent, examination_table
from gemsjax.envs.interest_evolution import NUMBERS, EvolutionEnv, interest_evolution
from gemsjax.envs.interest_exploration import ExplorationEnv, interest_exploration
from gemsjax.envs.slates import check_slate
from gemsjax.envs.topics import USER_NORMS, TopicEnv, TopicParams
from gemsjax.errors import SettingError, is_number, require, require_choice, require_count, require_number

__all__ = [
    "CONSTANTS", "Build", "Constant", "check_slate", "environments", "make", "register", "require_catalogue",
    "topic_environment",
]  # fmt: skip

Build = Callable[..., tuple[Any, Any]]
"""`(name, **settings) -> (env, params)`, with the contract of `TopicEnv`."""


class Constant(NamedTuple):
    """A number of `TopicParams` that can be set, its published value and what is accepted."""

    default: float
    low: float
    high: float
    whole: bool = False


CONSTANTS = {
    "relevance_offset": Constant(0.28, -1e6, 1e6),
    "relevance_slope": Constant(100.0, 0.0, 1e6),
    "diversity_threshold": Constant(4, 1, 1e6, whole=True),
    "diversity_penalty": Constant(1.0, 1.0, 1e6),
    "boredom_threshold": Constant(5, 1, 1e6, whole=True),
    "boredom_duration": Constant(5, 1, 1e6, whole=True),
    "memory_window": Constant(5, 0, 1e6, whole=True),
    "influence": Constant(0.1, 0.0, 1.0),
    "short_term_boost": Constant(1.0, 0.0, 1e6),
    "user_noise": Constant(0.4, 1e-3, 1e6),
    "user_focus": Constant(3.0, 0.0, 20.0),
}
"""Keywords of `make`; `TopicParams` says what each means. A user needs some taste, hence the bounds on the last two."""


def topic_environment(
    name: str,
    *,
    catalogue: str | Path | np.ndarray = "focused",
    num_items: int | None = None,
    slate_size: int = 10,
    num_topics: int = 10,
    topic_size: int = 2,
    horizon: int = 100,
    examination: str | np.ndarray = "topdown",
    examination_decay: float = 0.85,
    examination_first_exponent: int = 0,
    memory: int = 10,
    user_norm: str = "topics",
    user_clip: float = 1.0,
    **numbers: float,
) -> tuple[TopicEnv, TopicParams]:
    """The topic simulator with any settings; `make` is this with the settings of a named environment.

    Args:
      name: of the environment, for messages, tables and run names.
      catalogue: `focused`, `diffuse` or `peaked` (drawn in the size asked for), a file (`load_catalogue`), or an array
        [I, T*S].
      num_items: I; 1000 for a named catalogue, and as many as there are for a given one.
      slate_size: K, at most I.
      num_topics, topic_size: T, S.
      horizon: H, turns of an episode.
      examination, examination_decay, examination_first_exponent: see `clicks.examination_table`; the last is 1 in the
        paper's text, 0 in the published implementation.
      memory: M, how many of the latest clicks the history queues hold, at most 1000.
      user_norm: `topics` or `unit` (`topics.USER_NORMS`): what reset and drift divide a user by.
      user_clip: bound of a user's components, as `user_noise` of their standard deviation; only the ratio counts.
      **numbers: of `CONSTANTS`; and `catalogue_seed`, `catalogue_power`, `item_noise`, `item_clip` in place of those in
        the recipe of a named catalogue (`catalogue.Recipe`), refused with a given one, which is not drawn.

    Returns:
      The static half and the parameters.

    Raises:
      SettingError: an unknown keyword or a value out of range.
      DataError: the catalogue's file or contents cannot be used.
    """
    for setting, count in (("num_topics", num_topics), ("topic_size", topic_size), ("horizon", horizon)):
        require_count(setting, count)
    for setting in numbers:
        require_choice("keyword", setting, {**CONSTANTS, **KEYWORDS})
    recipe = {setting: numbers.pop(setting) for setting in KEYWORDS if setting in numbers}
    items = _items(catalogue, num_items, num_topics, topic_size, recipe)
    require_count("slate_size", slate_size, 1, len(items))
    require_count("memory", memory, 1, 1000)
    require_choice("user_norm", user_norm, USER_NORMS)
    table = examination_table(examination, slate_size, examination_decay, examination_first_exponent)
    params = _params(items, num_topics, slate_size, table, horizon, {**numbers, "user_clip": user_clip})
    sizes = [int(size) for size in (len(items), slate_size, num_topics, topic_size, horizon)]
    static = {"independent_clicks": clicks_are_independent(table), "memory": int(memory), "user_norm": user_norm}
    return TopicEnv(name, *sizes, **static), params  # type: ignore[arg-type]


def _params(
    items: np.ndarray, num_topics: int, slate_size: int, table: np.ndarray, horizon: int, given: dict[str, Any]
) -> TopicParams:
    """Parameters for items [I, D], an examination table and constants of which `given` are not the published ones."""
    numbers = {setting: _constant(setting, given.get(setting, CONSTANTS[setting].default)) for setting in CONSTANTS}
    require_number("user_clip", given["user_clip"], 1e-3, 1e6)
    numbers["user_noise"] /= float(given["user_clip"])
    topic_norms = np.linalg.norm(items.reshape(len(items), num_topics, -1), axis=2)
    return TopicParams(
        item_embeddings=jnp.asarray(items),
        item_topics=jnp.asarray(topic_norms.argmax(axis=1), jnp.int32),
        max_score=jnp.asarray(np.linalg.norm(items, axis=1).max()),
        first_slate=jnp.asarray(_first_slate(topic_norms, slate_size)),
        examination=jnp.asarray(table),
        horizon=jnp.int32(horizon),
        **{setting: jnp.float32(number) for setting, number in numbers.items()},
    )


def _items(
    catalogue: str | Path | np.ndarray,
    num_items: int | None,
    num_topics: int,
    topic_size: int,
    changes: dict[str, float],
) -> np.ndarray:
    """The items [I, D]: drawn, by a recipe with `changes`, or given."""
    if isinstance(catalogue, str) and catalogue in RECIPES:
        count = 1000 if num_items is None else num_items
        require_count("num_items", count)
        drawn = named_catalogue(catalogue, count, num_topics, topic_size, **changes)
        return check_catalogue(drawn, num_topics, topic_size)
    if isinstance(catalogue, str) and not Path(catalogue).suffix:
        raise SettingError(
            "catalogue", catalogue, f"one of {', '.join(RECIPES)}, a .npy, .npz or .pt file, or an array"
        )
    for setting, value in changes.items():
        accepted = f"only with a catalogue that is drawn ({', '.join(RECIPES)}), not with given items"
        raise SettingError(setting, value, accepted)
    given = load_catalogue(catalogue) if isinstance(catalogue, str | Path) else catalogue
    items = check_catalogue(given, num_topics, topic_size)
    require(num_items in (None, len(items)), "num_items", num_items, f"{len(items)}, what the given catalogue has")
    return items


def _first_slate(topic_norms: np.ndarray, slate_size: int) -> np.ndarray:
    """K/T items a topic (the rest to the first topics), those with the largest norm in it: [I, T] -> [K] int32."""
    num_topics = topic_norms.shape[1]
    counts = slate_size // num_topics + (np.arange(num_topics) < slate_size % num_topics)
    ranking = np.argsort(-topic_norms, axis=0, kind="stable")
    return np.concatenate([ranking[:count, topic] for topic, count in enumerate(counts)]).astype(np.int32)


def _constant(setting: str, value: float) -> float:
    _, low, high, whole = CONSTANTS[setting]
    accepted = f"a {'whole ' if whole else ''}number from {low:g} to {high:g}"
    fits = is_number(value) and low <= value <= high and (not whole or float(value).is_integer())
    require(fits, setting, value, accepted)
    return float(value)


# -- names -------------------------------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    build: Build
    settings: dict[str, Any]


_ITEMS: dict[str, dict[str, Any]] = {
    "focused": {"catalogue": "focused"},
    "diffuse": {"catalogue": "diffuse"},
    "peaked": {"catalogue": "peaked"},
    "steady": {"catalogue": "focused", "influence": 0.0},
}
_CLICKS: dict[str, dict[str, Any]] = {
    "topdown": {"examination": "topdown"},
    "mix": {"examination": "mix"},
    "divpen": {"examination": "mix", "diversity_penalty": 3.0},
}
_BUILT_IN = {
    f"{items}_{clicks}": _Entry(topic_environment, {**_ITEMS[items], **_CLICKS[clicks]})
    for items in _ITEMS
    for clicks in _CLICKS
}
_BUILT_IN |= {
    "interest_evolution": _Entry(interest_evolution, {}),
    "interest_exploration": _Entry(interest_exploration, {}),
}
_ENTRIES = dict(_BUILT_IN)


def environments() -> tuple[str, ...]:
    """All names that `make` knows: the published six, their `peaked_*` and `steady_*` variants, RecSim's two, the
    registered."""
    return tuple(_ENTRIES)


def make(name: str, **settings: Any) -> tuple[Any, Any]:
    """An environment by name.

    Args:
      name: one of `environments()`. `focused_*` and `diffuse_*` are the published ones; `peaked_*` has the squared
        items of the paper's text; in `steady_*` users do not drift, so that personalisation pays. Of RecSim there are
        `interest_evolution` and `interest_exploration`.
      **settings: anything of `topic_environment` (or `interest_evolution`, `interest_exploration`), e.g.
        `slate_size=5`, `catalogue="items.npy"`, `influence=0.05`; None leaves a setting as the environment has it.

    Returns:
      The static half, and the parameters (a pytree of arrays): `TopicEnv` and `TopicParams`, or those of RecSim's
      environments. A registered environment may be of another class.

    Raises:
      SettingError: an unknown name or keyword, or a value out of range.
      DataError: the catalogue's file or contents cannot be used.
    """
    require_choice("environment", name, _ENTRIES)
    build, defaults = _ENTRIES[name]
    given = {setting: value for setting, value in settings.items() if value is not None}
    _require_keywords(build, given)
    return build(name, **{**defaults, **given})


def register(name: str, base: str | Build, **settings: Any) -> None:
    """Give a name to an environment of your own, for `make` and everything that takes an environment's name.

    Args:
      name: new; registering one of your own again replaces it.
      base: a known name whose settings are changed, or a function `(name, **settings) -> (env, params)` whose `env` has
        the contract of `TopicEnv`.
      **settings: its defaults; keywords of `make` override them.

    Raises:
      SettingError: a built-in name, an unknown base or an unknown keyword.
    """
    require(name not in _BUILT_IN, "environment", name, "a name that is not built in")
    if callable(base):
        entry = _Entry(base, settings)
    else:
        require_choice("base", base, _ENTRIES)
        entry = _Entry(_ENTRIES[base].build, {**_ENTRIES[base].settings, **settings})
    _require_keywords(entry.build, settings)
    _ENTRIES[name] = entry


def _require_keywords(build: Build, settings: dict[str, Any]) -> None:
    """Raise `SettingError`, with the closest name, for keywords that `build` does not take."""
    parameters = inspect.signature(build).parameters.values()
    known = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    named: dict[Build, Any] = {topic_environment: {**CONSTANTS, **KEYWORDS}, interest_evolution: NUMBERS}
    if build in named:
        known |= set(named[build])
    elif any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    for setting in settings:
        require_choice("keyword", setting, known)


def require_catalogue(env: Any) -> None:
    """Refuse an environment without a catalogue of its own, for whoever needs one.

    Raises:
      SettingError: every turn brings other candidates, as in RecSim's environments.
    """
    own = not isinstance(env, EvolutionEnv | ExplorationEnv)
    name = getattr(env, "name", env)
    require(own, "environment", name, "one with a fixed catalogue; this one is for experiments.recsim_slateq")
