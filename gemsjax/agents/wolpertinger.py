"""SAC with Wolpertinger slates (SAC+WkNN): a query for each slot, its nearest items, the best of them by the critics.

`make_wknn(spec, dims, ranker)` gives an `Agent`. The action holds a query [E] for every slot, in the box of the k-head
ranker; each query has its nearest items as candidates, and slots are filled in order with the candidate whose slate the
target critics value most, while slots that are still open hold copies of the candidate. Critics judge the embeddings of
the slate, except in the policy loss, where they judge the action itself. Otherwise this is SAC (`sac.make_soft`).
The published form differs in three settings of the spec and acts in random embeddings; bracketed numbers: README.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemsjax.agents import sac
from gemsjax.agents.base import Acting, Agent, Choice
from gemsjax.errors import require_choice, require_count
from gemsjax.maths.blocks import once
from gemsjax.rankers import Ranker
from gemsjax.rankers.items import ItemWeights, nearest_items
from gemsjax.types import Array, Dims, Episode, Params

LAYOUTS = ("slot", "dim")
JUDGES = ("critic", "actor")
CREDITS = ("corrected", "published")


@dataclasses.dataclass(frozen=True)
class WkNNSpec(sac.SACSpec):
    """Static choices: those of SAC, and

    Attributes:
      neighbours: candidates of a slot.
      query_layout: 'slot' reads the action as [slot, dimension], as its box and the critics do; 'dim' as [dimension,
        slot], as published [31].
      judge: 'critic' compares candidates by the smaller of both targets on the critic's belief; 'actor' by the first
        target on the actor's belief, on which it was never trained, as published [32].
      credit: 'corrected' teaches the critics the value of the slate that the action showed; 'published' that of the
        slate before, which the belief has already seen [21].
    """

    neighbours: int = 10
    query_layout: str = "slot"
    judge: str = "critic"
    credit: str = "corrected"


PUBLISHED = {
    "spec": {"query_layout": "dim", "judge": "actor", "credit": "published"},
    "hypers": sac.PUBLISHED["hypers"],
}
"""What the published variant sets otherwise; it also takes random item embeddings [30]."""


def validate_spec(spec: WkNNSpec) -> None:
    """Raise `SettingError` for a count below 1 or an unknown name."""
    sac.validate_spec(spec)
    require_count("neighbours", spec.neighbours)
    for name, choices in (("query_layout", LAYOUTS), ("judge", JUDGES), ("credit", CREDITS)):
        require_choice(name, getattr(spec, name), choices)


def make_wknn(spec: WkNNSpec, dims: Dims, ranker: Ranker) -> Agent:
    """SAC+WkNN in the action box of a k-head `ranker` (whose decoding is not used); weights are `ItemWeights`.

    Episodes hold the slates as actions: what is learnt needs no more.

    Raises:
      SettingError: see `validate_spec`; more neighbours than items.
    """
    validate_spec(spec)
    require_count("neighbours", spec.neighbours, 1, dims.num_items)
    return sac.make_soft(spec, dims, _means(spec, dims, ranker))


def _means(spec: WkNNSpec, dims: Dims, ranker: Ranker) -> sac.Means:
    slots, by_critic = dims.slate_size, spec.judge == "critic"

    def queries(actions: Array) -> Array:
        """[..., K * E] -> [..., K, E]."""
        width = actions.shape[-1] // slots
        if spec.query_layout == "slot":
            return actions.reshape(*actions.shape[:-1], slots, width)
        return jnp.swapaxes(actions.reshape(*actions.shape[:-1], width, slots), -1, -2)

    def judges(acting: Acting) -> tuple[Params, ...]:
        return acting.state.targets if by_critic else acting.state.targets[:1]

    def choose(acting: Acting, states: tuple[Array, ...], action: Array) -> Choice:
        slate = slate_of(judges(acting), acting.weights.embeddings, states[-1], queries(action), spec.neighbours)
        return Choice(slate, slate)

    def taken(weights: ItemWeights, batch: Episode) -> Array:
        return embedded(weights, batch.action if spec.credit == "corrected" else batch.observation.slate)

    def judged(acting: Acting, states: tuple[Array, Array], actions: Array) -> Array:
        looked = states[1 if by_critic else 0]
        slates = slates_of(judges(acting), acting.weights.embeddings, looked, queries(actions), spec.neighbours)
        return embedded(acting.weights, slates)

    return sac.Means(
        action_dim=ranker.action_dim,
        box=ranker.box,
        beliefs=("actor_belief", "critic_belief") if by_critic else ("actor_belief",),
        choose=choose,
        taken=taken,
        judged=judged,
    )


def embedded(weights: ItemWeights, slates: Array) -> Array:
    """Slates as critics see them: [..., K] -> [..., K * E]."""
    rows = weights.embeddings.at[slates].get(mode="promise_in_bounds")
    return rows.reshape(*slates.shape[:-1], slates.shape[-1] * weights.embeddings.shape[1])


# -- filling slates ----------------------------------------------------------------------------------------------------


class _Judge(NamedTuple):
    """A critic's first layer apart by slots: it is linear in their embeddings, so items are projected once and added.

    Attributes:
      own: [K, E, hidden] the kernel of each slot.
      copies: [K, E, hidden] the sum of the kernels of slot k and all after it: an item that fills them all.
      output: [hidden] from the hidden layer to Q.
      offset: [] its bias, by which two critics differ.
    """

    own: Array
    copies: Array
    output: Array
    offset: Array

    def value(self, inputs: Array) -> Array:
        """Q from the hidden layer's inputs: [..., hidden] -> [...]."""
        return jax.nn.relu(inputs) @ self.output + self.offset


def _judge(critic: Params, slots: int, width: int) -> _Judge:
    """`width`: of the embeddings."""
    kernel = critic["kernel"][-slots * width :].reshape(slots, width, -1)
    copies = jnp.flip(jnp.cumsum(jnp.flip(kernel, 0), axis=0), 0)
    return _Judge(kernel, copies, critic["out"]["kernel"][:, 0], critic["out"]["bias"][0])


def _before(critic: Params, states: Array) -> Array:
    """The hidden layer's inputs before any slot is filled: [..., belief width] -> [..., hidden]."""
    return states @ critic["kernel"][: states.shape[-1]] + critic["bias"]


def slate_of(critics: tuple[Params, ...], embeddings: Array, state: Array, queries: Array, count: int) -> Array:
    """One user's slate: state [belief width], queries [K, E] -> [K] int32. Projects only the candidates."""
    slots, width = queries.shape
    candidates = nearest_items(embeddings, queries, count)
    apart = [_judge(critic, slots, width) for critic in critics]
    # The judges side by side: one product for all. Kernels are taken apart once, not in every turn of a rollout.
    copies = jnp.einsum("kce,keh->kch", embeddings[candidates], _side_by_side([judge.copies for judge in apart]))
    kernels = once(tuple(_side_by_side([judge.own for judge in apart])))
    hidden = _side_by_side([_before(critic, state) for critic in critics])
    slate = []
    for slot, kernel in enumerate(kernels):
        inputs = jnp.split(hidden + copies[slot], len(apart), axis=-1)
        best = jnp.argmax(_least([judge.value(x) for x, judge in zip(inputs, apart, strict=True)]))
        item = candidates[slot, best]
        hidden = hidden + embeddings[item] @ kernel
        slate.append(item)
    return jnp.stack(slate)


def slates_of(critics: tuple[Params, ...], embeddings: Array, states: Array, queries: Array, count: int) -> Array:
    """`slate_of` for many users at once, from a catalogue that is projected once.

    Args:
      critics: the judges' parameters.
      embeddings: [I, E].
      states: [H, B, belief width].
      queries: [H, B, K, E].
      count: candidates of a slot.

    Returns:
      [H, B, K] int32.
    """
    slots, width = queries.shape[-2:]
    apart = [_judge(critic, slots, width) for critic in critics]

    def fill(hidden: list[Array], slot: tuple[Array, list[tuple[Array, Array]]]) -> tuple[list[Array], Array]:
        candidates, kernels = slot
        tables = [embeddings @ copies for _, copies in kernels]

        def values(inputs: tuple[list[Array], Array]) -> Array:
            hidden, candidates = inputs
            projected = [table.at[candidates].get(mode="promise_in_bounds") for table in tables]
            before = [h[:, None] + p for h, p in zip(hidden, projected, strict=True)]
            return _least([judge.value(x) for x, judge in zip(before, apart, strict=True)])

        best = jnp.argmax(_turn_by_turn(values, (hidden, candidates)), axis=-1)
        chosen = jnp.take_along_axis(candidates, best[..., None], axis=-1)[..., 0]
        items = embeddings.at[chosen].get(mode="promise_in_bounds")
        return [h + items @ own for h, (own, _) in zip(hidden, kernels, strict=True)], chosen

    candidates = nearest_items(embeddings, queries.reshape(-1, width), count).reshape(*queries.shape[:-1], count)
    candidates = jnp.moveaxis(candidates, 2, 0)
    start = [_before(critic, states) for critic in critics]
    _, slates = jax.lax.scan(fill, start, (candidates, [(judge.own, judge.copies) for judge in apart]))
    return jnp.moveaxis(slates, 0, 2)


def _turn_by_turn(function: Callable[[Any], Array], inputs: Any) -> Array:
    """`function` over the first axis. On a CPU one turn after the other: what a turn needs then fits its caches."""
    return jax.lax.platform_dependent(
        inputs, cpu=lambda inputs: jax.lax.map(function, inputs), default=lambda inputs: jax.vmap(function)(inputs)
    )


def _side_by_side(arrays: list[Array]) -> Array:
    return jnp.concatenate(arrays, axis=-1)


def _least(values: list[Array]) -> Array:
    """The smallest of one value or two."""
    return values[0] if len(values) == 1 else jnp.minimum(*values)
