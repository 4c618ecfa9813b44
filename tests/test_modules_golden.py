"""GRU belief, GeMS and SAC against numbers recorded from the published implementation (1e-4 relative)."""

from __future__ import annotations

import golden_weights as weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemsjax.agents import sac
from gemsjax.agents.base import Acting
from gemsjax.belief import make_gru
from gemsjax.maths.optimise import adam_init, adam_step
from gemsjax.nets.gems import SlateVAE
from gemsjax.nets.mlp import MLP, Critic
from gemsjax.pretrain.gems import GeMSHypers, action_bounds, vae_loss
from gemsjax.rankers import Ranker
from gemsjax.rankers.gems import GeMSWeights, make_gems_ranker
from gemsjax.types import Dims, Episode, Observation, time_major

ITEMS, SLATE, TURNS, LATENT, EPISODES = 60, 10, 100, 8, 3


@pytest.fixture(scope="module")
def g() -> weights.Arrays:
    return weights.load("gems_gru_sac.npz")


@pytest.fixture(scope="module")
def observed(g) -> Observation:
    return Observation(jnp.asarray(g["batch/slate"]), jnp.asarray(g["batch/clicks"]) > 0)


def close(ours, recorded, rtol=1e-4):
    """Within rtol of the recorded array's scale."""
    ours, recorded = np.asarray(ours), np.asarray(recorded)
    np.testing.assert_allclose(ours, recorded, rtol=rtol, atol=rtol * max(np.abs(recorded).max(), 1e-12))


def stepped_close(ours, recorded, before, rate, rtol=1e-4):
    """Parameters after Adam steps. Where a gradient nearly cancels, rounding decides on part of a step of size `rate`:
    such entries may be few (one in a thousand) and off by less than a step."""
    ours, recorded, before = (np.asarray(x) for x in (ours, recorded, before))
    off = np.abs(ours - recorded) > rtol * np.maximum(np.abs(recorded), np.abs(recorded).max())
    assert off.mean() <= 1e-3
    assert np.abs(ours - recorded).max() < rate
    assert np.abs(recorded - before).max() > 0.1 * rate  # the recorded step is a step


# -- belief ------------------------------------------------------------------------------------------------------------


def test_gru_unrolled_states(g, observed):
    belief = make_gru(Dims(ITEMS, SLATE, TURNS))
    params = tuple(weights.gru(g, "gru/w/", who) for who in ("actor", "critic"))
    states = jax.jit(belief.unroll)(params, time_major(observed))
    for who, state in zip(("actor", "critic"), states, strict=True):
        close(time_major(state).reshape(EPISODES * TURNS, -1), g[f"gru/state/{who}"])


def test_gru_step_by_step(g, observed):
    belief = make_gru(Dims(ITEMS, SLATE, TURNS))
    params = weights.gru(g, "gru/w/", "actor")
    one_user = jax.tree.map(lambda x: x[0], observed)

    def turn(state, seen):
        state = belief.step(params, state, seen)
        return state, state

    _, states = jax.jit(lambda: jax.lax.scan(turn, belief.start(), one_user))()
    close(states, g["gru/online_actor_traj0"])


def test_gru_gradients_equal_those_of_autodiff(g, observed):
    """The hand-written backward pass against differentiating the step."""
    belief = make_gru(Dims(ITEMS, SLATE, TURNS))
    params = weights.gru(g, "gru/w/", "actor")
    targets = jnp.asarray(g["gru/state/critic"]).reshape(EPISODES, TURNS, -1).swapaxes(0, 1)

    def by_unroll(params):
        return jnp.sum((belief.unroll((params,), time_major(observed))[0] - targets) ** 2)

    def by_step(params):
        def turn(state, seen):
            state = jax.vmap(lambda h, o: belief.step(params, h, o))(state, seen)
            return state, state

        start = jnp.zeros((EPISODES, belief.width))
        return jnp.sum((jax.lax.scan(turn, start, time_major(observed))[1] - targets) ** 2)

    jax.tree.map(close, jax.jit(jax.grad(by_unroll))(params), jax.jit(jax.grad(by_step))(params))


# -- GeMS --------------------------------------------------------------------------------------------------------------

VAE = SlateVAE(ITEMS, SLATE, LATENT, hidden=(24, 16))


@pytest.fixture(scope="module")
def vae_case(g):
    batch = Observation(jnp.asarray(g["vae/slates"]), jnp.asarray(g["vae/clicks"]) > 0)
    return weights.vae(g, "vae/w/"), batch, jnp.asarray(g["vae/eps"])


def test_gems_forward(g, vae_case):
    params, batch, noise = vae_case
    mean, log_variance = VAE.apply({"params": params}, batch, method=SlateVAE.encode)
    close(mean, g["vae/mu"])
    close(log_variance, g["vae/logvar"])
    latent = mean + noise * jnp.exp(log_variance)
    close(latent, g["vae/latent_sample"])
    queries, clicks = VAE.apply({"params": params}, latent, method=SlateVAE.decode)
    close((queries @ params["item_embeddings"].T).reshape(-1, ITEMS), g["vae/item_logits"])
    close(clicks, g["vae/click_logits"])


@pytest.mark.parametrize("validation", [False, True])
def test_gems_losses(g, vae_case, validation):
    params, batch, noise = vae_case
    loss, terms = vae_loss(VAE, params, GeMSHypers(), batch, None if validation else noise, "variance")
    slate, click, kl, _, total = g["vae/val_loss_terms" if validation else "vae/loss_terms"]
    close(jnp.stack([terms["slate"], terms["click"], terms["kl"], loss]), np.array([slate, click, kl, total]))


def test_gems_gradients_and_an_adam_step(g, vae_case):
    params, batch, noise = vae_case
    loss = lambda p: vae_loss(VAE, p, GeMSHypers(), batch, noise, "variance")[0]  # noqa: E731
    gradients = jax.jit(jax.grad(loss))(params)
    jax.tree.map(close, gradients, weights.vae(g, "vae/grad/"))
    after, _ = adam_step(params, gradients, adam_init(params), 1e-3)
    recorded = {
        "item_embeddings.weight": after["item_embeddings"],
        "inference.4.weight": after["encoder"]["layer2"]["kernel"].T,
        "decoder.0.weight": after["decoder"]["layer0"]["kernel"].T,
        "click_decoder.weight": after["click_head"]["kernel"].T,
        "click_decoder.bias": after["click_head"]["bias"],
    }
    for name, ours in recorded.items():
        stepped_close(ours, g[f"vae/after_adam/{name}"], g[f"vae/w/{name}"], 1e-3)


def test_the_two_noise_conventions_differ(vae_case):
    params, batch, noise = vae_case
    losses = [vae_loss(VAE, params, GeMSHypers(), batch, noise, name)[0] for name in ("variance", "deviation")]
    assert abs(float(losses[0] - losses[1])) > 1e-3


def test_gems_decodes_the_recorded_slates(g, vae_case):
    box = jnp.zeros(LATENT), jnp.ones(LATENT)
    ranker = make_gems_ranker(VAE)
    slates = jax.vmap(lambda a: ranker.decode(GeMSWeights(vae_case[0], *box), a))(jnp.asarray(g["vae/rank_actions"]))
    np.testing.assert_array_equal(slates, g["vae/rank_slates"])


def test_gems_action_bounds(g, vae_case, observed):
    flat = jax.tree.map(lambda x: x.reshape(-1, SLATE), observed)
    bounds = action_bounds(VAE, vae_case[0], flat)
    close(bounds.centre, g["vae/bounds_center"])
    close(bounds.scale, g["vae/bounds_scale"])


# -- SAC ---------------------------------------------------------------------------------------------------------------

RANKER = Ranker(decode=lambda box, action: jnp.zeros(SLATE, jnp.int32), box=lambda box: box, action_dim=LATENT)


def sac_params(g, when: str) -> sac.SACParams:
    prefix = f"sac/{when}/"
    return sac.SACParams(
        actor_belief=weights.gru(g, f"{prefix}belief.", "actor"),
        critic_belief=weights.gru(g, f"{prefix}belief.", "critic"),
        policy=weights.mlp(g, f"{prefix}PolicyNet"),
        critics=(weights.critic(g, f"{prefix}QNet"), weights.critic(g, f"{prefix}QNet2")),
        log_alpha=jnp.asarray(g[f"{prefix}log_alpha"][0]),
    )


def sac_targets(g, when: str) -> tuple:
    return tuple(weights.critic(g, f"sac/{when}/target_{name}") for name in ("QNet", "QNet2"))


def sac_noise(g, step: int) -> sac.SACNoise:
    parts = (("next", TURNS - 1), ("pi", TURNS))
    return sac.SACNoise(
        *(time_major(jnp.asarray(g[f"sac/step{step}/noise_{name}"]).reshape(EPISODES, n, -1)) for name, n in parts)
    )


@pytest.fixture(scope="module")
def two_updates(g, observed):
    """Metrics and state after each of two updates from the recorded start."""
    params = sac_params(g, "w0")
    optimiser = sac.SACParams(**{part: adam_init(value) for part, value in vars(params).items()})
    state = sac.SACState(params, sac_targets(g, "w0"), optimiser, jnp.asarray(g["sac/w0/alpha"][0]))
    box = jnp.asarray(g["sac/action_center"]), jnp.asarray(g["sac/action_scale"])
    batch = Episode(
        observed,
        jnp.asarray(g["sac/action"]).reshape(EPISODES, TURNS, -1),
        jnp.asarray(g["batch/reward"]),
        jax.tree.map(lambda x: x[:, -1], observed),
    )
    agent = sac.make_sac(sac.SACSpec(hidden=16), Dims(ITEMS, SLATE, TURNS), RANKER)
    update, steps = jax.jit(agent.update), []
    for step in (1, 2):
        state, metrics = update(Acting(state, sac.SACHypers(), box), batch, sac_noise(g, step))
        steps.append((state, metrics))
    return agent, box, steps


@pytest.mark.parametrize("step", [1, 2])
def test_sac_losses(g, two_updates, step):
    _, metrics = two_updates[2][step - 1]
    losses = jnp.stack([metrics["critic_loss"], metrics["policy_loss"], metrics["alpha_loss"]])
    close(losses, g[f"sac/step{step}/losses"])
    close(metrics["q"], g[f"sac/step{step}/q1"].mean())
    close(metrics["entropy"], -g[f"sac/step{step}/pi_logp"].mean())


@pytest.mark.parametrize("step", [1, 2])
def test_sac_weights_after_updates(g, two_updates, step):
    state, _ = two_updates[2][step - 1]
    before, recorded = sac_params(g, f"w{step - 1}"), sac_params(g, f"w{step}")
    rates = {"actor_belief": 3e-3, "policy": 3e-3, "critic_belief": 1e-3, "critics": 1e-3, "log_alpha": 1e-3}
    for part, rate in rates.items():
        for ours, theirs, start in zip(
            *(jax.tree.leaves(getattr(p, part)) for p in (state.params, recorded, before)), strict=True
        ):
            stepped_close(ours, theirs, start, rate)
    jax.tree.map(close, state.targets, sac_targets(g, f"w{step}"))
    close(state.alpha, g[f"sac/w{step}/alpha"][0], 1e-6)


def test_sac_greedy_action(g, two_updates):
    """The policy network's mode, placed in the ranker's box by the functions that acting uses."""
    _, box, _ = two_updates
    networks = sac._Networks(make_gru(Dims(ITEMS, SLATE, TURNS)), MLP((16, 2 * LATENT)), Critic(16))
    squashed = networks.gaussian(sac_params(g, "w2").policy, jnp.asarray(g["sac/eval_state"])).mode()
    close(sac._inside(box, squashed), g["sac/eval_action"])
