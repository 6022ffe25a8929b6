"""Optax's contract: state trees, and the remainder of bfloat16 parameters."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_normuon import with_bf16_remainder
from tests.in_jax.contract import LAYOUT, SPLIT, TRANSFORMATIONS, draw, one_step
from tests.in_jax.trees import at


def is_masked(node):
    return isinstance(node, optax.MaskedNode)


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"layout": LAYOUT},
        {"layout": lambda params: jax.tree.map(lambda p: None, params)},
        {"lr_mul": lambda params: {"blocks": 0.5, "dense": params["dense"]["bias"][0]}},
        {"wd_mul": {"blocks": np.ones(3, np.float32), "dense": 1.0}},
    ],
    ids=["routed", "tree", "callable", "lr_mul callable", "wd_mul per matrix"],
)
def test_map_params_pairs_the_state_with_a_tree_like_the_parameters(normuon, keywords):
    params = draw(0)
    names = {
        "blocks": {"up": {"kernel": "stack"}},
        "dense": {"bias": "vector", "kernel": "matrix"},
    }
    tx = normuon(0.1, **keywords)
    paired = optax.tree.map_params(
        tx,
        lambda leaf, name: leaf if is_masked(leaf) else f"{name} {leaf.shape}",
        tx.init(params),
        names,
        transform_non_params=lambda leaf: "count",
        is_leaf=is_masked,
    )
    found = {leaf for leaf in jax.tree.leaves(paired, is_leaf=is_masked) if not is_masked(leaf)}
    if keywords.get("layout") not in (None, LAYOUT):
        assert found == {"stack (3, 6, 7)", "matrix (7, 6)", "vector (6,)", "count"}
        return
    statistics = {"stack (3, 1, 7)", "matrix (1, 6)"}
    assert found == {"stack (3, 6, 7)", "matrix (7, 6)", "vector (6,)", "count", *statistics}
    momentum = optax.tree.get(paired, "momentum")
    assert momentum["dense"]["kernel"] == "matrix (7, 6)"
    assert is_masked(momentum["dense"]["bias"])


def test_map_params_reaches_the_blocks_of_a_split_leaf_together(normuon):
    params = draw(0)
    names = {"blocks": {"up": {"kernel": "stack"}}, "dense": {"bias": "vector", "kernel": "matrix"}}
    tx = normuon(0.1, layout=SPLIT)
    paired: Any = optax.tree.map_params(
        tx,
        lambda leaf, name: leaf if is_masked(leaf) else (name, jax.tree.map(jnp.shape, leaf)),
        tx.init(params),
        names,
        is_leaf=lambda node: is_masked(node) or type(node) is tuple,
    )
    name, shapes = optax.tree.get(paired, "second_moment")["blocks"]["up"]["kernel"]
    assert (name, shapes) == ("stack", (3, 1, 7))
    assert optax.tree.get(paired, "momentum")["dense"]["kernel"] == ("matrix", (7, 6))


@pytest.mark.parametrize("name", ["normuon", "muon", "scale_by_normuon", "lerp_momentum"])
def test_tree_get_finds_the_momentum(name):
    params, gradients = draw(0), draw(1)
    tx = optax.chain(optax.clip_by_global_norm(1e9), TRANSFORMATIONS[name]())
    _, state = one_step(tx, gradients, params)
    momentum = optax.tree.get(state, "momentum")
    # One lerp step from zero.
    for path in [("blocks", "up", "kernel"), ("dense", "kernel")]:
        chex.assert_trees_all_close(at(momentum, path), 0.05 * at(gradients, path), rtol=1e-5)


def test_tree_get_finds_the_second_moment_of_each_optimizer_by_name(normuon):
    params, gradients = draw(0), draw(1)
    tx = normuon(0.1)
    _, state = one_step(tx, gradients, params)
    neurons = optax.tree.get(state, "second_moment")
    assert (neurons["blocks"]["up"]["kernel"] > 0).all()
    adam = optax.tree.get(state, "nu")
    chex.assert_trees_all_close(
        adam["dense"]["bias"], 0.05 * gradients["dense"]["bias"] ** 2, rtol=1e-5
    )


def joined_weights(params, state) -> Any:
    """The float32 weights whose high halves are the parameters."""

    def join(high, low):
        bits = jax.lax.bitcast_convert_type(high, jnp.uint16).astype(jnp.uint32) << 16
        return jax.lax.bitcast_convert_type(bits | low.astype(jnp.uint32), jnp.float32)

    return jax.tree.map(join, params, state.remainder)


def test_the_bf16_remainder_wraps_normuon_under_jit(normuon):
    params = draw(0, jnp.bfloat16)
    tx = with_bf16_remainder(normuon(0.01, layout=SPLIT, compute_dtype=jnp.float32))
    step: Any = jax.jit(tx.update)
    state: Any = tx.init(params)
    for seed in range(3):
        updates, state = step(draw(seed, jnp.bfloat16), state, params)
        with jax.numpy_dtype_promotion("standard"):
            params = optax.apply_updates(params, updates)
        chex.assert_trees_all_equal_dtypes(updates, draw(0))
        # What is left over is smaller than the weight's last place.
        chex.assert_trees_all_close(
            joined_weights(params, state), optax.tree.cast(params, jnp.float32), rtol=2**-7
        )
    assert step._cache_size() == 1
    assert all(leaf.any() for leaf in jax.tree.leaves(state.remainder))
