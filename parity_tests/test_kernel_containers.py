"""The kernels step every container that people keep parameters in, with every tree of settings."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from parity_tests.interpreted import interpreted_kernels
from tests.in_jax.containers import CONTAINERS, draw
from tests.in_jax.test_containers import optimizer, step


def run(container, **keywords):
    params = draw(container, 0)
    tx = optimizer(params, **keywords)
    state = tx.init(params)
    for seed in (1, 2):
        params, state = step(tx, draw(container, seed), state, params)
    return [np.asarray(leaf) for leaf in jax.tree.leaves((params, state))]


@functools.cache
def of_a_dict():
    return run("dict", backend="triton")


@pytest.mark.parametrize("container", [name for name in CONTAINERS if name != "dict"])
def test_a_container_makes_the_bits_of_a_dict(container):
    with interpreted_kernels():
        chex.assert_trees_all_equal(run(container, backend="triton"), of_a_dict())


def test_xla_makes_other_bits_so_the_kernels_did_run():
    """XLA sums its products in another order; without this control XLA might have run in every test."""
    with interpreted_kernels():
        pairs = zip(run("dict", backend="xla"), of_a_dict(), strict=True)
    assert any(not np.array_equal(*pair) for pair in pairs)


def test_a_masked_subtree_passes_and_the_rest_steps_as_if_alone():
    params = {"up": draw("dict", 0), "frozen": {"w": jnp.ones((4, 6))}}
    gradients = {"up": draw("dict", 1), "frozen": {"w": jnp.ones((4, 6))}}
    with interpreted_kernels():
        tx = optax.masked(optimizer(params, backend="triton"), {"up": True, "frozen": False})
        updates, _ = tx.update(gradients, tx.init(params), params)
        alone = optimizer(params["up"], backend="triton")
        expected, _ = alone.update(gradients["up"], alone.init(params["up"]), params["up"])
    chex.assert_trees_all_equal(updates["up"], expected)
    chex.assert_trees_all_equal(updates["frozen"], gradients["frozen"])
