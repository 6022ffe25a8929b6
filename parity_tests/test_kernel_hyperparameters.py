"""A new rule makes a new launch of a kernel; a new number never does.

In JAX, under Triton's interpreter. However a number is given, the bits are the same and one compilation
is enough.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from normuon_core import RECIPES, Polar
from normuon_core.kernels import launches
from normuon_core.kernels.geometry import block_geometries
from normuon_core.kernels.launches import (
    MomentumForm,
    NeuronNormForm,
    Output,
    feed,
    finish,
    squares,
    statistics,
)
from normuon_core.polynomials import POLAR_EXPRESS
from optax_normuon import STATIC_ARGS, MatrixLayout, normuon

RECIPE = dataclasses.replace(RECIPES["normuon"], polar=Polar(coefficients=POLAR_EXPRESS[:1]))
"""One step of the polynomial: the interpreter takes a moment for each product."""

STATIC = dict(
    recipe=RECIPE,
    layout=MatrixLayout(0, 1),
    compute_dtype=jnp.float32,
    algorithm="standard",
)
NAMES = ("momentum", "beta2", "weight_decay", "learning_rate")
FIRST, SECOND = (0.9, 0.8, 0.1, 0.02), (0.7, 0.6, 0.3, 0.05)

CACHES = {
    name: getattr(launches, name) for name in ("squares", "feed", "statistics", "finish", "product")
}


def draw(seed):
    return {"w": jnp.asarray(np.random.default_rng(seed).standard_normal((6, 11)), jnp.float32)}


def make(momentum, beta2, weight_decay, learning_rate, backend="triton"):
    keywords = dict(momentum=momentum, beta2=beta2, weight_decay=weight_decay)
    return normuon(learning_rate, backend=backend, **keywords, **STATIC)


def steps(tx, count=2):
    params, state = draw(0), tx.init(draw(0))
    for seed in range(1, count + 1):
        updates, state = tx.update(draw(seed), state, params)
        params = optax.apply_updates(params, updates)
    return params["w"]


def misses():
    return {name: cache.cache_info().misses for name, cache in CACHES.items()}


@pytest.fixture(scope="module")
def expected():
    """The steps with plain numbers, for both sets of them."""
    from parity_tests.interpreted import interpreted_kernels

    pytest.importorskip("triton", reason="Triton has no build for this platform")
    with interpreted_kernels():
        return [jax.jit(lambda v=values: steps(make(*v)))() for values in (FIRST, SECOND)]


def test_new_numbers_make_no_new_launch(interpreted, expected):
    before = misses()
    steps(make(*(value / 3 for value in FIRST)))
    assert misses() == before
    assert (np.asarray(expected[0]) != np.asarray(expected[1])).all()


@pytest.mark.parametrize("kind", ["array", "float64 array of NumPy", "schedule"])
def test_arrays_and_schedules_make_the_bits_of_numbers(interpreted, expected, kind):
    values = {
        "array": [jnp.float32(value) for value in FIRST],
        "float64 array of NumPy": [np.asarray(value) for value in FIRST],
        "schedule": [lambda count, v=value: jnp.where(count < 9, v, 0.5) for value in FIRST],
    }[kind]
    if kind == "schedule":
        values[1] = FIRST[1]  # Stage 3 keeps no count of steps, so it cannot follow a schedule.
    np.testing.assert_array_equal(jax.jit(lambda: steps(make(*values)))(), expected[0])


def test_traced_values_compile_once_and_make_the_bits_of_numbers(interpreted, expected):
    traced = jax.jit(lambda values: steps(make(*values)))
    for values, wanted in zip((FIRST, SECOND), expected, strict=True):
        np.testing.assert_array_equal(traced(jnp.asarray(values)), wanted)
    assert traced._cache_size() == 1


def test_vmap_over_values_is_a_loop_over_them(interpreted, expected):
    together = jax.jit(jax.vmap(lambda values: steps(make(*values))))(jnp.asarray([FIRST, SECOND]))
    np.testing.assert_array_equal(together, jnp.stack(expected))


def test_injected_hyperparameters_compile_once_and_make_the_bits_of_numbers(interpreted, expected):
    tx = optax.inject_hyperparams(normuon, static_args=STATIC_ARGS)(
        **dict(zip(NAMES, FIRST, strict=True)), backend="triton", **STATIC
    )
    update = jax.jit(tx.update)
    for values, wanted in zip((FIRST, SECOND), expected, strict=True):
        params, state = draw(0), tx.init(draw(0))
        state.hyperparams.update(
            {n: jnp.asarray(v, jnp.float32) for n, v in zip(NAMES, values, strict=True)}
        )
        for seed in (1, 2):
            updates, state = update(draw(seed), state, params)
            params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(params["w"], wanted)
    assert update._cache_size() == 1


def test_a_momentum_schedule_makes_the_steps_that_xla_makes(interpreted):
    """Largest difference relative to the largest weight: measured 5.2e-8; a constant is 5.5e-3 off."""
    schedule = optax.linear_schedule(0.95, 0.3, 2)
    ours, theirs, constant = (
        steps(make(momentum, *FIRST[1:], backend))
        for momentum, backend in ((schedule, "triton"), (schedule, "xla"), (0.95, "triton"))
    )
    scale = float(jnp.max(jnp.abs(theirs)))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2.1e-7 * scale)
    assert float(jnp.max(jnp.abs(constant - theirs))) > 1e-3 * scale


def test_interpreted_bfloat16_products_are_refused(interpreted):
    """The interpreter would multiply their bit patterns as integers."""
    tx = normuon(0.1, layout=MatrixLayout(0, 1), backend="triton")
    params = {"w": jnp.ones((16, 16))}
    with pytest.raises(ValueError, match=r"16 x 16.*bfloat16.*compute_dtype float32 or float16"):
        tx.update(params, tx.init(params), params)


VIEW = MatrixLayout(-1, -2).on((6, 11))
(GEOMETRY,) = block_geometries(VIEW)
KEPT = Output((6, 11), "float32")
LERP = MomentumForm("lerp", True)
FEED = dict(eps_rule="max", compute_dtype="float16", momentum=KEPT, first=True)
FINISH = dict(
    rms=False, cautious=True, decay_inside_scale=True, parameter=KEPT, add=False, first=True
)


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (lambda: squares(GEOMETRY, 1, MomentumForm("new", True)), "unknown momentum rule 'new'"),
        (lambda: feed(GEOMETRY, 1, MomentumForm("new", True), 1, **FEED), "unknown momentum rule"),
        (lambda: feed(GEOMETRY, 1, LERP, 1, **(FEED | {"eps_rule": "new"})), "unknown eps_rule"),
        (
            lambda: statistics(GEOMETRY, 1, NeuronNormForm("new", None), KEPT),
            "unknown eps_rule 'new'",
        ),
        (lambda: finish(GEOMETRY, 1, NeuronNormForm("add", "new"), **FINISH), "unknown rescale"),
    ],
    ids=["squares", "feed, momentum", "feed, eps", "statistics", "finish"],
)
def test_no_kernel_is_launched_for_a_rule_that_it_does_not_know(launch, message):
    with pytest.raises(ValueError, match=message):
        launch()
