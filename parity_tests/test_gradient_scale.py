"""The update of c g is that of g, for gradient norms from 1e-15 to 1e15, in both frameworks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from optax_normuon import normuon, polar_factor
from torch_ref import NorMuon

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
    if keywords.get("backend") == "xla":
        keywords["backend"] = "eager"
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
    """Norm 20 g; a first step shows 1.95 g."""
    g = unit("gaussian") * np.float32(2.0**49)
    assert np.isfinite(update(g, "muon_complete", 80)).all()


@UPDATES
@pytest.mark.usefixtures("interpreted")
def test_kernels_are_as_free_of_scale(update):
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


def test_a_large_rank_one_matrix_keeps_its_bits():
    rng = np.random.default_rng(1)
    g = np.outer(rng.standard_normal(1024), rng.standard_normal(1024)).astype(np.float32)
    g /= np.linalg.norm(g)
    factor = jax.jit(polar_factor)
    wanted = factor(g * np.float32(0.0975))
    np.testing.assert_array_equal(factor(g * np.float32(0.0975 * 2.0**-49)), wanted)
