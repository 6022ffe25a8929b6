"""Optax's contract: shapes and dtypes of updates and state."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import optax_normuon
from optax_normuon import RECIPES
from tests.in_jax.contract import LAYOUT, OPTIMIZERS, SPLIT, STAGES, TRANSFORMATIONS, draw
from tests.in_jax.engines import engine_of
from tests.in_jax.trees import at


def types(tree) -> Any:
    """Shape, dtype and weak type of every leaf."""
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


def test_the_leaves_of_this_file_are_a_stack_a_matrix_and_a_vector():
    for layout in (None, LAYOUT):
        stack, vector, matrix = (
            optax_normuon.describe(draw(0), layout).split("\n\n")[0].splitlines()[2:]
        )
        assert "3 x (7, 6) " in stack
        assert "AdamW" in vector
        assert "1 x (6, 7) " in matrix
    assert "3 x (3, 6) + 6 x (2, 6)" in optax_normuon.describe(draw(0), SPLIT)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_have_the_shapes_and_dtypes_of_the_parameters(name, dtype):
    tx, params = OPTIMIZERS[name](), draw(0, dtype)
    for gradient_dtype in (dtype, jnp.float32):
        updates, _ = jax.eval_shape(tx.update, draw(1, gradient_dtype), tx.init(params), params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@pytest.mark.parametrize("name", ["orthogonalize", "normalize_neurons"])
def test_stages_on_matrices_keep_the_dtype_they_are_given(name, dtype):
    tx, gradients = STAGES[name](), draw(1, dtype)
    updates, _ = jax.eval_shape(tx.update, gradients, tx.init(gradients), None)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, gradients)


@pytest.mark.parametrize("name", [name for name in STAGES if "momentum" in name or "shape" in name])
def test_elementwise_stages_hand_on_float32_or_wider(name, dtype):
    tx, gradients = STAGES[name](), draw(1, dtype)
    updates, _ = jax.eval_shape(tx.update, gradients, tx.init(gradients), None)
    wider = jnp.float64 if dtype == jnp.float64 else jnp.float32
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, draw(1, wider))


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_state_types_never_change(name, dtype):
    tx, params, gradients = TRANSFORMATIONS[name](), draw(0, dtype), draw(1, dtype)
    state = jax.eval_shape(tx.init, params)

    def step(state):
        return tx.update(gradients, state, params)[1]

    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(step, state), state)
    assert types(jax.eval_shape(step, state)) == types(state)
    # Both raise where the step changes a type.
    jax.eval_shape(lambda state: jax.lax.cond(True, step, lambda same: same, state), state)
    jax.eval_shape(lambda state: jax.lax.fori_loop(0, 3, lambda _, s: step(s), state), state)


@pytest.mark.parametrize("recipe", RECIPES)
def test_state_types_never_change_in_any_recipe(normuon, recipe):
    params, gradients = draw(0, jnp.bfloat16), draw(1, jnp.bfloat16)
    tx = normuon(0.1, weight_decay=0.1, recipe=recipe, layout=SPLIT, **engine_of(recipe))
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, gradients, state, params)
    assert types(after) == types(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@pytest.mark.parametrize("layout", [None, SPLIT], ids=["routed", "split"])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_init_takes_abstract_values(name, layout):
    params = draw(0, jnp.bfloat16)
    tx = TRANSFORMATIONS[name](layout=layout)
    abstract_params = jax.eval_shape(lambda: params)
    concrete, traced = tx.init(params), jax.eval_shape(tx.init, params)
    untraced = tx.init(abstract_params)
    chex.assert_trees_all_equal_structs(concrete, traced, untraced)
    chex.assert_trees_all_equal_shapes_and_dtypes(concrete, traced, untraced)
    assert types(concrete) == types(traced)


def test_momentum_is_float32_for_half_precision_parameters_unless_asked_otherwise(normuon):
    params = draw(0, jnp.bfloat16)
    for asked, want in (
        (None, jnp.float32),
        (jnp.bfloat16, jnp.bfloat16),
        (jnp.float16, jnp.float16),
    ):
        tx = normuon(0.1, momentum_dtype=asked)
        state = jax.eval_shape(tx.init, params)
        assert at(optax.tree.get(state, "momentum"), ("dense", "kernel")).dtype == want
        _, after = jax.eval_shape(tx.update, params, state, params)
        assert types(after) == types(state)
