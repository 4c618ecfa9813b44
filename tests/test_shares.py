"""Devices that share an update: the numbers of one device alone, up to rounding; stopped and resumed, bit for bit.

Tests see one device, so these run in a process of two.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax

from gemsjax.shares import averaged, everywhere, gathered, own, sharers, together

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

def settings_of(method="sac-gems", **plan):
    plan = Plan(**{"batch_size": 8, "replay_capacity": 16, "warm_up": 8, "validation_users": 4, **plan})
    world = {"num_items": 40, "slate_size": 4, "horizon": 8}
    settings = TrainSettings(method, env="focused_topdown", steps=12, epoch_steps=4, test_users=8, env_settings=world)
    spec = dataclasses.replace(settings.resolved().spec, hidden=16, item_dim=4, belief_width=8)
    gems = GeMSSettings(latent_dim=3, item_dim=4, hidden=(8,), users=40, epochs=2, batch_size=32)
    return dataclasses.replace(settings, plan=plan, spec=spec, gems=gems).resolved()
"""

AN_EPOCH = """
for method in ("sac-gems", "td3-gems"):
    settings = settings_of(method)
    world = prepare.world_of(settings)
    weights = prepare.untrained_weights(settings, world)
    agent = runs.make_agent(settings, world, weights)
    devices = runs.sharers_of(agent, settings.plan)
    assert len(devices) == 2
    training = make_training(world.env, agent, settings.plan)
    run = Run(jax.random.key(0), prepare.as_arrays(settings.hypers), weights, world.params)
    state, numbers = jax.jit(training.init)(run), jnp.arange(9)  # eight at random, then one update
    alone, told = jax.jit(training.epoch)(run, state, numbers)
    inputs = everywhere(devices, (run, state, numbers))
    shared, told_shared = jax.jit(together(devices, training.epoch))(*inputs)
    assert told.steps["updated"].sum() == 1
    jax.tree.map(np.testing.assert_array_equal, shared.replay, alone.replay)
    jax.tree.map(close, shared.agent, alone.agent)
    jax.tree.map(close, told_shared.steps, told.steps)
    assert told_shared.validation.shape == (4,)
    np.testing.assert_array_equal(told_shared.validation, told.validation)
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
both, losses_of_both = jax.jit(together(devices, pretraining.updates))(*shared)
jax.tree.map(close, losses_of_both, losses)
# Adam divides by the size of a gradient: where it cancels, rounding moves a weight by up to a step.
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), both.params, alone.params)
_, validated = jax.jit(pretraining.validate)(alone, hypers, data)
_, validated_by_both = jax.jit(together(devices, pretraining.validate))(*everywhere(devices, (alone, hypers, data)))
jax.tree.map(close, validated_by_both, validated)
"""

STOPPED_AND_RESUMED = """
whole, root = settings_of(), Path(sys.argv[1])
world = prepare.world_of(whole)
weights = prepare.untrained_weights(whole, world)
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


def test_a_run_of_two_devices_resumes_bit_for_bit(tmp_path):
    in_two_devices(STOPPED_AND_RESUMED, tmp_path)


def test_one_device_alone_is_left_as_it_is():
    (device,) = sharers(20)
    function, numbers = (lambda x: averaged(gathered(own(x)))), jax.numpy.arange(6.0)
    assert together((device,), function) is function
    assert function(numbers) is numbers is everywhere((device,), numbers)
