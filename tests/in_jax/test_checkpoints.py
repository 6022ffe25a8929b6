"""Orbax saves parameters and optimizer state, and training goes on as if nothing had happened."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest

from optax_normuon import STATIC_ARGS, MatrixLayout, normuon, with_bf16_remainder
from tests.in_jax.trees import random_tree

SHAPES = {"blocks": {"up": {"kernel": (3, 4, 8)}}, "dense": {"bias": (4,), "kernel": (8, 4)}}
SPLIT = {
    "blocks": MatrixLayout(-2, -1, output_splits=(4, 2, 2)),
    "dense": {"bias": None, "kernel": MatrixLayout(0, 1)},
}


def draw(seed, dtype) -> Any:
    """A tree with a stack of three matrices, a matrix and a vector."""
    return random_tree(SHAPES, seed, dtype)


def train(step, params, state, seeds, dtype) -> Any:
    for seed in seeds:
        updates, state = step(draw(seed, dtype), state, params)
        with jax.numpy_dtype_promotion("standard"):  # Optax adds a float32 update to a bf16 weight
            params = optax.apply_updates(params, updates)
    return params, state


RATE = optax.linear_schedule(0.1, 0.0, 10)

# A float32 iteration compiles in half the time of a bfloat16 one.
OPTIMIZERS = {
    "chained and injected": (
        optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.inject_hyperparams(normuon, static_args=STATIC_ARGS)(
                RATE, weight_decay=0.1, compute_dtype=jnp.float32
            ),
        ),
        jnp.float32,
    ),
    "split": (
        normuon(RATE, weight_decay=0.1, layout=SPLIT, compute_dtype=jnp.float32),
        jnp.float32,
    ),
    "bf16 remainder": (
        with_bf16_remainder(normuon(RATE, compute_dtype=jnp.float32)),
        jnp.bfloat16,
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_bit_for_bit_after_a_restore(name, tmp_path):
    tx, dtype = OPTIMIZERS[name]
    start, step = draw(0, dtype), jax.jit(tx.update)
    params, state = train(step, start, tx.init(start), (1, 2), dtype)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", (params, state))
        checkpointer.wait_until_finished()
        # What a new process knows: shapes and dtypes, from the same `init`.
        target = jax.eval_shape(lambda: (start, tx.init(start)))
        restored_params, restored = checkpointer.restore(tmp_path / "step", target)
    chex.assert_trees_all_equal_structs(restored, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, state)
    chex.assert_trees_all_equal((restored_params, restored), (params, state))
    resumed = train(step, restored_params, restored, (3, 4), dtype)
    chex.assert_trees_all_equal(resumed, train(step, params, state, (3, 4), dtype))
    # A run that lost its state takes another way on every leaf.
    forgetful, _ = train(step, params, tx.init(params), (3, 4), dtype)
    differ = jax.tree.map(lambda a, b: not jnp.array_equal(a, b), forgetful, resumed[0])
    assert all(jax.tree.leaves(differ))


def test_the_state_of_a_split_leaf_is_saved_as_one_array(tmp_path):
    tx, dtype = OPTIMIZERS["split"]
    state = jax.tree.map(jnp.ones_like, tx.init(draw(0, dtype)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "step", jax.eval_shape(lambda: state))
    moment: Any = optax.tree.get(restored, "second_moment")["blocks"]["up"]["kernel"]
    assert moment.shape == (3, 1, 8)
    assert moment.all()


def test_a_checkpoint_of_another_layout_is_refused(tmp_path):
    params = draw(0, jnp.float32)
    turned = normuon(RATE, layout={"blocks": MatrixLayout(-1, -2), "dense": None})
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", normuon(RATE).init(params))
        checkpointer.wait_until_finished()
        with pytest.raises(ValueError, match="second_moment|structure"):
            checkpointer.restore(tmp_path / "step", jax.eval_shape(turned.init, params))
