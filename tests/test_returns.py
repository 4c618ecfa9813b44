"""Mean returns of the reference policies in the six published environments, with the project's own catalogues.

`golden/returns_own.json` holds means of 2000 users under another key; `python -m tests.test_returns` records it anew
(only after a deliberate change of the simulator or of the catalogues).
"""

import json
import math
from functools import cache, partial
from pathlib import Path

import jax
import numpy as np
import pytest

import gemsjax
from gemsjax.agents.base import Acting
from gemsjax.agents.references import make_epsilon_greedy_oracle, make_random, make_short_term_oracle
from gemsjax.rollout import returns
from gemsjax.types import Dims

RECORD = Path(__file__).parent / "golden" / "returns_own.json"
PUBLISHED = [name for name in gemsjax.environments() if name.startswith(("focused", "diffuse"))]
POLICIES = {"random": make_random, "oracle": make_short_term_oracle, "eps0.5": make_epsilon_greedy_oracle}


@cache
def compiled(policy):
    """One program a policy: the environments differ in numbers only."""
    env, _ = gemsjax.make(PUBLISHED[0])
    dims = Dims(env.num_items, env.slate_size, env.horizon)
    return jax.jit(partial(returns, env, POLICIES[policy](dims), acting=Acting((), (), ())))


def measure(environment, policy, key, users):
    """Mean return and its standard error over `users` users."""
    _, params = gemsjax.make(environment)
    clicks = np.asarray(compiled(policy)(jax.random.split(key, users), params))
    return {"mean": round(float(clicks.mean()), 3), "se": round(float(clicks.std(ddof=1)) / math.sqrt(users), 3)}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("environment", PUBLISHED)
def test_returns_of_the_reference_policies(environment, policy):
    recorded = json.loads(RECORD.read_text())["environments"][environment][policy]
    measured = measure(environment, policy, jax.random.key(20), users=200)
    assert abs(measured["mean"] - recorded["mean"]) < 4 * math.hypot(measured["se"], recorded["se"])


def record():
    key, users = jax.random.key(5), 2000
    table = {name: {policy: measure(name, policy, key, users) for policy in POLICIES} for name in PUBLISHED}
    about = (
        f"clicks over 100 turns, reset clicks not counted; {users} users, jax.random.key(5), catalogues of the package"
    )
    RECORD.write_text(json.dumps({"about": about, "environments": table}, indent=1) + "\n")


if __name__ == "__main__":
    record()
