"""Schedules against constants."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from optax_normuon import (
    RECIPES,
    bias_corrected_momentum,
    heavy_ball_momentum,
    lerp_momentum,
)
from tests.in_jax.contract import LEAVES, draw, leaves_that_differ, one_step
from tests.in_jax.engines import engine_of
from tests.in_jax.schedules import MATRIX, STACK, VECTOR, run
from tests.in_jax.trees import at

RATE_TWICE = [name for name, recipe in RECIPES.items() if recipe.decay.rate_power == 2]


def constant(value):
    return lambda count: value


def falling(start):
    """A schedule with a new value at each of the first three steps."""
    return lambda count: start / (1 + count.astype(jnp.float32))


# What is scheduled, and which leaves it reaches.
SCHEDULED = {
    "learning_rate": (0.1, LEAVES),
    "momentum": (0.9, [STACK, MATRIX]),
    "weight_decay": (0.5, [STACK, MATRIX]),
    "adam_learning_rate": (0.05, [VECTOR]),
    "adam_weight_decay": (0.5, [VECTOR]),
}


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_constant_schedule_equals_its_constant_bit_for_bit(normuon, name):
    value, reaches = SCHEDULED[name]
    base = {"learning_rate": 0.2}
    after, state = run(normuon(**{**base, name: constant(value)}))
    number, number_state = run(normuon(**{**base, name: value}))
    chex.assert_trees_all_equal(after, number)
    chex.assert_trees_all_equal(state, number_state)
    falls, _ = run(normuon(**{**base, name: falling(value)}))
    assert leaves_that_differ(falls, number) == reaches


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_traced_value_makes_the_steps_of_a_constant(normuon, name):
    value, reaches = SCHEDULED[name]
    base = {"learning_rate": 0.2}
    traced, _ = run(normuon(**{**base, name: jnp.asarray(value, jnp.float32)}))
    number, _ = run(normuon(**{**base, name: value}))
    chex.assert_trees_all_equal(traced, number)
    other, _ = run(normuon(**{**base, name: jnp.asarray(value / 2, jnp.float32)}))
    assert leaves_that_differ(other, number) == reaches


@pytest.mark.parametrize("name", ["learning_rate", "momentum", "weight_decay"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_constants_and_schedules_share_one_state_structure(normuon, recipe, name):
    base = {"learning_rate": 0.1, "recipe": recipe, **engine_of(recipe)}
    params = draw(0)
    with_number = jax.eval_shape(normuon(**{**base, name: 0.5}).init, params)
    with_schedule = jax.eval_shape(normuon(**{**base, name: falling(0.5)}).init, params)
    chex.assert_trees_all_equal_structs(with_schedule, with_number)
    chex.assert_trees_all_equal_shapes_and_dtypes(with_schedule, with_number)


def test_a_schedule_reads_the_number_of_steps_done(normuon):
    rates = jnp.asarray([0.3, 0.0, 0.1], jnp.float32)
    seen = []

    def schedule(count):
        seen.append(int(count))
        return rates[count]

    tx, params = normuon(schedule), draw(0)
    state, moved = tx.init(params), []
    for seed in range(1, 4):
        updates, state = tx.update(draw(seed), state, params)
        moved.append([bool(leaf.any()) for leaf in jax.tree.leaves(updates)])
    assert moved == [[True] * 3, [False] * 3, [True] * 3]
    assert sorted(set(seen)) == [0, 1, 2]


def test_a_momentum_schedule_uses_each_steps_own_value():
    g = draw(1)["dense"]["kernel"]
    values = [0.5, 0.25]
    schedule = lambda count: jnp.asarray(values, jnp.float32)[count]  # noqa: E731
    lerped, summed = [], []
    for make, directions in ((lerp_momentum, lerped), (heavy_ball_momentum, summed)):
        tx = make(schedule, nesterov=False)
        state = tx.init(g)
        for _ in values:
            direction, state = tx.update(g, state)
            directions.append(direction)
    chex.assert_trees_all_close(lerped, [0.5 * g, 0.875 * g], rtol=1e-6)
    chex.assert_trees_all_close(summed, [g, 1.25 * g], rtol=1e-6)


@pytest.mark.parametrize(
    "make", [lerp_momentum, heavy_ball_momentum, bias_corrected_momentum], ids=lambda f: f.__name__
)
def test_each_momentum_takes_a_schedule(make):
    params = draw(0)

    def second_direction(momentum):
        tx = make(momentum)
        _, state = tx.update(draw(1), tx.init(params))
        return tx.update(draw(2), state)[0]

    chex.assert_trees_all_equal(second_direction(constant(0.9)), second_direction(0.9))
    assert leaves_that_differ(second_direction(falling(0.9)), second_direction(0.9)) == LEAVES


@pytest.mark.parametrize("recipe", RATE_TWICE[:1])  # They share the rule.
def test_a_rate_that_enters_twice_scales_the_decay_by_its_square(normuon, recipe):
    # With a zero gradient only the decay moves a matrix, and cautious decay counts that as agreement.
    params = draw(0)
    nothing = optax.tree.zeros_like(params)

    def decay(learning_rate, weight_decay: Any = 0.5):
        tx = normuon(learning_rate, weight_decay=weight_decay, recipe=recipe, shape_scale="none")
        state = tx.init(params)
        first, state = tx.update(nothing, state, params)
        second, _ = tx.update(nothing, state, params)
        return first, second

    for path in (STACK, MATRIX):
        first, second = (at(updates, path) for updates in decay(falling(0.2)))
        chex.assert_trees_all_close(first, -0.2 * 0.2 * 0.5 * at(params, path), rtol=1e-5)
        chex.assert_trees_all_close(second, -0.1 * 0.1 * 0.5 * at(params, path), rtol=1e-5)
        once = normuon(0.2, weight_decay=0.5, shape_scale="none")
        decayed, _ = one_step(once, nothing, params)
        chex.assert_trees_all_close(at(decayed, path), -0.2 * 0.5 * at(params, path), rtol=1e-5)
    chex.assert_trees_all_equal(decay(constant(0.2)), decay(0.2))
    chex.assert_trees_all_equal(decay(0.2, constant(0.5)), decay(0.2))


def test_adamw_has_the_learning_rate_until_it_is_given_its_own(normuon):
    both, _ = run(normuon(0.1))
    apart, _ = run(normuon(0.1, adam_learning_rate=0.3))
    shared, _ = run(normuon(0.3))
    assert leaves_that_differ(apart, both) == [VECTOR]
    assert leaves_that_differ(apart, shared) == [STACK, MATRIX]


def test_the_adamw_part_is_optax_adamw(normuon):
    keywords: dict[str, Any] = dict(b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.3)
    tx = optax.adamw(0.1, **keywords)
    with jax.numpy_dtype_promotion("standard"):  # Optax raises b1 to its integer step count
        whole, _ = run(tx)
    mine, _ = run(normuon(0.1, adam_b1=0.8, adam_b2=0.9, adam_eps=1e-6, adam_weight_decay=0.3))
    chex.assert_trees_all_close(at(mine, VECTOR), at(whole, VECTOR), rtol=1e-6)
    assert not jnp.allclose(at(mine, MATRIX), at(whole, MATRIX), rtol=1e-2)
