"""Rows equilibrated before the polar factor, and the norm set after it: alone and in recipes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import optax_normuon
import torch_ref
from normuon_core import RECIPES, MatrixLayout, NormSetting, RowEquilibration
from parity_tests import oracle

OUT_IN, IN_OUT = MatrixLayout(-1, -2), MatrixLayout(-2, -1)
RULES = {"equilibrate_rows": RowEquilibration, "set_norm": NormSetting}

pytestmark = pytest.mark.usefixtures("x64")


def hard_stack(scale):
    """Three matrices with a zero row, a huge one and a tiny one; the last of them is zero."""
    x = np.random.default_rng(0).standard_normal((3, 4, 6))
    x[:, 1], x[:, 2], x[:, 3] = 0.0, 1e4 * x[:, 2], 1e-9 * x[:, 3]
    x[2] = 0.0
    return scale * x


def by_oracle(name, x, rule):
    return np.stack([getattr(oracle, name)(matrix, rule) for matrix in x])


@pytest.mark.parametrize("output_is_rows", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1e-12])
@pytest.mark.parametrize("name", RULES)
def test_each_stage_follows_the_oracle_in_both_frameworks(name, scale, output_is_rows):
    """Tiny matrices feel the floor. Largest relative difference: 2.2e-16."""
    x, rule = hard_stack(scale), RULES[name]()
    expected = by_oracle(name, x, rule)
    given = x if output_is_rows else np.swapaxes(x, 1, 2)
    layout = OUT_IN if output_is_rows else IN_OUT
    tx = getattr(optax_normuon, name)(**vars(rule), layout=layout)
    found, _ = tx.update(jnp.asarray(given), tx.init(jnp.asarray(given)))
    side = {"output_is_rows": output_is_rows} if name == "equilibrate_rows" else {}
    theirs = getattr(torch_ref, name)(torch.tensor(given), **vars(rule), **side).numpy()
    for each in (np.asarray(found), theirs):
        each = each if output_is_rows else np.swapaxes(each, 1, 2)
        np.testing.assert_allclose(each, expected, rtol=1e-14, atol=0)
    if scale < 1:
        twice = by_oracle(name, x, RULES[name](2 * rule.eps))
        np.testing.assert_allclose(twice, expected / 2, rtol=1e-14)


def test_all_rows_that_are_fed_get_one_norm_and_the_matrix_keeps_its_own():
    x = np.random.default_rng(1).standard_normal((1, 5, 8)) * np.geomspace(1e-3, 1e3, 5)[:, None]
    rows = torch_ref.equilibrate_rows(torch.tensor(x)).norm(dim=-1)
    torch.testing.assert_close(rows, torch.full_like(rows, np.linalg.norm(x) / 5**0.5))


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_the_norm_that_is_set_is_that_of_an_exact_polar_factor(shape):
    x = torch.tensor(np.random.default_rng(2).standard_normal((1, *shape)))
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    exact = torch.linalg.matrix_norm(u @ v)
    torch.testing.assert_close(torch.linalg.matrix_norm(torch_ref.set_norm(x)), exact)


def test_the_norm_is_set_in_float32_and_rounded_once_to_half_precision():
    v = torch.randn(2, 8, 12, dtype=torch.bfloat16)
    found, lifted = torch_ref.set_norm(v), torch_ref.set_norm(v.float())
    assert torch.equal(found, lifted.bfloat16())
    tx = optax_normuon.set_norm(layout=OUT_IN)
    ours, _ = tx.update(jnp.asarray(v.float().numpy()).astype(jnp.bfloat16), optax.EmptyState())
    assert ours.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", RULES)
def test_a_negative_floor_is_refused(name):
    with pytest.raises(ValueError, match="eps=-1"):
        RULES[name](-1)
    with pytest.raises(ValueError, match="eps=-1"):
        getattr(optax_normuon, name)(eps=-1)
    with pytest.raises(ValueError, match="eps=-1"):
        getattr(torch_ref, name)(torch.ones(2, 2), eps=-1)


@pytest.mark.parametrize("base", ["muon", "dion_normuon", "muon_2024_10"])
@pytest.mark.parametrize("stages", [(True, False), (False, True)], ids=["rows", "norm"])
def test_each_stage_works_in_any_recipe(base, stages):
    """Both frameworks, in Optax's chain and in the optimizer, against the oracle."""
    rows, norm = stages
    recipe = dataclasses.replace(
        RECIPES[base],
        row_equilibration=RowEquilibration() if rows else None,
        norm_setting=NormSetting() if norm else None,
    )
    x = np.random.default_rng(3).standard_normal((5, 7)) * np.geomspace(1e-2, 1, 5)[:, None]
    p = np.zeros_like(x)
    expected = oracle.step(recipe, p, x, oracle.State(), lr=1.0)
    tx = optax_normuon.normuon(1.0, recipe=recipe, layout=OUT_IN, compute_dtype=jnp.float64)
    ours, _ = tx.update(jnp.asarray(x), tx.init(jnp.asarray(p)), jnp.asarray(p))
    param = torch.nn.Parameter(torch.tensor(p))
    param.grad = torch.tensor(x)
    torch_ref.NorMuon([param], lr=1.0, recipe=recipe, compute_dtype=torch.float64).step()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(param.detach().numpy(), expected, rtol=0, atol=1e-12)
    without = oracle.step(RECIPES[base], p, x, oracle.State(), lr=1.0)
    assert np.abs(without - expected).max() > 1e-2 * np.abs(expected).max()


def test_an_orthogonalizer_of_ones_own_gets_equilibrated_rows():
    recipe = RECIPES["nanochat"]
    x = np.random.default_rng(4).standard_normal((4, 6)) * np.geomspace(1e-2, 1, 4)[:, None]
    seen = []

    def orthogonalizer(stack):
        seen.append(np.asarray(stack[0]))
        return stack

    keywords = {"recipe": recipe, "momentum": 0.0, "orthogonalizer": orthogonalizer}
    tx = optax_normuon.normuon(1.0, layout=OUT_IN, **keywords)
    tx.update(jnp.asarray(x), tx.init(jnp.asarray(x)), jnp.asarray(x))
    param = torch.nn.Parameter(torch.tensor(x))
    param.grad = torch.tensor(x)
    torch_ref.NorMuon([param], lr=1.0, **keywords).step()
    wanted = oracle.equilibrate_rows(x, RowEquilibration())
    for each in seen:
        np.testing.assert_allclose(each, wanted, rtol=1e-13)
    assert len(seen) >= 2
