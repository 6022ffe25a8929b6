"""QK-clip in an Optax chain: which bits it leaves alone, meshes, remainders, wrappers and errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_normuon
from optax_normuon import (
    HeadLayout,
    MatrixLayout,
    inject_hyperparams,
    normuon,
    qk_clip,
    with_bf16_remainder,
)
from optax_normuon.remainder import join
from tests.in_jax.meshes import draw, mesh_of

WEIGHTS = {"*query*": HeadLayout(heads=4), "*key*": HeadLayout(axis=-2)}
SHAPES = {"query": (8, 16), "key": (8, 2, 4), "out": (16, 8)}
LOGITS = np.array([1.0, 6.0, 3.0, 2.0], np.float32)
LAYOUT = {"query": MatrixLayout(0, 1), "key": MatrixLayout(0, (1, 2)), "out": MatrixLayout(0, 1)}


def tree(seed=0, dtype=jnp.float32):
    return {"attention": {n: jnp.asarray(x, dtype) for n, x in draw(SHAPES, seed).items()}}


def clipped(tau, params, updates, logits=LOGITS, weights=WEIGHTS):
    tx = qk_clip(tau, weights)
    return tx.update(updates, tx.init(params), params, largest_logits={"attention": logits})[0]


def test_heads_within_tau_keep_their_bits_and_other_leaves_always():
    params, updates = tree(0), tree(1)
    found = clipped(3.0, params, updates)["attention"]
    own = updates["attention"]
    assert found["out"] is own["out"]
    same = np.asarray(found["query"] == own["query"]).reshape(8, 4, 4).all(axis=(0, 2))
    np.testing.assert_array_equal(same, [True, False, True, True])
    # The first key serves the head that is above tau.
    same = np.asarray(found["key"] == own["key"]).all(axis=(0, 2))
    np.testing.assert_array_equal(same, [False, True])
    chex.assert_trees_all_equal(clipped(6.0, params, updates), updates)


def test_a_tree_a_longer_path_and_a_single_array_name_the_same_logits():
    params, updates = tree(0), tree(1)
    wanted = clipped(2.0, params, updates)
    for logits in (
        LOGITS,
        {"attention": jnp.asarray(LOGITS)},
        {"": 0 * LOGITS, "attention": LOGITS},
        {"attention": 0 * LOGITS, "attention/query": LOGITS, "attention/key": LOGITS},
    ):
        tx = qk_clip(2.0, WEIGHTS)
        found, _ = tx.update(updates, tx.init(params), params, largest_logits=logits)
        chex.assert_trees_all_equal(found, wanted)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_do_not_pass_silently(bad):
    params, updates = tree(0), tree(1)
    found = clipped(2.0, params, updates, np.array([1, bad, 1, 1], np.float32))["attention"]
    lost = np.isnan(np.asarray(found["query"])).reshape(8, 4, 4).all(axis=(0, 2))
    np.testing.assert_array_equal(lost, [False, True, False, False])
    kept = clipped(2.0, params, updates, np.array([1, -np.inf, 1, 1], np.float32))
    assert np.isnan(np.asarray(kept["attention"]["query"])).sum() == 0


def test_within_a_remainder_the_joined_weight_is_the_float32_runs():
    start = tree(0, jnp.bfloat16)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), start)
    quick = normuon(0.1, layout={"attention": LAYOUT}, orthogonalizer=lambda stack: stack / 2)
    inner = optax.chain(quick, qk_clip(2.0, WEIGHTS))
    runs = []
    for tx, params in ((with_bf16_remainder(inner), start), (inner, wide)):
        state = tx.init(params)
        for seed in (1, 2):
            updates, state = tx.update(
                tree(seed), state, params, largest_logits={"attention": LOGITS}
            )
            with jax.numpy_dtype_promotion("standard"):
                params = optax.apply_updates(params, updates)
        runs.append((params, state))
    (params, state), (expected, _) = runs
    chex.assert_trees_all_equal(join(params, state.remainder), expected)


def test_it_works_under_injection_a_mask_and_in_one_call():
    params, updates = tree(0), tree(1)
    wanted = clipped(2.0, params, updates)
    tx = inject_hyperparams(qk_clip)(2.0, WEIGHTS)
    state = tx.init(params)
    assert set(state.hyperparams) == {"tau"}
    found, _ = tx.update(updates, state, params, largest_logits=LOGITS)
    chex.assert_trees_all_close(found, wanted, rtol=1e-6)
    masked = optax.masked(
        qk_clip(2.0, WEIGHTS), {"attention": {**dict.fromkeys(SHAPES, True), "key": False}}
    )
    found, _ = masked.update(updates, masked.init(params), params, largest_logits=LOGITS)
    chex.assert_trees_all_equal(found["attention"]["query"], wanted["attention"]["query"])
    chex.assert_trees_all_equal(found["attention"]["key"], updates["attention"]["key"])
    chain = optax.chain(optax.scale(-0.1), qk_clip(2.0, WEIGHTS))
    moved, _ = optax_normuon.apply(
        chain, updates, chain.init(params), params, largest_logits=LOGITS
    )
    by_hand, _ = chain.update(updates, chain.init(params), params, largest_logits=LOGITS)
    chex.assert_trees_all_equal(moved, optax.apply_updates(params, by_hand))


@pytest.mark.parametrize("mode", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_on_a_mesh_the_numbers_are_those_of_one_device(mode):
    mesh = mesh_of(mode, fsdp=2, tp=2)
    specs = {"query": P("fsdp", "tp"), "key": P("fsdp", "tp", None), "out": P("tp", "fsdp")}

    def put(own):
        leaves = own["attention"].items()
        return {
            "attention": {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in leaves}
        }

    logits = jax.device_put(jnp.asarray(LOGITS), NamedSharding(mesh, P("tp")))
    params, updates = tree(0), tree(1)
    found = jax.jit(lambda p, u, s: clipped(2.0, p, u, s))(put(params), put(updates), logits)
    chex.assert_trees_all_close(found, clipped(2.0, params, updates), rtol=1e-6, atol=1e-7)
    for name, leaf in found["attention"].items():
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, specs[name]), leaf.ndim)


@pytest.mark.parametrize(
    ("weights", "logits", "message"),
    [
        (WEIGHTS, None, r"attention/key: qk_clip needs .*largest_logits={'attention'"),
        (WEIGHTS, {"mlp": LOGITS}, r"attention/key: .*got those of mlp; write"),
        (WEIGHTS, LOGITS[:3], r"attention/key: .*shape \(3,\) .*2 heads .*as in shape \(2,\)"),
        (WEIGHTS, LOGITS[:2], r"attention/query: .*shape \(2,\) .*4 heads"),
        ({"*query": HeadLayout(heads=4)}, np.ones((2, 4)), r"attention/query: .*shape \(2, 4\)"),
        (
            {"*querry*": HeadLayout(heads=4)},
            LOGITS,
            r"'\*querry\*' meets no leaf; .*attention/query",
        ),
        ({"*query": HeadLayout(heads=5)}, LOGITS, r"axis -1 has 16 entries, which are not 5 heads"),
        ({"*query": HeadLayout()}, LOGITS, r"behind the axis of the heads there is none"),
        ({"*query": HeadLayout(axis=2)}, LOGITS, r"attention/query: .*no axis 2"),
        ({"*query": HeadLayout(4, channels=((3, 1),))}, LOGITS, r"a head has 4 channels"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_write(weights, logits, message):
    tx = qk_clip(2.0, weights)
    with pytest.raises(ValueError, match=message):
        tx.update(tree(1), tx.init(tree(0)), tree(0), largest_logits=logits)


def test_numbers_out_of_range_are_refused():
    for tau in (0.0, -1.0, np.inf):
        with pytest.raises(ValueError, match="tau="):
            qk_clip(float(tau), WEIGHTS)
    with pytest.raises(ValueError, match="heads=0"):
        HeadLayout(heads=0)
    with pytest.raises(ValueError, match="channels="):
        HeadLayout(channels=((3, -1.0),))
