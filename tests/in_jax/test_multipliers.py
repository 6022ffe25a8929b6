"""The multipliers of single leaves and single matrices."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_normuon import (
    MatrixLayout,
    add_cautious_weight_decay,
    scale_by_shape,
)
from tests.in_jax.contract import LEAVES, SHAPES, draw, leaves_that_differ, one_step
from tests.in_jax.schedules import MATRIX, STACK, run
from tests.in_jax.trees import at


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
