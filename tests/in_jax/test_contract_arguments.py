"""Optax's contract: extra arguments, missing parameters, compilation and vmap."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import optax_normuon
from tests.in_jax.contract import LEAVES, OPTIMIZERS, TRANSFORMATIONS, draw, leaves_that_differ, run
from tests.in_jax.trees import at


@pytest.mark.parametrize("name", [*OPTIMIZERS, "with_bf16_remainder"])
def test_extra_arguments_are_tolerated(name):
    params, gradients = draw(0), draw(1)
    tx = TRANSFORMATIONS[name]()
    state = jax.eval_shape(tx.init, params)
    for other in (tx, optax.chain(tx, optax.identity())):
        state = jax.eval_shape(other.init, params)
        updates, _ = jax.eval_shape(
            lambda g, s, p, other=other: other.update(g, s, p, value=jnp.ones([]), loss="unused"),
            gradients,
            state,
            params,
        )
        chex.assert_trees_all_equal_shapes(updates, params)


def test_extra_arguments_change_nothing(normuon):
    params, gradients = draw(0), [draw(1), draw(2)]
    tx = normuon(0.1)
    chex.assert_trees_all_equal(
        run(tx, params, gradients, value=1.0, grad=gradients[0]), run(tx, params, gradients)
    )


@pytest.mark.parametrize(
    "name", ["normuon", "muon", "add_cautious_weight_decay", "with_bf16_remainder"]
)
def test_missing_parameters_are_asked_for_in_optax_words(name):
    tx, params = TRANSFORMATIONS[name](), draw(0)
    state = jax.eval_shape(tx.init, params)
    with pytest.raises(ValueError, match="params") as own:
        optax.add_decayed_weights(0.1).update(params, optax.EmptyState(), None)
    with pytest.raises(ValueError, match="params") as raised:
        tx.update(params, state)
    assert str(raised.value) == str(own.value)


def test_scale_by_normuon_needs_no_parameters():
    gradients = draw(1)
    tx = optax_normuon.scale_by_normuon()
    alone, _ = tx.update(gradients, tx.init(gradients))
    with_params, _ = tx.update(gradients, tx.init(gradients), draw(0))
    chex.assert_trees_all_equal(alone, with_params)


def test_a_step_compiles_once_and_may_donate_its_state(normuon):
    params = draw(0)
    rate = optax.linear_schedule(0.1, 0.0, 10)
    tx = normuon(rate, weight_decay=0.1, compute_dtype=jnp.float32)
    step: Any = jax.jit(tx.update, donate_argnums=1)
    state = tx.init(params)
    for seed in range(4):
        before, (updates, state) = state, step(draw(seed), state, params)
        params = optax.apply_updates(params, updates)
        assert at(optax.tree.get(before, "momentum"), ("dense", "kernel")).is_deleted()
    assert step._cache_size() == 1
    step(draw(5, jnp.bfloat16), state, params)
    assert step._cache_size() == 2


def test_a_jitted_step_agrees_with_an_eager_one(normuon):
    params, gradients = draw(0), [draw(1), draw(2)]
    tx = normuon(0.1, weight_decay=0.1, compute_dtype=jnp.float32)
    jitted = optax.GradientTransformation(tx.init, jax.jit(tx.update))
    chex.assert_trees_all_close(
        run(jitted, params, gradients)[0], run(tx, params, gradients)[0], rtol=1e-5, atol=1e-5
    )


@pytest.fixture
def steps_over_rates(normuon):
    """Two steps as a function of the learning rate and the seed's data, compiled for three of them."""

    def train(rate, params, first, second):
        tx = normuon(rate, weight_decay=rate, compute_dtype=jnp.float32)
        return run(tx, params, [first, second])[0]

    return train


def test_vmap_over_learning_rates_equals_separate_runs(steps_over_rates):
    params, first, second = draw(0), draw(1), draw(2)
    rates = jnp.asarray([0.0, 0.01, 0.1], jnp.float32)
    together = jax.jit(jax.vmap(steps_over_rates, in_axes=(0, None, None, None)))(
        rates, params, first, second
    )
    for i, rate in enumerate(rates):
        ran = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        alone = steps_over_rates(float(rate), params, first, second)
        chex.assert_trees_all_close(ran, alone, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[0], together), params)
    assert (
        leaves_that_differ(*(jax.tree.map(lambda x, i=i: x[i], together) for i in (1, 2))) == LEAVES
    )


def test_vmap_over_seeds_equals_separate_runs(steps_over_rates):
    trees = [[draw(10 * seed + i) for i in range(3)] for seed in range(3)]
    stacked = [
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *which)
        for which in zip(*trees, strict=True)
    ]
    together = jax.jit(jax.vmap(steps_over_rates, in_axes=(None, 0, 0, 0)))(0.1, *stacked)
    for i, tree in enumerate(trees):
        ran = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        chex.assert_trees_all_close(ran, steps_over_rates(0.1, *tree), rtol=1e-5, atol=1e-5)
        assert leaves_that_differ(ran, steps_over_rates(0.1, *trees[i - 1])) == LEAVES
