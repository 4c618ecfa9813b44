"""PPO and A2C: an iteration (roll out all environments, estimate advantages, update) is compiled, and so are many.

`make_learning(config)` gives pure functions over one run. What may differ between runs of one program (key, rates,
item table) is in `Run`, what learning changes in `LearnState`. Iteration n draws from `fold_in(run key, n)`, so results
depend neither on how many are compiled together nor on resuming. Environments go on from one rollout to the next; an
episode that ends is followed by the next user's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from gemsjax.envs.dot_product import DotProductEnv, DotProductParams, DotProductState, make_params
from gemsjax.maths import policy_gradient
from gemsjax.maths.categorical import draw_items, log_probability_and_entropy
from gemsjax.maths.optimise import adam_init, adam_step, clip_by_norm
from gemsjax.maths.returns import advantages
from gemsjax.nets.actor_critic import DiscreteActor, ValueCritic
from gemsjax.on_policy.config import Config, PPOConfig, check_config
from gemsjax.on_policy.evaluation import METRICS, Act, compute_metrics
from gemsjax.types import Array, Key, Metrics, Params

INIT, TABLE = 2**32 - 1, 2**32 - 2
"""Where iterations have their number, initialisation and the tables of items and users have these."""


@struct.dataclass
class Hypers:
    """Numbers of an algorithm that are data (float32 scalars); `clip` is PPO's. See `PPOConfig`."""

    lr: Array
    gamma: Array
    gae_lambda: Array
    clip: Array
    ent_coef: Array
    vf_coef: Array
    max_grad_norm: Array


@struct.dataclass
class Run:
    """The data of one run.

    Attributes:
      key: of everything that it draws.
      hypers: see `Hypers`.
      env_params: the one table of items that training and evaluation share.
    """

    key: Key
    hypers: Hypers
    env_params: DotProductParams


@struct.dataclass
class Networks:
    """Parameters (or Adam's moments) of both networks."""

    actor: Params
    critic: Params


@struct.dataclass
class LearnState:
    """What learning changes; arrays only, E environments.

    Attributes:
      params: of the networks.
      optimiser: Adam's moments of them.
      env: [E] states of the environments.
      observation: [E, O] what is seen next.
      rewards: [E, horizon] of the episodes that are going on.
      latest: by metric [E], `compute_metrics` of each environment's last whole episode (0 before the first).
      episodes: [E] int32, whole episodes so far.
    """

    params: Networks
    optimiser: Any
    env: DotProductState
    observation: Array
    rewards: Array
    latest: Metrics
    episodes: Array


@struct.dataclass
class Transitions:
    """A rollout, [T, E] each (or what is made of it, [N]): seen, done, and what learning needs of it."""

    observation: Array
    action: Array
    log_prob: Array
    advantage: Array
    target: Array
    valid: Array


class Learning(NamedTuple):
    """Pure functions, sizes bound.

    Attributes:
      env: static half of the environment.
      start: `(key) -> run`: draws the tables.
      init: `(run) -> state`.
      iterate: `(run, state, numbers [n] int32) -> (state, metrics [n])`: the iterations with these numbers. Metrics:
        `loss`, `policy_loss`, `value_loss`, `entropy` (means over minibatches), `gradient_norm`, for PPO
        `clipped_share`; `return` (mean of the episodes that ended, 0 if none did), `episodes` (how many), `finite`.
      act: `(networks, whether greedy) -> policy` as evaluation plays it.
    """

    env: DotProductEnv
    start: Callable[[Key], Run]
    init: Callable[[Run], LearnState]
    iterate: Callable[[Run, LearnState, Array], tuple[LearnState, Metrics]]
    act: Callable[[Networks, Array | bool], Act]


def make_learning(config: Config, params: DotProductParams | None = None) -> Learning:
    """Bind a configuration; `params` in place of the tables that a run would draw.

    Raises:
      SettingError: see `check_config`.
    """
    check_config(config)
    env, model = DotProductEnv(config.env), config.model
    actor = DiscreteActor(model.actor_hidden_dims, env.num_items, model.activation)
    loop = _Loop(config, env, actor, ValueCritic(model.critic_hidden_dims, model.activation))

    def start(key: Key) -> Run:
        tables = make_params(config.env, jax.random.fold_in(key, TABLE)) if params is None else params
        return Run(key, _hypers(config), tables)

    return Learning(env, start, loop.init, loop.iterate, loop.act)


def _hypers(config: Config) -> Hypers:
    method = config.method
    clip = method.clip_eps if isinstance(method, PPOConfig) else 0.0
    shared = ("lr", "gamma", "gae_lambda", "ent_coef", "vf_coef", "max_grad_norm")
    return Hypers(clip=jnp.float32(clip), **{name: jnp.float32(getattr(method, name)) for name in shared})


@dataclasses.dataclass(frozen=True)
class _Loop:
    """The on-policy loop with its sizes bound."""

    config: Config
    env: DotProductEnv
    actor: DiscreteActor
    critic: ValueCritic

    def logits(self, params: Networks, observation: Array) -> Array:
        return self.actor.apply({"params": params.actor}, observation)

    def value(self, params: Networks, observation: Array) -> Array:
        return self.critic.apply({"params": params.critic}, observation)

    def act(self, params: Networks, greedy: Array | bool) -> Act:
        def policy(observation: Array, uniform: Array) -> Array:
            logits = self.logits(params, observation)
            return jnp.where(greedy, jnp.argmax(logits), draw_items(logits, uniform[None])[0]).astype(jnp.int32)

        return policy

    def init(self, run: Run) -> LearnState:
        actor_key, critic_key, reset_key = jax.random.split(jax.random.fold_in(run.key, INIT), 3)
        blank, envs = jnp.zeros(self.env.observation_dim), self.config.rollout[1]
        networks = (self.actor.init(actor_key, blank), self.critic.init(critic_key, blank))
        params = Networks(*(network["params"] for network in networks))
        uniforms = jax.random.uniform(reset_key, (envs, self.env.draws))
        observation, env = jax.vmap(self.env.begin, in_axes=(0, None))(uniforms, run.env_params)
        latest = {name: jnp.zeros(envs) for name in METRICS}
        rewards = jnp.zeros((envs, self.env.horizon))
        return LearnState(params, adam_init(params), env, observation, rewards, latest, jnp.zeros(envs, jnp.int32))

    def iterate(self, run: Run, state: LearnState, numbers: Array) -> tuple[LearnState, Metrics]:
        return jax.lax.scan(lambda state, number: self._iteration(run, state, number), state, numbers)

    def _iteration(self, run: Run, state: LearnState, number: Array) -> tuple[LearnState, Metrics]:
        play_key, update_key = jax.random.split(jax.random.fold_in(run.key, number))
        state, seen, ended = self._roll_out(run, state, play_key)
        update = self._ppo if self.config.algorithm == "ppo" else self._a2c
        params, optimiser, metrics = update(run.hypers, state, seen, update_key)
        totals, count = ended
        finite = jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()
        metrics |= {"return": totals / jnp.maximum(count, 1), "episodes": count, "finite": finite}
        return dataclasses.replace(state, params=params, optimiser=optimiser), metrics

    # -- rollout -------------------------------------------------------------------------------------------------------

    def _roll_out(self, run: Run, state: LearnState, key: Key) -> tuple[LearnState, Transitions, tuple[Array, Array]]:
        """A rollout with its advantages, [T, E]; and the sum of returns and the number of episodes that ended in it."""
        turns, envs = self.config.rollout
        # All of a rollout's randomness at once: one to draw the item, the rest for a new user if the episode ends.
        inputs = jax.random.uniform(key, (turns, envs, 1 + self.env.draws))
        params, step = state.params, jax.vmap(self._turn, in_axes=(None, 0, 0, 0))

        def turn(carry: tuple, inputs: Array) -> tuple[tuple, tuple]:
            logits = self.logits(params, carry[1])
            carry, seen = step(run.env_params, carry, logits, inputs)
            return carry, seen

        start = (state.env, state.observation, state.rewards, state.latest, state.episodes)
        carry, seen = jax.lax.scan(turn, start, inputs)
        observation, after, action, log_prob, reward, terminated, ended, total = seen
        # The critic sees the whole rollout at once: outside the scan it is two products instead of T small ones.
        value, next_value = self.value(params, observation), self.value(params, after)
        method, hypers = self.config.method, run.hypers
        found = advantages(
            reward, value, next_value, terminated, ended, hypers.gamma, hypers.gae_lambda, method.returns
        )
        env, observation_next, rewards, latest, episodes = carry
        state = dataclasses.replace(
            state, env=env, observation=observation_next, rewards=rewards, latest=latest, episodes=episodes
        )
        transitions = Transitions(observation, action, log_prob, *found)
        return state, transitions, (jnp.where(ended, total, 0.0).sum(), ended.sum())

    def _turn(self, env_params: DotProductParams, carry: tuple, logits: Array, uniforms: Array) -> tuple[tuple, tuple]:
        """One environment's turn, and a new user if it was the last of an episode."""
        state, observation, rewards, latest, episodes = carry
        action = draw_items(logits, uniforms[:1])[0]
        log_prob, _ = log_probability_and_entropy(logits, action)
        after, next_state, reward, terminated, truncated, _ = self.env.play(state, action, env_params)
        ended = terminated | truncated
        rewards = rewards.at[state.time].set(reward)
        metrics = compute_metrics(rewards)
        latest = jax.tree.map(lambda new, old: jnp.where(ended, new, old), metrics, latest)
        fresh, reset = self.env.begin(uniforms[1:], env_params)
        following = (reset, fresh), (next_state, after)
        next_state, next_seen = jax.tree.map(lambda new, old: jnp.where(ended, new, old), *following)
        carry = (next_state, next_seen, rewards, latest, episodes + ended)
        seen = (observation, after, action, log_prob, reward, terminated, ended, metrics["total_reward"])
        return carry, seen

    # -- updates -------------------------------------------------------------------------------------------------------

    def _ppo(self, hypers: Hypers, state: LearnState, seen: Transitions, key: Key) -> tuple[Networks, Any, Metrics]:
        """Epochs of shuffled minibatches; metrics are means over them."""
        ppo = self.config.ppo
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), seen)
        flat = dataclasses.replace(flat, advantage=policy_gradient.normalised(flat.advantage, flat.valid))
        keys = jax.random.split(key, ppo.update_epochs)
        orders = jax.vmap(lambda key: jax.random.permutation(key, ppo.n_steps))(keys).reshape(-1, ppo.batch_size)

        def minibatch(carry: tuple, rows: Array) -> tuple[tuple, Metrics]:
            batch = jax.tree.map(lambda x: x[rows], flat)
            params, optimiser, metrics = self._improve(hypers, carry[0], carry[1], batch)
            return (params, optimiser), metrics

        carry, metrics = jax.lax.scan(minibatch, (state.params, state.optimiser), orders)
        return *carry, jax.tree.map(lambda x: x.mean(axis=0), metrics)

    def _a2c(self, hypers: Hypers, state: LearnState, seen: Transitions, _key: Key) -> tuple[Networks, Any, Metrics]:
        """One step on the rollout."""
        return self._improve(hypers, state.params, state.optimiser, seen)

    def _improve(
        self, hypers: Hypers, params: Networks, optimiser: Any, batch: Transitions
    ) -> tuple[Networks, Any, Metrics]:
        (_, metrics), gradients = jax.value_and_grad(self._loss, has_aux=True)(params, hypers, batch)
        gradients, norm = clip_by_norm(gradients, hypers.max_grad_norm)
        params, optimiser = adam_step(params, gradients, optimiser, hypers.lr)
        return params, optimiser, metrics | {"gradient_norm": norm}

    def _loss(self, params: Networks, hypers: Hypers, batch: Transitions) -> tuple[Array, Metrics]:
        """The policy's loss, plus the weighted error of the critic, less the weighted entropy."""
        valid = batch.valid
        log_prob, entropies = log_probability_and_entropy(self.logits(params, batch.observation), batch.action)
        metrics: Metrics = {}
        if self.config.algorithm == "ppo":
            policy_loss, metrics["clipped_share"] = policy_gradient.clipped_surrogate(
                log_prob, batch.log_prob, batch.advantage, valid, hypers.clip
            )
        else:
            policy_loss = policy_gradient.policy_gradient(log_prob, batch.advantage, valid)
        value_loss = policy_gradient.value_error(self.value(params, batch.observation), batch.target, valid)
        entropy = policy_gradient.masked_mean(entropies, valid)
        loss = policy_loss + hypers.vf_coef * value_loss - hypers.ent_coef * entropy
        metrics |= {"loss": loss, "policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
        return loss, metrics
