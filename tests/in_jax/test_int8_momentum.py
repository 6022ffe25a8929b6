"""Momentum in int8: what a block keeps, what it does with bad numbers, and where it lies."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_normuon
from normuon_core.quantization import BLOCK, SMALLEST_SCALE
from optax_normuon import MatrixLayout, describe, lerp_momentum, normuon
from optax_normuon.matrices.quantization import dequantized, quantized
from tests.in_jax.meshes import draw, mesh_of, put, step_of

IN_OUT = MatrixLayout(0, 1)


def kept(x, layout=IN_OUT):
    """(integers, scales, what is read back) of one array."""
    x = jnp.asarray(x)
    views = {("w",): layout.on(x.shape)}
    q, scales = quantized({("w",): x}, views, None)
    back = dequantized(q, scales, {("w",): x.dtype}, views, None)
    return tuple(np.asarray(each[("w",)]) for each in (q, scales, back))


def state_of(tx_state):
    return [optax.tree.get(tx_state, key) for key in ("momentum", "momentum_scale")]


def bits(tree):
    return jax.tree.map(np.asarray, tree)


def assert_same_bits(one, other):
    jax.tree.map(np.testing.assert_array_equal, bits(one), bits(other))


def test_a_parameter_has_one_byte_and_a_sixteenth_of_momentum():
    params = {"up": {"kernel": jnp.ones((96, 64))}, "norm": {"scale": jnp.ones(64)}}
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(state_of(normuon_int8().init(params))))
    assert kept == 96 * 64 + 2 * 3 * 64 <= 1.1 * 96 * 64
    table = describe(params, momentum_dtype="int8")
    assert "momentum 6,144, momentum scale 384, second moment 256" in table
    assert "Engine xla steps all matrices: the kernels cannot run momentum_dtype='int8'." in table


def normuon_int8(**keywords):
    return normuon(0.02, momentum_dtype="int8", compute_dtype=jnp.float32, **keywords)


def test_an_entry_is_off_by_half_a_scale_and_stored_again_as_it_was():
    x = np.random.default_rng(0).standard_normal((70, 5)).astype(np.float32)
    q, scales, back = kept(x)
    assert q.dtype == np.int8
    assert scales.shape == (3, 5)
    of_entries = np.repeat(scales.astype(np.float32), BLOCK, axis=0)[:70]
    assert np.all(np.abs(back - x) <= 0.5001 * of_entries)
    assert np.abs(q[:BLOCK]).max(axis=0).tolist() == [127] * 5
    for again, before in zip(kept(back), (q, scales, back), strict=True):
        np.testing.assert_array_equal(again, before)


@pytest.mark.parametrize("size", [1e-42, 1e-38, 1e-30, 1.0, 1e30, 3e38])
def test_blocks_of_any_size_are_kept(size):
    """Below 127 times the smallest normal number digits are lost, and entries never grow."""
    x = np.full((BLOCK, 1), size, np.float32) * np.linspace(-1, 1, BLOCK, dtype=np.float32)[:, None]
    _, scales, back = kept(x)
    assert np.all(scales.astype(np.float32) >= SMALLEST_SCALE)
    step = max(size / 127 * (1 + 2**-8), SMALLEST_SCALE)
    assert np.all(np.isfinite(back))
    assert np.all(np.abs(back.astype(np.float64) - x) <= 0.51 * step + SMALLEST_SCALE)
    assert np.all(kept(0 * x)[2] == 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_own_matrix_and_is_seen(bad):
    layout = MatrixLayout(-2, -1, output_splits=(5, 3))
    tx = lerp_momentum(momentum_dtype="int8", layout=layout)
    good = np.random.default_rng(0).standard_normal((2, 40, 8)).astype(np.float32)
    ill = good.copy()
    ill[1, 35, 6] = bad
    states = [tx.update(jnp.asarray(g), tx.init(g))[1] for g in (good, ill)]
    after = [np.asarray(tx.update(jnp.zeros_like(good), state)[0]) for state in states]
    differs = np.zeros(good.shape, bool)
    differs[1, BLOCK:, 6] = True
    assert np.isnan(after[1][differs]).all()
    np.testing.assert_array_equal(after[1][~differs], after[0][~differs])
    # The step itself hands on the gradient's own.
    first = np.asarray(tx.update(jnp.asarray(ill), tx.init(ill))[0])
    assert np.isfinite(first).sum() == first.size - 1


WEIGHT = np.random.default_rng(0).standard_normal((70, 24)).astype(np.float32)
STORED = {
    "out, in": (WEIGHT.T, MatrixLayout(1, 0, output_splits=(16, 8)), np.transpose),
    "two axes of inputs": (
        WEIGHT.reshape(1, 70, 24),
        MatrixLayout((0, 1), 2),
        lambda x: x.reshape(-1, 24),
    ),
    "outputs unfolded": (WEIGHT, MatrixLayout(0, (1, 2), unfold=(1, (3, 8))), np.asarray),
    "inputs unfolded": (
        np.concatenate([WEIGHT, -WEIGHT]),
        MatrixLayout(1, 2, unfold=(0, (2, 70))),
        lambda x: np.split(x, 2)[0],
    ),
}


@pytest.mark.parametrize(("stored", "layout", "back"), STORED.values(), ids=STORED.keys())
def test_the_same_weight_has_the_same_blocks_however_it_is_stored(stored, layout, back):
    """A weight of 70 inputs and 24 outputs; in the last case beside another of the same array."""
    for ours, expected in zip(kept(stored, layout), kept(WEIGHT), strict=True):
        np.testing.assert_array_equal(back(ours), expected)


SHAPES = {"a": (128, 12), "qkv": (96, 24), "fold": (24, 96), "tall": (4, 70), "bias": (8,)}
LAYOUT = {
    "a": IN_OUT,
    "qkv": MatrixLayout(0, 1, output_splits=(12, 8, 4)),
    "fold": MatrixLayout(2, 0, unfold=(1, (2, 48))),
    "tall": IN_OUT,
    "bias": None,
}
SPECS = {"a": P("x", "y"), "qkv": P("x", "y"), "fold": P(None, "x"), "tall": P("x"), "bias": P()}


def train(tx, mesh, params=None, state=None, steps=(1, 2)):
    params = put(draw(SHAPES), SPECS, mesh) if params is None else params
    state = jax.jit(tx.init)(params) if state is None else state
    step = step_of(tx)
    for number in steps:
        params, state = step(put(draw(SHAPES, number), SPECS, mesh), state, params)
    return params, state


@pytest.fixture(scope="module")
def on_one_device():
    return train(lerp_momentum(momentum_dtype="int8", layout=LAYOUT), None)


@pytest.mark.parametrize("mode", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"])
def test_a_mesh_keeps_the_bits_of_one_device(on_one_device, mode):
    """Two devices hold whole blocks of `a`, and divide a block of `qkv`: 48 entries each."""
    mesh = mesh_of(mode, x=2, y=2)
    tx = lerp_momentum(momentum_dtype="int8", layout=LAYOUT, param_specs=SPECS)
    with jax.set_mesh(mesh):
        params, state = train(tx, mesh)
    assert_same_bits(state_of(state), state_of(on_one_device[1]))
    assert_same_bits(params, on_one_device[0])
    named = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    specs = optax_normuon.state_specs(tx, params, named)
    for scale, spec in zip(
        jax.tree.leaves(state.momentum_scale), jax.tree.leaves(specs.momentum_scale), strict=True
    ):
        assert scale.sharding.is_equivalent_to(spec, scale.ndim)
    assert specs.momentum_scale["a"].spec == P("x", "y")
    assert specs.momentum_scale["qkv"].spec == P(None, "y")
    assert state.momentum["qkv"].sharding.is_equivalent_to(named["qkv"], 2)


def test_a_run_goes_on_from_an_orbax_checkpoint(on_one_device, tmp_path):
    tx = lerp_momentum(momentum_dtype="int8", layout=LAYOUT)
    params, state = on_one_device
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", (params, state))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "run", jax.eval_shape(lambda: (params, state)))
    one, other = (train(tx, None, *each, steps=[3]) for each in ((params, state), restored))
    assert_same_bits(one, other)
    assert one[1].momentum["a"].dtype == jnp.int8


def test_it_works_within_apply_injection_and_masks():
    params, gradients = put(draw(SHAPES), SPECS, None), put(draw(SHAPES, 1), SPECS, None)
    plain = normuon_int8(layout=LAYOUT)
    step, state = step_of(plain), plain.init(params)
    expected, after = step(gradients, state, params)
    new, kept = jax.jit(lambda g, s, p: optax_normuon.apply(plain, g, s, p))(
        gradients, state, params
    )
    assert_same_bits((new, kept), (expected, after))
    injected = optax_normuon.inject_hyperparams(lerp_momentum)(
        0.9, momentum_dtype="int8", layout=lambda params: LAYOUT
    )
    _, own = injected.update(gradients, injected.init(params))
    alone = lerp_momentum(0.9, momentum_dtype="int8", layout=LAYOUT)
    assert_same_bits(own.inner_state, alone.update(gradients, alone.init(params))[1])
    mask = {name: name == "a" for name in SHAPES}
    masked = optax.masked(lerp_momentum(0.9, momentum_dtype="int8", layout=IN_OUT), mask)
    updates, state = masked.update(gradients, masked.init(params))
    assert_same_bits(updates["qkv"], gradients["qkv"])
    assert_same_bits(state.inner_state.momentum["a"], own.inner_state.momentum["a"])
    assert np.all(np.asarray(state.inner_state.momentum_scale["a"]) > 0)


def test_the_errors_of_a_step_are_measured_of_what_int8_keeps():
    params, gradients = ({"a": jnp.asarray(draw({"a": (64, 12)}, i)["a"])} for i in range(2))
    found = []
    for dtype in ("int8", None):
        tx = normuon(0.02, momentum_dtype=dtype, compute_dtype=jnp.float32, layout=IN_OUT)
        state = tx.update(gradients, tx.init(params), params)[1]
        errors = optax_normuon.orthogonality_errors(gradients, state, params, layout=IN_OUT)
        found.append(np.asarray(errors["a"]))
    np.testing.assert_allclose(*found, rtol=0.05)


def test_leaves_that_are_no_matrices_keep_floats():
    params = {"up": {"kernel": jnp.ones((64, 8))}, "norm": {"scale": jnp.ones(8, jnp.bfloat16)}}
    momentum, scales = state_of(lerp_momentum(momentum_dtype="int8").init(params))
    assert momentum["norm"]["scale"].dtype == jnp.float32
    assert isinstance(scales["norm"]["scale"], optax.MaskedNode)


def test_dtypes_that_cannot_hold_a_mean_are_refused():
    for dtype in ("int16", jnp.uint8, bool):
        for make in (lerp_momentum, lambda **keywords: normuon(0.1, **keywords)):
            with pytest.raises(ValueError, match=r"momentum_dtype=.* cannot hold a mean.*'int8'"):
                make(momentum_dtype=dtype)
    with pytest.raises(ValueError, match=r"backend='triton': .*momentum_dtype='int8'"):
        normuon(0.1, momentum_dtype="int8", backend="triton")
