"""GeMS slate recommendation in JAX: simulator, methods and baselines, compiled end to end.

env, params = gemsjax.make("focused_topdown")
obs, state = env.reset(jax.random.key(0), params)
"""

from gemsjax.envs.registry import check_slate, environments, make, register

__all__ = ["check_slate", "environments", "make", "register"]
