"""TopK and SAC+WkNN against numbers recorded from the published implementation (1e-4 relative)."""

from __future__ import annotations

import golden_weights as weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemsjax.agents import actor_critic, sac, wolpertinger
from gemsjax.agents.base import Acting
from gemsjax.belief import make_gru
from gemsjax.maths.distributions import SquashedGaussian
from gemsjax.maths.optimise import adam_init
from gemsjax.nets.mlp import MLP, Critic
from gemsjax.rankers.items import item_weights, make_khead_ranker, make_topk_ranker, nearest_items
from gemsjax.types import Dims, Episode, Observation, time_major

ITEMS, SLATE, TURNS, EPISODES, WIDTH = 60, 10, 100, 3, 20
DIMS = Dims(ITEMS, SLATE, TURNS)
PUBLISHED = wolpertinger.WkNNSpec(hidden=16, **wolpertinger.PUBLISHED["spec"])


@pytest.fixture(scope="module")
def g() -> weights.Arrays:
    return weights.load("topk_wknn.npz")


def close(ours, recorded, rtol=1e-4):
    """Within rtol of the recorded array's scale."""
    ours, recorded = np.asarray(ours), np.asarray(recorded)
    np.testing.assert_allclose(ours, recorded, rtol=rtol, atol=rtol * np.abs(recorded).max())


# -- TopK --------------------------------------------------------------------------------------------------------------


def test_topk_box_and_slates(g):
    items, ranker = item_weights(g["topk/ideal/embeddings"]), make_topk_ranker(DIMS, WIDTH)
    centre, scale = ranker.box(items)
    close(centre, g["topk/ideal/center"])
    close(scale, g["topk/ideal/scale"])
    slates = jax.vmap(lambda action: ranker.decode(items, action))(jnp.asarray(g["topk/ideal/actions"]))
    np.testing.assert_array_equal(slates, g["topk/ideal/slates"])


# -- WkNN --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def acting(g) -> Acting:
    """The recorded start; acting and learning."""
    params = sac.SACParams(
        actor_belief=weights.gru(g, "wknn/w/belief.", "actor"),
        critic_belief=weights.gru(g, "wknn/w/belief.", "critic"),
        policy=weights.mlp(g, "wknn/w/PolicyNet"),
        critics=tuple(weights.critic(g, f"wknn/w/{name}") for name in ("QNet", "QNet2")),
        log_alpha=jnp.float32(0.0),
    )
    optimiser = sac.SACParams(**{part: adam_init(value) for part, value in vars(params).items()})
    targets = tuple(weights.critic(g, f"wknn/w/target_{name}") for name in ("QNet", "QNet2"))
    state = sac.SACState(params, targets, optimiser, jnp.float32(0.2))
    return Acting(state, sac.SACHypers(), item_weights(g["wknn/w/item_embeddings.embedd.weight"]))


@pytest.fixture(scope="module")
def batch(g) -> Episode:
    observed = Observation(jnp.asarray(g["batch/slate"]), jnp.asarray(g["batch/clicks"]) > 0)
    unused = jnp.full_like(observed.slate, 7)  # the published form learns the value of the slates observed
    return Episode(observed, unused, jnp.asarray(g["batch/reward"]), jax.tree.map(lambda x: x[:, -1], observed))


def noise(g) -> sac.SACNoise:
    parts = (("next", TURNS - 1), ("pi", TURNS))
    return sac.SACNoise(
        *(time_major(jnp.asarray(g[f"wknn/noise_{name}"]).reshape(EPISODES, n, -1)) for name, n in parts)
    )


def test_wknn_box(g, acting):
    centre, scale = make_khead_ranker(DIMS, WIDTH).box(acting.weights)
    close(centre, g["wknn/action_center"])
    close(scale, g["wknn/action_scale"])


def test_wknn_candidates_and_slates(g, acting):
    """Both ways of filling slates: one user's, and many at once."""
    embeddings, states = acting.weights.embeddings, jnp.asarray(g["wknn/rank_state"])
    queries = jnp.asarray(g["wknn/rank_action"]).reshape(-1, WIDTH, SLATE).swapaxes(1, 2)
    near = jax.vmap(lambda q: nearest_items(embeddings, q, 10))(queries)
    np.testing.assert_array_equal(near, g["wknn/candidates"])
    critics = acting.state.targets[:1]
    slates = jax.jit(wolpertinger.slates_of, static_argnums=4)
    together = slates(critics, embeddings, states[:, None], queries[:, None], 10)[:, 0]
    one_by_one = jax.jit(jax.vmap(lambda state, q: wolpertinger.slate_of(critics, embeddings, state, q, 10)))
    np.testing.assert_array_equal(together, g["wknn/slates"])
    np.testing.assert_array_equal(one_by_one(states, queries), g["wknn/slates"])


def test_wknn_next_slates_and_targets(g, acting, batch):
    means = wolpertinger._means(PUBLISHED, DIMS, make_khead_ranker(DIMS, WIDTH))
    networks = sac._Networks(make_gru(DIMS), MLP((16, 2 * means.action_dim)), Critic(16))
    box, turns = means.box(acting.weights), actor_critic.turns(batch)

    @jax.jit
    def targets(acting, noise):
        unrolled = actor_critic.unroll(networks, acting.state.params, turns.observation)
        heads = networks.heads(acting.state.params.policy, unrolled.actor[1:])
        squashed, _ = SquashedGaussian(*heads).sample_and_log_prob(noise.next_action)
        action = actor_critic.inside(box, squashed)
        judged = means.judged(acting, (unrolled.actor[1:], unrolled.critic[1:]), action)
        return judged, sac._target(networks, means, acting, box, unrolled, heads, turns.reward, noise.next_action)

    judged, target = targets(acting, noise(g))
    recorded = g["wknn/next_slates"].reshape(EPISODES, TURNS - 1, SLATE)
    np.testing.assert_array_equal(time_major(judged), wolpertinger.embedded(acting.weights, jnp.asarray(recorded)))
    close(time_major(target).reshape(-1), g["wknn/target_q"])


def test_wknn_losses(g, acting, batch):
    agent = wolpertinger.make_wknn(PUBLISHED, DIMS, make_khead_ranker(DIMS, WIDTH))
    _, metrics = jax.jit(agent.update)(acting, batch, noise(g))
    close(jnp.stack([metrics["critic_loss"], metrics["policy_loss"], metrics["alpha_loss"]]), g["wknn/losses"])
    close(metrics["q"], g["wknn/q1"].mean())
