"""Devices that share an update: the numbers of one device alone, up to rounding; stopped and resumed, bit for bit.

Tests see one device, so these run in a process of two.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemsjax import shares
from gemsjax.maths.blocks import over_turns
from gemsjax.shares import averaged, everywhere, gathered, on_one, own, sharers, together

SETTINGS = """
import dataclasses, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from gemsjax import prepare, runs
from gemsjax.pretrain.gems import Slates, make_pretraining
from gemsjax.settings import GeMSSettings, TrainSettings
from gemsjax.shares import averaged, everywhere, gathered, own, sharers, together
from gemsjax.train import Plan, Run, make_training

jax.config.update("jax_compilation_cache_dir", sys.argv[2])
assert len(jax.local_devices()) == 2
close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)

def settings_of(method="sac-gems", horizon=8, batch=8, **plan):
    plan = Plan(**{"batch_size": batch, "replay_capacity": 16, "warm_up": batch, "validation_users": 4, **plan})
    world = {"num_items": 40, "slate_size": 4, "horizon": horizon}
    settings = TrainSettings(method, env="focused_topdown", steps=12, epoch_steps=4, test_users=8, env_settings=world)
    spec = dataclasses.replace(settings.resolved().spec, hidden=16, item_dim=4, belief_width=8)
    spec = dataclasses.replace(spec, delay=1) if method == "td3-gems" else spec  # so that its actor moves at once
    gems = GeMSSettings(latent_dim=3, item_dim=4, hidden=(8,), users=40, epochs=2, batch_size=32)
    return dataclasses.replace(settings, plan=plan, spec=spec, gems=gems).resolved()
"""

AN_EPOCH = """
# The first in two blocks a share (16 episodes of 50 turns), the second with validation users that do not divide.
for settings in (settings_of("sac-gems", horizon=50, batch=16), settings_of("td3-gems", validation_users=5)):
    users, batch = settings.plan.validation_users, settings.plan.batch_size
    world = prepare.world_of(settings)
    weights = prepare.untrained_weights(settings, world)
    agent = runs.make_agent(settings, world, weights)
    devices = runs.sharers_of(agent, settings.plan)
    assert len(devices) == 2
    training = make_training(world.env, agent, settings.plan)
    run = Run(jax.random.key(0), prepare.as_arrays(settings.hypers), weights, world.params)
    state, numbers = jax.jit(training.init)(run), jnp.arange(batch + 1)  # a batch at random, then one update
    alone, told = jax.jit(training.epoch)(run, state, numbers)
    inputs = everywhere(devices, (run, state, numbers))
    shared, told_shared = together(devices, training.epoch)(*inputs)
    assert told.steps["updated"].sum() == 1
    jax.tree.map(np.testing.assert_array_equal, shared.replay, alone.replay)
    jax.tree.map(close, shared.agent, alone.agent)
    jax.tree.map(close, told_shared.steps, told.steps)
    assert told_shared.validation.shape == (users,)
    # Agents of other last digits may show a user another item somewhere: most returns are the same.
    assert (np.asarray(told_shared.validation) == np.asarray(told.validation)).mean() > 0.5
    for leaf in jax.tree.leaves(shared):  # the same on both devices
        first, second = (np.asarray(piece.data) for piece in leaf.addressable_shards)
        np.testing.assert_array_equal(first, second)
"""

A_SLATE_VAE = """
settings = settings_of()
pretraining = make_pretraining(settings.gems.spec, prepare.world_of(settings).dims)
rng = np.random.default_rng(0)
slates = rng.integers(0, 40, (2500, 4), np.int16)  # validated in two blocks of a thousand, and the rest
data = Slates(jnp.asarray(slates), jnp.asarray(rng.random(slates.shape) < 0.3))
key, hypers = jax.random.key(0), prepare.as_arrays(settings.gems.hypers)
inputs = (jax.jit(pretraining.init)(key), hypers, key, data, jnp.int32(0), jnp.arange(3))
devices = sharers(32, 16)
shared = everywhere(devices, inputs)
alone, losses = jax.jit(pretraining.updates)(*inputs)
both, losses_of_both = together(devices, pretraining.updates, wide=True)(*shared)
jax.tree.map(close, losses_of_both, losses)
# Adam divides by the size of a gradient: where it cancels, rounding moves a weight by up to a step.
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), both.params, alone.params)
_, validated = jax.jit(pretraining.validate)(alone, hypers, data)
_, validated_by_both = together(devices, pretraining.validate)(*everywhere(devices, (alone, hypers, data)))
jax.tree.map(close, validated_by_both, validated)
"""

NOISE = """
from gemsjax.shares import normal_of_episodes, normal_of_rows
key, devices = jax.random.key(3), sharers(8)
drawn = lambda key: (jnp.swapaxes(normal_of_episodes(key, 8, (7, 5)), 0, 1), normal_of_rows(key, (8, 5)))
shared = together(devices, lambda key: jax.tree.map(gathered, drawn(key)))(everywhere(devices, key))
jax.tree.map(np.testing.assert_array_equal, shared, drawn(key))
np.testing.assert_array_equal(shared[1], jax.random.normal(key, (8, 5)))
"""

STOPPED_AND_RESUMED = """
whole, root = settings_of(), Path(sys.argv[1])
whole = dataclasses.replace(whole, gems=dataclasses.replace(whole.gems, users=70, batch_size=128))
world = prepare.world_of(whole)
assert len(sharers(128, prepare.gems.LEAST_SHARE)) == 2
data = lambda: prepare.logged_data(whole, world, root / "data")

class Stop(Exception):
    pass

def stop_after_one(*args, **kept):
    saved(*args, **kept)
    if prepare.gems.checkpoint.latest_step(args[0]) == 1:
        raise Stop

weights = prepare.pretrained_gems(whole, world, root / "at once", data)
saved, prepare.gems.checkpoint.save = prepare.gems.checkpoint.save, stop_after_one
try:
    prepare.pretrained_gems(whole, world, root / "in two", data)
    raise AssertionError("it should have been stopped")
except Stop:
    prepare.gems.checkpoint.save = saved
jax.tree.map(np.testing.assert_array_equal, prepare.pretrained_gems(whole, world, root / "in two", data), weights)
at_once = runs.train(whole, world, weights, root / "whole")
half = dataclasses.replace(whole, steps=8)
runs.train(half, world, weights, root / "cut")
in_two = runs.train(whole, world, weights, root / "cut", resume=True)
np.testing.assert_array_equal(in_two.test.returns, at_once.test.returns)
first, second = runs.load(at_once.directory), runs.load(in_two.directory)
jax.tree.map(np.testing.assert_array_equal, second.acting.state, first.acting.state)
"""


def in_two_devices(script: str, directory: Path) -> None:
    cache = str(jax.config.jax_compilation_cache_dir)
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    command = [sys.executable, "-c", SETTINGS + script, str(directory), cache]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_an_update_of_two_devices_is_that_of_one(tmp_path):
    in_two_devices(AN_EPOCH, tmp_path)


def test_a_slate_vae_of_two_devices_is_that_of_one(tmp_path):
    in_two_devices(A_SLATE_VAE, tmp_path)


def test_noise_of_two_devices_is_that_of_one(tmp_path):
    in_two_devices(NOISE, tmp_path)


def test_a_run_of_two_devices_resumes_bit_for_bit(tmp_path):
    in_two_devices(STOPPED_AND_RESUMED, tmp_path)


def test_one_device_alone_is_left_as_it_is():
    (device,) = sharers(20)
    function, numbers = (lambda x: averaged(gathered(own(x)))), jax.numpy.arange(6.0)
    assert function(numbers) is numbers is everywhere((device,), numbers) is on_one((device,), numbers)
    np.testing.assert_array_equal(together((device,), function)(numbers), numbers)


def test_the_only_core_of_a_machine_works_in_blocks(monkeypatch):
    x, devices = jnp.zeros((30, 20, 3)), sharers(8)[:1]
    for cores, loops in ((1, 1), (2, 0)):
        monkeypatch.setattr(shares, "available_cores", lambda cores=cores: cores)
        program = together(devices, lambda x: over_turns(lambda x: 2 * x, x))
        assert str(jax.make_jaxpr(program)(x)).count("scan[") == loops


@pytest.mark.parametrize("in_registers", [True, False])  # in a loop, or at once
def test_an_update_has_numbers_of_its_own_for_every_episode(monkeypatch, in_registers):
    monkeypatch.setattr(shares, "in_registers", lambda _key: in_registers)
    key, shape = jax.random.key(3), (7, 5)
    drawn = jax.jit(lambda key: shares.normal_of_episodes(key, 4, shape))(key)
    assert drawn.shape == (7, 4, 5)
    for episode, own_key in enumerate(jax.random.split(key, 4)):
        np.testing.assert_array_equal(drawn[:, episode], jax.random.normal(own_key, shape))
    runs = jax.vmap(lambda key: shares.normal_of_episodes(key, 4, shape))(jnp.stack([key, jax.random.key(4)]))
    np.testing.assert_array_equal(runs[0], drawn)
