"""bf16 parameters with their low 16 bits kept beside them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_normuon import MatrixLayout, normuon, with_bf16_remainder
from optax_normuon.remainder import join

STEPS = 30


def draw(seed, *shape, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def high_half(x):
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


@pytest.fixture(scope="module")
def both_runs():
    """The same gradients on bf16 parameters with remainder, on fp32 ones, and on plain bf16 ones.

    Update and apply_updates are compiled apart, as two programs that both round the update.
    """
    layout = {"w": MatrixLayout(-1, -2), "b": None}
    inner = normuon(0.02, recipe="normuon_2026_08", weight_decay=1.2, layout=layout)
    start = {"w": high_half(draw(0, 2, 6, 9)), "b": high_half(draw(1, 7))}
    gradients = [{"w": draw((2, t), 2, 6, 9), "b": draw((3, t), 7)} for t in range(STEPS)]
    # As users compile, with fused multiply-adds, which conftest.py's quick compilation leaves out.
    optimized = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    compile_as_users_do = functools.partial(jax.jit, compiler_options=optimized)
    apply = compile_as_users_do(optax.apply_updates)

    def train(tx, params):
        state, update = tx.init(params), compile_as_users_do(tx.update)
        for gradient in gradients:
            updates, state = update(gradient, state, params)
            params = apply(params, updates)
        return params, state

    wide = jax.tree.map(lambda p: p.astype(jnp.float32), start)
    with jax.numpy_dtype_promotion("standard"):
        return (
            train(with_bf16_remainder(inner), start),
            train(inner, wide),
            train(inner, start),
        )


def test_the_joined_weight_is_the_float32_runs_bit_for_bit(both_runs):
    (params, state), (wide, _), (plain, _) = both_runs
    chex.assert_trees_all_equal(join(params, state.remainder), wide)
    assert not np.array_equal(
        plain["w"].astype(jnp.float32), high_half(wide["w"]).astype(jnp.float32)
    )


def test_the_parameter_is_the_high_half(both_runs):
    (params, _), (wide, _), _ = both_runs
    chex.assert_type(jax.tree.leaves(params), jnp.bfloat16)
    chex.assert_trees_all_equal(params, jax.tree.map(high_half, wide))


def test_the_state_costs_two_bytes_a_parameter(both_runs):
    (params, state), _, _ = both_runs
    chex.assert_type(jax.tree.leaves(state.remainder), jnp.uint16)
    chex.assert_trees_all_equal_shapes(state.remainder, params)


def assign(target):
    """A transformation whose update brings a float32 weight to `target`, whatever the gradient."""
    return optax.stateless(lambda updates, params: jax.tree.map(lambda p: target - p, params))


@pytest.mark.parametrize("exponent", [0, -8, -15, -16, -17, -24, -40, -140])
def test_a_weight_that_shrinks_beyond_reach_is_taken_where_it_landed(exponent):
    """No float32 update brings 1.0 to 2^-40: 1 + fl(2^-40 - 1) is 0."""
    old = jnp.asarray([1.0, -1.5, 1.9921875], jnp.bfloat16)
    target = jnp.asarray([1.2345678, 1.7654321, -1.1111111], jnp.float32) * 2.0**exponent
    tx = with_bf16_remainder(assign(target))
    state = tx.init(old)
    with jax.numpy_dtype_promotion("standard"):
        updates, state = tx.update(old, state, old)
        landed = optax.apply_updates(old, updates)
    joined = join(landed, state.remainder)
    intended = old.astype(jnp.float32) + (target - old.astype(jnp.float32))
    # Half a unit in the last place of the old weight, which is below 2.
    chex.assert_trees_all_close(joined, intended, atol=2.0**-24, rtol=0.0)
    chex.assert_trees_all_equal(high_half(joined), landed)
    if exponent >= -15:
        chex.assert_trees_all_equal(joined, intended)


def test_the_high_half_of_the_joined_weight_is_always_the_parameter():
    """The weights walk at random over 40 powers of two; the two are compared after every step."""
    rng = np.random.default_rng(0)
    params = jnp.ones(512, jnp.bfloat16)
    state = with_bf16_remainder(optax.identity()).init(params)
    for _ in range(20):
        target = jnp.asarray(
            rng.standard_normal(512) * 2.0 ** rng.integers(-20, 20, 512), jnp.float32
        )
        with jax.numpy_dtype_promotion("standard"):
            updates, state = with_bf16_remainder(assign(target)).update(params, state, params)
            params = optax.apply_updates(params, updates)
        chex.assert_trees_all_equal(high_half(join(params, state.remainder)), params)


def test_other_dtypes_pass_to_the_inner_transformation():
    params = {"a": jnp.ones((3, 3), jnp.bfloat16), "b": jnp.ones((3, 3), jnp.float32)}
    tx = with_bf16_remainder(optax.sgd(0.1))
    state = tx.init(params)
    assert isinstance(state.remainder["b"], optax.MaskedNode)
    updates, _ = tx.update(params, state, params)
    chex.assert_type(jax.tree.leaves(updates), jnp.float32)
    chex.assert_trees_all_close(updates["b"], jnp.full((3, 3), -0.1))


def test_missing_parameters_get_optaxs_own_message():
    tx = with_bf16_remainder(optax.sgd(0.1))
    with pytest.raises(
        ValueError, match="You are using a transformation that requires the current"
    ):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
