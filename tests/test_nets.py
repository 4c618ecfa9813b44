"""Derivatives written by hand against those that JAX takes of the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemsjax import belief
from gemsjax.devices import MOST_UNROLLED, surroundings, use_unroll
from gemsjax.errors import SettingError
from gemsjax.nets.mlp import affine, joint
from gemsjax.pretrain import gems
from gemsjax.types import Dims, Observation


def draws(*shapes):
    return [jax.random.normal(jax.random.fold_in(jax.random.key(0), i), shape) for i, shape in enumerate(shapes)]


def gradients_agree(function, plain, inputs):
    """Of a sum with different weights for every output, with respect to all inputs."""
    weights = jax.random.normal(jax.random.key(1), jax.eval_shape(plain, *inputs).shape)
    both = [jax.grad(lambda *x, f=f: (weights * f(*x)).sum(), range(len(inputs)))(*inputs) for f in (function, plain)]
    np.testing.assert_allclose(function(*inputs), plain(*inputs), rtol=1e-5, atol=1e-5)
    for own, expected in zip(*both, strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-4)


# The kernel's gradient is turned where outputs are few; of 120 rows, 33 columns are filled up to whole vectors.
@pytest.mark.parametrize("shape", [(64,), (7, 64), (3, 5, 64), (7, 20), (120, 80)])
@pytest.mark.parametrize("outputs", [4, 33])
def test_affine(shape, outputs):
    inputs = draws(shape, (shape[-1], outputs), (outputs,))
    gradients_agree(affine, lambda x, kernel, bias: x @ kernel + bias, inputs)


@pytest.mark.parametrize("prefix", [(), (6,), (2, 3)])
def test_joint(prefix):
    def plain(state, action, kernel, bias):
        return jnp.concatenate([state, action], axis=-1) @ kernel + bias

    inputs = draws((*prefix, 5), (*prefix, 3), (8, 16), (16,))
    gradients_agree(joint, plain, inputs)
    runs = [jnp.stack([x, x + 1.0]) for x in inputs]
    gradients_agree(jax.vmap(joint), jax.vmap(plain), runs)


@pytest.mark.parametrize("shape", [(), (1,), (33, 10), (2, gems._BLOCK)])
def test_slate_cross_entropy(shape):
    """Less than a block of slots, and more than one."""
    queries, items = draws((*shape, 6), (40, 6))
    slate = jax.random.randint(jax.random.key(2), shape, 0, 40)

    def plain(queries):
        logits = 5.0 * queries @ items.T
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), slate[..., None], axis=-1)[..., 0]

    gradients_agree(lambda queries: gems.slate_cross_entropy(5.0 * queries, items, slate), plain, [queries])
    together = jax.vmap(lambda queries: gems.slate_cross_entropy(queries, items, slate))(jnp.stack([queries, -queries]))
    alone = jnp.stack([gems.slate_cross_entropy(x, items, slate) for x in (queries, -queries)])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)


def test_no_slates_have_no_cross_entropy():
    assert gems.slate_cross_entropy(jnp.zeros((0, 10, 6)), jnp.ones((40, 6)), jnp.zeros((0, 10), int)).shape == (0, 10)


@pytest.fixture
def unrolled():
    yield use_unroll
    use_unroll(1)


# 8 turns are divided by 2 and 4, 7 by neither; 100 is more than there are.
@pytest.mark.parametrize("horizon", [7, 8])
@pytest.mark.parametrize("make", [belief.make_gru, belief.make_cfn])
def test_an_unrolled_belief_is_the_same_forward_and_back(unrolled, make, horizon):
    encoder = make(Dims(30, 4, horizon), width=6, item_dim=5)
    params = [encoder.init(jax.random.key(number)) for number in (0, 1)]
    slates = jax.random.randint(jax.random.key(2), (horizon, 3, 4), 0, 30)
    seen = Observation(slates, slates % 3 == 0)
    weights = jax.random.normal(jax.random.key(3), (2, horizon, 3, 6))

    def values(turns):
        unrolled(turns)

        def loss(params):  # a function of its own for each number of turns: what is traced already stays as it is
            states = jnp.stack(encoder.unroll(params, seen))
            return (weights * states).mean(), states

        program = str(jax.make_jaxpr(jax.grad(loss, has_aux=True))(params))
        wanted = f"unroll={min(turns, horizon)}"
        # Both beliefs in one scan and one backward one, or a pair of scans each.
        assert program.count(wanted) == program.count(" scan[") == (2 if make is belief.make_gru else 4)
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    plain = values(1)
    assert float(jnp.abs(plain[0][1]).max()) > 0.1
    for turns in (2, 4, MOST_UNROLLED):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), values(turns), plain)


def test_unrolling_is_recorded_and_refused_out_of_its_range(unrolled):
    assert surroundings()["unroll"] == 1
    unrolled(4)
    for wrong in (0, -1, MOST_UNROLLED + 1, 2.0, True):
        with pytest.raises(SettingError, match="--unroll = .* a whole number from 1 to 100"):
            use_unroll(wrong)
    assert surroundings()["unroll"] == 4
