"""Same-shape matrices as bounded stacks: the numbers do not depend on the grouping."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_normuon import MatrixLayout, normuon, scale_by_normuon
from optax_normuon.matrices.on_matrices import on_matrices
from optax_normuon.matrices.stack import MatrixStack, MatrixStage

LAYOUT = MatrixLayout(-2, -1)
TREE = {"a": (5, 4, 6), "b": (4, 6), "c": (6, 4), "d": (4, 6), "e": (2, 3, 4, 6)}


def draw(seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in TREE.items()
    }


def recording():
    """An inner stage that notes the stacks it is given."""
    seen = []

    def update(stack, state):
        seen.append((stack.values.shape, stack.output_axis))
        return MatrixStack(2 * stack.values, stack.output_axis), state

    return seen, MatrixStage(lambda stack: (), update)


def test_one_call_for_each_shape_and_orientation():
    seen, inner = recording()
    layout = {**dict.fromkeys(TREE, LAYOUT), "d": MatrixLayout(-1, -2)}
    tx = on_matrices(inner, layout=layout)
    updates, _ = tx.update(draw(), tx.init(draw()))
    assert sorted(seen) == [((1, 4, 6), -2), ((1, 6, 4), -1), ((12, 4, 6), -1)]
    chex.assert_trees_all_equal(updates, jax.tree.map(lambda x: 2 * x, draw()))


def test_a_ceiling_bounds_every_stack_and_changes_no_result():
    """Four matrices of 4 x 6 float32 entries are 4 x 96 bytes, four times that with working memory."""
    seen, inner = recording()
    tx = on_matrices(inner, layout=LAYOUT, max_stack_bytes=4 * 4 * 96)
    updates, _ = tx.update(draw(), tx.init(draw()))
    assert sorted(shape for shape, _ in seen) == [
        (1, 6, 4),
        (3, 4, 6),
        (3, 4, 6),
        (3, 4, 6),
        (4, 4, 6),
    ]
    chex.assert_trees_all_equal(updates, jax.tree.map(lambda x: 2 * x, draw()))


def test_a_ceiling_below_one_matrix_still_takes_one():
    seen, inner = recording()
    tx = on_matrices(inner, layout=LAYOUT, max_stack_bytes=1)
    tx.update(draw(), tx.init(draw()))
    assert {shape[0] for shape, _ in seen} == {1}


def test_bounded_stacks_carry_their_state():
    free, bounded = (
        scale_by_normuon(layout=LAYOUT, compute_dtype=jnp.float32, max_stack_bytes=ceiling)
        for ceiling in (None, 4 * 3 * 96)
    )
    results = []
    for tx in (free, bounded):
        state = tx.init(draw())
        for seed in range(2):
            updates, state = tx.update(draw(seed), state)
        results.append((updates, state))
    chex.assert_trees_all_close(*results, atol=1e-6)


@pytest.mark.gpu
def test_a_ceiling_lowers_the_compiled_programs_temporary_memory():
    """64 matrices of 1024 x 4096: the CPU's compiler schedules all stacks' inputs first, a GPU's does
    not."""
    params = {f"layer{i}": jax.ShapeDtypeStruct((1024, 4096), jnp.float32) for i in range(64)}

    def temporary_bytes(ceiling):
        tx = normuon(0.1, layout=LAYOUT, max_stack_bytes=ceiling)
        state = jax.eval_shape(tx.init, params)
        compiled = jax.jit(tx.update, donate_argnums=1).lower(params, state, params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(2**28) < 0.6 * temporary_bytes(2**40)


def test_state_is_kept_leaf_by_leaf():
    tx = scale_by_normuon(layout=LAYOUT)
    state = tx.init(draw())
    assert {name: x.shape for name, x in optax.tree.get(state, "momentum").items()} == TREE
    expected = {name: (*shape[:-2], 1, shape[-1]) for name, shape in TREE.items()}
    assert {n: x.shape for n, x in optax.tree.get(state, "second_moment").items()} == expected


def test_the_callers_orthogonalizer_gets_float32_stacks():
    seen = []

    def orthogonalizer(stack):
        seen.append((stack.shape, stack.dtype))
        u, _, vt = jnp.linalg.svd(stack, full_matrices=False)
        return u @ vt

    gradients = jax.tree.map(lambda x: x.astype(jnp.bfloat16), draw())
    exact = scale_by_normuon(layout=LAYOUT, orthogonalizer=orthogonalizer)
    ours = scale_by_normuon(layout=LAYOUT, compute_dtype=jnp.float32)
    result, _ = exact.update(gradients, exact.init(gradients))
    near, _ = ours.update(gradients, ours.init(gradients))
    assert sorted(seen) == [((1, 6, 4), jnp.float32), ((13, 4, 6), jnp.float32)]
    correlation = jnp.vdot(result["a"], near["a"]).astype(jnp.float32) / (
        jnp.linalg.norm(result["a"].astype(jnp.float32))
        * jnp.linalg.norm(near["a"].astype(jnp.float32))
    )
    assert 0.9 < correlation < 1


def test_blocks_of_one_weight_may_have_compute_dtypes_of_their_own():
    """As where "auto" takes the Gram form for one block's shape and not for another's."""

    def update(stack, state):
        wide = stack.values.shape[-1] > stack.values.shape[-2]
        return MatrixStack(
            stack.values.astype(jnp.float16 if wide else jnp.bfloat16), stack.output_axis
        ), state

    layout = MatrixLayout(-1, -2, output_splits=(4, 8))
    tx = on_matrices(MatrixStage(lambda stack: (), update), layout={"a": layout})
    given = {"a": jnp.ones((12, 6))}
    updates, _ = tx.update(given, tx.init(given))
    chex.assert_trees_all_equal(updates, given)
