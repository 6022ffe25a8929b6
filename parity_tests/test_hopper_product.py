"""On Hopper the warp-specialised product has the bits of the Triton one, in every form and size."""

import itertools

import numpy as np
import pytest
import torch

from normuon_core.kernels import launches
from normuon_core.kernels.geometry import padded
from normuon_core.kernels.tiles import HopperConfiguration, ProductConfiguration
from parity_tests.spectra import SPECTRA

PORTABLE = ProductConfiguration(64, 64, 64, 4, 3, 2)
CONFIGURATIONS = [HopperConfiguration(256, 4, 2), HopperConfiguration(128, 5, 4)]
"""Both widths of a tile."""

SIZES = [(1, 5), (8, 8), (40, 72), (96, 200), (130, 260), (257, 511), (384, 384), (640, 1000)]
"""Sides under a tile, ragged ones, and rows that are padded."""

COUNT = 3


def forms(short: int, long: int) -> dict[str, tuple]:
    """(m, n, k, symmetric, addends, whether with a diagonal) of each product of an iteration."""
    return {
        "Gram": (short, short, long, True, 0, False),
        "one addend": (short, short, short, True, 1, True),
        "two addends": (short, short, short, True, 2, True),
        "apply": (short, long, short, False, 1, False),
        "apply without an addend": (short, long, short, False, 0, False),
    }


def stack(rows: int, columns: int, dtype: torch.dtype, seed: int, spectrum: str) -> torch.Tensor:
    """Matrices of a hard spectrum, in rows whose padding is not a number."""
    x = torch.full((COUNT, rows, padded(columns)), float("nan"), device="cuda", dtype=dtype)
    for i in range(COUNT):
        drawn = SPECTRA[spectrum](np.random.default_rng(seed + i), rows, columns)
        matrix = torch.from_numpy(drawn).to("cuda")
        x[i, :, :columns] = (matrix / matrix.norm().clamp_min(1e-30)).to(dtype)
    return x


def product(configuration, form: tuple, a, b, addends) -> torch.Tensor:
    from torch_ref.kernels import launcher

    m, n, k, symmetric, count, diagonal = form
    launch = launches.product(
        COUNT,
        m,
        n,
        k,
        dtype=str(a.dtype).removeprefix("torch."),
        configuration=configuration,
        multiprocessors=launcher.describe_device(a.device).multiprocessors,
        b_transposed=symmetric,
        symmetric=symmetric,
        addends=count,
        has_diagonal=diagonal,
    )
    factors = [1.3, -0.4][:count] + [0.0] * (2 - count)
    arrays = [*addends, *[a] * (2 - count)]
    inputs = [a, b, *arrays, 0.7, *factors, 0.25 if diagonal else 0.0, COUNT]
    (result,) = launcher.launch(launch, inputs)
    return result[..., :n]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("sides", SIZES, ids=lambda sides: "x".join(map(str, sides)))
def test_both_product_kernels_make_the_same_bits(sides, dtype):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is Hopper's")
    for (name, form), spectrum in itertools.product(forms(*sides).items(), SPECTRA):
        m, n, k, symmetric, count, _ = form
        a = stack(m, k, dtype, 0, spectrum)
        b = a if symmetric else stack(k, n, dtype, 10, spectrum)
        addends = [stack(m, n, dtype, 20 + 10 * i, spectrum) for i in range(count)]
        expected = product(PORTABLE, form, a, b, addends)
        for configuration in CONFIGURATIONS:
            found = product(configuration, form, a, b, addends)
            assert torch.equal(found, expected), (name, spectrum, configuration)
            if symmetric:
                assert torch.equal(found, found.mT), (name, spectrum, configuration)
