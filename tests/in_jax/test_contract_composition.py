"""Optax's contract: chains, masks, partitions and accumulation, and recipes as data."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import optax_normuon
from optax_normuon import RECIPES
from tests.in_jax.contract import (
    LAYOUT,
    LEAVES,
    OPTIMIZERS,
    SPLIT,
    STAGES,
    TRANSFORMATIONS,
    draw,
    leaves_that_differ,
    one_step,
    run,
    without,
)
from tests.in_jax.trees import at


@pytest.mark.parametrize("path", LEAVES, ids="/".join)
def test_masked_leaves_pass_and_the_others_make_the_same_step(normuon, path):
    params, gradients = draw(0), draw(1)
    mask = without(jax.tree.map(lambda _: True, params), path, False)
    plain, masked = (
        normuon(0.1, weight_decay=0.1),
        optax.masked(normuon(0.1, weight_decay=0.1), mask),
    )
    everywhere, _ = one_step(plain, gradients, params)
    updates, _ = one_step(masked, gradients, params)
    chex.assert_trees_all_equal(at(updates, path), at(gradients, path))
    assert leaves_that_differ(updates, everywhere) == [path]


@pytest.mark.parametrize("layout", [None, LAYOUT, SPLIT], ids=["routed", "tree", "split"])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_masking_works_with_every_transformation(name, layout):
    params, gradients = draw(0), draw(1)
    for hidden in (*LEAVES, ()):
        mask = without(jax.tree.map(lambda _: True, params), hidden, False)
        tx = optax.masked(TRANSFORMATIONS[name](layout=layout), mask)
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, gradients, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, gradients)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def test_partition_gives_each_leaf_its_own_optimizer(normuon):
    params, gradients = draw(0), draw(1)
    labels = {"blocks": "slow", "dense": {"bias": "sgd", "kernel": "fast"}}
    slow, fast = normuon(0.1), normuon(0.4)
    tx = optax.partition({"slow": slow, "fast": fast, "sgd": optax.sgd(1.0)}, labels)
    updates, _ = one_step(tx, gradients, params)
    slowly, _ = one_step(slow, gradients, params)
    quickly, _ = one_step(fast, gradients, params)
    chex.assert_trees_all_equal(updates["blocks"], slowly["blocks"])
    chex.assert_trees_all_equal(updates["dense"]["kernel"], quickly["dense"]["kernel"])
    chex.assert_trees_all_equal(updates["dense"]["bias"], -gradients["dense"]["bias"])
    assert leaves_that_differ(slowly, quickly) == LEAVES


def test_a_clipped_chain_equals_clipping_by_hand(normuon):
    params = draw(0)
    gradients = [draw(1), jax.tree.map(lambda g: 100 * g, draw(2)), draw(3)]
    clip = optax.clip_by_global_norm(1.0)
    by_hand = [clip.update(gradient, clip.init(params))[0] for gradient in gradients]
    chained, _ = run(optax.chain(clip, normuon(0.1)), params, gradients)
    chex.assert_trees_all_equal(chained, run(normuon(0.1), params, by_hand)[0])
    assert leaves_that_differ(chained, run(normuon(0.1), params, gradients)[0]) == LEAVES


def test_muon_is_the_chain_of_its_stages():
    params, gradients = draw(0), [draw(1), draw(2)]
    matrices = {**params, "dense": {"kernel": params["dense"]["kernel"]}}
    gradients = [{**g, "dense": {"kernel": g["dense"]["kernel"]}} for g in gradients]
    stages = [
        optax_normuon.lerp_momentum(),
        optax_normuon.orthogonalize(),
        optax_normuon.add_cautious_weight_decay(0.1),
        optax_normuon.scale_by_shape("original"),
        optax.scale_by_learning_rate(0.1),
    ]
    whole, _ = run(OPTIMIZERS["muon"](), matrices, gradients)
    chex.assert_trees_all_equal(run(optax.chain(*stages), matrices, gradients)[0], whole)

    with_neurons = [*stages[:2], optax_normuon.normalize_neurons(), *stages[2:]]
    nor, _ = run(OPTIMIZERS["normuon"](), matrices, gradients)
    # Between two stages apart the compute dtype is rounded to float32 and back, which loses nothing.
    chex.assert_trees_all_close(
        run(optax.chain(*with_neurons), matrices, gradients)[0], nor, rtol=1e-2, atol=1e-3
    )
    chained = optax.chain(optax_normuon.scale_by_normuon(), *stages[2:])
    chex.assert_trees_all_equal(run(chained, matrices, gradients)[0], nor)
    assert not jnp.array_equal(nor["blocks"]["up"]["kernel"], whole["blocks"]["up"]["kernel"])


@pytest.mark.parametrize("name", [*STAGES, "scale_by_normuon"])
def test_each_stage_can_stand_alone_in_a_chain(name):
    params, gradients = draw(0), draw(1)
    stage = {**STAGES, **OPTIMIZERS}[name]()
    tx = optax.chain(optax.clip_by_global_norm(1.0), stage, optax.scale_by_learning_rate(0.1))
    updates, _ = one_step(tx, gradients, params)
    chex.assert_tree_all_finite(updates)
    clipped_sgd = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_learning_rate(0.1))
    plain, _ = one_step(clipped_sgd, gradients, params)
    changed = leaves_that_differ(updates, plain)
    on_matrices = name in ("equilibrate_rows", "orthogonalize", "set_norm", "normalize_neurons")
    if name == "scale_by_shape":
        # The 6x7 matrix has more inputs than outputs, so its factor is 1.
        assert changed == [("blocks", "up", "kernel")]
    else:
        assert changed == [path for path in LEAVES if not (on_matrices and "bias" in path)]


def test_two_accumulated_gradients_make_the_step_of_their_mean(normuon):
    params, first, second = draw(0), draw(1), draw(2)
    tx = normuon(0.1, weight_decay=0.1, compute_dtype=jnp.float32)
    accumulating = optax.MultiSteps(tx, every_k_schedule=2)

    @jax.jit
    def accumulate(gradients, state, params):
        # Optax multiplies the updates by a boolean.
        with jax.numpy_dtype_promotion("standard"):
            return accumulating.update(gradients, state, params)

    nothing, state = accumulate(first, accumulating.init(params), params)
    updates, state = accumulate(second, state, params)
    chex.assert_trees_all_equal(nothing, optax.tree.zeros_like(params))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    of_the_mean, _ = one_step(tx, mean, params)
    of_one, _ = one_step(tx, first, params)
    chex.assert_trees_all_close(updates, of_the_mean, rtol=1e-4, atol=1e-6)
    assert float(jnp.abs(of_one["dense"]["kernel"] - updates["dense"]["kernel"]).max()) > 1e-3
    assert accumulating.has_updated(state)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf], ids=["nan", "inf"])
def test_a_bad_gradient_reaches_only_its_own_matrix(normuon, bad):
    params, gradients = draw(0), draw(1)
    spoiled = gradients["blocks"]["up"]["kernel"].at[1, 0, 0].set(bad)
    tx = normuon(0.1)
    clean, _ = one_step(tx, gradients, params)
    updates, _ = one_step(tx, without(gradients, ("blocks", "up", "kernel"), spoiled), params)
    stack, clean_stack = updates["blocks"]["up"]["kernel"], clean["blocks"]["up"]["kernel"]
    assert jnp.isnan(stack[1]).all()
    chex.assert_trees_all_equal((stack[0], stack[2]), (clean_stack[0], clean_stack[2]))
    chex.assert_trees_all_equal(updates["dense"], clean["dense"])


def test_apply_if_finite_rejects_a_bad_step_and_keeps_the_state(normuon):
    params, gradients = draw(0), draw(1)
    tx = normuon(0.1, compute_dtype=jnp.float32)
    guarded = optax.apply_if_finite(tx, max_consecutive_errors=3)
    update = jax.jit(guarded.update)
    _, state = update(gradients, guarded.init(params), params)
    for path in LEAVES:
        spoiled = without(gradients, path, at(gradients, path).at[0].set(jnp.nan))
        updates, after = update(spoiled, state, params)
        chex.assert_trees_all_equal(updates, optax.tree.zeros_like(params))
        chex.assert_trees_all_equal(after.inner_state, state.inner_state)
        assert not after.last_finite
    resumed, _ = update(gradients, after, params)
    uninterrupted, _ = update(gradients, state, params)
    chex.assert_trees_all_equal(resumed, uninterrupted)
    assert float(jnp.abs(resumed["blocks"]["up"]["kernel"]).min()) > 0


def test_a_recipe_object_and_its_name_make_the_same_step(normuon):
    params, gradients = draw(0), [draw(1)]
    named, _ = run(normuon(0.1, recipe="moonlight"), params, gradients)
    chex.assert_trees_all_equal(
        run(normuon(0.1, recipe=RECIPES["moonlight"]), params, gradients)[0], named
    )
    variant = dataclasses.replace(RECIPES["moonlight"], shape_scale="spectral")
    changed = leaves_that_differ(run(normuon(0.1, recipe=variant), params, gradients)[0], named)
    assert changed == [path for path in LEAVES if "bias" not in path]
