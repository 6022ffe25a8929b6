"""The product: exact operands, float32 accumulation and epilogue, one rounding."""

import pytest
import torch

from torch_ref import product

HALF = [torch.bfloat16, torch.float16]


def operands(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 8, 64), (2, 64, 8), (2, 8, 8)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_product_rounds_once(dtype):
    a, b, d = operands(dtype)
    exact = 3.4445 * (a.double() @ b.double()) - 4.775 * d.double()
    found = product(a, b, d, alpha=3.4445, beta=-4.775)
    assert found.dtype == dtype
    ulp = exact.abs() * torch.finfo(dtype).eps
    # Half an ulp is the one rounding; float32's own errors move a few entries across a boundary.
    assert ((found.double() - exact).abs() <= 0.501 * ulp + 1e-5).all()


@pytest.mark.parametrize("dtype", HALF)
def test_coefficients_are_not_rounded_to_the_compute_dtype(dtype):
    one = torch.ones(1, 1, 1, dtype=dtype)
    coefficient = 8.156554524902461
    assert torch.tensor(coefficient, dtype=dtype).item() != coefficient
    difference = product(one, one, one * 8, alpha=coefficient, beta=-1.0)
    assert difference.item() == torch.tensor(coefficient - 8).to(dtype).item()


def test_float16_range_is_not_left_before_the_epilogue():
    a = torch.full((1, 1, 64), 200.0, dtype=torch.float16)
    assert product(a, a.mT, alpha=2.0**-10).item() == 200.0 * 200 * 64 / 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_dtypes_keep_their_precision(dtype):
    a, b, d = operands(torch.float64)
    wanted = 2.5 * (a @ b) - 0.5 * d
    found = product(a.to(dtype), b.to(dtype), d.to(dtype), alpha=2.5, beta=-0.5)
    assert found.dtype == dtype
    assert (found - wanted).abs().max() < 200 * torch.finfo(dtype).eps
    alone = product(a.to(dtype), b.to(dtype), alpha=2.5)
    assert (alone - 2.5 * (a @ b)).abs().max() < 200 * torch.finfo(dtype).eps


def test_operands_are_not_modified():
    for dtype in (torch.bfloat16, torch.float32):
        given = operands(dtype)
        kept = [x.clone() for x in given]
        product(*given, alpha=2.0, beta=3.0)
        assert all(torch.equal(x, y) for x, y in zip(given, kept, strict=True))
