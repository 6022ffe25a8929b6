"""Tier T2: half-precision compute against the float64 oracle, no worse than the plain bfloat16 form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import optax_normuon
import torch_ref
from normuon_core import Polar
from normuon_core.polynomials import NEWTON_SCHULZ
from optax_normuon import orthogonalization
from parity_tests import oracle
from parity_tests.compare import frobenius_distance
from parity_tests.half_precision import plain_bfloat16_polar_factor
from parity_tests.spectra import SPECTRA

POLAR = Polar()
DRAWS = 16
SHAPE = (48, 128)
"""Sides in a ratio at which `algorithm="auto"` may take the Gram form."""

WORST_RATIO = 1.1
ABSOLUTE_FLOOR = 1e-6


def jax_polar_factors(stack, dtype: str, algorithm: str):
    result = optax_normuon.polar_factor(
        jnp.asarray(stack, jnp.float32), compute_dtype=jnp.dtype(dtype), algorithm=algorithm
    )
    return np.asarray(result)


def torch_polar_factors(stack, dtype: str, algorithm: str):
    result = torch_ref.polar_factor(
        torch.tensor(stack, dtype=torch.float32),
        compute_dtype=getattr(torch, dtype),
        algorithm=algorithm,
    )
    return result.double().numpy()


def median_error(factors, expected) -> float:
    return float(
        np.median([frobenius_distance(f, e) for f, e in zip(factors, expected, strict=True)])
    )


def draw(spectrum: str, shape=SHAPE, draws: int = DRAWS) -> np.ndarray:
    """(draws, *shape), rounded to float32 so that every implementation sees the same matrix."""
    rngs = [np.random.default_rng(seed) for seed in range(draws)]
    stack = np.stack([SPECTRA[spectrum](rng, *shape) for rng in rngs])
    return stack.astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(
    ("dtype", "algorithm"),
    [("bfloat16", "standard"), ("float16", "standard"), ("float16", "gram")],
    ids=["bf16 standard", "fp16 standard", "fp16 Gram"],
)
def test_no_worse_than_the_plain_bfloat16_form(spectrum, dtype, algorithm):
    """Largest ratio over the spectra: bf16 standard 1.01 (one huge row; else
    0.65), fp16 standard 0.31, fp16 Gram 0.38."""
    stack = draw(spectrum)
    expected = [oracle.polar_factor(u, POLAR) for u in stack]
    allowed = WORST_RATIO * median_error(
        [plain_bfloat16_polar_factor(u, POLAR) for u in stack], expected
    )
    for factors in (jax_polar_factors, torch_polar_factors):
        assert median_error(factors(stack, dtype, algorithm), expected) <= allowed + ABSOLUTE_FLOOR


def test_square_matrices_lose_in_the_gram_form():
    """Why "auto" keeps to the standard form there, where Gram saves nothing: 0.023 against 0.013."""
    stack = draw("gaussian", (96, 96), draws=8)
    expected = [oracle.polar_factor(u, POLAR) for u in stack]
    gram = median_error(jax_polar_factors(stack, "float16", "gram"), expected)
    standard = median_error(jax_polar_factors(stack, "bfloat16", "standard"), expected)
    assert gram > 1.3 * standard


def test_auto_takes_the_gram_form_on_gpus_where_it_saves_and_holds(monkeypatch):
    """Newton-Schulz amplifies too much: with one dominant column 0.018 against the plain 0.015."""

    def choice(shape, coefficients=POLAR.coefficients, compute_dtype=None):
        return orthogonalization._takes_gram("auto", shape, coefficients, compute_dtype)

    assert not choice((100, 400))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choice((100, 400))
    assert choice((151, 100), compute_dtype=jnp.float16)
    assert not choice((100, 150))
    assert not choice((100, 400), compute_dtype=jnp.bfloat16)
    assert not choice((100, 400), NEWTON_SCHULZ)

    stack = draw("one huge row", (192, 48), draws=8).swapaxes(1, 2)
    polar = Polar(NEWTON_SCHULZ, norm_scale=1.0, eps=1e-7)
    expected = [oracle.polar_factor(u, polar) for u in stack]
    plain = median_error([plain_bfloat16_polar_factor(u, polar) for u in stack], expected)
    gram = optax_normuon.polar_factor(
        jnp.asarray(stack, jnp.float32),
        compute_dtype=jnp.float16,
        algorithm="gram",
        **vars(polar),
    )
    assert median_error(np.asarray(gram), expected) > 1.1 * plain


@pytest.mark.parametrize("factors", [jax_polar_factors, torch_polar_factors], ids=["jax", "torch"])
def test_bfloat16_loses_the_gram_form(factors):
    """Why "auto" takes the Gram form in float16 only: 8 times the error, 0.51 against 0.063."""
    stack = draw("log-spaced to 1e-9", draws=4)
    expected = [oracle.polar_factor(u, POLAR) for u in stack]
    half, brain = (
        median_error(factors(stack, d, "gram"), expected) for d in ("float16", "bfloat16")
    )
    assert brain > 4 * half


@pytest.mark.parametrize("algorithm", ["standard", "gram"])
@pytest.mark.parametrize("factors", [jax_polar_factors, torch_polar_factors], ids=["jax", "torch"])
def test_float16_keeps_entries_below_its_smallest_normal_number(factors, algorithm):
    """As most entries of a normalised 8192x28672 matrix are: 6.5e-5.

    Here one row carries the norm and the others, at 1e-6, are nearly linear in the polynomial.
    Relative error of those rows: standard 5.6e-4, Gram 4.4e-4; without the powers of two 1.9e-2.
    """
    u = draw("gaussian", draws=4)
    u[:, 1:] *= 1e-5
    expected = [oracle.polar_factor(matrix, POLAR)[1:] for matrix in u]
    assert median_error(factors(u, "float16", algorithm)[:, 1:], expected) <= 2e-3
