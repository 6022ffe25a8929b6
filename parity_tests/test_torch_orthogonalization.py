"""The polar factor in both forms and every dtype, against the same polynomial in float64."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch

from normuon_core import POLYNOMIALS, RECIPES, Polar, polar_express
from parity_tests import oracle
from torch_ref import orthogonalization as forms
from torch_ref import polar_factor

POLAR_EXPRESS = RECIPES["normuon"].polar
NEWTON_SCHULZ = RECIPES["muon_keller"].polar
PAPER_TABLE = Polar(POLYNOMIALS["polar_express_1_05"], norm_scale=1.0)
POLARS = {"polar_express": POLAR_EXPRESS, "newton_schulz": NEWTON_SCHULZ, "1.05": PAPER_TABLE}
SHAPES = [(48, 128), (128, 48), (64, 64)]
SPECTRA = ["gaussian", "log", "rank_one", "rank_ten", "zero", "huge_row", "large", "small"]
FORMS = [("standard", torch.bfloat16), ("standard", torch.float16), ("gram", torch.float16)]


def with_spectrum(name, rows, columns, seed):
    rng = np.random.default_rng(seed)
    gaussian = rng.standard_normal((rows, columns))
    if name == "log":
        u, _, vt = np.linalg.svd(gaussian, full_matrices=False)
        return u * np.logspace(0, -9, min(rows, columns)) @ vt
    if name == "huge_row":
        gaussian[rows // 3] *= 1e4
    if name.startswith("rank"):
        rank = {"rank_one": 1, "rank_ten": 10}[name]
        return gaussian[:, :rank] @ rng.standard_normal((rank, columns))
    return gaussian * {"zero": 0.0, "large": 1e8, "small": 1e-8}.get(name, 1.0)


@functools.cache
def median_error(name, shape, polar, algorithm, compute_dtype, draws=4):
    """Relative Frobenius error (absolute for the zero matrix), median over draws."""
    stack = np.stack([with_spectrum(name, *shape, seed) for seed in range(draws)])
    x = torch.tensor(stack, dtype=torch.float32)
    y = polar_factor(x, **vars(polar), algorithm=algorithm, compute_dtype=compute_dtype)
    assert y.dtype == compute_dtype
    errors = []
    for found, matrix in zip(y.double().numpy(), x.double().numpy(), strict=True):
        wanted = oracle.polar_factor(matrix, polar)
        error, norm = np.linalg.norm(found - wanted), np.linalg.norm(wanted)
        errors.append(error / norm if norm > 0 else error)
    return np.median(errors)


@pytest.mark.parametrize("algorithm", ["standard", "gram"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("polar", POLARS)
def test_both_forms_equal_the_oracle_in_float64(polar, shape, algorithm):
    for name in SPECTRA:
        x = with_spectrum(name, *shape, 0)
        wanted = oracle.polar_factor(x, POLARS[polar])
        found = polar_factor(
            torch.tensor(x),
            **vars(POLARS[polar]),
            algorithm=algorithm,
            compute_dtype=torch.float64,
        )
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-12, err_msg=name)


# Gram in float32 reaches 3e-4 (96x96, Polar Express, log-spaced), standard 2e-4 (rank one).
@pytest.mark.parametrize("algorithm", ["standard", "gram"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_float32_products_are_a_thousand_times_closer_than_bfloat16(spectrum, shape, algorithm):
    assert median_error(spectrum, shape, POLAR_EXPRESS, algorithm, torch.float32) < 1e-3


# The Gram form is for oblong matrices: at 64x64 its float16 error is twice bfloat16's standard one.
@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_float16_gram_is_no_worse_than_the_standard_form_in_bfloat16(spectrum, shape):
    gram = median_error(spectrum, shape, POLAR_EXPRESS, "gram", torch.float16)
    plain = median_error(spectrum, shape, POLAR_EXPRESS, "standard", torch.bfloat16)
    assert gram <= 1.1 * plain


@pytest.mark.parametrize("polar", POLARS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_float16_standard_form_is_no_worse_than_bfloat16(spectrum, shape, polar):
    half = median_error(spectrum, shape, POLARS[polar], "standard", torch.float16)
    assert half <= median_error(spectrum, shape, POLARS[polar], "standard", torch.bfloat16)


def test_gram_form_loses_small_directions_in_bfloat16():
    args = ("log", (48, 128), POLAR_EXPRESS, "gram")
    assert median_error(*args, torch.bfloat16) > 4 * median_error(*args, torch.float16)


def test_gram_form_restarts_in_polynomials_of_any_length():
    for steps in range(1, 10):
        polar = Polar(polar_express(1e-3, steps=steps, safety=1.02), eps=1e-8)
        x = with_spectrum("gaussian", 24, 60, steps)
        found = polar_factor(
            torch.tensor(x), **vars(polar), algorithm="gram", compute_dtype=torch.float64
        )
        np.testing.assert_allclose(found, oracle.polar_factor(x, polar), rtol=0, atol=1e-11)


@pytest.mark.parametrize("restarts", [True, False])
def test_restart_is_what_keeps_the_small_directions(monkeypatch, restarts):
    if not restarts:
        monkeypatch.setattr(forms, "gram_restarts_before", lambda step: False)
    x = torch.tensor(with_spectrum("log", 48, 192, 0), dtype=torch.float32)
    found = polar_factor(x, algorithm="gram", compute_dtype=torch.float16)
    wanted = oracle.polar_factor(x.double().numpy(), POLAR_EXPRESS)
    error = np.linalg.norm(found.double().numpy() - wanted) / np.linalg.norm(wanted)
    assert (error < 0.1) == restarts


def test_float16_range_scales_lift_a_large_normalised_matrix_out_of_the_subnormals():
    rows, columns = 8192, 28672
    x_scale, gram_scale = forms.range_scales(rows, columns, torch.float16)
    assert (x_scale, gram_scale) == (2.0**13, 2.0**12)
    entries = torch.randn(100_000, dtype=torch.float64) / math.sqrt(rows * columns)

    def lost(scale):
        stored = (entries * scale).half().double() / scale
        return ((stored - entries).abs() > 2.0**-11 * entries.abs()).double().mean()

    assert lost(x_scale) < 1e-3
    assert lost(1.0) > 0.3
    assert forms.range_scales(2 * rows, 8 * columns, torch.float16) == (x_scale, gram_scale)
    assert forms.range_scales(rows, columns, torch.bfloat16) == (1.0, 1.0)


@pytest.mark.parametrize("algorithm", ["standard", "gram"])
@pytest.mark.parametrize("shape", [(64, 256), (256, 64)])
def test_float16_keeps_entries_that_lie_below_its_normal_range(shape, algorithm):
    x = with_spectrum("gaussian", *shape, 0)
    x[0], x[:, 0] = 0.0, 0.0
    x[0, 0] = 2e6  # normalised, the others lie near 5e-7; the smallest normal number is 6e-5
    wanted = oracle.polar_factor(x, POLAR_EXPRESS)[1:, 1:]
    found = polar_factor(torch.tensor(x), algorithm=algorithm, compute_dtype=torch.float16)
    error = np.linalg.norm(found[1:, 1:].double().numpy() - wanted) / np.linalg.norm(wanted)
    assert error < 5e-3


@pytest.mark.parametrize("algorithm", ["standard", "gram"])
@pytest.mark.parametrize("polar", POLARS)
def test_float16_range_scales_never_overflow(polar, algorithm, monkeypatch):
    monkeypatch.setattr(forms, "range_scales", lambda *_: (2.0**13, 2.0**12))
    for name in ("rank_one", "huge_row", "spike"):
        x = np.zeros((32, 64)) if name == "spike" else with_spectrum(name, 32, 64, 0)
        x[1, 2] += name == "spike"
        found = polar_factor(
            torch.tensor(x),
            **vars(POLARS[polar]),
            algorithm=algorithm,
            compute_dtype=torch.float16,
        )
        assert found.isfinite().all()


@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("algorithm", ["standard", "gram"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_entry_makes_its_own_matrix_nan(bad, algorithm, compute_dtype):
    x = torch.tensor(np.random.default_rng(0).standard_normal((3, 8, 20)), dtype=torch.float32)
    clean = polar_factor(x, algorithm=algorithm, compute_dtype=compute_dtype)
    x[1, 3, 4] = bad
    y = polar_factor(x, algorithm=algorithm, compute_dtype=compute_dtype)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


def test_a_norm_that_overflows_is_nan_and_not_zero():
    x = torch.full((1, 4, 8), 1e25)
    assert polar_factor(x).isnan().all()
    assert polar_factor(x.double()).isfinite().all()


@pytest.mark.parametrize("eps_rule", ["add", "max"])
def test_eps_rule_shows_on_tiny_input(eps_rule):
    polar = dataclasses.replace(NEWTON_SCHULZ, eps_rule=eps_rule)
    x = with_spectrum("gaussian", 4, 6, 0) * 1e-8
    found = polar_factor(torch.tensor(x), **vars(polar), compute_dtype=torch.float64)
    np.testing.assert_allclose(found, oracle.polar_factor(x, polar), rtol=1e-12)


def test_input_is_not_modified_and_any_leading_axes_pass():
    x = torch.randn(2, 3, 4, 5)
    kept = x.clone()
    y = polar_factor(x)
    assert torch.equal(x, kept)
    assert y.shape == x.shape
    assert torch.equal(y[1, 2], polar_factor(x[1, 2]))


def test_auto_takes_the_gram_form_on_cuda_where_it_saves_operations():
    def choice(rows, columns, device="cuda", compute_dtype=None, polar=POLAR_EXPRESS):
        return forms.choose_form(
            rows,
            columns,
            coefficients=polar.coefficients,
            algorithm="auto",
            compute_dtype=compute_dtype,
            device=torch.device(device),
        )

    assert choice(100, 151) == ("gram", torch.float16)
    assert choice(151, 100) == ("gram", torch.float16)
    assert choice(100, 150) == ("standard", torch.bfloat16)
    assert choice(100, 400, "cpu") == ("standard", torch.bfloat16)
    assert choice(100, 400, compute_dtype=torch.bfloat16) == ("standard", torch.bfloat16)
    assert choice(100, 400, compute_dtype=torch.float32) == ("gram", torch.float32)
    assert choice(100, 400, polar=NEWTON_SCHULZ) == ("standard", torch.bfloat16)


def test_no_coefficients_and_an_unknown_algorithm_raise():
    with pytest.raises(ValueError, match="at least one"):
        polar_factor(torch.ones(2, 2), coefficients=())
    with pytest.raises(ValueError, match=r"unknown algorithm 'grams'.*'gram'"):
        polar_factor(torch.ones(2, 2), algorithm="grams")
