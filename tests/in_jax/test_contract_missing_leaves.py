"""Optax's contract: leaves that are not there, and leaves without a gradient."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import optax_normuon
from tests.in_jax.contract import LEAVES, SPLIT, STAGES, TRANSFORMATIONS, draw, one_step, without
from tests.in_jax.trees import at


@pytest.mark.parametrize("path", LEAVES, ids="/".join)
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_leaf_that_is_none_passes(name, path):
    params, gradients = without(draw(0), path), without(draw(1), path)
    tx = TRANSFORMATIONS[name]()
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, gradients, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


@pytest.mark.parametrize("shapes", [(), ((0, 4), (0,))], ids=["no leaves", "no entries"])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_empty_trees_and_empty_leaves_pass(name, shapes):
    params = {f"dense_{i}": {"kernel": jnp.zeros(shape)} for i, shape in enumerate(shapes)}
    tx = TRANSFORMATIONS[name]()
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    chex.assert_trees_all_equal_shapes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


@pytest.mark.parametrize("layout", [None, SPLIT], ids=["routed", "split"])
@pytest.mark.parametrize("path", LEAVES, ids="/".join)
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_parameter_without_gradient_gets_no_update_and_keeps_its_state(name, path, layout):
    params, gradients = draw(0), without(draw(1), path)
    tx = TRANSFORMATIONS[name](layout=layout)
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, gradients, state, params)
    assert at(updates, path) is None
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, gradients)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


@pytest.mark.parametrize("path", LEAVES, ids="/".join)
def test_the_other_leaves_do_not_notice_a_leaf_that_is_none(normuon, path):
    params, gradients = draw(0), draw(1)
    tx = normuon(0.1, weight_decay=0.1)
    alone, _ = one_step(tx, without(gradients, path), without(params, path))
    together, _ = one_step(tx, gradients, params)
    chex.assert_trees_all_equal(alone, without(together, path))


@pytest.mark.parametrize("path", LEAVES, ids="/".join)
def test_the_other_leaves_do_not_notice_a_missing_gradient(normuon, path):
    params, gradients = draw(0), draw(1)
    tx = normuon(0.1, weight_decay=0.1)
    alone, state = one_step(tx, without(gradients, path), params)
    together, _ = one_step(tx, gradients, params)
    assert at(alone, path) is None
    chex.assert_trees_all_equal(alone, without(together, path))
    # Its momentum is what it was before: zero.
    if path != ("dense", "bias"):
        assert not jnp.any(at(optax.tree.get(state, "momentum"), path))


@pytest.mark.parametrize("name", ["orthogonalize", "normalize_neurons", "scale_by_shape"])
def test_a_missing_bias_gradient_does_not_change_how_the_kernel_is_read(name):
    # The shape of the bias tells a stack of 1-D convolutions from one 2-D convolution.
    kernel = at(draw(0), ("blocks", "up", "kernel")).reshape(3, 2, 3, 7)
    params: Any = {"conv": {"kernel": kernel, "bias": jnp.zeros((3, 7))}}
    assert "3 x (7, 6)" in optax_normuon.describe(params)
    tx: Any = optax_normuon.scale_by_shape("rms") if name == "scale_by_shape" else STAGES[name]()
    state = tx.init(params)
    whole, _ = tx.update(params, state, params)
    kernel_alone, _ = tx.update(without(params, ("conv", "bias")), state, params)
    chex.assert_trees_all_equal(kernel_alone["conv"]["kernel"], whole["conv"]["kernel"])
