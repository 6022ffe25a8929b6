"""Where the matrices of a leaf lie: splits, batches, merged axes, orientation."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optax.contrib import MuonDimensionNumbers

from optax_normuon import MatrixLayout, normuon, orthogonalize, scale_by_normuon

few = settings(max_examples=10, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def gradients_like(params, seed, count=2):
    leaves, tree = jax.tree.flatten(params)
    return [
        tree.unflatten(draw((seed, step, i), *leaf.shape) for i, leaf in enumerate(leaves))
        for step in range(count)
    ]


@functools.partial(jax.jit, static_argnames="layout")
def _direction(x, layout):
    tx = scale_by_normuon(layout=layout, compute_dtype=jnp.float32)
    return tx.update(x, tx.init(x))[0]


def concatenated(split, axis):
    return jnp.concatenate([split[name] for name in sorted(split)], axis=axis)


@pytest.mark.parametrize("recipe", ["normuon", "normuon_2025_11", "normuon_paper"])
@pytest.mark.parametrize("out_first", [True, False])
def test_a_split_is_separate_parameters(recipe, out_first):
    """Grouped-query attention: 6 query, 4 key, 2 value neurons, in float32."""
    axis, layout = (0, MatrixLayout(1, 0)) if out_first else (1, MatrixLayout(0, 1))
    shapes = {
        name: (n, 5) if out_first else (5, n) for name, n in zip("abc", (6, 4, 2), strict=True)
    }
    params = {name: draw(ord(name), *shape) for name, shape in shapes.items()}
    gradients = gradients_like(params, 0)
    tx_keywords = dict(recipe=recipe, weight_decay=0.1, compute_dtype=jnp.float32)

    def train(params, gradients, layout):
        tx = normuon(0.1, layout=layout, **tx_keywords)
        state = tx.init(params)
        update = jax.jit(tx.update)
        for gradient in gradients:
            updates, state = update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return params

    separate = train(params, gradients, layout)
    fused, fused_gradients = concatenated(params, axis), [concatenated(g, axis) for g in gradients]
    split = MatrixLayout(layout.reduction_axis, layout.output_axis, output_splits=(6, 4, 2))
    chex.assert_trees_all_close(
        train(fused, fused_gradients, split), concatenated(separate, axis), atol=1e-6
    )
    whole = train(fused, fused_gradients, layout)
    assert not np.allclose(whole, concatenated(separate, axis), atol=1e-3)


@few
@given(seed=seeds)
def test_swapped_axes_are_the_transposed_problem(seed):
    x = draw(seed, 4, 7)
    forward = _direction(x, MatrixLayout(0, 1))
    chex.assert_trees_all_close(_direction(x.T, MatrixLayout(1, 0)).T, forward, atol=5e-5)
    assert not np.allclose(_direction(x, MatrixLayout(1, 0)), forward, atol=1e-3)


def test_batch_entries_are_matrices_of_their_own():
    stack = draw(0, 3, 4, 6)
    layout = MatrixLayout(-2, -1)
    separate = {str(i): stack[i] for i in range(3)}
    together = _direction(stack, layout)
    for i, name in enumerate(sorted(separate)):
        chex.assert_trees_all_close(together[i], _direction(separate[name], layout), atol=1e-5)


@pytest.mark.parametrize("leaf_axis", [0, 1, 2])
def test_a_batch_axis_may_stand_anywhere(leaf_axis):
    """MaxText scans over axis 1."""
    stack = draw(0, 3, 4, 6)
    moved = jnp.moveaxis(stack, 0, leaf_axis)
    matrix_axes = [axis for axis in range(3) if axis != leaf_axis]
    result = _direction(moved, MatrixLayout(*matrix_axes))
    expected = _direction(stack, MatrixLayout(1, 2))
    chex.assert_trees_all_close(jnp.moveaxis(result, leaf_axis, 0), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "layout", "matrix"),
    [
        ((8, 2, 3), MatrixLayout(0, (-2, -1)), (8, 6)),
        ((2, 3, 8), MatrixLayout((0, 1), 2), (6, 8)),
        ((3, 3, 2, 5), MatrixLayout((0, 1, 2), 3), (18, 5)),
    ],
    ids=["attention query", "attention out", "convolution"],
)
def test_merged_axes_are_one_side(shape, layout, matrix):
    x = draw(0, *shape)
    merged = _direction(x.reshape(matrix), MatrixLayout(0, 1)).reshape(shape)
    chex.assert_trees_all_close(_direction(x, layout), merged, atol=1e-6)


def test_sides_need_not_be_stored_in_one_piece():
    """Reduction over axes 0 and 2, as in MaxText's scanned attention output."""
    x = draw(0, 4, 3, 5)
    apart = _direction(x, MatrixLayout((0, 2), 1))
    together = _direction(x.transpose(0, 2, 1).reshape(20, 3), MatrixLayout(0, 1))
    chex.assert_trees_all_close(apart, together.reshape(4, 5, 3).transpose(0, 2, 1), atol=1e-6)


def test_heads_are_merged_or_matrices_of_their_own_as_the_layout_says():
    x = draw(0, 8, 2, 3)
    merged, per_head = (_direction(x, MatrixLayout(0, axes)) for axes in ((1, 2), 2))
    assert not np.allclose(merged, per_head, atol=1e-2)
    one = _direction(x[:, 1], MatrixLayout(0, 1))
    chex.assert_trees_all_close(per_head[:, 1], one, atol=1e-6)


def test_optax_dimension_numbers_are_layouts():
    x = draw(0, 4, 6)
    tx = orthogonalize(layout=MuonDimensionNumbers(0, 1), compute_dtype=jnp.float32)
    same = orthogonalize(layout=MatrixLayout(0, 1), compute_dtype=jnp.float32)
    chex.assert_trees_all_equal(tx.update(x, tx.init(x))[0], same.update(x, same.init(x))[0])


def test_the_blocks_of_a_split_leaf_share_one_array_of_state():
    layout = MatrixLayout(0, (1, 2), output_splits=(6, 3, 3))
    tx = scale_by_normuon(layout=layout)
    state = tx.init(jnp.zeros((5, 4, 3)))
    assert optax.tree.get(state, "second_moment").shape == (1, 4, 3)


@few
@given(seed=seeds, bad=st.sampled_from([np.nan, np.inf]))
def test_a_bad_gradient_reaches_only_its_own_matrix(seed, bad):
    params = {"a": draw(seed, 2, 4, 6), "b": draw((seed, 1), 4, 6)}
    clean = _first_step(params, gradients_like(params, seed)[0])
    gradient = gradients_like(params, seed)[0]
    gradient["a"] = gradient["a"].at[1, 2, 3].set(bad)
    poisoned = _first_step(params, gradient)
    assert np.isnan(poisoned["a"][1]).all()
    chex.assert_trees_all_equal(poisoned["a"][0], clean["a"][0])
    chex.assert_trees_all_equal(poisoned["b"], clean["b"])


@jax.jit
def _first_step(params, gradient):
    tx = normuon(0.1, weight_decay=0.1, layout=MatrixLayout(-2, -1))
    return tx.update(gradient, tx.init(params), params)[0]
