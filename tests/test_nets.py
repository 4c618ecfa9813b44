"""Derivatives written by hand against those that JAX takes of the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemsjax.nets.mlp import affine, joint
from gemsjax.pretrain import gems


def draws(*shapes):
    return [jax.random.normal(jax.random.fold_in(jax.random.key(0), i), shape) for i, shape in enumerate(shapes)]


def gradients_agree(function, plain, inputs):
    """Of a sum with different weights for every output, with respect to all inputs."""
    weights = jax.random.normal(jax.random.key(1), jax.eval_shape(plain, *inputs).shape)
    both = [jax.grad(lambda *x, f=f: (weights * f(*x)).sum(), range(len(inputs)))(*inputs) for f in (function, plain)]
    np.testing.assert_allclose(function(*inputs), plain(*inputs), rtol=1e-5, atol=1e-5)
    for own, expected in zip(*both, strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-4)


# The kernel's gradient is turned for 64 inputs and few outputs, and is not for the others.
@pytest.mark.parametrize("shape", [(64,), (7, 64), (3, 5, 64), (7, 20)])
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
