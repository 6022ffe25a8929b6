"""Diagnostics of a step: what the numbers are, and that they are of the step that is made."""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optax_normuon
from optax_normuon import RECIPES, MatrixLayout
from tests.in_jax.meshes import collectives, draw, mesh_of, put


def of(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {
        "dense": {"kernel": of(rng, 24, 16), "bias": of(rng, 16)},
        "experts": {"kernel": of(rng, 3, 16, 40)},
    }


LAYOUT = {
    "dense": {"kernel": MatrixLayout(0, 1), "bias": None},
    "experts": {"kernel": MatrixLayout(1, 2)},
}


def gradients_like(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: of(rng, *leaf.shape), params)


def test_the_numbers_are_what_their_names_say(params):
    updates = gradients_like(params, 1)
    numbers = optax_normuon.update_diagnostics(updates, params, layout=LAYOUT)
    assert list(numbers) == ["dense/kernel", "experts/kernel"]
    for path, count in (("dense", 1), ("experts", 3)):
        steps = np.asarray(updates[path]["kernel"]).reshape(
            count, *params[path]["kernel"].shape[-2:]
        )
        weights = np.asarray(params[path]["kernel"]).reshape(steps.shape)
        found = numbers[f"{path}/kernel"]
        norms = np.linalg.norm(steps, axis=1)  # (in, out): of each output neuron
        expected = (
            np.sqrt((steps**2).mean((1, 2))),
            np.linalg.norm(steps, axis=(1, 2)) / np.linalg.norm(weights, axis=(1, 2)),
            norms.std(-1) / norms.mean(-1),
            (steps * weights > 0).mean((1, 2)),
        )
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.shape == (count,)
            np.testing.assert_allclose(mine, theirs, rtol=1e-5)


def test_blocks_of_a_fused_projection_are_matrices_of_their_own():
    rng = np.random.default_rng(0)
    params, updates = ({"qkv": of(rng, 16, 48)} for _ in range(2))
    fused = optax_normuon.update_diagnostics(
        updates, params, layout={"qkv": MatrixLayout(0, 1, output_splits=3)}
    )
    parts = [
        optax_normuon.update_diagnostics(
            {"w": updates["qkv"][:, at : at + 16]},
            {"w": params["qkv"][:, at : at + 16]},
            layout={"w": MatrixLayout(0, 1)},
        )
        for at in (0, 16, 32)
    ]
    for i, part in enumerate(parts):
        for mine, theirs in zip(fused["qkv"], part["w"], strict=True):
            np.testing.assert_allclose(mine[i], theirs[0], rtol=1e-6)


def test_the_share_of_masked_decay_is_that_of_the_step():
    """Entries that decay would have moved, and that the cautious rule left: seen from both sides."""
    rng = np.random.default_rng(0)
    params = {"w": of(rng, 32, 32)}
    grads, layout = {"w": of(rng, 32, 32)}, {"w": MatrixLayout(0, 1)}

    def updates(weight_decay):
        tx = optax_normuon.normuon(0.1, weight_decay=weight_decay, layout=layout)
        return tx.update(grads, tx.init(params), params)[0]

    left_out = (np.asarray(updates(0.5)["w"]) == np.asarray(updates(0.0)["w"])).mean()
    assert 0.2 < left_out < 0.8
    numbers = optax_normuon.update_diagnostics(updates(0.5), params, layout=layout)
    np.testing.assert_allclose(numbers["w"].masked_decay, [left_out], atol=1e-6)


def test_a_step_of_zeros_has_zeros_and_no_nan(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    for number in jax.tree.leaves(optax_normuon.update_diagnostics(zeros, zeros, layout=LAYOUT)):
        np.testing.assert_array_equal(number, np.zeros_like(number))


def test_orthogonality_error_is_the_deviation_of_the_squared_singular_values():
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.standard_normal((24, 16)))
    values = rng.uniform(0.5, 1.2, 16)
    expected = np.sqrt(((values**2 - 1) ** 2).mean())
    for matrix in (q * values, (q * values).T):
        error = optax_normuon.orthogonality_error(jnp.asarray(matrix, jnp.float32))
        np.testing.assert_allclose(error, expected, rtol=1e-5)
    assert optax_normuon.orthogonality_error(jnp.asarray(q, jnp.float32)) < 1e-6
    assert optax_normuon.orthogonality_error(jnp.zeros((2, 3, 5))).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "recipe", ["normuon", "muon_2024_10", "optax_muon", "normuon_paper", "nanochat"]
)
@pytest.mark.parametrize("steps", [0, 3])
def test_errors_are_of_the_polar_factor_that_the_step_makes(params, recipe, steps):
    seen = []

    def remembering(stack):
        polar = RECIPES[recipe].polar
        factor = optax_normuon.polar_factor(stack, **vars(polar), compute_dtype=jnp.float32)
        seen.append(factor)
        return factor

    keywords = dict(recipe=recipe, layout=LAYOUT)
    tx = optax_normuon.normuon(0.1, orthogonalizer=remembering, **keywords)
    chain = optax.chain(optax.clip_by_global_norm(1e9), tx)
    state = chain.init(params)
    for step in range(steps):
        _, state = chain.update(gradients_like(params, step), state, params)
    last = gradients_like(params, 99)
    errors = optax_normuon.orthogonality_errors(
        last, state, params, compute_dtype=jnp.float32, **keywords
    )
    seen.clear()
    chain.update(last, state, params)
    by_shape = {factor.shape: factor for factor in seen}
    for path, shape in (("dense/kernel", (1, 24, 16)), ("experts/kernel", (3, 16, 40))):
        expected = optax_normuon.orthogonality_error(by_shape[shape])
        np.testing.assert_allclose(errors[path], expected, rtol=1e-4)
    assert 1e-3 < errors["dense/kernel"][0] < 0.8


def test_momentum_of_a_schedule_is_given():
    rng = np.random.default_rng(0)
    params, layout = {"w": of(rng, 16, 16)}, {"w": MatrixLayout(0, 1)}
    tx = optax_normuon.normuon(0.1, layout=layout)
    _, state = tx.update({"w": of(rng, 16, 16)}, tx.init(params), params)
    given = [
        optax_normuon.orthogonality_errors(
            {"w": of(np.random.default_rng(1), 16, 16)},
            state,
            params,
            layout=layout,
            momentum=momentum,
            compute_dtype=jnp.float32,
        )["w"]
        for momentum in (None, 0.95, 0.5)
    ]
    np.testing.assert_array_equal(given[0], given[1])
    assert abs(given[0] - given[2]).item() > 1e-4


def test_a_state_without_momentum_is_refused(params):
    with pytest.raises(ValueError, match="the state holds no momentum"):
        optax_normuon.orthogonality_errors(params, optax.adam(1.0).init(params), params)


def test_they_run_within_jit_and_beside_bf16_parameters(params):
    tx = optax_normuon.with_bf16_remainder(optax_normuon.normuon(0.1, layout=LAYOUT))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    grads = gradients_like(half, 1)

    @jax.jit
    def step(grads, state, params):
        updates, _ = tx.update(grads, state, params)
        return (
            optax_normuon.update_diagnostics(updates, params, layout=LAYOUT),
            optax_normuon.orthogonality_errors(grads, state, params, layout=LAYOUT),
        )

    numbers, errors = step(grads, tx.init(half), half)
    assert numbers["experts/kernel"].update_rms.shape == errors["experts/kernel"].shape == (3,)
    assert 0.01 < numbers["dense/kernel"].update_rms[0] < 0.1


def test_leaves_of_one_shape_share_their_polar_factors_and_sums():
    """As the step does; one by one they take four times as long on a GPU."""

    def products(count):
        rng = np.random.default_rng(0)
        params = {f"w{i}": of(rng, 16, 24) for i in range(count)}
        layout = dict.fromkeys(params, MatrixLayout(0, 1))
        tx = optax_normuon.normuon(0.1, layout=layout)

        def numbers(grads, state, params):
            errors = optax_normuon.orthogonality_errors(grads, state, params, layout=layout)
            return errors, optax_normuon.update_diagnostics(grads, params, layout=layout)

        text = str(jax.make_jaxpr(numbers)(params, tx.init(params), params))
        return text.count("dot_general"), text.count("sqrt")

    assert products(5) == products(1)
    assert products(1)[0] > 10


def test_a_leaf_has_its_own_numbers_among_others_of_its_shape():
    rng = np.random.default_rng(0)
    shapes = {"a": (16, 24), "stack": (3, 16, 24), "b": (16, 24), "fused": (16, 48)}
    layout = dict.fromkeys(shapes, MatrixLayout(-2, -1))
    layout["fused"] = MatrixLayout(-2, -1, output_splits=(12, 24, 12))
    grads, params = ({n: of(rng, *shape) for n, shape in shapes.items()} for _ in range(2))

    def numbers(*names):
        own = [{name: tree[name] for name in names} for tree in (grads, params, layout)]
        state = optax_normuon.normuon(0.1, layout=own[2]).init(own[1])
        keywords = dict(layout=own[2], compute_dtype=jnp.float32)
        errors = optax_normuon.orthogonality_errors(own[0], state, own[1], **keywords)
        sizes = optax_normuon.update_diagnostics(*own[:2], layout=own[2])
        return {name: (*sizes[name], errors[name]) for name in names}

    together = numbers(*shapes)
    for name in shapes:
        for one, other in zip(together[name], numbers(name)[name], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4)
    assert together["fused"][0].shape == (3,)
    # The blocks of a fused projection in their order, though the middle one is of another stack.
    for block, columns in enumerate((slice(0, 12), slice(12, 36), slice(36, 48))):
        rms = jnp.sqrt(jnp.square(grads["fused"][:, columns]).mean())
        np.testing.assert_allclose(together["fused"][0][block], rms, rtol=1e-6)


def test_leaves_without_a_gradient_are_left_out_and_a_missing_leaf_is_named(params):
    grads = gradients_like(params, 1)
    state = optax_normuon.normuon(0.1, layout=LAYOUT).init(params)

    def both(grads):
        yield optax_normuon.update_diagnostics(grads, params, layout=LAYOUT)
        yield optax_normuon.orthogonality_errors(grads, state, params, layout=LAYOUT)

    whole = both(grads)
    for numbers in both(grads | {"experts": {"kernel": None}}):
        assert list(numbers) == ["dense/kernel"]
        expected = next(whole)["dense/kernel"]
        np.testing.assert_array_equal(numbers["dense/kernel"], expected)
    del grads["experts"]
    with pytest.raises(ValueError, match="experts/kernel: there is no update"):
        optax_normuon.update_diagnostics(grads, params, layout=LAYOUT)
    with pytest.raises(ValueError, match="experts/kernel: there is no update"):
        optax_normuon.orthogonality_errors(grads, state, params, layout=LAYOUT)


def test_an_orthogonalizer_of_ones_own_is_measured(params):
    def halved(stack):
        factor = optax_normuon.polar_factor(stack, compute_dtype=jnp.float32)
        return factor / 2

    keywords = dict(layout=LAYOUT, orthogonalizer=halved)
    state = optax_normuon.normuon(0.1, **keywords).init(params)
    errors = optax_normuon.orthogonality_errors(
        gradients_like(params, 1), state, params, **keywords
    )
    for error in errors.values():  # s^2 - 1 is about 1/4 - 1
        np.testing.assert_allclose(error, 0.75, atol=0.1)


def test_boxed_parameters_have_the_numbers_of_bare_ones(params):
    grads = gradients_like(params, 1)
    boxed = [
        jax.tree.map(lambda leaf: nn.Partitioned(leaf, (None,) * leaf.ndim), tree)
        for tree in (grads, params)
    ]

    def numbers(grads, params):
        state = optax_normuon.normuon(0.1, layout=LAYOUT).init(params)
        errors = optax_normuon.orthogonality_errors(
            grads, state, params, layout=LAYOUT, compute_dtype=jnp.float32
        )
        sizes = optax_normuon.update_diagnostics(grads, params, layout=LAYOUT)
        return errors, {name: tuple(each) for name, each in sizes.items()}

    assert jax.tree.all(jax.tree.map(jnp.array_equal, numbers(*boxed), numbers(grads, params)))


def test_with_specs_matrices_go_to_an_owner_and_not_to_everybody():
    shapes, specs = {f"w{i}": (16, 24) for i in range(4)}, {f"w{i}": P("x") for i in range(4)}
    mesh = mesh_of(AxisType.Auto, x=4)
    keywords = dict(layout=dict.fromkeys(shapes, MatrixLayout(0, 1)), param_specs=specs)
    grads = put(draw(shapes), specs, mesh)
    state = optax_normuon.normuon(0.1, **keywords).init(grads)
    measure = jax.jit(functools.partial(optax_normuon.orthogonality_errors, **keywords))
    found = collectives(measure.lower(grads, state, grads).compile().as_text())
    assert "all-to-all" in {operation for operation, *_ in found}
    # Of 1,536 bytes a matrix nobody is sent what is not its own; the errors are sent to all.
    assert all(size <= 16 for operation, size, _ in found if operation == "all-gather")


SPECS = {"a": P("x", "y"), "b": P(None, "x"), "c": P("y", "x"), "stack": P("x", None, "y")}
ON_MESH = {"a": (16, 24), "b": (16, 24), "c": (24, 16), "stack": (4, 16, 24)}
TO_COLUMNS = {name: MatrixLayout(-2, -1) for name in SPECS}


@pytest.mark.parametrize("recipe", ["normuon", "nanochat"])
@pytest.mark.parametrize("told", [True, False], ids=["specs", "no specs"])
@pytest.mark.parametrize("mode", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"])
def test_on_a_mesh_they_are_those_of_one_device(mode, told, recipe):
    keywords = dict(recipe=recipe, layout=TO_COLUMNS, compute_dtype=jnp.float32)

    def numbers(mesh, param_specs=None):
        params, grads = (put(draw(ON_MESH, seed), SPECS, mesh) for seed in (0, 1))
        tx = optax_normuon.normuon(0.1, param_specs=param_specs, **keywords)

        @jax.jit
        def step(grads, state, params):
            errors = optax_normuon.orthogonality_errors(
                grads, state, params, param_specs=param_specs, **keywords
            )
            return optax_normuon.update_diagnostics(grads, params, layout=TO_COLUMNS), errors

        return jax.device_get(step(grads, tx.init(params), params))

    mesh = mesh_of(mode, x=4, y=2)
    with jax.set_mesh(mesh) if mode == AxisType.Explicit else contextlib.nullcontext():
        found = numbers(mesh, SPECS if told else None)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(numbers(None)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4)
