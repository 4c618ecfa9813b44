"""Item catalogues: drawing them, reading them from a file, checking them. On the host, in NumPy.

Called by `envs.registry` and by anyone who brings items of their own. A catalogue is [I, D] float32, D = T*S: row i
holds item i's numbers for topic 0, then topic 1 and so on. Source of the drawing process: paper section 4.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from gemsjax.envs.tensor_file import read_tensor
from gemsjax.errors import DataError, SettingError, require, require_choice, require_count, require_number

KEY_IN_ARCHIVE = "item_embeddings"
NORMS = (1e-15, 1e15)
"""Least and greatest norm of an item: squares and products of others do not fit in float32."""


class Recipe(NamedTuple):
    """A catalogue that is drawn instead of stored: numbers of `draw_catalogue`.

    Attributes:
      seed: of the drawing.
      power: to which entries are raised: 1 for the published catalogues, 2 for the paper's text on "focused" items.
      noise: standard deviation of an item's components before clipping.
      clip: bound of an item's components. Items have unit norm, so noise / clip is all that counts.
    """

    seed: int
    power: float = 1.0
    noise: float = 0.4
    clip: float = 1.0


LIMITS = {"seed": (0, 2**32 - 1), "power": (1e-3, 50.0), "noise": (1e-3, 1e6), "clip": (1e-3, 1e6)}
"""Lowest and highest value of a recipe's numbers."""
KEYWORDS = MappingProxyType(
    {"catalogue_seed": "seed", "catalogue_power": "power", "item_noise": "noise", "item_clip": "clip"}
)
"""Numbers of a recipe by the keywords of `gemsjax.make`."""
RECIPES = {"focused": Recipe(41, 1.0), "diffuse": Recipe(14, 1.0), "peaked": Recipe(41, 2.0)}
"""The default catalogues, by name.

`focused` and `diffuse` stand in for the two published tables, which are two draws of this process too (the published
"focused" table is not squared). Over seeds 0 to 49 the short-term oracle's mean return on TopDown runs from 90 to 114
(300 users each); these two seeds are among those closest to the published tables under the random policy, the oracle
and the epsilon-greedy oracle (0.5). Means of 2000 users, the same ones, standard errors 0.15, 0.9 and 0.5:

    published focused  33.6  103.2  95.5      focused (41)  33.5  103.9  95.7
    published diffuse  33.0   97.2  92.5      diffuse (14)  33.6   97.0  92.4

`peaked` is `focused` with every entry squared: what the paper's text calls focused.
"""


def draw_catalogue(
    seed: int,
    num_items: int = 1000,
    num_topics: int = 10,
    topic_size: int = 2,
    power: float = 1.0,
    noise: float = 0.4,
    clip: float = 1.0,
) -> np.ndarray:
    """Draw items: `|clip(noise N(0, 1), -clip, clip)|` weighted by topic, raised to `power`, of unit norm.

    An item's topic weights are U(0, 1), divided by their sum. The stream is `RandomState`, which NumPy has frozen, so a
    seed means the same catalogue everywhere and for ever. Source: paper section 4.1, the published implementation.

    Args:
      seed: 0 .. 2**32 - 1.
      num_items, num_topics, topic_size: I, T, S.
      power, noise, clip: see `Recipe`; the defaults are the published values.

    Returns:
      [I, T*S] float32, non-negative rows of unit norm.

    Raises:
      SettingError: a size below 1, or a number outside its `LIMITS`.
      DataError: see `peak`.
    """
    check_recipe(Recipe(seed, power, noise, clip))
    for setting, count in (("num_items", num_items), ("num_topics", num_topics), ("topic_size", topic_size)):
        require_count(setting, count)
    stream = np.random.RandomState(seed)
    weights = stream.random_sample((num_items, num_topics, 1))
    components = stream.standard_normal((num_items, num_topics, topic_size))
    components = np.abs(np.clip(noise * components, -clip, clip))
    items = components * weights / weights.sum(axis=1, keepdims=True)
    return peak(items.reshape(num_items, -1), power)


def check_recipe(recipe: Recipe, names: Mapping[str, str] = MappingProxyType({})) -> None:
    """Refuse numbers of a recipe outside their `LIMITS`.

    Args:
      recipe: to check.
      names: what messages call its numbers where that is not their own name.

    Raises:
      SettingError: naming the number.
    """
    for number, (low, high) in LIMITS.items():
        setting, value = names.get(number, number), getattr(recipe, number)
        if number == "seed":
            require_count(setting, value, int(low), int(high))
        else:
            require_number(setting, value, low, high)


def peak(embeddings: np.ndarray, power: float) -> np.ndarray:
    """Raise every entry to `power` and divide each row by its norm.

    Above 1, a row's large entries grow at the expense of its small ones: items become purer in their main topic.
    Source: paper section 4.1 ("focused" items, power 2).

    Args:
      embeddings: [I, D], non-negative.
      power: see `LIMITS`.

    Returns:
      [I, D] float32, rows of unit norm.

    Raises:
      SettingError: a power out of range.
      DataError: a row whose norm is then 0 or not finite; the message says which.
    """
    require_number("power", power, *LIMITS["power"])
    with np.errstate(over="ignore", under="ignore"):
        raised = np.asarray(embeddings, np.float64) ** power
        norms = np.linalg.norm(raised, axis=1, keepdims=True)
    wrong = np.flatnonzero(~((norms > 0.0) & np.isfinite(norms)))
    if wrong.size:
        found = f"the norm {norms[wrong[0], 0]:g} with its entries to the power of {power}"
        raise DataError(f"catalogue, row {wrong[0]}: {found}; it must be finite and above 0")
    return (raised / norms).astype(np.float32)


def named_catalogue(
    name: str, num_items: int = 1000, num_topics: int = 10, topic_size: int = 2, **changes: Any
) -> np.ndarray:
    """One of the default catalogues, at any size.

    Args:
      name: one of `RECIPES`.
      num_items, num_topics, topic_size: I, T, S.
      **changes: of its recipe, by the names in `KEYWORDS`: `catalogue_power=1.5`.

    Returns:
      [I, T*S] float32, non-negative rows of unit norm.

    Raises:
      SettingError: an unknown name or change, a size below 1, a number out of range.
    """
    require_choice("catalogue", name, RECIPES)
    for setting in changes:
        require_choice("keyword", setting, KEYWORDS)
    recipe = RECIPES[name]._replace(**{KEYWORDS[setting]: value for setting, value in changes.items()})
    check_recipe(recipe, {number: setting for setting, number in KEYWORDS.items()})
    return draw_catalogue(recipe.seed, num_items, num_topics, topic_size, *recipe[1:])


def load_catalogue(path: str | Path) -> np.ndarray:
    """Read a catalogue from a `.npy`, `.npz` or `.pt` file; nothing in the file is ever executed.

    Args:
      path: `.npz` holds one array, or one named `item_embeddings`; `.pt` holds one plain dense tensor.

    Returns:
      The array as it stands in the file, of its shape, as float32 (infinite where that is too small);
      `check_catalogue` says whether it is a catalogue.

    Raises:
      DataError: no such file, another kind of file, or contents that are not one array of numbers.
    """
    path = Path(path)
    readers = {".npy": _read_npy, ".npz": _read_npz, ".pt": read_tensor}
    if path.suffix not in readers:
        raise DataError(
            f"{path}: catalogues are read from {', '.join(readers)} files, this one ends in {path.suffix!r}"
        )
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    array = readers[path.suffix](path)
    if array.dtype.kind not in "fiu":
        raise DataError(f"{path}: holds {array.dtype} values; a catalogue holds real numbers")
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def check_catalogue(catalogue: ArrayLike, num_topics: int, topic_size: int) -> np.ndarray:
    """Return a catalogue in the form that the simulator uses, if it can use it.

    Args:
      catalogue: [I, T*S] real numbers; see the module's docstring for their order.
      num_topics, topic_size: T, S.

    Returns:
      [I, T*S] float32.

    Raises:
      SettingError: the shape does not fit `num_topics` and `topic_size` (ragged lists have none), or there are fewer
        items than topics.
      DataError: an entry is not a number, not finite or negative, a row is all zero, or its norm is outside `NORMS`;
        the message says which.
    """
    width = num_topics * topic_size
    accepted = f"shape (items, num_topics * topic_size) = (items, {num_topics} * {topic_size}) = (items, {width})"
    try:
        array = np.asarray(catalogue)
    except (TypeError, ValueError) as error:
        raise SettingError("catalogue", "rows of unequal length", accepted) from error
    found = f"an array of shape {array.shape}"
    require(array.ndim == 2 and array.shape[1] == width, "catalogue", found, accepted)
    require(array.shape[0] >= num_topics, "catalogue", found, f"at least as many items as topics ({num_topics})")
    if array.dtype.kind not in "fiu":
        raise DataError(f"catalogue: holds {array.dtype} values; it must hold real numbers")
    with np.errstate(over="ignore"):  # too large for float32 is found below, as infinity
        array = array.astype(np.float32)
    _refuse(array, ~np.isfinite(array), "a finite number")
    # Topics are told apart by norms and users are non-negative: a negative taste would have no meaning here.
    _refuse(array, array < 0, "zero or positive (the sign of a topic has no meaning in this simulator)")
    empty = np.flatnonzero(~array.any(axis=1))
    if empty.size:
        raise DataError(f"catalogue, row {empty[0]}: all zero ({empty.size} such rows); an item needs some topic")
    norms = np.linalg.norm(array.astype(np.float64), axis=1)
    wrong = np.flatnonzero((norms < NORMS[0]) | (norms > NORMS[1]))
    if wrong.size:
        found = f"norm {norms[wrong[0]]:.3g} ({wrong.size} such rows)"
        fits = f"norms go from {NORMS[0]:g} to {NORMS[1]:g}, so that their squares fit in float32"
        raise DataError(f"catalogue, row {wrong[0]}: {found}; {fits}")
    return array


def _refuse(array: np.ndarray, wrong: np.ndarray, accepted: str) -> None:
    """Raise `DataError` naming the first wrong entry."""
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        found = f"{array[row, column]} ({wrong.sum()} such entries)"
        raise DataError(f"catalogue, row {row}, column {column}: {found}; every entry must be {accepted}")


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: is not an .npy file of plain numbers ({error})") from error


def _read_npz(path: Path) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = archive.files
            if len(names) != 1 and KEY_IN_ARCHIVE not in names:
                raise DataError(f"{path}: holds {names}; it must hold one array, or one named {KEY_IN_ARCHIVE!r}")
            return archive[KEY_IN_ARCHIVE if KEY_IN_ARCHIVE in names else names[0]]
    except DataError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy each have their own for a damaged archive
        raise DataError(f"{path}: is not an .npz file of plain numbers ({error})") from error
