"""Spheres whose slices or matrices are divided over devices: the numbers of one device."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optax_normuon
from optax_normuon import MatrixLayout, state_specs
from tests.in_jax.meshes import collectives, compiled_step, draw, mesh_of, put, step_of

LAYOUT = {
    "up": MatrixLayout(0, 1),
    "heads": MatrixLayout(0, (1, 2)),
    "experts": MatrixLayout(-2, -1),
    "qkv": MatrixLayout(0, 1, (16, 8, 8)),
    "fused": MatrixLayout(0, 3, unfold=(1, (4, 3, 4))),
    "folded inputs": MatrixLayout(2, 0, unfold=(1, (4, 12))),
    "bias": None,
}
SHAPES = {
    "up": (16, 48),
    "heads": (16, 8, 4),
    "experts": (8, 24, 16),
    "qkv": (16, 32),
    "fused": (16, 48),
    "folded inputs": (16, 48),
    "bias": (16,),
}
SPECS = {name: P("fsdp", "tp") for name in SHAPES} | {"experts": P("tp", "fsdp"), "bias": P("fsdp")}
MAKE = {
    "slices": lambda: optax_normuon.to_sphere(0.1, radius=None, layout=LAYOUT),
    "axes": lambda: optax_normuon.to_sphere(
        0.1, radius=None, axis=dict.fromkeys(SHAPES, -1) | {"heads": (0, 2), "bias": None}
    ),
    "hyperball": lambda: optax_normuon.to_hyperball(0.1, layout=LAYOUT),
    "projection": lambda: optax_normuon.project_to_sphere(radius=None, layout=LAYOUT),
    "normuon_h": lambda: optax_normuon.normuon(
        0.1, recipe="normuon_h", layout=LAYOUT, compute_dtype=jnp.float32
    ),
}


def train(tx, mesh):
    params = put(draw(SHAPES), SPECS, mesh)
    # Eagerly, as users do on a mesh; on one device only the numbers count.
    state, step = (tx.init if mesh else jax.jit(tx.init))(params), step_of(tx)
    for seed in (1, 2, 3):
        params, state = step(put(draw(SHAPES, seed), SPECS, mesh), state, params)
    return params, state


@functools.cache
def on_one_device(name):
    return train(MAKE[name](), None)


EXPLICITLY = [(name, AxisType.Explicit) for name in MAKE]
AUTOMATICALLY = [(name, AxisType.Auto) for name in ("slices", "normuon_h")]


@pytest.mark.parametrize(("name", "mode"), [*EXPLICITLY, *AUTOMATICALLY], ids=str)
def test_a_divided_slice_or_matrix_moves_as_a_whole_one(name, mode):
    """Largest difference of parameters and radii: 3e-6 of an entry (normuon_h), else 2e-6."""
    tx = MAKE[name]()
    wanted = jax.tree.leaves(on_one_device(name))
    mesh = mesh_of(mode, fsdp=4, tp=2)
    with jax.set_mesh(mesh) if mode == AxisType.Explicit else contextlib.nullcontext():
        params, state = train(tx, mesh)
        for found, own in zip(jax.tree.leaves((params, state)), wanted, strict=True):
            np.testing.assert_allclose(found, own, atol=1.2e-5)
        if mode == AxisType.Explicit:
            specs = jax.tree.leaves(
                state_specs(tx, params, SPECS), is_leaf=lambda node: isinstance(node, P)
            )
            for kept, spec in zip(jax.tree.leaves(state), specs, strict=True):
                own = jax.typeof(kept).sharding.spec
                assert [entry or None for entry in own] == [
                    *spec,
                    *[None] * (kept.ndim - len(spec)),
                ]


@pytest.mark.parametrize("name", ["slices", "axes", "hyperball", "projection"])
def test_nothing_but_sums_travels(name):
    """The largest array that is sent has one number for each output neuron, not a matrix's entries."""
    mesh = mesh_of(AxisType.Explicit, fsdp=4, tp=2)
    with jax.set_mesh(mesh):
        found = collectives(compiled_step(MAKE[name](), SHAPES, SPECS, mesh))
    assert found
    smallest = 4 * min(np.prod(shape) for shape in SHAPES.values() if len(shape) > 1)
    assert max(size for _, size, _ in found) < smallest
