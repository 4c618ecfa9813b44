"""Double deep Q-learning over items (van Hasselt et al., 2016), with slates of the K best; recurrent belief, replay.

`make_dqn(spec, dims, None)` gives an `Agent`. A network gives a value to every item from the belief, and a slate is
worth the mean of its items' values. So the best slate is exactly the K best items, and with K = 1 this is ordinary
double DQN. Target of a shown slate: reward + gamma * the mean target value, at the next belief, of the K items that the
online network likes best there. Explored slates are epsilon-greedy as a whole. Next states are the online belief
shifted by a turn, as in SAC. Positions in the slate are not told apart, and nothing privileged is used.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gemsjax.agents import actor_critic
from gemsjax.agents.base import Acting, Agent, Choice, Policy
from gemsjax.agents.exploration import epsilon
from gemsjax.belief import Belief, make_gru
from gemsjax.errors import require, require_count
from gemsjax.maths.optimise import adam_init
from gemsjax.maths.slates import distinct_from_uniforms, top_items
from gemsjax.nets.mlp import MLP
from gemsjax.types import Array, Dims, Episode, Key, Metrics, Observation, Params


@dataclasses.dataclass(frozen=True)
class DQNSpec:
    """Static choices: changing one makes another program.

    Attributes:
      hidden: width of the hidden layer.
      belief_width: width of the recurrent states.
      item_dim: width of the belief's item embeddings.
    """

    hidden: int = 256
    belief_width: int = 20
    item_dim: int = 20


@struct.dataclass
class DQNHypers:
    """Numbers that may differ between runs of one program (float32 scalars once inside a program).

    Attributes:
      gamma: discount per turn.
      tau: share of the online network that enters the target after every update.
      rate: Adam's learning rate of network and belief.
      first_epsilon: probability of a random slate at the first step.
      last_epsilon: probability that it tends to.
      epsilon_steps: training steps in which the difference falls to 1/e.
    """

    gamma: float = 0.8
    tau: float = 0.002
    rate: float = 1e-3
    first_epsilon: float = 1.0
    last_epsilon: float = 0.01
    epsilon_steps: float = 1_000.0


@struct.dataclass
class DQNParams:
    """The belief and the network on its states."""

    belief: Any
    network: Any


@struct.dataclass
class DQNState:
    """Everything that an update changes.

    Attributes:
      params: see `DQNParams`.
      target: the target network.
      optimiser: `DQNParams` whose fields are Adam's moments.
    """

    params: DQNParams
    target: Params
    optimiser: DQNParams


def validate_spec(spec: DQNSpec) -> None:
    """Raise `SettingError` for a width below 1."""
    for name, value in dataclasses.asdict(spec).items():
        require_count(name, value)


def validate_hypers(hypers: DQNHypers) -> None:
    """Raise `SettingError` for a hyper-parameter outside its range (host-side numbers only)."""
    actor_critic.check_hypers(hypers, rates=("rate",), positive=("epsilon_steps",))
    for name in ("first_epsilon", "last_epsilon"):
        require(0.0 <= getattr(hypers, name) <= 1.0, name, getattr(hypers, name), "a probability")


def make_dqn(spec: DQNSpec, dims: Dims, _means: None = None) -> Agent:
    """Double DQN; episodes hold the slates as actions.

    Raises:
      SettingError: a width below 1, or a catalogue smaller than a slate.
    """
    validate_spec(spec)
    require_count("slate_size", dims.slate_size, 1, dims.num_items)
    belief, network = make_gru(dims, spec.belief_width, spec.item_dim), MLP((spec.hidden, dims.num_items))

    def init(key: Key, _hypers: DQNHypers) -> DQNState:
        belief_key, network_key = jax.random.split(key)
        online = network.init(network_key, jnp.zeros(belief.width))["params"]
        params = DQNParams(belief.init(belief_key), online)
        optimiser = DQNParams(adam_init(params.belief), adam_init(params.network))
        return DQNState(params, jax.tree.map(jnp.copy, online), optimiser)

    def look(acting: Acting, memory: Array, seen: Observation) -> tuple[Array, Array]:
        memory = belief.step(acting.state.params.belief, memory, seen)
        return top_items(network.apply({"params": acting.state.params.network}, memory), dims.slate_size), memory

    def explore(acting: Acting, memory: Array, seen: Observation, _hidden: None, uniforms: Array) -> tuple:
        slate, memory = look(acting, memory, seen)
        at_random = acting.at_random | (uniforms[0] < epsilon(acting))
        slate = jnp.where(at_random, distinct_from_uniforms(uniforms[1:], dims.num_items), slate)
        return Choice(slate, slate), memory

    def greedy(acting: Acting, memory: Array, seen: Observation, _hidden: None, _uniforms: Array) -> tuple:
        slate, memory = look(acting, memory, seen)
        return Choice(slate, slate), memory

    return Agent(
        init=init,
        explore=Policy(belief.start, explore, draws=1 + dims.slate_size),
        greedy=Policy(belief.start, greedy),
        draw_update=lambda _key, _batch: (),
        update=lambda acting, batch, _noise: _update(belief, network, acting, batch),
    )


def _update(belief: Belief, network: MLP, acting: Acting, batch: Episode) -> tuple[DQNState, Metrics]:
    state, hypers, params = acting.state, acting.hypers, acting.state.params
    batch = actor_critic.turns(batch)
    shown = batch.action

    def loss(params: DQNParams) -> tuple[Array, Array]:
        (states,) = belief.unroll((params.belief,), batch.observation)
        values = network.apply({"params": params.network}, states)
        best = jax.vmap(lambda q: top_items(q, shown.shape[-1]))(values[1:].reshape(-1, values.shape[-1]))
        next_states = jax.lax.stop_gradient(states[1:])
        next_q = slate_value(state.target, next_states, best.reshape(*next_states.shape[:-1], -1))
        target = actor_critic.discounted(batch.reward, hypers.gamma, next_q)
        q = slate_value(params.network, states, shown)
        return jnp.mean(jnp.square(q - target)), q.mean()

    (value, mean_q), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    rates = {"belief": hypers.rate, "network": hypers.rate}
    new, moments = actor_critic.step_parts(params, state.optimiser, vars(gradients), rates)
    target = actor_critic.follow(state.target, new["network"], hypers.tau)
    return DQNState(DQNParams(**new), target, DQNParams(**moments)), {"loss": value, "q": mean_q}


def slate_value(network: Params, states: Array, slates: Array) -> Array:
    """Mean value of the items of each slate: [..., belief width], [..., K] -> [...].

    A slate needs K of the network's many outputs: its items' columns are gathered and averaged, the rest is not
    computed.
    """
    hidden = jax.nn.relu(states @ network["layer0"]["kernel"] + network["layer0"]["bias"])
    columns = network["layer1"]["kernel"].T[slates].mean(axis=-2)
    return (hidden * columns).sum(axis=-1) + network["layer1"]["bias"][slates].mean(axis=-1)
