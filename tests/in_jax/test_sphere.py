"""Slices and matrices of constant norm: the sphere's geometry, and what a chain makes of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_normuon
from normuon_core import RECIPES, Hyperball
from optax_normuon import (
    MatrixLayout,
    describe,
    normuon,
    project_to_sphere,
    project_to_tangent,
    scale_by_normuon,
    to_hyperball,
    to_sphere,
    with_bf16_remainder,
)

EPS = np.finfo(np.float32).eps
SHAPE = (64, 24)


def draw(seed, shape=SHAPE) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def norms(x, axis=0) -> np.ndarray:
    return np.sqrt(np.square(np.asarray(x, np.float64)).sum(axis))


def on_sphere(seed, shape=SHAPE) -> jax.Array:
    x = np.asarray(draw(seed, shape), np.float64)
    return jnp.asarray(x / norms(x)[None], jnp.float32)


def moved(tx, w, u):
    """The weight after one step of a transformation that is given the update u."""
    updates, _ = tx.update({"up": u}, tx.init({"up": w}), {"up": w})
    return w + updates["up"]


def trajectory(tx, steps, w, gradient=None, seed=1):
    """The weights after each step; random gradients, or `gradient(w)`."""
    params = {"up": w}

    @jax.jit
    def run(params, state):
        def step(carry, key):
            params, state = carry
            g = jax.random.normal(key, w.shape) if gradient is None else gradient(params["up"])
            updates, state = tx.update({"up": g}, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params["up"]

        keys = jax.random.split(jax.random.key(seed), steps)
        return jax.lax.scan(step, (params, state), keys)[1]

    return run(params, tx.init(params))


@pytest.mark.parametrize("path", ["geodesic", "retraction"])
def test_norms_stay_within_four_ulps_over_a_thousand_steps(path):
    """Measured: 1.7 ulps of 1 (geodesic), 1.4 (retraction)."""
    tx = optax.chain(scale_by_normuon(compute_dtype=jnp.float32), to_sphere(0.03, path=path))
    found = norms(trajectory(tx, 1000, draw(0)), axis=1)
    assert np.abs(found - 1).max() <= 4 * EPS


def test_a_kept_radius_does_not_wander():
    """Measured: 2.0 ulps of each norm."""
    start = draw(0)
    tx = optax.chain(optax.scale(1.0), to_sphere(0.03, radius=None))
    found = norms(trajectory(tx, 1000, start), axis=1)
    assert np.abs(found / norms(start) - 1).max() <= 4 * EPS


def test_without_the_tangent_projection_norms_drift():
    """w cos theta + u sin theta keeps a norm only if u is a tangent; measured 0.31 in 400 steps."""

    def unprojected(theta):
        def update(updates, state, params):
            def turn(u, w):
                u = u / jnp.linalg.norm(u, axis=0, keepdims=True)
                return w * jnp.cos(theta) - u * jnp.sin(theta) - w

            return jax.tree.map(turn, updates, params), state

        return optax.GradientTransformation(lambda _: optax.EmptyState(), update)

    drift = [
        np.abs(norms(trajectory(tx, 400, on_sphere(0)), axis=1) - 1).max()
        for tx in (unprojected(0.03), to_sphere(0.03))
    ]
    assert drift[0] > 0.1
    assert drift[1] <= 4 * EPS


@pytest.mark.parametrize("theta", [0.05, 0.1, 0.2])
def test_geodesic_and_retraction_differ_by_a_third_of_the_angle_cubed(x64, theta):
    w = np.asarray(draw(0), np.float64)
    w, u = jnp.asarray(w / norms(w)), jnp.asarray(draw(1), jnp.float64)
    geodesic, retraction = (
        moved(to_sphere(theta, path=path), w, u) for path in ("geodesic", "retraction")
    )
    difference = norms(geodesic - retraction)
    np.testing.assert_allclose(difference, theta**3 / 3, rtol=theta**2)
    angle = np.arccos(np.sum(np.asarray(geodesic) * np.asarray(w), 0))
    np.testing.assert_allclose(angle, theta, rtol=1e-9)


def test_the_angle_may_be_the_length_of_the_tangent(x64):
    w = np.asarray(draw(0), np.float64)
    w, u = jnp.asarray(w / norms(w)), jnp.asarray(draw(1), jnp.float64)
    tangent = u - w * jnp.sum(w * u, 0, keepdims=True)
    after = moved(to_sphere(0.01, angle="tangent"), w, u)
    angle = np.arccos(np.sum(np.asarray(after) * np.asarray(w), 0))
    np.testing.assert_allclose(angle, 0.01 * norms(tangent), rtol=1e-9)


def test_the_projected_update_is_a_tangent_even_where_it_is_nearly_along_the_weight():
    """Measured: 1.0 units of rounding of the update's length; one subtraction leaves 3e3 of them."""
    w = on_sphere(0)
    u = 1e4 * w + draw(1)
    tx = project_to_tangent()
    t, _ = tx.update({"up": u}, tx.init({"up": w}), {"up": w})
    along = np.abs(np.sum(np.asarray(t["up"], np.float64) * np.asarray(w, np.float64), 0))
    assert (along / norms(t["up"])).max() <= 8 * EPS


def loss(w):
    target = on_sphere(7)
    return jnp.sum(jnp.square(w - target) * jnp.linspace(0.5, 2.0, w.shape[0])[:, None])


@pytest.mark.parametrize(
    "last",
    [
        to_sphere(0.01),
        to_sphere(0.01, path="retraction"),
        to_sphere(0.01, angle="tangent"),
        to_hyperball(0.01),
        optax.chain(optax.scale_by_learning_rate(0.01), project_to_sphere()),
    ],
    ids=["geodesic", "retraction", "tangent", "hyperball", "projection"],
)
def test_a_step_descends_and_its_opposite_climbs(last):
    """The rule on record turned the weights towards the gradient, and its loss rose."""
    w = on_sphere(0)
    gradient = jax.grad(loss)(w)
    assert loss(moved(last, w, gradient)) < loss(w) - 1e-3
    assert loss(moved(last, w, -gradient)) > loss(w) + 1e-3


def test_a_slice_without_a_tangent_or_without_weights_is_left_alone():
    w = draw(0).at[:, 3].set(0)
    u = draw(1).at[:, 0].set(3.3 * w[:, 0]).at[:, 1].set(0)
    for tx in (to_sphere(0.1), to_sphere(0.1, path="retraction", angle="tangent")):
        after = moved(tx, w, u)
        np.testing.assert_array_equal(after[:, :2], w[:, :2])
        np.testing.assert_array_equal(after[:, 3], w[:, 3])
        assert np.all(after[:, 4:] != w[:, 4:])
    np.testing.assert_array_equal(moved(to_sphere(0.1, axis=0), w[:1], u[:1]), w[:1])


def test_a_nan_reaches_its_own_slice_alone():
    after = moved(to_sphere(0.1), draw(0), draw(1).at[5, 2].set(jnp.nan))
    assert np.isnan(after[:, 2]).all()
    assert np.isfinite(np.delete(np.asarray(after), 2, 1)).all()
    layout = {"up": MatrixLayout(1, 2)}
    after = moved(
        to_hyperball(0.1, layout=layout), draw(0, (3, 4, 5)), draw(1, (3, 4, 5)).at[1].set(jnp.inf)
    )
    assert np.isnan(after[1]).all()
    assert np.isfinite(after[::2]).all()


def test_axes_by_role_and_leaves_without_slices():
    """As nGPT has them: inputs of the up projection, outputs of the down projection, rows of a table."""
    params = {
        "up": draw(0, (4, 6)),
        "down": draw(1, (6, 4)),
        "table": draw(2, (2, 3, 4)),
        "scale": draw(3, (4,)),
    }
    axis = {"up": 0, "down": -1, "table": (1, 2), "scale": None}
    tx = to_sphere(0.1, axis=axis, radius=2.0)
    updates, _ = tx.update(params, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    # The update is the weight itself, which has no tangent.
    np.testing.assert_array_equal(after["up"], params["up"])
    np.testing.assert_allclose(after["scale"], 0.9 * params["scale"], rtol=1e-6)
    other = jax.tree.map(jnp.flip, params)
    updates, _ = tx.update(other, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    np.testing.assert_allclose(norms(after["up"], 0), 2, rtol=1e-6)
    np.testing.assert_allclose(norms(after["down"], 1), 2, rtol=1e-6)
    np.testing.assert_allclose(norms(after["table"], (1, 2)), 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: to_sphere(0.1, radius=0.0), ValueError, "radius=0.0; use a finite number above 0"),
        (lambda: to_hyperball(0.1, radius=-1), ValueError, "radius=-1; use"),
        (lambda: Hyperball(float("inf")), ValueError, "radius=inf; use"),
        (lambda: to_sphere(-0.1), ValueError, "learning_rate=-0.1; use"),
        (lambda: to_sphere(0.1, path="straight"), ValueError, "did you mean 'retraction'"),
        (lambda: to_sphere(0.1, angle="rates"), ValueError, "did you mean 'rate'"),
        (
            lambda: to_sphere(0.1, axis=2).init({"up": draw(0)}),
            ValueError,
            "up: axis=2 does not fit",
        ),
        (lambda: to_sphere(0.1, axis=(0, -2)).init({"up": draw(0)}), ValueError, "different axes"),
        (lambda: to_sphere(0.1, axis=1.5).init({"up": draw(0)}), TypeError, "1.5 is no integer"),
        (lambda: to_sphere(0.1, axis={"a": 0}).init({"up": draw(0)}), ValueError, "no 'up'"),
        (lambda: moved(project_to_sphere(), draw(0), draw(0)[:3]), ValueError, "up: a gradient of"),
        (
            lambda: optax.inject_hyperparams(to_sphere)(0.1, axis=len).init(draw(0)),
            TypeError,
            "axis is no schedule",
        ),
    ],
)
def test_bad_input_is_refused_with_a_remedy(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_schedules_and_injected_rates_are_followed():
    w, u = draw(0), draw(1)
    expected = moved(to_sphere(0.25), w, u)
    np.testing.assert_array_equal(
        moved(to_sphere(lambda step: 0.25 * (1 + step.astype(jnp.float32))), w, u), expected
    )
    injected = optax_normuon.inject_hyperparams(to_sphere)(0.25, axis=0)
    np.testing.assert_array_equal(moved(injected, w, u), expected)
    rates = jnp.asarray([0.25, 0.5])
    swept = jax.vmap(lambda rate: moved(to_sphere(rate), w, u))(rates)
    np.testing.assert_allclose(swept[0], expected, atol=2 * EPS)
    assert np.abs(swept[1] - expected).max() > 0.01


def test_projection_every_third_step_needs_nothing_but_optax():
    lazily = optax.chain(
        optax.scale_by_learning_rate(0.1),
        optax.conditionally_transform(project_to_sphere(), lambda step: step % 3 == 2),
    )
    off = np.abs(norms(trajectory(lazily, 9, on_sphere(0)), axis=1) - 1).max(1)
    assert np.all(off[2::3] <= 4 * EPS)
    assert np.all(np.delete(off, [2, 5, 8]) > 0.01)


def test_bfloat16_parameters_with_a_remainder_train_as_float32_ones():
    """Without it the norms stay within bfloat16's rounding only: measured 1.5e-3."""
    chain = optax.chain(scale_by_normuon(compute_dtype=jnp.float32), to_sphere(0.03))
    start = on_sphere(0).astype(jnp.bfloat16)
    tx = with_bf16_remainder(chain)
    params, state = {"up": start}, tx.init({"up": start})
    plain, plain_state = {"up": start}, chain.init({"up": start})
    whole, whole_state = {"up": start.astype(jnp.float32)}, chain.init({"up": start})
    for seed in range(5):
        gradient = {"up": draw(seed)}
        updates, state = tx.update(gradient, state, params)
        with jax.numpy_dtype_promotion("standard"):
            params = optax.apply_updates(params, updates)
        updates, plain_state = chain.update(gradient, plain_state, plain)
        plain = optax.apply_updates(plain, updates)
        updates, whole_state = chain.update(gradient, whole_state, whole)
        whole = optax.apply_updates(whole, updates)
    joined = optax_normuon.remainder.join(params, state.remainder)
    np.testing.assert_array_equal(joined["up"], whole["up"])
    assert np.abs(norms(joined["up"]) - 1).max() <= 4 * EPS
    assert 1e-4 < np.abs(norms(plain["up"]) - 1).max() < 4e-3


def test_every_matrix_of_a_stack_and_every_block_keeps_its_norm():
    layout = {"up": MatrixLayout(1, 2, output_splits=(4, 3, 3))}
    w = draw(0, (2, 6, 10)) * jnp.arange(1.0, 11.0)[None, None]
    tx = normuon(0.1, recipe="normuon_h", layout=layout, compute_dtype=jnp.float32)
    after = trajectory(tx, 100, w)[-1]
    for block in (slice(0, 4), slice(4, 7), slice(7, 10)):
        kept = norms(after[..., block], (1, 2)) / norms(w[..., block], (1, 2))
        assert np.abs(kept - 1).max() <= 4 * EPS
    assert np.abs(norms(after, 1) / norms(w, 1) - 1).max() > 0.1


def test_the_recipe_is_its_stages_and_the_hyperball():
    w, g = draw(0), draw(1)
    stages = optax.chain(
        scale_by_normuon(recipe="normuon_h", compute_dtype=jnp.float32),
        to_hyperball(0.1, lr_mul=0.5),
    )
    whole = normuon(0.1, recipe="normuon_h", lr_mul=0.5, compute_dtype=jnp.float32)
    np.testing.assert_allclose(moved(whole, w, g), moved(stages, w, g), atol=2 * EPS)
    other = normuon(0.1, recipe="normuon_h", compute_dtype=jnp.float32)
    assert np.abs(moved(whole, w, g) - moved(other, w, g)).max() > 1e-3


def test_a_matrix_that_is_zero_never_moves_and_a_given_radius_is_reached():
    assert not moved(to_hyperball(0.1), jnp.zeros(SHAPE), draw(0)).any()
    recipe = dataclasses.replace(RECIPES["muon_h"], hyperball=Hyperball(radius=3.0))
    after = moved(normuon(0.1, recipe=recipe), draw(0), draw(1))
    np.testing.assert_allclose(norms(after, (0, 1)), 3, rtol=1e-6)


def test_describe_says_that_the_kernels_have_no_hyperball():
    text = describe({"up": {"kernel": jnp.zeros((8, 16))}}, recipe="muon_h")
    assert "Engine xla steps all matrices: the kernels cannot run hyperball=Hyperball" in text
    assert "radius 4" in text
    with pytest.raises(ValueError, match="cannot run hyperball"):
        normuon(0.1, recipe="muon_h", backend="triton")


def test_flax_boxes_are_kept_and_radii_stand_outside_of_them():
    linen = pytest.importorskip("flax.linen")
    box = linen.Partitioned(draw(0), names=("embed", "mlp"))
    params = {"up": {"kernel": box}}
    for tx in (to_sphere(0.1, radius=None, axis=0), to_hyperball(0.1)):
        updates, state = tx.update(params, tx.init(params), params)
        assert isinstance(updates["up"]["kernel"], linen.Partitioned)
        assert isinstance(state.radius["up"]["kernel"], jax.Array)
