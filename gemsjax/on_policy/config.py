"""Settings of PPO and A2C with the documented defaults of the public RecSys_RL project. Command lines are made of them.

What is not in that project's documents says so. Imported by the rest of `on_policy/` and by experiments.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from gemsjax.envs.dot_product import EnvConfig, check_env
from gemsjax.errors import DataError, require, require_choice, require_count
from gemsjax.maths.returns import ESTIMATORS
from gemsjax.nets.mlp import ACTIVATIONS

ALGORITHMS = ("ppo", "a2c")
DEVICES = ("auto", "cpu", "gpu", "tpu")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The two networks, which share nothing.

    Attributes:
      actor_hidden_dims: widths of the actor's hidden layers.
      critic_hidden_dims: widths of the critic's hidden layers.
      activation: `tanh`, `relu` or `elu`.
    """

    actor_hidden_dims: tuple[int, ...] = (128, 64)
    critic_hidden_dims: tuple[int, ...] = (128, 64)
    activation: str = "tanh"


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Proximal policy optimisation.

    Attributes:
      lr: Adam's learning rate.
      gamma: discount per turn.
      gae_lambda: weight of longer sums in the advantages.
      clip_eps: how far the ratio of probabilities may leave 1.
      ent_coef: weight of the policy's entropy.
      vf_coef: weight of the critic's mean squared error.
      max_grad_norm: global norm that gradients are scaled down to.
      update_epochs: passes over each rollout.
      batch_size: turns of a minibatch; divides n_steps.
      n_steps: turns of a rollout, all environments together.
      num_envs: environments side by side; divides n_steps.
      returns: `gae` in each environment (default); `nstep`; `interleaved`, the slip of the public code (all
        environments read as one course); `last_value`, that of its A2C. Not in its documents.
    """

    lr: float = 3e-4
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip_eps: float = 0.2
    ent_coef: float = 0.01
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5
    update_epochs: int = 10
    batch_size: int = 64
    n_steps: int = 2_048
    num_envs: int = 8
    returns: str = "gae"


@dataclasses.dataclass(frozen=True)
class A2CConfig:
    """Advantage actor-critic: one step on each short rollout, advantages as they are.

    Attributes:
      lr: Adam's learning rate.
      gamma: discount per turn.
      ent_coef: weight of the policy's entropy.
      vf_coef: weight of the critic's mean squared error.
      max_grad_norm: global norm that gradients are scaled down to.
      n_steps: turns of a rollout in each environment.
      gae_lambda: weight of longer sums in the advantages; fixed in the public code.
      num_envs: environments side by side; the public code has one.
      returns: `gae` (default); `nstep`, as its documents describe it; `last_value`, the slip of its code (every turn
        bootstraps from the last value); `interleaved`, that of its PPO. Not in its documents.
    """

    lr: float = 7e-4
    gamma: float = 0.99
    ent_coef: float = 0.01
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5
    n_steps: int = 5
    gae_lambda: float = 0.95
    num_envs: int = 1
    returns: str = "gae"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, how often, where to.

    Attributes:
      total_timesteps: turns over all environments; rounded up to whole rollouts.
      log_interval: turns between lines of the log (at least a rollout).
      eval_interval: turns between evaluations (the public code has the setting and does not use it); they take place
        at lines of the log, so one below `log_interval` means every line.
      save_interval: turns between checkpoints (likewise, at lines of the log too).
      log_dir: directory of logs.
      checkpoint_dir: directory of checkpoints.
      seed: of the run: item table, networks, users, actions.
      eval_episodes: episodes of an evaluation during training. Not in its documents.
    """

    total_timesteps: int = 100_000
    log_interval: int = 1_000
    eval_interval: int = 10_000
    save_interval: int = 50_000
    log_dir: str = "logs"
    checkpoint_dir: str = "checkpoints"
    seed: int = 42
    eval_episodes: int = 100


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything.

    Attributes:
      algorithm: `ppo` or `a2c`.
      device: `auto` (the best that JAX finds), `cpu`, `gpu` or `tpu`.
      env: the environment.
      model: the networks.
      ppo: used by `ppo`.
      a2c: used by `a2c`.
      train: how long, how often, where to.
    """

    algorithm: str = "ppo"
    device: str = "auto"
    env: EnvConfig = EnvConfig()
    model: ModelConfig = ModelConfig()
    ppo: PPOConfig = PPOConfig()
    a2c: A2CConfig = A2CConfig()
    train: TrainConfig = TrainConfig()

    @property
    def method(self) -> PPOConfig | A2CConfig:
        """The settings of the algorithm that is used."""
        return self.ppo if self.algorithm == "ppo" else self.a2c

    @property
    def rollout(self) -> tuple[int, int]:
        """Turns of a rollout in each environment, and environments."""
        envs = self.method.num_envs
        return (self.ppo.n_steps // envs if self.algorithm == "ppo" else self.a2c.n_steps), envs

    @property
    def iterations(self) -> int:
        """Rollouts, each with its updates, that make up `total_timesteps`."""
        turns, envs = self.rollout
        return math.ceil(self.train.total_timesteps / (turns * envs))

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be continued: everything but how long, how often, where to and on what."""
        config = dataclasses.asdict(self)
        config["train"] = {"seed": self.train.seed}
        del config["device"], config["a2c" if self.algorithm == "ppo" else "ppo"]
        return config


def check_config(config: Config) -> None:
    """Refuse what is out of range or does not fit.

    Raises:
      SettingError: naming the setting and what is accepted.
    """
    require_choice("algorithm", config.algorithm, ALGORITHMS)
    require_choice("device", config.device, DEVICES)
    check_env(config.env)
    require_choice("activation", config.model.activation, ACTIVATIONS)
    for name in ("actor_hidden_dims", "critic_hidden_dims"):
        widths = getattr(config.model, name)
        require(all(width >= 1 for width in widths), name, widths, "widths of at least 1")
    for name, value in dataclasses.asdict(config.train).items():
        if not name.endswith("_dir") and name != "seed":
            require_count(name, value)
    require_count("seed", config.train.seed, 0, 2**32 - 1)
    _check_method(config.method)
    if config.algorithm == "ppo":
        ppo = config.ppo
        for name in ("batch_size", "num_envs"):
            divides = ppo.n_steps % getattr(ppo, name) == 0
            require(divides, name, getattr(ppo, name), f"a divisor of n_steps = {ppo.n_steps}")


def _check_method(method: PPOConfig | A2CConfig) -> None:
    for name, value in dataclasses.asdict(method).items():
        if name == "returns":
            require_choice("returns", value, ESTIMATORS)
        elif name in ("update_epochs", "batch_size", "n_steps", "num_envs"):
            require_count(name, value)
        elif name in ("gamma", "gae_lambda"):
            require(0.0 <= value <= 1.0, name, value, "a number in [0, 1]")
        elif name == "lr":
            require(0.0 <= value < 1.0, name, value, "a number in [0, 1)")
        elif name in ("clip_eps", "max_grad_norm"):
            require(0.0 < value < math.inf, name, value, "a positive number")
        else:
            require(0.0 <= value < math.inf, name, value, "a finite number of at least 0")


def from_identity(identity: dict[str, Any]) -> Config:
    """The configuration that a checkpoint was saved with (how long and where to are the defaults).

    Raises:
      DataError: it does not describe a run of this version.
    """
    try:
        parts: dict[str, Any] = {
            "env": EnvConfig(**identity["env"]),
            "model": ModelConfig(**_tuples(identity["model"])),
            "train": TrainConfig(**identity["train"]),
            "algorithm": identity["algorithm"],
        }
        kind: Any = {"ppo": PPOConfig, "a2c": A2CConfig}[parts["algorithm"]]
        return Config(**parts, **{parts["algorithm"]: kind(**identity[parts["algorithm"]])})
    except (KeyError, TypeError) as error:
        raise DataError(f"the checkpoint is not one of PPO or A2C of this version: {error!r}") from error


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists as tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
