"""What travels between the parts: observations, episodes, sizes. Arrays only, shapes on every field.

Letters in the shapes: I items, K slots of a slate, T topics, S numbers a topic, D = T*S, H turns, U users, A action.
A leading [...] means that the same type also carries users and turns once it has been vmapped or scanned.
May be imported by every module; imports none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from flax import struct

Array = jax.Array
Key = jax.Array
"""A typed key (`jax.random.key`)."""
Params = Any
"""A pytree of network weights."""
Metrics = dict[str, Array]
"""Small named float32 scalars that leave a compiled program."""


class Observation(NamedTuple):
    """What an agent may see of one turn: the slate that was shown and its clicks.

    Attributes:
      slate: [..., K] int32, item numbers (after the oracle's substitution of -1).
      clicks: [..., K] bool, which ranks were clicked.
    """

    slate: Array
    clicks: Array


@struct.dataclass
class Episode:
    """One user's turns, as methods learn from them. `observation[t]` is what `action[t]` was chosen on.

    Attributes:
      observation: [..., H] the observations o_0 .. o_{H-1}; o_0 is the reset slate with its clicks.
      action: [..., H, A] what the agent chose (a latent action, or the slate itself).
      reward: [..., H] float32, the clicks that followed the action, that is on o_{t+1}.
      final: [...] the observation o_H after the last action (methods with corrected credit need it).
      hidden: [..., H, ...] what a privileged agent remembers of the simulator's user after each action, else ().
    """

    observation: Observation
    action: Array
    reward: Array
    final: Observation
    hidden: Any = ()


class CandidateObservation(NamedTuple):
    """What an agent may see of one turn where each brings candidates of its own: C of them with G features, a user
    with F.

    Attributes:
      user: [..., F] float32, what is known of the user (F may be 0).
      docs: [..., C, G] float32, features of the candidates; zeros where there is none.
      available: [..., C] bool, which candidates there are.
      slate: [..., K] int32, places of the candidates that were shown the turn before; -1 at the reset.
      clicks: [..., K] bool, which of them were clicked.
    """

    user: Array
    docs: Array
    available: Array
    slate: Array
    clicks: Array


@struct.dataclass
class Transition:
    """One turn and what it led to, as methods learn from it.

    Attributes:
      seen: [...] the observation that the slate was chosen on.
      slate: [..., K] int32.
      clicks: [..., K] bool, what of it was clicked.
      reward: [...] float32.
      terminated: [...] bool, the user left with this turn: nothing follows. (A session that was cut off has a future.)
      next_seen: [...] the observation after it, of the same user.
      next_slate: [..., K] int32, what was chosen on that one.
      next_hidden: what a privileged agent remembers of the simulator's user after the turn, else ().
      valid: [...] bool; others are no transitions (a new user takes the place) and count nothing.
    """

    seen: Any
    slate: Array
    clicks: Array
    reward: Array
    terminated: Array
    next_seen: Any
    next_slate: Array
    next_hidden: Any
    valid: Array


class CandidateDims(NamedTuple):
    """Static sizes where each turn brings candidates of its own.

    Attributes:
      candidates: C.
      slate_size: K.
      user: F, features of a user.
      doc: G, features of a candidate.
    """

    candidates: int
    slate_size: int
    user: int
    doc: int


class Dims(NamedTuple):
    """Static sizes that networks are built from.

    Attributes:
      num_items: I, items in the catalogue.
      slate_size: K, slots of a slate.
      horizon: H, turns of an episode.
    """

    num_items: int
    slate_size: int
    horizon: int


def time_major(tree: Any) -> Any:
    """Swap the first two axes of every leaf: [B, H, ...] <-> [H, B, ...]."""
    return jax.tree.map(lambda x: jax.numpy.swapaxes(x, 0, 1), tree)
