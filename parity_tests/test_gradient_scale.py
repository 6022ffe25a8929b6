"""The update of c g is that of g, for gradient norms from 1e-15 to 1e15, in both frameworks."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding

from optax_normuon import MatrixLayout, muon, normuon, polar_factor
from tests.in_jax.meshes import collectives, mesh_of
from torch_ref import NorMuon
from torch_ref import polar_factor as torch_polar_factor

OWN = ("normuon", "muon", "muon_basic", "muon_complete")
RNG = np.random.default_rng(0)
MATRICES = {
    "gaussian": RNG.standard_normal((48, 64)),
    "rank one": np.outer(RNG.standard_normal(48), RNG.standard_normal(64)),
    "one huge row": RNG.standard_normal((48, 64)) * np.r_[1.0, np.full(47, 1e-3)][:, None],
}


def jax_update(g, recipe, steps=1, **keywords):
    tx = normuon(1.0, recipe=recipe, **keywords)
    params = {"kernel": jnp.zeros(g.shape)}
    state = tx.init(params)
    for _ in range(steps):
        update, state = tx.update({"kernel": jnp.asarray(g)}, state, params)
    return np.asarray(update["kernel"])


def torch_update(g, recipe, steps=1, **keywords):
    if "compute_dtype" in keywords:
        keywords["compute_dtype"] = getattr(torch, keywords["compute_dtype"])
    param = torch.nn.Parameter(torch.zeros(g.shape))
    optimizer = NorMuon([param], lr=1.0, recipe=recipe, **keywords)
    for _ in range(steps):
        before = param.detach().clone()
        param.grad = torch.tensor(g)
        optimizer.step()
    return (param.detach() - before).numpy()


UPDATES = pytest.mark.parametrize("update", [jax_update, torch_update], ids=["jax", "torch"])


def unit(name):
    return (MATRICES[name] / np.linalg.norm(MATRICES[name])).astype(np.float32)


@UPDATES
@pytest.mark.parametrize("recipe", OWN)
@pytest.mark.parametrize("name", MATRICES)
def test_a_power_of_two_changes_no_bit_in_the_default_dtype(name, recipe, update):
    g = unit(name)
    wanted = update(g, recipe)
    for exponent in (-49, -30, 30, 49):
        np.testing.assert_array_equal(update(g * np.float32(2.0**exponent), recipe), wanted)


@UPDATES
def test_heavy_ball_at_its_steady_state_does_not_overflow(update):
    """There the momentum has 20 times the gradient's norm; after one step it has 1.95 times."""
    g = unit("gaussian") * np.float32(2.0**49)
    assert np.isfinite(update(g, "muon_complete", 80)).all()


@UPDATES
@pytest.mark.usefixtures("interpreted")
def test_the_update_by_kernels_does_not_depend_on_the_scale_of_the_gradient(update):
    keywords = {"compute_dtype": "float16", "backend": "triton"}
    g = unit("rank one")[:24, :40]
    wanted = update(g, "normuon", **keywords)
    for exponent in (-49, 49):
        scaled = update(g * np.float32(2.0**exponent), "normuon", **keywords)
        np.testing.assert_array_equal(scaled, wanted)


@UPDATES
def test_below_the_range_an_update_fades_to_zero(update):
    g = unit("gaussian")
    norms = [
        np.linalg.norm(update(g * np.float32(scale), "muon", compute_dtype="float32"))
        for scale in (1.0, 1e-15, 1e-18, 1e-20, 1e-25, 0.0)
    ]
    assert np.isfinite(norms).all()
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-3)
    assert all(after <= before * 1.001 for before, after in itertools.pairwise(norms))
    assert norms[-2] < 1e-3 * norms[0]
    assert norms[-1] == 0


def large(name):
    rng = np.random.default_rng(1)
    if name == "rank one":
        g = np.outer(rng.standard_normal(1024), rng.standard_normal(1024))
    else:
        g = rng.standard_normal((1024, 1024))
        if name == "log-spaced":
            g *= np.geomspace(1, 1e-9, 1024)
    return (g / np.linalg.norm(g)).astype(np.float32)


def jax_factor(x, **keywords):
    return np.asarray(polar_factor(jnp.asarray(x), **keywords))


def torch_factor(x, **keywords):
    keywords = {key: getattr(torch, str(v), v) for key, v in keywords.items()}
    return torch_polar_factor(torch.tensor(x), **keywords).float().numpy()


# One step of the polynomial is enough: the norm, which is all that scale could change, comes before.
@pytest.mark.parametrize("factor", [jax_factor, torch_factor], ids=["jax", "torch"])
@pytest.mark.parametrize("name", ["gaussian", "rank one", "log-spaced"])
def test_a_large_matrix_has_the_same_factor_over_the_whole_range(name, factor):
    """The scales are those of g; on the first step of lerp momentum the direction u is 0.0975 g."""
    u = large(name) * np.float32(0.0975)
    wanted = factor(u, steps=1, compute_dtype="float32")
    for scale in (1e-15, 3.3e-10, 7e9, 1e15):
        found = factor(u * np.float32(scale), steps=1, compute_dtype="float32")
        # 9.9e-7 at most.
        assert np.linalg.norm(found - wanted) <= 4e-6 * np.linalg.norm(wanted)
    wanted = factor(u, steps=1)
    for exponent in (-49, 49):
        np.testing.assert_array_equal(factor(u * np.float32(2.0**exponent), steps=1), wanted)


@UPDATES
@pytest.mark.parametrize("recipe", ["normuon", "muon_complete"])
def test_any_factor_changes_a_float32_update_by_rounding_alone(recipe, update):
    for name in MATRICES:
        wanted = update(unit(name), recipe, compute_dtype="float32")
        for scale in (1e-15, 3.3e-10, 7e9, 1e15):
            found = update(unit(name) * np.float32(scale), recipe, compute_dtype="float32")
            # 5.2e-4 at most, of rank one, whose rounding errors five steps amplify; else 2.1e-5.
            bound = 1e-3 if name == "rank one" else 8e-5
            assert np.linalg.norm(found - wanted) <= bound * np.linalg.norm(wanted)


@pytest.mark.parametrize("layout", ["owners", "shards"])
def test_the_update_on_a_mesh_does_not_depend_on_the_scale_of_the_gradient(layout):
    mesh = mesh_of(f=8)
    shape = (8, 16, 32) if layout == "owners" else (32, 2048)
    spec = jax.P(None, "f")
    tx = muon(1.0, layout=MatrixLayout(-2, -1))
    g = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    g /= np.linalg.norm(g)
    params = {"w": jax.device_put(np.zeros(shape, np.float32), NamedSharding(mesh, spec))}
    step = jax.jit(tx.update)

    def update(x):
        gradients = {"w": jax.device_put(x, NamedSharding(mesh, spec))}
        return np.asarray(step(gradients, tx.init(params), params)[0]["w"])

    text = step.lower(params, tx.init(params), params).compile().as_text()
    assert ("all-to-all" in {name for name, _, _ in collectives(text)}) == (layout == "owners")
    for exponent in (-49, 49):
        np.testing.assert_array_equal(update(g * np.float32(2.0**exponent)), update(g))


@UPDATES
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_entry_reaches_its_own_matrix_alone_at_any_scale(update, bad):
    update = functools.partial(update, layout=MatrixLayout(-1, -2))
    g = np.stack([unit("gaussian")] * 2) * np.float32(1e-15)
    g[1, 3, 4] = bad
    found = update(g, "muon")
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1]).all()


def test_the_update_in_float64_does_not_depend_on_the_scale_of_the_gradient(x64):
    g = MATRICES["gaussian"] / np.linalg.norm(MATRICES["gaussian"])
    wanted = jax_factor(g, compute_dtype="float64")
    for scale in (1e-15, 1e15):
        np.testing.assert_allclose(
            jax_factor(g * scale, compute_dtype="float64"), wanted, rtol=1e-9
        )
