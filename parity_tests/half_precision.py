"""Tier T2: what half-precision polar factors are held to, and the matrices they are measured on."""

import numpy as np
import torch

from normuon_core import Polar
from parity_tests.spectra import SPECTRA, Spectrum

FORMS = {
    "bf16 standard": ("bfloat16", "standard"),
    "fp16 standard": ("float16", "standard"),
    "fp16 Gram": ("float16", "gram"),
}
"""(compute dtype, algorithm) by the name that tables use."""

WORST_RATIO = 1.1
ABSOLUTE_FLOOR = 1e-6
"""An error may be WORST_RATIO times the plain bfloat16 form's on the same input, plus this."""


def one_huge_column(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return SPECTRA["one huge row"](rng, columns, rows).T


HARD_SPECTRA: dict[str, Spectrum] = {**SPECTRA, "one huge column": one_huge_column}
"""A dominant column fills the Gram matrix of a wide matrix; a dominant row is one entry of it."""


def draw(spectrum: str, shape: tuple[int, int], draws: int) -> np.ndarray:
    """(draws, *shape) float32, so that every implementation sees the same matrices."""
    rngs = (np.random.default_rng(seed) for seed in range(draws))
    return np.stack([HARD_SPECTRA[spectrum](rng, *shape) for rng in rngs]).astype(np.float32)


def published_polar_factor(u: torch.Tensor, polar: Polar, dtype: torch.dtype) -> torch.Tensor:
    """The iteration as KellerJordan/modded-nanogpt writes it, every operation rounded to `dtype`.

    In bfloat16 it is T2's yardstick, the plain form; in float64 the oracle, also on a GPU.

    Args:
      u: (..., rows, columns), any floating dtype. Norm and scaling are done in float32 or wider.
    """
    u = u.to(torch.promote_types(dtype, torch.float32))
    norm = torch.linalg.matrix_norm(u, keepdim=True) * polar.norm_scale
    x = u / (norm.clamp_min(polar.eps) if polar.eps_rule == "max" else norm + polar.eps)
    x = x.to(dtype)
    x = x if x.shape[-2] <= x.shape[-1] else x.mT
    for a, b, c in polar.coefficients:
        gram = _product(x, x.mT)
        z = b * gram + _product(c * gram, gram)
        x = a * x + _product(z, x)
    return x if u.shape[-2] <= u.shape[-1] else x.mT


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.device.type == "cpu" and a.dtype == torch.bfloat16:
        # Exact products and float32 sums, as a GPU has them; CPUs differ in their own.
        return (a.float() @ b.float()).to(a.dtype)
    return a @ b
