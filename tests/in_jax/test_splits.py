"""Fused projections in one line: equal blocks at the cost of a batch axis, and axes unfolded."""

import pickle
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding

from optax_normuon import MatrixLayout, describe, normuon, older_state, state_specs
from tests.in_jax.meshes import mesh_of

D, HEADS, SIZE = 8, 4, 6


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def optimizer(layout, **keywords):
    return normuon(
        0.1, layout=layout, weight_decay=0.1, compute_dtype=jnp.float32, steps=2, **keywords
    )


def train(params, gradients, layout, **keywords) -> Any:
    tx = optimizer(layout, **keywords)
    state = tx.init(params)
    for gradient in gradients:
        updates, state = jax.jit(tx.update)(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


# A layout as a line of its table has it, and the matrices (in, out) that it must mean, as functions of
# the stored kernel (d_model, outputs).
Q, K = 2 * SIZE, SIZE
FUSED = {
    "three blocks, by number": (
        MatrixLayout(0, 1, output_splits=3),
        lambda w: jnp.split(w, 3, axis=1),
    ),
    "three blocks, by size": (
        MatrixLayout(0, 1, output_splits=(HEADS * SIZE,) * 3),
        lambda w: jnp.split(w, 3, axis=1),
    ),
    "one a head": (
        MatrixLayout(0, 1, output_splits=3 * HEADS),
        lambda w: jnp.split(w, 3 * HEADS, axis=1),
    ),
    "each head in turn, three matrices": (
        MatrixLayout(0, (1, 3), unfold=(1, (HEADS, 3, SIZE))),
        lambda w: [w.reshape(D, HEADS, 3, SIZE)[:, :, i].reshape(D, -1) for i in range(3)],
    ),
    "each head in turn, one a head": (
        MatrixLayout(0, 3, unfold=(1, (HEADS, 3, SIZE))),
        lambda w: [w.reshape(D, 3 * HEADS, SIZE)[:, i] for i in range(3 * HEADS)],
    ),
    "grouped queries in turn": (
        MatrixLayout(0, (2, 1, 3), (2 * 3 * SIZE, 3 * SIZE, 3 * SIZE), (1, (3, 4, SIZE))),
        lambda w: [
            w.reshape(D, 3, 4, SIZE)[:, :, part].swapaxes(1, 2).reshape(D, -1)
            for part in (slice(0, 2), slice(2, 3), slice(3, 4))
        ],
    ),
    "unequal blocks": (
        MatrixLayout(0, 1, output_splits=(36, 24, 12)),
        lambda w: jnp.split(w, (36, 60), axis=1),
    ),
}


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        *((name, "normuon") for name in FUSED),
        *(("unequal blocks", recipe) for recipe in ("normuon_2025_11", "normuon_paper")),
    ],
)
def test_a_fused_projection_is_its_matrices_as_separate_parameters(name, recipe):
    layout, apart = FUSED[name]
    kernel, gradients = draw(0, D, 72), [draw(seed, D, 72) for seed in (1, 2)]
    fused, _ = train(kernel, gradients, layout, recipe=recipe)
    separate, _ = train(
        apart(kernel), [apart(g) for g in gradients], MatrixLayout(0, 1), recipe=recipe
    )
    # 2.4e-7 at most.
    chex.assert_trees_all_close(list(apart(fused)), list(separate), rtol=0, atol=1e-6)
    whole, _ = train(kernel, gradients, MatrixLayout(0, 1), recipe=recipe)
    assert not np.allclose(whole, fused, atol=1e-3)


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_projection_is_the_same_on_a_mesh(name):
    layout, _ = FUSED[name]
    kernel, gradients = draw(0, D, 72), [draw(seed, D, 72) for seed in (1, 2)]
    wanted, state = train(kernel, gradients, layout)
    mesh = mesh_of(f=4)

    def put(x):
        return jax.device_put(x, NamedSharding(mesh, jax.P("f")))

    found, divided = train(put(kernel), list(map(put, gradients)), layout)
    # 4.9e-7 at most; state 6e-8 + 6e-7 |x|.
    chex.assert_trees_all_close(jax.device_get(found), wanted, rtol=0, atol=2e-6)
    chex.assert_trees_all_close(jax.device_get(divided), state, rtol=2.4e-6, atol=2.4e-7)


@pytest.mark.parametrize("layers", [2, 6])
def test_equal_blocks_cost_what_a_batch_axis_costs(layers):
    """Operations of the program and arrays of the state, for 24 heads in every layer."""

    def cost(shape, layout):
        params = {f"{i}": jnp.ones(shape) for i in range(layers)}
        tx = optimizer(layout)
        state = tx.init(params)
        text = jax.jit(tx.update).lower(params, state, params).as_text()
        return text.count("stablehlo."), len(jax.tree.leaves(state))

    blocks, arrays = cost((D, 24 * 2), MatrixLayout(0, 1, output_splits=24))
    batch, wanted = cost((D, 24, 2), MatrixLayout(0, 2))
    assert arrays == wanted
    # A reshape and a transposition there and back, of gradient, update and statistic: 12 a layer.
    assert blocks <= batch + 16 * layers


def test_a_fused_projection_prints_its_matrices():
    table = describe({"qkv": draw(0, D, 72)}, FUSED["each head in turn, one a head"][0])
    assert "12 x (6, 8)" in table
    table = describe({"qkv": draw(0, D, 72)}, FUSED["grouped queries in turn"][0])
    assert "1 x (36, 8) + 2 x (18, 8)" in table


@pytest.mark.parametrize("name", FUSED)
def test_a_layout_can_be_written_down_and_pickled(name):
    layout, _ = FUSED[name]
    assert eval(repr(layout)) == layout
    assert pickle.loads(pickle.dumps(layout)) == layout


def test_a_layout_pickled_before_axes_were_unfolded_is_read():
    old = MatrixLayout.__new__(MatrixLayout)
    old.__dict__.update(reduction_axis=0, output_axis=1, output_splits=(2, 4))
    assert pickle.loads(pickle.dumps(old)) == MatrixLayout(0, 1, (2, 4))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (MatrixLayout(0, 1, 5), "output_splits=5 does not divide the 72 neurons"),
        (MatrixLayout(0, 1, 0), "output_splits=0 does not divide"),
        (MatrixLayout(0, 2, unfold=(1, (5, -1))), "multiply to the 72 entries of axis 1"),
        (MatrixLayout(0, 2, unfold=(2, (5, -1))), "there is no axis 2"),
        (MatrixLayout(1, 2, unfold=(1, (8, 9))), "makes axes of both"),
    ],
)
def test_a_split_that_does_not_fit_names_the_leaf(layout, message):
    with pytest.raises(ValueError, match=f"qkv: .*{message}"):
        normuon(0.1, layout=layout).init({"qkv": draw(0, D, 72)})


# Checkpoints from when every block had an array of its own


def as_it_was(tx, params, state):
    """The state as older checkpoints have it: the statistics of a split leaf are one array a block."""
    shapes = older_state(tx, params)
    tree = jax.tree.structure(state)

    def apart(new, old):
        if not isinstance(old, tuple):
            return new
        axis = next(a for a in range(new.ndim) if sum(o.shape[a] for o in old) == new.shape[a])
        ends = np.cumsum([o.shape[axis] for o in old])[:-1]
        return tuple(jnp.split(new, ends, axis=axis))

    return tree.unflatten(map(apart, jax.tree.leaves(state), tree.flatten_up_to(shapes)))


@pytest.mark.parametrize("name", ["three blocks, by number", "one a head", "unequal blocks"])
def test_an_older_checkpoint_goes_on(name, tmp_path):
    layout, _ = FUSED[name]
    params, gradients = {"qkv": draw(0, D, 72)}, [{"qkv": draw(seed, D, 72)} for seed in (1, 2)]
    tx = optimizer(layout)
    wanted, _ = train(params, gradients, layout)
    half, state = train(params, gradients[:1], layout)
    old = as_it_was(tx, params, state)
    blocks = len(layout.on((D, 72)).output_sizes)
    assert len(optax.tree.get(old, "second_moment")["qkv"]) == blocks
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", old)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "step", older_state(tx, params))
    updates, after = jax.jit(tx.update)(gradients[1], restored, half)
    # Equal on CPUs; a GPU compiler may fuse the two forms otherwise.
    chex.assert_trees_all_close(optax.apply_updates(half, updates), wanted, rtol=0, atol=1e-6)
    chex.assert_trees_all_equal_structs(after, restored)


def test_leaves_without_splits_were_always_kept_as_they_are():
    params = {"w": draw(0, D, 6), "qkv": draw(0, D, 72), "b": draw(0, 6)}
    tx = normuon(0.1, layout={"w": MatrixLayout(0, 1), "qkv": MatrixLayout(0, 1, 3), "b": None})
    old, new = older_state(tx, params), jax.eval_shape(tx.init, params)
    moments = optax.tree.get(old, "second_moment")
    assert [block.shape for block in moments["qkv"]] == [(1, 24)] * 3
    assert moments["w"] == optax.tree.get(new, "second_moment")["w"]
    assert optax.tree.get(old, "momentum") == optax.tree.get(new, "momentum")


def test_specs_of_a_split_leaf_do_not_cut_its_blocks():
    params = {"qkv": draw(0, D, 72)}
    found = state_specs(optimizer(MatrixLayout(0, 1, 3)), params, {"qkv": jax.P("f", "t")})
    assert optax.tree.get(found, "second_moment")["qkv"] == jax.P(None, None)
    assert optax.tree.get(found, "momentum")["qkv"] == jax.P("f", "t")
