"""The kernels under JAX's transformations (jit, scan, vmap), as users' programs apply them.

Here under Triton's interpreter; `test_bitwise.py` runs the same code on a GPU.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_normuon
from normuon_core import RECIPES, Polar
from normuon_core.polynomials import POLAR_EXPRESS
from optax_normuon import MatrixLayout, normuon, polar_factor

LAYOUT = {
    "wide": MatrixLayout(-2, -1),
    "stack": MatrixLayout(-2, -1),
    "split": MatrixLayout(-1, -2, (5, 2, 2)),
    "heads": MatrixLayout((0, 2), 3),
}
SHAPES = {"wide": (6, 11), "stack": (2, 7, 4), "split": (9, 6), "heads": (3, 2, 2, 5)}


def draw(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.standard_normal(s), jnp.float32) for n, s in SHAPES.items()}


RECIPE = dataclasses.replace(RECIPES["normuon"], polar=Polar(coefficients=POLAR_EXPRESS[:1]))
"""One step of the polynomial: the interpreter takes a moment for each product."""


def optimizer(learning_rate=0.02, backend="triton", **keywords):
    return normuon(
        learning_rate,
        recipe=RECIPE,
        layout=LAYOUT,
        weight_decay=0.3,
        compute_dtype=jnp.float32,
        backend=backend,
        **keywords,
    )


def steps(tx, count=2):
    params, state = draw(0), tx.init(draw(0))
    update = jax.jit(tx.update)
    for seed in range(1, count + 1):
        updates, state = update(draw(seed), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_the_kernels_and_xla_keep_the_same_state(interpreted):
    """The largest relative difference of any array after two steps: 2.2e-7."""
    ours, theirs = steps(optimizer()), steps(optimizer(backend="xla"))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=0, atol=9e-7 * float(jnp.max(jnp.abs(y))))


def test_a_run_of_one_backend_goes_on_with_the_other(interpreted):
    params, state = steps(optimizer(backend="xla"), 1)
    ours, _ = jax.jit(optimizer().update)(draw(2), state, params)
    theirs, _ = jax.jit(optimizer(backend="xla").update)(draw(2), state, params)
    for name in SHAPES:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-6)


def test_vmap_over_learning_rates_is_a_loop_over_them(interpreted):
    rates = jnp.asarray([0.02, 0.1])

    def one(rate):
        return steps(optimizer(rate))

    together = jax.jit(jax.vmap(one))(rates)
    for index, rate in enumerate(rates):
        assert_equal(jax.tree.map(lambda x, i=index: x[i], together), one(rate))


def test_vmap_over_gradients_folds_into_the_stack(interpreted, monkeypatch):
    """Each product is launched once for all gradients, and each has the bits of a step of its own."""
    from normuon_core.kernels import launches

    tx, params = optimizer(), draw(0)
    state = tx.init(params)
    grads = jax.tree.map(lambda *x: jnp.stack(x), draw(1), draw(2))
    counts = []
    product = launches.product

    def recorded(count, *sides, **keywords):
        counts.append(count)
        return product(count, *sides, **keywords)

    monkeypatch.setattr(launches, "product", recorded)
    update = jax.jit(lambda g: tx.update(g, state, params))
    together, _ = jax.jit(jax.vmap(lambda g: tx.update(g, state, params)))(grads)
    folded, counts[:] = list(counts), []
    for index in range(2):
        one = jax.tree.map(lambda x, i=index: x[i], grads)
        alone, _ = update(one)
        assert_equal(jax.tree.map(lambda x, i=index: x[i], together), alone)
    # vmap traces the function without the batch axis first, so the launches of one step come before.
    alone = counts
    assert folded == alone + [2 * count for count in alone]


def test_a_vmap_within_a_vmap_makes_the_bits_of_a_loop(interpreted):
    rates = jnp.asarray([[0.02, 0.1], [0.003, 0.05]])
    state = optimizer().init(draw(0))

    @jax.jit
    def one(rate):
        return optimizer(rate).update(draw(1), state, draw(0))

    together = jax.jit(jax.vmap(jax.vmap(one)))(rates)
    for index in np.ndindex(2, 2):
        assert_equal(jax.tree.map(lambda x, i=index: x[i], together), one(rates[index]))


def test_jit_and_scan_are_a_loop(interpreted):
    tx = optimizer(optax.linear_schedule(0.1, 0.0, 5))
    grads = jax.tree.map(lambda *x: jnp.stack(x), draw(1), draw(2))

    @jax.jit
    def scanned(params):
        def step(carry, grads):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), grads)[0]

    assert_equal(scanned(draw(0)), steps(tx))


def test_a_parameter_without_gradient_keeps_its_state(interpreted):
    tx = optimizer()
    params, state = steps(tx, 1)
    grads = {**draw(2), "split": None}
    updates, after = jax.jit(tx.update)(grads, state, params)
    assert updates["split"] is None
    for key in ("momentum", "second_moment"):
        before, now = (optax.tree.get(each, key) for each in (state, after))
        assert_equal(before["split"], now["split"])
        assert (np.asarray(before["wide"]) != np.asarray(now["wide"])).any()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_half_precision_parameters_are_taken_as_they_are(interpreted, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), draw(0))
    grads = jax.tree.map(lambda x: x.astype(dtype), draw(1))
    tx = optimizer()
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    momenta = jax.tree.leaves(optax.tree.get(state, "momentum"))
    assert {leaf.dtype for leaf in momenta} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("shape", [(2, 5, 9), (2, 3, 9, 5)])
def test_polar_factors_under_vmap_are_those_of_a_loop(interpreted, shape):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    keywords = dict(backend="triton", compute_dtype=jnp.float32)
    factor = jax.jit(lambda x: polar_factor(x, **keywords))
    together = jax.jit(jax.vmap(factor))(x)
    alone = jnp.stack([factor(each) for each in x])
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_allclose(
        together, polar_factor(x, backend="xla", compute_dtype=jnp.float32), atol=2e-5
    )


def test_the_kernels_run_in_stages_that_stand_alone(interpreted):
    keywords = dict(layout=LAYOUT, compute_dtype=jnp.float32)
    for make in (optax_normuon.orthogonalize, optax_normuon.scale_by_normuon):
        ours, theirs = (make(backend=backend, **keywords) for backend in ("triton", "xla"))
        a, _ = jax.jit(ours.update)(draw(1), ours.init(draw(0)))
        b, _ = jax.jit(theirs.update)(draw(1), theirs.init(draw(0)))
        for name in SHAPES:
            np.testing.assert_allclose(a[name], b[name], atol=2e-5)


def test_float64_is_left_to_xla_by_auto_and_refused_otherwise(interpreted, x64):
    params = {"wide": jnp.ones((6, 11), jnp.float64)}
    layout = {"wide": LAYOUT["wide"]}
    auto = normuon(0.1, layout=layout)
    updates, _ = auto.update(params, auto.init(params), params)
    assert updates["wide"].dtype == jnp.float64
    with pytest.raises(ValueError, match="takes float16, bfloat16, float32, not float64"):
        normuon(0.1, layout=layout, backend="triton").init(params)
