"""Optax's contract: hyperparameters in the state."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_normuon
from optax_normuon import STATIC_ARGS, MatrixLayout
from tests.in_jax.contract import LEAVES, draw, leaves_that_differ, run


def injected(normuon, *arguments, hyperparam_dtype=None, **keywords):
    make = optax.inject_hyperparams(
        normuon, static_args=STATIC_ARGS, hyperparam_dtype=hyperparam_dtype
    )
    return make(*arguments, **keywords)


@pytest.fixture
def standard_promotion():
    """Optax's Adam computes 1 - b1 and its power of the step count from whatever it is given."""
    with jax.numpy_dtype_promotion("standard"):
        yield


CONSTANTS = {
    "rate": dict(learning_rate=0.1, weight_decay=0.2),
    "all": dict(
        learning_rate=0.1,
        weight_decay=0.2,
        momentum=0.9,
        beta2=0.8,
        adam_learning_rate=0.05,
        adam_b1=0.8,
        adam_b2=0.9,
        adam_eps=1e-6,
        adam_weight_decay=0.1,
    ),
    "static": dict(
        learning_rate=0.1,
        compute_dtype=jnp.float32,
        momentum_dtype=jnp.float32,
        layout=optax_normuon.layout_by_path({"blocks/*": MatrixLayout(2, 1)}),
        lr_mul=lambda params: jax.tree.map(lambda p: float(p.ndim), params),
        wd_mul=lambda params: {"blocks": params["blocks"]["up"]["kernel"].ndim, "dense": 1.0},
        weight_decay=0.1,
        nesterov=False,
        shape_scale="spectral",
        max_stack_bytes=1,
    ),
    "orthogonalizer": dict(learning_rate=0.1, orthogonalizer=lambda stack: stack / 2),
    "recipe": dict(learning_rate=0.1, recipe="dion_normuon", weight_decay=0.1),
}


@pytest.mark.parametrize("keywords", CONSTANTS.values(), ids=CONSTANTS.keys())
def test_injected_constants_make_the_same_steps(normuon, keywords):
    if "orthogonalizer" in keywords and normuon is not optax_normuon.normuon:
        pytest.skip("the kernels have their own orthogonalization")
    params, gradients = draw(0), [draw(1), draw(2)]
    after, state = run(injected(normuon, **keywords), params, gradients)
    plain, _ = run(normuon(**keywords), params, gradients)
    # Not bit-equal: the constants are float32 now, where Optax's Adam has Python's 1 - b1.
    chex.assert_trees_all_close(after, plain, rtol=1e-5, atol=1e-6)
    numbers = {name for name, value in keywords.items() if type(value) is float}
    assert numbers <= set(state.hyperparams)
    assert not set(STATIC_ARGS) & set(state.hyperparams)
    default, _ = run(normuon(0.1), params, gradients)
    stacks = [tree["blocks"]["up"]["kernel"] for tree in (after, default)]
    assert not jnp.allclose(*stacks, rtol=1e-3)


def test_an_injected_schedule_makes_the_steps_of_a_plain_one(normuon):
    params, gradients = draw(0), [draw(1), draw(2), draw(3)]
    keywords: dict[str, Any] = dict(
        learning_rate=optax.linear_schedule(0.1, 0.0, 4),
        momentum=optax.linear_schedule(0.8, 0.95, 4),
        weight_decay=optax.linear_schedule(0.4, 0.1, 4),
    )
    after, state = run(injected(normuon, **keywords), params, gradients)
    plain, _ = run(normuon(**keywords), params, gradients)
    chex.assert_trees_all_close(after, plain, rtol=1e-5, atol=1e-6)
    assert leaves_that_differ(after, run(normuon(0.1), params, gradients)[0]) == LEAVES
    # The values of the third step.
    chex.assert_trees_all_close(state.hyperparams["learning_rate"], jnp.float32(0.05), rtol=1e-6)
    chex.assert_trees_all_close(state.hyperparams["momentum"], jnp.float32(0.875), rtol=1e-6)


def test_a_rate_set_in_the_state_takes_effect(normuon):
    params, gradients = draw(0), draw(1)
    tx = injected(normuon, 0.1)
    state: Any = tx.init(params)
    updates, _ = tx.update(gradients, state, params)
    state.hyperparams["learning_rate"] = jnp.asarray(0.2, jnp.float32)
    doubled, state = tx.update(gradients, state, params)
    chex.assert_trees_all_close(doubled, jax.tree.map(lambda u: 2 * u, updates), rtol=1e-6)
    assert state.hyperparams["learning_rate"] == jnp.float32(0.2)


def test_injected_state_types_never_change(normuon):
    params, gradients = draw(0, jnp.bfloat16), draw(1, jnp.bfloat16)
    tx = injected(
        normuon, optax.linear_schedule(0.1, 0.0, 4), weight_decay=0.1, hyperparam_dtype=jnp.float32
    )
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, gradients, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


def test_float32_hyperparameters_spare_bfloat16_parameters_a_rounding(normuon):
    params, gradients = draw(0, jnp.bfloat16), [draw(1, jnp.bfloat16), draw(2, jnp.bfloat16)]
    keywords: dict[str, Any] = dict(beta2=0.95, momentum=0.9, compute_dtype=jnp.float32)
    _, exact = run(
        injected(normuon, 0.1, **keywords, hyperparam_dtype=jnp.float32), params, gradients
    )
    _, rounded = run(injected(normuon, 0.1, **keywords), params, gradients)
    _, plain = run(normuon(0.1, **keywords), params, gradients)
    assert float(exact.hyperparams["beta2"]) == np.float32(0.95)
    assert float(rounded.hyperparams["beta2"]) == 0.94921875
    for statistic in ("momentum", "second_moment"):
        want = optax.tree.get(plain, statistic)["blocks"]["up"]["kernel"]
        got, off = (
            optax.tree.get(state.inner_state, statistic)["blocks"]["up"]["kernel"]
            for state in (exact, rounded)
        )
        chex.assert_trees_all_close(got, want, rtol=1e-5)
        assert not jnp.allclose(off, want, rtol=1e-3)
