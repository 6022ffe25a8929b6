"""`coefficients`, `steps` and `eps` of `torch_ref.NorMuon`: as in JAX, by group, in state dicts."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from normuon_core import RECIPES
from optax_normuon import MatrixLayout, normuon
from torch_ref import NorMuon, polar_factor

KEYWORDS = {
    "name and steps": dict(coefficients="newton_schulz", steps=3),
    "triples": dict(coefficients=((3.0, -3.2, 1.2),)),
    "steps": dict(steps=2),
    "eps": dict(eps=3.0),
}
G = np.random.default_rng(0).standard_normal((3, 8, 4))
W = np.random.default_rng(1).standard_normal((8, 4))


def run(*, gradients=3, **group):
    weight = torch.nn.Parameter(torch.from_numpy(W.copy()))
    optimizer = NorMuon([{"params": [weight], **group}], lr=0.1, compute_dtype=torch.float64)
    for gradient in G[:gradients]:
        weight.grad = torch.from_numpy(gradient)
        optimizer.step()
    return weight.detach().numpy(), optimizer


@pytest.mark.parametrize("name", KEYWORDS)
def test_a_keyword_makes_the_update_that_it_makes_in_jax(name, x64):
    keywords = KEYWORDS[name]
    found, _ = run(**keywords)
    tx = normuon(0.1, layout=MatrixLayout(1, 0), compute_dtype=jnp.float64, **keywords)
    weight = jnp.asarray(W)
    state = tx.init(weight)
    for gradient in G:
        updates, state = tx.update(jnp.asarray(gradient), state, weight)
        weight = weight + updates
    # 5.6e-16 at most.
    np.testing.assert_allclose(found, weight, rtol=0, atol=2.3e-15)
    assert not np.allclose(found, run()[0], rtol=1e-3)


@pytest.mark.parametrize("name", KEYWORDS)
def test_a_state_dict_keeps_the_keywords(name, tmp_path):
    wanted, _ = run(**KEYWORDS[name])
    _, optimizer = run(gradients=2, **KEYWORDS[name])
    torch.save(optimizer.state_dict(), tmp_path / "state")
    weight = torch.nn.Parameter(optimizer.param_groups[0]["params"][0].detach().clone())
    resumed = NorMuon([weight], lr=0.1)
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    weight.grad = torch.from_numpy(G[2])
    resumed.step()
    np.testing.assert_array_equal(weight.detach().numpy(), wanted)


def test_a_keyword_makes_the_update_of_a_recipe_with_that_field():
    recipe = RECIPES["normuon"]
    other = dataclasses.replace(recipe, polar=dataclasses.replace(recipe.polar, eps=3.0))
    np.testing.assert_array_equal(run(eps=3.0)[0], run(recipe=other)[0])


def test_polar_factor_takes_the_same_keywords():
    x = torch.from_numpy(W)
    found = polar_factor(x, coefficients="newton_schulz", steps=2, compute_dtype=torch.float64)
    triples = RECIPES["muon_keller"].polar.coefficients[:2]
    assert torch.equal(found, polar_factor(x, coefficients=triples, compute_dtype=torch.float64))


def test_eps_in_a_group_of_adamw_is_the_epsilon_of_adam():
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = NorMuon([{"params": [weight], "optimizer": "adamw", "eps": 0.5}], lr=0.1, eps=1e-3)
    weight.grad = torch.ones(4)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((4,), 1 - 0.1 / 1.5))


def test_an_impossible_value_is_refused_and_the_error_names_the_remedy():
    with pytest.raises(ValueError, match="did you mean 'newton_schulz'"):
        run(coefficients="newton_shulz")
    with pytest.raises(ValueError, match="steps=6"):
        run(coefficients="you", steps=6)
