"""On a mesh the kernels make the bits of one device, whatever the mesh, where each matrix has one owner.

Under Triton's interpreter, on virtual devices; `test_gpu.py` does it on two GPUs.
"""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from normuon_core import RECIPES, MatrixLayout, Polar
from normuon_core.kernels import source
from normuon_core.polynomials import POLAR_EXPRESS
from optax_normuon import normuon
from optax_normuon.kernels import launcher

LAYOUT = {
    "a": MatrixLayout(0, 1),
    "b": MatrixLayout(0, 1),
    "c": MatrixLayout(1, 0),
    "experts": MatrixLayout(-2, -1),
    "heads": MatrixLayout(0, (1, 2)),
    "qkv": MatrixLayout(0, 1, (7, 5, 5)),
}
# A side is halved into eight cells if it can be, and the interpreter runs a program for each pair of
# them: these sides can be halved as often as the mesh divides them, and no more.
SHAPES = {
    "a": (12, 44),
    "b": (12, 44),
    "c": (12, 44),
    "experts": (4, 12, 4),
    "heads": (12, 2, 6),
    "qkv": (8, 17),
}
SPECS = {
    "a": P("fsdp", "tp"),
    "b": P("fsdp", "tp"),
    "c": P("tp", "fsdp"),
    "experts": P("tp", "fsdp"),
    "heads": P("fsdp", "tp"),
    "qkv": P(("fsdp", "tp"), None),
}


def draw(seed: int):
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}


def optimizer(*, recipe="normuon", **keywords):
    """One step of the polynomial: the interpreter takes a moment for each product."""
    found = dataclasses.replace(RECIPES[recipe], polar=Polar(coefficients=POLAR_EXPRESS[:1]))
    # In the standard form, so that the one matrix that is cut as `c` is cannot stay where it lies.
    keywords = dict(compute_dtype=jnp.float16, algorithm="standard", layout=LAYOUT) | keywords
    return normuon(0.02, recipe=found, weight_decay=0.3, backend="triton", **keywords)


def steps(tx, mesh=None, *, count=2):
    """(parameters, state) as NumPy arrays after a few steps."""

    def put(tree):
        if mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        return {n: jax.device_put(x, NamedSharding(mesh, SPECS[n])) for n, x in tree.items()}

    @jax.jit
    def step(gradients, state, params):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = put(draw(0))
    state = tx.init(params)
    for seed in range(1, count + 1):
        params, state = step(put(draw(seed)), state, params)
    return jax.tree.map(np.asarray, (params, state))


# In float16 a norm whose last bit is another one mostly leaves every product the same.
in_float32 = functools.partial(optimizer, compute_dtype=jnp.float32)


@functools.cache
def on_one_device(recipe):
    return steps(in_float32(recipe=recipe))


def mesh_of(fsdp: int, tp: int):
    return jax.make_mesh((fsdp, tp), ("fsdp", "tp"), axis_types=(AxisType.Explicit,) * 2)


def assert_equal(one, other):
    for (path, x), y in zip(
        jax.tree_util.tree_flatten_with_path(one)[0], jax.tree.leaves(other), strict=True
    ):
        np.testing.assert_array_equal(x, y, err_msg=str(path))


@pytest.mark.parametrize("shape", [(4, 1), (2, 2)])
def test_every_mesh_makes_the_bits_of_one_device(interpreted, shape):
    assert_equal(on_one_device("normuon"), steps(in_float32(), mesh_of(*shape)))


def test_the_norm_of_the_rms_rule_comes_home_with_the_statistics(interpreted):
    paper = on_one_device("normuon_paper")
    assert_equal(paper, steps(in_float32(recipe="normuon_paper"), mesh_of(2, 2)))


def test_a_matrix_without_twins_stays_divided_and_the_others_keep_their_bits(interpreted):
    """It goes through the Gram form in float16, by XLA's products. Largest difference measured, relative
    to the update: 3.4e-4."""
    # With a single step of the polynomial it would be cheaper to move the matrix.
    keywords = dict(algorithm="auto", steps=2)
    one, other = (
        steps(optimizer(**keywords), count=1),
        steps(optimizer(**keywords), mesh_of(4, 2), count=1),
    )
    first = draw(0)
    for name in SHAPES:
        update, expected = other[0][name] - first[name], one[0][name] - first[name]
        error = np.linalg.norm(update - expected) / np.linalg.norm(expected)
        assert 0 < error < 1.2e-3 if name == "c" else error == 0, name


def test_a_step_may_have_no_matrix_for_the_kernels(interpreted):
    """All of its matrices stay divided, so XLA steps them."""
    layout, params = {"c": LAYOUT["c"]}, {"c": draw(0)["c"]}
    updates = []
    for mesh in (None, mesh_of(4, 2)):
        tx = optimizer(algorithm="auto", layout=layout, steps=2)
        lies = None if mesh is None else NamedSharding(mesh, SPECS["c"])
        placed = jax.device_put(params, lies)
        updates.append(jax.jit(tx.update)(placed, tx.init(placed), placed)[0]["c"])
    assert 0 < np.linalg.norm(updates[1] - updates[0]) < 1.2e-3 * np.linalg.norm(updates[0])


def test_a_device_multiplies_only_the_matrices_that_it_is_dealt(interpreted, monkeypatch):
    """Of three shapes two matrices each, on eight devices: six have one of them and two have none."""
    sizes = {"a": (8, 20), "b": (8, 28), "c": (24, 20)}
    rng = np.random.default_rng(0)
    params = {
        f"{name}{i}": rng.standard_normal(size).astype(np.float32)
        for name, size in sizes.items()
        for i in range(2)
    }
    multiplied = collections.Counter()

    def note(count, device):
        multiplied[int(device)] += count

    def counted(launch, inputs, run=launcher.launch):
        if launch.kernel is source.product:
            *_, count = inputs
            jax.debug.callback(functools.partial(note, count), jax.lax.axis_index("fsdp"))
        return run(launch, inputs)

    def update(placed):
        tx = optimizer(layout=MatrixLayout(1, 0))
        return jax.jit(tx.update)(placed, tx.init(placed), placed)[0]

    expected = update(params)
    monkeypatch.setattr(launcher, "launch", counted)
    found = update(jax.device_put(params, NamedSharding(mesh_of(8, 1), P("fsdp"))))
    jax.effects_barrier()
    assert_equal(expected, found)
    # A step of the standard form takes three products.
    assert [multiplied[device] for device in range(8)] == [3] * 6 + [0] * 2
