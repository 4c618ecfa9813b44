"""PPO and A2C on the dot-product environment: configuration, whole iterations as one program, evaluation, files.

    config = Config(algorithm="ppo")
    learning = make_learning(config)
    run = learning.start(jax.random.key(42))
    state = learning.init(run)
    state, metrics = jax.jit(learning.iterate)(run, state, jnp.arange(10))

`driver.train` does so from the host, with logs, checkpoints and resuming. On the slate simulator the same two methods
are agents like all others: `agents/ppo.py`, `agents/a2c.py`.
"""

from gemsjax.on_policy.config import A2CConfig, Config, ModelConfig, PPOConfig, TrainConfig, check_config
from gemsjax.on_policy.evaluation import compute_metrics, play
from gemsjax.on_policy.training import Learning, make_learning

__all__ = [
    "A2CConfig",
    "Config",
    "Learning",
    "ModelConfig",
    "PPOConfig",
    "TrainConfig",
    "check_config",
    "compute_metrics",
    "make_learning",
    "play",
]
