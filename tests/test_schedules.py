"""Schedules against constants, and the multipliers of single leaves and single matrices."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_normuon import (
    RECIPES,
    MatrixLayout,
    add_cautious_weight_decay,
    bias_corrected_momentum,
    heavy_ball_momentum,
    lerp_momentum,
    scale_by_shape,
)

SHAPES = {"blocks": {"up": {"kernel": (3, 6, 7)}}, "dense": {"bias": (6,), "kernel": (7, 6)}}
STACK, VECTOR, MATRIX = ("blocks", "up", "kernel"), ("dense", "bias"), ("dense", "kernel")
LEAVES = [STACK, VECTOR, MATRIX]
RATE_TWICE = [name for name, recipe in RECIPES.items() if recipe.decay.rate_power == 2]


def draw(seed, dtype=jnp.float32) -> Any:
    """A tree with a stack of three matrices, a matrix and a vector."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(random.normal(size=shape), dtype),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def at(tree: Any, path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def one_step(tx, gradients, params) -> Any:
    """Updates and state after the first step."""
    return tx.update(gradients, tx.init(params), params)


def run(tx, steps=2) -> Any:
    """Parameters after some steps on fixed gradients, and the state."""
    params = draw(0)
    state = tx.init(params)
    for seed in range(1, steps + 1):
        updates, state = tx.update(draw(seed), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def leaves_that_differ(left, right):
    """Paths of SHAPES's leaves that differ by more than rounding; the others must be bit-equal."""
    differ = []
    for path in LEAVES:
        pair = [np.asarray(at(tree, path), np.float32) for tree in (left, right)]
        if np.array_equal(*pair):
            continue
        assert not np.allclose(*pair, rtol=1e-4, atol=1e-5), f"{path} differs by rounding alone"
        differ.append(path)
    return differ


def constant(value):
    return lambda count: value


def falling(start):
    """A schedule with a new value at each of the first three steps."""
    return lambda count: start / (1 + count.astype(jnp.float32))


# Schedules

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
def test_a_traced_value_is_a_constant_too(normuon, name):
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
    base = {"learning_rate": 0.1, "recipe": recipe}
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


# Multipliers


def scaled(updates, factors) -> Any:
    """Each leaf's updates times its factor."""
    return jax.tree.map(lambda u, k: u * jnp.asarray(k, u.dtype), updates, factors)


PER_MATRIX = np.asarray([0.5, 1.0, 2.0], np.float32)
MULTIPLIERS = {
    "scalar": (2.0, [2.0, 2.0, 2.0]),
    "integer": (2, [2.0, 2.0, 2.0]),
    "array scalar": (jnp.float32(2.0), [2.0, 2.0, 2.0]),
    "tree": (
        {"blocks": {"up": {"kernel": 0.5}}, "dense": {"bias": 4.0, "kernel": 2.0}},
        [0.5, 4.0, 2.0],
    ),
    "prefix": ({"blocks": 0.5, "dense": 2.0}, [0.5, 2.0, 2.0]),
    "prefix with None": ({"blocks": None, "dense": 2.0}, [1.0, 2.0, 2.0]),
    "per matrix": (
        {"blocks": PER_MATRIX, "dense": 1.0},
        [PER_MATRIX[:, None, None], 1.0, 1.0],
    ),
    "callable": (
        lambda params: jax.tree.map(lambda p: 0.5 if p.ndim == 3 else 2.0, params),
        [0.5, 2.0, 2.0],
    ),
    "callable to a number": (lambda params: 0.5, [0.5, 0.5, 0.5]),
}


def as_factors(values) -> Any:
    """One value a leaf, shaped to broadcast along the leaf."""
    stack, vector, matrix = (
        jnp.broadcast_to(jnp.asarray(value, jnp.float32), at(SHAPES, path))
        for value, path in zip(values, LEAVES, strict=True)
    )
    return {"blocks": {"up": {"kernel": stack}}, "dense": {"bias": vector, "kernel": matrix}}


def updates_with(normuon, **keywords) -> Any:
    params = draw(0)
    tx = normuon(0.1, weight_decay=0.5, adam_weight_decay=0.5, **keywords)
    return one_step(tx, draw(1), params)[0]


@pytest.mark.parametrize("given", MULTIPLIERS.values(), ids=MULTIPLIERS.keys())
def test_lr_mul_scales_the_updates_of_its_leaf(normuon, given):
    lr_mul, values = given
    # Powers of two, so that equality is exact; the default recipe scales its decay too.
    want = scaled(updates_with(normuon), as_factors(values))
    chex.assert_trees_all_equal(updates_with(normuon, lr_mul=lr_mul), want)
    assert leaves_that_differ(want, updates_with(normuon)) != []


@pytest.mark.parametrize("given", MULTIPLIERS.values(), ids=MULTIPLIERS.keys())
def test_wd_mul_scales_the_decay_of_its_leaf(normuon, given):
    wd_mul, values = given
    none = updates_with(normuon, wd_mul=0.0)
    decay = optax.tree.sub(updates_with(normuon), none)
    got = optax.tree.sub(updates_with(normuon, wd_mul=wd_mul), none)
    want = scaled(decay, as_factors(values))
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-6)
    assert all(float(jnp.abs(leaf).max()) > 1e-3 for leaf in jax.tree.leaves(decay))


def test_a_decay_outside_the_scale_does_not_feel_lr_mul(normuon):
    params, nothing = draw(0), optax.tree.zeros_like(draw(0))
    for recipe, factor in (("normuon", 4.0), ("muon_keller", 1.0)):
        plain, slow = (
            one_step(tx, nothing, params)[0]
            for tx in (
                normuon(0.1, recipe=recipe, weight_decay=0.5),
                normuon(0.1, recipe=recipe, weight_decay=0.5, lr_mul=4.0),
            )
        )
        for path in (STACK, MATRIX):
            assert at(plain, path).any()
            chex.assert_trees_all_close(at(slow, path), factor * at(plain, path), rtol=1e-6)


@pytest.mark.parametrize("path", LEAVES, ids="/".join)
def test_a_leaf_with_lr_mul_zero_does_not_move(normuon, path):
    lr_mul = jax.tree_util.tree_map_with_path(
        lambda keys, _: 0.0 if tuple(key.key for key in keys) == path else 1.0, draw(0)
    )
    start = draw(0)
    after, _ = run(normuon(0.1, weight_decay=0.5, adam_weight_decay=0.5, lr_mul=lr_mul))
    plain, _ = run(normuon(0.1, weight_decay=0.5, adam_weight_decay=0.5))
    assert leaves_that_differ(after, start) == [other for other in LEAVES if other != path]
    assert leaves_that_differ(after, plain) == [path]


def test_one_matrix_of_a_stack_can_be_frozen(normuon):
    frozen = {"blocks": np.asarray([1.0, 0.0, 1.0], np.float32), "dense": None}
    start, (after, _) = draw(0), run(normuon(0.1, weight_decay=0.5, lr_mul=frozen))
    moved = [
        not jnp.array_equal(*pair) for pair in zip(at(after, STACK), at(start, STACK), strict=True)
    ]
    assert moved == [True, False, True]


def test_multipliers_reach_batch_axes_wherever_they_stand():
    # Two batch axes with the matrix's sides between them.
    params = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 4, 3)), jnp.float32)
    factors = np.asarray([[1.0, 2.0, 4.0], [0.5, 0.0, 8.0]], np.float32)
    tx = scale_by_shape("none", lr_mul=factors, layout=MatrixLayout(1, 2))
    updates, _ = tx.update(params, tx.init(params))
    chex.assert_trees_all_equal(updates, params * factors[:, None, None, :])


def test_multipliers_may_be_traced():
    params = draw(0)

    def update(factor):
        tx = scale_by_shape("none", lr_mul={"blocks": factor, "dense": factor[0]})
        return tx.update(params, tx.init(params))[0]

    per_matrix = jax.jit(update)(jnp.asarray(PER_MATRIX))
    chex.assert_trees_all_equal(
        per_matrix, scaled(params, as_factors([PER_MATRIX[:, None, None], 0.5, 0.5]))
    )


def test_a_decay_stage_alone_takes_wd_mul():
    params, updates = draw(0), draw(1)
    wd_mul = {"blocks": PER_MATRIX, "dense": {"bias": 0.0, "kernel": 2.0}}
    tx = add_cautious_weight_decay(0.5, cautious=False, wd_mul=wd_mul)
    decayed, _ = one_step(tx, updates, params)
    factors = as_factors([PER_MATRIX[:, None, None], 0.0, 2.0])
    want = optax.tree.add(updates, scaled(scaled(params, factors), as_factors([0.5] * 3)))
    chex.assert_trees_all_close(decayed, want, rtol=1e-6)
    assert leaves_that_differ(decayed, updates) == [STACK, MATRIX]


@pytest.mark.parametrize("name", ["lr_mul", "wd_mul"])
@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ({"blocks": np.ones(2, np.float32), "dense": 1.0}, r"blocks/up/kernel: .* shape \(2,\)"),
        ({"blocks": np.ones((3, 1, 1), np.float32), "dense": 1.0}, r"batch axes of shape \(3,\)"),
        ({"blocks": 1.0, "dense": np.ones(6, np.float32)}, "dense/bias: .* no batch axes"),
        ({"blocks": 1.0}, "does not match the parameters"),
    ],
    ids=["wrong length", "not reduced to the batch", "on a vector", "no prefix"],
)
def test_a_multiplier_that_does_not_fit_is_refused_by_name(normuon, name, value, complaint):
    with pytest.raises(ValueError, match=complaint) as raised:
        normuon(0.1, **{name: value}).init(draw(0))
    assert name in str(raised.value)
