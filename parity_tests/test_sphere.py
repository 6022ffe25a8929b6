"""Spheres: both frameworks against the oracle in float64, and against each other in float32."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import optax_normuon
import torch_ref
from parity_tests import oracle
from parity_tests.compare import infinity_distance
from parity_tests.spectra import SPECTRA

BOUND = 5e-13
FLOAT32_BOUND = 6e-7
STEPS = 8

CASES = {
    "geodesic": dict(axis=0),
    "retraction": dict(axis=0, path="retraction"),
    "by the tangent": dict(axis=1, angle="tangent"),
    "retraction by the tangent": dict(axis=-1, path="retraction", angle="tangent", radius=2.5),
}


def draw(dtype) -> tuple[np.ndarray, list[np.ndarray]]:
    """(a weight with one slice of zeros on each side, gradients of hard spectra)."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((12, 9))
    w[3], w[:, 2] = 0, 0
    spectra = list(SPECTRA.values())
    grads = [spectra[t % len(spectra)](rng, 12, 9) for t in range(STEPS)]
    return w.astype(dtype), [grad.astype(dtype) for grad in grads]


def in_jax(keywords, dtype) -> np.ndarray:
    w, grads = draw(dtype)
    tx = optax_normuon.to_sphere(0.1, **keywords)
    params, history = jnp.asarray(w), [w]
    state = tx.init(params)
    for grad in grads:
        update, state = tx.update(jnp.asarray(grad), state, params)
        params = params + update
        history.append(np.asarray(params))
    return np.stack(history)


def in_torch(keywords, dtype) -> np.ndarray:
    w, grads = draw(dtype)
    param, history = torch.tensor(w), [w]
    for grad in grads:
        param = param + torch_ref.to_sphere(torch.tensor(grad), param, lr=0.1, **keywords)
        history.append(param.numpy())
    return np.stack(history)


def by_oracle(keywords) -> np.ndarray:
    w, grads = draw(np.float64)
    history = [w]
    for grad in grads:
        history.append(
            oracle.sphere(
                history[-1],
                grad,
                0.1,
                keywords.get("radius", 1.0),
                keywords["axis"],
                path=keywords.get("path", "geodesic"),
                by_tangent="angle" in keywords,
            )
        )
    return np.stack(history)


@pytest.mark.parametrize("run", [in_jax, in_torch])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("x64")
def test_slices_move_as_the_oracle_says(case, run):
    """Largest distance: 1.1e-13 (angles of many turns, by the tangent), else 4.8e-16."""
    distance = infinity_distance(run(CASES[case], np.float64), by_oracle(CASES[case]))
    print(f"{case}, {run.__name__}: {distance:.1e}")
    assert distance <= BOUND
    other = by_oracle({**CASES[case], "radius": 2.4})
    assert infinity_distance(run(CASES[case], np.float64), other) > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_both_frameworks_make_the_same_float32_slices(case):
    """Largest distance: 1.5e-7."""
    distance = infinity_distance(in_jax(CASES[case], np.float32), in_torch(CASES[case], np.float32))
    print(f"{case}: {distance:.1e}")
    assert distance <= FLOAT32_BOUND


@pytest.mark.parametrize("axis", [0, (0, 1)])
def test_both_frameworks_project_alike(axis):
    w, (u, *_) = draw(np.float32)
    for name in ("project_to_sphere", "project_to_tangent"):
        tx = getattr(optax_normuon, name)(axis=axis)
        ours, _ = tx.update(jnp.asarray(u), tx.init(jnp.asarray(w)), jnp.asarray(w))
        theirs = getattr(torch_ref, name)(torch.tensor(u), torch.tensor(w), axis=axis)
        assert infinity_distance(np.asarray(ours), theirs.numpy()) <= FLOAT32_BOUND


@pytest.mark.usefixtures("x64")
def test_hyperballs_move_as_the_oracle_says():
    """A matrix of zeros, a zero update, and one with a radius of its own are among them."""
    w, grads = draw(np.float64)
    for weight, grad, radius in [
        (w, grads[0], 3.0),
        (w, np.zeros_like(w), 3.0),
        (np.zeros_like(w), grads[0], 3.0),
    ]:
        wanted = oracle.hyperball(weight, grad, 0.2 * 0.5, radius)
        tx = optax_normuon.to_hyperball(
            0.2, radius=radius, lr_mul=0.5, layout=optax_normuon.MatrixLayout(1, 0)
        )
        params = jnp.asarray(weight)
        update, _ = tx.update(jnp.asarray(grad), tx.init(params), params)
        increment = torch_ref.to_hyperball(
            torch.tensor(grad), torch.tensor(weight), lr=0.2, radius=radius, lr_mul=0.5
        )
        assert np.abs(np.asarray(params + update) - wanted).max() <= 1e-14
        assert np.abs(weight + increment.numpy() - wanted).max() <= 1e-14
