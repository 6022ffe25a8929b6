"""The polar factor in both forms and every dtype, against the same polynomial in float64."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch

from normuon_core import POLYNOMIALS, RECIPES, Polar, polar_express, polar_iteration
from parity_tests import oracle
from torch_ref import polar_factor
from torch_ref.stages import orthogonalization as forms

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


# Either form in float32 reaches 1.1e-4 (64x64, rank one).
@pytest.mark.parametrize("algorithm", ["standard", "gram"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_float32_products_are_a_thousand_times_closer_than_bfloat16(spectrum, shape, algorithm):
    assert median_error(spectrum, shape, POLAR_EXPRESS, algorithm, torch.float32) < 1e-3


# Largest ratio: 0.53 (128x48, 1.05, huge row).
@pytest.mark.parametrize("polar", POLARS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_float16_gram_is_no_worse_than_the_standard_form_in_bfloat16(spectrum, shape, polar):
    gram = median_error(spectrum, shape, POLARS[polar], "gram", torch.float16)
    assert gram <= median_error(spectrum, shape, POLARS[polar], "standard", torch.bfloat16)


@pytest.mark.parametrize("polar", POLARS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_float16_standard_form_is_no_worse_than_bfloat16(spectrum, shape, polar):
    half = median_error(spectrum, shape, POLARS[polar], "standard", torch.float16)
    assert half <= median_error(spectrum, shape, POLARS[polar], "standard", torch.bfloat16)


def test_gram_form_loses_small_directions_in_bfloat16():
    args = ("log", (48, 128), POLAR_EXPRESS, "gram")
    assert median_error(*args, torch.bfloat16) > 4 * median_error(*args, torch.float16)


@pytest.mark.parametrize("few_rows", [0, 512])
def test_gram_form_restarts_in_polynomials_of_any_length(few_rows, monkeypatch):
    monkeypatch.setattr(polar_iteration, "FEW_ROWS", few_rows)
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
        monkeypatch.setattr(polar_iteration, "gram_restarts", lambda steps, short: ())
    x = torch.tensor(with_spectrum("log", 48, 192, 0), dtype=torch.float32)
    found = polar_factor(x, algorithm="gram", compute_dtype=torch.float16)
    wanted = oracle.polar_factor(x.double().numpy(), POLAR_EXPRESS)
    error = np.linalg.norm(found.double().numpy() - wanted) / np.linalg.norm(wanted)
    assert (error < 0.1) == restarts


def test_float16_range_scales_lift_a_large_normalised_matrix_out_of_the_subnormals():
    rows, columns = 8192, 28672
    x_scale, gram_scale = polar_iteration.range_scales(rows, columns, "float16")
    assert (x_scale, gram_scale) == (2.0**13, 2.0**12)
    entries = torch.randn(100_000, dtype=torch.float64) / math.sqrt(rows * columns)

    def lost(scale):
        stored = (entries * scale).half().double() / scale
        return ((stored - entries).abs() > 2.0**-11 * entries.abs()).double().mean()

    assert lost(x_scale) < 1e-3
    assert lost(1.0) > 0.3
    assert polar_iteration.range_scales(2 * rows, 8 * columns, "float16") == (x_scale, gram_scale)
    assert polar_iteration.range_scales(rows, columns, "bfloat16") == (1.0, 1.0)


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


def test_auto_is_the_standard_form_off_the_gpu():
    x = torch.randn(2, 24, 100)
    assert polar_factor(x).dtype == torch.bfloat16
    assert polar_factor(x, algorithm="gram").dtype == torch.float16
    for dtype in (torch.bfloat16, torch.float16):
        auto, standard, gram = (
            polar_factor(x, compute_dtype=dtype, algorithm=algorithm)
            for algorithm in ("auto", "standard", "gram")
        )
        assert torch.equal(auto, standard)
        assert not torch.equal(auto, gram)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_auto_takes_the_gram_form_on_a_gpu_where_it_saves_operations(backend):
    """The choices themselves are tested in `test_half_precision.py`; here that they are heeded."""

    def dtype(rows, columns, **keywords):
        x = torch.randn(rows, columns, device="cuda")
        return polar_factor(x, backend=backend, **keywords).dtype

    assert dtype(24, 100) == dtype(100, 24) == torch.float16
    assert dtype(24, 24) == torch.bfloat16
    assert dtype(24, 30) == (torch.bfloat16 if backend == "eager" else torch.float16)
    assert dtype(24, 100, compute_dtype=torch.bfloat16) == torch.bfloat16


def test_no_coefficients_and_an_unknown_algorithm_raise():
    with pytest.raises(ValueError, match="coefficients is empty; give one"):
        polar_factor(torch.ones(2, 2), coefficients=())
    with pytest.raises(ValueError, match=r"unknown algorithm 'grams'.*'gram'"):
        polar_factor(torch.ones(2, 2), algorithm="grams")
